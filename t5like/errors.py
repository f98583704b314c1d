"""Exception types by what a user can do about a failure; `cli.main` prints each as one line and exits with its code.

Every other exception is an internal error (exit code 70). Messages have one form: field, value, rule, and a value that
works, for example ``data.batch_size=100 must be a multiple of 8 (data 2 x fsdp 4); use 96 or 104``.
"""

import json
from collections.abc import Iterable

LONGEST_VALUE = 200  # characters of a value in a message


def shown(value: object) -> str:
    """Return a value's `repr` for a message: one line of printable characters, cut if it is very long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes a whole number of at most 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def shorten(items: Iterable[str], *, shown: int = 5, separator: str = ", ") -> str:
    """The first items of a list and the number of the others, such as ``a, b and 3 more`` or ``a; b; and 3 more``."""
    items = list(items)
    others = f"{separator.strip(', ')} and {len(items) - shown} more" if len(items) > shown else ""
    return separator.join(items[:shown]) + others


def one_line(error: Exception, *, longest: int = 300) -> str:
    """The message of a library's exception on one line, for the end of a message; it may be empty."""
    return " ".join(str(error).split())[:longest]


class UserError(Exception):
    """A failure that the user can fix; its message is one line."""

    exit_code = 2


class ConfigError(UserError):
    """A wrong command line or config."""

    exit_code = 2


class DataError(UserError):
    """Missing, malformed or changed data, or a tokenizer that does not fit."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint that can't be read or written, or storage that fails."""

    exit_code = 4


class DamagedCheckpoint(CheckpointError):
    """A file of a checkpoint is missing, truncated, changed or can't be read; an earlier checkpoint may be good."""


class Diverged(UserError):
    """The loss or the gradient stopped being finite; starting again would repeat it."""

    exit_code = 5


class StateNotFinite(Diverged):
    """A state with NaN or infinity was to be saved; it is not kept.

    Attributes:
        step: of the state.
        names: its leaves that are not finite.
    """

    def __init__(self, message: str, step: int, names: list[str]):
        super().__init__(message)
        self.step, self.names = step, names


class Preempted(UserError):
    """The run was stopped by a signal, has saved its state, and should be queued again."""

    exit_code = 75


class ProcessLost(UserError):
    """Another process of the run died, hangs or never started; all of them should be started again."""

    exit_code = 76


def printable(text: str, *, longest: int | None = None, kept: str = "") -> str:
    """Return text from outside as one line without control characters, safe to print on a terminal.

    Line ends, control and bidirectional characters, unassigned ones and bytes that were no UTF-8 become JSON's escapes,
    such as ``\\u001b``; text longer than `longest` characters is cut in its middle. Characters in `kept` stay.
    """
    escape = lambda char: json.dumps(char)[1:-1] if char != "\x7f" else "\\u007f"
    safe = "".join(char if char.isprintable() or char in kept else escape(char) for char in text)
    if longest is None or len(safe) <= longest:
        return safe
    return f"{safe[: longest * 2 // 3]} ... {safe[-longest // 3 :]}"
