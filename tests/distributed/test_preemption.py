"""Signals in the training loop: where the run stops, what is saved, and the end when that takes too long."""

import os
import signal
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

from t5like.distributed import preemption, watchdog
from t5like.distributed.activity import activity
from t5like.errors import Preempted


@pytest.fixture(autouse=True)
def fresh():
    preemption.reset()
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores, and so would a training loop
    yield
    signal.signal(signal.SIGHUP, hangup)
    preemption.reset()
    activity.__init__()


def loop(points: int, signal_at: int, number: int = signal.SIGTERM) -> list:
    """A training loop that gets a signal before a point; returns the points that it passed and what was saved."""
    events = []

    def save():
        os.kill(os.getpid(), signal.SIGTERM)  # a second one during the save
        events.append("saved")
        return 1234

    expected = "^stopped by a signal after step 1,234; saved in RUN; the same command continues$"
    with pytest.raises(Preempted, match=expected), preemption.catch_preemption(save, Path("RUN")) as stop:
        for point in range(points):
            if point == signal_at:
                os.kill(os.getpid(), number)
                while not stop.requested:
                    time.sleep(0.001)
            stop.point()
            events.append(point)
    return events


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
def test_the_run_stops_at_the_next_point_and_saves_once(number):
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    assert loop(10, 3, number) == [0, 1, 2, "saved"]
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == handlers
    assert signal.set_wakeup_fd(-1) == -1


def test_a_wait_for_data_stops():
    with pytest.raises(Preempted), preemption.catch_preemption(lambda: 0, Path("RUN")):
        os.kill(os.getpid(), signal.SIGTERM)
        preemption.wait_for_data(Future())
    ready = Future()
    ready.set_result("data")
    assert preemption.wait_for_data(ready) == "data"


def test_a_process_that_waits_for_data_behind_the_others_goes_on_until_their_point():
    data = Future()
    with pytest.raises(Preempted), preemption.catch_preemption(lambda: 0, Path("RUN")) as stop:
        assert stop.vote() == 0
        stop.agree(1)  # another process has begun the next step
        threading.Timer(0.3, data.set_result, ["data"]).start()
        assert preemption.wait_for_data(data) == "data"
        stop.point()
        passed = True
        stop.point()
    assert passed


def test_a_process_that_has_voted_passes_no_point_before_all_have():
    passed = []
    with pytest.raises(Preempted), preemption.catch_preemption(lambda: 0, Path("RUN")) as stop:
        stop.point()
        assert stop.vote() == 1
        threading.Timer(0.3, lambda: (passed.append("agreed"), stop.agree(2))).start()
        stop.point()
        passed.append("passed")
        stop.point()
    assert passed == ["agreed", "passed"]


@pytest.mark.parametrize("moment", ["compiling in the loop", "outside of the loop"])
def test_a_process_that_does_not_reach_a_point_ends_with_75(moment, monkeypatch):
    reasons = []
    monkeypatch.setattr(watchdog, "end", lambda *reason: reasons.append(reason))
    monkeypatch.setattr(watchdog, "grace_seconds", 0.2)
    monkeypatch.setattr(preemption, "CLEANUP_SECONDS", 0.2)
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # the main thread is in native code
    with preemption.receive_signals():
        if moment == "outside of the loop":
            activity.enter("preparing the data", mode="computing")
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
            message = "stopped by a signal in preparing the data; nothing is lost: the same command continues"
        else:
            with preemption.catch_preemption(lambda: 0, Path("RUN")):
                activity.enter("evaluation", 5, mode="computing")
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)
            message = "stopped by a signal in evaluation at step 5; its state could not be saved within 0 s: the same"
    signal.signal(signal.SIGTERM, before)
    assert reasons and reasons[0][0] == 75 and reasons[0][1].startswith(message)


def test_a_step_or_a_save_in_progress_is_completed(monkeypatch):
    reasons = []
    monkeypatch.setattr(watchdog, "end", lambda *reason: reasons.append(reason))
    monkeypatch.setattr(watchdog, "grace_seconds", 0.1)
    with pytest.raises(Preempted), preemption.catch_preemption(lambda: 0, Path("RUN")) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with watchdog.watchdog("a training step", 3):
            time.sleep(0.8)
        stop.point()
    assert not reasons
