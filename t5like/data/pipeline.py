"""The batch of step s as a pure function of (config, s): row arithmetic, then windows of token stores and objectives.

There is no state: after a restart, or on other hosts or devices, step s has the same rows. They begin with row
s * batch_size, unless the run passed over rows (`row_schedule`). Row r of the training rows is determined like this:

    r -> its component, which is a source with one of its denoisers (exact rates in every block of 4096 rows), and the
         row's index i among the rows of the component
    i -> epoch and index in the epoch, which a permutation of the epoch shuffles -> index of the component's row
    row -> a window of text, or packed examples; the random numbers of an objective are keyed by (seed, r)

The path of a batch: `prefetch` -> `Batches.at` -> `Batches.locate` -> `RowSource.batch` (`objectives.text_rows`,
`supervised.packing`) -> `Batch`. Called by `train` and `evaluate`; whatever compiles the model needs shapes (`spec`).
"""

import collections
from bisect import bisect
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np

from t5like.config.schema import Config
from t5like.data.objectives import text_rows
from t5like.data.objectives.denoisers import denoisers
from t5like.data.objectives.text_rows import TextRows
from t5like.data.objectives.windows import Denoiser
from t5like.data.randomness import keyed_bits, permute
from t5like.data.row_schedule import RowSchedule
from t5like.data.sources.names import source_names
from t5like.data.store.token_store import Stream, TokenStore
from t5like.data.supervised.examples import Examples
from t5like.data.supervised.labelled import example_rows, open_examples
from t5like.data.supervised.packing import blank_rows
from t5like.data.tokenizers.vocabulary import Vocabulary
from t5like.distributed.preemption import wait_for_data
from t5like.errors import DataError
from t5like.types import Batch

BLOCK = 4096  # rows in which the rates are exact

# The purpose of a random number: separates the streams of random bits.
SHUFFLE, OFFSET, MIXTURE, CORRUPTION = range(4)


class Component(NamedTuple):
    """A component of the mixture of rows: one source with one denoiser.

    Attributes:
        source: index in `data.source`.
        objective: index in `data.objective`.
        name: of the denoiser, in the metrics.
        share: of the objective's rows, 0 to 1.
        denoiser: makes rows from windows of text; None for supervised examples, which are packed.
    """

    source: int
    objective: int
    name: str
    share: float
    denoiser: Denoiser | None


def components(config: Config) -> tuple[Component, ...]:
    """All components of a config, ordered by source; `Batch.component_B1` has indices in this list.

    Raises:
        ConfigError: an objective does not fit the lengths (see `denoisers`).
    """
    names = config.data.objective
    parts = [(names.index(each.objective), each.name, each.share, each) for each in denoisers(config)]
    parts = parts or [(0, names[0], 1.0, None)]
    return tuple(Component(source, *part) for source in range(len(config.data.source)) for part in parts)


def component_names(config: Config, *, every: bool = False) -> list[dict[str, str]]:
    """For each component its names in the metrics, by attribute: source, objective, denoiser.

    Args:
        every: include attributes that are equal for all components, and the attribute `component`, which joins source
            and denoiser. Otherwise only attributes that distinguish components.
    """
    sources = source_names(config.data)
    names = [
        {"source": sources[each.source], "objective": config.data.objective[each.objective], "denoiser": each.name}
        for each in components(config)
    ]
    shown = {attribute for attribute in names[0] if every or len({name[attribute] for name in names}) > 1}
    if {name["denoiser"] for name in names} == {name["objective"] for name in names}:
        shown.discard("denoiser")  # each objective has one denoiser of the same name
    component = lambda name: {"component": f"{name['source']}/{name['denoiser']}"} if every else {}
    return [{key: value for key, value in name.items() if key in shown} | component(name) for name in names]


def open_split(config: Config, stores: Sequence[TokenStore], split: str) -> list[Stream | Examples]:
    """A split, "train" or "heldout", of each source's store: streams of running text, or supervised examples.

    Raises:
        DataError: none of a source's examples fits in a row.
    """
    if not config.data.has_examples:
        return [store.split(split) for store in stores]
    return [open_examples(config, *each, split) for each in zip(config.data.source, stores, strict=True)]


