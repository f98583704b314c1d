"""Termination signals: SIGINT (Ctrl-C), SIGTERM, SIGHUP (a closed terminal), and SIGUSR1 for `train` and `prepare`.

`raise_on_signals` turns them into an exception in the main thread, so that a command removes its temporary files and
ends its child processes. One exception is not enough: Python ignores exceptions in callbacks of the garbage collector,
C++ code may replace them by errors of its own, and libraries may catch them. So it is raised again, ten times a second,
until it is being handled. Imports are not interrupted, because an extension module that is interrupted while it loads
may abort the process.

During training `distributed.preemption` handles the same signals: the run saves a checkpoint after the current step.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

from t5like.io.streams import write_error

REQUEUE_EXIT_CODE = 75  # of a run that should be queued again
COMMANDS = ("t5like.cli.commands", "t5like.cli.inspections")  # modules whose functions are commands
REPEAT_SECONDS = 0.1  # until the exception is raised again
FORCE_EXIT_SECONDS = 1.0  # after which a second Ctrl-C ends the process without cleanup


class Interrupted(KeyboardInterrupt):
    """This process received a termination signal.

    Attributes:
        exit_code: 128 + the signal; `REQUEUE_EXIT_CODE` if the same command, queued again, continues the run.
    """

    def __init__(self, number: int, exit_code: int):
        super().__init__(number)
        self.exit_code = exit_code

    def __str__(self) -> str:
        if self.exit_code == REQUEUE_EXIT_CODE:
            return "stopped by a signal; nothing is lost: the same command continues"
        return "stopped"


def termination_signals() -> list[int]:
    """Return the signals that end a command. A SIGHUP that is ignored at its start, as under nohup, stays ignored."""
    hangup = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hangup]


class TerminationHandler:
    """The signal handler of `raise_on_signals`.

    Attributes:
        interrupted: the exception that it raises; None: no signal was received.
    """

    def __init__(self, continues: bool, command: FrameType):
        self.interrupted: Interrupted | None = None
        self._continues, self._command, self._received_at = continues, command, 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal, or the alarm that repeats it."""
        if self.interrupted is None:
            requeue = self._continues and number != signal.SIGINT
            self.interrupted = Interrupted(number, REQUEUE_EXIT_CODE if requeue else 128 + number)
            self._received_at = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, REPEAT_SECONDS, REPEAT_SECONDS)
        if _handling(self.interrupted):
            if number == signal.SIGINT and time.monotonic() - self._received_at > FORCE_EXIT_SECONDS:
                self._end()
            return
        importer = _importer(frame, self._command)
        if importer is None:
            raise self.interrupted.with_traceback(None)
        if importer.f_globals.get("__name__") in COMMANDS:  # imports of a command: no work has started yet
            self._end()

    def _end(self) -> None:
        write_error(f"t5like: {self.interrupted}\n")
        os._exit(self.interrupted.exit_code)


@contextlib.contextmanager
def raise_on_signals(*, continues: bool = False) -> Iterator[TerminationHandler]:
    """Raise `Interrupted` on a termination signal inside the block, which must run in the main thread.

    Args:
        continues: the command continues when it is started again: signals of a scheduler, with SIGUSR1, end it with
            `REQUEUE_EXIT_CODE`.
    """
    handler = TerminationHandler(continues, sys._getframe(2))  # frame of the with statement; frame 1 is contextlib's
    numbers = [*termination_signals(), signal.SIGALRM] + [signal.SIGUSR1] * continues
    before = {number: signal.signal(number, handler) for number in numbers}
    hook = sys.unraisablehook
    sys.unraisablehook = lambda what: None if isinstance(what.exc_value, Interrupted) else hook(what)
    try:
        yield handler
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, previous in before.items():
            signal.signal(number, previous)
        sys.unraisablehook = hook


def _handling(interrupted: Interrupted) -> bool:
    """Whether the main thread is already handling this exception, or one that was raised while handling it."""
    error = sys.exc_info()[1]
    while error is not None and error is not interrupted:
        error = error.__context__
    return error is not None


def _importer(frame: FrameType | None, command: FrameType) -> FrameType | None:
    """Return the outermost frame inside the command's frame that imports a module; None if there is none."""
    importer = None
    while frame is not None and frame is not command:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            importer = frame.f_back
        frame = frame.f_back
    return importer


@contextlib.contextmanager
def block_terminal_signals() -> Iterator[None]:
    """Block the signals of a terminal in this process, and in child processes that are started in the block.

    A child process sets its own handlers before it unblocks them; this process receives them at the end of the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
