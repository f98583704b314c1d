"""The supported families of Hugging Face models: their config.json as a `ModelConfig` and back.

A model that a family cannot represent is refused, naming the field. `family_keys` has the keys of each family.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from t5like.config.model_schema import DECODER_SIZES, ModelConfig
from t5like.config.schema import Config
from t5like.errors import CheckpointError
from t5like.interop.huggingface import encoder_keys, family_keys, gemma, label_heads
from t5like.interop.huggingface.config_keys import one_of
from t5like.interop.huggingface.weight_maps import DECODERS, ENCODER_DECODERS, GEMMAS, T5GEMMAS

FAMILIES = (*ENCODER_DECODERS, *DECODERS, "gpt2", "bert", "modernbert", "eurobert", *gemma.FAMILIES)
ARCHITECTURES = {
    "t5": "T5ForConditionalGeneration",
    "mt5": "MT5ForConditionalGeneration",
    "umt5": "UMT5ForConditionalGeneration",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "bert": "BertForPreTraining",
    "modernbert": "ModernBertForMaskedLM",
    "eurobert": "EuroBertForMaskedLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "t5gemma": "T5GemmaForConditionalGeneration",
    "t5gemma2": "T5Gemma2ForConditionalGeneration",
}
EXPERTS = "experts are not supported; use a dense model, such as "
REFUSED = {  # known families that are not supported -> why, and what works
    "switch_transformers": f"{EXPERTS}t5",
    "mixtral": f"{EXPERTS}mistral",
    "gemma3": "models with images are not supported; save the text part as gemma3_text: in transformers "
    "AutoModelForImageTextToText.from_pretrained(DIR).model.language_model.save_pretrained(NEW), and its tokenizer",
}

_WITHOUT = {  # what only Gemma has
    "norm_offset": False,
    "embedding_scale": "none",
    "attention_scale_dim": 0,
    "attention_softcap": 0.0,
    "logits_softcap": 0.0,
    "encoder_window": 0,
    "encoder_window_ahead": 0,
}
_ALIKE = {**_WITHOUT, "layer_pattern": (), "mlp_pattern": (), "first_attention_norm": True}  # of all but ModernBERT
# Fields that are the same in all models of a family: an import sets them, an export refuses other values.
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
    "attention_window": 0,
    **{f"decoder_{name}": 0 for name in DECODER_SIZES},
    "separate_embeddings": False,
    "merged_attention": False,
    **_ALIKE,
}
_DECODER = {**_ALIKE, "norm_position": "pre", "embedding_norm": False, "scale_attention": True}
_LLAMA = {"architecture": "decoder", "positions": "rotary", **_DECODER, "norm": "rms", "mlp": "gated_silu"}
_ENCODER = {**_LLAMA, "architecture": "encoder", "qk_norm": False, "token_types": 0}
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
        "norm_bias": True,
        "biases": True,
        "qk_norm": False,
        "attention_window": 0,
        "num_kv_heads": 0,
    },
    "bert": {
        "architecture": "encoder",
        "positions": "learned",
        "norm": "layer",
        "norm_bias": True,
        "norm_position": "post",
        "embedding_norm": True,
        "biases": True,
        "tied_embeddings": True,
        "scale_attention": True,
        "qk_norm": False,
        "num_kv_heads": 0,
        "head": "mlm",
        "attention_window": 0,
        **_ALIKE,
    },
    "eurobert": {**_ENCODER, "head": "plain", "biases": False, "attention_window": 0},
    "modernbert": {
        "architecture": "encoder",
        "positions": "rotary",
        "norm": "layer",
        "norm_position": "pre",
        "embedding_norm": True,
        "first_attention_norm": False,
        "scale_attention": True,
        "qk_norm": False,
        "num_kv_heads": 0,
        "head": "mlm",
        "token_types": 0,
        "mlp_pattern": (),
        **_WITHOUT,
    },
    **gemma.FIXED,
}

_FIELDS = {
    "gpt2": family_keys.gpt2_fields,
    "bert": family_keys.bert_fields,
    "modernbert": encoder_keys.modernbert_fields,
    "eurobert": encoder_keys.eurobert_fields,
}
_KEYS = {
    "gpt2": family_keys.gpt2_keys,
    "bert": family_keys.bert_keys,
    "modernbert": encoder_keys.modernbert_keys,
    "eurobert": encoder_keys.eurobert_keys,
}


def model_of(hf_config: Mapping[str, Any], *, untied: bool, next_sentence_head: bool) -> tuple[str, ModelConfig]:
    """The family and the model of a config.json.

    Args:
        hf_config: the parsed file.
        untied: whether the weights contain an output head that differs from the embedding.
        next_sentence_head: whether the weights contain BERT's pooler and next-sentence classifier.

    Raises:
        CheckpointError: the value of a key is not supported; names key, value and supported values.
    """
    family = hf_config.get("model_type")
    if isinstance(family, str) and family in REFUSED:
        raise CheckpointError(f"config.json: model_type={family!r}: {REFUSED[family]}")
    if family not in FAMILIES:
        raise CheckpointError(f"config.json: model_type={family!r} is not one of {', '.join(FAMILIES)}")
    for key in ("quantization_config", "add_cross_attention", "is_decoder"):
        one_of(hf_config, key, (None, False), None)
    try:
        if family in ENCODER_DECODERS:
            fields = family_keys.t5_fields(hf_config, family, untied=untied)
        elif family in DECODERS:
            fields = family_keys.llama_fields(hf_config, family)
        elif family in gemma.FAMILIES:
            fields = gemma.fields(hf_config, family)
        else:
            fields = _FIELDS[family](hf_config)
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"config.json does not have the form that transformers writes: {error}") from None
    if family == "bert":
        fields["next_sentence_head"] = next_sentence_head
    return family, ModelConfig(**{**FIXED[family], **fields})


def vocabulary_rows(family: str, hf_config: Mapping[str, Any]) -> Any:
    """`vocab_size`, the rows of the embedding, as the file has it."""
    return gemma.vocabulary_rows(hf_config, family) if family in gemma.FAMILIES else hf_config.get("vocab_size")


def check_exportable(family: str, config: Config) -> None:
    """Refuse a model that the family can't represent.

    Raises:
        CheckpointError: names the field, its value, and the values that the family supports.
    """
    label_heads.check_exportable(family, config)
    model = config.model
    full_attention = model.num_kv_heads == model.num_heads  # the same as 0
    for field, required in FIXED[family].items():
        value = 0 if field == "num_kv_heads" and full_attention else getattr(model, field)
        text = lambda value: (",".join(value) or "no pattern") if isinstance(value, tuple) else value
        _require(family, value == required, f"model.{field}", text(getattr(model, field)), text(required))
    activations = set(family_keys.mlps(family).values())
    _require(family, model.mlp in activations, "model.mlp", model.mlp, " or ".join(sorted(activations)))
    if family in gemma.FAMILIES:
        gemma.check_exportable(family, model, _require)
    if family in ("gpt2", "bert", "modernbert"):
        joined = model.num_heads * model.head_dim
        _require(family, joined == model.model_dim, "model.head_dim", model.head_dim, "model_dim / num_heads")
    if family == "bert":
        _require(family, model.token_types > 0, "model.token_types", model.token_types, "1 or more; use 2")
    if family not in ("t5", "umt5"):
        scaled = f"{model.logits_scale} (model_dim, as embeddings are tied and model.init=t5)"
        _require(family, not model.scales_logits, "model.logits_scale", scaled, "none")
    if model.architecture == "decoder" and config.data.objective != ("causal_lm",) and not config.data.messages_field:
        # In these families the tokens of a prompt only attend to earlier tokens.
        bidirectional = [name for name in config.data.objective if name != "causal_lm"]
        _require(
            family, not bidirectional, "data.objective", ",".join(bidirectional), "causal_lm, whose prompts are causal"
        )


def numeric_fields(model: ModelConfig) -> dict[str, Any]:
    """The fields that a family's config.json represents, normalized: equal if two models compute the same."""
    fields = dataclasses.asdict(model)
    for name in ("init", "attention_init", "dropout_rate", "vocab_multiple", "dtype", "layers", "kernels", "remat"):
        del fields[name]
    del fields["scalar_head"]  # no family has one, and no logits depend on it
    fields["logits_scale"] = model.scales_logits
    fields["num_kv_heads"] = model.kv_heads
    fields["norm_bias"] = model.norm == "layer" and model.norm_bias
    fields["attention_scale_dim"] = model.scale_attention and (model.attention_scale_dim or model.head_dim)
    fields["encoder_window"] = model.window(causal=False) if model.has_encoder else None
    del fields["encoder_window_ahead"]
    fields["num_decoder_layers"] = model.decoder_layers
    fields |= {f"decoder_{name}": getattr(model.in_decoder, name) for name in DECODER_SIZES}
    fields["decoder_num_kv_heads"] = model.in_decoder.kv_heads
    if model.architecture != "encoder_decoder":
        fields = {name: value for name, value in fields.items() if not name.startswith(("decoder_", "num_decoder"))}
    if not model.has_next_sentence_head:
        del fields["next_sentence_head"]
    fields |= {f"rotary.{name}": value for name, value in fields.pop("rotary").items()}
    prefixes_of = {"relative": ("relative_",), "rotary": ("rotary.",), "learned": ("max_length",)}
    unused = [prefix for positions, names in prefixes_of.items() if positions != model.positions for prefix in names]
    if model.positions == "rotary":
        fields_of = {
            "llama3": ("low_frequency_factor", "high_frequency_factor", "original_length"),
            "yarn": ("beta_slow", "beta_fast", "attention_factor", "original_length"),
        }
        used = fields_of.get(model.rotary.scaling, ())
        unused += [f"rotary.{name}" for names in fields_of.values() for name in names if name not in used]
    return {name: value for name, value in fields.items() if not name.startswith(tuple(unused))}


