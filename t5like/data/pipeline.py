"""The batch of step s as a pure function of (config, s): rows by arithmetic, windows from token stores, an objective.

Nothing here has a state, so nothing has to be saved: after a restart, on other hosts or devices, step s has the same
rows. Global row r of a stream of training rows is found like this:

    r -> which source (exact rates within every block of 4096 rows) and its i-th row
    i -> epoch and place in the epoch; the place, shuffled by a permutation of the epoch -> window
    window -> tokens, read from the store; the objective's randomness is keyed by (seed, r)

Called by `train` and `evaluate` (`Batches`, `prefetch`) and, for shapes alone, by everything that compiles (`spec`).
"""

from collections.abc import Iterator, Sequence

import grain
import numpy as np

from t5like.config import Config
from t5like.data import objectives
from t5like.data.objectives import OBJECTIVES, Vocabulary, random_bits
from t5like.data.token_store import Stream
from t5like.errors import DataError
from t5like.types import Batch

BLOCK = 4096  # rows in which the rates of the sources hold exactly

# What a random number is for: keeps the streams of random bits apart.
SHUFFLE, OFFSET, MIXTURE, CORRUPTION = range(4)


def spec(config: Config) -> Batch:
    """Shapes and dtypes of a global batch, from the config alone, as a batch of zeros without memory behind them.

    Raises:
        ConfigError: the objective does not fit the lengths (see `objectives.window`).
    """
    window = objectives.window(config)
    tokens_BT = np.ones((1, window.length), np.int32)
    segments_BT = tokens_BT if config.data.document_borders == "segments" else None
    vocabulary = Vocabulary(1, np.arange(config.tokenizer.num_sentinels) + 3)
    row = OBJECTIVES[config.data.objective](config, vocabulary, tokens_BT, segments_BT, np.zeros(1, np.uint64))
    return Batch(
        *(
            None if x is None else np.broadcast_to(np.zeros((), x.dtype), (config.data.batch_size, *x.shape[1:]))
            for x in row
        )
    )


