"""Signals that ask a process to end: SIGINT (Ctrl-C), SIGTERM, SIGHUP (a closed terminal), and SIGUSR1 for training.

`raised` turns them into an exception in the main thread, for a whole command, so that temporary files and child
processes go with it. One exception is not enough: Python ignores what is raised in a callback of the garbage collector,
C++ code may turn it into an error of its own, and libraries may catch it. So it is raised again, ten times a second,
until it is being handled. Imports are not interrupted, because an extension that fails half-way may abort the process.

The training loop takes the same signals meanwhile, to stop after a step and save: `train.preemption`.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

from t5like.io.streams import write_error

SAVED = 75  # the exit code of a run that should be queued again
AGAIN = 0.1  # seconds until a signal is raised again
IMPATIENT = 1.0  # seconds after which a second Ctrl-C ends the process without cleaning up


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to end.

    Attributes:
        exit_code: 128 + the signal; `SAVED` where the same command, queued again, continues.
    """

    def __init__(self, number: int, exit_code: int):
        super().__init__(number)
        self.exit_code = exit_code

    def __str__(self) -> str:
        if self.exit_code == SAVED:
            return "stopped by a signal outside the training loop; nothing is lost: the same command continues"
        return "stopped"


def termination_signals() -> list[int]:
    """The signals that end a command. A SIGHUP that is ignored when it starts, as under nohup, stays ignored."""
    hangup = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hangup]


class Request:
    """What `raised` yields: whether the command has been asked to end, and the handler that asks."""

    def __init__(self, training: bool, command: FrameType):
        self.interrupted: Interrupted | None = None
        self._training, self._command, self._since = training, command, 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal, or the alarm that repeats it."""
        if self.interrupted is None:
            saved = self._training and number != signal.SIGINT
            self.interrupted = Interrupted(number, SAVED if saved else 128 + number)
            self._since = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, AGAIN, AGAIN)
        if _handling(self.interrupted):
            if number == signal.SIGINT and time.monotonic() - self._since > IMPATIENT:
                self._end()
            return
        importer = _importer(frame, self._command)
        if importer is None:
            raise self.interrupted.with_traceback(None)
        if importer.f_globals.get("__name__") == "t5like.cli.commands":  # a command's own imports: nothing is begun yet
            self._end()

    def _end(self) -> None:
        write_error(f"t5like: {self.interrupted}\n")
        os._exit(self.interrupted.exit_code)


@contextlib.contextmanager
def raise_on_signals(*, training: bool = False) -> Iterator[Request]:
    """Within, a signal that asks the process to end raises `Interrupted` in the main thread, which has to call this.

    Args:
        training: the command is `train`, which continues when it is started again: what a scheduler sends ends it with
            `SAVED`, SIGUSR1 included.
    """
    request = Request(training, sys._getframe(2))  # of the with statement; 1 is contextlib's
    numbers = [*termination_signals(), signal.SIGALRM] + [signal.SIGUSR1] * training
    before = {number: signal.signal(number, request) for number in numbers}
    hook = sys.unraisablehook
    sys.unraisablehook = lambda what: None if isinstance(what.exc_value, Interrupted) else hook(what)
    try:
        yield request
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook


def _handling(interrupted: Interrupted) -> bool:
    """Whether the main thread, where it was interrupted, is cleaning up after this exception or one that followed."""
    error = sys.exc_info()[1]
    while error is not None and error is not interrupted:
        error = error.__context__
    return error is not None


def _importer(frame: FrameType | None, command: FrameType) -> FrameType | None:
    """The outermost frame inside the command's that imports a module; None if there is none."""
    importer = None
    while frame is not None and frame is not command:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            importer = frame.f_back
        frame = frame.f_back
    return importer


@contextlib.contextmanager
def block_terminal_signals() -> Iterator[None]:
    """Hold back what a terminal sends to all of its processes, here and in processes that are started within.

    Those decide for themselves, before they lift it; here the signals arrive at the end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
