"""Objectives for encoders, as in BERT: masked language modelling (MLM) and next-sentence prediction, with exact counts.

A row begins with CLS and ends with SEP. Sentinels serve as BERT's special tokens, because every tokenizer here has
them: [MASK] is <extra_id_0>, [CLS] is <extra_id_1>, and [SEP] is EOS. A tokenizer of BERT has its own.
Called by `denoisers`; `sentence_pairs` by `text_rows`. Source: Devlin et al. 2019 (BERT), section 3.1 and appendix A.1;
whole-word masking as in BERT's later release.
"""

from typing import Protocol

import numpy as np

from t5like.config.schema import Config
from t5like.data.objectives.windows import TextWindows
from t5like.data.randomness import random_bits
from t5like.data.tokenizers.vocabulary import Vocabulary
from t5like.types import Batch

MASK, CLS = 0, 1  # indices of the sentinels that serve as [MASK] and [CLS]
MASKED_SHARE, RANDOM_SHARE = 0.8, 0.1  # of the chosen tokens; the rest keeps its token
LAST = np.uint64(2**64 - 1)  # sorts after every random number


def masked_tokens(density: float, length: int) -> int:
    """How many of `length` tokens are chosen."""
    return max(round(density * length), 1)


def mask_tokens(config: Config, vocabulary: Vocabulary, text: TextWindows) -> Batch:
    """MLM: some tokens of the text are masked or replaced in the inputs, and are the targets.

    A share of `noise_density` of the tokens is chosen, the same number in every row: 80 % of them become MASK, 10 % a
    random token of text, and 10 % are kept. EOS between documents and other special ids are never chosen:

        tokens    A B C D E F
        chosen    . c . . c .
        encoder   CLS A MASK C D E F SEP
        targets     0 0 B    0 0 E 0 0
        weights     0 0 1    0 0 1 0 0
    """
    rows, length = text.tokens_BT.shape
    count_B = np.full(rows, masked_tokens(config.data.noise_density, length))
    inputs_BT, chosen_BT = _mask(config, vocabulary, text.tokens_BT, count_B, text.keys_B)
    segments_BS = None
    if text.segments_BT is not None:  # CLS is part of the first document, SEP of the last
        segments_BS = np.pad(text.segments_BT, ((0, 0), (1, 1)), "edge")
    ends = (vocabulary.sentinels[CLS], vocabulary.eos)
    encoder_BS = np.concatenate([_column(ends[0], rows), inputs_BT, _column(ends[1], rows)], axis=1)
    chosen_BS = np.pad(chosen_BT, ((0, 0), (1, 1)))
    targets_BS = np.where(chosen_BS, np.pad(text.tokens_BT, ((0, 0), (1, 1))), 0)
    return Batch(None, targets_BS, chosen_BS.astype(np.float32), encoder_BS, segments_BS)


def next_sentence(config: Config, vocabulary: Vocabulary, text: TextWindows) -> Batch:
    """MLM on a pair of texts, with the label whether the second text follows the first (next-sentence prediction).

        tokens    A B C D E 0        (segments 1 1 2 2 2 0)
        encoder   CLS A B SEP C D E SEP 0
        types     0   0 0 0   1 1 1 1   0
        segments  1   1 1 1   1 1 1 1   0

    Masking is that of `mask_tokens`, with the share `noise_density` of the number of tokens of each row.
    """
    rows, length = text.tokens_BT.shape
    real_BT, second_BT = text.segments_BT > 0, text.segments_BT == 2
    count_B = np.maximum(np.round(config.data.noise_density * real_BT.sum(1)).astype(int), 1)
    tokens_BT = np.where(real_BT, text.tokens_BT, vocabulary.eos)  # never chosen
    inputs_BT, chosen_BT = _mask(config, vocabulary, tokens_BT, count_B, text.keys_B)
    # Position of each token: after CLS and, in the second text, after one more SEP.
    position_BT = np.arange(length)[None] + 1 + second_BT
    row_B1 = np.arange(rows)[:, None]
    shape = (rows, length + 3)
    encoder_BS, targets_BS, types_BS = (np.zeros(shape, np.int32) for _ in range(3))
    weights_BS = np.zeros(shape, np.float32)
    row_N = np.broadcast_to(row_B1, real_BT.shape)[real_BT]
    encoder_BS[row_N, position_BT[real_BT]] = inputs_BT[real_BT]
    targets_BS[row_N, position_BT[real_BT]] = np.where(chosen_BT, text.tokens_BT, 0)[real_BT]
    weights_BS[row_N, position_BT[real_BT]] = chosen_BT[real_BT]
    first_B, end_B = (text.segments_BT == 1).sum(1), real_BT.sum(1)
    encoder_BS[:, 0] = vocabulary.sentinels[CLS]
    encoder_BS[row_B1[:, 0], first_B + 1] = vocabulary.eos
    encoder_BS[row_B1[:, 0], end_B + 2] = vocabulary.eos
    position_1S = np.arange(length + 3)[None]
    segments_BS = (position_1S < end_B[:, None] + 3).astype(np.int32)
    types_BS[(position_1S > first_B[:, None] + 1) & (segments_BS > 0)] = 1
    follows_B1 = text.follows_B[:, None].astype(np.int32)
    return Batch(None, targets_BS, weights_BS, encoder_BS, segments_BS, token_types_BS=types_BS, follows_B1=follows_B1)


