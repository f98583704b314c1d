"""Processes of this machine, with a stand-in of the interpreter that the processes start."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from documents import ROOT

from launch import local, local_processes, record
from launch.job import JobSpec, Secret, SweepRun
from launch.local_processes import Ending, ending
from launch.local_script import RUN
from launch.options import parse_arguments
from t5like.errors import ConfigError

GOLDEN = ROOT / "tests/golden/launch/local"
# Prints its arguments and variables, then does what a file with the name of its process demands.
STAND_IN = f"""#!{sys.executable}
import json, os, signal, sys, time
if sys.argv[1] == "-c":
    exec(sys.argv[2])
    sys.exit()
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), os._exit(75)))
rank = os.environ.get("T5LIKE_PROCESS_ID", "0")
names = ["T5LIKE_COORDINATOR", "T5LIKE_NUM_PROCESSES", "T5LIKE_RENDEZVOUS_SECRET", "JAX_PLATFORMS", "A", "MY_TOKEN"]
print("start", json.dumps([sys.argv[1:], {{name: os.environ.get(name) for name in names}}]), flush=True)
here = os.path.dirname(__file__)
plan = os.path.join(here, "plan-" + rank)
lines = open(plan).read().split() if os.path.exists(plan) else ["0"]
open(plan, "w").write(" ".join(lines[1:] or lines))
action = lines[0]
if action == "save":
    workdir = next(word for word in sys.argv if word.startswith("--workdir=")).partition("=")[2]
    checkpoint = os.path.join(workdir, "checkpoints", str(len(lines)))
    os.makedirs(checkpoint, exist_ok=True)
    open(os.path.join(checkpoint, "commit_success.txt"), "w").close()
    sys.exit(75)
if action == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if action == "sleep":
    time.sleep(60)
