"""A stand-in for Google Cloud: `gcloud` on PATH plays TPU VMs whose workers are folders of this machine."""

import dataclasses
import functools
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from launch import tpu_vm
from launch.job import JobSpec, Mount

JOB = JobSpec(
    name="mine",
    command=("train", "--config=t5_small", "--workdir=/mnt/runs/mine"),
    workdir="/mnt/runs/mine",
    accelerator="v6e:2x2",
    zone="us-east5-b",
    spot=True,
    setup=("true",),
    mounts=(Mount("/mnt/runs", "/mnt/runs"),),
)
# Stands in for the interpreter of the workers, and for the one that it installs: keeps its arguments and environment,
# and ends as the next line of `plan` says, 0 without one.
PYTHON = r"""#!/bin/bash
case "$1 $2" in
-c\ *) exit ;;
'-m venv') mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; exit ;;
'-m pip') printf '%s\0' "$@" >"$STAND_IN/pip.$$"; exit ;;
esac
printf '%s\0' "$@" >"$STAND_IN/arguments.$$"
env -0 >"$STAND_IN/environment.$$"
for part in "$@"; do case "$part" in --workdir=*) checkpoints=${part#*=}/checkpoints ;; esac; done
mkdir -p "$checkpoints"
exec 9>"$STAND_IN/lock" && flock 9
plan=$(head -n 1 "$STAND_IN/plan")
sed -i 1d "$STAND_IN/plan"
exec 9>&-
echo "training: ${plan:-0}"
case "$plan" in
wait)
    trap 'mkdir -p "$checkpoints/7"; touch "$checkpoints/7/commit_success.txt"; exit 75' TERM
    touch "$STAND_IN/waiting"
    for ((tick = 0; tick < 1200; tick++)); do [ -f "$STAND_IN/go" ] && exit; sleep 0.05; done
    ;;
preempted) echo SUSPENDED >"$STAND_IN/state"; exit 143 ;;
saved)
    step=$checkpoints/$(($(ls "$checkpoints" | wc -l) + 1))
    mkdir "$step" && touch "$step/commit_success.txt"
    exit 75 ;;
*) exit "${plan:-0}" ;;
esac
"""
SUDO = """#!/bin/bash
case "$1" in --preserve-env=*) shift ;; esac
exec "$@"
"""
DOCKER = """#!/bin/bash
[ "$1" = run ] || exit 0
while [ "$1" != "$IMAGE" ]; do shift; done
shift
exec "$@"
"""


def make_cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that plays Google Cloud, with stand-ins for gcloud and the workers' programs on PATH."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "gcloud").symlink_to(Path(__file__).with_suffix(".sh"))
    for name, text in (("t5python", PYTHON), ("sudo", SUDO), ("docker", DOCKER), ("mountpoint", "#!/bin/bash\nfalse")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (programs / "gcsfuse").symlink_to("/bin/true")
    (tmp_path / "plan").touch()
    monkeypatch.setenv("STAND_IN", str(tmp_path))
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "local"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return tmp_path


def local_job(cloud: Path, *plan: str | int, **fields) -> JobSpec:
    """A job whose run directory is on this machine, and whose starts end as `plan` says."""
    (cloud / "plan").write_text("".join(f"{line}\n" for line in plan))
    fields = {"workdir": f"{cloud}/runs/mine", "mounts": (Mount(f"{cloud}/runs", f"{cloud}/runs"),), **fields}
    fields = {"command": ("train", "--config=tiny", f"--workdir={fields['workdir']}"), "python": "t5python", **fields}
    job = dataclasses.replace(JOB, **fields)
    tpu_vm.check(job)
    return job


def render(job: JobSpec) -> str:
    """The script without its pauses, and with a lower limit of restarts."""
    return tpu_vm.render(job).replace("\npoll=30 ", "\npoll=0 ").replace("most_stalled=10 ", "most_stalled=2 ")


def start(cloud: Path, job: JobSpec, *arguments: str) -> subprocess.Popen:
    (cloud / "job.sh").write_text(render(job))
    command = ["bash", str(cloud / "job.sh"), *arguments]
    # A suite in the background ignores SIGINT, and bash can't trap what was ignored when it started.
    interruptible = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, **pipes, preexec_fn=interruptible)


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """The exit code of a script and what it printed."""
    try:
        output, _ = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, output


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.02)


def calls(cloud: Path, action: str) -> list[list[str]]:
    """The arguments of the calls of gcloud with this action."""
    every = [call.split("\0")[:-1] for call in (cloud / "calls").read_text().split("\1")[:-1]]
    return [call for call in every if call[3] == action]


def starts(cloud: Path) -> int:
    """How often the command has started, on all workers."""
    return len(list(cloud.glob("arguments.*")))
