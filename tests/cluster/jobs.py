"""Jobs of the test cluster: submit by `t5like launch slurm`, wait, read states, find processes, compare results."""

import contextlib
import json
import os
import re
import signal
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
        assert time.monotonic() < deadline, f"not reached in {SECONDS} s: {text}" + (said_about(job) if job else "")
        time.sleep(0.2)
    return value


def said_about(job: str) -> str:
    """What Slurm says about a job, and the last lines of its daemons' logs that name it."""
    lines = [str(show(job))]
    for path in sorted(Path(os.environ["SLURM_CONF"]).parent.glob("slurm*.log")):
        named = [line for line in path.read_text().splitlines() if re.search(rf"\b[Jj]ob(Id=| |:|_id=?)?{job}\b", line)]
        lines += [f"{path.name}: {line}" for line in named[-15:]]
    return "\n".join(("", *lines))


def scontrol(*arguments: str) -> None:
    """Run scontrol."""
    subprocess.run(["scontrol", *arguments], check=True)


def tasks(job: str) -> dict[int, int]:
    """The processes of the tasks of a job's step: the pid of each, by rank."""
    return {
        int(environment["SLURM_PROCID"]): pid
        for pid, environment in processes(job).items()
        if "SLURM_STEP_NODELIST" in environment and b"t5like\0" in command_of(pid)
    }


def processes(job: str) -> dict[int, dict[str, str]]:
    """The processes of a job that Slurm's daemons have started: the environment of each, by pid."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            environment = dict(part.partition("=")[::2] for part in path.read_bytes().decode().split("\0"))
        except (OSError, ValueError):
            continue
        if environment.get("SLURM_JOB_ID") == job:
            found[int(path.parent.name)] = environment
    return found


def lose_host(node: str, job: str) -> None:
    """End all of a node at once, as when its power fails: its daemon and a job with the daemons of its steps."""
    pid = Path(os.environ["SLURM_CONF"]).parent / f"slurmd.{node}.pid"
    title = f"slurmstepd: [{job}.".encode()
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*") if command_of(int(path.name)).startswith(title)]
    for each in (int(pid.read_text()), *pids, *processes(job)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)


def command_of(pid: int) -> bytes:
    """The command line of a process; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
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
