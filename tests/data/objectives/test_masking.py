"""Token masking and sentence pairs: exact counts, BERT's 80/10/10, whole words, true and false successors."""

import numpy as np
import pytest
from conftest import denoised_batch, small, vocabulary_of

from t5like.data.objectives import masking
from t5like.data.objectives.denoisers import denoisers
from t5like.data.objectives.windows import TextWindows
from t5like.errors import ConfigError

CONFIG = small(model={"architecture": "encoder"}, data={"inputs_length": 66, "batch_size": 64})
VOCABULARY = vocabulary_of(CONFIG)
MASK, CLS = 499, 498
ORDINARY = np.flatnonzero(VOCABULARY.ordinary_V)


def keys(count, seed=0):
    return np.random.default_rng(seed).integers(0, 2**63, count).astype(np.uint64)


def text(rows, length=64, seed=0):
    tokens = np.random.default_rng(seed).integers(3, 480, (rows, length), dtype=np.int32)
    return TextWindows(tokens, None, keys(rows, seed))


def masked(config, of, vocabulary=VOCABULARY):
    return masking.mask_tokens(config, vocabulary, of)


# ---- MLM ----


def test_the_share_of_masked_tokens_is_exact_in_every_row():
    batch = masked(CONFIG, text(64))
    assert (batch.weights_BL.sum(1) == round(0.15 * 64)).all() and batch.decoder_BL is None
    assert (batch.encoder_BS[:, 0] == CLS).all() and (batch.encoder_BS[:, -1] == 1).all()


def test_targets_are_the_original_tokens_and_the_rest_is_unchanged():
    of = text(64)
    batch = masked(CONFIG, of)
    inner, learned = batch.encoder_BS[:, 1:-1], batch.weights_BL[:, 1:-1] > 0
    assert (np.where(learned, batch.targets_BL[:, 1:-1], inner) == of.tokens_BT).all()
    assert (batch.targets_BL[batch.weights_BL == 0] == 0).all()


def test_of_a_million_tokens_80_10_10_percent_are_masked_random_and_kept():
    of = text(2000, 512)
    batch = masked(small(model={"architecture": "encoder"}, data={"inputs_length": 514}), of)
    learned = batch.weights_BL > 0
    inputs, truth = batch.encoder_BS[learned], batch.targets_BL[learned]
    chosen = round(0.15 * 512)
    assert learned.sum() == 2000 * chosen
    assert (inputs == MASK).sum() == 2000 * round(0.8 * chosen)
    drawn = inputs[(inputs != MASK) & (inputs != truth)]
    # one in 477 random tokens is the one that stood there; 5 standard deviations of a Poisson number
    expected = 2000 * round(0.1 * chosen) * (1 - 1 / len(ORDINARY))
    assert abs(len(drawn) - expected) < 5 * (2000 * round(0.1 * chosen) / len(ORDINARY)) ** 0.5
    counts = np.bincount(drawn, minlength=500)[ORDINARY]
    assert counts.min() > 0 and np.bincount(drawn, minlength=500)[~VOCABULARY.ordinary_V].sum() == 0


def test_every_position_is_masked_equally_often():
    learned = masked(CONFIG, text(20_000)).weights_BL[:, 1:-1].sum(0)
    expected = 20_000 * 10 / 64
    # chi-square with 63 degrees of freedom is below 103 with probability 0.999
    assert ((learned - expected) ** 2 / (expected * (1 - 10 / 64))).sum() < 103


def test_special_ids_are_never_chosen():
    of = text(64)
    of.tokens_BT[:, ::3] = 1
    of.tokens_BT[:, 1::9] = 490
    batch = masked(CONFIG, of)
    assert np.isin(batch.targets_BL[batch.weights_BL > 0], ORDINARY).all()
    assert (batch.weights_BL.sum(1) == 10).all()


def test_a_row_with_too_little_text_has_fewer_masks():
    of = text(4)
    of.tokens_BT[:, 5:] = 1
    assert (masked(CONFIG, of).weights_BL.sum(1) == 5).all()


def test_words_are_masked_completely_and_the_budget_is_never_exceeded():
    config = small(model={"architecture": "encoder"}, data={"inputs_length": 66, "whole_word_masking": True})
    of = text(500)
    batch = masked(config, of)
    learned = batch.weights_BL[:, 1:-1] > 0
    word = np.cumsum((of.tokens_BT % 3 == 0) | (np.arange(64) == 0)[None], axis=1)
    sizes = []
    for row, chosen in zip(word, learned, strict=True):
        for number in np.unique(row):
            assert len(set(chosen[row == number])) == 1
            sizes.append((row == number).sum())
    counts = learned.sum(1)
    assert counts.max() <= 10 and (counts == 10).mean() > 0.9 and np.mean(sizes) > 2


# ---- Sentence pairs ----