def _column(token: int, rows: int) -> np.ndarray:
    return np.full((rows, 1), token, np.int32)


def _mask(config: Config, vocabulary: Vocabulary, tokens_BT, count_B, keys_B) -> tuple[np.ndarray, np.ndarray]:
    """The inputs [B, T], and which tokens were chosen, `count_B` in each row; both depend on the row's key."""
    length = tokens_BT.shape[1]
    bits = random_bits(keys_B, 3 * length)
    allowed_BT = vocabulary.ordinary_V[tokens_BT]
    count_B = np.minimum(count_B, allowed_BT.sum(1))
    if config.data.whole_word_masking:
        chosen_BT = _choose_words(allowed_BT, vocabulary.begins_word_V[tokens_BT], count_B, bits[:, :length])
    else:
        chosen_BT = _select_smallest(np.where(allowed_BT, bits[:, :length], LAST), count_B)
    count_B = chosen_BT.sum(1)
    draws_BT = np.where(chosen_BT, bits[:, length : 2 * length], LAST)
    masked_B = np.round(MASKED_SHARE * count_B).astype(int)
    changed_B = masked_B + np.round(RANDOM_SHARE * count_B).astype(int)
    masked_BT, changed_BT = _select_smallest(draws_BT, masked_B), _select_smallest(draws_BT, changed_B)
    ordinary_N = np.flatnonzero(vocabulary.ordinary_V)
    drawn_BT = ordinary_N[bits[:, 2 * length :] % np.uint64(len(ordinary_N))]
    inputs_BT = np.where(changed_BT, np.where(masked_BT, vocabulary.sentinels[MASK], drawn_BT), tokens_BT)
    return inputs_BT.astype(np.int32), chosen_BT


def _select_smallest(numbers_BT: np.ndarray, count_B: np.ndarray) -> np.ndarray:
    """bool [B, T]: True at the `count_B` smallest numbers of each row."""
    most = int(count_B.max(initial=0))
    if most == 0:
        return np.zeros(numbers_BT.shape, bool)
    # Partition first, so that only the `most` smallest numbers have to be sorted.
    first_BC = np.argpartition(numbers_BT, min(most, numbers_BT.shape[1]) - 1, axis=1)[:, :most]
    order_BC = np.argsort(np.take_along_axis(numbers_BT, first_BC, axis=1), axis=1)
    ranked_BC = np.take_along_axis(first_BC, order_BC, axis=1)
    out_BT = np.zeros(numbers_BT.shape, bool)
    np.put_along_axis(out_BT, ranked_BC, np.arange(most)[None] < count_B[:, None], axis=1)
    return out_BT


