"""Jobs of the test cluster: submit by `t5like launch slurm`, wait, read states, find processes, compare results."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SECONDS = 300  # of a case; several run at the same time


def launch(*arguments: str) -> tuple[int, str, str]:
    """Run `python -m launch ...`; returns exit code, standard output and standard error."""
    done = subprocess.run(
        [sys.executable, "-m", "launch", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


def show(job: str) -> dict[str, str]:
    """What `scontrol show job` prints about a job, by field."""
    text = subprocess.run(["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True, check=True)
    return dict(part.partition("=")[::2] for part in text.stdout.splitlines()[0].split(" ") if "=" in part)


def wait(job: str, *states: str) -> dict[str, str]:
    """Wait until a job is in one of these states; returns its fields."""
    return until(lambda: (fields := show(job))["JobState"] in states and fields, f"{job} is {'/'.join(states)}", job)


def until(condition: Callable[[], Any], text: str, job: str = "") -> Any:
    """Wait until a condition is true, and return its value."""
    deadline = time.monotonic() + SECONDS
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not reached in {SECONDS} s: {text}; {show(job) if job else ''}"
        time.sleep(0.2)
    return value


def scontrol(*arguments: str) -> None:
    """Run scontrol."""
    subprocess.run(["scontrol", *arguments], check=True)


def states_of(node: str) -> str:
    """What Slurm says of a node, such as `idle` or `drained`."""
    command = ["sinfo", "--noheader", "--Node", f"--nodes={node}", "--format=%T"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def tasks(job: str) -> dict[int, int]:
    """The processes of the tasks of a job's step: the pid of each, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            environment = dict(part.partition("=")[::2] for part in path.read_bytes().decode().split("\0"))
        except (OSError, ValueError):
            continue
        if (
            environment.get("SLURM_JOB_ID") == job
            and "SLURM_STEP_NODELIST" in environment
            and b"t5like\0" in command_of(path.parent / "cmdline")
        ):
            found[int(environment["SLURM_PROCID"])] = int(path.parent.name)
    return found


def steps(job: str) -> list[str]:
    """Process ids of the daemons of a job's steps, which live a little longer than its tasks."""
    title = f"slurmstepd: [{job}.".encode()
    return [path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline") if command_of(path).startswith(title)]


def command_of(path: Path) -> bytes:
    """The command line of a process; empty if it has ended."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def checkpoints(workdir: Path) -> list[int]:
    """The steps of the complete checkpoints."""
    return sorted(int(path.parent.parent.name) for path in workdir.glob("checkpoints/*/meta/metadata"))


def digests(workdir: Path) -> dict:
    """Shape, dtype and digest of each leaf of the state in the last checkpoint."""
    step = checkpoints(workdir)[-1]
    body = json.loads((workdir / f"checkpoints/{step}/meta/metadata").read_text())["body"]
    return {"step": step, **body["leaves"]}


def log(workdir: Path) -> str:
    """The text of the job's log."""
    return "".join(path.read_text(errors="replace") for path in sorted((workdir / "logs").glob("*.log")))


def number(output: str) -> str:
    """The number of the job in what `launch slurm` printed."""
    return re.search(r"slurm:(\d+)", output)[1]
