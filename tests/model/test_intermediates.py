"""Values inside of the layers, by name."""

import jax
import numpy as np
import pytest
from conftest import random_batch
from model_variants import params_of, values_of, with_model

from t5like.errors import ConfigError
from t5like.model.intermediates import INTERMEDIATES
from t5like.model.layer_values import compute_intermediates
from t5like.model.transformer import Transformer


def rms_norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


@pytest.mark.parametrize("variant", ["t5", "pattern", "umt5"])
def test_scanned_and_unrolled_layers_have_the_same_intermediates(variant):
    config = with_model(variant, num_layers=4)
    params, batch = params_of(config), random_batch(config)
    unrolled, scanned = (
        values_of(with_model(variant, num_layers=4, layers=layers), params, batch, *INTERMEDIATES)
        for layers in ("unroll", "scan")
    )
    stacks = ("encoder", "decoder") if config.model.has_encoder else ("decoder",)
    has = lambda stack, name: not name.startswith("cross") or (stack == "decoder" and config.model.has_encoder)
    names = [f"{stack}/{name}" for stack in stacks for name in INTERMEDIATES if has(stack, name)]
    assert sorted(unrolled) == sorted(scanned) == sorted(names)
    for name, values in unrolled.items():
        assert len(values) == 4
        np.testing.assert_allclose(scanned[name], values, rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_last_residual_and_the_final_norm_are_the_output():
    config = with_model("t5", layers="scan", remat="full")
    params, batch = params_of(config), random_batch(config)
    hidden = jax.jit(lambda: Transformer(config).apply({"params": params}, batch, method="hidden").x_BLD)()
    residual = values_of(config, params, batch, "residual")["decoder/residual"]
    expected = rms_norm(np.asarray(residual[-1]), np.asarray(params["decoder"]["final_norm"]["scale"]))
    np.testing.assert_allclose(hidden, expected, rtol=1e-4, atol=1e-5)


def test_attention_weights_sum_to_one_and_reproduce_the_layer():
    config = with_model("pattern", num_layers=2)
    params, batch = params_of(config), random_batch(config)
    values = values_of(config, params, batch, "residual", "attention_weights", "mlp_input")
    residual, weights, mlp_input = (
        np.asarray(values[f"decoder/{name}"]) for name in ("residual", "attention_weights", "mlp_input")
    )
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    layer = jax.tree.map(lambda leaf: np.asarray(leaf[1]), params["decoder"]["layers"])
    v = rms_norm(residual[0], layer["attention_norm"]["scale"]) @ layer["attention"]["value"]["kernel"]
    v = v.reshape(*v.shape[:2], config.model.kv_heads, -1).repeat(2, 2)
    out = np.einsum("bnls,bsnh->blnh", weights[1], v)
    x = residual[0] + out.reshape(*out.shape[:2], -1) @ layer["attention"]["out"]["kernel"]
    np.testing.assert_allclose(mlp_input[1], rms_norm(x, layer["mlp_norm"]["scale"]), rtol=1e-4, atol=1e-5)


def test_padding_attends_to_nothing():
    config = with_model("encoder")
    batch = random_batch(config)
    segments = np.repeat([[1, 0]], 16, axis=1).repeat(len(batch.encoder_BS), 0)
    batch = batch._replace(encoder_segments_BS=segments)
    weights = values_of(config, params_of(config), batch, "attention_weights")["encoder/attention_weights"]
    np.testing.assert_allclose(weights.sum(-1)[..., :16], 1, rtol=1e-5)
    assert (weights[..., 16:] == 0).all()


def test_only_what_is_requested_is_computed():
    config = with_model("t5", layers="scan")
    params, batch = params_of(config), random_batch(config)

    def exponentials(*names: str) -> int:
        apply = lambda params: Transformer(config).apply({"params": params}, batch, method="hidden", mutable=[*names])
        return str(jax.make_jaxpr(apply)(params)).count(" exp ")

    assert exponentials("residual", "mlp_input") == exponentials()
    assert exponentials("attention_weights") == exponentials() + 2


def test_an_unknown_name_is_refused():
    config = with_model("t5")
    with pytest.raises(ConfigError, match="intermediates=logits must be one of residual, attention_weights"):
        compute_intermediates(config, {}, random_batch(config), ["logits"])
