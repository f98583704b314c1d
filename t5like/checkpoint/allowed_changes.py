"""What may change when a run continues, field by field: freely, with the flag --allow_change, or never.

Free fields change how a run works and what it reports, but no update. Those of `CHANGEABLE_FIELDS` change the updates
from the newest checkpoint on; provenance.jsonl records them with the step. All other fields decide the parameters,
their optimizer state, the tokenizer or the order of the data, and stay. Called by `run_directory`, `cli` and `train`.
"""

from collections.abc import Sequence

from t5like.config import loader
from t5like.config.schema import Config
from t5like.errors import ConfigError, shown

# A larger num_steps stretches schedules that depend on it; the training loop then prints a warning.
MUTABLE_FIELDS = (
    "mesh.",
    "train.num_steps",
    "train.log_every",
    "train.stats_every",
    "train.eval_every",
    "train.early_evals",
    "train.eval_batches",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.on_failed_save",
    "train.keep_bad_steps",
    "train.profile_step",
    "train.process_timeout_seconds",
    "train.heartbeat_timeout_seconds",
    "train.preemption_grace_seconds",
    "train.max_skipped_updates",
    "train.max_rewinds",
    "train.compare_replicas_every",
    "train.microbatches",
    "train.loss_chunk",
    "train.compiler_options",
    "rl.reward_workers",
    "rl.eval_prompts",
    "rl.table_every",
    "data.cache_directory",
    "data.source_names",
    "data.num_workers",
    "data.prefetch",
    "model.layers",
    "model.remat",
    "model.kernels",
    "tokenizer.path",
    "tokenizer.extra_eos_ids",
    "evaluate.",
    "metrics.",
    "distill.teacher:",  # its directory may move; `checkpoint.teacher` identifies its parameters
)
CHANGEABLE_FIELDS = (
    "optimizer.learning_rate",
    "optimizer.schedule",
    "optimizer.warmup_steps",
    "optimizer.decay_steps",
    "optimizer.final_fraction",
    "optimizer.adam_factor",
    "data.batch_size",
    "train.spike_factor",
    "train.on_spike",
    "train.z_loss",
    "train.label_smoothing",
    "model.dropout_rate",
    "model.attention_init",  # only the first step depends on it
    "distill.weight",
    "distill.temperature",
    "distill.top_k",
)
DATA = "data"  # the value of --allow_change for a source whose texts changed
# Fields of the model that may differ as long as imported weights have not been trained; other sections may differ too.
MUTABLE_AFTER_IMPORT = ("dropout_rate", "dtype", "layers", "kernels", "remat", "max_length")


def parse(values: Sequence[str]) -> tuple[str, ...]:
    """The fields of the flag --allow_change, which may be repeated and may contain commas.

    Raises:
        ConfigError: one of them can't change.
    """
    fields = tuple(field for value in values for field in value.split(","))
    for field in fields:
        if field not in (*CHANGEABLE_FIELDS, DATA) and not field.startswith(MUTABLE_FIELDS):
            raise ConfigError(
                f"--allow_change={shown(field)[1:-1]} must be a field that may change while a run continues; these "
                f"are {', '.join(CHANGEABLE_FIELDS)}, {DATA}"
            )
    return fields


def forbidden_differences(
    old: Config, new: Config, *, imported: bool = False, allowed: Sequence[str] = ()
) -> list[str]:
    """Return the fields that prevent `new` from continuing a run of `old`, as ``field: old -> new``.

    Args:
        imported: whether `old` is an untrained import.
        allowed: fields of `CHANGEABLE_FIELDS` that may differ.
    """
    lines = loader.difference(old, new)
    if not imported:
        may_differ = (*MUTABLE_FIELDS, *(f"{field}:" for field in allowed if field in CHANGEABLE_FIELDS))
        return [line for line in lines if not line.startswith(may_differ)]
    fixed = ("model.", "tokenizer.vocab_size", "tokenizer.num_sentinels")
    mutable = tuple(f"model.{name}:" for name in MUTABLE_AFTER_IMPORT)
    if new.model.positions == "learned":
        mutable = tuple(name for name in mutable if name != "model.max_length:")
    mutable += ("model.vocab_multiple:",) if old.vocab_rows == new.vocab_rows else ()
    mutable += initial_fields(old, new)
    return [line for line in lines if line.startswith(fixed) and not line.startswith(mutable)]


def initial_fields(old: Config, new: Config) -> tuple[str, ...]:
    """The fields of the model that concern nothing but initial values, each with a colon, as differences begin."""
    return ("model.attention_init:", *(["model.init:"] if old.model.scales_logits == new.model.scales_logits else []))


def remedy(differences: Sequence[str]) -> str:
    """The end of a message about differences: the flag that allows them, if there is one."""
    fields = [line.partition(":")[0] for line in differences]
    if not set(fields) <= set(CHANGEABLE_FIELDS):
        return "; use another --workdir"
    return f"; add --allow_change={','.join(fields)} to change it from here on, or use another --workdir"
