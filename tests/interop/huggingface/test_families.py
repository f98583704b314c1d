"""Hugging Face families: weight maps and configs compared with goldens of transformers; what they refuse."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small
from flax import traverse_util
from golden_models import GOLDEN, golden, model_of, params_of

from t5like.config.schema import Config
from t5like.errors import CheckpointError
from t5like.interop.huggingface import families, weight_maps
from t5like.model.transformer import Transformer
from t5like.types import Batch

NAMES = sorted(name.removesuffix(".config") for name in GOLDEN if name.endswith(".config"))


def batch_of(name: str) -> Batch:
    inputs = {key: value.astype(np.int32) for key, value in golden(name, "inputs").items()}
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if "decoder_input_ids" in inputs:
        decoder = inputs["decoder_input_ids"]
        return Batch(decoder, decoder, np.ones(decoder.shape, np.float32), ids, mask, np.ones_like(decoder))
    ones = np.ones(ids.shape, np.float32)
    if model_of(name)[1].model.architecture == "encoder":
        return Batch(None, ids, ones, ids, mask, token_types_BS=inputs.get("token_type_ids"))
    return Batch(ids, ids, ones, decoder_segments_BL=mask)


@partial(jax.jit, static_argnums=0)
def run(config: Config, params, batch: Batch) -> tuple[jax.Array, jax.Array | None]:
    apply = partial(Transformer(config).apply, {"params": params}, batch)
    pairs = (
        apply(method=lambda m, batch: m.pair_logits(m.hidden(batch).x_BLD))
        if batch.token_types_BS is not None
        else None
    )
    return apply(), pairs


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_those_of_transformers(name):
    _, config = model_of(name)
    batch = batch_of(name)
    logits, pairs = run(config, jax.tree.map(jnp.asarray, params_of(name)), batch)
    real = np.ones(logits.shape[:2], bool)
    if batch.decoder_BL is None or (batch.encoder_BS is None and batch.decoder_segments_BL is not None):
        real = golden(name, "inputs")["attention_mask"] > 0  # transformers also computes logits of padding
    np.testing.assert_allclose(logits[real], GOLDEN[f"{name}.logits"][real], atol=1e-4, rtol=1e-4)
    if pairs is not None:
        np.testing.assert_allclose(pairs, GOLDEN[f"{name}.pair_logits"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_map_is_invertible_bit_for_bit_and_names_every_parameter(name):
    family, config = model_of(name)
    params = traverse_util.flatten_dict(params_of(name), sep="/")
    weight_map = weight_maps.weight_map(family, config.model)
    assert sorted(param for entry in weight_map for param in entry.params) == sorted(params)
    tensors = golden(name, "weights")
    for entry in weight_map:
        for key, y in entry.names():
            parts = [params[param] if y is None else params[param][y] for param in entry.params]
            again = weight_maps.to_huggingface(entry, parts)
            np.testing.assert_array_equal(again, tensors[key].astype(np.float32), strict=True)


@pytest.mark.parametrize("name", NAMES)
def test_the_config_that_is_written_describes_the_model_that_was_read(name):
    family, config = model_of(name)
    families.check_exportable(
        family, dataclasses.replace(config, data=dataclasses.replace(config.data, objective=("causal_lm",)))
    )
    hf = families.config_of(family, config, rows=61, eos=1, pad=0, dtype="float32")
    model = config.model
    again = families.model_of(
        json.loads(json.dumps(hf)), untied=not model.tied_embeddings, next_sentence_head=model.next_sentence_head
    )
    assert again[0] == family and families.numeric_fields(again[1]) == families.numeric_fields(model)
    theirs = json.loads(str(GOLDEN[f"{name}.config"]))
    ours_only = {
        "bos_token_id",
        "decoder_start_token_id",
        "dtype",
        "torch_dtype",
        "rope_theta",
        "scale_decoder_outputs",
        "n_inner",
    }
    assert not {key for key in hf if key not in theirs} - ours_only
    same = {key for key in hf if hf[key] == theirs.get(key)}
    numbers = {"num_layers", "d_kv", "n_embd", "hidden_size", "num_attention_heads", "vocab_size", "rope_parameters"}
    assert {key for key in numbers if key in hf} <= same


LLAMA = json.loads(str(GOLDEN["llama.config"]))


@pytest.mark.parametrize(
    "name, change, complaint",
    [
        ("llama", {"model_type": "mamba"}, "model_type='mamba' is not one of t5,"),
        (
            "llama",
            {"model_type": "mixtral"},
            "model_type='mixtral': experts are not supported; use a dense model, such",
        ),
        ("t5_1_1", {"model_type": "switch_transformers"}, "experts are not supported; use a dense model, such as t5"),
        ("gemma3", {"model_type": "gemma3"}, "models with images are not supported; save the text part as gemma3_text"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True must be False"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 must be"),
        ("gemma2", {"model_type": ["gemma2"]}, "model_type=['gemma2'] is not one of t5,"),
        ("gemma3", {"rope_parameters": {"sliding_attention": {"rope_theta": 0}}}, "rope_theta=0 must be above 0"),
        ("modernbert", {"layer_types": None, "num_hidden_layers": 10**9}, "num_hidden_layers=1,000,000,000 must be"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 2}, "layer_types must be 2 times sliding_attention or full"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' must be silu"),
        ("llama", {"attention_bias": True}, "mlp_bias=False must be True with attention_bias=True: both or neither"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic"}},
            "rope_parameters.rope_type='dynamic' must be default,",
        ),
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "longrope"}}, "rope_scaling.rope_type='longrope'"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 must be 1.0"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"rope_parameters": [1]}, "config.json does not have the form that transformers writes"),
        ("llama", {"num_hidden_layers": "2"}, "num_hidden_layers='2' must be a whole number"),
        ("llama", {"rms_norm_eps": -1.0}, "rms_norm_eps=-1.0 must be a number, at least 0"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window=True must be False"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "must all be full_attention for qwen3"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True must be False"),
        (
            "bert",
            {"position_embedding_type": "relative_key"},
            "position_embedding_type='relative_key' must be absolute",
        ),
        ("modernbert", {"layer_types": ["full_attention"]}, "layer_types must be 4 of sliding_attention and full_att"),
        ("modernbert", {"classifier_activation": "silu"}, "classifier_activation='silu' must be gelu with hidden_act"),
        ("modernbert", {"mlp_bias": True}, "mlp_bias=True must be False with attention_bias=False"),
        ("modernbert", {"decoder_bias": False}, "decoder_bias=False must be True"),
        ("eurobert", {"attention_bias": True}, "attention_bias=True must be False"),
        ("t5_1_1", {"feed_forward_proj": "gated-relu"}, "feed_forward_proj='gated-relu' must be relu or"),
    ],
)
def test_an_unsupported_config_is_refused_with_key_and_value(name, change, complaint):
    hf = {**json.loads(str(GOLDEN[f"{name}.config"])), **change}
    with pytest.raises(CheckpointError, match="config.json") as error:
        families.model_of(hf, untied=False, next_sentence_head=True)
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_sizes_of_the_vocabulary_are_compared_whatever_their_type():
    hf = json.loads(str(GOLDEN["t5gemma.config"]))
    hf["encoder"]["vocab_size"] = [61]
    with pytest.raises(CheckpointError, match=r"vocab_size must be the same in both stacks, not \[61\] and 61"):
        families.vocabulary_rows("t5gemma", hf)


@pytest.mark.parametrize(
    "family, model, complaint",
    [
        (
            "llama",
            {"architecture": "decoder"},
            "model.positions=relative can't be represented by llama, which requires rotary",
        ),
        ("gpt2", {"architecture": "decoder", "positions": "rotary"}, "model.positions=rotary"),
        ("t5", {"positions": "rotary"}, "model.positions=rotary"),
        (
            "t5",
            {"layer_pattern": ("local", "global"), "attention_window": 8},
            "model.attention_window=8 can't be represented by t5, which requires 0",
        ),
        (
            "mistral",
            {
                "architecture": "decoder",
                "positions": "rotary",
                "scale_attention": True,
                "mlp": "gated_silu",
                "layer_pattern": ("local", "global"),
                "attention_window": 8,
            },
            "model.layer_pattern=local,global can't be represented by mistral, which requires no pattern",
        ),
        (
            "t5",
            {"relative_bias": "per_layer"},
            "model.relative_bias=per_layer can't be represented by t5, which requires shared",
        ),
        ("t5", {"biases": True}, "model.biases=True"),
        ("t5", {"merged_attention": True}, "model.merged_attention=True can't be represented by t5"),
        ("t5", {"norm_position": "sandwich"}, "model.norm_position=sandwich can't be represented by t5"),
        (
            "t5gemma",
            {**families.FIXED["t5gemma"], "attention_window": 8, "encoder_window": 4, "encoder_window_ahead": 7},
            "model.encoder_window=4 with model.encoder_window_ahead=7 can't be represented by t5gemma, which requires "
            "4 and 4",
        ),
        ("t5", {"qk_norm": True}, "model.qk_norm=True"),
        ("mt5", {"tied_embeddings": True}, "model.logits_scale=auto"),
        ("bert", {"architecture": "encoder"}, "model.positions=relative"),
    ],
)
def test_a_model_that_a_family_can_not_represent_is_refused_with_the_field(family, model, complaint):
    with pytest.raises(CheckpointError) as error:
        families.check_exportable(family, small(model=model))
    assert complaint in str(error.value)


def test_a_soft_cap_of_null_is_none_and_an_absent_one_is_that_of_the_family():
    caps = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    hf = {**json.loads(str(GOLDEN["gemma2.config"])), **caps}
    absent = {key: value for key, value in hf.items() if key not in caps}
    of = lambda hf: families.model_of(hf, untied=False, next_sentence_head=False)[1]
    assert [(of(each).attention_softcap, of(each).logits_softcap) for each in (hf, absent)] == [(0, 0), (50, 30)]


def test_a_gemma_that_was_saved_without_its_head_has_the_same_names():
    names = ["layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"]
    assert {weight_maps.canonical_name("gemma3_text", name, tied=True) for name in names} == {names[1]}


def test_unused_fields_of_a_model_are_ignored():
    model = model_of("qwen3")[1].model
    rotary = dataclasses.replace(model.rotary, original_length=2048, beta_fast=9.0)
    idle = {"num_decoder_layers": 7, "next_sentence_head": False, "rotary": rotary}
    assert families.numeric_fields(dataclasses.replace(model, **idle)) == families.numeric_fields(model)
    t5 = model_of("t5_1_1")[1].model
    assert families.numeric_fields(dataclasses.replace(t5, num_decoder_layers=7)) != families.numeric_fields(t5)


def test_a_decoder_with_a_bidirectional_prompt_is_refused():
    config = dataclasses.replace(
        model_of("llama")[1], data=small(model={"architecture": "decoder"}, data={"objective": "prefix_lm"}).data
    )
    with pytest.raises(CheckpointError, match="data.objective=prefix_lm can't be represented by llama"):
        families.check_exportable("llama", config)


def test_configs_of_transformers_4_describe_the_same_model():
    old = {key: value for key, value in LLAMA.items() if key not in ("rope_parameters", "dtype")}
    scaling = {
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
    }
    read = lambda hf: families.model_of(hf, untied=True, next_sentence_head=False)[1]
    assert read({**old, "rope_theta": 5e5}) == read(
        {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    )
    modern = {**json.loads(str(GOLDEN["modernbert.config"])), "num_hidden_layers": 6, "layer_types": None}
    older = {"rope_parameters": None, "global_attn_every_n_layers": 2, "global_rope_theta": 500.0}
    for local, expected in ((20.0, 20.0), (None, 0.0)):  # null: local layers have the base of the global ones
        model = read({**modern, **older, "local_rope_theta": local})
        assert model.layer_pattern == ("global", "local") and model.attention_window == 7
        assert (model.rotary.base, model.rotary.local_base) == (500.0, expected)
    yarn = read({**old, "rope_theta": 1e4, "rope_scaling": scaling})
    assert yarn.rotary.scaling == "yarn" and yarn.rotary.attention_factor == pytest.approx(
        1.138629 / 1.069315, rel=1e-5
    )
    t5 = {key: x for key, x in json.loads(str(GOLDEN["t5_1_1.config"])).items() if key != "scale_decoder_outputs"}
    scales = [
        families.model_of({**t5, "tie_word_embeddings": tie}, untied=not tie, next_sentence_head=False)[1].logits_scale
        for tie in (True, False)
    ]
    assert scales == ["auto", "auto"]  # scaled where tied, and not where untied


def test_other_names_and_copies_have_canonical_names_and_buffers_are_ignored():
    cases = {
        ("gpt2", "h.3.attn.c_attn.weight"): "transformer.h.3.attn.c_attn.weight",
        ("gpt2", "h.3.attn.bias"): None,
        ("gpt2", "lm_head.weight"): "transformer.wte.weight",
        ("bert", "bert.embeddings.LayerNorm.gamma"): "bert.embeddings.LayerNorm.weight",
        ("bert", "cls.predictions.decoder.bias"): "cls.predictions.bias",
        ("bert", "bert.embeddings.position_ids"): None,
        ("t5", "encoder.embed_tokens.weight"): "shared.weight",
        ("umt5", "lm_head.weight"): "shared.weight",
        ("llama", "model.layers.1.self_attn.rotary_emb.inv_freq"): None,
        ("llama", "model.layers.1.self_attn.q_proj.weight"): "model.layers.1.self_attn.q_proj.weight",
    }
    assert {key: weight_maps.canonical_name(*key, tied=True) for key in cases} == cases
    assert weight_maps.canonical_name("t5", "lm_head.weight", tied=False) == "lm_head.weight"
