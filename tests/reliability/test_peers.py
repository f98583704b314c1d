"""Processes that are stopped or hang, with and without the GIL: every process of the run ends with 76 in time."""

import re
import signal
import time

import pytest
from runs import Trainer, last_step, smallest, start_processes

LIMIT = 10  # train.process_timeout_seconds and train.heartbeat_timeout_seconds
LIMITS = {"train__process_timeout_seconds": LIMIT, "train__heartbeat_timeout_seconds": LIMIT}
LATER = 5.0  # seconds after the limit in which all have ended
HANG = ("--step=3", "--hold")
PROCESS_AND_PHASE = r"t5like: process [01] .*( at step \d+|, in evaluation, )"  # a stop may come in either


def seconds_to_end(trainers, since: float, seconds: float) -> list[float | None]:
    """The seconds from `since` to the end of each process; None: it has not ended in time."""
    ended: list[float | None] = [None] * len(trainers)
    while None in ended and time.monotonic() < since + seconds:
        for rank, trainer in enumerate(trainers):
            if ended[rank] is None and not trainer.running():
                ended[rank] = time.monotonic() - since
        time.sleep(0.02)
    for trainer in trainers:
        trainer.__exit__()
    return ended


@pytest.mark.parametrize(
    "hold", [pytest.param("stopped", marks=pytest.mark.long), "python", pytest.param("gil", marks=pytest.mark.long)]
)
def test_a_process_that_hangs_ends_the_run_with_76_and_a_dump_of_all_stacks(hold, flags, tmp_path):
    workdir = tmp_path / "run"
    arguments = smallest(flags, workdir, mesh__fsdp=2, **LIMITS)
    hooks = {} if hold == "stopped" else {1: (*HANG, hold)}
    both = start_processes(2, arguments, tmp_path / "log", hooks)
    both[0].wait_for(lambda: last_step(workdir) >= 2)
    if hold == "stopped":
        both[1].send(signal.SIGSTOP)
    seconds = seconds_to_end(both[: 1 if hold == "stopped" else 2], time.monotonic(), LIMIT + LATER)
    both[1].__exit__()
    assert None not in seconds, (seconds, both[0].err, both[1].err)
    assert both[0].process.returncode == 76, both[0].err
    line = both[0].err.splitlines()[-1]
    assert re.match(PROCESS_AND_PHASE, line) and line.endswith("start all of them again"), line
    if hold != "stopped":
        assert both[1].process.returncode == 76, both[1].err
        assert "instrumented_run.py" in both[1].err and "Thread 0x" in both[1].err, both[1].err


@pytest.mark.parametrize("hold", [pytest.param("python", marks=pytest.mark.long), "gil"])
def test_a_single_process_that_hangs_ends_with_76_and_a_dump_of_all_stacks(hold, flags, tmp_path):
    workdir = tmp_path / "run"
    arguments = smallest(flags, workdir, **LIMITS)
    with Trainer(arguments, tmp_path / "log", hooks=(*HANG, hold)) as trainer:
        trainer.wait_for(lambda: last_step(workdir) >= 2)
        [seconds] = seconds_to_end([trainer], time.monotonic(), LIMIT + LATER)
    assert seconds is not None and trainer.process.returncode == 76, (seconds, trainer.err)
    assert "instrumented_run.py" in trainer.err and "Thread 0x" in trainer.err, trainer.err
