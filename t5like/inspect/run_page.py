"""The page of `t5like inspect run`: the report of a run as one page with plots."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from t5like.config.schema import changed_fields
from t5like.errors import CheckpointError
from t5like.inspect import health
from t5like.inspect.charts import COLORS, Series, line_plot, shares
from t5like.inspect.html import (
    Content,
    Markup,
    details,
    element,
    facts,
    grid,
    notice,
    page,
    paragraph,
    preformatted,
    table,
)
from t5like.inspect.run import Report, happened, progress, time_facts, training
from t5like.io.storage import format_bytes
from t5like.metrics.loss_curve import has_exploded, points
from t5like.train.completion import SAMPLES, SAMPLES_OF_STEPS

TEXTS = {  # what the names of facts mean, for those that are short in a terminal
    "rate": "learning rate",
    "training": "training loss",
    "gradient": "gradient norm",
    "skipped": "skipped",
}
LONGEST_SAMPLES = 20_000  # characters
SHOWN_STEPS = 5  # whose samples or answers are shown


def run_page(report: Report) -> str:
    """Return the page as an HTML document.

    Raises:
        CheckpointError: a file of the run can't be read.
    """
    glance = [*progress(report), *training(report.run), *time_facts(report)]
    sections: list[tuple[str, Content]] = [
        ("Verdict", _verdict(report)),
        ("At a glance", facts((TEXTS.get(name, name), text) for name, text in glance)),
        ("Loss", _losses(report)),
        ("Rewards", _rewards(report)),
        ("Updates", _updates(report)),
        ("Time", _time(report)),
        ("Checkpoints", _checkpoints(report)),
        ("What happened", facts(happened(report))),
        ("Samples", _samples(report.run.path)),
        (
            "Config",
            details(
                "Fields that are not at their defaults",
                table(
                    ["field", "value"],
                    [[name, str(value)] for name, value in changed_fields(report.run.config).items()],
                ),
            ),
        ),
    ]
    return page(f"Run {report.run.name}", [(heading, content) for heading, content in sections if content])


def _verdict(report: Report) -> list[Markup]:
    kind = "good" if not report.findings else report.findings[0].kind  # the worst one
    verdict = health.verdict(report.run, report.findings)
    if kind == "good":
        return [notice("good", f"{verdict[0].upper()}{verdict[1:]}.")]
    first = paragraph(element("strong", f"{verdict[0].upper()}{verdict[1:]}."))
    notices = [
        notice(
            finding.kind,
            finding.what,
            element("div", f"Rule: {finding.rule}.", class_="soft"),
            element("div", f"Remedy: {finding.remedy}."),
        )
        for finding in report.findings
    ]
    return [first, *notices]


# ---- Plots ----


def _series(report: Report, *names: tuple[str, str], marked: str = "") -> list[Series]:
    """Series of metrics, from pairs of label and metric name; those without values are left out."""
    found = [Series(label, *points(report.run.records, name), label == marked) for label, name in names]
    return [series for series in found if series.xs]


def _named(report: Report, prefix: str) -> list[Series]:
    """A series for each metric that begins with `prefix`."""
    names = dict.fromkeys(name for record in report.run.records for name in record if name.startswith(prefix))
    return _series(report, *((name.removeprefix(prefix), name) for name in names))


def _plots(*plots: tuple[str, Sequence[Series], str, str], log_x: bool = False) -> Markup | str:
    """A grid of plots over steps, from title, series, name of the y axis and its scale: linear, log, or zero."""
    drawn = [
        line_plot(title, series, x="step", y=y, log_x=log_x, log_y=scale == "log", zero=scale == "zero")
        for title, series, y, scale in plots
        if series
    ]
    return grid(*drawn) if drawn else ""


def _losses(report: Report) -> Markup | str:
    whole = _series(report, ("training", "train/loss"), ("held out", "eval/loss"), marked="held out")
    if whole and report.run.config.rl.method == "none":
        first, last = (pick(series.xs[at] for series in whole) for pick, at in ((min, 0), (max, -1)))
        for label, name in (("uniform guess", "baseline/uniform"), ("token frequencies", "baseline/unigram")):
            values = points(report.run.records, name)[1]
            whole += [Series(label, [max(first, 1), last], [values[-1]] * 2) for _ in values[-1:] if last > 1]
    nats = "nats per target token" if report.run.config.rl.method == "none" else "loss"
    losses = [loss for name in ("eval", "train") for loss in points(report.run.records, f"{name}/loss")[1]]
    scale = "log" if has_exploded(losses) else "linear"
    kinds = ("objective", "source", "denoiser")
    parts = [
        (f"{title} by {kind}", series, nats, scale)
        for kind in kinds
        for title, prefix in (("Training loss", "train"), ("Held-out loss", "eval"))
        if len(series := _named(report, f"{prefix}/loss/{kind}/")) > (kind == "denoiser")
    ]
    return _plots(("Loss", whole, nats, scale), *parts, log_x=True)


def _rewards(report: Report) -> Markup | str:
    reward = _series(report, ("training", "train/reward"), ("held out", "eval/reward"), marked="held out")
    named = [each for each in _named(report, "train/rewards/") if not each.name.endswith("/std")]
    return _plots(
        ("Reward", reward, "mean reward", "linear"),
        ("KL divergence from the first weights", _series(report, ("KL", "train/kl")), "nats per token", "linear"),
        ("Entropy", _series(report, ("entropy", "train/entropy")), "nats per token", "linear"),
        ("Length of answers", _series(report, ("mean", "train/completions/mean_length")), "tokens", "zero"),
        ("Rewards by name", named if reward or named else [], "reward", "linear"),
    )


def _updates(report: Report) -> Markup | str:
    last = health.last_update_ratios(report.run)
    names = sorted(last, key=lambda name: -last[name])[:COLORS]
    ratios = _series(report, *((health.layer_of(name), name) for name in names))
    return _plots(
        ("Learning rate", _series(report, ("learning rate", "train/learning_rate")), "learning rate", "linear"),
        ("Gradient norm", _series(report, ("norm", "train/grad_norm")), "global norm, before clipping", "log"),
        (
            f"Update/parameter ratio, the {len(names)} largest of {len(last)}",
            ratios,
            "norm of update / norm of parameter",
            "log",
        ),
    )


def _time(report: Report) -> list[Content]:
    use = report.use
    speed = _plots(
        ("Throughput", _series(report, ("speed", "train/tokens_per_second")), "tokens per second", "zero"),
        ("Time of a step", _series(report, ("step", "train/step_seconds")), "seconds", "zero"),
    )
    parts = shares("Where the time of all starts went", use.seconds) if use.seconds else ""
    return [parts, speed] if parts or speed else []


# ---- Tables and texts ----


def _checkpoints(report: Report) -> Content:
    rows = [
        [row.step, format_bytes(row.size), time.strftime("%Y-%m-%d %H:%M", time.localtime(row.saved)), row.state]
        for row in report.events.checkpoints
    ]
    return table(["step", "size", "saved", "state"], rows) if rows else ""


def _samples(workdir: Path) -> list[Markup]:
    """The samples of some evaluations and of the end, and of `t5like rl` the first answer of some steps."""
    shown = []
    try:
        for path in _some_steps(workdir / SAMPLES_OF_STEPS, "*.txt"):
            shown.append(details(f"after step {int(path.stem):,}", _text(path)))
        if (workdir / SAMPLES).is_file():
            shown.append(_text(workdir / SAMPLES))
        rows = []
        for path in _some_steps(workdir / "answers", "*.jsonl"):
            with path.open(encoding="utf-8") as lines:
                record = json.loads(next(lines))
            rows.append([int(path.stem), record["prompt"], record["answer"], record["reward"]])
    except (OSError, ValueError, KeyError, StopIteration) as error:
        raise CheckpointError(f"samples of {workdir} can't be read: {error}; move {SAMPLES} and answers away") from None
    if rows:
        shown.append(table(["after step", "prompt", "answer", "reward"], rows))
    return shown


def _text(path: Path) -> Markup:
    return preformatted(path.read_text("utf-8", "replace")[:LONGEST_SAMPLES])


def _some_steps(folder: Path, pattern: str) -> list[Path]:
    """Files whose names are steps: the first, the last, and some between them."""
    files = sorted(folder.glob(pattern), key=lambda path: int(path.stem))
    if len(files) <= SHOWN_STEPS:
        return files
    return [files[index * (len(files) - 1) // (SHOWN_STEPS - 1)] for index in range(SHOWN_STEPS)]
