"""A run that is killed or stopped and started again equals an uninterrupted one bitwise: real processes, one device."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from t5like.checkpoint.checkpoints import Checkpoints
from t5like.checkpoint.step_directories import COMMITTED
from t5like.metrics.writers import read

ROOT = Path(__file__).parent.parent
ONE_DEVICE = os.environ["XLA_FLAGS"].rpartition(" ")[0]  # without the eight that conftest asks for
SPEED = {"train/tokens_per_second", "train/step_seconds", "train/mfu"}


def start(*arguments, interrupted: tuple[int, int, Path] | None = None) -> subprocess.CompletedProcess:
    """Run `t5like` in a process of its own on one CPU device.

    `interrupted` is (step, signal, checkpoint): the process sends itself the signal after that step, when the
    checkpoint is complete.
    """
    environment = {**os.environ, "XLA_FLAGS": ONE_DEVICE, "PYTHONPATH": str(ROOT)}
    program = ["-m", "t5like"]
    if interrupted:
        step, number, checkpoint = interrupted
        options = [f"--step={step}", f"--signal={int(number)}", f"--after={checkpoint / COMMITTED}"]
        program = ["tests/instrumented_run.py", *options, "--"]
    return subprocess.run(
        [sys.executable, *program, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def arguments(flags) -> list[str]:
    """A run of 12 steps with checkpoints at 5 and 10, and evaluations at 4, 8 and 12. A decoder compiles fastest."""
    values = {
        "model.architecture": "decoder",
        "data.objective": "causal_lm",
        "model.dropout_rate": 0.1,
        "train.checkpoint_every": 5,
        "train.eval_every": 4,
    }
    return ["train", *flags, *(f"--config.{name}={value}" for name, value in values.items())]


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """An uninterrupted run, and its finished process."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    process = start(*arguments, f"--workdir={workdir}")
    assert process.returncode == 0, process.stderr
    return workdir, process


def leaves(workdir: Path, step: int = 12) -> dict:
    return Checkpoints(workdir / "checkpoints", keep=1).meta(step).leaves


def learned(workdir: Path) -> list[dict]:
    """The metrics without speed."""
    return [{name: value for name, value in record.items() if name not in SPEED} for record in read(workdir)]


def test_a_run_that_is_killed_stopped_and_restarted_equals_an_uninterrupted_run(arguments, finished, tmp_path):
    straight, workdir = finished[0], tmp_path / "run"
    interrupted = lambda step, number: start(
        *arguments, f"--workdir={workdir}", interrupted=(step, number, workdir / "checkpoints" / "5")
    )
    steps = lambda: Checkpoints(workdir / "checkpoints", keep=1).steps()

    killed = interrupted(8, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    assert read(workdir)[-1]["step"] >= 8 and steps() == [5]

    saved = [5]  # a stopped run saves a checkpoint, and the same command continues
    for number, step in ((signal.SIGTERM, 7), (signal.SIGUSR1, 9)):
        stopped = interrupted(step, number)
        assert stopped.returncode == 75, stopped.stderr
        assert f"after step {saved[-1]}, compiled" in stopped.stdout
        last = max(record["step"] for record in read(workdir))
        assert step <= last <= step + 1 and steps() == [*saved, last]
        saved.append(last)
        assert stopped.stderr.splitlines()[-1] == (
            f"t5like: stopped by a signal after step {last}; saved in {workdir}; the same command continues"
        )

    again = start(*arguments, f"--workdir={workdir}")
    assert again.returncode == 0 and f"after step {last}, compiled" in again.stdout, again.stderr
    assert leaves(workdir) == leaves(straight)
    assert learned(workdir) == learned(straight)
    names = [(record["step"], name) for record in learned(workdir) for name in record if name != "step"]
    assert len(names) == len(set(names)) and {step for step, name in names if name == "train/loss"} == set(range(1, 13))


def test_the_lines_that_a_new_run_prints(finished):
    _, process = finished
    beginnings = [line.split()[0] for line in process.stdout.split("\n\n")[0].splitlines()]
    assert beginnings == ["model", "devices", "data", beginnings[3], "run", "machine", "start"]
    shown = [line.split()[0] for line in process.stderr.splitlines()]
    training = shown.index("baselines:")  # lines before it are the progress of data preparation
    assert {"reading", "training", "tokenizing"} >= set(shown[:training]), shown
    assert shown[training:] == ["baselines:", *["step"] * (12 + 4)]


def test_an_interrupt_from_outside_stops_a_run_between_two_steps(arguments, tmp_path):
    environment = {**os.environ, "XLA_FLAGS": ONE_DEVICE}
    command = [
        sys.executable,
        "-m",
        "t5like",
        *arguments,
        f"--workdir={tmp_path}/run",
        "--config.train.num_steps=1_000_000",
        "--config.train.eval_every=1_000_000",
        "--config.train.checkpoint_every=1_000_000",
    ]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        until = time.monotonic() + 60
        while not any("train/loss" in record for record in read(tmp_path / "run")) and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 75, err
    [step] = Checkpoints(tmp_path / "run" / "checkpoints", keep=1).steps()
    assert step == read(tmp_path / "run")[-1]["step"] and f"after step {step:,}; saved" in err


def test_fake_devices_make_a_mesh_and_a_complete_run_prints_that_it_is_complete(flags, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    mesh = ["--fake_devices=8", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    process = start("train", *flags, f"--workdir={tmp_path}/run", *mesh, "--config.train.num_steps=2")
    assert process.returncode == 0 and process.stderr == ""
    assert "8 x cpu, data 2 x fsdp 2 x tensor 2" in process.stdout and process.stdout.splitlines()[-1].startswith(
        "complete   2 of 2 steps"
    )
    assert leaves(tmp_path / "run", 2) == leaves(trained, 2) and read(tmp_path / "run") == read(trained)
