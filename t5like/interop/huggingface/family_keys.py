"""The keys of each family's config.json as fields of `ModelConfig`, and back.

`families` combines them with the fields that all models of a family share. Keys are those of transformers 5.24
(`rope_parameters`, `dtype`, `scale_decoder_outputs`). The keys of version 4 (`rope_theta` and `rope_scaling`,
`torch_dtype`) are also read, and written in addition where version 5 allows it. A missing key has the default of
transformers.
"""

import math
from collections.abc import Mapping
from typing import Any

from t5like.config.schema import Config
from t5like.errors import CheckpointError
from t5like.interop.huggingface import rope_config
from t5like.interop.huggingface.config_keys import nonnegative, one_of, positive_int
from t5like.interop.huggingface.weight_maps import ENCODER_DECODERS, GEMMAS, LIKE_LLAMA, T5GEMMAS

# The activation's name in config.json -> model.mlp. An export writes the first of several names with one meaning.
_PLAIN = {"relu": "relu", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "gelu": "gelu_exact"}
MLPS = {
    "t5": {"relu": "relu", "gated-gelu": "gated_gelu", "gated-silu": "gated_silu", "gelu_new": "gelu"}
    | {"gated-gelu_new": "gated_gelu", "gelu": "gelu_exact"},
    "llama": {"silu": "gated_silu"},
    **dict.fromkeys((*GEMMAS, *T5GEMMAS), {"gelu_pytorch_tanh": "gated_gelu"}),
    "modernbert": {"gelu": "gated_gelu_exact", "gelu_pytorch_tanh": "gated_gelu", "gelu_new": "gated_gelu"}
    | {"silu": "gated_silu"},
}


def dropout_keys(family: str, rate: float) -> dict[str, float]:
    """The dropout rate under the family's keys."""
    if family in (*ENCODER_DECODERS, *T5GEMMAS):
        return {"dropout_rate": rate}
    if family in (*LIKE_LLAMA, *GEMMAS):
        return {"attention_dropout": rate}
    if family == "modernbert":
        return dict.fromkeys(("embedding_dropout", "attention_dropout", "mlp_dropout"), rate)
    if family == "gpt2":
        return dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), rate)
    return dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), rate)


# ---- T5, mT5, UMT5 ----


def t5_fields(hf_config: Mapping[str, Any], family: str, *, untied: bool) -> dict[str, Any]:
    """The keys of T5, mT5, UMT5 as model fields."""
    # transformers 5 ties the weights, whatever the file contains, except if there is a different head. A separate key
    # there sets whether logits are scaled; version 4 uses tie_word_embeddings for both. mT5 never scales logits.
    scaled = hf_config.get("scale_decoder_outputs", hf_config.get("tie_word_embeddings") is not False)
    return {
        "num_layers": positive_int(hf_config, "num_layers"),
        "num_decoder_layers": _zero_if(
            positive_int(hf_config, "num_layers"),
            positive_int(hf_config, "num_decoder_layers", hf_config["num_layers"]),
        ),
        "model_dim": positive_int(hf_config, "d_model"),
        "num_heads": positive_int(hf_config, "num_heads"),
        "head_dim": positive_int(hf_config, "d_kv"),
        "mlp_dim": positive_int(hf_config, "d_ff"),
        "mlp": activation(hf_config, "feed_forward_proj", family, "relu" if family == "t5" else "gated-gelu"),
        "relative_buckets": positive_int(hf_config, "relative_attention_num_buckets", 32),
        "relative_max_distance": positive_int(hf_config, "relative_attention_max_distance", 128),
        "norm_epsilon": nonnegative(hf_config, "layer_norm_epsilon", 1e-6),
        "dropout_rate": nonnegative(hf_config, "dropout_rate", 0.1),
        "tied_embeddings": not untied,
        "logits_scale": _logits_scale(bool(scaled) and family != "mt5", tied=not untied),
    }


