"""The batch of step s as a pure function of (config, s): rows by arithmetic, windows from token stores, objectives.

Nothing here has a state, so nothing has to be saved: after a restart, on other hosts or devices, step s has the same
rows. Global row r of the training rows is found like this:

    r -> which component, a source with one of its denoisers (exact rates within every block of 4096 rows), and i
    i -> epoch and place in the epoch; the place, shuffled by a permutation of the epoch -> the component's row
    row -> a window of text or packed examples; an objective's randomness is keyed by (seed, r)

Called by `train` and `evaluate` (`Batches`, `prefetch`) and, for shapes alone, by everything that compiles (`spec`).
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple, Protocol

import grain
import numpy as np

from t5like.config.schema import Config
from t5like.data.objectives import denoising
from t5like.data.objectives.denoising import Denoiser, denoisers
from t5like.data.objectives.masking import sentence_pairs
from t5like.data.objectives.windows import TextWindows
from t5like.data.randomness import permute, random_bits
from t5like.data.sources.names import source_names
from t5like.data.store.token_store import Stream, TokenStore
from t5like.data.supervised.examples import Examples
from t5like.data.supervised.packing import ExampleRows, blank_rows
from t5like.data.tokenizers.vocabulary import Vocabulary
from t5like.errors import DataError
from t5like.types import Batch

BLOCK = 4096  # rows in which the rates hold exactly

# What a random number is for: keeps the streams of random bits apart.
SHUFFLE, OFFSET, MIXTURE, CORRUPTION = range(4)


class Component(NamedTuple):
    """Where a row can come from: one source, made into rows in one way.

    Attributes:
        source: index in `data.source`.
        objective: index in `data.objective`.
        name: the denoiser's, in the metrics.
        share: of the objective's rows, 0 to 1.
        denoiser: how windows become rows; None for supervised rows, which are packed examples.
    """

    source: int
    objective: int
    name: str
    share: float
    denoiser: Denoiser | None


def components(config: Config) -> tuple[Component, ...]:
    """All components of a config, source by source; `Batch.component_B1` counts them.

    Raises:
        ConfigError: an objective does not fit the lengths (see `objectives.denoisers`).
    """
    ways = [(config.data.objective.index(way.objective), way.name, way.share, way) for way in denoisers(config)]
    return tuple(
        Component(source, *way)
        for source in range(len(config.data.source))
        for way in ways or [(0, "supervised", 1.0, None)]
    )


def component_names(config: Config, *, every: bool = False) -> list[dict[str, str]]:
    """For each component its names in the metrics, by kind: source, objective, denoiser.

    Args:
        every: also a kind that has one name only, and the kind `component`: source and denoiser together. Else only
            kinds that tell components apart.
    """
    found, sources = components(config), source_names(config.data)
    names = [
        {
            "source": sources[each.source],
            "objective": config.data.objective[each.objective],
            "denoiser": each.name,
        }
        for each in found
    ]
    several = {kind for kind in names[0] if every or len({name[kind] for name in names}) > 1}
    if {name["denoiser"] for name in names} == {name["objective"] for name in names}:
        several.discard("denoiser")  # each objective is its own only one
    component = lambda name: {"component": f"{name['source']}/{name['denoiser']}"} if every else {}
    return [{kind: name[kind] for kind in name if kind in several} | component(name) for name in names]


def open_split(config: Config, stores: Sequence[TokenStore], split: str) -> list[Stream | Examples]:
    """A split, "train" or "heldout", of each source's store: running text, or supervised examples.

    Raises:
        DataError: no example of a source fits a row.
    """
    if "supervised" not in config.data.objective:
        return [store.split(split) for store in stores]
    return [Examples(config, *each, split) for each in zip(config.data.source, stores, strict=True)]


def rates(config: Config, sizes: Sequence[float]) -> np.ndarray:
    """float64 [phases, components]: how often each component is drawn in each phase; rows sum to 1.

    Args:
        sizes: of each source, to draw in proportion to where `data.rates` is empty.
    """
    data, found = config.data, components(config)
    phases = 1 + len(data.phase_boundaries)
    sources = np.reshape(data.rates, (phases, -1)) if data.rates else np.tile(np.asarray(sizes, float), (phases, 1))
    denoising = np.reshape(data.objective_rates or np.ones(phases * len(data.objective)), (phases, -1))
    rates = np.array([sources[:, each.source] * denoising[:, each.objective] * each.share for each in found]).T
    return rates / rates.sum(1, keepdims=True)


def spec(config: Config) -> Batch:
    """Shapes and dtypes of a global batch, from the config alone, as a batch of zeros without memory behind them.

    Raises:
        ConfigError: an objective does not fit the lengths (see `objectives.denoisers`).
    """
    return Batch(
        *(
            None if x is None else np.broadcast_to(np.zeros((), x.dtype), (config.data.batch_size, *x.shape[1:]))
            for x in _row(config)
        )
    )


def _row(config: Config) -> Batch:
    """A row of each field that the config's batches have: the value where a component does not say otherwise."""
    several = len(components(config)) > 1
    component_B1 = np.zeros((1, 1), np.int32) if several else None
    if "supervised" in config.data.objective:
        return blank_rows(config, 1)._replace(component_B1=component_B1)
    size = config.tokenizer.vocab_size
    vocabulary = Vocabulary(1, np.arange(config.tokenizer.num_sentinels) + 3, np.ones(size, bool), np.ones(size, bool))
    made = []
    for way in denoisers(config):
        tokens_BT = np.ones((1, way.window.length), np.int32)
        pair = tokens_BT + (np.arange(way.window.length) > 0)
        segments_BT = pair if way.objective == "mlm_nsp" else tokens_BT if _needs_segments(config) else None
        text = TextWindows(tokens_BT, segments_BT, np.zeros(1, np.uint64), np.ones(1, np.int32))
        made.append(denoising.rows(config, way, vocabulary, text))
    fields = [next((x for x in each if x is not None), None) for each in zip(*made, strict=True)]
    row = Batch(*(None if x is None else np.zeros_like(x) for x in fields))
    ones = {
        name: np.ones_like(getattr(row, name))
        for name in ("encoder_segments_BS", "decoder_segments_BL")
        if getattr(row, name) is not None
    }
    follows = {} if row.follows_B1 is None else {"follows_B1": row.follows_B1 - 1}
    return row._replace(**ones, **follows, component_B1=component_B1)