class Batches:
    """The batches of one split. `at(step)` makes any of them, in any order.

    Training rows never end: every epoch goes through all windows of a source once, in another order and with other
    window borders. Held-out rows are each window once, in order; rows beyond the last have weight 0.
    """

    def __init__(self, config: Config, vocabulary: Vocabulary, streams: Sequence[Stream], *, heldout: bool = False):
        """`streams` are those of one split of each `data.source`, in order.

        Raises:
            DataError: a source has less text than one window.
        """
        self.config, self.vocabulary, self.streams, self.heldout = config, vocabulary, tuple(streams), heldout
        self.window = objectives.window(config)
        # A window may overlap the next one (decoder-only rows share a token); it then has to end inside the text.
        overlap = self.window.length - self.window.stride
        self.num_windows = np.array([(stream.num_tokens - overlap) // self.window.stride for stream in streams])
        for source, stream, count in zip(config.data.source, streams, self.num_windows, strict=True):
            if count < 1:
                split = "held-out" if heldout else "training"
                raise DataError(
                    f"data.source={source} has {stream.num_tokens} tokens of {split} text, less than one window of "
                    f"{self.window.length}; use more text, a smaller data.inputs_length"
                    + (", or a larger data.heldout_fraction" if heldout else "")
                )
        self._counts = _block_counts(config.data.rates or self.num_windows.tolist())

    @property
    def num_batches(self) -> int | None:
        """Of held-out text; None for training."""
        return -(-int(self.num_windows.sum()) // self.config.data.batch_size) if self.heldout else None

    def at(self, step: int, rows: tuple[int, int] | None = None) -> Batch:
        """The batch of a step, numpy.

        Args:
            step: from 0.
            rows: half-open range of the global batch's rows to make (a process's own); None: all.
        """
        size = self.config.data.batch_size
        first, stop = rows or (0, size)
        row_B = np.arange(step * size + first, step * size + stop, dtype=np.uint64)
        real_B = np.ones(len(row_B), bool)
        if self.heldout:
            total = int(self.num_windows.sum())
            real_B = row_B < total
            row_B = np.minimum(row_B, np.uint64(total - 1))
        tokens_BT, segments_BT = self._read(*(self._heldout(row_B) if self.heldout else self._locate(row_B)))
        keys_B = self._bits(CORRUPTION, row_B + (np.uint64(1) << np.uint64(63) if self.heldout else np.uint64(0)))
        batch = OBJECTIVES[self.config.data.objective](self.config, self.vocabulary, tokens_BT, segments_BT, keys_B)
        return batch._replace(weights_BL=batch.weights_BL * real_B[:, None])

    def source_of(self, step: int) -> np.ndarray:
        """The index in `data.source` that each row of a training step comes from: int [B]."""
        size = self.config.data.batch_size
        return self._locate(np.arange(step * size, (step + 1) * size, dtype=np.uint64))[0]

    def _bits(self, purpose: int, number_B: np.ndarray) -> np.ndarray:
        """uint64 [B]: random bits keyed by (seed, purpose, number)."""
        with np.errstate(over="ignore"):
            key = np.uint64(self.config.seed) * np.uint64(0x100000000) + np.uint64(purpose)
            return random_bits(random_bits(np.array([key]), 1)[0] ^ number_B, 1)[:, 0]

    def _locate(self, row_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source and first token of each training row."""
        source_B, index_B = self._mix(row_B)
        windows_B = self.num_windows[source_B].astype(np.uint64)
        epoch_B, place_B = index_B // windows_B, index_B % windows_B
        epoch_of_source_B = epoch_B * np.uint64(len(self.streams)) + source_B.astype(np.uint64)
        window_B = permute(place_B, windows_B, self._bits(SHUFFLE, epoch_of_source_B))
        # Each epoch begins at another token and wraps around, so that window borders fall elsewhere.
        total_B = np.array([stream.num_tokens for stream in self.streams], np.uint64)[source_B]
        offset_B = self._bits(OFFSET, epoch_of_source_B) % total_B
        return source_B, ((window_B * np.uint64(self.window.stride) + offset_B) % total_B).astype(np.int64)

    def _mix(self, row_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source of each row, and its number among that source's rows.

        Each block of 4096 rows holds the sources in exact proportion, shuffled by a permutation of the block: inside a
        block a source's numbers come in that order, from block to block they go on.
        """
        if len(self.streams) == 1:
            return np.zeros(len(row_B), np.int64), row_B
        block_B, place_B = row_B // np.uint64(BLOCK), row_B % np.uint64(BLOCK)
        slot_B = permute(place_B, np.full(len(row_B), BLOCK, np.uint64), self._bits(MIXTURE, block_B))
        ends = np.cumsum(self._counts)
        source_B = np.searchsorted(ends, slot_B, side="right")
        rank_B = slot_B - (ends - self._counts)[source_B].astype(np.uint64)
        return source_B, block_B * self._counts[source_B].astype(np.uint64) + rank_B

    def _heldout(self, row_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ends = np.cumsum(self.num_windows)
        source_B = np.searchsorted(ends, row_B, side="right")
        window_B = row_B.astype(np.int64) - (ends - self.num_windows)[source_B]
        return source_B, window_B * self.window.stride

    def _read(self, source_B: np.ndarray, start_B: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Tokens, and document numbers if borders matter, of a window for each row."""
        length = self.window.length
        tokens_BT = np.empty((len(start_B), length), np.int32)
        segments_BT = np.empty_like(tokens_BT) if self.config.data.document_borders == "segments" else None
        for index in np.unique(source_B):
            mine = source_B == index
            tokens_BT[mine] = self.streams[index].windows(start_B[mine], length)
            if segments_BT is not None:
                segments_BT[mine] = self.streams[index].segments(start_B[mine], length)
        return tokens_BT, segments_BT


def prefetch(batches: Batches, start: int, stop: int, rows: tuple[int, int] | None = None) -> Iterator[Batch]:
    """The batches of steps [start, stop), made ahead in a background thread."""
    steps = grain.MapDataset.range(start, stop).map(lambda step: batches.at(int(step), rows))
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=batches.config.data.prefetch)
    return iter(steps.to_iter_dataset(options))


def permute(place_B: np.ndarray, size_B: np.ndarray, key_B: np.ndarray) -> np.ndarray:
    """A random permutation of range(size), evaluated at single places, all uint64 [B].

    A Feistel network on the least even number of bits that holds `size`, walked until it lands below `size` (Black &
    Rogaway 2002): any place of any permutation without storing one. Places of equal (size, key) never collide.
    """
    half_B = (np.frexp(np.maximum(size_B.astype(np.float64) - 1, 1))[1].astype(np.uint64) + np.uint64(1)) // np.uint64(
        2
    )
    mask_B = (np.uint64(1) << half_B) - np.uint64(1)
    value_B, left = place_B.copy(), np.arange(len(place_B))
    while len(left):
        half, mask, x = half_B[left], mask_B[left], value_B[left]
        high, low = x >> half, x & mask
        for turn in range(6):
            with np.errstate(over="ignore"):
                mixed = random_bits(key_B[left] ^ (low + np.uint64(turn) * np.uint64(0xD1B54A32D192ED03)), 1)[:, 0]
            high, low = low, high ^ (mixed & mask)
        value_B[left] = (high << half) | low
        left = left[value_B[left] >= size_B[left]]
    return value_B


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
