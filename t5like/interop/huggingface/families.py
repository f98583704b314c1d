"""A family's config.json as our model fields and back; what it has no word for is refused, naming the field.

Read and written are the keys of transformers 5.24 (`rope_parameters`, `dtype`, `scale_decoder_outputs`); those of
version 4 (`rope_theta` and `rope_scaling`, `torch_dtype`) are read too, and written beside the new ones where version 5
allows it. A key that a file lacks has the default that transformers gives it.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from t5like.config.schema import Config, ModelConfig
from t5like.errors import CheckpointError
from t5like.interop.huggingface import rope_config
from t5like.interop.huggingface.config_keys import must, number, whole
from t5like.interop.huggingface.weight_maps import DECODERS, ENCODER_DECODERS
from t5like.model.heads import scales_logits

FAMILIES = (*ENCODER_DECODERS, *DECODERS, "gpt2", "bert")
ARCHITECTURES = {
    "t5": "T5ForConditionalGeneration",
    "mt5": "MT5ForConditionalGeneration",
    "umt5": "UMT5ForConditionalGeneration",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "bert": "BertForPreTraining",
}

# What every model of a family is here: an import begins with it, an export refuses anything else.
_T5 = {
    "architecture": "encoder_decoder",
    "positions": "relative",
    "norm": "rms",
    "norm_position": "pre",
    "embedding_norm": False,
    "biases": False,
    "scale_attention": False,
    "qk_norm": False,
    "num_kv_heads": 0,
}
_DECODER = {"norm_position": "pre", "embedding_norm": False, "scale_attention": True}
_LLAMA = {"architecture": "decoder", "positions": "rotary", **_DECODER, "norm": "rms", "mlp": "gated_silu"}
FIXED: dict[str, dict[str, Any]] = {
    "t5": {**_T5, "relative_bias": "shared"},
    "mt5": {**_T5, "relative_bias": "shared"},
    "umt5": {**_T5, "relative_bias": "per_layer"},
    "llama": {**_LLAMA, "qk_norm": False, "attention_window": 0},
    "qwen3": {**_LLAMA, "qk_norm": True, "attention_window": 0, "biases": False},
    "mistral": {**_LLAMA, "qk_norm": False, "biases": False},
    "gpt2": {
        "architecture": "decoder",
        "positions": "learned",
        **_DECODER,
        "norm": "layer",
        "biases": True,
        "qk_norm": False,
        "attention_window": 0,
        "num_kv_heads": 0,
    },
    "bert": {
        "architecture": "encoder",
        "positions": "learned",
        "norm": "layer",
        "norm_position": "post",
        "embedding_norm": True,
        "biases": True,
        "tied_embeddings": True,
        "scale_attention": True,
        "qk_norm": False,
        "num_kv_heads": 0,
        "head": "mlm",
    },
}
# The activation's name in config.json, the first of several that mean the same, -> model.mlp.
_PLAIN = {"relu": "relu", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "gelu": "gelu_exact"}
MLPS = {
    "t5": {"relu": "relu", "gated-gelu": "gated_gelu", "gated-silu": "gated_silu", "gelu_new": "gelu"}
    | {"gated-gelu_new": "gated_gelu", "gelu": "gelu_exact"},
    "llama": {"silu": "gated_silu"},
    "plain": _PLAIN,
}


def model_of(hf: Mapping[str, Any], *, untied: bool, next_sentence_head: bool) -> tuple[str, ModelConfig]:
    """The family, and the model that a config.json describes.

    Args:
        hf: the parsed file.
        untied: whether the files hold an output head that is not the embedding.
        next_sentence_head: whether they hold BERT's pooler and next-sentence classifier.

    Raises:
        CheckpointError: a key has a value that none of our models has; with key, value, and what works.
    """
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise CheckpointError(f"config.json: model_type={family!r} is not one of {', '.join(FAMILIES)}")
    for key in ("quantization_config", "add_cross_attention", "is_decoder"):
        must(hf, key, (None, False), None)
    try:
        if family in ENCODER_DECODERS:
            fields = _t5_fields(hf, family, untied=untied)
        elif family in DECODERS:
            fields = _llama_fields(hf, family)
        else:
            fields = {"gpt2": _gpt2_fields, "bert": _bert_fields}[family](hf)
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"config.json is not as transformers writes it: {error}") from None
    if family == "bert":
        fields["next_sentence_head"] = next_sentence_head
    return family, ModelConfig(**{**FIXED[family], **fields})


def check(family: str, config: Config) -> None:
    """Refuse a model that the family has no words for.

    Raises:
        CheckpointError: with our field, its value, and what the family needs.
    """
    model = config.model
    heads = model.num_kv_heads == model.num_heads  # the same as 0
    for field, wanted in FIXED[family].items():
        have = 0 if field == "num_kv_heads" and heads else getattr(model, field)
        _can(family, have == wanted, f"model.{field}", getattr(model, field), wanted)
    activations = set(_mlps(family).values())
    _can(family, model.mlp in activations, "model.mlp", model.mlp, " or ".join(sorted(activations)))
    if family in ("gpt2", "bert"):
        joined = model.num_heads * model.head_dim
        _can(family, joined == model.model_dim, "model.head_dim", model.head_dim, "model_dim / num_heads")
    if family == "bert":
        _can(family, model.token_types > 0, "model.token_types", model.token_types, "1 or more; use 2")
    if family not in ("t5", "umt5"):
        scaled = f"{model.logits_scale} (model_dim, as embeddings are tied and model.init=t5)"
        _can(family, not scales_logits(model), "model.logits_scale", scaled, "none")
    if model.architecture == "decoder" and config.data.objective != ("causal_lm",) and not config.data.messages_field:
        # Elsewhere a prompt's tokens see those before them only.
        both_ways = [name for name in config.data.objective if name != "causal_lm"]
        _can(family, not both_ways, "data.objective", ",".join(both_ways), "causal_lm, for a prompt read one way")


def numerics(model: ModelConfig) -> dict[str, Any]:
    """The fields that a family's config.json carries, in one form: equal where two models compute the same."""
    fields = dataclasses.asdict(model)
    for name in ("init", "dropout_rate", "vocab_multiple", "dtype", "layers", "kernels", "remat"):
        del fields[name]
    fields["logits_scale"] = scales_logits(model)
    fields["num_kv_heads"] = model.kv_heads
    fields["num_decoder_layers"] = model.decoder_layers
    if model.architecture != "encoder_decoder":
        del fields["num_decoder_layers"]
    if model.has_decoder:
        del fields["next_sentence_head"]
    fields |= {f"rotary.{name}": value for name, value in fields.pop("rotary").items()}
    used = {"relative": ("relative_",), "rotary": ("rotary.",), "learned": ("max_length",)}
    unused = [prefix for positions, prefixes in used.items() if positions != model.positions for prefix in prefixes]
    if model.positions == "rotary":
        scaled = {
            "llama3": ("low_frequency_factor", "high_frequency_factor", "original_length"),
            "yarn": ("beta_slow", "beta_fast", "attention_factor", "original_length"),
        }
        needed = scaled.get(model.rotary.scaling, ())
        unused += [f"rotary.{name}" for names in scaled.values() for name in names if name not in needed]
    return {name: value for name, value in fields.items() if not name.startswith(tuple(unused))}