def default_family(model: ModelConfig) -> str:
    """The family for the export of a model that was not imported."""
    if model.norm_position == "sandwich":
        by_attention = {"decoder": GEMMAS, "encoder_decoder": T5GEMMAS}
        return by_attention.get(model.architecture, ("bert", "bert"))[model.qk_norm]
    if model.architecture == "encoder_decoder":
        return "umt5" if model.relative_bias == "per_layer" else "t5"
    if model.architecture == "encoder":
        return ("modernbert" if model.head == "mlm" else "eurobert") if model.positions == "rotary" else "bert"
    if model.positions == "learned":
        return "gpt2"
    return "qwen3" if model.qk_norm else "mistral" if model.attention_window else "llama"


def config_of(
    family: str,
    config: Config,
    *,
    rows: int,
    eos: int | list[int],
    pad: int,
    dtype: str,
    special_ids: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The config.json of a model that `check_exportable` accepts.

    Args:
        rows: of the written embedding.
        eos: the id, or ids, that end a text.
        pad: the padding id.
        dtype: of the weights, such as float32.
        special_ids: of an encoder's cls, sep and mask.
    """
    if family in ENCODER_DECODERS:
        keys = family_keys.t5_keys(family, config)
    elif family in DECODERS:
        keys = family_keys.llama_keys(family, config)
    elif family in gemma.FAMILIES:
        special = {"bos_token_id": None, "eos_token_id": eos, "pad_token_id": pad}
        keys = gemma.keys(family, config, rows, special)
    else:
        keys = _KEYS[family](config)
    architecture = ARCHITECTURES[family]
    if family == "bert":
        architecture = architecture if config.model.has_next_sentence_head else "BertForMaskedLM"
    return {
        "model_type": family,
        "architectures": [architecture],
        **keys,
        "vocab_size": rows,
        **(
            {"decoder_start_token_id": config.tokenizer.decoder_start_id}
            if config.model.architecture == "encoder_decoder"
            else {}
        ),
        "bos_token_id": None,
        "eos_token_id": eos,
        "pad_token_id": pad,
        **encoder_keys.special_ids(family, special_ids or {}),
        "dtype": dtype,
        "torch_dtype": dtype,
        **label_heads.keys(config),
    }


def _require(family: str, holds: bool, field: str, value: Any, required: Any) -> None:
    if not holds:
        raise CheckpointError(
            f"{field}={value} can't be represented by {family}, which requires {required}; see --family"
        )
