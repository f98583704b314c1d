"""Distillation: the divergence in float64, the loss on any mesh and in parts; test_teacher.py has whole runs."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_batch, small
from model_variants import drawn_params

from t5like import tree
from t5like.model.transformer import Transformer
from t5like.optim import distillation, step, train_state
from t5like.sharding import auto, placement
from t5like.sharding import mesh as meshes
from t5like.types import MASKED, Taught

DISTILL = {"teacher": "run", "weight": 0.3, "temperature": 2.0, "top_k": 7}


def kl_64(logits_V: np.ndarray, teacher_V: np.ndarray, temperature: float, top_k: int) -> float:
    """KL(teacher || model) of one position, token by token; of the most likely ones and of the rest as one token."""
    softmax = lambda x: np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    p, q = softmax(np.float64(teacher_V) / temperature), softmax(np.float64(logits_V) / temperature)
    order = np.argsort(-p)
    if top_k:
        p, q = (np.append(x[order[:top_k]], x[order[top_k:]].sum()) for x in (p, q))
    return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (2.5, 0), (2.5, 3), (0.5, 1), (1.0, 99)])
def test_divergence_and_its_gradient_are_those_of_float64(rng, temperature, top_k):
    logits, teacher = rng.normal(size=(2, 2, 3, 11)).astype(np.float32) * 3
    for values in (logits, teacher):
        values[..., 10] = MASKED  # padding of the vocabulary
    of = partial(distillation.divergence, temperature=temperature, top_k=top_k)

    @jax.jit
    def with_gradient(logits, teacher):
        found, pull = jax.vjp(lambda x: of(x, teacher), logits)
        return found, pull(jnp.ones_like(found))[0]

    exact = lambda logits_V, teacher_V: kl_64(logits_V, teacher_V, temperature, top_k if top_k < 11 else 0)
    found, gradient = map(np.asarray, with_gradient(logits, teacher))
    for place in np.ndindex(2, 3):
        expected = exact(logits[place], teacher[place])
        np.testing.assert_allclose(found[place], expected, rtol=1e-5, atol=1e-6)
        for token in range(10):
            unit = np.eye(11)[token] * 1e-5
            slope = (exact(logits[place] + unit, teacher[place]) - exact(logits[place] - unit, teacher[place])) / 2e-5
            np.testing.assert_allclose(gradient[place][token], slope, rtol=1e-4, atol=1e-6)
    assert np.all(np.abs(with_gradient(teacher, teacher)[0]) < 1e-6)


def pair(devices=1, **train):
    """Configs, parameters and rows of a student and its teacher of another size, with other padding rows, on a mesh."""
    mesh_of = {} if devices == 1 else {"mesh": {"fsdp": 2, "tensor": 2, "data": 2}}
    model = {"architecture": "decoder", "num_layers": 1, "vocab_multiple": 4}
    config = small(model=model, data={"objective": "prefix_lm"}, distill=DISTILL, train=train, **mesh_of)
    mesh = meshes.make_mesh(config, jax.devices()[:devices])
    config = auto.resolve_auto(config, mesh)
    teacher = dataclasses.replace(config, model=dataclasses.replace(config.model, model_dim=16, vocab_multiple=128))
    batch = random_batch(config)
    abstract = [train_state.abstract_state(each, batch, mesh) for each in (config, teacher)]
    rng = np.random.default_rng(1)
    draw = lambda leaf: jax.device_put(rng.normal(size=leaf.shape).astype(np.float32) / 2, leaf.sharding)
    params = [jax.tree.map(draw, each.params) for each in abstract]
    rows = placement.to_global(batch, mesh, config.data.batch_size)
    return config, teacher, params, rows, mesh


def gradient_of(devices=1, **train):
    config, teacher, (params, taught), rows, mesh = pair(devices, **train)
    gradient = jax.jit(step.make_gradient(config, distillation.distilled_loss(teacher)))
    with jax.set_mesh(mesh):
        return jax.device_get(gradient(params, Taught(rows, taught), np.int32(0)))


def test_the_loss_mixes_data_and_teacher_and_is_the_same_in_parts_on_a_mesh():
    config, teacher, (params, taught), rows, _ = pair()
    loss_fn = distillation.distilled_loss(teacher)

    @jax.jit
    def losses(params, taught):
        logits = [
            Transformer(each).apply({"params": of}, rows)[..., :500]
            for each, of in ((config, params), (teacher, taught))
        ]
        return logits, loss_fn(config, params, rows, None, taught), loss_fn(config, params, rows, None)

    (logits, soft), loss, data = jax.device_get(losses(params, taught))
    weights = np.asarray(rows.weights_BL)
    kl = sum(kl_64(logits[place], soft[place], 2.0, 7) * weights[place] for place in np.ndindex(*weights.shape))
    np.testing.assert_allclose(loss.metrics["distill_kl"].total, kl, rtol=1e-4)
    np.testing.assert_allclose(loss.objective, 0.7 * data.objective + 0.3 * 4 * kl, rtol=1e-4)
    whole, metrics = gradient_of()
    np.testing.assert_allclose(metrics["distill_kl"].total, kl, rtol=1e-4)
    parts, also = gradient_of(8, loss_chunk=5, microbatches=2)
    for name in ("distill_kl", "loss"):
        np.testing.assert_allclose(also[name].total, metrics[name].total, rtol=1e-5)
    for name, leaf in tree.flatten(whole).items():
        np.testing.assert_allclose(tree.flatten(parts)[name], leaf, rtol=1e-3, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("objective", ["mlm_nsp", "token_classification"])
def test_an_encoder_that_is_its_own_teacher_has_no_divergence(objective):
    labels = {"labels": ("first", "second", "third")} if objective == "token_classification" else {}
    config = small(
        model={"architecture": "encoder", "num_layers": 1}, data={"objective": objective, **labels}, distill=DISTILL
    )
    batch = random_batch(small(model={"architecture": "encoder"}) if labels else config)
    if labels:
        batch = batch._replace(targets_BL=batch.targets_BL % 3)
    params = drawn_params(config, batch)
    other = jax.tree.map(lambda leaf: leaf * 2, params)
    loss_of = jax.jit(lambda taught: distillation.distilled_loss(config)(config, params, batch, None, taught).metrics)
    same, different = loss_of(params), loss_of(other)
    assert abs(same["distill_kl"].total) < 1e-4 < 1e-2 < different["distill_kl"].total
    assert same["loss"] == different["loss"] and same["distill_kl"].weight == same["loss"].weight
