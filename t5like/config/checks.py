"""Checks of a config that need neither devices nor data: ranges, and combinations of fields.

`config.loader.resolve` calls `check`. Each message contains the field, its value, the rule, and a value that works.
Ranges of single fields are annotations in `config.schema`; the functions here check several fields together.
"""

import dataclasses
import math
import re
from functools import cache
from typing import Any, get_type_hints

from t5like.config.schema import ARCHITECTURES, LANGUAGES, Config, DataConfig, InitConfig, Range, get, sections
from t5like.errors import ConfigError, shown
from t5like.io.paths import check_path

LEAST_RATE = 1e-9  # the product of two smaller rates can underflow to 0


@cache
def ranges(cls: type) -> dict[str, tuple[Range, Any]]:
    """Range and default of each numeric field of a section."""
    hints = get_type_hints(cls, include_extras=True)
    return {
        field.name: (limits, field.default)
        for field in dataclasses.fields(cls)
        for limits in getattr(hints[field.name], "__metadata__", ())
        if isinstance(limits, Range)
    }


def check(config: Config) -> None:
    """Refuse a config that can't run on any machine.

    Raises:
        ConfigError: with field, value, rule, and a value that works.
    """
    _ranges(config)
    check_path("data.cache_directory", config.data.cache_directory)
    if config.tokenizer.path:
        check_path("tokenizer.path", config.tokenizer.path)
    for check_part in (
        _tokenizer,
        _data,
        _objectives,
        _rates,
        _init_from,
        _evaluate,
        _model,
        _layer_patterns,
        _rotary,
        _lengths,
        _train,
        _mesh,
    ):
        check_part(config)


def _ranges(config: Config) -> None:
    """Check every number against the range of its field."""
    for section, cls in sections():
        for name, (limits, default) in ranges(cls).items():
            value = get(config, f"{section}{name}")
            items = value if isinstance(value, tuple) else (value,)
            if wrong := [item for item in items if item not in limits]:
                use = f"; use {default}" if default != () else ""
                raise ConfigError(f"{section}{name}={shown(wrong[0])} must be {limits}{use}")


def _tokenizer(config: Config) -> None:
    tokenizer = config.tokenizer
    _require(
        config,
        all(0 <= token < tokenizer.vocab_size for token in tokenizer.extra_eos_ids),
        "tokenizer.extra_eos_ids",
        f"must be token ids, at least 0 and less than tokenizer.vocab_size={tokenizer.vocab_size}; empty: none",
    )
    if tokenizer.path:  # its size is known only after loading
        _require(
            config,
            tokenizer.vocab_size > tokenizer.num_sentinels,
            "tokenizer.vocab_size",
            f"must be more than tokenizer.num_sentinels={tokenizer.num_sentinels}; use the size of tokenizer.path",
        )
        return
    smallest = 3 + 256 + tokenizer.num_sentinels
    _require(
        config,
        tokenizer.vocab_size > smallest,
        "tokenizer.vocab_size",
        f"must be more than {smallest} (3 special ids, 256 bytes, {tokenizer.num_sentinels} sentinels); "
        f"use {smallest + 1000}",
    )


def _data(config: Config) -> None:
    data = config.data
    _require(
        config, len(data.source) >= 1, "data.source", "must name a source, such as python_stdlib or text:my_texts/*.txt"
    )
    names = data.source_names
    _require(
        config,
        not names
        or (len(set(names)) == len(names) == len(data.source) and all(re.fullmatch(r"[\w.-]+", n) for n in names)),
        "data.source_names",
        f"must be {len(data.source)} different names of letters, digits, _, - and ., one for each in data.source; use "
        + ",".join(f"source{number}" for number in range(1, len(data.source) + 1)),
    )
    _require(config, len(data.objective) >= 1, "data.objective", "must name an objective, such as span_corruption")
    _require(
        config, len(set(data.objective)) == len(data.objective), "data.objective", "must not name an objective twice"
    )
    defaults = DataConfig()
    for field in ("inputs_template", "targets_template", "messages_field", "packing"):
        _require(
            config,
            "supervised" in data.objective or getattr(data, field) == getattr(defaults, field),
            f"data.{field}",
            "needs data.objective=supervised",
        )
    for field in ("inputs_template", "targets_template"):
        _require(
            config,
            not data.messages_field or getattr(data, field) == getattr(defaults, field),
            f"data.{field}",
            "can't be combined with data.messages_field; use one of them",
        )
    _require(
        config,
        not data.whole_word_masking or {"mlm", "mlm_nsp"} & set(data.objective),
        "data.whole_word_masking",
        "needs data.objective=mlm or mlm_nsp",
    )