def rates(config: Config, sizes: Sequence[float]) -> np.ndarray:
    """float64 [phases, components]: the rate of each component in each phase; the rates of a phase sum to 1.

    Args:
        sizes: of the sources; rates are proportional to them if `data.rates` is empty.
    """
    data = config.data
    phases = 1 + len(data.phase_boundaries)
    sources = np.reshape(data.rates, (phases, -1)) if data.rates else np.tile(np.asarray(sizes, float), (phases, 1))
    denoising = np.reshape(data.objective_rates or np.ones(phases * len(data.objective)), (phases, -1))
    rates = np.array(
        [sources[:, each.source] * denoising[:, each.objective] * each.share for each in components(config)]
    ).T
    return rates / rates.sum(1, keepdims=True)


def spec(config: Config) -> Batch:
    """Shapes and dtypes of a global batch, from the config alone, as arrays of zeros that take no memory.

    Raises:
        ConfigError: an objective does not fit the lengths (see `denoisers`).
    """
    return Batch(
        *(
            None if x is None else np.broadcast_to(np.zeros((), x.dtype), (config.data.batch_size, *x.shape[1:]))
            for x in _blank_row(config)
        )
    )


def _blank_row(config: Config) -> Batch:
    """One row with all fields of the config's batches, with the values of fields that a component does not write."""
    row = blank_rows(config, 1) if config.data.has_examples else text_rows.blank_row(config)
    return row._replace(component_B1=np.zeros((1, 1), np.int32) if len(components(config)) > 1 else None)


class RowSource(Protocol):
    """The rows of one component, `count` per epoch."""

    count: int

    def batch(self, index_B: np.ndarray, offset_B: np.ndarray, keys_B: np.ndarray) -> Batch:
        """Rows by index.

        Args:
            index_B: int64, below `count`.
            offset_B: uint64, random per epoch; 0 for held-out rows.
            keys_B: uint64, the key of a row's random numbers.
        """


class StepBatches(Protocol):
    """The training batches of a run, by step."""

    config: Config
    schedule: RowSchedule

    def at(self, step: int, rows: np.ndarray | None = None) -> Any:
        """The batch of a step, in numpy; of a global batch only these rows."""

    def follow(self, schedule: RowSchedule) -> None:
        """Use another schedule of rows from now on."""


class _Phase(NamedTuple):
    """A range of training rows with constant rates."""

    first_row: int
    counts_C: np.ndarray  # rows of each component in a block
    before_C: np.ndarray  # rows of each component in earlier phases


