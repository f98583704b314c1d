"""Span corruption, prefix and causal LM, against brute force and T5's published numbers."""

import numpy as np
import pytest
from conftest import random_batch, small, vocabulary_of

from t5like.data.objectives import text_rows
from t5like.data.objectives.denoisers import denoisers, span_lengths
from t5like.data.objectives.denoising import noise_mask
from t5like.data.objectives.windows import TextWindows
from t5like.data.randomness import random_bits, random_parts
from t5like.data.tokenizers.vocabulary import Vocabulary
from t5like.errors import ConfigError

SENTINELS = 499 - np.arange(20)
VOCABULARY = Vocabulary(1, SENTINELS)


def corrupted(config, vocabulary, tokens, segments, keys):
    """Rows of the config's only denoiser."""
    return text_rows.make_rows(config, denoisers(config)[0], vocabulary, TextWindows(tokens, segments, keys))


def keys(count, seed=0):
    return np.random.default_rng(seed).integers(0, 2**63, count).astype(np.uint64)


@pytest.mark.parametrize("inputs, window, targets", [(512, 568, 114), (1024, 1137, 229), (256, 284, 58)])
def test_lengths_are_those_of_t5(inputs, window, targets):
    # 512 -> 568 and 114 are the published ones (T5's `t5.data.preprocessors.random_spans_helper` docstring and configs)
    lengths = span_lengths(inputs, 0.15, 3.0)
    assert (lengths.window, lengths.targets) == (window, targets)


@pytest.mark.parametrize("density, mean", [(0.15, 3.0), (0.15, 8.0), (0.5, 3.0), (0.5, 8.0), (0.1, 1.0)])
@pytest.mark.parametrize("inputs", [32, 64, 512])
def test_the_budget_is_exact_in_every_row(inputs, density, mean):
    lengths = span_lengths(inputs, density, mean)
    mask = noise_mask(keys(50), lengths)
    runs = (np.diff(np.pad(mask, ((0, 0), (1, 0))).astype(int), axis=1) == 1).sum(1)
    assert (mask.sum(1) == round(lengths.window * density)).all()
    assert (runs == lengths.spans).all()
    assert lengths.window - lengths.noise + lengths.spans + 1 == inputs


def test_all_cuts_are_equally_likely():
    # 5 items in 3 parts: 6 ways; chi-square with 5 degrees of freedom is below 20.5 with probability 0.999
    parts = random_parts(random_bits(keys(60_000), 4), 3)
    assert (parts.sum(1) == 5).all() and (parts >= 1).all()
    counts = np.unique(parts[:, 0] * 10 + parts[:, 1], return_counts=True)[1]
    assert len(counts) == 6 and ((counts - 10_000) ** 2 / 10_000).sum() < 20.5


def test_random_bits_are_the_published_splitmix64():
    # first outputs of the reference splitmix64.c for seed 1234567 (Vigna, https://prng.di.unimi.it)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert random_bits(np.array([1234567], np.uint64), 3)[0].tolist() == expected


def merge(encoder, targets, sentinels):
    """Undo span corruption by reading: the text behind each sentinel of the targets goes where the inputs have it."""
    spans, current = {}, None
    for token in targets:
        if token in sentinels:
            current = spans.setdefault(token, [])
        elif token != 1:
            current.append(token)
    return [t for token in encoder if token != 1 for t in (spans[token] if token in sentinels else [token])]


@pytest.mark.parametrize("density, mean", [(0.15, 3.0), (0.5, 3.0), (0.3, 1.0)])
def test_span_corruption_inverts(density, mean):
    config = small(
        data={"inputs_length": 64, "noise_density": density, "mean_span_length": mean, "targets_length": 120},
        tokenizer={"num_sentinels": 40, "vocab_size": 600},
    )
    length = denoisers(config)[0].window.length
    tokens = np.random.default_rng(1).integers(3, 400, (30, length), dtype=np.int32)
    vocabulary = Vocabulary(1, 599 - np.arange(40))
    batch = corrupted(config, vocabulary, tokens, None, keys(30))
    for row, encoder, targets, weights in zip(
        tokens, batch.encoder_BS, batch.targets_BL, batch.weights_BL, strict=True
    ):
        assert merge(encoder.tolist(), targets[weights > 0].tolist(), vocabulary.sentinels) == row.tolist()


def test_sentinels_count_down_and_eos_ends_both_sides():
    batch = random_batch(small())
    for side in (batch.encoder_BS, np.where(batch.weights_BL > 0, batch.targets_BL, 0)):
        for row in side:
            sentinels_of_row = row[row > 479]
            assert sentinels_of_row.tolist() == SENTINELS[: len(sentinels_of_row)].tolist()
            assert row[row != 0][-1] == 1 and (row == 1).sum() == 1
    assert (batch.decoder_BL[:, 0] == 0).all() and (batch.decoder_BL[:, 1:] == batch.targets_BL[:, :-1]).all()