def _init_from(config: Config) -> None:
    for field in ("step", "reinitialize", "adapt"):
        _require(
            config,
            bool(config.init_from.checkpoint) or getattr(config.init_from, field) == getattr(InitConfig, field),
            f"init_from.{field}",
            "needs init_from.checkpoint",
        )


def _objectives(config: Config) -> None:
    data, model = config.data, config.model
    for objective in data.objective:
        if model.architecture not in ARCHITECTURES[objective]:
            raise ConfigError(
                f"data.objective={objective} needs model.architecture={' or '.join(ARCHITECTURES[objective])}, "
                f"not {model.architecture}"
            )
        _require(
            config,
            data.inputs_length >= 1 or (objective == "causal_lm" and model.architecture == "decoder"),
            "data.inputs_length",
            f"must be at least 1 for {objective}",
        )
    _require(
        config,
        "supervised" not in data.objective or len(data.objective) == 1,
        "data.objective",
        "can't combine supervised with other objectives; use supervised alone",
    )
    _require(
        config,
        "mlm_nsp" not in data.objective or model.token_types >= 2,
        "model.token_types",
        "must be at least 2 for data.objective=mlm_nsp; use 2",
    )
    _require(
        config,
        "mlm_nsp" not in data.objective or model.next_sentence_head,
        "model.next_sentence_head",
        "must be true for data.objective=mlm_nsp, or use data.objective=mlm",
    )


def _evaluate(config: Config) -> None:
    evaluate = config.evaluate
    _require(
        config,
        not evaluate.metrics or "supervised" in config.data.objective,
        "evaluate.metrics",
        "need data.objective=supervised, whose examples have targets; use an empty list",
    )
    _require(
        config,
        evaluate.language in ("auto", *LANGUAGES.split()),
        "evaluate.language",
        "must be auto or an ISO 639-1 code; use en, zh or auto",
    )
    _require(
        config,
        not evaluate.answer_choices or len(set(evaluate.answer_choices)) == len(evaluate.answer_choices) > 1,
        "evaluate.answer_choices",
        "must be at least two different texts, or empty; use yes,no",
    )
    _require(
        config,
        not evaluate.answer_choices or evaluate.metrics,
        "evaluate.answer_choices",
        "need evaluate.metrics; use accuracy",
    )


def _rates(config: Config) -> None:
    data = config.data
    _require(
        config,
        list(data.phase_boundaries) == sorted(set(data.phase_boundaries)),
        "data.phase_boundaries",
        "must be steps in ascending order; use 1000,2000",
    )
    phases = 1 + len(data.phase_boundaries)
    for field, of, names in (
        ("data.rates", "data.source", data.source),
        ("data.objective_rates", "data.objective", data.objective),
    ):
        rates = get(config, field)
        _require(
            config,
            len(rates) in (0, len(names) * phases),
            field,
            f"must have one rate for each of the {len(names)} in {of}"
            + (f" in each of the {phases} phases, {len(names) * phases} in all" if phases > 1 else "")
            + ", or be empty",
        )
        lists = [rates[start : start + len(names)] for start in range(0, len(rates), len(names))]
        _require(
            config,
            all(rate == 0 or rate >= LEAST_RATE for rate in rates),
            field,
            f"must be 0 or at least {LEAST_RATE:g} each; use " + ",".join("1" for _ in rates),
        )
        _require(
            config,
            all(sum(each) > 0 for each in lists),
            field,
            "must not sum to 0" + (" in any phase" if phases > 1 else "") + "; use " + ",".join("1" for _ in rates),
        )


def _model(config: Config) -> None:
    model = config.model
    heads = model.kv_heads
    _require(
        config,
        model.num_heads % heads == 0,
        "model.num_kv_heads",
        f"must divide model.num_heads={model.num_heads}; use {math.gcd(heads, model.num_heads)}",
    )
    _require(
        config,
        model.positions != "rotary" or model.head_dim % 2 == 0,
        "model.head_dim",
        f"must be even for rotary positions; use {model.head_dim + 1}",
    )
    _require(config, model.relative_buckets % 4 == 0, "model.relative_buckets", "must be a multiple of 4; use 32")
    _require(
        config,
        model.relative_max_distance > model.relative_buckets // 2,
        "model.relative_max_distance",
        f"must be more than half of model.relative_buckets={model.relative_buckets}; use {4 * model.relative_buckets}",
    )
    encoder_only = model.architecture == "encoder"
    _require(
        config,
        encoder_only or not model.token_types,
        "model.token_types",
        f"needs model.architecture=encoder, not {model.architecture}; use 0",
    )
    _require(
        config,
        encoder_only or model.head == "plain",
        "model.head",
        f"needs model.architecture=encoder, not {model.architecture}; use plain",
    )
    _require(
        config,
        model.positions == "relative" or model.relative_bias == "shared",
        "model.relative_bias",
        f"needs model.positions=relative, not {model.positions}; use shared",
    )