sys.exit(int(action))
"""


@pytest.fixture
def job(tmp_path):
    """A job of two processes; `plans` are the actions of each process, by start."""
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)

    def make(*plans: str, **changes) -> JobSpec:
        for rank, plan in enumerate(plans):
            (tmp_path / f"plan-{rank}").write_text(plan)
        workdir = str(tmp_path / "run")
        fields = {"nodes": len(plans) or 1, "python": str(python), "grace": 20} | changes
        return JobSpec("a", ("train", f"--workdir={workdir}"), workdir, **fields)

    return make


def test_all_processes_end_and_their_lines_have_their_number(job, capsys):
    assert local.run(job("0", "0")) == 0
    out = capsys.readouterr().out
    assert sorted(line[:9] for line in out.splitlines()) == ["[0] start", "[1] start"]
    assert '"T5LIKE_NUM_PROCESSES": "2"' in out and '"JAX_PLATFORMS": "cpu"' in out
    assert len(set(re.findall(r'"T5LIKE_RENDEZVOUS_SECRET": "(\w{32})"', out))) == 1


def test_the_first_failure_ends_all_and_is_the_exit_code(job, capsys, monkeypatch):
    monkeypatch.setattr(local_processes, "REPORT_SECONDS", 0.2)
    begin = time.monotonic()
    assert local.run(job("sleep", "3")) == 3 and time.monotonic() - begin < 30
    assert "process 1 of 2 ended with exit code 3; its log is" in capsys.readouterr().err
    assert "failed, exit code 3, 0 restarts: process 1 of 2 ended" in local.status(record.find(job().workdir))


@pytest.mark.parametrize(("plan", "reason"), [("76 0", "lost another process"), ("kill 0", "was ended by SIGKILL")])
def test_a_lost_process_starts_all_again_up_to_the_retries(job, capsys, monkeypatch, plan, reason):
    monkeypatch.setattr(local_processes, "REPORT_SECONDS", 0.2)
    assert local.run(job("sleep 0", plan, retries=1)) == 0
    assert f"process 1 of 2 {reason}; starting again from step 0 (1 of 1 retries used)" in capsys.readouterr().err
    assert local.run(job("sleep 0", plan, retries=0)) == 76
    assert "no retry is left of --retries=0" in capsys.readouterr().err


def test_a_preemption_counts_only_without_a_new_checkpoint(job, capsys):
    assert local.run(job("save save save 0", retries=0)) == 75  # the newest stays 4
    assert "from step 4 (0 of 0 retries used)" in capsys.readouterr().err
    assert local.run(job("75 75 0", retries=1)) == 75
    assert local.run(job("75 0", retries=1)) == 0


def test_only_complete_checkpoints_are_progress(tmp_path):
    for name, complete in (("4", True), ("10", True), ("12", False), ("best", True)):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        if complete:
            (tmp_path / "checkpoints" / name / "commit_success.txt").touch()
    assert local.newest_step(str(tmp_path)) == 10 and local.newest_step("gs://bucket/run") == 0
    newest = RUN.format(rendezvous="", processes=1, rank="", retries=0).rpartition("# prints")[2].partition("\n")[2]
    done = subprocess.run(["bash", "-c", f"{newest}\nnewest {tmp_path}"], capture_output=True, text=True, check=True)
    assert done.stdout == "10"


def test_a_sweep_goes_on_after_a_failed_run(job, capsys, tmp_path):
    runs = tuple(SweepRun(f"seed={seed}", (f"--config.seed={seed}",)) for seed in (1, 2, 3))
    sweep = job("0 3 4", runs=runs)
    assert local.run(sweep) == 3
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if "--config.seed=3" in line]
    assert "2 of 3 runs failed: seed=2 (exit code 3), seed=3 (exit code 4)" in err
    status = local.status(record.find(sweep.workdir)).splitlines()
    assert len(status) == 3 and "done" in status[0] and "exit code 4" in status[2]
    with pytest.raises(ConfigError, match="is a sweep"):
        local.logs(record.find(sweep.workdir), follow=False)


def wait_for(condition, seconds: float = 30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def wait_for_start(tmp_path):
    """Wait until both processes have started."""
    logs = [tmp_path / f"run/logs/process-{rank}.log" for rank in (0, 1)]
    wait_for(lambda: all(log.exists() and "start" in log.read_text() for log in logs))


@pytest.fixture
def started(job, tmp_path):
    """Start a launcher as a process of its own whose processes sleep; returns it and the processes' numbers."""
    launchers = []

    def start(made: JobSpec) -> tuple[subprocess.Popen, list[int]]:
        code = f"import sys; from launch.job import *; from launch import local; sys.exit(local.run({made!r}))"
        launchers.append(subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL))
        wait_for_start(tmp_path)
        return launchers[-1], [int(pid) for pid in record.find(made.workdir).details["processes"].split()]

    yield start
    for launcher in launchers:
        launcher.kill()
        launcher.wait()


def test_cancel_lets_the_processes_save_and_ends_with_75(job, started, capsys):
    launcher, pids = started(job("sleep", "sleep"))
    found = record.find(job().workdir)
    assert found.id == str(launcher.pid) and local.status(found).count("running, pid") == 2
    local.cancel(found)
    assert launcher.wait(timeout=30) == 75
    assert local.logs(found, follow=False) == 0 and capsys.readouterr().out.count("saved") == 2
    finished = record.find(found.workdir)
    assert "preempted, saved, exit code 75" in local.status(finished)
    ending = finished.details | {"started": local.start_time(os.getpid())}  # the launcher has not ended yet
    assert "preempted, saved" in local.status(finished._replace(id=str(os.getpid()), details=ending))
    with pytest.raises(ConfigError, match="does not run any more"):
        local.cancel(found)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux ends the processes")
def test_no_process_is_left_when_the_launcher_is_killed(job, started):
    launcher, pids = started(job("sleep", "sleep"))
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") and local.start_time(pid) for pid in pids))
    assert "the launcher was killed" in local.status(record.find(job().workdir))


def test_the_reason_of_an_end_is_the_error_that_would_come_again():
    assert ending([0, 0]) == Ending(0)
    assert ending([76, 3, -9]) == Ending(3, "ended with exit code 3", 1)
    assert ending([76, -9]).process == 1 and ending([76, -9]).code == 76
    assert ending([75, 76]).code == 76 and ending([75, 75]) == Ending(75, "was preempted and has saved", 0)
    assert ending([75, None]) == Ending(76, "did not end in time and was killed", 1)


