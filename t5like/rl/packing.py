"""Packed rows: short prompts share a row of the encoder, and short answers a row of the decoder. On the host.

The rows of a step are P groups. A group is one row of the encoder with some prompts, and R rows of the decoder with all
answers to them, so that a prompt is encoded once for all of its answers, and a mesh or microbatches never separate the
answers of a prompt. Rows are as long as without packing.

    two prompts with two answers each       group: encoder  p p p q q 0        sources       answers
        p p p    a a a a    b                      decoder  a a a a b 0        1 1 1 1 1 0   1 1 1 1 2 0
        q q      c c        d d d                           d d d c c 0        2 2 2 2 2 0   1 1 1 2 2 0

Without an encoder, a row has prompts and answers alike, and there are as few groups as devices and microbatches permit.
P and R depend on the lengths of the step alone: of all P, the one whose P x (1 encoder row + R decoder rows) have the
fewest positions. Both are rounded up (`sizes`), so that a run compiles few programs. Packed rows never have more
positions than rows of one answer each, which are also the packing of a step where nothing fits together.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from t5like.config.schema import Config
from t5like.data.store.token_store import concatenate_ranges
from t5like.rl import experience
from t5like.rl.answer_sums import most_answers
from t5like.rl.experience import Experience
from t5like.sharding.logical_axes import batch_parts

STEPS = 4  # sizes between n and 2n


class NotPacked:
    """The methods of `Packing` for rows of one answer each, which they return as they are."""

    def rows(self, rows: Experience) -> Experience:
        return rows

    def packed(self, x_BGL: np.ndarray) -> np.ndarray:
        return x_BGL

    def unpacked(self, x_BGL: np.ndarray) -> np.ndarray:
        return x_BGL


class Packing(NamedTuple):
    """Where the prompts and answers of a step are. P groups, R decoder rows of a group.

    Attributes:
        groups, decoder_rows: P and R.
        group_B: int64 group of each prompt.
        segment_B, offset_B: its number in the encoder row, from 1, and its first position there.
        row_BG: int64 decoder row of each answer, in its group.
        segment_BG, offset_BG: its number in this row, from 1, and the first position of its tokens, or of its prompt's.
        lengths_BG: positions of each answer in its row.
    """

    groups: int
    decoder_rows: int
    group_B: np.ndarray
    segment_B: np.ndarray
    offset_B: np.ndarray
    row_BG: np.ndarray
    segment_BG: np.ndarray
    offset_BG: np.ndarray
    lengths_BG: np.ndarray

    def rows(self, rows: Experience) -> Experience:
        """The rows of a step, packed."""
        shape = rows.mask_BGL.shape
        at_tokens = lambda values: self.packed(np.broadcast_to(values, shape).astype(np.int32))
        changed = {
            name: self.packed(x) for name, x in rows._asdict().items() if name.endswith("_BGL") and x is not None
        }
        changed["segments_BGL"] = at_tokens(self.segment_BG[..., None])
        changed["positions_BGL"] = at_tokens(np.arange(shape[-1]))
        if rows.encoder_BS is not None:
            changed["sources_BGL"] = at_tokens(self.segment_B[:, None, None])
            changed |= _encoder_rows(rows, self)
        return rows._replace(**changed, places_BKG=_places_of_answers(self, shape[-1]))

    def packed(self, x_BGL: np.ndarray) -> np.ndarray:
        """Values of the tokens of answers, [B, G, L], at their places in packed rows, [P, R, L]; 0 for padding."""
        x_PRL = np.zeros((self.groups, self.decoder_rows, x_BGL.shape[-1]), x_BGL.dtype)
        place_T, packed_T = self._places(x_BGL.shape[-1])
        x_PRL.reshape(-1)[packed_T] = x_BGL.reshape(-1)[place_T]
        return x_PRL

    def unpacked(self, x_PRL: np.ndarray) -> np.ndarray:
        """The inverse of `packed`; 0 behind the answers."""
        x_BGL = np.zeros((*self.row_BG.shape, x_PRL.shape[-1]), x_PRL.dtype)
        place_T, packed_T = self._places(x_PRL.shape[-1])
        x_BGL.reshape(-1)[place_T] = x_PRL.reshape(-1)[packed_T]
        return x_BGL

    def _places(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 [T]: flat indices of all tokens in [B, G, L] and in [P, R, L]."""
        lengths_N = self.lengths_BG.ravel()
        packed_BG = (self.group_B[:, None] * self.decoder_rows + self.row_BG) * length + self.offset_BG
        starts_N = np.arange(lengths_N.size) * length
        return concatenate_ranges(starts_N, lengths_N), concatenate_ranges(packed_BG.ravel(), lengths_N)


