"""The commands that look at a run without changing it: `inspect`, `compare` and `replay`.

Each function takes the parsed flags and the config values of the command line, as those of `cli.commands`, and imports
the heavy modules that it needs itself. Called by `cli.main`.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from t5like.config import loader
from t5like.errors import CheckpointError, ConfigError, printable
from t5like.io.atomic import replace_file
from t5like.io.paths import expand

if TYPE_CHECKING:
    from t5like.config.schema import Config


def inspect_checkpoint(options: argparse.Namespace, _) -> None:
    """`t5like inspect checkpoint`."""
    from t5like.inspect.checkpoint import inspect_checkpoints, table

    rows, error = inspect_checkpoints(expand(options.workdir).absolute(), verify=options.verify)
    print(printable(table(rows), kept="\n"))
    if error:
        raise error


def inspect_run(options: argparse.Namespace, _) -> None:
    """`t5like inspect run`."""
    from t5like.inspect import run

    report = run.read_report(expand(options.workdir).absolute(), verify=options.verify)
    for line in run.describe(report):
        print(printable(line))
    if options.html:
        from t5like.inspect.run_page import run_page

        write_page(options.html, run_page(report), report.run.path)


def config_or_run(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> "Config | None":
    """The config of --config, or None with --workdir.

    Raises:
        ConfigError: neither is given, or both.
    """
    if (options.config is None) == (options.workdir is None):
        command = f"t5like inspect {options.subject}"
        raise ConfigError(f"{command} needs either --config or --workdir; use --config=tiny, or --workdir=RUN")
    return loader.load(options.config, overrides) if options.config is not None else None


def inspect_data(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    """`t5like inspect data`."""
    config = config_or_run(options, overrides)
    if options.step < 1:
        raise ConfigError(f"--step={options.step} must be at least 1: the first update is step 1; use --step=1")
    from t5like.inspect import data, data_page, data_text, replay, step_data

    runs = [] if options.workdir is None else [expand(options.workdir).absolute()]
    plan = step_data.plan_of_run(*runs, options.step) if runs else step_data.plan_of_config(config, options.step)
    replay.check_number(plan.config, options.step)
    report = data.inspect_data(plan, options.rows)
    if options.html:
        write_page(options.html, data_page.render(report), *runs)
    print(json.dumps(report, indent=1)) if options.json else data_text.show(report)


def inspect_model(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    """`t5like inspect model`."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # leaves an accelerator of this machine to other programs
    config = config_or_run(options, overrides)
    if options.num_slices != 1 and options.topology is None:
        raise ConfigError(f"--num_slices={options.num_slices} goes with --topology; use --topology=v5e:16x16")
    from t5like.checkpoint.run_directory import config_of
    from t5like.inspect import model, model_text
    from t5like.plan import topology

    machine = topology.parse(options.topology, options.num_slices) if options.topology is not None else None
    runs = [] if options.workdir is None else [expand(options.workdir).absolute()]
    report = model.inspect_model(config_of(*runs) if runs else config, machine)
    if options.html:
        write_page(options.html, model_text.render(report), *runs)
    print(json.dumps(report, indent=1) if options.json else model_text.text(report))


def write_page(path: Path, text: str, *runs: Path) -> None:
    """Write a page of HTML.

    Args:
        path: of the file.
        text: the document.
        runs: directories of runs, which are not changed.

    Raises:
        ConfigError: the page would lie in one of the runs.
        CheckpointError: it can't be written.
    """
    path = expand(path)
    inside = next((run for run in runs if path.resolve().is_relative_to(run.resolve())), None)
    if inside:
        raise ConfigError(f"--html={path} lies in the run {inside}, which is not changed; use another path")
    replace_file(path, text, CheckpointError, "use another --html")
    print(printable(f"page       {path}"), file=sys.stderr)


def compare(options: argparse.Namespace, _) -> None:
    """`t5like compare`."""
    from t5like.inspect import compare

    runs, empty = compare.load([expand(path) for path in options.runs])
    for path in empty:
        print(printable(f"{path} holds no run yet"), file=sys.stderr)
    comparison = compare.compare(runs)
    print(json.dumps(comparison, indent=1) if options.json else compare.text(comparison))
    picture = options.output or Path("compare.png")
    compare.draw(runs, picture)
    print(printable(f"loss curves  {picture}"), file=sys.stderr if options.json else sys.stdout)


def compare_steps(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    """`t5like compare-steps`."""
    if options.step is not None and options.step < 1:
        raise ConfigError(f"--step={options.step} must be at least 1: the first update is step 1; use --step=1")
    if options.output and (options.b or options.python or options.sides["b"]):
        raise ConfigError("--output writes the tensors of A alone; leave B, --b.config and --python out")
    if options.output and options.output.suffix != ".npz":
        raise ConfigError(f"--output={options.output} must end in .npz; use --output=a.npz")
    from t5like.inspect import compare_steps

    a, b = (
        compare_steps.Side(name.upper(), path, overrides, options.sides[name])
        for name, path in (("a", options.a), ("b", options.b or options.a))
    )
    if options.output:
        print(printable(f"{options.output}  {compare_steps.write(a, options.step, expand(options.output).absolute())}"))
        return
    compare_steps.compare(a, b, options.step, options.python, lambda line: print(printable(line), flush=True))


def replay(options: argparse.Namespace, _) -> None:
    """`t5like replay`."""
    if options.step < 1:
        raise ConfigError(f"--step={options.step} must be at least 1: the first update is step 1; use --step=1")
    from t5like.inspect import replay

    replay.replay(expand(options.workdir).absolute(), options.step, lambda line: print(printable(line), flush=True))


INSPECTIONS = {"checkpoint": inspect_checkpoint, "run": inspect_run, "data": inspect_data, "model": inspect_model}
COMMANDS = {
    "inspect": lambda options, overrides: INSPECTIONS[options.subject](options, overrides),
    "compare": compare,
    "compare-steps": compare_steps,
    "replay": replay,
}
