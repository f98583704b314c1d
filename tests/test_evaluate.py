"""Held-out loss: every row once, the same on any devices and in any batches, next to baselines in closed form."""

import math

import jax
import numpy as np
import pytest
from conftest import begun, small

from t5like import mesh as meshes
from t5like import step
from t5like.data import corpus
from t5like.data.pipeline import Batches
from t5like.data.text import Vocabulary
from t5like.evaluate import Evaluator

EVERYTHING = 10**6


def evaluator_of(texts, *, devices=1, eval_batches=EVERYTHING, sources=("a",), mesh=(), **data):
    """An evaluator of held-out text, and a function that makes the same random parameters on its mesh."""
    config = small(
        model={"num_layers": 1},
        tokenizer={"vocab_size": 400, "num_sentinels": 20},
        train={"eval_batches": eval_batches},
        mesh=dict(mesh),
        data={
            "source": tuple(f"text:{texts}/{name}.txt" for name in sources),
            "text_documents": "line",
            "heldout_fraction": 0.1,
            "directory": str(texts / "prepared"),
            **data,
        },
    )
    mesh = meshes.make_mesh(config, jax.devices()[:devices])
    config = meshes.settle(config, mesh)
    prepared = corpus.prepare(config)
    vocabulary = Vocabulary.of(prepared.tokenizer)
    heldout = Batches(config, vocabulary, [store.split("heldout") for store in prepared.stores], heldout=True)
    evaluator = Evaluator(config, mesh, heldout, prepared.tokenizer)
    batch = heldout.at(0)
    return evaluator, begun(config, batch, step.abstract_state(config, batch, mesh)).params


def test_the_loss_does_not_depend_on_devices_or_batch_size(texts):
    reference, params = evaluator_of(texts)
    values, rows = reference(params), reference.heldout.num_heldout
    assert rows % 8 and rows % 5 and reference.num_batches == math.ceil(rows / 8)  # the last batch is not full
    target_tokens = int(reference.heldout.at(0).weights_BL[0].sum())
    assert values["eval/tokens"] == rows * target_tokens
    for case in ({"batch_size": 5}, {"devices": 8, "batch_size": 16}, {"devices": 8, "mesh": {"fsdp": 2, "tensor": 2}}):
        other, same_params = evaluator_of(texts, **case)
        assert other(same_params) == pytest.approx(values, rel=1e-5), case


def test_a_model_that_says_nothing_has_the_uniform_loss(texts):
    evaluator, params = evaluator_of(texts)
    silent = {**params, "head": np.zeros_like(params["head"])}
    assert evaluator(silent)["eval/loss"] == pytest.approx(math.log(400), rel=1e-6)
    assert evaluator.baselines()["baseline/uniform"] == pytest.approx(math.log(400))


def test_the_unigram_baseline_is_the_entropy_of_the_heldout_targets(texts):
    evaluator, _ = evaluator_of(texts)
    tokens = []
    for index in range(evaluator.num_batches):
        batch = evaluator.heldout.at(index)
        tokens += batch.targets_BL[batch.weights_BL > 0].tolist()
    share = np.unique(tokens, return_counts=True)[1] / len(tokens)
    assert evaluator.baselines()["baseline/unigram"] == pytest.approx(-(share * np.log(share)).sum())


def test_no_more_batches_are_evaluated_than_asked_for(texts):
    evaluator, params = evaluator_of(texts, eval_batches=1)
    weights = evaluator.heldout.at(0).weights_BL
    assert evaluator.num_batches == 1 and evaluator(params)["eval/tokens"] == weights.sum()


def test_all_sources_are_evaluated(texts):
    evaluator, params = evaluator_of(texts, sources=("a", "b"))
    both = evaluator(params)["eval/tokens"]
    per_row = int(evaluator.heldout.at(0).weights_BL[0].sum())
    assert both == evaluator.heldout.num_heldout * per_row and (evaluator.heldout.num_rows > 0).all()