def pack(rows: Experience, parts: int) -> Packing:
    """The packing of a step.

    Args:
        rows: one row for each answer, `experience.answer_rows`.
        parts: groups are a multiple of it: devices that split the rows of a batch, times microbatches.
    """
    segments_BGL = rows.mask_BGL if rows.encoder_BS is not None else rows.segments_BGL
    lengths_BG = (segments_BGL > 0).sum(-1)
    prompts, answers, length = rows.mask_BGL.shape
    if rows.encoder_BS is None:
        inputs_B, inputs_length, most = np.zeros(prompts, np.int64), 0, prompts // parts
        counts = iter([parts])
    else:
        inputs_B, inputs_length, most = (rows.encoder_segments_BS > 0).sum(-1), rows.encoder_BS.shape[-1], prompts
        counts = sizes(prompts, parts)
    best, fewest = None, np.inf
    for groups in counts:
        if groups * inputs_length >= fewest:
            break
        group_B = _groups(inputs_B, lengths_BG.sum(-1), groups, inputs_length, most)
        if group_B is None:
            continue
        row_BG, segment_BG, offset_BG = _decoder_rows(group_B, lengths_BG, groups, length)
        needed, limit = int(row_BG.max()) + 1, prompts * answers // groups
        if needed > limit:
            continue
        count = min(limit, next(size for size in sizes(2 * limit, 1) if size >= needed))
        positions = groups * (inputs_length + count * length)
        if positions < fewest:
            fewest = positions
            segment_B, offset_B = _in_order(group_B, inputs_B)
            best = Packing(groups, count, group_B, segment_B, offset_B, row_BG, segment_BG, offset_BG, lengths_BG)
    assert best is not None  # a group for each prompt, or for the prompts of a part, has a row for each answer
    return best


