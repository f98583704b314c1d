"""The keys of ModernBERT's and EuroBERT's config.json as fields of `ModelConfig`, and back.

As `family_keys`, which has those of the older families. Sources: transformers 5.24, `modular_modernbert.py` and
`modular_eurobert.py`. A config.json of transformers 4 has ModernBERT's layers and rotary bases under other keys
(`global_attn_every_n_layers`, `global_rope_theta`, `local_rope_theta`); both are read.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from t5like.config.model_schema import RotaryConfig
from t5like.config.schema import Config
from t5like.errors import CheckpointError
from t5like.interop.huggingface import family_keys, rope_config
from t5like.interop.huggingface.config_keys import layer_count, nonnegative, one_of, positive_int

KINDS = {"sliding_attention": "local", "full_attention": "global"}  # of `layer_types` -> of `model.layer_pattern`


# ---- ModernBERT ----


def modernbert_fields(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ModernBERT as model fields."""
    biases = one_of(hf_config, "attention_bias", (False, True), False)
    for key in ("mlp_bias", "classifier_bias"):
        one_of(hf_config, key, (biases,), False, f"attention_bias={biases}")
    one_of(hf_config, "decoder_bias", (True,), True)
    activation = hf_config.get("hidden_activation", "gelu")
    one_of(hf_config, "classifier_activation", (activation,), "gelu", f"hidden_activation={activation}")
    dim, heads = positive_int(hf_config, "hidden_size", 768), positive_int(hf_config, "num_attention_heads", 12)
    layers = layer_count(hf_config, 22)
    kinds = _kinds(hf_config, layers)
    bases = {kind: _rotary(hf_config, kind) for kind in KINDS}
    # Of transformers: the keys on both sides together. The query itself is not one of them there, but in t5like.
    window = positive_int(hf_config, "local_attention", 128) // 2 + 1
    fields = {
        "num_layers": layers,
        "model_dim": dim,
        "num_heads": heads,
        "head_dim": dim // heads,
        "mlp_dim": positive_int(hf_config, "intermediate_size", 1152),
        "mlp": family_keys.activation(hf_config, "hidden_activation", "modernbert", "gelu"),
        "norm_epsilon": nonnegative(hf_config, "norm_eps", 1e-5),
        "norm_bias": one_of(hf_config, "norm_bias", (False, True), False),
        "biases": biases,
        "dropout_rate": nonnegative(hf_config, "mlp_dropout", 0.0),
        "tied_embeddings": one_of(hf_config, "tie_word_embeddings", (True, False), True),
        "init": "gpt2",
    }
    if len(set(kinds)) == 1:
        own = window if kinds[0] == "sliding_attention" else 0
        return fields | {"rotary": bases[kinds[0]], "attention_window": own}
    rotary, local = bases["full_attention"], bases["sliding_attention"]
    if local.scaling != "none":
        where = "rope_parameters.sliding_attention.rope_type"
        raise CheckpointError(f"config.json: {where}={local.scaling!r} must be default")
    if local != rotary:
        rotary = dataclasses.replace(rotary, local_base=local.base)
    pattern = tuple(KINDS[kind] for kind in kinds[: _period(kinds)])
    return fields | {"rotary": rotary, "attention_window": window, "layer_pattern": pattern}


def _kinds(hf_config: Mapping[str, Any], layers: int) -> list[str]:
    """The kind of attention of each layer."""
    kinds = hf_config.get("layer_types")
    if kinds is None:
        every = positive_int(hf_config, "global_attn_every_n_layers", 3)
        return ["sliding_attention" if y % every else "full_attention" for y in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= set(KINDS):
        raise CheckpointError(f"config.json: layer_types must be {layers} of {' and '.join(KINDS)}")
    return kinds


def _period(kinds: Sequence[str]) -> int:
    """The length of the shortest pattern whose repetition makes all layers; all of them if it does not fit evenly."""
    layers = len(kinds)
    return next(n for n in range(1, layers + 1) if layers % n == 0 and list(kinds[:n]) * (layers // n) == list(kinds))


def _rotary(hf_config: Mapping[str, Any], kind: str) -> RotaryConfig:
    """The rotary positions of the layers of one kind."""
    parameters = dict((hf_config.get("rope_parameters") or {}).get(kind) or {})
    older = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}[kind]
    theta = hf_config.get(older, 160_000.0 if kind == "full_attention" else 10_000.0)
    theta = hf_config.get("global_rope_theta", 160_000.0) if theta is None else theta  # null: as the global layers
    return rope_config.rotary_of({**hf_config, "rope_parameters": {"rope_theta": theta, **parameters}})


def modernbert_keys(config: Config) -> dict[str, Any]:
    """The keys of ModernBERT for a model."""
    model = config.model
    pattern = model.layer_pattern or ("local" if model.attention_window else "global",)
    names = {name: kind for kind, name in KINDS.items()}
    kinds = [names[pattern[y % len(pattern)]] for y in range(model.num_layers)]
    rope = rope_config.config_of(dataclasses.replace(model.rotary, local_base=0.0))
    local = {"rope_type": "default", "rope_theta": model.rotary.local_base} if model.rotary.local_base else rope
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.model_dim,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.mlp_dim,
        "hidden_activation": family_keys.name_of("modernbert", model.mlp),
        "classifier_activation": family_keys.name_of("modernbert", model.mlp),
        "norm_eps": model.norm_epsilon,
        "norm_bias": model.norm_bias,
        "attention_bias": model.biases,
        "mlp_bias": model.biases,
        "classifier_bias": model.biases,
        "decoder_bias": True,
        "layer_types": kinds,
        "local_attention": max(2 * model.attention_window - 2, 1) if model.attention_window else 128,
        "rope_parameters": {"full_attention": rope, "sliding_attention": local},
        **family_keys.dropout_keys("modernbert", model.dropout_rate),
        "max_position_embeddings": _longest(config),
        "tie_word_embeddings": model.tied_embeddings,
    }


# ---- EuroBERT ----


def eurobert_fields(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of EuroBERT as model fields: those of Llama without biases."""
    for key in ("attention_bias", "mlp_bias"):
        one_of(hf_config, key, (False,), False)
    epsilon = nonnegative(hf_config, "rms_norm_eps", 1e-5)
    return {**family_keys.llama_fields(hf_config, "eurobert"), "norm_epsilon": epsilon}


def eurobert_keys(config: Config) -> dict[str, Any]:
    """The keys of EuroBERT for a model."""
    keys = family_keys.llama_keys("eurobert", config)
    return {**keys, "max_position_embeddings": _longest(config)}


def _longest(config: Config) -> int:
    rotary = config.model.rotary
    return max(config.data.inputs_length, math.ceil(rotary.original_length * rotary.factor))


# The special ids in the config.json of each family, which would otherwise be those of its released models.
_SPECIAL = {"modernbert": {"bos": "cls", "cls": "cls", "sep": "sep"}, "eurobert": {"bos": "cls", "mask": "mask"}}


def special_ids(family: str, ids: Mapping[str, int]) -> dict[str, int]:
    """The keys of the ids of cls, sep and mask that the family's config.json has; those that are known."""
    return {f"{key}_token_id": ids[role] for key, role in _SPECIAL.get(family, {}).items() if role in ids}
