"""Checks of a config that need neither devices nor data: ranges, and combinations of fields.

`config.loader.resolve` calls `check`. Each message contains the field, its value, the rule, and a value that works.
Ranges of single fields are annotations in `config.schema`; the functions here check several fields together.
"""

import dataclasses
import re
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, get_type_hints

from t5like.config.distill_schema import DistillConfig
from t5like.config.field_types import Range
from t5like.config.label_checks import check_labels
from t5like.config.lora_checks import check_lora
from t5like.config.model_checks import check_model, require
from t5like.config.rl_checks import check_rl
from t5like.config.schema import ARCHITECTURES, LANGUAGES, Config, DataConfig, InitConfig, get, sections
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


def check(config: Config, before: Mapping = MappingProxyType({})) -> None:
    """Refuse a config that can't run on any machine.

    Args:
        before: sections with values that errors suggest instead of the defaults: a preset's.

    Raises:
        ConfigError: with field, value, rule, and a value that works.
    """
    _ranges(config, before)
    check_path("data.cache_directory", config.data.cache_directory)
    if config.tokenizer.path:
        check_path("tokenizer.path", config.tokenizer.path)
    for check_part in (
        _tokenizer,
        _data,
        _objectives,
        check_labels,
        _rates,
        _init_from,
        _evaluate,
        check_model,
        _train,
        _mesh,
        _distill,
        check_rl,
        check_lora,
    ):
        check_part(config)


def _ranges(config: Config, before: Mapping) -> None:
    """Check every number against the range of its field."""
    for section, cls in sections():
        for name, (limits, default) in ranges(cls).items():
            value = get(config, f"{section}{name}")
            items = value if isinstance(value, tuple) else (value,)
            if wrong := [item for item in items if item not in limits]:
                use = f"; use {_working(before, section, name, limits, default)}" if default != () else ""
                raise ConfigError(f"{section}{name}={shown(wrong[0])} must be {limits}{use}")


def _working(before: Mapping, section: str, name: str, limits: Range, default: Any) -> Any:
    """The value of a field in `before` if there is one and it is within the limits, otherwise the default."""
    for part in section.split(".")[:-1]:
        before = before.get(part, {})
    value = before.get(name)
    return value if isinstance(value, int | float) and value in limits else default


def _tokenizer(config: Config) -> None:
    tokenizer = config.tokenizer
    require(
        config,
        all(0 <= token < tokenizer.vocab_size for token in tokenizer.extra_eos_ids),
        "tokenizer.extra_eos_ids",
        f"must be token ids, at least 0 and less than tokenizer.vocab_size={tokenizer.vocab_size}; empty: none",
    )
    if tokenizer.path:  # its size is known only after loading
        require(
            config,
            tokenizer.vocab_size > tokenizer.num_sentinels,
            "tokenizer.vocab_size",
            f"must be more than tokenizer.num_sentinels={tokenizer.num_sentinels}; use the size of tokenizer.path",
        )
        return
    smallest = 3 + 256 + tokenizer.num_sentinels
    require(
        config,
        tokenizer.vocab_size > smallest,
        "tokenizer.vocab_size",
        f"must be more than {smallest} (3 special ids, 256 bytes, {tokenizer.num_sentinels} sentinels); "
        f"use {smallest + 1000}",
    )