def parts_of(config: Config, mesh: jax.sharding.Mesh) -> int:
    """The number that the first dim of the arrays of a step is a multiple of."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return batch_parts() * config.train.microbatches


def sizes(most: int, multiple: int) -> Iterator[int]:
    """Multiples of a number up to `most`, which is one: 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, ... of 1.

    From 4 on, each is at most a quarter larger than the one before.
    """
    size = multiple
    while size < most:
        yield size
        power = 1 << max((size // multiple).bit_length() - 1 - (STEPS.bit_length() - 1), 0)
        size += power * multiple
    yield most


def spec(config: Config, parts: int) -> Experience:
    """Shapes and dtypes of the largest experience of a step, from the config alone, as arrays without memory.

    Packed rows have these shapes where nothing fits together. `parts`: see `pack`.
    """
    whole = experience.spec(config)
    if not config.data.packing:
        return whole
    groups = config.data.batch_size if config.model.architecture == "encoder_decoder" else parts
    none_B, none_BG = np.zeros(1, np.int64), np.zeros((1, config.rl.answers), np.int64)
    rows = config.rl.answers * config.data.batch_size // groups
    alone = Packing(1, rows, none_B, none_B, none_B, none_BG, none_BG, none_BG, none_BG)
    group = alone.rows(jax.tree.map(lambda x: x[:1], whole))
    return jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), (groups, *x.shape[1:])), group)


def _groups(
    inputs_B: np.ndarray, tokens_B: np.ndarray, groups: int, inputs_length: int, most: int
) -> np.ndarray | None:
    """The group of each prompt: with the most decoder tokens first, each goes to the group with the fewest, if its
    encoder row has room, and if it has fewer than `most` prompts. None: a prompt has no room.
    """
    group_B = np.empty(len(inputs_B), np.int64)
    free_P, tokens_P = np.full(groups, inputs_length), np.zeros(groups)
    count_P = np.zeros(groups, np.int64)
    for b in np.argsort(-tokens_B, kind="stable"):
        has_room_P = (free_P >= inputs_B[b]) & (count_P < most)
        if not has_room_P.any():
            return None
        p = group_B[b] = np.where(has_room_P, tokens_P, np.inf).argmin()
        free_P[p] -= inputs_B[b]
        tokens_P[p] += tokens_B[b]
        count_P[p] += 1
    return group_B


def _decoder_rows(
    group_B: np.ndarray, lengths_BG: np.ndarray, groups: int, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, number in the row from 1, and offset of each answer, [B, G]: first fit of the longest first, by group.

    One step of the loop places an answer of each group.
    """
    lengths_N = lengths_BG.ravel()
    group_N = np.repeat(group_B, lengths_BG.shape[1])
    order_N = np.lexsort((-lengths_N, group_N))
    count_P = np.bincount(group_N, minlength=groups)
    first_P = np.cumsum(count_P) - count_P
    free_PR = np.full((groups, count_P.max()), length)
    answers_PR = np.zeros_like(free_PR)
    row_N, number_N, offset_N = (np.empty_like(lengths_N) for _ in range(3))
    for index in range(count_P.max()):
        p = np.flatnonzero(count_P > index)
        n = order_N[first_P[p] + index]
        fits_PR = (free_PR[p] >= lengths_N[n][:, None]) & (answers_PR[p] < most_answers(length))
        row_N[n] = r = fits_PR.argmax(1)
        offset_N[n] = length - free_PR[p, r]
        free_PR[p, r] -= lengths_N[n]
        answers_PR[p, r] += 1
        number_N[n] = answers_PR[p, r]
    return tuple(x.reshape(lengths_BG.shape) for x in (row_N, number_N, offset_N))


def _in_order(group_B: np.ndarray, inputs_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number from 1 and offset of each prompt in the encoder row of its group, in the order of the prompts."""
    segment_B, offset_B = np.empty_like(group_B), np.empty_like(group_B)
    for group in np.unique(group_B):
        b = np.flatnonzero(group_B == group)
        segment_B[b] = 1 + np.arange(len(b))
        offset_B[b] = np.cumsum(inputs_B[b]) - inputs_B[b]
    return segment_B, offset_B


def _encoder_rows(rows: Experience, packing: Packing) -> dict[str, np.ndarray]:
    """The encoder's arrays [P, S]: ids, segments, positions."""
    lengths_B, length = (rows.encoder_segments_BS > 0).sum(-1), rows.encoder_BS.shape[-1]
    place_T = concatenate_ranges(np.arange(len(lengths_B)) * length, lengths_B)
    packed_T = concatenate_ranges(packing.group_B * length + packing.offset_B, lengths_B)
    ids_BS, segments_BS, positions_BS = (np.zeros((packing.groups, length), np.int32) for _ in range(3))
    ids_BS.flat[packed_T] = rows.encoder_BS.flat[place_T]
    segments_BS.flat[packed_T] = np.repeat(packing.segment_B, lengths_B)
    positions_BS.flat[packed_T] = concatenate_ranges(np.zeros_like(lengths_B), lengths_B)
    return {"encoder_BS": ids_BS, "encoder_segments_BS": segments_BS, "encoder_positions_BS": positions_BS}


def _places_of_answers(packing: Packing, length: int) -> np.ndarray:
    """int32 [P, K, G]: of each prompt of a group, the places of its answers among the R x A sums of the group's rows.

    A is that of `answer_sums`. -1: no prompt. K is the most prompts that a group of R rows can have.
    """
    answers, most = packing.row_BG.shape[1], most_answers(length)
    places_PKG = np.full((packing.groups, packing.decoder_rows * most // answers, answers), -1, np.int32)
    for group in np.unique(packing.group_B):
        b = np.flatnonzero(packing.group_B == group)
        places_PKG[group, : len(b)] = packing.row_BG[b] * most + packing.segment_BG[b] - 1
    return places_PKG
