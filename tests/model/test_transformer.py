"""The whole model: published parameter counts, untrained losses, precision."""

import functools
import math
from pathlib import Path

import jax
import jax.extend
import jax.numpy as jnp
import pytest
from conftest import random_batch, small
from model_variants import VARIANTS, logits, mean_loss, pair_logits, params_of

from t5like import tree
from t5like.config import loader
from t5like.config.schema import Config
from t5like.data import pipeline
from t5like.metrics.flops import forward_flops
from t5like.optim import step, train_state
from t5like.sharding import auto
from t5like.sharding import mesh as meshes


def count(config: Config, *, without: tuple[str, ...] = ()) -> int:
    config = auto.resolve_auto(config, meshes.make_mesh(config, jax.devices()[:1]))
    shapes = jax.eval_shape(
        functools.partial(train_state.init_params, config), pipeline.spec(config), jax.random.key(0)
    )
    return tree.num_parameters(
        {name: leaf for name, leaf in tree.flatten(shapes).items() if not name.startswith(without)}
    )


def preset(name: str, **overrides: str) -> Config:
    path = Path(__file__).parents[2] / "configs" / f"{name}.py"
    return loader.load(path, [(key.replace("__", "."), value) for key, value in overrides.items()])


@pytest.mark.parametrize(
    "name, published",
    [
        ("t5_small", 76_961_152),
        ("t5_base", 247_577_856),
        ("t5_large", 783_150_080),
        ("t5_xl", 2_849_757_184),
        ("t5_xxl", 11_135_332_352),
        ("llama_7b", 6_738_415_616),
        ("llama_1b", 1_100_048_384),
    ],
)
def test_parameter_counts_are_the_published_ones(name, published):
    assert count(preset(name)) == published


def test_t5_1_0_base_and_gpt2_have_their_published_sizes():
    t5 = preset("t5_base", model__mlp="relu", model__mlp_dim="3072", model__tied_embeddings="true")
    assert count(t5) == 222_903_552
    assert count(preset("gpt_small", model__vocab_multiple="1")) == 124_439_808


def test_bert_base_has_its_published_size_with_and_without_its_heads():
    config = preset("bert_base", model__vocab_multiple="1")
    assert count(config) == 110_106_428
    assert count(config, without=("mlm/", "head_bias", "pairs/classes/")) == 109_482_240


def test_gemma_3_270m_has_its_published_size():
    without_encoder = {"merged_attention": "false", "encoder_window": "0", "encoder_window_ahead": "0"}
    fields = {f"model__{name}": value for name, value in {"architecture": "decoder", **without_encoder}.items()}
    assert count(preset("t5gemma2_270m", **fields, data__objective="causal_lm")) == 268_098_176


def test_modernbert_base_has_its_published_size_an_unused_norm_in_its_first_layer_and_flops_counted_by_hand():
    config = preset("modernbert_base", model__vocab_multiple="1")
    assert count(config) == 149_655_232 + 768
    attention = 2 * 768 * (8 * 1024 + 14 * 129)  # keys in 8 global and 14 local layers
    kernels = 22 * (4 * 768 * 768 + 3 * 768 * 1152)
    head = round(0.3 * 1022) * (768 * 768 + 768 * 50_368)  # only masked tokens, all but CLS and SEP
    assert sum(forward_flops(config)) == 2 * (1024 * (attention + kernels) + head)


@pytest.mark.parametrize(
    "name",
    ["tiny", "t5_small", "t5_base", "t5_large", "t5_xl", "t5_xxl", "gpt_small", "llama_1b", "llama_7b", "bert_base"]
    + ["modernbert_base"],
)
def test_an_untrained_preset_has_the_loss_of_a_uniform_guess(name):
    # The preset itself would not fit in memory: depth and width are reduced, every other field stays.
    reduced = {
        "model__num_layers": "3",
        "model__model_dim": "64",
        "model__mlp_dim": "128",
        "model__num_heads": "4",
        "model__head_dim": "16",
        "tokenizer__vocab_size": "2000",
        "data__batch_size": "4",
        "model__layers": "scan",  # quick to compile at any depth
        "model__dtype": "float32",
        "model__remat": "none",
        "train__microbatches": "1",
    }
    if preset(name).model.layer_pattern:
        reduced["model__layer_pattern"] = "global,local,local"
    if preset(name).model.num_kv_heads:
        reduced["model__num_kv_heads"] = "2"
    reduced |= (
        {"data__targets_length": "64"}
        if preset(name).data.inputs_length == 0
        else {"data__inputs_length": "64", "data__targets_length": "14"}
    )
    config = preset(name, **reduced)
    assert abs(mean_loss(config, params_of(config), random_batch(config)) - math.log(config.tokenizer.vocab_size)) < 0.5


@pytest.mark.parametrize("variant", ["t5", "bert"])
def test_norms_softmax_and_loss_stay_float32_in_bfloat16_models(variant):
    sections = VARIANTS[variant]
    config = small(**{**sections, "model": {**sections.get("model", {}), "dtype": "bfloat16"}})
    params, batch = params_of(config), random_batch(config)
    jaxpr = jax.make_jaxpr(lambda p: step.pretrain_loss(config, p, batch, None))(params)

    def equations(jaxpr):
        for equation in jaxpr.eqns:
            yield equation
            for sub in jax.extend.core.jaxprs_in_params(equation.params):
                yield from equations(sub)

    kinds = {"exp": "softmax and loss", "log": "loss", "rsqrt": "norm", "reduce_sum": "sums"}
    float32_primitives = {
        e.primitive.name
        for e in equations(jaxpr.jaxpr)
        if e.primitive.name in kinds and e.outvars[0].aval.dtype == jnp.float32
    }
    assert {"exp", "log", "rsqrt"} <= float32_primitives
    lower_precision = [
        e
        for e in equations(jaxpr.jaxpr)
        if e.primitive.name in ("log", "rsqrt") and e.outvars[0].aval.dtype != jnp.float32
    ]
    assert not lower_precision
    assert logits(config, params, batch).dtype == jnp.float32
    assert variant != "bert" or pair_logits(config, params, batch).dtype == jnp.float32
