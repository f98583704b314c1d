"""Rows of supervised examples: which examples share a row, and the `Batch` of any rows, by number.

Examples in a row don't see each other: each has a segment, and positions that start at 0. Which rows there are depends
on the examples, the lengths and the seed alone, so a row is the same wherever and whenever it is made. Called by
`pipeline`, which shuffles the rows of every epoch. Packing several texts into a row is that of T5 (Raffel et al. 2020,
section 3.1.2); the masks of decoder-only inputs follow Wang et al. 2022, section 2.
"""

from typing import NamedTuple

import numpy as np

from t5like.config.schema import Config
from t5like.data.randomness import random_bits
from t5like.data.store.token_store import concatenate_ranges
from t5like.data.supervised.examples import Examples, capacity
from t5like.data.tokenizers.vocabulary import DECODER_START_ID
from t5like.types import Batch

LANE = 4096  # examples that are packed one after the other; lanes are packed side by side
OPEN_ROWS = 32  # of a lane; the fullest is closed when an example fits none of them


class Packing(NamedTuple):
    """Which examples are in which row: those of row r are ``order_N[first[r] : first[r + 1]]``."""

    order_N: np.ndarray  # int64; each example once
    first: np.ndarray  # int64 [rows + 1]
    fill: float  # share of the rows' places that hold tokens


