"""Checks of the model section of a config: which of its fields go together.

Called by `checks`.
"""

import math

from t5like.config.model_schema import DECODER_SIZES
from t5like.config.schema import Config, get
from t5like.errors import ConfigError, shown


def check_model(config: Config) -> None:
    """Refuse a model that no machine can run; see `checks.check`."""
    for check_part in (_model, _decoder, _attention, _layer_patterns, _rotary, _lengths):
        check_part(config)


def _model(config: Config) -> None:
    model = config.model
    heads = model.kv_heads
    require(
        config,
        model.num_heads % heads == 0,
        "model.num_kv_heads",
        f"must divide model.num_heads={model.num_heads}; use {math.gcd(heads, model.num_heads)}",
    )
    require(
        config,
        model.positions != "rotary" or model.head_dim % 2 == 0,
        "model.head_dim",
        f"must be even for rotary positions; use {model.head_dim + 1}",
    )
    require(config, model.relative_buckets % 4 == 0, "model.relative_buckets", "must be a multiple of 4; use 32")
    require(
        config,
        model.relative_max_distance > model.relative_buckets // 2,
        "model.relative_max_distance",
        f"must be more than half of model.relative_buckets={model.relative_buckets}; use {4 * model.relative_buckets}",
    )
    encoder_only = model.architecture == "encoder"
    require(
        config,
        encoder_only or not model.token_types,
        "model.token_types",
        f"needs model.architecture=encoder, not {model.architecture}; use 0",
    )
    require(
        config,
        encoder_only or model.head == "plain",
        "model.head",
        f"needs model.architecture=encoder, not {model.architecture}; use plain",
    )
    require(
        config,
        model.first_attention_norm or model.norm_position != "post",
        "model.first_attention_norm",
        "needs model.norm_position=pre, not post; use true",
    )
    require(
        config,
        model.positions == "relative" or model.relative_bias == "shared",
        "model.relative_bias",
        f"needs model.positions=relative, not {model.positions}; use shared",
    )


def _decoder(config: Config) -> None:
    """Fields of a decoder that differs from the encoder, or that reads it in another way."""
    model = config.model
    sizes = [f"decoder_{name}" for name in DECODER_SIZES]
    for name in (*sizes, "separate_embeddings", "merged_attention"):
        require(
            config,
            model.architecture == "encoder_decoder" or not getattr(model, name),
            f"model.{name}",
            f"needs model.architecture=encoder_decoder, not {model.architecture}; use {type(getattr(model, name))()}",
        )
    require(
        config,
        config.tokenizer.decoder_start_id < config.tokenizer.vocab_size,
        "tokenizer.decoder_start_id",
        f"must be less than tokenizer.vocab_size={config.tokenizer.vocab_size}; use 0",
    )
    decoder = model.in_decoder
    shared = ["separate_embeddings=False"] * (not model.separate_embeddings)
    shared += [f"{name}=True" for name in ("merged_attention", "embedding_norm") if getattr(model, name)]
    shared += ["positions=learned"] * (model.positions == "learned")
    require(
        config,
        decoder.model_dim == model.model_dim or not shared,
        "model.decoder_model_dim",
        f"must be model.model_dim={model.model_dim} with model.{', '.join(shared)}; use 0",
    )
    require(
        config,
        decoder.num_heads % decoder.kv_heads == 0,
        "model.decoder_num_kv_heads",
        f"gives the decoder {decoder.kv_heads} key heads, which must divide its {decoder.num_heads} heads; "
        f"use {math.gcd(decoder.kv_heads, decoder.num_heads)}",
    )
    require(
        config,
        model.positions != "rotary" or decoder.head_dim % 2 == 0,
        "model.decoder_head_dim",
        f"must be even for rotary positions; use {decoder.head_dim + 1}",
    )


