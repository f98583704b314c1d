"""Standard input, output and error of a command, whatever stands behind them.

A reader may leave (``| head -1``), a log file's disk may be full, a terminal may close, a descriptor may be closed
before the process starts, and a locale may lack most characters. `guard` prepares the three streams once, at the start.

* The first error on a stream puts /dev/null in its place, for Python, for C++ and for child processes. What is written
  later goes nowhere, so that nothing fails, neither here nor when the interpreter flushes at its end.
* Of standard error that error is never told. Of standard output it is raised, because for a command that only prints
  results there is nothing left to do; a command whose files are its result calls `ignore_lost_output` first.
* A closed descriptor is opened on /dev/null: the next file to be opened would get its number, and our messages.
* A file or a pipe gets UTF-8; a terminal its own encoding. PYTHONIOENCODING wins. A character that an encoding lacks is
  written as its code, ``\\u0431``.
"""

import contextlib
import io
import os
import select
import sys

NO_READER = 141  # the exit code of a program that SIGPIPE ends, such as those in front of `head`
_raise_lost_output = True
lost_output: OSError | None = None  # the error that ended standard output, if it was raised


def guard() -> None:
    """Prepare the standard streams of this process. Call it before any other file is opened."""
    global _raise_lost_output
    _raise_lost_output = True
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            _discard(descriptor)
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8")
    elif not sys.stdin.isatty() and not os.environ.get("PYTHONIOENCODING"):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        _guard_writing(descriptor, name)


def ignore_lost_output() -> None:
    """From now on, an error of standard output is not raised: the command's result is what it writes to files."""
    global _raise_lost_output
    _raise_lost_output = False


def write_error(text: str) -> None:
    """Write to standard error from a signal handler, which may have interrupted another write to `sys.stderr`."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


class _Guarded(io.FileIO):
    """A standard stream's descriptor, whose errors are as the module says."""

    def write(self, data) -> int:
        global lost_output
        try:
            while (count := super().write(data)) is None:  # a descriptor that does not block, as of some launchers
                select.select([], [self], [])
            return count
        except OSError as error:
            _discard(self.fileno())
            if self.fileno() == 1 and _raise_lost_output:
                lost_output = error
                raise
            return len(data)


def _guard_writing(descriptor: int, name: str) -> None:
    before = getattr(sys, name)
    if before is not None:
        with contextlib.suppress(OSError):
            before.flush()
    raw = _Guarded(descriptor, "wb", closefd=False)
    terminal = raw.isatty()
    own = before is not None and (terminal or os.environ.get("PYTHONIOENCODING"))
    guarded = io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=before.encoding if own else "utf-8",
        errors="backslashreplace",
        line_buffering=terminal or descriptor == 2,
    )
    setattr(sys, name, guarded)


def _discard(descriptor: int) -> None:
    """Put /dev/null in place of a descriptor."""
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)
