"""Held-out loss: each row once, independent of devices and batch sizes; baselines compared with closed forms."""

import math
import re

import jax
import numpy as np
import pytest
from conftest import small
from model_variants import drawn_params

from t5like.data.pipeline import Batches
from t5like.data.store import preparation
from t5like.data.tokenizers.vocabulary import Vocabulary
from t5like.evaluation.heldout import Evaluator, table
from t5like.optim import eval_step, train_state
from t5like.sharding import auto, placement
from t5like.sharding import mesh as meshes

ALL_BATCHES = 10**6


def evaluator_of(texts, *, devices=1, eval_batches=ALL_BATCHES, sources=("a",), mesh=(), every=False, **data):
    """An evaluator of held-out text, and random parameters on its mesh, the same on every mesh."""
    config = small(
        model={"num_layers": 1},
        tokenizer={"vocab_size": 400, "num_sentinels": 20},
        train={"eval_batches": eval_batches},
        mesh=dict(mesh),
        data={
            "source": tuple(f"text:{texts}/{name}.txt" for name in sources),
            "text_documents": "line",
            "heldout_fraction": 0.1,
            "cache_directory": str(texts / "prepared"),
            **data,
        },
    )
    mesh = meshes.make_mesh(config, jax.devices()[:devices])
    config = auto.resolve_auto(config, mesh)
    prepared = preparation.prepare(config)
    vocabulary = Vocabulary.of(prepared.tokenizer)
    heldout = Batches(config, vocabulary, [store.split("heldout") for store in prepared.stores], heldout=True)
    evaluator = Evaluator(config, mesh, heldout, prepared.tokenizer, every=every)
    batch = heldout.at(0)
    shapes = train_state.abstract_state(config, batch, mesh).params
    return evaluator, jax.tree.map(
        lambda leaf, shape: jax.device_put(leaf, shape.sharding), drawn_params(config, batch), shapes
    )


@pytest.fixture(scope="module")
def mixed(texts):
    """Of two sources and two objectives, on one device."""
    return evaluator_of(texts, **MIXED)


@pytest.fixture(scope="module")
def plain(texts):
    return evaluator_of(texts)


MIXED = {"sources": ("a", "b"), "objective": ("span_corruption", "prefix_lm"), "every": True}


def test_no_value_depends_on_devices_batch_size_or_rates(texts, mixed):
    reference, params = mixed
    values, rows = reference(params), reference.heldout.num_heldout
    assert rows % 8 and rows % 5 and reference.num_batches == math.ceil(rows / 8)  # the last batch is not full
    assert values["eval/tokens"] == sum(reference.heldout.at(i).weights_BL.sum() for i in range(reference.num_batches))
    for case in (
        {"batch_size": 5},
        {"devices": 8, "batch_size": 16, "rates": (0.9, 0.1), "objective_rates": (1, 3)},
        {"devices": 8, "mesh": {"fsdp": 2, "tensor": 2}},
    ):
        other, same_params = evaluator_of(texts, **MIXED, **case)
        assert other(same_params) == pytest.approx(values, rel=1e-5), case


def test_sources_and_objectives_have_their_own_loss_perplexity_and_bits_per_byte(mixed):
    evaluator, params = mixed
    config, values = evaluator.config, evaluator(params)
    nats_C, tokens_C, bytes_C = np.zeros(4), np.zeros(4), np.zeros(4)
    zero = eval_step.zero_metrics(config, params, evaluator.heldout.at(0))
    for index in range(evaluator.num_batches):
        batch = evaluator.heldout.at(index)
        for component in range(4):  # the loss of only its rows, and their targets' text
            rows = batch._replace(weights_BL=batch.weights_BL * (batch.component_B1 == component))
            with jax.set_mesh(evaluator.mesh):
                on_device = placement.to_global(rows, evaluator.mesh, config.data.batch_size)
                nats_C[component] += evaluator._step(params, on_device, zero)["loss"].total
            for targets, weights in zip(rows.targets_BL, rows.weights_BL, strict=True):
                text = re.sub("<extra_id_[0-9]+>", "", evaluator.tokenizer.decode(targets[weights > 0]))
                bytes_C[component] += len(text.encode())
            tokens_C[component] += rows.weights_BL.sum()
    source, objective = ("b", "prefix_lm")
    names = {f"source/{source}": [2, 3], f"objective/{objective}": [1, 3], f"component/{source}/{objective}": [3]}
    for name, components in names.items():
        nats, tokens, size = (values_C[components].sum() for values_C in (nats_C, tokens_C, bytes_C))
        assert values[f"eval/loss/{name}"] == pytest.approx(nats / tokens, rel=1e-5)
        assert values[f"eval/perplexity/{name}"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
        assert values[f"eval/bits_per_byte/{name}"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
        assert values[f"eval/tokens/{name}"] == tokens
    assert values["eval/bits_per_byte"] == pytest.approx(nats_C.sum() / math.log(2) / bytes_C.sum(), rel=1e-5)


def test_a_model_with_constant_logits_has_the_uniform_loss(plain):
    evaluator, params = plain
    constant = {**params, "head": np.zeros_like(params["head"])}
    assert evaluator(constant)["eval/loss"] == pytest.approx(math.log(400), rel=1e-6)
    assert evaluator.baselines()["baseline/uniform"] == pytest.approx(math.log(400))


def test_the_unigram_baseline_is_the_entropy_of_the_heldout_targets(plain):
    evaluator, _ = plain
    tokens = []
    for index in range(evaluator.num_batches):
        batch = evaluator.heldout.at(index)
        tokens += batch.targets_BL[batch.weights_BL > 0].tolist()
    share = np.unique(tokens, return_counts=True)[1] / len(tokens)
    assert evaluator.baselines()["baseline/unigram"] == pytest.approx(-(share * np.log(share)).sum())


def test_at_most_eval_batches_are_evaluated(texts):
    evaluator, params = evaluator_of(texts, eval_batches=1)
    weights = evaluator.heldout.at(0).weights_BL
    assert evaluator.num_batches == 1 and evaluator(params)["eval/tokens"] == weights.sum()


def test_all_sources_are_evaluated(texts):
    evaluator, params = evaluator_of(texts, sources=("a", "b"))
    both = evaluator(params)["eval/tokens"]
    per_row = int(evaluator.heldout.at(0).weights_BL[0].sum())
    assert both == evaluator.heldout.num_heldout * per_row and (evaluator.heldout.num_rows > 0).all()


def test_a_single_source_and_objective_have_their_own_values_on_request(texts):
    evaluator, params = evaluator_of(texts, every=True)
    values = evaluator(params)
    for name in ("source/a", "objective/span_corruption"):
        for measure in ("loss", "perplexity", "bits_per_byte", "tokens"):
            assert values[f"eval/{measure}/{name}"] == pytest.approx(values[f"eval/{measure}"])
    lines = table({"step": 3, **values}).splitlines()
    assert [line.split()[0] for line in lines] == ["held", "loss", "all", "source", "objective"]
    assert lines[2].split()[1:] == lines[3].split()[2:] == lines[4].split()[2:]
