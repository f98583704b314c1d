"""Compares an attention kernel, in Pallas' interpreter if it is fused, with plain attention."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from conftest import small

from t5like.model.attention import attend
from t5like.model.masks import MaskSpec
from t5like.sharding import mesh as meshes


def compare(
    rng,
    fused,
    *,
    mesh=None,
    rows=2,
    queries=40,
    keys=0,
    heads=2,
    kv_heads=2,
    head_dim=8,
    causal=False,
    segments=False,
    prefix=False,
    window=0,
    ahead=0,
    relative=False,
    softcap=0.0,
    dtype="float32",
):
    """Compare outputs, and gradients of q, k, v and the bias, on a mesh, for masks and sizes of any kind.

    Args:
        rng: of the values.
        fused: computes attention of q, k, v, the bias by distance, float32 [N, L + S - 1] or None, and a mask.
        mesh: sizes of its axes.
        rows: B, and so on; keys: 0 is as many as queries.
    """
    keys = keys or queries
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    q, weight = (array(rows, heads, queries, head_dim) for _ in range(2))
    k, v = (array(rows, kv_heads, keys, head_dim) for _ in range(2))
    bias = jnp.asarray(rng.normal(size=(heads, queries + keys - 1)), jnp.float32) if relative else None
    ids = [jnp.asarray(np.sort(rng.integers(0, 4, (rows, size)))) for size in (queries, keys)]  # 0: padding
    ids = ids[:1] * 2 if queries == keys else ids
    of_prefix = jnp.asarray(rng.random((rows, keys)) < 0.3) if prefix else None
    mask = MaskSpec(causal, *(ids if segments else (None, None)), of_prefix, window=window, window_ahead=ahead)

    def total(attend, q, k, v, bias):
        return (attend(q, k, v, bias).astype(jnp.float32) * weight).sum()

    def plain(q, k, v, bias):
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        every_key = MaskSpec(allowed_B1LS=mask.build(queries, keys))
        bias = None if bias is None else bias_array(bias, queries, keys)
        return attend(q, k, v, bias_1NLS=bias, mask=every_key, softcap=softcap)

    arguments = (0, 1, 2, 3) if relative else (0, 1, 2)
    gradients = lambda attend: jax.jit(jax.value_and_grad(lambda *x: total(attend, *x), arguments))(q, k, v, bias)
    expected = gradients(plain)
    axes = {"data": 1} | (mesh or {})
    with jax.set_mesh(meshes.make_mesh(small(mesh=axes), jax.devices()[: math.prod(axes.values())])):
        computed = gradients(lambda q, k, v, bias: fused(q, k, v, bias, mask))
    tolerance = {"rtol": 1e-5, "atol": 3e-5} if dtype == "float32" else {"rtol": 0.02, "atol": 0.05}
    for actual, desired in zip(jax.tree.leaves(computed), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual.astype(jnp.float32), desired.astype(jnp.float32), **tolerance)


def bias_array(bias_NW, queries, keys):
    """The bias by distance, from -(L - 1) to S - 1, as an array [1, N, L, S]."""
    return bias_NW[:, np.arange(keys) - np.arange(queries)[:, None] + queries - 1][None]
