"""The batch of step s is a pure function of (config, s): row arithmetic, for any process, in any order."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from conftest import small, vocabulary_of

from t5like.data import pipeline
from t5like.data.objectives.denoisers import denoisers
from t5like.data.pipeline import Batches
from t5like.data.randomness import permute
from t5like.data.tokenizers.vocabulary import Vocabulary
from t5like.errors import ConfigError, DataError

VOCABULARY = Vocabulary(1, np.arange(499, 479, -1, dtype=np.int32))


class OffsetStream:
    """A circular text of documents of 7 tokens, whose token at offset p is first + p, so that batches show offsets."""

    def __init__(self, num_tokens: int, first: int = 1000):
        self.num_tokens, self.num_documents, self.first = num_tokens, num_tokens // 7, first

    def windows(self, starts_N: np.ndarray, length: int) -> np.ndarray:
        return ((starts_N[:, None] + np.arange(length)) % self.num_tokens + self.first).astype(np.int32)

    def segments(self, starts_N: np.ndarray, length: int) -> np.ndarray:
        documents = (starts_N[:, None] + np.arange(length)) // 7
        return (documents - documents[:, :1] + 1).astype(np.int32)

    def documents(self, offsets_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        begin_N = offsets_N // 7 * 7
        return begin_N, np.minimum(begin_N + 7, self.num_tokens) - 1


def causal(num_tokens: int | tuple[int, ...] = 1000, *, heldout: bool = False, seed: int = 0, **data) -> Batches:
    """Rows of 10 tokens, 8 a step, of one or more texts; source k's tokens begin at 100,000 k."""
    sizes = num_tokens if isinstance(num_tokens, tuple) else (num_tokens,)
    config = small(
        seed=seed,
        model={"architecture": "decoder"},
        data={
            "batch_size": 8,
            "inputs_length": 0,
            "targets_length": 10,
            "source": tuple(f"text:{k}" for k in range(len(sizes))),
            **data,
        },
    )
    return Batches(
        config, VOCABULARY, [OffsetStream(size, 100_000 * k) for k, size in enumerate(sizes)], heldout=heldout
    )


def first_tokens(batches: Batches, steps: range) -> np.ndarray:
    return np.concatenate([batches.at(step).decoder_BL[:, 0] for step in steps])


def digest(batch) -> str:
    return hashlib.sha256(
        b"".join(b"-" if x is None else str((x.shape, x.dtype)).encode() + x.tobytes() for x in batch)
    ).hexdigest()


def corrupted(**data) -> Batches:
    """Span corruption of two mixed texts, document borders minded: the most that can differ between two batches."""
    config = small(data={"source": ("text:a", "text:b"), "rates": (1, 3), "cross_document_attention": False, **data})
    return Batches(config, VOCABULARY, [OffsetStream(1000), OffsetStream(500, 5000)])


# ---- A pure function of the step ----


def test_a_batch_does_not_depend_on_earlier_calls():
    once = {step: digest(corrupted().at(step)) for step in range(6)}
    batches = corrupted()
    assert {step: digest(batches.at(step)) for step in (5, 0, 3, 3, 1, 4, 2, 0)} == once
    assert len(set(once.values())) == 6


def test_a_batch_is_the_same_in_a_fresh_process():
    code = "from test_pipeline import corrupted, digest; print(digest(corrupted().at(7)))"
    path = {"PYTHONPATH": "tests:tests/data:.", "PYTHONHASHSEED": "99", "PATH": ""}
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=path, check=True
    ).stdout.strip()
    assert other == digest(corrupted().at(7))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_rows_of_all_processes_together_are_the_whole_batch(processes):
    batches, size = corrupted(), 8 // processes
    parts = [batches.at(3, np.arange(size * p, size * p + size)) for p in range(processes)]
    together = [
        None if parts[0][i] is None else np.concatenate([part[i] for part in parts]) for i in range(len(parts[0]))
    ]
    assert digest(together) == digest(batches.at(3))


def test_rows_do_not_depend_on_the_batch_size():
    of_8 = np.concatenate([corrupted().at(step).targets_BL for step in range(4)])
    np.testing.assert_array_equal(of_8, corrupted(batch_size=32).at(0).targets_BL)


def test_prefetching_gives_the_batches_of_at():
    batches = corrupted()
    ahead = list(pipeline.prefetch(batches, 3, 9))
    assert [digest(batch) for batch in ahead] == [digest(batches.at(step)) for step in range(3, 9)]
    assert [digest(batch) for batch in pipeline.prefetch(batches, 3, 5, np.array([2, 3, 7]))] == [
        digest(batches.at(s, np.array([2, 3, 7]))) for s in (3, 4)
    ]


