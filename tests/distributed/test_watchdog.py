"""The watchdog: what counts as progress in which phase, and the end of a process that is stuck."""

import os
import subprocess
import sys
import time

import pytest

from t5like.distributed import watchdog
from t5like.distributed.activity import activity, in_phase
from t5like.distributed.preemption import stop

STUCK = """
import ctypes, sys, time
from concurrent.futures import Future
from t5like.config.schema import TrainConfig
from t5like.distributed.activity import activity
from t5like.distributed.preemption import catch_preemption, wait_for_data
from t5like.distributed.watchdog import watching
limits = TrainConfig(process_timeout_seconds=1, heartbeat_timeout_seconds=2)
with watching(limits), catch_preemption(lambda: 0, "RUN"):
    activity.enter("a phase", 7)
    print("begun", flush=True)
    def stuck_here():
        {wedge}
    stuck_here()
"""
WEDGES = {
    "asleep": ("time.sleep(60)", "in a phase at step 7, has made no progress for"),
    "busy": ("while True: pass", "in a phase at step 7, has made no progress for"),
    "holding the interpreter lock": ("ctypes.PyDLL(None).sleep(60)", "in a phase at step 7, does not respond"),
    "waiting for data": ("wait_for_data(Future())", "in waiting for data at step 7, has made no progress for"),
}


@pytest.mark.parametrize("wedge", WEDGES)
def test_a_stuck_process_prints_its_stacks_and_ends_with_76(wedge):
    code, message = WEDGES[wedge]
    arguments = [sys.executable, "-c", STUCK.format(wedge=code)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "begun\n"
        begun = time.monotonic()
        _, err = process.communicate(timeout=30)
        seconds = time.monotonic() - begun
    assert process.returncode == 76, err
    *stacks, last = err.splitlines()
    assert last.startswith("t5like: the process on ") and message in last, err
    assert "stuck_here" in "\n".join(stacks) and seconds < 8


@pytest.fixture
def fresh():
    activity.__init__()
    yield
    activity.__init__()


def test_progress_depends_on_the_phase(fresh, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def pass_time(seconds, *, computed):
        for _ in range(seconds):
            now[0] += 1
            activity.tick(computed=computed)

    activity.tick(computed=False)
    activity.enter("compiling", mode="computing")
    pass_time(1000, computed=True)
    assert not watchdog.overdue(100)
    pass_time(101, computed=False)
    assert watchdog.overdue(100) == "has made no progress for 101 s"
    with in_phase("a step", 3, mode="strict"):
        assert not watchdog.overdue(100)
        pass_time(101, computed=True)
        assert watchdog.overdue(100)
        stop.point()  # the next step
        assert not watchdog.overdue(100)
    assert not watchdog.overdue(100) and activity.mode == "computing"
    with in_phase("a save", times=2, mode="device"):
        pass_time(200, computed=False)
        assert not watchdog.overdue(100)
        pass_time(10, computed=False)
        assert watchdog.overdue(100)
    activity.enter("compiling", mode="computing")
    pass_time(2401, computed=True)
    assert "has computed for 2401 s" in watchdog.overdue(100)


def test_the_time_in_which_a_process_was_stopped_does_not_count(fresh, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    activity.tick(computed=False)
    now[0] += 1e6
    activity.tick(computed=False)
    assert activity.idle < 10


def test_a_block_within_the_limit_leaves_no_timer():
    begun = time.monotonic()
    script = STUCK.replace("{wedge}", "pass")
    assert (
        subprocess.run([sys.executable, "-c", script + "time.sleep(3.5)"], timeout=30, env=os.environ).returncode == 0
    )
    assert time.monotonic() - begun > 3.5
