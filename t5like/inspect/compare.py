"""`t5like compare`: what differs in the configs of runs, their metrics as one table, and their losses in one picture.

Runs may still go on: their files are read as they are, and never written. Called by `cli.commands`.
"""

import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t5like.config.schema import flatten
from t5like.errors import CheckpointError, ConfigError, printable
from t5like.inspect import run_files
from t5like.inspect.run_files import Run, state
from t5like.metrics import loss_curve

# Fields that decide which tokens of a text are predicted from which others.
OBJECTIVE = ("data.objective", "data.objective_rates", "data.noise_density", "data.mean_span_length")
LONGEST_CELL = 48  # characters of a value in a table


# ---- Reading ----


def load(paths: Sequence[Path]) -> tuple[list[Run], list[Path]]:
    """Read runs; the directory of a sweep stands for the runs in it.

    Returns:
        The runs, and the directories of sweeps that have no run yet.

    Raises:
        CheckpointError: a path holds no run, or a run's config or metrics can't be read.
        DataError: metrics are damaged.
    """
    directories, empty = [], []
    for path in paths:
        runs, others = _run_directories(path)
        directories += runs
        empty += others
    unique = list({path.resolve(): path for path in directories}.values())
    names = _short_names([path.absolute() for path in unique])
    return [run_files.read(path, name) for name, path in zip(names, unique, strict=True)], empty


def _run_directories(path: Path) -> tuple[list[Path], list[Path]]:
    """Return the run directories that a path names, and its directories without a run."""
    if (path / "config.json").is_file():
        return [path], []
    try:
        children = sorted((child for child in path.iterdir() if child.is_dir()), key=_natural)
    except OSError as error:
        raise CheckpointError(f"RUN={path} can't be read: {error.strerror}; use the directory of a run") from None
    runs = [child for child in children if (child / "config.json").is_file()]
    if not runs:
        raise CheckpointError(f"RUN={path} holds no run, and no directories of runs; train first, or check the path")
    return runs, [child for child in children if child not in runs and not child.name.startswith(".")]


def _natural(path: Path) -> list[tuple[int, str]]:
    """Order names so that run2 comes before run10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Return the paths without the directories that all of them share."""
    if len(paths) == 1:
        return [paths[0].name]
    parts = [path.parts for path in paths]
    shared = next(
        (level for level, names in enumerate(zip(*parts, strict=False)) if len(set(names)) > 1),
        min(map(len, parts)) - 1,
    )
    return ["/".join(each[shared:]) for each in parts]


# ---- Comparison ----


