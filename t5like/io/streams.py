"""Standard input, output and error of a command, robust against failures of the other side.

A pipe may be closed (``| head -1``), the disk of a log file may be full, a terminal may close, a descriptor may be
closed before the process starts, and a locale may lack most characters. `guard` prepares all three at the start.

* The first error on a stream replaces it by /dev/null, for Python, for C++ and for child processes. Later writes are
  discarded, so that nothing fails, neither in the command nor when the interpreter flushes at its end.
* An error of standard error is never raised. An error of standard output is raised, because a command that only prints
  results has nothing left to do; a command whose results are files calls `ignore_lost_output` first.
* A closed descriptor is opened on /dev/null: otherwise the next opened file would get its number, and the messages.
* A file or a pipe gets UTF-8, a terminal its own encoding; PYTHONIOENCODING overrides both. A character that an
  encoding lacks is written as its code, ``\\u0431``.
"""

import contextlib
import io
import os
import select
import sys

NO_READER = 141  # exit code of a program that SIGPIPE ends, such as `yes` in `yes | head`
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
    """Do not raise errors of standard output from now on, because the command's results are files."""
    global _raise_lost_output
    _raise_lost_output = False


def write_error(text: str) -> None:
    """Write to standard error from a signal handler, which may have interrupted another write to `sys.stderr`."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


class _Guarded(io.FileIO):
    """The descriptor of a standard stream, with errors handled as the module's docstring describes."""

    def write(self, data) -> int:
        global lost_output
        try:
            while (count := super().write(data)) is None:  # a non-blocking descriptor, as some launchers make
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
