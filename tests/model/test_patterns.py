"""Stacks whose layers differ by a repeated pattern: windows, rotary bases, activations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_batch, small
from model_variants import init, logits, loss_and_gradients, params_of, values_of, with_model

from t5like import tree
from t5like.config.schema import Config
from t5like.errors import ConfigError
from t5like.model.stack import layer_configs
from t5like.optim import step


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_a_pattern_of_equal_layers_is_no_pattern(layers):
    plain = with_model("windowed", layers=layers)
    pattern = with_model("windowed", layers=layers, layer_pattern=("local", "local"), mlp_pattern=(plain.model.mlp,))
    params, batch = init(plain), random_batch(plain)
    assert jax.tree.map(jnp.shape, init(pattern)) == jax.tree.map(jnp.shape, params)
    jax.tree.map(np.testing.assert_array_equal, init(pattern), params)
    np.testing.assert_array_equal(logits(pattern, params, batch), logits(plain, params, batch))
    expected, computed = (loss_and_gradients(config, params, batch) for config in (plain, pattern))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), computed, expected)


def float64_logits(config: Config, params, ids_BL: np.ndarray) -> np.ndarray:
    """A decoder-only model with rotary positions, RMS norm and gated MLPs, layer by layer in float64."""
    leaves = {name: np.asarray(leaf, np.float64) for name, leaf in tree.flatten(params).items()}
    model, length = config.model, ids_BL.shape[1]
    norm = lambda x, scale: x / np.sqrt((x**2).mean(-1, keepdims=True) + model.norm_epsilon) * scale
    heads = lambda x: x.reshape(*x.shape[:2], -1, model.head_dim).transpose(0, 2, 1, 3)
    silu = lambda x: x / (1 + np.exp(-x))
    gelu = lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def rotate(x, base):
        half = model.head_dim // 2
        angle = np.arange(length)[:, None] * base ** (-np.arange(half) / half)
        left, right = x[..., :half], x[..., half:]
        return np.concatenate(
            [left * np.cos(angle) - right * np.sin(angle), right * np.cos(angle) + left * np.sin(angle)], -1
        )

    x, distance = leaves["embedding"][ids_BL], np.arange(length)[:, None] - np.arange(length)
    for y in range(model.num_layers):
        leaf = lambda name, y=y: leaves[f"decoder/layers/{name}"][y]
        local = y % 2 == 0
        h = norm(x, leaf("attention_norm/scale"))
        q, k, v = (heads(h @ leaf(f"attention/{name}/kernel")) for name in ("query", "key", "value"))
        q, k = (rotate(z, model.rotary.local_base if local else model.rotary.base) for z in (q, k))
        k, v = (z.repeat(model.num_heads // model.kv_heads, 1) for z in (k, v))
        scores = np.einsum("bnlh,bnsh->bnls", q, k) * model.head_dim**-0.5
        allowed = (distance >= 0) & (distance < model.attention_window if local else True)
        weights = np.where(allowed, np.exp(scores - scores.max(-1, keepdims=True)), 0)
        out = np.einsum("bnls,bnsh->blnh", weights / weights.sum(-1, keepdims=True), v)
        x = x + out.reshape(*out.shape[:2], -1) @ leaf("attention/out/kernel")
        h, activate = norm(x, leaf("mlp_norm/scale")), silu if local else gelu
        x = x + (activate(h @ leaf("mlp/gate/kernel")) * (h @ leaf("mlp/in/kernel"))) @ leaf("mlp/out/kernel")
    return norm(x, leaves["decoder/final_norm/scale"]) @ leaves["head"]


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_local_and_global_layers_equal_a_float64_reference(layers):
    config = with_model("pattern", num_layers=4, layers=layers)
    params, batch = params_of(config), random_batch(config)
    expected = float64_logits(config, params, np.asarray(batch.decoder_BL))[..., : config.tokenizer.vocab_size]
    computed = logits(config, params, batch)[..., : config.tokenizer.vocab_size]
    np.testing.assert_allclose(computed, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_each_layer_attends_to_its_own_window(layers):
    config = with_model("t5_pattern", layers=layers)
    weights = values_of(config, params_of(config), random_batch(config), "attention_weights")
    for stack, causal in (("encoder", False), ("decoder", True)):
        local, full = np.asarray(weights[f"{stack}/attention_weights"]).min((1, 2)) > 0
        distance = np.arange(len(local))[:, None] - np.arange(len(local))
        np.testing.assert_array_equal(local, (distance < 4) & (distance >= 0 if causal else distance > -4))
        np.testing.assert_array_equal(full, distance >= 0 if causal else np.ones_like(full))


def test_dropout_and_scan_work_with_a_pattern_and_differ_by_layer():
    config = with_model("pattern", num_layers=4, layers="scan", dropout_rate=0.3)
    unrolled = with_model("pattern", num_layers=4, dropout_rate=0.3)
    params, batch, key = params_of(config), random_batch(config), jax.random.key(0)
    loss = lambda config: jax.jit(lambda p: step.pretrain_loss(config, p, batch, key).objective)(params)
    np.testing.assert_allclose(loss(config), loss(unrolled), rtol=1e-6)


def test_layer_configs_repeat_the_shorter_pattern():
    config = small(
        model={
            "num_layers": 6,
            "attention_window": 8,
            "layer_pattern": ("local", "local", "global"),
            "mlp_pattern": ("gated_gelu", "gated_silu"),
        }
    ).model
    assert config.pattern_length == 6
    assert [each.attention_window for each in layer_configs(config)] == [8, 8, 0] * 2
    assert [each.mlp for each in layer_configs(config)] == ["gated_gelu", "gated_silu"] * 3
    assert layer_configs(small().model) == (small().model,)


@pytest.mark.parametrize(
    "model, complaint",
    [
        ({"layer_pattern": ("local", "global")}, "model.attention_window=0 must be at least 1 for the local layers"),
        (
            {"layer_pattern": ("local", "global", "global"), "attention_window": 4},
            "model.num_layers=2 must be a multiple of 3, the length of the layers' pattern; use 3",
        ),
        (
            {"layer_pattern": ("local", "global"), "attention_window": 4, "num_decoder_layers": 3},
            "model.num_decoder_layers=3 must be a multiple of 2",
        ),
        (
            {"layer_pattern": ("global",), "attention_window": 4},
            "model.attention_window=4 needs a local layer in model.layer_pattern; use 0",
        ),
        ({"rotary": {"local_base": 100.0}}, "model.rotary.local_base=100.0 must be at least 1 and needs"),
        (
            {"first_attention_norm": False, "norm_position": "post"},
            "model.first_attention_norm=False needs model.norm_position=pre, not post; use true",
        ),
        ({"mlp_pattern": ("gated_gelu", "relu")}, "'relu') must be gated in every layer"),
    ],
)
def test_patterns_that_do_not_fit_are_refused_in_one_line(model, complaint):
    with pytest.raises(ConfigError) as error:
        small(model=model)
    assert complaint in str(error.value) and "\n" not in str(error.value)
