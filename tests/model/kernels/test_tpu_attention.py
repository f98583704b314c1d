"""The fused TPU kernel, in Pallas' interpreter, against plain attention; and where a train step has it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_batch, small
from model_variants import init, loss_and_gradients, with_model

from t5like.data import pipeline
from t5like.errors import ConfigError
from t5like.model import attention
from t5like.model.attention import attend
from t5like.model.kernels import tpu_attention
from t5like.model.masks import MaskSpec
from t5like.optim import step, train_state
from t5like.sharding import auto
from t5like.sharding import mesh as meshes

CASES = {  # mesh, length, heads of keys, mask, relative bias
    "packed": ({}, 160, 4, {"causal": True, "segments": True}, False),
    "relative": ({"data": 2, "fsdp": 2, "tensor": 2}, 12, 4, {}, True),
    "prefix": ({}, 160, 4, {"causal": True, "segments": True, "prefix": True, "window": 7}, False),
    "window": ({}, 672, 1, {"causal": True, "window": 100}, False),
    "symmetric_window": ({}, 300, 2, {"window": 9, "ahead": 9, "segments": True}, False),
    "symmetric_window_context": ({"context": 2, "data": 1}, 32, 2, {"window": 5, "ahead": 5}, False),
    "context": (
        {"data": 2, "tensor": 2, "context": 2},
        16,
        2,
        {"causal": True, "segments": True, "prefix": True, "window": 5},
        True,
    ),
    "long_context": ({"context": 2, "data": 1}, 1024, 2, {"causal": True, "window": 140}, False),
}


@pytest.mark.parametrize("case", CASES)
def test_the_fused_kernel_equals_plain_attention_with_gradients(rng, monkeypatch, case):
    axes, length, kv_heads, conditions, relative = CASES[case]
    monkeypatch.setattr(tpu_attention, "SCORES_PER_BLOCK", 1)  # blocks of 128 queries
    monkeypatch.setattr(tpu_attention, "MAX_UNROLLED_BLOCKS", 2)
    rows, heads = 8 if length < 500 else 1, 4 if length < 500 else 2
    kv_heads = min(heads, kv_heads)
    q, weight = (jnp.asarray(rng.normal(size=(rows, heads, length, 8)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(rows, kv_heads, length, 8)), jnp.float32) for _ in range(2))
    bias = jnp.asarray(rng.normal(size=(1, heads, length, length)), jnp.float32) if relative else None
    ids = jnp.asarray(np.sort(rng.integers(0, 4, (rows, length)))) if "segments" in conditions else None  # 0: padding
    prefix = jnp.asarray(rng.random((rows, length)) < 0.3) if "prefix" in conditions else None
    window = conditions.get("window", 0)
    mask = MaskSpec(
        conditions.get("causal", False), ids, ids, prefix, window=window, window_ahead=conditions.get("ahead", 0)
    )

    def kernel(q, k, v, bias):
        bias = None if bias is None else tpu_attention.bias_per_batch_shard(bias)
        out = tpu_attention.attend(q, k, v, bias, mask, interpret=True)
        return (out * weight).sum()

    def plain(q, k, v, bias):
        return (attend(q, k, v, bias_1NLS=bias, mask=mask) * weight).sum()

    arguments = (0, 1, 2, 3) if relative else (0, 1, 2)
    expected = jax.jit(jax.value_and_grad(plain, arguments))(q, k, v, bias)
    mesh = meshes.make_mesh(small(mesh=axes), jax.devices()[: math.prod(axes.values())])
    with jax.set_mesh(mesh):
        computed = jax.jit(jax.value_and_grad(kernel, arguments))(q, k, v, bias)
    for actual, desired in zip(jax.tree.leaves(computed), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual, desired, rtol=1e-5, atol=3e-5)


def test_a_step_for_tpus_has_the_kernel_in_every_attention_and_other_devices_refuse_it():
    config = small(model={"num_layers": 1, "kernels": "tpu", "layers": "scan", "dtype": "bfloat16"}, mesh={"fsdp": 8})
    with pytest.raises(ConfigError, match="kernels=auto"):
        auto.resolve_auto_for(config, "cpu")
    mesh, batch = meshes.make_mesh(config), pipeline.spec(config)
    abstract = train_state.abstract_state(config, batch, mesh)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    with jax.set_mesh(mesh):
        lowered = step.jit_train_step(config, abstract).trace(abstract, shapes).lower(lowering_platforms=("tpu",))
    text = lowered.as_text()
    assert (text.count('kernel_name = "attention_forward"'), text.count('kernel_name = "attention_backward"')) == (3, 3)
    # The gradients of gated MLPs' inputs; queries, keys and values of small heads, forward and backward.
    assert text.count("optimization_barrier") == 2 * 2 + 3 * 3 * 2


@pytest.mark.parametrize("variant", ["t5", "umt5", "pattern"])
def test_a_model_with_the_fused_kernel_equals_the_plain_model(monkeypatch, variant):
    monkeypatch.setattr(attention.tpu_attention, "attend", functools.partial(tpu_attention.attend, interpret=True))
    plain, fused = (with_model(variant, layers="scan", kernels=kernels) for kernels in ("plain", "tpu"))
    params, batch = init(plain), random_batch(plain)
    expected, computed = (loss_and_gradients(config, params, batch) for config in (plain, fused))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), computed, expected)
