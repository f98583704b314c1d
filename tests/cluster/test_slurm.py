"""Jobs on a real Slurm, which `make cluster` starts on this machine: they end as the same run without interruption.

The cases are independent; several workers of pytest-xdist run them on one cluster.
"""

import fcntl
import functools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from jobs import ROOT, checkpoints, digests, launch, log, lose_host, number, scontrol, show, tasks, until, wait
from one_device import XLA_FLAGS
from slurm_cluster import NODES, free_ports, start_node

STEPS = 30
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")


@pytest.fixture(scope="session")
def train(flags) -> list[str]:
    """The command of the smallest run."""
    values = {
        "model.architecture": "encoder",
        "data.objective": "mlm",
        "train.num_steps": STEPS,
        "train.log_every": 10,
        "train.checkpoint_every": 5,
        "train.process_timeout_seconds": 60,
    }
    return ["train", *flags, *(f"--config.{name}={value}" for name, value in values.items())]


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A directory of all workers."""
    directory = tmp_path_factory.getbasetemp()
    directory = (directory.parent if "PYTEST_XDIST_WORKER" in os.environ else directory) / "shared"
    directory.mkdir(exist_ok=True)
    return directory


@pytest.fixture(scope="session")
def reference(shared, train) -> Callable[[], dict]:
    """Return the digests of two processes without Slurm that train to the end; one worker runs them."""
    return functools.cache(lambda: without_slurm(shared / "reference", train, 2, 1))


def without_slurm(workdir: Path, train: list, processes: int, devices: int) -> dict:
    """Train in processes of this machine, unless another worker has; return the digests of the state."""
    with open(workdir.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not workdir.exists():
            flags = [f"--coordinator=localhost:{free_ports(1)[0]}", f"--num_processes={processes}"]
            flags += [f"--fake_devices={devices}", f"--workdir={workdir}"]
            command = [sys.executable, "-m", "t5like", *map(str, train), *flags]
            environment = {**os.environ, "XLA_FLAGS": XLA_FLAGS}
            started = [
                subprocess.Popen([*command, f"--process_id={rank}"], cwd=ROOT, env=environment)
                for rank in range(processes)
            ]
            assert [each.wait() for each in started] == [0] * processes
    return digests(workdir)


@pytest.fixture
def submit(tmp_path, train):
    """Submit the run; returns the number of the job. Its steps are slow until it starts again, if `slow`.

    It is planned before only if `plan`, which compiles its step.
    """
    slow_start = tmp_path / "slow_start"
    slow_start.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/cluster/slow_start.py "$@"\n')
    slow_start.chmod(0o755)

    def run(*options: str, slow: bool = True, nodes: int = 2, flags: tuple[str, ...] = (), plan: bool = False) -> str:
        python = slow_start if slow else sys.executable
        cache = os.environ["JAX_COMPILATION_CACHE_DIR"]
        command = [*map(str, train), *flags, f"--workdir={tmp_path}/run"]
        own = [f"--nodes={nodes}", f"--python={python}", f"--env=XLA_FLAGS={XLA_FLAGS}", f"--compile_cache={cache}"]
        own += ["--env=JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", *([] if plan else ["--skip_plan"])]
        devices = [] if any("fake_devices" in option for option in options) else ["--fake_devices=1"]
        code, out, err = launch(
            "slurm", *own, "--cpus_per_process=1", "--workdir_is_shared", *devices, *options, "--", *command
        )
        assert code == 0, err
        return number(out)

    return run


def progress(job: str, workdir: Path) -> None:
    """Wait until a job trains and has saved."""
    until(lambda: checkpoints(workdir), f"{workdir} has a checkpoint; {job}", job)


def assert_finished(job: str, workdir: Path, reference: Callable[[], dict], restarts: int) -> None:
    wanted = reference()  # while the job runs
    fields = wait(job, *ENDED)
    assert (fields["JobState"], fields["ExitCode"]) == ("COMPLETED", "0:0"), log(workdir)
    assert fields["Restarts"] == str(restarts), log(workdir)
    assert digests(workdir) == wanted
    assert not list(workdir.glob("logs/*.restarts"))


def test_a_run_on_two_nodes_ends_as_without_slurm(submit, reference, tmp_path):
    job = submit(slow=False, plan=True)
    assert_finished(job, tmp_path / "run", reference, 0)
    code, out, _ = launch("status", tmp_path / "run")
    assert code == 0 and f"slurm:{job}  COMPLETED" in out
    code, out, _ = launch("logs", f"slurm:{job}")
    assert code == 0 and out == log(tmp_path / "run") and "2 x cpu in 2 processes" in out


def test_a_killed_process_starts_the_job_again_and_counts(submit, reference, tmp_path):
    job, workdir = submit(), tmp_path / "run"
    progress(job, workdir)
    os.kill(tasks(job)[1], signal.SIGKILL)
    until(lambda: list(workdir.glob("logs/*.restarts")), "the restart is counted", job)
    assert_finished(job, workdir, reference, 1)
    assert "1 of 10 restarts are used" in log(workdir)


def test_a_job_that_is_queued_again_by_scontrol_goes_on(submit, reference, tmp_path):
    job, workdir = submit(), tmp_path / "run"
    progress(job, workdir)
    scontrol("requeue", job)
    assert_finished(job, workdir, reference, 1)


def test_the_time_limit_saves_and_starts_again(submit, reference, tmp_path):
    job, workdir = submit("--time_limit=1m", "--grace=10s"), tmp_path / "run"
    restarts = int(wait(job, *ENDED)["Restarts"])  # on a slow machine the second start reaches the limit as well
    assert_finished(job, workdir, reference, restarts)
    # On a slow machine the first start may reach the limit before it has anything to save.
    again = r"preempted and saved(, without a new checkpoint)?; the job starts again"
    assert restarts and re.search(again, log(workdir))


def test_a_preempted_job_comes_back(submit, reference, tmp_path):
    job, workdir = submit("--partition=spot", "--gres=slot:1"), tmp_path / "run"
    progress(job, workdir)
    urgent = subprocess.run(
        [
            "sbatch",
            "--parsable",
            "--partition=urgent",
            "--gres=slot:1",
            "--nodes=2",
            "--output=/dev/null",
            "--wrap=true",
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    wait(urgent, "COMPLETED")
    assert_finished(job, workdir, reference, 1)


def test_a_cancelled_job_has_saved_and_stays_away(submit, reference, tmp_path):
    job, workdir = submit(), tmp_path / "run"
    progress(job, workdir)
    code, out, err = launch("cancel", workdir)
    assert code == 0 and f"slurm:{job}" in out, err
    fields = wait(job, *ENDED)
    assert fields["JobState"] == "CANCELLED" and fields["Restarts"] == "0"
    assert checkpoints(workdir)[-1] < STEPS and "saved in" in log(workdir)
    assert_finished(submit(slow=False), workdir, reference, 0)


def test_a_lost_host_starts_the_job_again(submit, tmp_path):
    job, workdir = submit("--partition=lost", nodes=1), tmp_path / "run"
    progress(job, workdir)
    lose_host(NODES[-1], job)
    scontrol("update", f"NodeName={NODES[-1]}", "State=DOWN", "Reason=lost")  # as Slurm does after SlurmdTimeout
    until(lambda: show(job)["JobState"] == "PENDING", "the job is in the queue again", job)
    start_node(NODES[-1])
    scontrol("update", f"NodeName={NODES[-1]}", "State=RESUME")
    fields = wait(job, *ENDED)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), log(workdir)
    assert checkpoints(workdir)[-1] == STEPS, log(workdir)


@pytest.mark.parametrize("code, extra", [(2, ()), (3, ("--config.data.source=text:/nowhere",))])
def test_an_error_of_the_user_ends_the_job(submit, tmp_path, code, extra):
    if code == 2:
        (tmp_path / "run").mkdir()
        (tmp_path / "run/foreign").touch()
    job = submit(slow=False, flags=extra)
    fields = wait(job, *ENDED)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", f"{code}:0", "0")
    assert f"exit code {code}; the job ends and does not start again" in log(tmp_path / "run")


def test_a_job_that_never_makes_progress_ends(submit, tmp_path):
    killed = tmp_path / "killed"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    job = submit("--retries=1", f"--python={killed}", nodes=1)
    fields = wait(job, *ENDED)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "137:0", "1")
    assert "the job ends: 1 of 1 restarts are used" in log(tmp_path / "run")


@pytest.mark.parametrize("processes, devices", [(2, 1), (1, 2)], ids=["per_gpu", "per_host"])
def test_one_process_per_gpu_or_per_host_ends_as_without_slurm(submit, train, tmp_path, processes, devices):
    flags = ("--config.train.num_steps=6",)
    options = (f"--processes_per_node={processes}", f"--fake_devices={devices}")
    job = submit("--accelerator=h100:2x2", *options, slow=False, flags=flags)
    wanted = lambda: without_slurm(tmp_path / "local", [*train, *flags], 2 * processes, devices)
    assert_finished(job, tmp_path / "run", wanted, 0)
    assert f"4 x cpu in {2 * processes} processes" in log(tmp_path / "run")
    assert show(job)["TresPerNode"].endswith("gpu:2")


def test_a_sweep_is_an_array_whose_runs_can_be_compared(submit, tmp_path):
    sweep = tmp_path / "sweep.json"
    sweep.write_text(json.dumps({"grid": {"optimizer.learning_rate": [0.1, 0.01]}}))
    options, flags = (f"--sweep={sweep}", "--partition=single"), ("--config.train.num_steps=6",)
    job = submit(*options, slow=False, nodes=1, flags=flags, plan=True)
    until(
        lambda: set(launch("status", f"slurm:{job}")[1].split()) >= {f"slurm:{job}_{index}" for index in range(2)}, ""
    )
    for index in range(2):
        assert wait(f"{job}_{index}", *ENDED)["JobState"] == "COMPLETED"
    runs = sorted(path.parent for path in (tmp_path / "run").glob("*/checkpoints"))
    assert [checkpoints(run)[-1] for run in runs] == [6, 6]
    assert len({str(digests(run)) for run in runs}) == 2
    command = [sys.executable, "-m", "t5like", "compare", *runs, f"--output={tmp_path}/compare.png"]
    table = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for rate in ("0.1", "0.01"):
        assert rate in table
