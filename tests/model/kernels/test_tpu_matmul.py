"""Matmuls for TPU: values, gradients, and when backward passes are serialized."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small

from t5like.model.kernels import tpu_matmul
from t5like.sharding import logical_axes
from t5like.sharding import mesh as meshes


def matmul_loss(kernels, x):
    return sum(jnp.square(y).sum() for y in tpu_matmul.matmuls((x, x), kernels))


def matmul_operands():
    keys = jax.random.split(jax.random.key(0), 3)
    kernels = tuple(jax.random.normal(key, (8, size)) for key, size in zip(keys, (6, 4), strict=False))
    return kernels, jax.random.normal(keys[2], (8, 5, 8))


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"data": 2, "fsdp": 4, "slices": 2}])
def test_serialized_backward_matmuls_have_the_values_and_gradients_of_plain_ones(monkeypatch, axes):
    plain = jax.value_and_grad(matmul_loss, argnums=(0, 1))(*matmul_operands())
    monkeypatch.setattr(tpu_matmul, "_serializes_backward", lambda: True)
    mesh = meshes.make_mesh(small(mesh={"data": 1} | axes))
    with jax.set_mesh(mesh):
        put = lambda x, *names: jax.device_put(x, jax.sharding.NamedSharding(mesh, logical_axes.spec(names)))
        kernels, x = matmul_operands()
        operands = tuple(put(kernel, "embed", "mlp") for kernel in kernels), put(x, "batch", None, None)
        serialized = jax.jit(jax.value_and_grad(matmul_loss, argnums=(0, 1)))(*operands)
        assert "optimization_barrier" in str(jax.make_jaxpr(jax.grad(matmul_loss))(*matmul_operands()))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4), serialized, plain)


@pytest.mark.parametrize(
    "chip, axes, serialized",
    [
        ("TPU v5 lite", (1, 8, 1, 1), True),
        ("TPU v5 lite", (1, 4, 2, 1), False),
        ("TPU v5 lite", (2, 4, 1, 1), True),
        ("TPU v5", (1, 8, 1, 1), False),
        ("TPU v5 lite", (1, 1, 1, 1), False),
    ],
)
def test_backward_matmuls_are_serialized_on_v5e_with_split_rows_and_unsplit_kernels(
    monkeypatch, chip, axes, serialized
):
    monkeypatch.setattr(tpu_matmul, "device_kind", lambda: chip)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(axes, meshes.AXES)):
        assert tpu_matmul._serializes_backward() is serialized


@pytest.mark.parametrize("serialized", [False, True])
def test_matmuls_that_remat_dots_saves_are_not_recomputed(monkeypatch, serialized):
    monkeypatch.setattr(tpu_matmul, "_serializes_backward", lambda: serialized)
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    layer = jax.checkpoint(
        lambda x, kernels: sum(jnp.tanh(y) for y in tpu_matmul.matmuls((x, x), kernels)), policy=policy
    )

    def loss(kernels, x):
        return jax.lax.scan(lambda x, each: (layer(x, each), None), x, kernels)[0].sum()

    with jax.set_mesh(meshes.make_mesh(small())):
        program = jax.make_jaxpr(jax.grad(loss))(2 * (jnp.ones((3, 8, 8)),), jnp.ones((8, 5, 8)))
    assert str(program).count("dot_general") == 2 + 4  # forward; of kernels and of x


def test_a_gradient_barrier_does_not_change_the_gradient(rng):
    x, weight = jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32)[:2]
    np.testing.assert_array_equal(jax.grad(lambda x: (tpu_matmul.gradient_barrier(x) * weight).sum())(x), weight)