def test_padding_of_the_targets_has_weight_0():
    batch = random_batch(small(data={"targets_length": 20}))
    assert ((batch.targets_BL == 0) == (batch.weights_BL == 0)).all() and (batch.weights_BL == 0).any()


def test_tokens_keep_their_segments():
    config = small(data={"cross_document_attention": False})
    length = denoisers(config)[0].window.length
    segments = (1 + np.arange(length) // 9)[None].astype(np.int32).repeat(4, 0)
    tokens = 100 + segments  # a token says which document it is from
    batch = corrupted(config, VOCABULARY, tokens, segments, keys(4))
    for ids, seg in ((batch.encoder_BS, batch.encoder_segments_BS), (batch.targets_BL, batch.decoder_segments_BL)):
        text = (ids > 100) & (ids < 480)
        assert (ids[text] - 100 == seg[text]).all()
    # a sentinel in the targets belongs to the document of the text behind it
    sentinel = batch.targets_BL[:, :-1] > 479
    assert (batch.decoder_segments_BL[:, :-1][sentinel] == batch.decoder_segments_BL[:, 1:][sentinel]).all()


def test_a_row_depends_on_its_own_key_only():
    config, k = small(), keys(6)
    tokens = np.random.default_rng(0).integers(3, 400, (6, denoisers(config)[0].window.length), dtype=np.int32)
    whole = corrupted(config, VOCABULARY, tokens, None, k)
    part = corrupted(config, VOCABULARY, tokens[2:4], None, k[2:4])
    assert (whole.encoder_BS[2:4] == part.encoder_BS).all() and (whole.targets_BL[2:4] == part.targets_BL).all()


def test_causal_lm_predicts_the_next_token():
    batch = random_batch(small(model={"architecture": "decoder"}))
    assert (batch.decoder_BL[:, 1:] == batch.targets_BL[:, :-1]).all() and (batch.weights_BL == 1).all()
    assert batch.decoder_BL.shape == (8, 44)


def test_causal_lm_does_not_predict_across_a_border():
    batch = random_batch(small(model={"architecture": "decoder"}, data={"cross_document_attention": False}))
    ends = batch.decoder_segments_BL[:, 1:] != batch.decoder_segments_BL[:, :-1]
    assert (batch.weights_BL[:, :-1][ends] == 0).all() and (batch.weights_BL[:, :-1][~ends] == 1).all()


def test_prefix_lm_splits_an_encoder_decoder_row_at_inputs_length():
    batch = random_batch(small(data={"objective": "prefix_lm"}))
    assert batch.encoder_BS.shape == (8, 32) and batch.targets_BL.shape == (8, 12) and (batch.weights_BL == 1).all()


def test_prefix_lm_of_a_decoder_has_a_prefix_and_targets_after_it():
    batch = random_batch(small(model={"architecture": "decoder"}, data={"objective": "prefix_lm", "batch_size": 400}))
    prefix = batch.prefix_BL.sum(1)
    assert prefix.min() >= 1 and prefix.max() <= 43 and len(set(prefix)) == 43  # every length occurs
    position = np.arange(44)[None]
    assert (batch.prefix_BL == (position < prefix[:, None])).all()
    assert (batch.weights_BL == (position >= prefix[:, None] - 1)).all()


@pytest.mark.parametrize(
    "data, tokenizer, message",
    [
        ({"targets_length": 6}, {}, "data.targets_length=6 must be at least"),
        ({"inputs_length": 512, "targets_length": 200}, {}, "tokenizer.num_sentinels=20 must be at least 28"),
        ({"inputs_length": 2}, {}, "data.inputs_length=2"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(data, tokenizer, message):
    with pytest.raises(ConfigError, match=message):
        denoisers(small(data=data, tokenizer=tokenizer))


# ---- UL2 ----


UL2 = {"data": {"objective": "ul2", "inputs_length": 512, "targets_length": 512, "batch_size": 4},
       "tokenizer": {"num_sentinels": 200, "vocab_size": 1000}}  # fmt: skip


def test_ul2_has_the_seven_denoisers_of_the_paper():
    # Tay et al. 2022, table 1: (mean span, density) of R and X; S masks a quarter, at the end
    ways = {way.name: way for way in denoisers(small(**UL2))}
    table = {"R3_15": (3, 0.15), "R8_15": (8, 0.15), "X3_50": (3, 0.5), "X8_50": (8, 0.5), "X64_15": (64, 0.15),
             "X64_50": (64, 0.5)}  # fmt: skip
    assert set(ways) == {*table, "S"} and all(way.share == 1 / 7 for way in ways.values())
    for name, (mean, density) in table.items():
        lengths = ways[name].spans
        assert lengths.noise == round(lengths.window * density) and lengths.spans == round(lengths.noise / mean)
    assert ways["S"].spans.noise / ways["S"].spans.window == pytest.approx(0.25, abs=0.001)


def test_each_ul2_window_is_the_longest_whose_inputs_and_targets_fit():
    for way in denoisers(small(**UL2)):
        assert way.inputs <= 512 and way.spans.targets <= 512
        assert way.inputs in (511, 512) or way.spans.targets in (511, 512), way.name


@pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder"])
def test_ul2_rows_invert_and_begin_with_their_mode_token(architecture):
    config = small(**{**UL2, "model": {"architecture": architecture}})
    sentinels = 999 - np.arange(200)
    for way in denoisers(config):
        tokens = np.random.default_rng(3).integers(3, 700, (4, way.window.length), dtype=np.int32)
        batch = text_rows.make_rows(
            config, way, vocabulary_of(config), TextWindows(tokens, np.ones_like(tokens), keys(4))
        )
        for row in range(4):
            if architecture == "decoder":
                read = batch.decoder_BL[row][batch.prefix_BL[row]]
                start = len(read)
                assert batch.decoder_BL[row][start] == 0 and batch.decoder_BL.shape[1] == 1024
            else:
                read = batch.encoder_BS[row][batch.encoder_segments_BS[row] > 0]
            targets = batch.targets_BL[row][batch.weights_BL[row] > 0].tolist()
            assert read[0] == sentinels[{"R": -1, "S": -2, "X": -3}[way.name[0]]]
            text = [*read[1:], *targets] if way.name == "S" else merge(read[1:].tolist(), targets, sentinels)
            assert text == tokens[row].tolist(), way.name


def test_over_a_million_tokens_the_masked_share_is_that_of_the_table():
    for way in denoisers(small(**UL2)):
        if way.name != "S":
            mask = noise_mask(keys(10**6 // way.window.length), way.spans)
            assert mask.mean() == pytest.approx(way.spans.noise / way.window.length, rel=1e-12)
            if way.spans.spans > 20:  # away from the ends every position is masked about equally often
                rates = mask.mean(0)[way.window.length // 4 : -way.window.length // 4]
                assert abs(rates - mask.mean()).max() < 5 * (mask.mean() / len(mask)) ** 0.5, way.name


@pytest.mark.parametrize("data, tokenizer, message", [
    ({"inputs_length": 40, "targets_length": 40}, {}, "data.inputs_length=40 is too short for .* spans of 64 tokens"),
    ({"inputs_length": 256, "targets_length": 29}, {}, "data.targets_length=29 is too short for .* 64 .*; use 255"),
    ({"inputs_length": 512, "targets_length": 512}, {"num_sentinels": 100}, "num_sentinels=100 must be at least"),
])  # fmt: skip
def test_a_denoiser_that_does_not_fit_is_refused(data, tokenizer, message):
    with pytest.raises(ConfigError, match=message):
        denoisers(small(data={"objective": "ul2", **data}, tokenizer=tokenizer))


# ---- One sequence for a decoder-only model ----


def test_a_decoder_only_row_is_the_inputs_then_the_targets():
    both = {name: random_batch(small(model={"architecture": name}, data={"objective": "span_corruption"}))
            for name in ("encoder_decoder", "decoder")}  # fmt: skip
    pair, row = both.values()
    assert row.encoder_BS is None and row.decoder_BL.shape == (8, 44)
    assert (row.decoder_BL == np.concatenate([pair.encoder_BS, pair.decoder_BL], axis=1)).all()
    assert (row.targets_BL[:, 32:] == pair.targets_BL).all() and (row.weights_BL[:, 32:] == pair.weights_BL).all()
    assert (row.weights_BL[:, :32] == 0).all() and (row.prefix_BL == (np.arange(44) < 32)[None]).all()


def test_causal_lm_of_an_encoder_decoder_has_no_inputs_and_all_tokens_as_targets():
    batch = random_batch(small(data={"objective": "causal_lm", "inputs_length": 1}))
    assert (batch.encoder_BS == 1).all() and batch.encoder_BS.shape == (8, 1)
    assert (batch.weights_BL == 1).all() and (batch.decoder_BL[:, 1:] == batch.targets_BL[:, :-1]).all()