def _logits_scale(scaled: bool, *, tied: bool) -> str:
    """auto where that has the same meaning, so that the imported model equals the one that a preset describes."""
    return "auto" if scaled == tied else "model_dim" if scaled else "none"


def t5_keys(family: str, config: Config) -> dict[str, Any]:
    """The keys of T5, mT5, UMT5 for a model."""
    model = config.model
    return {
        "num_layers": model.num_layers,
        "num_decoder_layers": model.decoder_layers,
        "d_model": model.model_dim,
        "num_heads": model.num_heads,
        "d_kv": model.head_dim,
        "d_ff": model.mlp_dim,
        "feed_forward_proj": name_of(family, model.mlp),
        "relative_attention_num_buckets": model.relative_buckets,
        "relative_attention_max_distance": model.relative_max_distance,
        "layer_norm_epsilon": model.norm_epsilon,
        **dropout_keys(family, model.dropout_rate),
        "is_encoder_decoder": True,
        "tie_word_embeddings": model.tied_embeddings,
        **({} if family == "mt5" else {"scale_decoder_outputs": model.scales_logits}),
    }


# ---- Llama, Qwen3, Mistral ----


def llama_fields(hf_config: Mapping[str, Any], family: str) -> dict[str, Any]:
    """The keys of Llama, Qwen3, Mistral as model fields."""
    heads = positive_int(hf_config, "num_attention_heads")
    biases = one_of(hf_config, "attention_bias", (False, True) if family == "llama" else (False,), False)
    if family == "llama":
        one_of(hf_config, "mlp_bias", (biases,), False, f"attention_bias={biases}: both or neither")
    window = (
        hf_config.get("sliding_window", 4096) and positive_int(hf_config, "sliding_window", 4096)
        if family == "mistral"
        else None
    )
    if family == "qwen3":
        one_of(hf_config, "use_sliding_window", (False,), False)
    layers = hf_config.get("layer_types")
    same = "sliding_attention" if family == "mistral" and window else "full_attention"
    if layers and set(layers) != {same}:
        raise CheckpointError(f"config.json: layer_types={sorted(set(layers))} must all be {same} for {family}")
    return {
        "num_layers": positive_int(hf_config, "num_hidden_layers"),
        "model_dim": positive_int(hf_config, "hidden_size"),
        "num_heads": heads,
        "num_kv_heads": _zero_if(heads, positive_int(hf_config, "num_key_value_heads", heads)),
        "head_dim": positive_int(
            hf_config, "head_dim", 128 if family == "qwen3" else positive_int(hf_config, "hidden_size") // heads
        ),
        "mlp_dim": positive_int(hf_config, "intermediate_size"),
        "mlp": activation(hf_config, "hidden_act", family, "silu"),
        "norm_epsilon": nonnegative(hf_config, "rms_norm_eps", 1e-6),
        "biases": biases,
        "attention_window": (window or 0) if family == "mistral" else 0,
        "tied_embeddings": one_of(hf_config, "tie_word_embeddings", (False, True), False),
        "init": "gpt2",
        "rotary": rope_config.rotary_of(hf_config),
    }


def llama_keys(family: str, config: Config) -> dict[str, Any]:
    """The keys of Llama, Qwen3, Mistral for a model."""
    model = config.model
    longest = max(config.row_length, math.ceil(model.rotary.original_length * model.rotary.factor))
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.model_dim,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.mlp_dim,
        "hidden_act": name_of(family, model.mlp),
        "rms_norm_eps": model.norm_epsilon,
        **({"attention_bias": model.biases} if family != "mistral" else {}),
        **({"mlp_bias": model.biases} if family in ("llama", "eurobert") else {}),
        **({"sliding_window": model.attention_window or None} if family == "mistral" else {}),
        **({"use_sliding_window": False, "sliding_window": None} if family == "qwen3" else {}),
        **dropout_keys(family, model.dropout_rate),
        "max_position_embeddings": longest,
        "tie_word_embeddings": model.tied_embeddings,
        "rope_theta": model.rotary.base,
        "rope_parameters": rope_config.config_of(model.rotary),
    }


