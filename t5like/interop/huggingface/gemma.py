"""Gemma 2 and 3, T5Gemma 1 and 2: their config.json as fields of `ModelConfig`, and back. Part of `families`.

Only text: the images that T5Gemma 2 also reads are not supported, and its vision tower is not imported. transformers
5.24 is the reference; a missing key has the default of its config classes. Both stacks of an encoder-decoder have one
set of norms, activation and positions here, so that a config.json in which they differ is refused.
"""

from collections.abc import Callable, Mapping
from typing import Any

from t5like.config.model_schema import ModelConfig, RotaryConfig
from t5like.config.schema import Config
from t5like.errors import CheckpointError
from t5like.interop.huggingface import rope_config
from t5like.interop.huggingface.config_keys import layer_count, nonnegative, one_of, positive_int
from t5like.interop.huggingface.weight_maps import GEMMAS as DECODERS
from t5like.interop.huggingface.weight_maps import T5GEMMAS as ENCODER_DECODERS

FAMILIES = (*DECODERS, *ENCODER_DECODERS)
TWO_BASES = ("gemma3_text", "t5gemma2")  # families with another rotary base in local layers
ACTIVATION = "gelu_pytorch_tanh"
LOCAL, GLOBAL = "sliding_attention", "full_attention"
# Period of the pattern where layer_types is absent: the last layer of each period is global.
PERIOD = {"gemma2": 2, "gemma3_text": 6, "t5gemma": 2, "t5gemma2": 6}
DEFAULTS: dict[str, Any] = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
}
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}  # of Gemma 2 and T5Gemma; the others have none
SIZES = {
    "hidden_size": "model_dim",
    "intermediate_size": "mlp_dim",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
}

_GEMMA = {
    "positions": "rotary",
    "norm": "rms",
    "norm_position": "sandwich",
    "norm_offset": True,
    "embedding_norm": False,
    "first_attention_norm": True,
    "embedding_scale": "sqrt_dim",
    "biases": False,
    "mlp": "gated_gelu",
    "mlp_pattern": (),
    "scale_attention": True,
}
_GEMMA_2 = {**_GEMMA, "qk_norm": False}
_GEMMA_3 = {**_GEMMA, "qk_norm": True, "attention_softcap": 0.0}
FIXED: dict[str, dict[str, Any]] = {  # as `families.FIXED`
    "gemma2": {"architecture": "decoder", **_GEMMA_2},
    "gemma3_text": {"architecture": "decoder", **_GEMMA_3},
    "t5gemma": {
        "architecture": "encoder_decoder",
        **_GEMMA_2,
        "separate_embeddings": True,
        "merged_attention": False,
    },
    "t5gemma2": {
        "architecture": "encoder_decoder",
        **_GEMMA_3,
        "separate_embeddings": False,
        "merged_attention": True,
        "tied_embeddings": True,
        "decoder_model_dim": 0,
    },
}
# The smallest vision tower that transformers accepts: T5Gemma 2 has one also in a model of text.
NO_VISION = {
    "model_type": "siglip_vision_model",
    "num_hidden_layers": 0,
    "hidden_size": 1,
    "intermediate_size": 1,
    "num_attention_heads": 1,
    "image_size": 16,
    "patch_size": 1,
}


# ---- config.json -> fields ----


def fields(hf_config: Mapping[str, Any], family: str) -> dict[str, Any]:
    """The keys of a Gemma or T5Gemma as model fields."""
    encoder, decoder = _stacks(hf_config, family)
    for stack in (encoder, decoder):
        _check_stack(stack, family)
    alike = ("rms_norm_eps", "attn_logit_softcapping") if family == "t5gemma" else ("rms_norm_eps",)
    for key in alike:
        _same(key, encoder.get(key), decoder.get(key))
    pattern, windows = _pattern(family, [encoder, decoder])
    rotary = _rotary(decoder, family, local="local" in pattern)
    _same("rope_parameters", _rotary(encoder, family, local="local" in pattern), rotary)
    of_encoder, of_decoder = _sizes(encoder), _sizes(decoder)
    result = {
        **of_encoder,
        "num_layers": encoder["num_hidden_layers"],
        "norm_epsilon": nonnegative(decoder, "rms_norm_eps"),
        "attention_scale_dim": _scale_dim(encoder, decoder),
        "logits_softcap": nonnegative(decoder, "final_logit_softcapping", 0.0),
        "layer_pattern": pattern,
        "attention_window": windows[-1],
        "rotary": rotary,
        "tied_embeddings": one_of(hf_config, "tie_word_embeddings", (True, False)[: 1 + (family != "t5gemma2")], True),
        "init": "gpt2",
    }
    if family not in TWO_BASES:
        result["attention_softcap"] = nonnegative(decoder, "attn_logit_softcapping", 0.0)
    if family in DECODERS:
        return result
    differing = {f"decoder_{name}": size for name, size in of_decoder.items() if size != of_encoder[name]}
    layers = decoder["num_hidden_layers"]
    behind, ahead = encoder_window(family, windows[0])
    return result | {
        **differing,
        "num_decoder_layers": 0 if layers == encoder["num_hidden_layers"] else layers,
        "encoder_window": behind,
        "encoder_window_ahead": 0 if ahead == behind else ahead,
        "dropout_rate": nonnegative(hf_config, "dropout_rate", 0.0),
    }