def _data(config: Config) -> None:
    data = config.data
    require(
        config, len(data.source) >= 1, "data.source", "must name a source, such as python_stdlib or text:my_texts/*.txt"
    )
    names = data.source_names
    require(
        config,
        not names
        or (len(set(names)) == len(names) == len(data.source) and all(re.fullmatch(r"[\w.-]+", n) for n in names)),
        "data.source_names",
        f"must be {len(data.source)} different names of letters, digits, _, - and ., one for each in data.source; use "
        + ",".join(f"source{number}" for number in range(1, len(data.source) + 1)),
    )
    require(config, len(data.objective) >= 1, "data.objective", "must name an objective, such as span_corruption")
    require(
        config, len(set(data.objective)) == len(data.objective), "data.objective", "must not name an objective twice"
    )
    defaults = DataConfig()
    for field in ("inputs_template", "targets_template", "messages_field", "packing"):
        require(
            config,
            data.has_examples or getattr(data, field) == getattr(defaults, field),
            f"data.{field}",
            "needs data.objective=supervised",
        )
    for field in ("inputs_template", "targets_template"):
        require(
            config,
            not data.messages_field or getattr(data, field) == getattr(defaults, field),
            f"data.{field}",
            "can't be combined with data.messages_field; use one of them",
        )
    require(
        config,
        not data.whole_word_masking or {"mlm", "mlm_nsp"} & set(data.objective),
        "data.whole_word_masking",
        "needs data.objective=mlm or mlm_nsp",
    )


def _init_from(config: Config) -> None:
    init = config.init_from
    for field in ("step", "reinitialize", "adapt", "decoder_checkpoint", "warmup_steps"):
        require(
            config,
            bool(init.checkpoint) or getattr(init, field) == getattr(InitConfig, field),
            f"init_from.{field}",
            "needs init_from.checkpoint",
        )
    steps = config.train.num_steps
    rule = f"must be below train.num_steps={steps}: until then only new parameters learn; use {steps // 10}"
    require(config, init.warmup_steps < steps, "init_from.warmup_steps", rule)
    rule = "needs init_from.decoder_checkpoint; use -1"
    require(config, bool(init.decoder_checkpoint) or init.decoder_step == -1, "init_from.decoder_step", rule)
    rule = "needs init_from.adapt=architecture and model.architecture=encoder_decoder; leave it out"
    adapts = "architecture" in init.adapt and config.model.architecture == "encoder_decoder"
    require(config, adapts or not init.decoder_checkpoint, "init_from.decoder_checkpoint", rule)


def _objectives(config: Config) -> None:
    data, model = config.data, config.model
    for objective in data.objective:
        scores_only = objective == "supervised" and config.rl.method == "reward_model"  # it generates nothing
        if model.architecture not in ARCHITECTURES[objective] and not scores_only:
            raise ConfigError(
                f"data.objective={objective} needs model.architecture={' or '.join(ARCHITECTURES[objective])}, "
                f"not {model.architecture}"
            )
        require(
            config,
            data.inputs_length >= 1 or (objective == "causal_lm" and model.architecture == "decoder"),
            "data.inputs_length",
            f"must be at least 1 for {objective}",
        )
    alone = data.label_objective or "supervised"
    require(
        config,
        alone not in data.objective or len(data.objective) == 1,
        "data.objective",
        f"can't combine {alone} with other objectives; use {alone} alone",
    )
    require(
        config,
        "mlm_nsp" not in data.objective or model.token_types >= 2,
        "model.token_types",
        "must be at least 2 for data.objective=mlm_nsp; use 2",
    )
    require(
        config,
        "mlm_nsp" not in data.objective or model.next_sentence_head,
        "model.next_sentence_head",
        "must be true for data.objective=mlm_nsp, or use data.objective=mlm",
    )


def _distill(config: Config) -> None:
    distill = config.distill
    rule = "must be set where other fields of distill are; use the directory of a trained run"
    require(config, bool(distill.teacher) or distill == DistillConfig(), "distill.teacher", rule)
    rule = "is for t5like train; leave it out with rl.method"
    require(config, not distill.teacher or config.rl.method == "none", "distill.teacher", rule)
    rule = f"must be below tokenizer.vocab_size={config.tokenizer.vocab_size}; use 0 for all tokens"
    require(config, distill.top_k < config.tokenizer.vocab_size, "distill.top_k", rule)