# ---- GPT-2, BERT ----


def gpt2_fields(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of GPT-2 as model fields."""
    for key, required in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        one_of(hf_config, key, (required,), required)
    dim, heads = positive_int(hf_config, "n_embd", 768), positive_int(hf_config, "n_head", 12)
    return {
        "num_layers": positive_int(hf_config, "n_layer", 12),
        "model_dim": dim,
        "num_heads": heads,
        "head_dim": dim // heads,
        "mlp_dim": positive_int(hf_config, "n_inner", 4 * dim),
        "mlp": activation(hf_config, "activation_function", "gpt2", "gelu_new"),
        "norm_epsilon": nonnegative(hf_config, "layer_norm_epsilon", 1e-5),
        "max_length": positive_int(hf_config, "n_positions", 1024),
        "dropout_rate": nonnegative(hf_config, "resid_pdrop", 0.1),
        "tied_embeddings": one_of(hf_config, "tie_word_embeddings", (True, False), True),
        "init": "gpt2",
    }


def gpt2_keys(config: Config) -> dict[str, Any]:
    """The keys of GPT-2 for a model."""
    model = config.model
    return {
        "n_layer": model.num_layers,
        "n_embd": model.model_dim,
        "n_head": model.num_heads,
        "n_inner": model.mlp_dim,
        "n_positions": model.max_length,
        "activation_function": name_of("gpt2", model.mlp),
        "layer_norm_epsilon": model.norm_epsilon,
        **dropout_keys("gpt2", model.dropout_rate),
        "tie_word_embeddings": model.tied_embeddings,
    }


def bert_fields(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of BERT as model fields."""
    one_of(hf_config, "position_embedding_type", ("absolute", None), None)
    one_of(hf_config, "tie_word_embeddings", (True,), True)
    dim, heads = positive_int(hf_config, "hidden_size", 768), positive_int(hf_config, "num_attention_heads", 12)
    return {
        "num_layers": positive_int(hf_config, "num_hidden_layers", 12),
        "model_dim": dim,
        "num_heads": heads,
        "head_dim": dim // heads,
        "mlp_dim": positive_int(hf_config, "intermediate_size", 3072),
        "mlp": activation(hf_config, "hidden_act", "bert", "gelu"),
        "norm_epsilon": nonnegative(hf_config, "layer_norm_eps", 1e-12),
        "max_length": positive_int(hf_config, "max_position_embeddings", 512),
        "token_types": positive_int(hf_config, "type_vocab_size", 2),
        "dropout_rate": nonnegative(hf_config, "hidden_dropout_prob", 0.1),
        "init": "bert",
    }


def bert_keys(config: Config) -> dict[str, Any]:
    """The keys of BERT for a model."""
    model = config.model
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.model_dim,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.mlp_dim,
        "hidden_act": name_of("bert", model.mlp),
        "layer_norm_eps": model.norm_epsilon,
        "max_position_embeddings": model.max_length,
        "type_vocab_size": model.token_types,
        **dropout_keys("bert", model.dropout_rate),
        "tie_word_embeddings": True,
    }


# ---- Shared by families ----


def mlps(family: str) -> dict[str, str]:
    """The names of the family's activations -> model.mlp."""
    layout = "t5" if family in ENCODER_DECODERS else "llama" if family in LIKE_LLAMA else family
    return MLPS.get(layout, _PLAIN)


def name_of(family: str, mlp: str) -> str:
    """The family's name of an activation."""
    return next(name for name, value in mlps(family).items() if value == mlp)


def activation(hf_config: Mapping[str, Any], key: str, family: str, default: str) -> str:
    """`model.mlp` of a key with the name of an activation."""
    names = mlps(family)
    return names[one_of(hf_config, key, tuple(names), default)]


def _zero_if(default: int, value: int) -> int:
    """0 for the default value, as in `ModelConfig`."""
    return 0 if value == default else value