class Batches:
    """The batches of one split; `at(step)` makes any of them, in any order.

    Training rows are endless: every epoch contains each row of a component once, in another order and, for text, with
    other window borders. Each held-out row occurs once, and the components are interleaved evenly; rows after the last
    have weight 0.
    """

    def __init__(self, config: Config, vocabulary: Vocabulary, streams: Sequence[Stream | Examples], *, heldout=False):
        """`streams` are the splits of each `data.source`, in order: see `open_split`.

        Raises:
            DataError: a source has less text than one window.
        """
        self.config, self.heldout = config, heldout
        self.components = components(config)
        self.row_sources: list[RowSource] = [
            TextRows(config, vocabulary, streams[each.source], each.denoiser)
            if each.denoiser
            else example_rows(config, vocabulary, streams[each.source])
            for each in self.components
        ]
        densities = config.data.phase_noise_density
        self._by_phase = [[rows.with_noise_density(each) for rows in self.row_sources] for each in densities]
        self.num_rows = np.array([source.count for source in self.row_sources])
        self._check_size(streams)
        first_of_source = [[c.source for c in self.components].index(source) for source in range(len(streams))]
        self.rates_PC = rates(config, self.num_rows[first_of_source])
        self._blank_row = _blank_row(config)
        self.follow(RowSchedule.of(config.data.batch_size))
        self._heldout_C = np.where(self.rates_PC.sum(0) > 0, self.num_rows, 0)

    def _check_size(self, streams: Sequence[Stream | Examples]) -> None:
        split = "held-out" if self.heldout else "training"
        for each, count in zip(self.components, self.num_rows, strict=True):
            if each.denoiser and each.denoiser.objective == "mlm_nsp" and streams[each.source].num_documents < 2:
                raise DataError(
                    f"data.source={self.config.data.source[each.source]} has one {split} document, but pairs need "
                    "another; use more text, data.text_documents=passage, or a larger data.heldout_fraction"
                )
            if count < 1:  # only text: examples have at least one row
                raise DataError(
                    f"data.source={self.config.data.source[each.source]} has {streams[each.source].num_tokens} tokens "
                    f"of {split} text, less than one window of {each.denoiser.window.length}; use more text, a smaller "
                    "data.inputs_length" + (", or a larger data.heldout_fraction" if self.heldout else "")
                )

    def follow(self, schedule: RowSchedule) -> None:
        """Take the first row of each training step from a schedule."""
        self.schedule = schedule
        self._phases = self._make_phases()

    def _make_phases(self) -> list[_Phase]:
        phases, before_C = [], np.zeros(len(self.row_sources), np.int64)
        starts = [self.schedule.first_row(step) for step in (0, *self.config.data.phase_boundaries)]
        for rates_C, start, stop in zip(self.rates_PC, starts, [*starts[1:], None], strict=True):
            phases.append(_Phase(start, _block_counts(rates_C), before_C))
            if stop is not None:  # an unfinished block counts as a whole
                before_C = before_C + -(-(stop - start) // BLOCK) * phases[-1].counts_C
        return phases

    @property
    def num_batches(self) -> int | None:
        """Number of held-out batches; None for training."""
        return -(-self.num_heldout // self.config.data.batch_size) if self.heldout else None

    @property
    def num_heldout(self) -> int:
        """Number of held-out rows of all components with a rate above 0."""
        return int(self._heldout_C.sum())

    def heldout_rows(self, source: int) -> np.ndarray:
        """int64: the indices of a source's held-out rows, ascending; empty for a source with rate 0."""
        component_R, _ = self._heldout_order
        return np.flatnonzero(np.array([each.source for each in self.components])[component_R] == source)

    def drawn_rows(self) -> np.ndarray:
        """float64 [components]: rows of each component in all steps of the run."""
        data, steps = self.config.data, self.config.train.num_steps
        steps_P = np.diff([0, *(min(stop, steps) for stop in data.phase_boundaries), steps])
        return steps_P @ self.rates_PC * data.batch_size

    def describe(self) -> list[str]:
        """Lines for the user: the number of epochs of each component in the run's steps, and its rates."""
        data, lines = self.config.data, []
        drawn_C = self.drawn_rows()
        for each, rows, drawn, rates_P in zip(self.components, self.row_sources, drawn_C, self.rates_PC.T, strict=True):
            rate = " then ".join(f"{100 * rate:.3g} %" for rate in rates_P)
            where = f" of {source_names(data)[each.source]}" if len(data.source) > 1 else ""
            share = f", {rate} of the rows" if len(self.components) > 1 else ""
            if data.phase_noise_density:
                share += f", {' then '.join(f'{100 * x:.3g} %' for x in data.phase_noise_density)} of the tokens masked"
            packed = "" if each.denoiser else f", packing efficiency {100 * rows.efficiency:.0f} %"
            lines.append(
                f"{each.name}{where}: {rows.count:,} rows an epoch{packed}, {drawn / rows.count:.2f} epochs{share}"
            )
        return lines

    def at(self, step: int, rows: np.ndarray | None = None) -> Batch:
        """The batch of a step, in numpy.

        Args:
            step: from 0.
            rows: indices of the global batch's rows to make, such as those of this process; None: all rows.
        """
        size = self.config.data.batch_size
        first = step * size if self.heldout else self.schedule.first_row(step)
        row_B = (first + (np.arange(size) if rows is None else rows)).astype(np.uint64)
        if self.heldout:
            return self._heldout_batch(row_B)
        component_B, index_B, offset_B = self.locate(row_B)
        sources = self._by_phase[bisect(self.config.data.phase_boundaries, step)] if self._by_phase else None
        return self._make_rows(component_B, index_B, offset_B, keyed_bits(self.config.seed, CORRUPTION, row_B), sources)

    def _heldout_batch(self, row_B: np.ndarray) -> Batch:
        real_B = row_B < self.num_heldout
        row_B = np.minimum(row_B, np.uint64(self.num_heldout - 1))
        component_R, index_R = self._heldout_order
        component_B, index_B = component_R[row_B.astype(np.int64)], index_R[row_B.astype(np.int64)]
        keys_B = keyed_bits(self.config.seed, CORRUPTION, row_B + (np.uint64(1) << np.uint64(63)))
        batch = self._make_rows(component_B, index_B, np.zeros(len(row_B), np.uint64), keys_B)
        if batch.follows_B1 is not None:
            batch = batch._replace(follows_B1=np.where(real_B[:, None], batch.follows_B1, -1))
        return batch._replace(weights_BL=batch.weights_BL * real_B[:, None])

    @cached_property
    def _heldout_order(self) -> tuple[np.ndarray, np.ndarray]:
        """Component of every held-out row, and its index in the component: in order, components interleaved evenly."""
        component_R = np.repeat(np.arange(len(self.row_sources)), self._heldout_C)
        index_R = np.concatenate([np.arange(count) for count in self._heldout_C])
        order = np.argsort((index_R + 0.5) / self._heldout_C[component_R], kind="stable")
        return component_R[order], index_R[order]

    def locate(self, row_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each training row: its component, its index among the component's rows, and its epoch's random offset."""
        component_B, index_B = self._assign_components(row_B)
        count_B = self.num_rows[component_B].astype(np.uint64)
        epoch_B, index_B = index_B // count_B, index_B % count_B
        epoch_B = epoch_B * np.uint64(len(self.row_sources)) + component_B.astype(np.uint64)
        index_B = permute(index_B, count_B, keyed_bits(self.config.seed, SHUFFLE, epoch_B))
        return component_B, index_B.astype(np.int64), keyed_bits(self.config.seed, OFFSET, epoch_B)

    def _assign_components(self, row_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Component of each training row, and how many training rows of that component precede it in the run.

        Each block of 4096 rows contains the components in exact proportion, shuffled by a permutation of the block. The
        rows of a component are numbered in that order inside a block, and continue from block to block.
        """
        if len(self.row_sources) == 1:
            return np.zeros(len(row_B), np.int64), row_B
        component_B, index_B = np.empty(len(row_B), np.int64), np.empty(len(row_B), np.uint64)
        phase_B = np.searchsorted([phase.first_row for phase in self._phases], row_B, side="right") - 1
        for phase_index in np.unique(phase_B):
            in_phase_B, phase = phase_B == phase_index, self._phases[phase_index]
            block_N, position_N = np.divmod(row_B[in_phase_B] - np.uint64(phase.first_row), np.uint64(BLOCK))
            key_N = keyed_bits(self.config.seed, MIXTURE, block_N + (np.uint64(phase_index) << np.uint64(40)))
            position_N = permute(position_N, np.full(len(position_N), BLOCK, np.uint64), key_N)
            ends_C = np.cumsum(phase.counts_C)
            component_N = np.searchsorted(ends_C, position_N, side="right")
            in_block_N = position_N - (ends_C - phase.counts_C)[component_N].astype(np.uint64)
            before_N = phase.before_C[component_N].astype(np.uint64)
            before_N += block_N * phase.counts_C[component_N].astype(np.uint64)
            component_B[in_phase_B], index_B[in_phase_B] = component_N, before_N + in_block_N
        return component_B, index_B

    def _make_rows(
        self, component_B: np.ndarray, index_B: np.ndarray, offset_B: np.ndarray, keys_B: np.ndarray, sources=None
    ) -> Batch:
        """The batch of these rows, each from its component; `sources` instead of `row_sources` if they are given."""
        sources = sources or self.row_sources
        if len(sources) == 1:
            return sources[0].batch(index_B, offset_B, keys_B)
        batch = Batch(*(None if x is None else np.repeat(x, len(component_B), axis=0) for x in self._blank_row))
        for component in np.unique(component_B):
            of_component_B = component_B == component
            part = sources[component].batch(*(x[of_component_B] for x in (index_B, offset_B, keys_B)))
            for values, part_values in zip(batch, part, strict=True):
                if part_values is not None:
                    values[of_component_B] = part_values
        return batch._replace(component_B1=component_B[:, None].astype(np.int32))


def prefetch(batches: StepBatches, start: int, stop: int, rows: np.ndarray | None = None) -> Iterator[Any]:
    """The batches of steps [start, stop), up to `data.prefetch` made ahead in a background thread; see `Batches.at`."""
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
    pending: collections.deque[Future[Any]] = collections.deque()
    try:
        for step in range(start, stop):
            pending.append(executor.submit(batches.at, step, rows))
            if len(pending) > batches.config.data.prefetch:
                yield wait_for_data(pending.popleft())
        while pending:
            yield wait_for_data(pending.popleft())
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def _block_counts(rates: Sequence[float]) -> np.ndarray:
    """Rows of each component in a block: rates rounded by largest remainders, at least one if a rate is above 0."""
    share = np.asarray(rates, np.float64) / np.sum(rates) * BLOCK
    counts = np.floor(share).astype(np.int64)
    counts[(share > 0) & (counts == 0)] = 1
    order = np.argsort(counts - share)
    while (missing := BLOCK - counts.sum()) != 0:
        if missing > 0:
            counts[order[: min(missing, len(order))]] += 1
        else:
            counts[np.argmax(counts)] += int(missing)
    return counts
