"""Stacks of layers: scanned, unrolled, rematerialized, decoded with a cache, with other kernels."""

import functools

import jax
import numpy as np
import pytest
from conftest import random_batch
from model_variants import decoded_by_steps, loss_and_gradients, params_of, with_model

from t5like.config.schema import Config
from t5like.model.transformer import Transformer
from t5like.optim import step


@functools.cache
def reference(config: Config):
    """A batch, parameters, and the loss with its gradients, once for all changes."""
    batch, params = random_batch(config), params_of(config)
    return batch, params, loss_and_gradients(config, params, batch)


@pytest.mark.parametrize(
    "variant, change",
    [
        ("t5", {"remat": "full"}),
        ("t5", {"remat": "qk"}),
        ("umt5", {"layers": "scan", "remat": "dots"}),
        ("llama", {"layers": "scan", "remat": "qk"}),
        ("modernbert", {"layers": "scan"}),
        ("t5", {"kernels": "cpu"}),
        ("llama", {"kernels": "cpu"}),
        ("bert", {"kernels": "cpu"}),
        ("pattern", {"layers": "scan", "remat": "dots"}),
        ("t5_pattern", {"layers": "scan", "remat": "full"}),
    ],
)
def test_scan_remat_and_kernels_change_nothing(variant, change):
    layers = 2 if change.get("layers") == "scan" else 1  # remat and kernels are the same in every layer
    layers *= 2 if variant == "modernbert" else 1  # the first layer differs from the next one of its kind
    plain = with_model(variant, num_layers=layers)
    batch, params, (a, grads) = reference(plain)
    b, other_grads = loss_and_gradients(with_model(variant, num_layers=layers, **change), params, batch)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4, rtol=1e-4), grads, other_grads)


def test_saved_queries_and_keys_are_not_recomputed():
    def matmuls(remat):
        config = with_model("t5", num_layers=1, remat=remat)
        gradients = jax.jit(jax.grad(lambda p: step.pretrain_loss(config, p, random_batch(config), None).objective))
        return gradients.lower(jax.eval_shape(lambda: params_of(config))).as_text().count("stablehlo.dot_general")

    attentions = 3  # of the encoder, of the decoder, and across
    assert matmuls("full") - matmuls("qk") == 2 * attentions


@pytest.mark.parametrize("variant", ["t5", "causal", "llama", "umt5", "windowed", "pattern", "scanned_pattern"])
def test_cached_decoding_equals_the_full_forward(variant):
    scanned = {"layers": "scan"} if variant == "scanned_pattern" else {}
    variant = variant.removeprefix("scanned_")
    config = with_model(variant, num_layers=4 if variant == "pattern" else 1, **scanned)
    batch = random_batch(config)
    full, decoded = decoded_by_steps(config, params_of(config), batch)
    np.testing.assert_allclose(decoded, full, atol=2e-5, rtol=1e-4)


def test_a_post_norm_stack_has_no_dropout_behind_its_last_norm():
    config = with_model("bert", dropout_rate=0.5)
    params, batch = params_of(config), random_batch(config)

    @jax.jit
    def hidden(key):
        return (
            Transformer(config)
            .apply({"params": params}, batch, train=True, method="hidden", rngs={"dropout": key})
            .x_BLD
        )

    one, other = hidden(jax.random.key(0)), hidden(jax.random.key(1))
    assert np.abs(one - other).max() > 0.1
    np.testing.assert_allclose(one.std(-1), 1, rtol=1e-3)