def default_family(model: ModelConfig) -> str:
    """The family that a model trained here is nearest to."""
    if model.architecture == "encoder_decoder":
        return "umt5" if model.relative_bias == "per_layer" else "t5"
    if model.architecture == "encoder":
        return "bert"
    if model.positions == "learned":
        return "gpt2"
    return "qwen3" if model.qk_norm else "mistral" if model.attention_window else "llama"


def config_of(family: str, config: Config, *, rows: int, eos: int | list[int], pad: int, dtype: str) -> dict[str, Any]:
    """The config.json of a model that `check` has let through.

    Args:
        rows: of the embedding, as it is written.
        eos: the id, or ids, that end a text.
        pad: id that fills a row.
        dtype: of the weights, such as float32.
    """
    write = {"gpt2": _gpt2_config, "bert": _bert_config}
    keys = (_t5_config if family in ENCODER_DECODERS else _llama_config if family in DECODERS else write[family])(
        family, config
    )
    architecture = ARCHITECTURES[family]
    if family == "bert":
        architecture = architecture if config.model.next_sentence_head else "BertForMaskedLM"
    return {
        "model_type": family,
        "architectures": [architecture],
        **keys,
        "vocab_size": rows,
        **({"decoder_start_token_id": 0} if family in ENCODER_DECODERS else {}),
        "bos_token_id": None,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def dropout_keys(family: str, rate: float) -> dict[str, float]:
    """Dropout, where the family has it."""
    if family in ENCODER_DECODERS:
        return {"dropout_rate": rate}
    if family in DECODERS:
        return {"attention_dropout": rate}
    if family == "gpt2":
        return dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), rate)
    return dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), rate)


