"""Checks before a launch that read no training data: tokenizer, token stores, schedule, run directory.

Called by `planner`.
"""

import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t5like.checkpoint import teacher
from t5like.checkpoint.run_directory import check_initial_run, check_run_directory, with_run_tokenizer
from t5like.config.schema import Config
from t5like.data.store import preparation
from t5like.errors import UserError
from t5like.optim import schedules
from t5like.sharding.memory import sampling_cache

BARS = "▁▂▃▄▅▆▇█"


class Check(NamedTuple):
    """One line of the list; `error` is what `train` would raise."""

    name: str
    state: str  # ok | missing | slow | wrong
    text: str
    error: UserError | None = None


def run_checks(config: Config, workdir: Path | None) -> list[Check]:
    """All checks; `config` is valid and its batch divides over the mesh, which the caller has checked."""
    try:
        check_initial_run(config, workdir)
    except UserError as error:  # its tokenizer, on which all other checks depend, is there too
        name = "teacher" if str(error).startswith(teacher.FIELD) else "init_from"
        return [Check(name, "wrong", str(error), error)]
    if workdir is not None:
        config = with_run_tokenizer(config, workdir)
    checks = [Check("config", "ok", "every field is valid, and the batch divides over the mesh")]
    checks += _data(config)
    checks.append(Check("learning rate", "ok", learning_rate(config)))
    if config.rl.method != "none":
        checks.append(Check("rl", "missing", not_counted(config)))
    if config.distill.teacher:
        checks.append(_teacher(config, workdir))
    if workdir is None:
        return checks
    try:
        check_run_directory(config, workdir)
        text = "contains a run, which continues" if (workdir / "config.json").exists() else "can be written"
        return [*checks, Check("run directory", "ok", f"{workdir} {text}")]
    except UserError as error:
        return [*checks, Check("run directory", "wrong", str(error), error)]


def not_counted(config: Config) -> str:
    """What a plan leaves out of a run of `t5like rl`: it is that of a supervised step with one answer per prompt."""
    cache, reference = sampling_cache(config), "the reference (as large as the parameters)"
    parts = [f"{config.rl.answers} answers per prompt (memory and time are those of one)"]
    parts += [f"sampling (keys and values: at most {cache / 2**20:,.1f} MiB on all devices)"] if cache else []
    parts += [reference] if config.rl.needs_reference else []
    return f"not counted: {', '.join(parts)}"


def _teacher(config: Config, workdir: Path | None) -> Check:
    """That it can be read, and where it is counted."""
    try:
        leaves = teacher.parameters(teacher.with_teacher_step(config, workdir))
    except UserError as error:
        return Check("teacher", "wrong", str(error), error)
    count = sum(math.prod(leaf.shape) for leaf in leaves.values())
    return Check("teacher", "ok", f"{count:,} parameters; counted in the compiled step, not in estimates from shapes")


def _data(config: Config) -> list[Check]:
    try:
        tokenizer, stores = preparation.find_prepared(config)
    except UserError as error:
        return [Check("tokenizer", "wrong", str(error), error)]
    remedy = "run t5like prepare"
    if tokenizer is None:
        text = f"none for these sources in {config.data.cache_directory}; {remedy}"
        return [Check("tokenizer", "missing", text), Check("data", "missing", f"no token store yet; {remedy}")]
    checks = [Check("tokenizer", "ok", f"{config.tokenizer.vocab_size:,} ids, {tokenizer.hash[:12]}")]
    for spec, store in zip(config.data.source, stores, strict=True):
        if store is None:
            checks.append(Check("data", "missing", f"{spec}: no token store for this tokenizer; {remedy}"))
        else:
            tokens = store.split("train").num_tokens
            checks.append(Check("data", "ok", f"{spec}: {tokens:,} training tokens, written with this tokenizer"))
    return checks


def learning_rate(config: Config, width: int = 48) -> str:
    """The schedule from the first to the last step as a line of bars, with its highest and last value."""
    steps = max(config.train.num_steps, 1)
    rates = np.asarray(jax.vmap(schedules.learning_rate(config))(jnp.arange(steps)))
    top = float(rates.max())
    shown = rates[np.linspace(0, steps - 1, width).round().astype(int)] / (top or 1.0)
    bars = "".join(BARS[min(int(rate * len(BARS)), len(BARS) - 1)] for rate in shown)
    return f"{bars} up to {top:.3g}, {rates[-1]:.3g} at step {steps - 1:,}"