class Documents:
    """Documents of given sizes, EOS included, whose token at offset p is 100 + its document's index."""

    def __init__(self, *sizes):
        self.ends, self.num_tokens = np.cumsum(sizes), sum(sizes)

    def windows(self, starts_N, length):
        offsets = (starts_N[:, None] + np.arange(length)) % self.num_tokens
        return (100 + np.searchsorted(self.ends, offsets, "right")).astype(np.int32)

    def documents(self, places_N):
        index = np.searchsorted(self.ends, places_N % self.num_tokens, "right")
        return np.where(index > 0, self.ends[index - 1], 0), self.ends[index] - 1


def pairs(stream, rows=2000, length=30):
    starts = np.random.default_rng(0).integers(0, stream.num_tokens, rows)
    return masking.sentence_pairs(stream, starts, length, keys(rows, 7))


def test_half_of_the_second_texts_follow_in_the_same_document_and_no_other_does():
    of = pairs(Documents(*[50, 40, 61, 33] * 20))
    first = np.where(of.segments_BT == 1, of.tokens_BT, 0)
    second = np.where(of.segments_BT == 2, of.tokens_BT, 0)
    for row in range(len(first)):
        documents = [set(part[row][part[row] > 0].tolist()) for part in (first, second)]
        assert all(len(each) == 1 for each in documents)
        assert (documents[0] == documents[1]) == bool(of.follows_B[row])
    # 5 standard deviations of 2000 tosses
    assert abs(of.follows_B.mean() - 0.5) < 5 * 0.5 / 2000**0.5


def test_a_true_successor_begins_where_the_first_text_ends():
    class Places(Documents):
        def windows(self, starts_N, length):
            return (starts_N[:, None] + np.arange(length)).astype(np.int32)

    of = pairs(Places(*[50, 40, 61, 33] * 20))
    for tokens, segments in zip(of.tokens_BT[of.follows_B > 0], of.segments_BT[of.follows_B > 0], strict=True):
        assert (np.diff(tokens[segments > 0]) == 1).all()


def test_length_does_not_reveal_whether_the_second_text_follows():
    of = pairs(Documents(*[100] * 40), rows=4000)
    assert ((of.segments_BT > 0).all(1)).all()
    first = (of.segments_BT == 1).sum(1)
    assert first.min() >= 7 and first.max() <= 23
    assert abs(first[of.follows_B == 1].mean() - first[of.follows_B == 0].mean()) < 1


def test_short_documents_make_short_rows_that_are_padded():
    of = pairs(Documents(*[9, 5, 2, 1] * 30), rows=500)
    assert ((of.segments_BT > 0).sum(1) <= 30).all() and (of.segments_BT == 0).any()
    assert ((of.segments_BT == 1).any(1) & (np.diff(of.segments_BT.astype(int), axis=1) <= 1).all(1)).all()


def test_a_pair_is_laid_out_as_bert_does():
    config = small(
        model={"architecture": "encoder", "token_types": 2}, data={"objective": "mlm_nsp", "inputs_length": 12}
    )
    tokens = np.array([[10, 11, 12, 13, 14, 15, 16, 0, 0]], np.int32)
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0]], np.int32)
    batch = masking.next_sentence(config, vocabulary_of(config), TextWindows(tokens, segments, keys(1), np.array([1])))
    whole = np.where(batch.weights_BL > 0, batch.targets_BL, batch.encoder_BS)
    assert whole.tolist() == [[CLS, 10, 11, 12, 1, 13, 14, 15, 16, 1, 0, 0]]
    assert batch.token_types_BS.tolist() == [[0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0]]
    assert batch.encoder_segments_BS.tolist() == [[1] * 10 + [0, 0]]
    assert batch.weights_BL.sum() == 1 and batch.follows_B1.tolist() == [[1]]


def test_a_row_depends_on_its_own_key_only():
    config = small(model={"architecture": "encoder", "token_types": 2}, data={"objective": "mlm_nsp", "batch_size": 6})
    whole = denoised_batch(config, denoisers(config)[0])
    stream, starts, k = Documents(*[50] * 20), np.arange(0, 600, 100), keys(6)
    alone = masking.sentence_pairs(stream, starts[2:4], 29, k[2:4])
    together = masking.sentence_pairs(stream, starts, 29, k)
    assert (alone.tokens_BT == together.tokens_BT[2:4]).all() and whole.follows_B1.shape == (6, 1)


@pytest.mark.parametrize(
    "data, tokenizer, message",
    [
        ({"inputs_length": 3}, {}, "data.inputs_length=3 must be at least 4 for mlm"),
        ({"inputs_length": 5, "objective": "mlm_nsp"}, {}, "data.inputs_length=5 must be at least 7 for mlm_nsp"),
        ({}, {"num_sentinels": 1}, "tokenizer.num_sentinels=1 must be at least 2"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(data, tokenizer, message):
    with pytest.raises(ConfigError, match=message):
        denoisers(small(model={"architecture": "encoder"}, data=data, tokenizer=tokenizer))
