"""The one place that starts a client program of a backend: `sbatch`, `gcloud` and others, found on PATH.

Arguments are a list and never pass through a shell.
"""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from t5like.errors import ConfigError


class Result(NamedTuple):
    """What a program returned."""

    code: int
    output: str
    errors: str


def run(arguments: Sequence[str], *, stdin: str = "", needed_for: str) -> Result:
    """Run a program to its end and return its exit code and its output.

    Raises:
        ConfigError: the program is not installed.
    """
    find(arguments[0], needed_for=needed_for)
    done = subprocess.run(arguments, input=stdin, capture_output=True, text=True, errors="replace", check=False)
    return Result(done.returncode, done.stdout, done.stderr)


def follow(arguments: Sequence[str], *, needed_for: str) -> int:
    """Run a program whose output goes to this terminal, such as a log that is followed; returns its exit code."""
    find(arguments[0], needed_for=needed_for)
    return subprocess.run(arguments, check=False).returncode


def find(program: str, *, needed_for: str) -> str:
    """Return the path of a program; raises ConfigError if it is not on PATH."""
    path = shutil.which(program)
    if path is None:
        raise ConfigError(f"{program} is needed for {needed_for} and is not on PATH; install it, or use --dry_run")
    return path


def start(arguments: Sequence[str], *, log: Path, needed_for: str) -> subprocess.Popen:
    """Start a program in a session of its own, which outlives this process and its terminal; it writes to `log`."""
    find(arguments[0], needed_for=needed_for)
    with log.open("wb") as file:
        return subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
