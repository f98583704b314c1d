"""Rows of supervised examples: which examples share a row, and the `Batch` of any rows by index.

Examples in a row do not attend to each other: each has its own segment, and positions from 0. The rows depend only on
the examples, the lengths and the seed. Called by `pipeline`, which shuffles the rows of every epoch. Packing follows T5
(Raffel et al. 2020, section 3.1.2); the masks of decoder-only inputs follow Wang et al. 2022, section 2.

Shapes: B rows of a batch, E examples in them, T their tokens, M their targets.
"""

from typing import NamedTuple

import numpy as np

from t5like.config.schema import Config
from t5like.data.randomness import random_bits
from t5like.data.store.token_store import concatenate_ranges
from t5like.data.supervised.examples import Examples, capacity
from t5like.data.tokenizers.vocabulary import DECODER_START_ID
from t5like.types import Batch

LANE_EXAMPLES = 4096  # examples that are packed sequentially; lanes of that many examples are packed in parallel
OPEN_ROWS = 32  # rows of a lane with room; the fullest is closed when an example fits in none of them


class Packing(NamedTuple):
    """The assignment of examples to rows: row r has the examples ``order_N[first[r] : first[r + 1]]``."""

    order_N: np.ndarray  # int64 indices of examples
    first: np.ndarray  # int64 [rows + 1]
    efficiency: float  # share of the rows' positions that hold tokens