def _needs_segments(config: Config) -> bool:
    """Whether rows say which document a token is from: borders matter, or an encoder's row may be padded."""
    if not config.data.cross_document_attention:
        return True
    return config.model.has_encoder and any(way.inputs < config.data.inputs_length for way in denoisers(config))


class Rows(Protocol):
    """One component's rows, `count` an epoch."""

    count: int

    def batch(self, index_B: np.ndarray, offset_B: np.ndarray, keys_B: np.ndarray) -> Batch:
        """Rows by number.

        Args:
            index_B: int64, below `count`.
            offset_B: uint64, random for each epoch; 0 for held-out rows.
            keys_B: uint64, the row's randomness.
        """


class Windows:
    """The rows that a denoiser makes of a stream of text."""

    def __init__(self, config: Config, vocabulary: Vocabulary, stream: Stream, denoiser: Denoiser) -> None:
        self.config, self.vocabulary, self.stream, self.denoiser = config, vocabulary, stream, denoiser
        self._numbered = _needs_segments(config)
        # A window may overlap the next one (decoder-only rows share a token); it then has to end inside the text.
        window = denoiser.window
        self.count = max((stream.num_tokens - (window.length - window.stride)) // window.stride, 0)

    def batch(self, index_B: np.ndarray, offset_B: np.ndarray, keys_B: np.ndarray) -> Batch:
        """See `Rows`. Each epoch begins at another token and wraps around, so that window borders fall elsewhere."""
        total, window = self.stream.num_tokens, self.denoiser.window
        offset_B = (offset_B % np.uint64(total)).astype(np.int64)
        text = self._text((index_B * window.stride + offset_B) % total, keys_B)
        return denoising.rows(self.config, self.denoiser, self.vocabulary, text)

    def _text(self, start_B: np.ndarray, keys_B: np.ndarray) -> TextWindows:
        length = self.denoiser.window.length
        if self.denoiser.objective == "mlm_nsp":
            return sentence_pairs(self.stream, start_B, length, keys_B)
        tokens_BT, segments_BT = self.stream.windows(start_B, length), None
        if not self.config.data.cross_document_attention:
            segments_BT = self.stream.segments(start_B, length)
        elif self._numbered:
            segments_BT = np.ones_like(tokens_BT)
        return TextWindows(tokens_BT, segments_BT, keys_B)


class _Phase(NamedTuple):
    """A stretch of training rows with the same rates."""

    first_row: int
    counts_C: np.ndarray  # rows of each component in a block
    before_C: np.ndarray  # rows of each component that earlier phases have used


class Batches:
    """The batches of one split. `at(step)` makes any of them, in any order.

    Training rows never end: every epoch goes through all rows of a component once, in another order and, for text, with
    other window borders. Held-out rows are each once, those of all components spread evenly; rows beyond the last have
    weight 0.
    """

    def __init__(self, config: Config, vocabulary: Vocabulary, streams: Sequence[Stream | Examples], *, heldout=False):
        """`streams` are those of one split of each `data.source`, in order: see `open_split`.

        Raises:
            DataError: a source has less text than one window.
        """
        self.config, self.heldout = config, heldout
        self.components = components(config)
        self.rows: list[Rows] = [
            Windows(config, vocabulary, streams[each.source], each.denoiser)
            if each.denoiser
            else ExampleRows(config, streams[each.source])
            for each in self.components
        ]
        self.num_rows = np.array([rows.count for rows in self.rows])
        self._check_size(streams)
        first_of_source = [[c.source for c in self.components].index(source) for source in range(len(streams))]
        self.rates_PC = rates(config, self.num_rows[first_of_source])
        self._row = _row(config)
        self._phases = self._make_phases()
        used = self.rates_PC.sum(0) > 0
        self._heldout_C = np.where(used, self.num_rows, 0)

    def _check_size(self, streams: Sequence[Stream | Examples]) -> None:
        split = "held-out" if self.heldout else "training"
        for each, count in zip(self.components, self.num_rows, strict=True):
            if each.denoiser and each.denoiser.objective == "mlm_nsp" and streams[each.source].num_documents < 2:
                raise DataError(
                    f"data.source={self.config.data.source[each.source]} has one {split} document, but pairs need "
                    "another; use more text, data.text_documents=passage, or a larger data.heldout_fraction"
                )
            if count < 1:  # of examples there is always a row
                raise DataError(
                    f"data.source={self.config.data.source[each.source]} has {streams[each.source].num_tokens} tokens "
                    f"of {split} text, less than one window of {each.denoiser.window.length}; use more text, a smaller "
                    "data.inputs_length" + (", or a larger data.heldout_fraction" if self.heldout else "")
                )

    def _make_phases(self) -> list[_Phase]:
        phases, before_C = [], np.zeros(len(self.rows), np.int64)
        starts = [step * self.config.data.batch_size for step in (0, *self.config.data.phase_boundaries)]
        for rates_C, start, stop in zip(self.rates_PC, starts, [*starts[1:], None], strict=True):
            phases.append(_Phase(start, _block_counts(rates_C), before_C))
            if stop is not None:  # a block that is not finished counts as used
                before_C = before_C + -(-(stop - start) // BLOCK) * phases[-1].counts_C
        return phases

    @property
    def num_batches(self) -> int | None:
        """Of held-out text; None for training."""
        return -(-self.num_heldout // self.config.data.batch_size) if self.heldout else None

    @property
    def num_heldout(self) -> int:
        """Held-out rows of all components that are ever drawn."""
        return int(self._heldout_C.sum())

    def heldout_rows(self, source: int) -> np.ndarray:
        """int64: the numbers of a source's held-out rows, ascending; of a source that is never drawn there are none."""
        component_R, _ = self._heldout_order
        return np.flatnonzero(np.array([each.source for each in self.components])[component_R] == source)

    def describe(self) -> list[str]:
        """Lines for the user: how often the run's steps go through each component, and at what rates."""
        data, lines = self.config.data, []
        stops = [*data.phase_boundaries, max(self.config.train.num_steps, *data.phase_boundaries, 0)]
        steps_P = np.diff([0, *np.minimum(stops, self.config.train.num_steps)])
        drawn_C = steps_P @ self.rates_PC * data.batch_size
        for each, rows, drawn, rates_P in zip(self.components, self.rows, drawn_C, self.rates_PC.T, strict=True):
            count = rows.count
            rate = " then ".join(f"{100 * rate:.3g} %" for rate in rates_P)
            where = f" of {source_names(data)[each.source]}" if len(data.source) > 1 else ""
            share = f", {rate} of the rows" if len(self.components) > 1 else ""
            filled = "" if each.denoiser else f", {100 * rows.fill:.0f} % filled"
            lines.append(f"{each.name}{where}: {count:,} rows an epoch{filled}, {drawn / count:.2f} epochs{share}")
        return lines

    def at(self, step: int, rows: np.ndarray | None = None) -> Batch:
        """The batch of a step, numpy.

        Args:
            step: from 0.
            rows: which of the global batch's rows to make (a process's own); None: all.
        """
        size = self.config.data.batch_size
        row_B = (step * size + (np.arange(size) if rows is None else rows)).astype(np.uint64)
        if not self.heldout:
            return self._make(*self._locate(row_B), self._bits(CORRUPTION, row_B))
        real_B = row_B < self.num_heldout
        row_B = np.minimum(row_B, np.uint64(self.num_heldout - 1))
        keys_B = self._bits(CORRUPTION, row_B + (np.uint64(1) << np.uint64(63)))
        batch = self._make(*self._locate_heldout(row_B), keys_B)
        if batch.follows_B1 is not None:
            batch = batch._replace(follows_B1=np.where(real_B[:, None], batch.follows_B1, -1))
        return batch._replace(weights_BL=batch.weights_BL * real_B[:, None])

    def components_of(self, step: int) -> np.ndarray:
        """The index in `components` that each row of a training step comes from: int [B]."""
        size = self.config.data.batch_size
        return self._locate(np.arange(step * size, (step + 1) * size, dtype=np.uint64))[0]

    def _bits(self, purpose: int, number_B: np.ndarray) -> np.ndarray:
        """uint64 [B]: random bits keyed by (seed, purpose, number)."""
        with np.errstate(over="ignore"):
            key = np.uint64(self.config.seed) * np.uint64(0x100000000) + np.uint64(purpose)
            return random_bits(random_bits(np.array([key]), 1)[0] ^ number_B, 1)[:, 0]

    def _locate(self, row_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Component of each training row, its number among the component's rows, and the random offset of its epoch."""
        component_B, index_B = self._mix(row_B)
        count_B = self.num_rows[component_B].astype(np.uint64)
        epoch_B, place_B = index_B // count_B, index_B % count_B
        epoch_B = epoch_B * np.uint64(len(self.rows)) + component_B.astype(np.uint64)
        place_B = permute(place_B, count_B, self._bits(SHUFFLE, epoch_B))
        return component_B, place_B.astype(np.int64), self._bits(OFFSET, epoch_B)

    def _mix(self, row_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Component of each row, and its number among that component's rows.

        Each block of 4096 rows holds the components in exact proportion, shuffled by a permutation of the block: inside
        a block a component's numbers come in that order, from block to block they go on.
        """
        if len(self.rows) == 1:
            return np.zeros(len(row_B), np.int64), row_B
        component_B, index_B = np.empty(len(row_B), np.int64), np.empty(len(row_B), np.uint64)
        phase_B = np.searchsorted([phase.first_row for phase in self._phases], row_B, side="right") - 1
        for number in np.unique(phase_B):
            mine, phase = phase_B == number, self._phases[number]
            block_B, place_B = np.divmod(row_B[mine] - np.uint64(phase.first_row), np.uint64(BLOCK))
            key_B = self._bits(MIXTURE, block_B + (np.uint64(number) << np.uint64(40)))
            slot_B = permute(place_B, np.full(len(place_B), BLOCK, np.uint64), key_B)
            ends_C = np.cumsum(phase.counts_C)
            component_B[mine] = which = np.searchsorted(ends_C, slot_B, side="right")
            rank_B = slot_B - (ends_C - phase.counts_C)[which].astype(np.uint64)
            done_B = phase.before_C[which].astype(np.uint64) + block_B * phase.counts_C[which].astype(np.uint64)
            index_B[mine] = done_B + rank_B
        return component_B, index_B

    def _locate_heldout(self, row_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        component_R, index_R = self._heldout_order
        row_B = row_B.astype(np.int64)
        return component_R[row_B], index_R[row_B], np.zeros(len(row_B), np.uint64)

    @cached_property
    def _heldout_order(self) -> tuple[np.ndarray, np.ndarray]:
        """Component and number of every held-out row: each component's in order, all of them at an even pace."""
        component_R = np.repeat(np.arange(len(self.rows)), self._heldout_C)
        index_R = np.concatenate([np.arange(count) for count in self._heldout_C])
        order = np.argsort((index_R + 0.5) / self._heldout_C[component_R], kind="stable")
        return component_R[order], index_R[order]

    def _make(self, component_B: np.ndarray, index_B: np.ndarray, offset_B: np.ndarray, keys_B: np.ndarray) -> Batch:
        """The rows with these numbers, from all components, as one batch."""
        if len(self.rows) == 1:
            return self.rows[0].batch(index_B, offset_B, keys_B)
        whole = Batch(*(None if x is None else np.repeat(x, len(component_B), axis=0) for x in self._row))
        for number in np.unique(component_B):
            mine = component_B == number
            part = self.rows[number].batch(index_B[mine], offset_B[mine], keys_B[mine])
            for all_rows, rows in zip(whole, part, strict=True):
                if rows is not None:
                    all_rows[mine] = rows
        return whole._replace(component_B1=component_B[:, None].astype(np.int32))


def prefetch(batches: Batches, start: int, stop: int, rows: np.ndarray | None = None) -> Iterator[Batch]:
    """The batches of steps [start, stop), made ahead in a background thread."""
    steps = grain.MapDataset.range(start, stop).map(lambda step: batches.at(int(step), rows))
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=batches.config.data.prefetch)
    return iter(steps.to_iter_dataset(options))


def _block_counts(rates: Sequence[float]) -> np.ndarray:
    """Rows of each source in a block: rates rounded by largest remainders, at least one for a rate above 0."""
    share = np.asarray(rates, np.float64) / np.sum(rates) * BLOCK
    counts = np.floor(share).astype(np.int64)
    counts[(share > 0) & (counts == 0)] = 1
    order = np.argsort(counts - share)
    while (left := BLOCK - counts.sum()) != 0:
        if left > 0:
            counts[order[: min(left, len(order))]] += 1
        else:
            counts[np.argmax(counts)] += int(left)
    return counts
