"""The attention function against softmax in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5like.model.attention import attend
from t5like.model.kernels import cpu, plain
from t5like.model.masks import MaskSpec, causal_mask, segment_mask


def test_a_query_that_attends_to_no_key_gets_zero(rng):
    q, k, v = (jnp.asarray(rng.normal(size=(2, 1, 3, 4)), jnp.float32) for _ in range(3))
    mask = segment_mask(jnp.array([[1, 1, 2], [1, 1, 1]]), jnp.array([[1, 1, 1], [1, 1, 1]]))
    out = attend(q, k, v, mask=MaskSpec(allowed_B1LS=mask))
    assert (out[0, 0, 2] == 0).all() and (np.abs(out[1]) > 0).all()


def test_attend_equals_softmax_in_float64(rng):
    q, k, v = (rng.normal(size=(2, 4, 5, 8)), rng.normal(size=(2, 2, 7, 8)), rng.normal(size=(2, 2, 7, 8)))
    bias = rng.normal(size=(1, 4, 5, 7))
    scores = np.einsum("bnlh,bnsh->bnls", q, k.repeat(2, 1)) + bias
    scores = np.where(np.tril(np.ones((5, 7)), 2), scores, -np.inf)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    computed = attend(
        *(jnp.asarray(x, jnp.float32) for x in (q, k, v)),
        bias_1NLS=jnp.asarray(bias, jnp.float32),
        mask=MaskSpec(allowed_B1LS=causal_mask(5, 7, 2)),
    )
    np.testing.assert_allclose(computed, np.einsum("bnls,bnsh->bnlh", weights, v.repeat(2, 1)), atol=1e-5)


@pytest.mark.parametrize("softcap", [0.0, 0.5])
def test_attention_on_cpus_has_the_values_and_gradients_of_plain_attention(rng, softcap):
    length = 9
    q, k, v, out = (jnp.asarray(rng.normal(size=(3, 2, length, 4)), jnp.float32) for _ in range(4))
    bias, mask = jnp.asarray(rng.normal(size=(1, 2, length, length)), jnp.float32), causal_mask(length, length)

    @jax.jit
    def computed(q, k, v, bias):
        values, gradients = jax.vjp(lambda *inputs: cpu.attend(*inputs, mask, softcap), q, k, v, bias)
        others, expected = jax.vjp(lambda *inputs: plain.attend(*inputs, mask, softcap), q, k, v, bias)
        return (values, *gradients(out)), (others, *expected(out))

    for ours, theirs in zip(*computed(q, k, v, bias), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6, rtol=1e-5)