def test_missing_programs_directories_and_secrets_are_refused(job, monkeypatch):
    monkeypatch.delenv("MY_TOKEN", raising=False)
    for changes, message in (
        ({"python": "/no/python"}, "--python=/no/python is no program of this machine"),
        ({"directory": "/no/directory"}, "--directory=/no/directory"),
        ({"secrets": (Secret("MY_TOKEN"),)}, "--secret=MY_TOKEN is not set in this shell"),
    ):
        with pytest.raises(ConfigError, match=message):
            local.run(job("0", **changes))


def test_what_one_machine_cannot_do_is_refused(job):
    for changes, message in (
        ({"accelerator": "h100:2x8", "nodes": 2}, "has 2 hosts, and launch local is one machine"),
        ({"accelerator": "h100:8", "fake_devices": 2}, "--fake_devices=2 needs --accelerator=cpu"),
        ({"secrets": (Secret("A", "b/c"),)}, "takes the variable of this shell"),
    ):
        with pytest.raises(ConfigError, match=message):
            local.check(job(**changes))


# ---- The script ----

GOLDENS = {
    "two_processes.sh": ["--nodes=2", "--fake_devices=4", "--env=A=x y", "--secret=MY_TOKEN", "--setup=ulimit -c 0"],
    "gpus.sh": ["--accelerator=h100:8", "--processes_per_node=8", "--compile_cache=/shared/cache"],
    "one_cpu.sh": [],
}
END = ["--python=python3", "--", "train", "--config=tiny", "--workdir=/runs/a"]


@pytest.mark.parametrize("name", GOLDENS)
def test_scripts_are_those_of_the_golden_files(name):
    job = parse_arguments(["local", *GOLDENS[name], *END]).job
    assert local.render(job) == (GOLDEN / name).read_text("utf-8")


def script(job: JobSpec, tmp_path, **environment) -> subprocess.CompletedProcess:
    path = tmp_path / "job.sh"
    path.write_text(local.render(job))
    return subprocess.run(
        ["bash", path], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


HOSTILE = ["a'b\"c", "$(id)", "`id`", "; exit 9", "#SBATCH --x", "{{a}} {a}", "x" * 300, "é \\ $HOME", "%s"]


def test_values_arrive_byte_for_byte_by_the_script_and_by_the_launcher(job, tmp_path, monkeypatch):
    for value in (" ".join(HOSTILE), "-x"):
        made = job("0", env=(("A", value),), secrets=(Secret("MY_TOKEN"),))
        made = dataclasses.replace(made, command=("train", f"--config.data.source=text:{value}", *made.command[1:]))
        text = local.render(made)
        assert "secret value" not in text
        monkeypatch.setenv("MY_TOKEN", "secret value")
        log = tmp_path / "run/logs/process-0.log"
        for start in (lambda made: script(made, tmp_path).returncode, local.run):
            log.unlink(missing_ok=True)
            assert start(made) == 0
            arguments, variables = json.loads(log.read_text().removeprefix("start "))
            assert arguments == ["-m", "t5like", *made.command]
            assert (variables["A"], variables["MY_TOKEN"]) == (value, "secret value")


def test_the_script_restarts_and_stops_as_the_launcher_does(job, tmp_path):
    assert script(job("76 76 0", "kill 76 0", retries=2), tmp_path).returncode == 0
    assert script(job("76 0", "kill 0", retries=0), tmp_path).returncode == 76
    assert script(job("76", "3", retries=5), tmp_path).returncode == 3
    assert script(job("75 0", "75 0", retries=1), tmp_path).returncode == 0
    done = script(job("0", secrets=(Secret("NOT_SET_ANYWHERE"),)), tmp_path)
    assert done.returncode == 2 and "NOT_SET_ANYWHERE is not set" in done.stderr


def test_the_script_passes_a_signal_on_and_ends_with_75(job, tmp_path):
    path = tmp_path / "job.sh"
    path.write_text(local.render(job("sleep", "sleep")))
    running = subprocess.Popen(["bash", path], stderr=subprocess.DEVNULL)
    wait_for_start(tmp_path)
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=30) == 75
    assert "saved" in (tmp_path / "run/logs/process-1.log").read_text()