def compare(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the comparison as JSON values: ``runs`` with their metrics, and ``differences`` by config field."""
    values = [flatten(run.config) for run in runs]
    differs = lambda name: any(each[name] != values[0][name] for each in values)
    return {
        "runs": [summary(run) for run in runs],
        "differences": {name: [each[name] for each in values] for name in values[0] if differs(name)},
    }


def summary(run: Run) -> dict[str, Any]:
    """Return the final and best metrics of a run; None for what it has not measured.

    ``train_loss`` is the last one, ``eval_loss`` the last and ``best_eval_loss`` the lowest held-out loss, in nats per
    target token; ``bits_per_byte`` is of the best one; ``tokens_per_second`` is the median. Of `t5like rl`, ``reward``
    and ``kl`` are the last of training, ``eval_reward`` is the last and ``best_eval_reward`` the highest one held out.
    ``tokenizer`` and ``heldout`` are the fingerprints of what the losses were measured with and on.
    """
    series = {
        name: [(record["step"], record[name]) for record in run.records if name in record]
        for name in (
            *("train/loss", "eval/loss", "eval/bits_per_byte", "train/tokens_per_second"),
            *("train/reward", "eval/reward", "train/kl"),
        )
    }
    starts = run_files.starts(run.path)
    prints = starts[-1].get("fingerprints", {}) if starts else {}
    last = lambda name: series[name][-1][1] if series[name] else None
    heldout = [(value, step) for step, value in series["eval/loss"] if value is not None]
    best = min(heldout, default=(None, None))
    rewards = [(value, -step) for step, value in series["eval/reward"] if value is not None]
    best_reward = max(rewards, default=(None, None))
    rates = [value for _, value in series["train/tokens_per_second"] if value is not None]
    return {
        "name": run.name,
        "path": str(run.path),
        "state": state(run),
        **{name: prints.get(name) for name in ("tokenizer", "heldout")},
        "step": run.step,
        "num_steps": run.config.train.num_steps,
        "train_loss": last("train/loss"),
        "eval_loss": last("eval/loss"),
        "best_eval_loss": best[0],
        "best_eval_step": best[1],
        "bits_per_byte": dict(series["eval/bits_per_byte"]).get(best[1]),
        "tokens_per_second": statistics.median(rates) if rates else None,
        "reward": last("train/reward"),
        "eval_reward": last("eval/reward"),
        "best_eval_reward": best_reward[0],
        "best_eval_reward_step": None if best_reward[0] is None else -best_reward[1],
        "kl": last("train/kl"),
    }


# ---- Output ----


def text(comparison: dict[str, Any]) -> str:
    """Return a comparison as tables of plain text."""
    runs, differences = comparison["runs"], comparison["differences"]
    names = [run["name"] for run in runs]
    if len(runs) == 1:
        parts = []
    elif not differences:
        parts = ["The configs are equal."]
    elif len(runs) <= len(differences):  # the longer side goes down
        parts = [_table(["config", *names], [[name, *map(_cell, values)] for name, values in differences.items()])]
    else:
        columns = list(differences.values())
        rows = [[name, *(_cell(column[index]) for column in columns)] for index, name in enumerate(names)]
        parts = [_table(["run", *differences], rows)]
    header = ["run", "state", "step", "train/loss", "eval/loss", "best", "at step", "bits/byte", "tokens/s"]
    parts.append(_table(header, [_metrics(run) for run in runs]))
    if rewarded := [run for run in runs if run["reward"] is not None or run["eval_reward"] is not None]:
        header = ["run", "train/reward", "eval/reward", "best", "at step", "KL"]
        parts.append(_table(header, [_rewards(run) for run in rewarded]))
    measured = [run for run in runs if run["best_eval_loss"] is not None]
    if len(measured) > 1:
        if reason := _incomparable(comparison):
            parts.append(reason)
        else:
            best = min(measured, key=lambda run: run["best_eval_loss"])
            loss, step = _number(best["best_eval_loss"]), f"{best['best_eval_step']:,}"
            parts.append(f"Lowest held-out loss: {printable(best['name'])}, {loss} at step {step}.")
    return "\n\n".join(parts)


def _incomparable(comparison: dict[str, Any]) -> str:
    """Why the losses of the runs are not comparable; empty if they are."""
    runs, differences = comparison["runs"], comparison["differences"]
    differs = lambda name: len({run[name] for run in runs} - {None}) > 1
    if "rl.method" in differences:
        return "The methods differ: their losses are not comparable."
    if not differences.keys().isdisjoint(OBJECTIVE):
        return "The objectives differ: their losses are not comparable."
    if differs("tokenizer") or any(name.startswith("tokenizer.") for name in differences):
        return "The tokenizers differ: losses per token are not comparable; bits/byte are, on the same text."
    if differs("heldout"):
        return "The held-out texts differ: their losses are not comparable."
    return ""


def _metrics(run: dict[str, Any]) -> list[str]:
    step = "-" if run["best_eval_step"] is None else f"{run['best_eval_step']:,}"
    rate = "-" if run["tokens_per_second"] is None else f"{run['tokens_per_second']:,.0f}"
    losses = [_number(run[name]) for name in ("train_loss", "eval_loss", "best_eval_loss")]
    done = f"{run['step']:,} of {run['num_steps']:,}"
    return [run["name"], run["state"], done, *losses, step, _number(run["bits_per_byte"]), rate]


def _rewards(run: dict[str, Any]) -> list[str]:
    step = "-" if run["best_eval_reward_step"] is None else f"{run['best_eval_reward_step']:,}"
    rewards = [_number(run[name]) for name in ("reward", "eval_reward", "best_eval_reward")]
    return [run["name"], *rewards, step, "-" if run["kl"] is None else f"{run['kl']:.3g}"]


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _cell(value: Any) -> str:
    """Return a config value on one line."""
    return value if isinstance(value, str) and value else str(value) if isinstance(value, float) else repr(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return aligned columns; long values are cut in the middle."""
    table = [[printable(cell, longest=LONGEST_CELL) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def draw(runs: Sequence[Run], picture: Path) -> None:
    """Draw the loss or reward curves of all runs that have metrics.

    Raises:
        ConfigError: the picture would lie in a run.
        CheckpointError: it can't be written.
    """
    inside = next((run for run in runs if picture.resolve().is_relative_to(run.path.resolve())), None)
    if inside:
        raise ConfigError(f"--output={picture} lies in the run {inside.path}, which is not changed; use another path")
    loss_curve.draw_loss_curves({run.name: run.records for run in runs if run.records}, picture)