def vocabulary_rows(hf_config: Mapping[str, Any], family: str) -> Any:
    """`vocab_size`, which the stacks of a T5Gemma have too."""
    encoder, decoder = (stack.get("vocab_size", hf_config.get("vocab_size")) for stack in _stacks(hf_config, family))
    _same("vocab_size", encoder, decoder)
    return encoder


def encoder_window(family: str, window: int) -> tuple[int, int]:
    """Limits of an encoder's local layers as in `masks.window_mask`, for a `sliding_window`; 0, 0 without one.

    In T5Gemma the distance is at most the window, in both directions; T5Gemma 2 divides it among the directions.
    """
    if not window:
        return 0, 0
    return (window + 1, window + 1) if family == "t5gemma" else ((window + 1) // 2, window // 2 + 1)


def _stacks(hf_config: Mapping[str, Any], family: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of encoder and decoder with defaults; a decoder-only model's are both."""
    defaults = DEFAULTS if family in TWO_BASES else {**DEFAULTS, **CAPS}
    if family in DECODERS:
        return ({**defaults, **hf_config},) * 2
    encoder, decoder = (dict(hf_config.get(name) or {}) for name in ("encoder", "decoder"))
    encoder = dict(encoder.get("text_config") or {}) if family == "t5gemma2" else encoder
    return {**defaults, **encoder}, {**defaults, **decoder}


def _check_stack(stack: Mapping[str, Any], family: str) -> None:
    one_of(stack, "attention_bias", (False,), False)
    one_of(stack, "hidden_activation", (ACTIVATION,), ACTIVATION)
    one_of(stack, "use_bidirectional_attention", (False, None), None)
    if family in TWO_BASES:  # transformers has the key, and ignores it
        one_of(stack, "attn_logit_softcapping", (None,), None)


def _same(key: str, encoder: Any, decoder: Any) -> None:
    if encoder != decoder:
        raise CheckpointError(f"config.json: {key} must be the same in both stacks, not {encoder} and {decoder}")


def _sizes(stack: Mapping[str, Any]) -> dict[str, int]:
    return {name: positive_int(stack, key) for key, name in SIZES.items()}


def _scale_dim(encoder: Mapping[str, Any], decoder: Mapping[str, Any]) -> int:
    """`query_pre_attn_scalar`; 0 where it is head_dim in both stacks."""
    scalars = [positive_int(stack, "query_pre_attn_scalar") for stack in (encoder, decoder)]
    if scalars == [encoder["head_dim"], decoder["head_dim"]]:
        return 0
    _same("query_pre_attn_scalar", *scalars)
    return scalars[0]


def _pattern(family: str, stacks: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[int]]:
    """`layer_pattern`, and each stack's window: the shortest pattern that gives all layers of both."""
    lists = []
    for stack in stacks:
        count = layer_count(stack)
        period = stack.get("sliding_window_pattern") or PERIOD[family]
        types = stack.get("layer_types") or [GLOBAL if (y + 1) % period == 0 else LOCAL for y in range(count)]
        if len(types) != count or set(types) - {LOCAL, GLOBAL}:
            raise CheckpointError(f"config.json: layer_types must be {count} times {LOCAL} or {GLOBAL}")
        lists.append(["local" if name == LOCAL else "global" for name in types])
    kinds = {kind for types in lists for kind in types}
    windows = [positive_int(stack, "sliding_window") if "local" in kinds else 0 for stack in stacks]
    if len(kinds) == 1:
        if "local" in kinds and family in TWO_BASES:
            raise CheckpointError(f"config.json: layer_types must contain {GLOBAL} in a {family}")
        return (), windows
    repeats = lambda types, length: len(types) % length == 0 and types == types[:length] * (len(types) // length)
    for length in range(1, min(map(len, lists)) + 1):
        pattern = lists[0][:length]
        if all(types[:length] == pattern and repeats(types, length) for types in lists):
            return tuple(pattern), windows
    raise CheckpointError("config.json: layer_types of encoder and decoder must repeat one pattern")


def _rotary(stack: Mapping[str, Any], family: str, *, local: bool) -> RotaryConfig:
    """The section `model.rotary`: of global layers, with the base of local ones."""
    if family not in TWO_BASES:
        return rope_config.rotary_of(stack)
    by_type = stack.get("rope_parameters") or {}
    in_global, in_local = (dict(by_type.get(name) or {}) for name in (GLOBAL, LOCAL))
    in_global = {"rope_theta": stack.get("rope_theta", 1e6), **(stack.get("rope_scaling") or {}), **in_global}
    in_local = {"rope_theta": stack.get("rope_local_base_freq", 1e4), **in_local}
    one_of(in_local, "rope_type", ("default",), "default", f"rope_parameters.{LOCAL}")
    rest = {key: stack[key] for key in ("max_position_embeddings",) if key in stack}
    rotary = rope_config.rotary_of({**rest, "rope_parameters": in_global})
    base = rope_config.base_of(in_local)
    return RotaryConfig(**{**vars(rotary), "local_base": base if local else 0.0})


# ---- Fields -> config.json ----


def keys(family: str, config: Config, rows: int, special: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a Gemma or T5Gemma for a model.

    Args:
        rows: of the embedding.
        special: keys of special tokens, which each stack of a T5Gemma has too.
    """
    model = config.model
    own = {"vocab_size": rows, **special}
    tied = {"tie_word_embeddings": model.tied_embeddings}
    if family in DECODERS:
        return _stack_keys(family, config, model, model.num_layers) | tied | {"attention_dropout": model.dropout_rate}
    encoder = _stack_keys(family, config, model, model.num_layers, encoder=True) | own
    decoder = _stack_keys(family, config, model.in_decoder, model.decoder_layers) | own
    if family == "t5gemma2":
        text = {"model_type": "t5gemma2_text", **encoder}
        encoder = {"model_type": "t5gemma2_encoder", "text_config": text, "vision_config": NO_VISION}
        encoder |= {"mm_tokens_per_image": 256}
        decoder |= {"model_type": "t5gemma2_decoder"}
    else:
        encoder, decoder = ({"model_type": "t5_gemma_module", **stack} for stack in (encoder, decoder))
    return {
        "encoder": encoder,
        "decoder": decoder,
        "is_encoder_decoder": True,
        "dropout_rate": model.dropout_rate,
        **tied,
    }


def _stack_keys(
    family: str, config: Config, model: ModelConfig, layers: int, *, encoder: bool = False
) -> dict[str, Any]:
    window = _sliding_window(family, model) if encoder else model.attention_window
    pattern = model.layer_pattern or (("local",) if model.attention_window else ("global",))
    longest = max(config.row_length, round(model.rotary.original_length * model.rotary.factor))
    rope = rope_config.config_of(model.rotary)
    if family in TWO_BASES:
        local = {"rope_type": "default", "rope_theta": model.rotary.local_base or 1e4}
        rope = {GLOBAL: rope, LOCAL: local}
    return {
        **{key: getattr(model, "kv_heads" if name == "num_kv_heads" else name) for key, name in SIZES.items()},
        "num_hidden_layers": layers,
        "hidden_activation": ACTIVATION,
        "rms_norm_eps": model.norm_epsilon,
        "attention_bias": False,
        "query_pre_attn_scalar": model.attention_scale_dim or model.head_dim,
        "sliding_window": window or DEFAULTS["sliding_window"],
        "layer_types": [LOCAL if pattern[y % len(pattern)] == "local" else GLOBAL for y in range(layers)],
        "attn_logit_softcapping": model.attention_softcap or None,
        "final_logit_softcapping": model.logits_softcap or None,
        "max_position_embeddings": longest,
        "rope_parameters": rope,
    }


def _sliding_window(family: str, model: ModelConfig) -> int:
    """`sliding_window` of an encoder: the inverse of `encoder_window`."""
    behind, ahead = model.window(causal=False)
    return max(behind - 1 if family == "t5gemma" else behind + ahead - 1, 0)


def check_exportable(family: str, model: ModelConfig, require: Callable[..., None]) -> None:
    """Refuse windows, and rotary bases, that the family can't represent; `require` is that of `families`."""
    if family in TWO_BASES:
        only_local = model.attention_window > 0 and not model.layer_pattern
        require(family, not only_local, "model.layer_pattern", "no pattern", "global layers; use local,global")
    elif model.rotary.local_base:
        require(
            family,
            model.rotary.local_base == model.rotary.base,
            "model.rotary.local_base",
            model.rotary.local_base,
            "the same base in all layers; use 0",
        )
    if family in ENCODER_DECODERS:
        window, expected = model.window(causal=False), encoder_window(family, _sliding_window(family, model))
        require(
            family,
            window == expected,
            "model.encoder_window",
            f"{window[0]} with model.encoder_window_ahead={window[1]}",
            f"{expected[0]} and {expected[1]}",
        )
