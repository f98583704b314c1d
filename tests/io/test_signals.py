"""Termination signals at chosen moments: each ends the command once, with its exit code, after cleanup."""

import contextlib
import gc
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import one_device
import pytest

from t5like.checkpoint.checkpoints import Checkpoints
from t5like.data.store import preparation
from t5like.io import signals
from t5like.metrics.writers import read
from t5like.optim import step
from t5like.train import completion

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def default_signals():
    """A suite in the background ignores SIGINT, one under nohup SIGHUP."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def wait() -> None:
    time.sleep(10)


# ---- The mechanism ----


def in_garbage_collection():
    collected = lambda *_: gc.callbacks.remove(collected) or send()
    gc.callbacks.append(collected)
    gc.collect()
    wait()


def in_a_library_that_catches_everything():
    with contextlib.suppress(BaseException):
        send()
        wait()
    wait()


def turned_into_another_error():
    try:
        send()
        wait()
    except BaseException:
        raise RuntimeError("INTERNAL: an error of C++") from None


@pytest.mark.parametrize(
    "moment",
    [in_garbage_collection, in_a_library_that_catches_everything, turned_into_another_error],
    ids=lambda moment: moment.__name__,
)
@pytest.mark.filterwarnings("error")  # "Exception ignored in"
def test_an_interrupt_is_never_lost(moment, command, monkeypatch):
    monkeypatch.setattr(preparation, "prepare", lambda _: moment())
    begin = time.monotonic()
    code, out, err = command("prepare", "--config=configs/tiny.py")
    line = "t5like: stopped by a signal; nothing is lost: the same command continues\n"
    assert (code, out, err) == (75, "", line) and time.monotonic() - begin < 5


def test_cleanup_is_not_interrupted_again(capfd):
    cleaned = []
    with pytest.raises(signals.Interrupted), signals.raise_on_signals():
        try:
            send(signal.SIGHUP)
            wait()
        finally:
            time.sleep(3 * signals.REPEAT_SECONDS)
            with contextlib.suppress(OSError):  # what follows from the first exception
                raise OSError
            send(signal.SIGTERM)
            time.sleep(2 * signals.REPEAT_SECONDS)
            cleaned.append("all")
    assert cleaned == ["all"] and signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_hangup_that_is_ignored_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with signals.raise_on_signals(continues=True):
        send(signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


# ---- Commands ----


@pytest.mark.parametrize(
    "number, code, line",
    [(signal.SIGINT, 130, "stopped"), (signal.SIGHUP, 75, "stopped by a signal; nothing is")],
)
def test_a_signal_during_imports_ends_a_command_at_once(number, code, line, flags, tmp_path):
    program = (
        "import os, sys, time\n"
        "class Finder:\n"  # asked in the middle of the import of another module
        "    def find_spec(name, *_):\n"
        "        if name == 'jax.numpy':\n"
        f"            os.kill(os.getpid(), {number:d})\n"
        "            time.sleep(1)\n"
        "sys.meta_path.insert(0, Finder)\n"
        "from t5like.cli.main import main\n"
        "sys.exit(main())\n"
    )
    arguments = [sys.executable, "-c", program, "train", *flags, f"--workdir={tmp_path}/run"]
    ended = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == code and ended.stderr.startswith(f"t5like: {line}") and ended.stderr.count("\n") == 1
    assert ended.stdout == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_training_that_is_stopped_outside_its_loop_is_queued_again(
    number, code, command, decoder_flags, tmp_path, monkeypatch
):
    phases = {
        "preparing": lambda patch: patch.setattr(preparation, "prepare", lambda _: (send(number), wait())),
        "compiling": lambda patch: patch.setattr(step, "compile_train_step", lambda *_: (send(number), time.sleep(2))),
        "showing samples": lambda patch: patch.setattr(completion, "samples", lambda *_: (send(number), wait())),
    }
    if number != signal.SIGTERM:
        phases = {"preparing": phases["preparing"]}
    for phase, arrange in phases.items():
        with monkeypatch.context() as patch:
            arrange(patch)
            begin = time.monotonic()
            arguments = ["train", *decoder_flags, f"--workdir={tmp_path}/run", "--config.train.num_steps=2"]
            exit_code, _, err = command(*arguments)
            assert exit_code == code and err.splitlines()[-1].startswith("t5like: stopped"), (phase, err)
            if phase == "compiling":
                assert time.monotonic() - begin < 2  # nothing waits for the compiler
    if number == signal.SIGTERM:
        assert command(*arguments)[0] == 0 and Checkpoints(tmp_path / "run" / "checkpoints", keep=1).steps() == [2]


ON_ITS_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGHUP, signal.SIG_IGN if sys.argv[1] == "nohup" else signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def on_a_terminal_that_closes(arguments: list[str], ready: bytes, *, nohup: bool) -> int:
    """Run Python on a new terminal, which closes when `ready` is in its output; returns the exit code."""
    terminal, end = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", ON_ITS_TERMINAL, "nohup" if nohup else "", *arguments],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": one_device.XLA_FLAGS, "TERM": "xterm"},
        start_new_session=True,
        **dict.fromkeys(("stdin", "stdout", "stderr"), end),
    ) as process:
        os.close(end)
        shown = b""
        with contextlib.suppress(OSError):  # it has ended
            while ready not in shown and select.select([terminal], [], [], 60)[0]:
                shown += os.read(terminal, 1 << 16)
        os.close(terminal)
        try:
            return process.wait(timeout=60)
        finally:
            process.kill()


def test_a_terminal_that_closes_stops_and_saves_a_run(decoder_flags, tmp_path):
    endless = ["--config.train.num_steps=1_000_000", "--config.train.eval_every=5", "--config.train.eval_batches=1"]
    arguments = ["-m", "t5like", "train", *decoder_flags, f"--workdir={tmp_path}/run", *endless]
    assert on_a_terminal_that_closes(arguments, b"step 5: held-out", nohup=False) == 75
    [last] = Checkpoints(tmp_path / "run" / "checkpoints", keep=1).steps()
    steps = [record["step"] for record in read(tmp_path / "run")]
    assert steps == sorted(steps) and {*steps} == {*range(last + 1)} and last >= 5


UNDER_NOHUP = """
import os, sys, time
from t5like.io import signals, streams
streams.guard()
with signals.raise_on_signals(continues=True):
    print("ready", flush=True)
    while os.isatty(1):  # until there is /dev/null in its place
        print("a line", flush=True)
        time.sleep(0.01)
sys.exit(7)
"""


def test_a_process_under_nohup_continues_after_its_terminal_closes():
    assert on_a_terminal_that_closes(["-c", UNDER_NOHUP], b"ready", nohup=True) == 7