# ---- T5, mT5, UMT5 ----


def _t5_fields(hf: Mapping[str, Any], family: str, *, untied: bool) -> dict[str, Any]:
    # transformers 5 ties the weights whatever the file says, unless there is a head and it differs; whether logits are
    # scaled it keeps in a key of its own, which version 4 called tie_word_embeddings. mT5's are never scaled.
    scaled = hf.get("scale_decoder_outputs", hf.get("tie_word_embeddings") is not False)
    return {
        "num_layers": whole(hf, "num_layers"),
        "num_decoder_layers": _unless(whole(hf, "num_layers"), whole(hf, "num_decoder_layers", hf["num_layers"])),
        "model_dim": whole(hf, "d_model"),
        "num_heads": whole(hf, "num_heads"),
        "head_dim": whole(hf, "d_kv"),
        "mlp_dim": whole(hf, "d_ff"),
        "mlp": _activation(hf, "feed_forward_proj", family, "relu" if family == "t5" else "gated-gelu"),
        "relative_buckets": whole(hf, "relative_attention_num_buckets", 32),
        "relative_max_distance": whole(hf, "relative_attention_max_distance", 128),
        "norm_epsilon": number(hf, "layer_norm_epsilon", 1e-6),
        "dropout_rate": number(hf, "dropout_rate", 0.1),
        "tied_embeddings": not untied,
        "logits_scale": _logits_scale(bool(scaled) and family != "mt5", tied=not untied),
    }


def _logits_scale(scaled: bool, *, tied: bool) -> str:
    """auto where that means the same, so that the model is the one that our configs describe."""
    return "auto" if scaled == tied else "model_dim" if scaled else "none"


def _t5_config(family: str, config: Config) -> dict[str, Any]:
    model = config.model
    return {
        "num_layers": model.num_layers,
        "num_decoder_layers": model.decoder_layers,
        "d_model": model.model_dim,
        "num_heads": model.num_heads,
        "d_kv": model.head_dim,
        "d_ff": model.mlp_dim,
        "feed_forward_proj": _name_of(family, model.mlp),
        "relative_attention_num_buckets": model.relative_buckets,
        "relative_attention_max_distance": model.relative_max_distance,
        "layer_norm_epsilon": model.norm_epsilon,
        **dropout_keys(family, model.dropout_rate),
        "is_encoder_decoder": True,
        "tie_word_embeddings": model.tied_embeddings,
        **({} if family == "mt5" else {"scale_decoder_outputs": scales_logits(model)}),
    }


# ---- Llama, Qwen3, Mistral ----


def _llama_fields(hf: Mapping[str, Any], family: str) -> dict[str, Any]:
    heads = whole(hf, "num_attention_heads")
    biases = must(hf, "attention_bias", (False, True) if family == "llama" else (False,), False)
    if family == "llama":
        must(hf, "mlp_bias", (biases,), False, f"attention_bias={biases}: both or neither")
    window = hf.get("sliding_window", 4096) and whole(hf, "sliding_window", 4096) if family == "mistral" else None
    if family == "qwen3":
        must(hf, "use_sliding_window", (False,), False)
    layers = hf.get("layer_types")
    same = "sliding_attention" if family == "mistral" and window else "full_attention"
    if layers and set(layers) != {same}:
        raise CheckpointError(f"config.json: layer_types={sorted(set(layers))} must all be {same} for {family}")
    return {
        "num_layers": whole(hf, "num_hidden_layers"),
        "model_dim": whole(hf, "hidden_size"),
        "num_heads": heads,
        "num_kv_heads": _unless(heads, whole(hf, "num_key_value_heads", heads)),
        "head_dim": whole(hf, "head_dim", 128 if family == "qwen3" else whole(hf, "hidden_size") // heads),
        "mlp_dim": whole(hf, "intermediate_size"),
        "mlp": _activation(hf, "hidden_act", family, "silu"),
        "norm_epsilon": number(hf, "rms_norm_eps", 1e-6),
        "biases": biases,
        "attention_window": (window or 0) if family == "mistral" else 0,
        "tied_embeddings": must(hf, "tie_word_embeddings", (False, True), False),
        "init": "gpt2",
        "rotary": rope_config.rotary_of(hf),
    }


def _llama_config(family: str, config: Config) -> dict[str, Any]:
    model = config.model
    longest = max(config.row_length, math.ceil(model.rotary.original_length * model.rotary.factor))
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.model_dim,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.mlp_dim,
        "hidden_act": _name_of(family, model.mlp),
        "rms_norm_eps": model.norm_epsilon,
        **({"attention_bias": model.biases} if family != "mistral" else {}),
        **({"mlp_bias": model.biases} if family == "llama" else {}),
        **({"sliding_window": model.attention_window or None} if family == "mistral" else {}),
        **({"use_sliding_window": False, "sliding_window": None} if family == "qwen3" else {}),
        **dropout_keys(family, model.dropout_rate),
        "max_position_embeddings": longest,
        "tie_word_embeddings": model.tied_embeddings,
        "rope_theta": model.rotary.base,
        "rope_parameters": rope_config.config_of(model.rotary),
    }