def _choose_words(allowed_BT, begins_BT, count_B, bits_BT) -> np.ndarray:
    """bool [B, T]: whole words in random order, each chosen if it still fits, until `count_B` tokens are chosen.

    A word starts at a token that begins a word, or that follows a special id. The count is never exceeded, and reached
    as closely as whole words allow.
    """
    rows, length = allowed_BT.shape
    begins_BT = allowed_BT & (begins_BT | ~np.pad(allowed_BT, ((0, 0), (1, 0)))[:, :-1])
    word_BT = np.cumsum(begins_BT, axis=1)  # from 1; special ids have the number of the previous word
    flat_N = (word_BT + np.arange(rows)[:, None] * (length + 1))[allowed_BT]
    size_BW = np.bincount(flat_N, minlength=rows * (length + 1)).reshape(rows, length + 1)
    order_BW = np.argsort(np.where(size_BW[:, 1:] > 0, bits_BT, LAST), axis=1) + 1
    size_BW = np.take_along_axis(size_BW, order_BW, axis=1)
    taken_BW, remaining_B = np.zeros((rows, length), bool), count_B.copy()
    for rank in range(int((size_BW > 0).sum(1).max(initial=0))):
        taken_BW[:, rank] = (size_BW[:, rank] > 0) & (size_BW[:, rank] <= remaining_B)
        remaining_B -= np.where(taken_BW[:, rank], size_BW[:, rank], 0)
        if not remaining_B.any():
            break
    chosen_BW = np.zeros((rows, length + 1), bool)
    np.put_along_axis(chosen_BW, order_BW, taken_BW, axis=1)
    return np.take_along_axis(chosen_BW, word_BT, axis=1) & allowed_BT


# ---- Sentence pairs ----


class DocumentStream(Protocol):
    """The methods of `token_store.Stream` that pairs need."""

    num_tokens: int

    def windows(self, starts_N: np.ndarray, length: int) -> np.ndarray: ...

    def documents(self, offsets_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Begin and end, EOS excluded, of the document at each offset."""


def sentence_pairs(stream: DocumentStream, start_B: np.ndarray, length: int, keys_B: np.ndarray) -> TextWindows:
    """Two texts for each row, with at most `length` tokens in total; in half of the rows the second follows the first.

    Up to `length` tokens of the document at `start_B` are split at a random position, with at least a quarter on each
    side. With probability 1/2 the second part is replaced by as many tokens of another document, at a random offset. A
    document of one token can't be split; its second text always comes from another document.

    Rows of short documents are padded.
    """
    bits = random_bits(keys_B ^ np.uint64(0x5EC0), 3)  # independent of the bits for masking
    begin_B, end_B = stream.documents(start_B)
    first_B = np.maximum(begin_B, np.minimum(start_B, end_B - length))
    size_B = np.minimum(length, end_B - first_B)
    low_B = np.maximum(size_B // 4, 1)
    span_B = np.maximum(size_B - 2 * low_B, 0) + 1
    cut_B = np.minimum(low_B + (bits[:, 0] % span_B.astype(np.uint64)).astype(np.int64), np.maximum(size_B, 1))
    cut_B = np.where(size_B == length, np.minimum(cut_B, length - 1), cut_B)
    follows_B = (bits[:, 1] >> np.uint64(63)).astype(bool) & (size_B > cut_B)
    # Another document: at a random offset; if that is the same document, the next one (or the first of all).
    other_B = (bits[:, 2] % np.uint64(stream.num_tokens)).astype(np.int64)
    other_begin_B, other_end_B = stream.documents(other_B)
    same_B = other_begin_B == begin_B
    next_B = np.where(end_B + 1 < stream.num_tokens, end_B + 1, 0)
    other_B = np.where(same_B, next_B, other_B)
    other_begin_B, other_end_B = stream.documents(other_B)
    wanted_B = np.where(size_B > cut_B, size_B - cut_B, length - cut_B)
    other_first_B = np.maximum(other_begin_B, np.minimum(other_B, other_end_B - wanted_B))
    second_first_B = np.where(follows_B, first_B + cut_B, other_first_B)
    second_size_B = np.where(follows_B, size_B - cut_B, np.minimum(wanted_B, other_end_B - other_first_B))
    position_1T = np.arange(length)[None]
    cut_B1, end_B1 = cut_B[:, None], (cut_B + second_size_B)[:, None]
    first_BT = stream.windows(first_B, length)
    second_BT = stream.windows(second_first_B, length)
    shifted_BT = np.take_along_axis(second_BT, np.maximum(position_1T - cut_B1, 0), axis=1)
    segments_BT = np.where(position_1T < cut_B1, 1, np.where(position_1T < end_B1, 2, 0)).astype(np.int32)
    tokens_BT = np.where(segments_BT == 1, first_BT, np.where(segments_BT == 2, shifted_BT, 0)).astype(np.int32)
    return TextWindows(tokens_BT, segments_BT, keys_B, follows_B.astype(np.int32))