def pack(lengths_NC: np.ndarray, capacity_C: tuple[int, ...], seed: int) -> Packing:
    """First-fit packing: assign examples to rows so that no row exceeds any of its C capacities.

        lengths 4 2 3 1, capacity 5      rows [4 1] [2 3]

    Examples are shuffled by the seed and distributed over lanes. Each lane puts its next example into the first of its
    open rows that has room. One step of the loop handles all lanes, so a million examples take about a second.
    Shapes: N examples, G lanes, K open rows of a lane, C capacities.

    Args:
        lengths_NC: int64, at most the capacity.
        seed: non-negative; decides which examples share a row.
    """
    total, columns = lengths_NC.shape
    shuffled_N = np.argsort(random_bits(np.array([seed], np.uint64), total)[0], kind="stable")
    lanes = max(1, total // LANE_EXAMPLES)
    free_GKC = np.full((lanes, OPEN_ROWS, columns), capacity_C, np.int64)
    row_GK = np.full((lanes, OPEN_ROWS), -1)  # index of the open row; -1: none yet
    opened_G = np.zeros(lanes, np.int64)
    row_N = np.empty(total, np.int64)
    for begin in range(0, total, lanes):
        example_G = shuffled_N[begin : begin + lanes]
        lane_G, length_GC = np.arange(len(example_G)), lengths_NC[example_G]
        fits_GK = (free_GKC[: len(example_G)] >= length_GC[:, None]).all(axis=2)
        slot_G = fits_GK.argmax(axis=1)
        full_lanes = np.flatnonzero(~fits_GK[lane_G, slot_G])
        if len(full_lanes):
            slot_G[full_lanes] = fullest = (free_GKC[full_lanes] / capacity_C).sum(axis=2).argmin(axis=1)
            free_GKC[full_lanes, fullest], row_GK[full_lanes, fullest] = capacity_C, -1
        new_lanes = np.flatnonzero(row_GK[lane_G, slot_G] < 0)
        row_GK[new_lanes, slot_G[new_lanes]] = opened_G[new_lanes] * lanes + new_lanes
        opened_G[new_lanes] += 1
        free_GKC[lane_G, slot_G] -= length_GC
        row_N[example_G] = row_GK[lane_G, slot_G]
    return _packing(row_N, lengths_NC, capacity_C)


def _packing(row_N: np.ndarray, lengths_NC: np.ndarray, capacity_C: tuple[int, ...]) -> Packing:
    """The packing with the given row of each example; row numbers may have gaps."""
    order_N = np.argsort(row_N, kind="stable")
    first = np.flatnonzero(np.diff(row_N[order_N], prepend=-1))
    efficiency = float(lengths_NC.sum() / (len(first) * sum(capacity_C)))
    return Packing(order_N, np.append(first, len(row_N)), efficiency)


def blank_rows(config: Config, count: int) -> Batch:
    """`count` rows of padding, with the shapes, dtypes and fields of all batches of supervised examples."""
    zeros = lambda length, dtype=np.int32: np.zeros((count, length), dtype)
    if config.model.architecture == "decoder":
        length = config.row_length
        return Batch(
            zeros(length),
            zeros(length),
            zeros(length, np.float32),
            decoder_segments_BL=zeros(length),
            decoder_positions_BL=zeros(length),
            prefix_BL=None if config.data.messages_field else zeros(length, bool),
        )
    if config.data.label_objective:
        inputs, pairs = config.data.inputs_length, config.data.second_template and config.model.token_types > 1
        return Batch(
            None,
            zeros(inputs, np.float32 if config.data.label_objective == "regression" else np.int32),
            zeros(inputs, np.float32),
            encoder_BS=zeros(inputs),
            encoder_segments_BS=zeros(inputs),
            encoder_positions_BS=zeros(inputs),
            token_types_BS=zeros(inputs) if pairs else None,
        )
    inputs, targets = config.data.inputs_length, config.data.targets_length
    return Batch(
        zeros(targets),
        zeros(targets),
        zeros(targets, np.float32),
        encoder_BS=zeros(inputs),
        encoder_segments_BS=zeros(inputs),
        decoder_segments_BL=zeros(targets),
        encoder_positions_BS=zeros(inputs),
        decoder_positions_BL=zeros(targets),
    )


class ExampleRows:
    """The rows of one epoch of a source.

    Attributes:
        count: number of rows.
        efficiency: share of the rows' positions that hold tokens, from 0 to 1.
    """

    def __init__(self, config: Config, examples: Examples) -> None:
        self.config, self.examples = config, examples
        if config.data.packing:
            self._packing = pack(examples.lengths_NC, capacity(config), config.seed)
        else:
            self._packing = _packing(np.arange(len(examples)), examples.lengths_NC, capacity(config))
        self.count, self.efficiency = len(self._packing.first) - 1, self._packing.efficiency

    def batch(self, index_B: np.ndarray, offset_B: np.ndarray | None = None, keys_B: np.ndarray | None = None) -> Batch:
        """Rows by index, each in [0, count), padded to the config's lengths; padding has segment 0.

        Offsets and keys, which `pipeline.RowSource` needs for text, are ignored: the rows are not random.

        Encoder-decoder, for two examples with inputs A B and C, targets X Y and Z (EOS among them):

            encoder   A B C 0        decoder   START X START 0
            segments  1 1 2 0        targets   X     Y Z     0
            positions 0 1 0 0        weights   1     1 1     0

        Decoder-only, one sequence per example; the inputs are the prefix (`prefix_BL`: 1 1 0 0 1 0) and have weight 0:

            decoder   A B START X C START
            targets   A B X     Y C Z
            weights   0 0 1     1 0 1

        A decoder-only conversation begins with START: targets are the tokens, decoder inputs the tokens shifted by one.
        """
        unit_E, row_E, segment_E, offset_EC = self._placed(index_B)
        batch, examples = blank_rows(self.config, len(index_B)), self.examples
        if batch.encoder_BS is None:
            _write_decoder(batch, examples, unit_E, segment_E, row_E, offset_EC[:, 0], examples.begin_N[unit_E])
            return batch
        begin_E, length_E = examples.begin_N[unit_E], examples.lengths_NC[unit_E, 0]
        position_T = concatenate_ranges(row_E * self.config.data.inputs_length + offset_EC[:, 0], length_E)
        batch.encoder_BS.flat[position_T] = examples.stream.gather(begin_E, length_E)
        batch.encoder_segments_BS.flat[position_T] = np.repeat(segment_E, length_E)
        batch.encoder_positions_BS.flat[position_T] = concatenate_ranges(np.zeros_like(length_E), length_E)
        _write_decoder(batch, examples, unit_E, segment_E, row_E, offset_EC[:, 1], examples.cut_N[unit_E])
        return batch

    def _placed(self, index_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The examples of some rows, in the order of the stream: their units, rows, segments, and offsets [E, C]."""
        examples, packing = self.examples, self._packing
        count_B = packing.first[index_B + 1] - packing.first[index_B]
        unit_E = packing.order_N[concatenate_ranges(packing.first[index_B], count_B)]
        row_E = np.repeat(np.arange(len(index_B)), count_B)
        segment_E = 1 + concatenate_ranges(np.zeros_like(count_B), count_B)
        lengths_EC = examples.lengths_NC[unit_E]
        before_EC = np.cumsum(lengths_EC, axis=0) - lengths_EC
        offset_EC = before_EC - before_EC[np.cumsum(count_B) - count_B][row_E]
        by_offset = np.argsort(examples.begin_N[unit_E], kind="stable")  # so that each shard is accessed once
        return tuple(x[by_offset] for x in (unit_E, row_E, segment_E, offset_EC))


def _write_decoder(
    batch: Batch,
    examples: Examples,
    unit_E: np.ndarray,
    segment_E: np.ndarray,
    row_E: np.ndarray,
    offset_E: np.ndarray,
    begin_E: np.ndarray,
) -> None:
    """Write the decoder's part of each unit, the tokens [begin, end), into the batch at its row and offset."""
    length_E = examples.end_N[unit_E] - begin_E
    prefix_E = examples.cut_N[unit_E] - begin_E  # tokens before START
    first_E = row_E * batch.targets_BL.shape[1] + offset_E  # first position in the flattened rows
    position_T = concatenate_ranges(first_E, length_E)
    batch.targets_BL.flat[position_T] = tokens_T = examples.stream.gather(begin_E, length_E)
    batch.decoder_segments_BL.flat[position_T] = np.repeat(segment_E, length_E)
    batch.decoder_positions_BL.flat[position_T] = concatenate_ranges(np.zeros_like(length_E), length_E)
    start_E = np.cumsum(length_E) - length_E + prefix_E  # of the targets, among the tokens of all units
    shifted_T = concatenate_ranges(start_E + 1, length_E - prefix_E - 1)
    decoder_T = tokens_T.copy()
    decoder_T[shifted_T], decoder_T[start_E] = tokens_T[shifted_T - 1], DECODER_START_ID
    batch.decoder_BL.flat[position_T] = decoder_T
    if batch.prefix_BL is not None:
        batch.prefix_BL.flat[concatenate_ranges(first_E, prefix_E)] = True
    count_E = examples.count_N[unit_E]
    targets_M2 = examples.targets_M2[concatenate_ranges(examples.first_N[unit_E], count_E)]
    position_M = targets_M2[:, 0] + np.repeat(first_E - begin_E, count_E)
    batch.weights_BL.flat[concatenate_ranges(position_M, targets_M2[:, 1] - targets_M2[:, 0])] = 1
