"""`t5like inspect run`: whether a run is healthy, and what happened in it, from its directory.

`describe` gives the lines for a terminal; `inspect.run_page` makes a page of the same report.
"""

import datetime
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from t5like.checkpoint.run_directory import config_of
from t5like.config.schema import changed_fields
from t5like.inspect import health, run_files, run_time
from t5like.inspect.health import Finding, layer_of, trend
from t5like.inspect.run_files import Events, Run
from t5like.inspect.run_time import TimeUse
from t5like.metrics.loss_curve import points
from t5like.metrics.time_spent import PARTS
from t5like.train import profile_summary

LOSSES = 10  # held-out losses that are shown, the last ones


class Report(NamedTuple):
    """Everything that is shown of a run."""

    run: Run
    events: Events
    use: TimeUse
    findings: list[Finding]


def read_report(workdir: Path, *, verify: bool = False) -> Report:
    """Read a run directory; `verify` reads the arrays of its checkpoints and compares their digests.

    Raises:
        CheckpointError, DataError: there is no run, or one of its files can't be read.
    """
    config_of(workdir)  # its messages say what is missing
    run = run_files.read(workdir)
    events = run_files.events(run, verify=verify)
    use = run_time.time_use(run, events)
    return Report(run, events, use, health.findings(run, events, use))


def describe(report: Report) -> list[str]:
    """The lines that the command prints."""
    lines = [f"run        {report.run.path}", f"verdict    {health.verdict(report.run, report.findings)}"]
    for finding in report.findings:
        name = "problem" if finding.kind == "bad" else "warning"
        lines += [f"{name:11}{finding.what}", f"           rule: {finding.rule}", f"           {finding.remedy}"]
    pairs = [*progress(report), *training(report.run), *time_facts(report), *happened(report)]
    lines += [f"{name:11}{text}" for name, text in pairs]
    lines += [f"config     {name}={value}" for name, value in changed_fields(report.run.config).items()]
    return lines + [f"loss       {line}" for line in losses(report.run)]


# ---- Facts, as pairs of a name and a text ----


def progress(report: Report) -> Iterator[tuple[str, str]]:
    """State, steps, and the predicted end."""
    run, left = report.run, report.use.left_seconds
    state = run_files.state(run)
    text = f"{state}, step {run.step:,} of {run.config.train.num_steps:,}"
    if state == "running" and left is not None:
        end = datetime.datetime.fromtimestamp(time.time() + left).strftime("%Y-%m-%d %H:%M")
        text += f"; it ends in about {duration(left)}, at {end}, at the recent rate"
    elif state == "stopped":
        text += "; not running: the same command continues it"
        text += f", for about {duration(left)}" if left else ""
    yield "state", text


def training(run: Run) -> Iterator[tuple[str, str]]:
    """Loss, reward, learning rate, norms, skipped updates."""
    for label, name in (
        ("training", "train/loss"),
        ("reward", "train/reward"),
        ("KL", "train/kl"),
        ("gradient", "train/grad_norm"),
    ):
        values = points(run.records, name)[1]
        if values:
            unit = {"gradient": "norm ", "training": "loss "}.get(label, "")
            yield label, f"{unit}{values[-1]:.4g}" + (f", {way}" if (way := trend(values)) else "")
    if rates := points(run.records, "train/learning_rate")[1]:
        optimizer = run.config.optimizer
        yield "rate", f"{rates[-1]:.3g} ({optimizer.name}, {optimizer.schedule}, peak {optimizer.learning_rate:g})"
    if ratios := health.last_update_ratios(run):
        low, high = (choose(ratios, key=lambda name: ratios[name]) for choose in (min, max))
        yield (
            "updates",
            f"update/parameter ratio {ratios[low]:.2g} ({layer_of(low)}) to {ratios[high]:.2g} ({layer_of(high)})",
        )
    skipped, spikes = (
        sum(map(bool, points(run.records, f"train/{name}")[1])) for name in ("skipped_updates", "spikes")
    )
    if run.records:
        yield "skipped", f"{skipped:,} updates, {spikes:,} spikes"


def time_facts(report: Report) -> Iterator[tuple[str, str]]:
    """Speed, where the time goes, goodput."""
    run, use = report.run, report.use
    if rates := points(run.records, "train/tokens_per_second")[1]:
        steps, mfu = (points(run.records, f"train/{name}")[1] for name in ("step_seconds", "mfu"))
        text = (
            f"{statistics.median(rates):,.0f} tokens/s, last {rates[-1]:,.0f}; {statistics.median(steps):.3g} s a step"
        )
        if mfu:
            median = statistics.median(mfu)
            busy = "unknown: the machine was busy when its peak rate was measured"
            text += f"; MFU {median:.1%}" if median <= 1 else f"; MFU {busy}"
        yield "speed", text
    if use.wall:
        parts = sorted(((use.seconds.get(part, 0.0), part) for part in PARTS), reverse=True)
        shares = ", ".join(f"{part} {seconds / use.wall:.0%}" for seconds, part in parts if seconds / use.wall >= 0.005)
        yield "time", f"{shares} of {duration(use.wall)}"
        starts = len(report.events.starts)
        text = (
            f"{use.goodput:.0%} of the time of {starts} {'start' if starts == 1 else 'starts'} is in steps that count"
        )
        yield "goodput", text
    if profile := profile_summary.newest(run.path):
        yield "profile", f"{profile[1]}; {profile[0]}"


def happened(report: Report) -> Iterator[tuple[str, str]]:
    """Starts, changes, checkpoints, rewinds and bad steps."""
    for start in report.events.starts:
        yield "start", f"{start['time']} after step {start['step']:,}, t5like {start['versions']['t5like']}"
        for change in start.get("changes", ()):
            yield "change", change
    saved, history = report.events.checkpoints, report.events.history
    if saved:
        rewinds = f"; {history.rewinds} rewinds" if history else ""
        yield "saved", f"steps {', '.join(f'{row.step:,}' for row in saved)}{rewinds}; newest: {saved[-1].state}"
    for step, rows in history.rows.passed_over() if history else ():
        yield "rewind", f"to step {step:,}, over {rows:,} rows"
    for step, reason in report.events.bad_steps.items():
        yield "bad step", f"{step:,}: {reason}"


def losses(run: Run) -> list[str]:
    """The last training loss and the last held-out losses."""
    trained = [record for record in run.records if "train/loss" in record]
    evaluated = [record for record in run.records if record.get("eval/loss") is not None]
    shown = lambda value: "not finite" if value is None else f"{value:.4f}"
    last = [f"{shown(each['train/loss'])} at step {each['step']:,}, training" for each in trained[-1:]]
    return last + [f"{shown(each['eval/loss'])} at step {each['step']:,}, held out" for each in evaluated[-LOSSES:]]


def duration(seconds: float) -> str:
    """A time for readers: ``42 s``, ``3 min 20 s``, ``5 h 12 min``, ``3 d 4 h``."""
    for unit, name, smaller, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= unit:
            return f"{int(seconds // unit)} {name} {int(seconds % unit // smaller)} {small}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