def pack(lengths_NC: np.ndarray, capacity_C: tuple[int, ...], seed: int) -> Packing:
    """Put examples into as few rows as first-fit finds, so that no row exceeds any of its C capacities.

        lengths 4 2 3 1, capacity 5      rows [4 1] [2 3]

    Examples are shuffled by the seed and dealt to lanes. Each lane puts its next example into the first of its open
    rows that has room. All lanes take a step at once, which is what makes it fast: a second for a million examples.

    Args:
        lengths_NC: int64, none above its capacity.
        seed: non-negative; other seeds give other rows.
    """
    total, columns = lengths_NC.shape
    shuffled_N = np.argsort(random_bits(np.array([seed], np.uint64), total)[0], kind="stable")
    lanes = max(1, total // LANE)
    free_GKC = np.full((lanes, OPEN_ROWS, columns), capacity_C, np.int64)
    row_GK = np.full((lanes, OPEN_ROWS), -1)  # number of the open row, -1: none yet
    opened_G = np.zeros(lanes, np.int64)
    row_N = np.empty(total, np.int64)
    for begin in range(0, total, lanes):
        example_G = shuffled_N[begin : begin + lanes]
        lane_G, need_GC = np.arange(len(example_G)), lengths_NC[example_G]
        fits_GK = (free_GKC[: len(example_G)] >= need_GC[:, None]).all(axis=2)
        slot_G = fits_GK.argmax(axis=1)
        stuck = np.flatnonzero(~fits_GK[lane_G, slot_G])
        if len(stuck):
            slot_G[stuck] = fullest = (free_GKC[stuck] / capacity_C).sum(axis=2).argmin(axis=1)
            free_GKC[stuck, fullest], row_GK[stuck, fullest] = capacity_C, -1
        new = np.flatnonzero(row_GK[lane_G, slot_G] < 0)
        row_GK[new, slot_G[new]] = opened_G[new] * lanes + new
        opened_G[new] += 1
        free_GKC[lane_G, slot_G] -= need_GC
        row_N[example_G] = row_GK[lane_G, slot_G]
    return _packing(row_N, lengths_NC, capacity_C)


def _packing(row_N: np.ndarray, lengths_NC: np.ndarray, capacity_C: tuple[int, ...]) -> Packing:
    """Examples by row, from the row of each example; rows may be numbered with gaps."""
    order_N = np.argsort(row_N, kind="stable")
    first = np.flatnonzero(np.diff(row_N[order_N], prepend=-1))
    fill = float(lengths_NC.sum() / (len(first) * sum(capacity_C)))
    return Packing(order_N, np.append(first, len(row_N)), fill)


def blank_rows(config: Config, count: int) -> Batch:
    """`count` rows of padding: shapes, dtypes and fields of every batch of supervised examples under this config."""
    make = lambda length, dtype=np.int32: np.zeros((count, length), dtype)
    if config.model.architecture == "decoder":
        length = config.row_length
        return Batch(
            make(length),
            make(length),
            make(length, np.float32),
            decoder_segments_BL=make(length),
            decoder_positions_BL=make(length),
            prefix_BL=None if config.data.messages_field else make(length, bool),
        )
    inputs, targets = config.data.inputs_length, config.data.targets_length
    return Batch(
        make(targets),
        make(targets),
        make(targets, np.float32),
        encoder_BS=make(inputs),
        encoder_segments_BS=make(inputs),
        decoder_segments_BL=make(targets),
        encoder_positions_BS=make(inputs),
        decoder_positions_BL=make(targets),
    )


class ExampleRows:
    """The rows of one epoch of a source.

    Attributes:
        count: number of rows.
        fill: share of their places that hold tokens, from 0 to 1.
    """

    def __init__(self, config: Config, examples: Examples) -> None:
        self.config, self.examples = config, examples
        if config.data.packing:
            self._packing = pack(examples.lengths_NC, capacity(config), config.seed)
        else:
            self._packing = _packing(np.arange(len(examples)), examples.lengths_NC, capacity(config))
        self.count, self.fill = len(self._packing.first) - 1, self._packing.fill

    def batch(self, index_B: np.ndarray, offset_B: np.ndarray | None = None, keys_B: np.ndarray | None = None) -> Batch:
        """The rows of these numbers, each in [0, count), padded to the config's lengths; padding is segment 0.

        Nothing about them is random: offset and keys, which rows of text take, change nothing.

        Encoder-decoder, for two examples with inputs A B and C, targets X Y and Z (EOS among them):

            encoder   A B C 0        decoder   START X START 0
            segments  1 1 2 0        targets   X     Y Z     0
            positions 0 1 0 0        weights   1     1 1     0

        Decoder-only, one sequence for each example; where it is read, targets count nothing (`prefix_BL`: 1 1 0 0 1 0):

            decoder   A B START X C START
            targets   A B X     Y C Z
            weights   0 0 1     1 0 1

        A decoder-only conversation is read from START on: what it says is the tokens, what it reads the ones before.
        """
        examples, packing = self.examples, self._packing
        count_B = packing.first[index_B + 1] - packing.first[index_B]
        unit_E = packing.order_N[concatenate_ranges(packing.first[index_B], count_B)]
        row_E = np.repeat(np.arange(len(index_B)), count_B)
        segment_E = 1 + concatenate_ranges(np.zeros_like(count_B), count_B)
        lengths_EC = examples.lengths_NC[unit_E]
        before_EC = np.cumsum(lengths_EC, axis=0) - lengths_EC
        offset_EC = before_EC - before_EC[np.cumsum(count_B) - count_B][row_E]
        by_place = np.argsort(examples.begin_N[unit_E], kind="stable")  # a shard's tokens are gathered at once
        unit_E, row_E, segment_E, offset_EC = (x[by_place] for x in (unit_E, row_E, segment_E, offset_EC))

        batch = blank_rows(self.config, len(index_B))
        if batch.encoder_BS is None:
            _place_decoder(batch, examples, unit_E, segment_E, row_E, offset_EC[:, 0], examples.begin_N[unit_E])
            return batch
        begin_E, length_E = examples.begin_N[unit_E], examples.lengths_NC[unit_E, 0]
        place_T = concatenate_ranges(row_E * self.config.data.inputs_length + offset_EC[:, 0], length_E)
        batch.encoder_BS.flat[place_T] = examples.stream.gather(begin_E, length_E)
        batch.encoder_segments_BS.flat[place_T] = np.repeat(segment_E, length_E)
        batch.encoder_positions_BS.flat[place_T] = concatenate_ranges(np.zeros_like(length_E), length_E)
        _place_decoder(batch, examples, unit_E, segment_E, row_E, offset_EC[:, 1], examples.cut_N[unit_E])
        return batch


def _place_decoder(
    batch: Batch,
    examples: Examples,
    unit_E: np.ndarray,
    segment_E: np.ndarray,
    row_E: np.ndarray,
    offset_E: np.ndarray,
    begin_E: np.ndarray,
) -> None:
    """Write the decoder's side of each unit, the tokens [begin, end), at its row and offset."""
    length_E = examples.end_N[unit_E] - begin_E
    read_E = examples.cut_N[unit_E] - begin_E  # tokens before START
    corner_E = row_E * batch.targets_BL.shape[1] + offset_E  # first place in the flattened rows
    place_T = concatenate_ranges(corner_E, length_E)
    batch.targets_BL.flat[place_T] = tokens_T = examples.stream.gather(begin_E, length_E)
    batch.decoder_segments_BL.flat[place_T] = np.repeat(segment_E, length_E)
    batch.decoder_positions_BL.flat[place_T] = concatenate_ranges(np.zeros_like(length_E), length_E)
    start_E = np.cumsum(length_E) - length_E + read_E  # of what is said, among the tokens of all units
    shifted_T = concatenate_ranges(start_E + 1, length_E - read_E - 1)
    said_T, tokens_T = tokens_T, tokens_T.copy()
    tokens_T[shifted_T], tokens_T[start_E] = said_T[shifted_T - 1], DECODER_START_ID
    batch.decoder_BL.flat[place_T] = tokens_T
    if batch.prefix_BL is not None:
        batch.prefix_BL.flat[concatenate_ranges(corner_E, read_E)] = True
    count_E = examples.count_N[unit_E]
    targets_M2 = examples.targets_M2[concatenate_ranges(examples.first_N[unit_E], count_E)]
    place_M = targets_M2[:, 0] + np.repeat(corner_E - begin_E, count_E)
    batch.weights_BL.flat[concatenate_ranges(place_M, targets_M2[:, 1] - targets_M2[:, 0])] = 1