# ---- Shuffled epochs ----


def test_an_epoch_reads_every_token_once():
    batches = causal(1000)  # 99 windows of 10 and the token that the last one only predicts
    windows = int(batches.num_rows[0])
    assert windows == 99
    rows = np.concatenate([batches.at(step).decoder_BL for step in range(3 * windows // 8 + 1)])
    for epoch in range(3):
        tokens, counts = np.unique(rows[epoch * windows : (epoch + 1) * windows], return_counts=True)
        assert len(tokens) == 990 and counts.max() == 1


def test_epochs_differ_in_order_and_in_window_borders():
    starts = first_tokens(causal(800), range(2 * 10))[: 2 * 79].reshape(2, 79)
    assert len(set(starts[0] % 10)) <= 2 and set(starts[0] % 10) != set(starts[1] % 10)
    order = [np.argsort((row - row[0]) % 800) for row in starts]
    assert (order[0] != order[1]).sum() > 60


def test_seeds_differ_in_order_and_in_masked_positions():
    assert (first_tokens(causal(seed=1), range(10)) != first_tokens(causal(seed=2), range(10))).mean() > 0.9
    masks = [Batches(small(seed=seed), VOCABULARY, [OffsetStream(36)]).at(0).targets_BL for seed in (1, 2)]
    assert (masks[0] != masks[1]).any(1).all()


def test_a_mixture_reads_every_window_of_each_source_once_an_epoch():
    batches = causal((30_721, 5_121), rates=(3, 1), batch_size=512)  # 3072 and 512 windows: 1 and 2 epochs in 4096 rows
    for block in range(2):
        starts = first_tokens(batches, range(8 * block, 8 * block + 8))
        first, second = starts[starts < 100_000], starts[starts >= 100_000]
        assert len(first) == len(set(first)) == 3072
        assert len(second) == 1024 and len(set(second)) == 2 * 512  # two epochs, each with its own borders


@pytest.mark.parametrize(
    "rates, counts", [((3, 1), (3072, 1024)), ((), (2731, 1365)), ((1, 0), (4096, 0)), ((1, 1e-9), (4095, 1))]
)
def test_rates_hold_exactly_in_every_4096_rows(rates, counts):
    batches = causal((10_001, 5_001), rates=rates, batch_size=512)
    for block in range(2):
        sources = np.concatenate([batches.at(step).component_B1[:, 0] for step in range(8 * block, 8 * block + 8)])
        read = np.concatenate(
            [batches.at(step).decoder_BL[:, 0] // 100_000 for step in range(8 * block, 8 * block + 8)]
        )
        assert tuple(np.bincount(sources, minlength=2)) == counts
        np.testing.assert_array_equal(sources, read)
        assert len(set(np.flatnonzero(sources == 1) // 512)) == min(8, counts[1])  # spread over the steps


def test_permute_is_a_permutation_of_every_size():
    for size in range(1, 201):
        index = np.arange(size, dtype=np.uint64)
        for key in (0, 2**64 - 1):
            order = permute(index, np.full(size, size, np.uint64), np.full(size, key, np.uint64))
            assert sorted(order) == list(range(size)), (size, key)


def test_permute_scatters_neighbours_and_differs_by_key():
    index = np.arange(10_000, dtype=np.uint64)
    a, b = (
        permute(index, np.full(10_000, 10_000, np.uint64), np.full(10_000, key, np.uint64)).astype(int)
        for key in (1, 2)
    )
    assert (a == b).mean() < 0.01
    assert abs(np.corrcoef(a, np.arange(10_000))[0, 1]) < 0.05
    assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.05


# ---- Several objectives, and rates that change ----


def mixed(*objectives_, architecture="decoder", heldout=False, **data) -> Batches:
    config = small(
        model={"architecture": architecture},
        tokenizer={"num_sentinels": 64},
        data={"objective": objectives_, "inputs_length": 64, "targets_length": 64, "batch_size": 512,
              "source": ("text:a", "text:b"), **data},
    )  # fmt: skip
    streams = (
        [OffsetStream(300, 3)] * 2
        if architecture == "encoder"
        else [OffsetStream(30_000), OffsetStream(20_000, 50_000)]
    )
    return Batches(config, vocabulary_of(config), streams, heldout=heldout)


def objectives_of(batches: Batches, steps: range) -> list[str]:
    components = np.concatenate([batches.at(step).component_B1[:, 0] for step in steps])
    return [batches.components[number].denoiser.objective for number in components]


def test_objectives_are_mixed_at_their_rates_on_every_source():
    batches = mixed("causal_lm", "ul2", rates=(3, 1), objective_rates=(1, 1))
    counts = np.bincount(np.concatenate([batches.at(step).component_B1[:, 0] for step in range(8)]), minlength=16)
    expected = 4096 * np.outer([0.75, 0.25], [1 / 2, *[1 / 14] * 7]).reshape(-1)
    assert len(batches.components) == 16 and (abs(counts - expected) < 1).all()


def test_a_row_comes_from_its_component():
    batches = mixed("causal_lm", "span_corruption", mean_span_length=3.0)
    batch, (which, *_) = batches.at(2), batches.locate(np.arange(1024, 1536, dtype=np.uint64))
    assert (batch.component_B1[:, 0] == which).all()
    corrupted = np.array([batches.components[c].denoiser.objective == "span_corruption" for c in which])
    assert (batch.prefix_BL.any(1) == corrupted).all() and (batch.weights_BL[~corrupted] == 1).all()
    first_text = np.where(corrupted[:, None], 0, batch.decoder_BL)[~corrupted]
    assert ((first_text >= 50_000).all(1) == (which[~corrupted] >= 2)).all()


def test_rates_change_at_the_given_step_and_not_before():
    batches = mixed("span_corruption", "prefix_lm", objective_rates=(1, 0, 0, 1), phase_boundaries=(5,))
    assert set(objectives_of(batches, range(5))) == {"span_corruption"}
    assert set(objectives_of(batches, range(5, 9))) == {"prefix_lm"}


def test_the_masked_share_changes_at_the_given_step_in_training_alone():
    masks = {"phase_noise_density": (0.3, 0.1), "phase_boundaries": (3,), "noise_density": 0.2, "batch_size": 8}
    share = lambda batch: batch.weights_BL.sum() / 8 / 62
    batches = mixed("mlm", architecture="encoder", **masks)
    plain = mixed("mlm", architecture="encoder", phase_boundaries=(3,), batch_size=8)
    assert [share(batches.at(step)) for step in (2, 3)] == pytest.approx([0.3, 0.1], abs=0.01)
    for step in (2, 3):  # the windows stay the same
        kept = (batches.at(step).weights_BL == 0) & (plain.at(step).weights_BL == 0)
        assert kept.mean() > 0.5 and (batches.at(step).encoder_BS == plain.at(step).encoder_BS)[kept].all()
    whole, parts = batches.at(3), [batches.at(3, np.arange(4 * p, 4 * p + 4)) for p in range(2)]
    assert digest(whole) == digest([None if x is None else np.concatenate([x, y]) for x, y in zip(*parts, strict=True)])
    batches.follow(batches.schedule.passing_over(3, 5))  # a rewind gives step 3 other rows of the same phase
    assert share(batches.at(3)) == pytest.approx(0.1, abs=0.01) and digest(batches.at(3)) != digest(whole)
    assert "30 % then 10 % of the tokens masked" in batches.describe()[0]
    heldout = mixed("mlm", architecture="encoder", heldout=True, **masks)
    assert share(heldout.at(0)) == pytest.approx(0.2, abs=0.01)


def test_no_window_occurs_twice_in_an_epoch_when_rates_change():
    batches = mixed("causal_lm", "prefix_lm", objective_rates=(1, 1, 3, 1), phase_boundaries=(3,), batch_size=8,
                    rates=(1, 0, 1, 0))  # fmt: skip
    starts = [batches.at(s).decoder_BL[batches.at(s).component_B1[:, 0] == 0, 0] for s in range(14)]
    starts = np.concatenate(starts)
    assert len(starts) == len(set(starts)) > 60


def test_a_mixture_does_not_depend_on_the_process_that_makes_its_rows():
    batches = mixed("span_corruption", "ul2", "prefix_lm", objective_rates=(1, 2, 0, 0, 0, 1), phase_boundaries=(2,),
                    cross_document_attention=False, architecture="encoder_decoder", batch_size=64)  # fmt: skip
    for step in (1, 2):
        whole = batches.at(step)
        for processes in (2, 4):
            size = 64 // processes
            parts = [batches.at(step, np.arange(size * p, size * p + size)) for p in range(processes)]
            assert all(x is not None or y is None for x, y in zip(parts[0], whole, strict=True))
            together = [None if x[0] is None else np.concatenate(x) for x in zip(*parts, strict=True)]
            assert digest(together) == digest(whole)


def test_masked_pairs_can_be_mixed_with_plain_masking():
    batches = mixed("mlm", "mlm_nsp", architecture="encoder")
    batch = batches.at(0)
    which = batch.component_B1[:, 0]
    pairs = np.array([batches.components[c].denoiser.objective == "mlm_nsp" for c in which])
    assert ((batch.follows_B1[:, 0] >= 0) == pairs).all() and (batch.token_types_BS[~pairs] == 0).all()
    assert (batch.encoder_segments_BS[~pairs] == 1).all() and batch.decoder_BL is None


# ---- Held-out rows ----


def test_each_heldout_row_occurs_once_and_padding_rows_have_weight_0():
    batches = causal((1001, 101), heldout=True)  # 100 + 10 windows in 14 batches of 8
    assert batches.num_batches == 14
    every = [batches.at(step) for step in range(14)]
    real = np.concatenate([batch.weights_BL.sum(1) > 0 for batch in every])
    assert real.sum() == 110 and real[:110].all()
    starts = np.concatenate([batch.decoder_BL[:, 0] for batch in every])[real]
    for source, wanted in ((0, range(0, 1000, 10)), (1, range(100_000, 100_100, 10))):
        np.testing.assert_array_equal(starts[starts // 100_000 == source], wanted)


def test_the_first_heldout_rows_have_every_source_at_its_share():
    batches = causal((1001, 101), heldout=True)
    sources = np.concatenate([batches.at(step).decoder_BL[:, 0] // 100_000 for step in range(13)])
    for some in range(22, 104):
        assert abs((sources[:some] == 1).sum() - some / 11) <= 1


def test_heldout_masks_are_not_those_of_training_rows():
    config = small()
    length = denoisers(config)[0].window.length
    train, heldout = (Batches(config, VOCABULARY, [OffsetStream(length)], heldout=heldout) for heldout in (False, True))
    masked = [np.isin(batches.at(0).encoder_BS[0], VOCABULARY.sentinels) for batches in (train, heldout)]
    assert (masked[0] != masked[1]).any()


# ---- Shapes, and what is refused ----


@pytest.mark.parametrize("cross_document", [True, False])
@pytest.mark.parametrize(
    "objective, architecture",
    [
        ("span_corruption", "encoder_decoder"),
        ("prefix_lm", "encoder_decoder"),
        ("prefix_lm", "decoder"),
        ("causal_lm", "decoder"),
        ("span_corruption", "decoder"),
        ("causal_lm", "encoder_decoder"),
        ("mlm", "encoder"),
        ("mlm_nsp", "encoder"),
        (("mlm", "mlm_nsp"), "encoder"),
        (("span_corruption", "causal_lm"), "decoder"),
        (("span_corruption", "prefix_lm", "causal_lm"), "encoder_decoder"),
    ],
)
def test_spec_has_the_shapes_and_dtypes_of_real_batches_without_data(objective, architecture, cross_document):
    config = small(
        data={"objective": objective, "cross_document_attention": cross_document, "source": ("text:/nowhere/*.txt",)},
        model={"architecture": architecture},
    )

    def describe(batch):
        return [None if x is None else (x.shape, x.dtype) for x in batch]

    for heldout in (False, True):
        real = Batches(config, vocabulary_of(config), [OffsetStream(400, first=3)], heldout=heldout).at(0)
        assert describe(pipeline.spec(config)) == describe(real)


def test_spec_of_a_large_batch_takes_no_memory():
    batch = pipeline.spec(small(data={"batch_size": 2**24}))
    assert batch.encoder_BS.shape == (2**24, 32) and batch.encoder_BS.strides[0] == 0


def test_a_source_smaller_than_one_window_is_refused():
    assert causal(11).at(0).decoder_BL.shape == (8, 10)
    for heldout, split in ((False, "training"), (True, "held-out")):
        with pytest.raises(
            DataError, match=f"data.source=text:0 has 10 tokens of {split} text, less than one window of 11"
        ):
            causal(10, heldout=heldout)


def test_pairs_of_one_document_are_refused():
    config = small(model={"architecture": "encoder"}, data={"objective": "mlm_nsp", "source": ("text:0",)})
    for heldout, split in ((False, "training"), (True, "held-out")):
        with pytest.raises(DataError, match=f"data.source=text:0 has one {split} document, but pairs need another"):
            Batches(config, vocabulary_of(config), [OffsetStream(13)], heldout=heldout)


def test_too_few_targets_or_sentinels_are_refused():
    with pytest.raises(ConfigError, match=r"data.targets_length=5 must be at least \d+ .* use \d+"):
        pipeline.spec(small(data={"targets_length": 5}))
    with pytest.raises(ConfigError, match="tokenizer.num_sentinels=1 must be at least 2"):
        pipeline.spec(small(tokenizer={"num_sentinels": 1}))
