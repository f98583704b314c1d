"""SIGTERM and SIGUSR1 in every phase, to one of one or two processes: saved, exit code 75, within 10 seconds."""

import random
import signal
import time

import pytest
from runs import (
    Trainer,
    assert_equal_runs,
    assert_restorable,
    checkpoints,
    deleting,
    last_step,
    run_to_end,
    settings,
    smallest,
    start_processes,
    step_directories,
    wait_for_end,
    writing_arrays,
)

SECONDS = 10.0
GRACE_SECONDS = 30.0  # for compiling, which can't be interrupted everywhere
CACHELESS = {"JAX_ENABLE_COMPILATION_CACHE": "false"}


def preparing(trainer, workdir) -> bool:
    return (workdir.parent / "prepared").exists()


def compiling(trainer, workdir) -> bool:
    """The last lines before the state is made and the step is compiled."""
    return "\nmachine " in trainer.out and (workdir / "config.json").exists()


def training(trainer, workdir) -> bool:
    return last_step(workdir) >= 3


def evaluating(trainer, workdir) -> bool:
    """After a step that is evaluated: see eval_every below."""
    return last_step(workdir) >= 2 and not time.sleep(random.uniform(0, 0.02))


def saving(trainer, workdir) -> bool:
    return last_step(workdir) >= 5 and writing_arrays(workdir)


def retention(trainer, workdir) -> bool:
    return last_step(workdir) >= 20 and deleting(workdir)


OUTSIDE = (preparing, compiling)  # the loop: there is nothing to save
SIGNALS = {compiling: signal.SIGUSR1, evaluating: signal.SIGUSR1, training: signal.SIGINT}  # others: SIGTERM
LONG = (preparing, evaluating, retention)  # each start costs seconds: CI has the others
PHASES = [
    pytest.param(phase, marks=[pytest.mark.long] * (phase in LONG), id=phase.__name__)
    for phase in (preparing, compiling, training, evaluating, saving, retention)
]


def check_stopped(trainer, workdir, phase, seconds) -> None:
    """One line, the exit code, the time, and the checkpoint of the last step."""
    assert trainer.process.returncode == 75, (trainer.process.returncode, trainer.err)
    assert seconds < (GRACE_SECONDS if phase is compiling else SECONDS), seconds
    assert "Traceback" not in trainer.err and "stopped by a signal" in trainer.err.splitlines()[-1], trainer.err
    if phase not in OUTSIDE:
        assert assert_restorable(workdir) == last_step(workdir)


@pytest.mark.parametrize("phase", PHASES)
def test_one_process_saves_and_exits_with_75(phase, flags, tmp_path):
    workdir, number = tmp_path / "run", SIGNALS.get(phase, signal.SIGTERM)
    values = {"data__cache_directory": tmp_path / "prepared"} if phase is preparing else {}
    values |= {"train__eval_every": 1} if phase is evaluating else {}
    environment = CACHELESS if phase is compiling else {}
    with Trainer(smallest(flags, workdir, **values), tmp_path / "log", **environment) as trainer:
        trainer.wait_for(lambda: phase(trainer, workdir), pause=0)
        trainer.send(number)
        seconds = trainer.seconds_since_signal()
    check_stopped(trainer, workdir, phase, seconds)


@pytest.mark.long
def test_prepare_ends_with_75_while_it_trains_a_tokenizer(tmp_path):
    letters = random.Random(0).choices("abcdefgh     .", k=4_000_000)  # long enough: seconds in SentencePiece's C++
    (tmp_path / "a.txt").write_text("".join(letters))
    values = {"data.source": f"text:{tmp_path}/a.txt", "data.cache_directory": tmp_path / "prepared"}
    arguments = ["prepare", "--config=configs/tiny.py", *settings(**values)]
    with Trainer(arguments, tmp_path / "log") as trainer:
        trainer.wait_for(lambda: "training a tokenizer" in trainer.err)
        time.sleep(1)
        trainer.send(signal.SIGTERM)
        seconds = trainer.seconds_since_signal()
    assert trainer.process.returncode == 75 and seconds < SECONDS, (trainer.process.returncode, seconds)
    assert "stopped by a signal in preparing the data; nothing is lost" in trainer.err.splitlines()[-1], trainer.err


@pytest.mark.parametrize(
    "phase, rank",
    # In training also test_process_counts.py.
    [
        pytest.param(preparing, 1, marks=pytest.mark.long),
        (compiling, 0),
        pytest.param(training, 1, marks=pytest.mark.long),
    ],
    ids=["prepare", "compile", "train"],
)
def test_two_processes_stop_together_when_one_of_them_gets_the_signal(phase, rank, flags, tmp_path):
    workdir = tmp_path / "run"
    arguments = smallest(flags, workdir, mesh__fsdp=2, data__cache_directory=tmp_path / "prepared")
    both = start_processes(2, arguments, tmp_path / "log")
    both[0].wait_for(lambda: phase(both[0], workdir), pause=0)
    both[rank].send(signal.SIGTERM)
    wait_for_end(both, GRACE_SECONDS if phase is compiling else SECONDS)
    for trainer in both:
        check_stopped(trainer, workdir, phase, 0)


@pytest.mark.long
def test_a_second_signal_during_the_save_changes_nothing_and_a_kill_leaves_the_checkpoint_before(
    straight, flags, tmp_path
):
    workdir = tmp_path / "run"
    with Trainer(smallest(flags, workdir, train__checkpoint_every=1000), tmp_path / "log-0") as trainer:
        trainer.wait_for(lambda: last_step(workdir) >= 3)
        trainer.send(signal.SIGTERM)
        trainer.wait_for(lambda: bool(step_directories(workdir)), pause=0)
        trainer.send(signal.SIGTERM)
        assert trainer.end() == 75, trainer.err
    first = assert_restorable(workdir)
    with Trainer(smallest(flags, workdir, train__checkpoint_every=1000), tmp_path / "log-1") as trainer:
        trainer.wait_for(lambda: last_step(workdir) >= first + 3)
        trainer.send(signal.SIGTERM)
        trainer.wait_for(lambda: writing_arrays(workdir), pause=0)
        trainer.send(signal.SIGKILL)
        trainer.end()
    assert checkpoints(workdir).steps()[0] == first and assert_restorable(workdir) >= first
    run_to_end(smallest(flags, workdir), tmp_path / "log-2")
    assert_equal_runs(workdir, straight)