def _attention(config: Config) -> None:
    model = config.model
    require(
        config,
        model.scale_attention or not model.attention_scale_dim,
        "model.attention_scale_dim",
        "needs model.scale_attention=True; use 0",
    )
    for name in ("encoder_window", "encoder_window_ahead"):
        require(
            config,
            not getattr(model, name) or (model.has_encoder and model.attention_window > 0),
            f"model.{name}",
            "needs an encoder and model.attention_window; use 0",
        )


def _layer_patterns(config: Config) -> None:
    model, local = config.model, "local" in config.model.layer_pattern
    layers = {"model.num_layers": model.num_layers}
    if model.architecture == "encoder_decoder" and model.num_decoder_layers:
        layers["model.num_decoder_layers"] = model.num_decoder_layers
    for field, count in layers.items():
        up = -(-count // model.pattern_length) * model.pattern_length
        require(
            config,
            count % model.pattern_length == 0,
            field,
            f"must be a multiple of {model.pattern_length}, the length of the layers' pattern; use {up}",
        )
    require(
        config,
        not local or model.attention_window > 0,
        "model.attention_window",
        "must be at least 1 for the local layers of model.layer_pattern; use 1024",
    )
    require(
        config,
        local or not model.layer_pattern or model.attention_window == 0,
        "model.attention_window",
        "needs a local layer in model.layer_pattern; use 0",
    )
    require(
        config,
        not model.rotary.local_base or (local and model.positions == "rotary" and model.rotary.local_base >= 1),
        "model.rotary.local_base",
        "must be at least 1 and needs model.positions=rotary and local in model.layer_pattern; use 0",
    )
    gated = model.mlp.startswith("gated")
    require(
        config,
        all(mlp.startswith("gated") == gated for mlp in model.mlp_pattern),
        "model.mlp_pattern",
        f"must be {'gated' if gated else 'not gated'} in every layer, as model.mlp={model.mlp} is, because the layers' "
        f"parameters are stacked; use {model.mlp}",
    )


def _rotary(config: Config) -> None:
    model, rotary = config.model, config.model.rotary
    require(
        config,
        rotary.scaling == "none" or model.positions == "rotary",
        "model.rotary.scaling",
        f"needs model.positions=rotary, not {model.positions}; use none",
    )
    require(
        config,
        rotary.scaling != "none" or rotary.factor == 1,
        "model.rotary.factor",
        "needs model.rotary.scaling, such as linear; use 1.0",
    )
    require(
        config,
        rotary.scaling not in ("llama3", "yarn") or rotary.original_length > 0,
        "model.rotary.original_length",
        f"must be at least 1 for model.rotary.scaling={rotary.scaling}; use the text length of the original training",
    )
    for low, high in (("low_frequency_factor", "high_frequency_factor"), ("beta_slow", "beta_fast")):
        smallest = getattr(rotary, low)
        require(
            config,
            getattr(rotary, high) > smallest,
            f"model.rotary.{high}",
            f"must be more than model.rotary.{low}={smallest}; use {4 * smallest}",
        )


def _lengths(config: Config) -> None:
    data, model, evaluate = config.data, config.model, config.evaluate
    longest = {"decoder": config.row_length, "encoder": data.inputs_length}.get(
        model.architecture, max(data.inputs_length, data.targets_length)
    )
    require(
        config,
        longest <= model.longest_text,
        "model.max_length",
        f"must be at least the longest row, {longest}, with learned positions; use {longest}",
    )
    needed = config.row_length if model.architecture == "decoder" else data.targets_length
    if evaluate.metrics and evaluate.max_new_tokens and model.architecture == "decoder":
        needed = data.inputs_length + evaluate.max_new_tokens
    require(
        config,
        not evaluate.metrics or model.architecture == "encoder" or needed <= model.longest_text,
        "model.max_length",
        f"must be at least {needed} for inputs_length + evaluate.max_new_tokens, with learned positions; use {needed}",
    )


def require(config: Config, holds: bool, field: str, rule: str) -> None:
    if not holds:
        raise ConfigError(f"{field}={shown(get(config, field))} {rule}")
