"""The commands that look at a run without changing it: `inspect`, `compare` and `replay`.

Each function takes the parsed flags and the config values of the command line, as those of `cli.commands`, and imports
the heavy modules that it needs itself. Called by `cli.main`.
"""

import argparse
import json
import sys
from pathlib import Path

from t5like.errors import ConfigError, printable
from t5like.io.paths import expand


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

    for line in run.describe(expand(options.workdir).absolute()):
        print(printable(line))


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


def replay(options: argparse.Namespace, _) -> None:
    """`t5like replay`."""
    if options.step < 1:
        raise ConfigError(f"--step={options.step} must be at least 1: the first update is step 1; use --step=1")
    from t5like.inspect import replay

    replay.replay(expand(options.workdir).absolute(), options.step, lambda line: print(printable(line), flush=True))


INSPECTIONS = {"checkpoint": inspect_checkpoint, "run": inspect_run}
COMMANDS = {
    "inspect": lambda options, overrides: INSPECTIONS[options.subject](options, overrides),
    "compare": compare,
    "replay": replay,
}
