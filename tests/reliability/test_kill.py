"""kill -9 at random and chosen moments: the run ends bitwise as if nothing had happened."""

import random
import re
import signal
import time

import pytest
from runs import (
    LAST,
    Trainer,
    arrays_without_commit,
    assert_equal_runs,
    checkpoints,
    deleting,
    last_step,
    run_to_end,
    smallest,
    start_processes,
    wait_for_end,
    writing_arrays,
)

NOTICE_SECONDS = 5.0  # in which a process ends after another one was killed


def random_step(workdir, chosen):
    """A moment: some steps after the start, and a random time inside the step."""
    first, more, pause = last_step(workdir), chosen.randint(1, 7), chosen.uniform(0, 0.05)
    return lambda: last_step(workdir) >= first + more and not time.sleep(pause)


def random_start(workdir, chosen):
    """A moment before the first step: importing, preparing, restoring or compiling."""
    until = time.monotonic() + chosen.uniform(0.2, 5)
    return lambda: time.monotonic() > until


AIMED = (writing_arrays, arrays_without_commit, deleting)
MOMENTS = [random_start, *[random_step] * 6, *AIMED]  # ten of each seed


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_run_that_is_killed_ten_times_equals_an_uninterrupted_run(seed, straight, flags, tmp_path):
    chosen, workdir, seen, log = random.Random(seed), tmp_path / "run", [], tmp_path / "log"
    moments = chosen.sample(MOMENTS, len(MOMENTS))
    for number, moment in enumerate(moments):
        with Trainer(smallest(flags, workdir), tmp_path / f"log-{number}") as trainer:
            before = last_step(workdir)
            if moment in AIMED:
                # First a step of this process, so that the rest of the save before it is not taken for its own.
                trainer.wait_for(lambda before=before: last_step(workdir) > before)
                trainer.wait_for(lambda moment=moment: moment(workdir), pause=0)
            else:
                trainer.wait_for(moment(workdir, chosen))
            trainer.send(signal.SIGKILL)
            assert trainer.end() == -signal.SIGKILL, trainer.err
        seen += [moment.__name__] * (moment in AIMED and moment(workdir))
        newest = checkpoints(workdir).latest() or 0
        assert last_step(workdir) <= newest + 11, "lost: more than one interval, and the steps during the save"
    assert last_step(workdir) < LAST
    run_to_end(smallest(flags, workdir), log)
    assert_equal_runs(workdir, straight)
    assert set(seen) == {moment.__name__ for moment in AIMED}, "an aimed kill came too late; choose another seed"


@pytest.mark.long
def test_the_other_process_ends_within_five_seconds_and_two_restarted_ones_equal_an_uninterrupted_run(
    straight, flags, tmp_path
):
    workdir, steps = tmp_path / "run", []
    arguments = smallest(flags, workdir, mesh__fsdp=2)
    for number, victim in enumerate((1, 0)):
        both = start_processes(2, arguments, tmp_path / f"log-{number}")
        before, saved = last_step(workdir), checkpoints(workdir).latest()
        both[victim].wait_for(
            lambda before=before, saved=saved: (
                last_step(workdir) >= before + 7 and checkpoints(workdir).latest() != saved
            )
        )
        both[victim].send(signal.SIGKILL)
        codes = wait_for_end(both, NOTICE_SECONDS)
        assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 76, both[1 - victim].err
        lines = both[1 - victim].err.splitlines()  # JAX may print a trace after ours
        assert any(re.fullmatch("t5like: process.*start all of them again", line) for line in lines), lines
        steps.append(checkpoints(workdir).latest())
    assert steps == sorted(steps) and steps[0] >= 5
    both = start_processes(2, arguments, tmp_path / "last")
    assert wait_for_end(both, 120) == [0, 0]
    assert checkpoints(workdir).steps() == checkpoints(straight).steps()