# ---- GPT-2, BERT ----


def _gpt2_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    for key, needed in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        must(hf, key, (needed,), needed)
    dim, heads = whole(hf, "n_embd", 768), whole(hf, "n_head", 12)
    return {
        "num_layers": whole(hf, "n_layer", 12),
        "model_dim": dim,
        "num_heads": heads,
        "head_dim": dim // heads,
        "mlp_dim": whole(hf, "n_inner", 4 * dim),
        "mlp": _activation(hf, "activation_function", "gpt2", "gelu_new"),
        "norm_epsilon": number(hf, "layer_norm_epsilon", 1e-5),
        "max_length": whole(hf, "n_positions", 1024),
        "dropout_rate": number(hf, "resid_pdrop", 0.1),
        "tied_embeddings": must(hf, "tie_word_embeddings", (True, False), True),
        "init": "gpt2",
    }


def _gpt2_config(family: str, config: Config) -> dict[str, Any]:
    model = config.model
    return {
        "n_layer": model.num_layers,
        "n_embd": model.model_dim,
        "n_head": model.num_heads,
        "n_inner": model.mlp_dim,
        "n_positions": model.max_length,
        "activation_function": _name_of(family, model.mlp),
        "layer_norm_epsilon": model.norm_epsilon,
        **dropout_keys(family, model.dropout_rate),
        "tie_word_embeddings": model.tied_embeddings,
    }


def _bert_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    must(hf, "position_embedding_type", ("absolute", None), None)
    must(hf, "tie_word_embeddings", (True,), True)
    dim, heads = whole(hf, "hidden_size", 768), whole(hf, "num_attention_heads", 12)
    return {
        "num_layers": whole(hf, "num_hidden_layers", 12),
        "model_dim": dim,
        "num_heads": heads,
        "head_dim": dim // heads,
        "mlp_dim": whole(hf, "intermediate_size", 3072),
        "mlp": _activation(hf, "hidden_act", "bert", "gelu"),
        "norm_epsilon": number(hf, "layer_norm_eps", 1e-12),
        "max_length": whole(hf, "max_position_embeddings", 512),
        "token_types": whole(hf, "type_vocab_size", 2),
        "dropout_rate": number(hf, "hidden_dropout_prob", 0.1),
        "init": "bert",
    }


def _bert_config(family: str, config: Config) -> dict[str, Any]:
    model = config.model
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.model_dim,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.mlp_dim,
        "hidden_act": _name_of(family, model.mlp),
        "layer_norm_eps": model.norm_epsilon,
        "max_position_embeddings": model.max_length,
        "type_vocab_size": model.token_types,
        **dropout_keys(family, model.dropout_rate),
        "tie_word_embeddings": True,
    }


# ---- Single keys ----


def _mlps(family: str) -> dict[str, str]:
    return MLPS["t5" if family in ENCODER_DECODERS else "llama" if family in DECODERS else "plain"]


def _name_of(family: str, mlp: str) -> str:
    return next(name for name, ours in _mlps(family).items() if ours == mlp)


def _activation(hf: Mapping[str, Any], key: str, family: str, default: str) -> str:
    names = _mlps(family)
    return names[must(hf, key, tuple(names), default)]


def _unless(usual: int, value: int) -> int:
    """0 where a value is the usual one, as our fields have it."""
    return 0 if value == usual else value


def _can(family: str, holds: bool, field: str, value: Any, wanted: Any) -> None:
    if not holds:
        raise CheckpointError(f"{field}={value} can't be said by {family}, which needs {wanted}; see --family")