def _evaluate(config: Config) -> None:
    evaluate = config.evaluate
    require(
        config,
        not evaluate.metrics or config.data.has_examples,
        "evaluate.metrics",
        "need data.objective=supervised, whose examples have targets; use an empty list",
    )
    require(
        config,
        evaluate.language in ("auto", *LANGUAGES.split()),
        "evaluate.language",
        "must be auto or an ISO 639-1 code; use en, zh or auto",
    )
    require(
        config,
        not evaluate.answer_choices or len(set(evaluate.answer_choices)) == len(evaluate.answer_choices) > 1,
        "evaluate.answer_choices",
        "must be at least two different texts, or empty; use yes,no",
    )
    require(
        config,
        not evaluate.answer_choices or evaluate.metrics,
        "evaluate.answer_choices",
        "need evaluate.metrics; use accuracy",
    )


def _rates(config: Config) -> None:
    data = config.data
    require(
        config,
        list(data.phase_boundaries) == sorted(set(data.phase_boundaries)),
        "data.phase_boundaries",
        "must be steps in ascending order; use 1000,2000",
    )
    phases = 1 + len(data.phase_boundaries)
    densities = data.phase_noise_density
    require(
        config,
        len(densities) in (0, phases),
        "data.phase_noise_density",
        f"must have one value for each of the {phases} phases of data.phase_boundaries, or be empty; use "
        + ",".join(f"{data.noise_density:g}" for _ in range(phases)),
    )
    require(
        config,
        not densities or data.objective == ("mlm",),
        "data.phase_noise_density",
        f"needs data.objective=mlm, not {','.join(data.objective)}; use data.noise_density, which is the same in all "
        "phases",
    )
    for field, of, names in (
        ("data.rates", "data.source", data.source),
        ("data.objective_rates", "data.objective", data.objective),
    ):
        rates = get(config, field)
        require(
            config,
            len(rates) in (0, len(names) * phases),
            field,
            f"must have one rate for each of the {len(names)} in {of}"
            + (f" in each of the {phases} phases, {len(names) * phases} in all" if phases > 1 else "")
            + ", or be empty",
        )
        lists = [rates[start : start + len(names)] for start in range(0, len(rates), len(names))]
        require(
            config,
            all(rate == 0 or rate >= LEAST_RATE for rate in rates),
            field,
            f"must be 0 or at least {LEAST_RATE:g} each; use " + ",".join("1" for _ in rates),
        )
        require(
            config,
            all(sum(each) > 0 for each in lists),
            field,
            "must not sum to 0" + (" in any phase" if phases > 1 else "") + "; use " + ",".join("1" for _ in rates),
        )


def _train(config: Config) -> None:
    data, optimizer, train = config.data, config.optimizer, config.train
    require(
        config,
        data.batch_size % train.microbatches == 0,
        "data.batch_size",
        f"must be a multiple of train.microbatches={train.microbatches}; use "
        f"{-(-data.batch_size // train.microbatches) * train.microbatches}",
    )
    require(
        config,
        all(re.fullmatch(r"none|xla_\w+=[^=]+", option) for option in train.compiler_options),
        "train.compiler_options",
        "must be none or XLA's options with their values; use xla_tpu_enable_latency_hiding_scheduler=true",
    )
    require(
        config,
        optimizer.schedule != "wsd" or 1 <= optimizer.decay_steps <= train.num_steps - optimizer.warmup_steps,
        "optimizer.decay_steps",
        "must be at least 1 and fit between the warm-up and train.num_steps="
        f"{train.num_steps}; use {max(1, (train.num_steps - optimizer.warmup_steps) // 5)}",
    )


def _mesh(config: Config) -> None:
    axes = {axis: size for axis, size in dataclasses.asdict(config.mesh).items() if axis != "slices"}
    for axis, size in axes.items():
        require(config, size != 0, f"mesh.{axis}", "must be at least 1, or -1 for the remaining devices; use 1")
    if (free := [axis for axis, size in axes.items() if size == -1])[1:]:
        raise ConfigError(f"mesh.{free[0]}=-1 and mesh.{free[1]}=-1: only one axis can be -1; use mesh.{free[1]}=1")
    data, slices = config.mesh.data, config.mesh.slices
    require(
        config, data == -1 or data % slices == 0, "mesh.data", f"must be a multiple of mesh.slices={slices}; use -1"
    )
