"""Low-rank adapters: their gradient, what a step changes, kernels of int8, adapters merged into kernels."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import begun, random_batch, small

from t5like import tree
from t5like.config.lora_schema import LoRAConfig
from t5like.config.schema import MeshConfig
from t5like.errors import ConfigError
from t5like.model.adapters import dequantized, quantized
from t5like.model.transformer import Transformer
from t5like.optim import lora, step, train_state
from t5like.sharding import auto, placement
from t5like.sharding import mesh as meshes

QUERY = "decoder/layers/attention/query"


def small_lora(**fields):
    """A decoder of one layer with adapters of rank 2."""
    model = {"architecture": "decoder", "num_layers": 1, "positions": "rotary", "num_kv_heads": 2}
    return small(model=model, lora={"rank": 2, "alpha": 3.0, **fields})


def started(config, devices=1):
    """Resolved config, mesh, shapes and state, whose B are not 0; and a batch on the host."""
    mesh = meshes.make_mesh(config, jax.devices()[:devices])
    config, batch = auto.resolve_auto(config, mesh), random_batch(config)
    abstract = train_state.abstract_state(config, batch, mesh)
    state = begun(config, batch, abstract)
    moved = lambda name, x: (
        x if not name.endswith("/b") else jax.device_put(np.full(x.shape, 0.05, x.dtype), x.sharding)
    )
    return config, mesh, abstract, state._replace(params=tree.map_named(moved, state.params)), batch


def test_adapters_have_the_gradient_of_the_kernels_that_they_change():
    config, _, _, state, batch = started(small_lora())
    plain = dataclasses.replace(config, lora=LoRAConfig())
    whole = jax.jit(lora.merge)(train_state.model_params(state))
    gradient, of_kernels = (jax.jit(step.make_gradient(each)) for each in (config, plain))
    found, metrics = gradient(state.params, batch, state.step, state.base)
    kernels, plain_metrics = of_kernels(whole, batch, state.step)
    assert float(metrics["loss"].total) == pytest.approx(float(plain_metrics["loss"].total), rel=1e-6)
    assert {name.split("/")[-2] for name in tree.flatten(found)} == {"lora"}
    # d/dA of W + s A B is s G B', d/dB is s A' G, with the gradient G of the kernel.
    found, kernels, params = jax.device_get((found, kernels, state.params))
    adapters, kernels = lora.leaves(params), tree.flatten(kernels)
    for name, each in lora.leaves(found).items():
        kernel = kernels[name.removesuffix("lora") + "kernel"]
        a, b, scale = adapters[name].a, adapters[name].b, 3.0 / 2
        np.testing.assert_allclose(each.a, scale * kernel @ b.swapaxes(1, 2), rtol=2e-4, atol=1e-7, err_msg=name)
        np.testing.assert_allclose(each.b, scale * a.swapaxes(1, 2) @ kernel, rtol=2e-4, atol=1e-7, err_msg=name)


def test_a_step_changes_adapters_only_and_the_same_on_a_mesh():
    after = []
    for devices, axes in ((1, {}), (4, {"fsdp": 2, "tensor": 2, "data": 1})):
        config = dataclasses.replace(small_lora(base_dtype="int8"), mesh=MeshConfig(**axes))
        config, mesh, abstract, state, batch = started(config, devices)
        before = jax.device_get(state)
        with jax.set_mesh(mesh):
            rows = placement.to_global(batch, mesh, config.data.batch_size)
            state, _ = step.jit_train_step(config, abstract)(state, rows)
        after.append(jax.device_get(state))
        jax.tree.map(np.testing.assert_array_equal, after[-1].base, before.base)
        assert all(
            np.any(x != y) for x, y in zip(*map(jax.tree.leaves, (after[-1].params, before.params)), strict=True)
        )
        saved = {name.rpartition("/")[2] for name in tree.flatten(state.opt_state)}
        assert saved == {"count", "a", "b"}
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-5), after[1].params, after[0].params)


def test_int8_kernels_are_within_half_a_level_and_merged_models_compute_the_same(rng):
    kernel = rng.normal(size=(2, 64, 48)).astype(np.float32)
    values, factors = quantized(jnp.asarray(kernel))
    assert values.dtype == jnp.int8 and factors.shape == (2, 48)
    assert np.all(np.abs(dequantized(values, factors) - kernel) <= np.asarray(factors)[:, None] / 2 * 1.0001)
    config, _, _, state, batch = started(small_lora(base_dtype="int8", targets=(f"{QUERY}/kernel",)))
    params = train_state.model_params(state)
    assert params["decoder"]["layers"]["attention"]["key"]["kernel"].dtype == jnp.int8
    assert params["embedding"].dtype == jnp.bfloat16 and list(lora.leaves(state.params)) == [f"{QUERY}/lora"]
    logits = lambda params: Transformer(config).apply({"params": params}, batch)
    adapted, merged = (np.asarray(jax.jit(logits)(each)) for each in (params, jax.jit(lora.merge)(params)))
    np.testing.assert_allclose(adapted, merged, atol=2e-5 * np.abs(merged).max())


def test_targets_that_are_no_kernel_of_a_layer_or_are_trained_whole_are_refused():
    config = small_lora(targets=("embedding",))
    with pytest.raises(
        ConfigError, match="lora.targets='embedding' matches no parameter; there are decoder/layers/att"
    ):
        train_state.abstract_state(config, random_batch(config), meshes.make_mesh(config, jax.devices()[:1]))
    config = small_lora(targets=(".*query/kernel",), trained=(".*/kernel",))
    with pytest.raises(ConfigError, match="contains all kernels of lora.targets=.* there is no adapter; leave"):
        train_state.parameter_axes(config, random_batch(config))