def _layer_patterns(config: Config) -> None:
    model, local = config.model, "local" in config.model.layer_pattern
    layers = {"model.num_layers": model.num_layers}
    if model.architecture == "encoder_decoder" and model.num_decoder_layers:
        layers["model.num_decoder_layers"] = model.num_decoder_layers
    for field, count in layers.items():
        up = -(-count // model.pattern_length) * model.pattern_length
        _require(
            config,
            count % model.pattern_length == 0,
            field,
            f"must be a multiple of {model.pattern_length}, the length of the layers' pattern; use {up}",
        )
    _require(
        config,
        not local or model.attention_window > 0,
        "model.attention_window",
        "must be at least 1 for the local layers of model.layer_pattern; use 1024",
    )
    _require(
        config,
        not model.rotary.local_base or (local and model.positions == "rotary" and model.rotary.local_base >= 1),
        "model.rotary.local_base",
        "must be at least 1 and needs model.positions=rotary and local in model.layer_pattern; use 0",
    )
    gated = model.mlp.startswith("gated")
    _require(
        config,
        all(mlp.startswith("gated") == gated for mlp in model.mlp_pattern),
        "model.mlp_pattern",
        f"must be {'gated' if gated else 'not gated'} in every layer, as model.mlp={model.mlp} is, because the layers' "
        f"parameters are stacked; use {model.mlp}",
    )


def _rotary(config: Config) -> None:
    model, rotary = config.model, config.model.rotary
    _require(
        config,
        rotary.scaling == "none" or model.positions == "rotary",
        "model.rotary.scaling",
        f"needs model.positions=rotary, not {model.positions}; use none",
    )
    _require(
        config,
        rotary.scaling != "none" or rotary.factor == 1,
        "model.rotary.factor",
        "needs model.rotary.scaling, such as linear; use 1.0",
    )
    _require(
        config,
        rotary.scaling not in ("llama3", "yarn") or rotary.original_length > 0,
        "model.rotary.original_length",
        f"must be at least 1 for model.rotary.scaling={rotary.scaling}; use the text length of the original training",
    )
    for low, high in (("low_frequency_factor", "high_frequency_factor"), ("beta_slow", "beta_fast")):
        smallest = getattr(rotary, low)
        _require(
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
    _require(
        config,
        longest <= model.longest_text,
        "model.max_length",
        f"must be at least the longest row, {longest}, with learned positions; use {longest}",
    )
    needed = config.row_length if model.architecture == "decoder" else data.targets_length
    if evaluate.metrics and evaluate.max_new_tokens and model.architecture == "decoder":
        needed = data.inputs_length + evaluate.max_new_tokens
    _require(
        config,
        not evaluate.metrics or needed <= model.longest_text,
        "model.max_length",
        f"must be at least {needed} for inputs_length + evaluate.max_new_tokens, with learned positions; use {needed}",
    )


def _train(config: Config) -> None:
    data, optimizer, train = config.data, config.optimizer, config.train
    _require(
        config,
        data.batch_size % train.microbatches == 0,
        "data.batch_size",
        f"must be a multiple of train.microbatches={train.microbatches}; use "
        f"{-(-data.batch_size // train.microbatches) * train.microbatches}",
    )
    _require(
        config,
        all(re.fullmatch(r"none|xla_\w+=[^=]+", option) for option in train.compiler_options),
        "train.compiler_options",
        "must be none or XLA's options with their values; use xla_tpu_enable_latency_hiding_scheduler=true",
    )
    _require(
        config,
        optimizer.schedule != "wsd" or 1 <= optimizer.decay_steps <= train.num_steps - optimizer.warmup_steps,
        "optimizer.decay_steps",
        "must be at least 1 and fit between the warm-up and train.num_steps="
        f"{train.num_steps}; use {max(1, (train.num_steps - optimizer.warmup_steps) // 5)}",
    )


def _mesh(config: Config) -> None:
    axes = {axis: size for axis, size in dataclasses.asdict(config.mesh).items() if axis != "slices"}
    for axis, size in axes.items():
        _require(config, size != 0, f"mesh.{axis}", "must be at least 1, or -1 for the remaining devices; use 1")
    if (free := [axis for axis, size in axes.items() if size == -1])[1:]:
        raise ConfigError(f"mesh.{free[0]}=-1 and mesh.{free[1]}=-1: only one axis can be -1; use mesh.{free[1]}=1")
    data, slices = config.mesh.data, config.mesh.slices
    _require(
        config, data == -1 or data % slices == 0, "mesh.data", f"must be a multiple of mesh.slices={slices}; use -1"
    )


def _require(config: Config, holds: bool, field: str, rule: str) -> None:
    if not holds:
        raise ConfigError(f"{field}={shown(get(config, field))} {rule}")
