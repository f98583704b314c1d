"""Log files of several processes, merged on the terminal: each line with the number of its process, ``[0] ...``.

The processes write their files themselves, so that a closed terminal or a stopped launcher does not delay them. Called
by `launch.local`.
"""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from t5like.errors import printable

REWRITE_SECONDS = 5.0  # between two printed states of a line that carriage returns rewrite, such as a progress bar
LONGEST_LINE = 1 << 20  # bytes after which a line without end is printed
STYLE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # colours and cursor movements of terminals


class MergedLogs:
    """Prints what is appended to log files; `poll` returns at once."""

    def __init__(self, paths: Sequence[Path], stream: TextIO, *, from_end: bool = False):
        """Print nothing yet.

        Args:
            paths: one file per process; a file that does not exist yet is printed when it appears.
            stream: where lines go.
            from_end: skip what the files contain now.
        """
        self._tails = [_Tail(path, f"[{number}] ", stream, from_end) for number, path in enumerate(paths)]

    def poll(self, *, last: bool = False) -> None:
        """Print complete lines that are new; with `last`, also a line without end."""
        for tail in self._tails:
            tail.poll(last=last)


class _Tail:
    """The end of one growing file."""

    def __init__(self, path: Path, prefix: str, stream: TextIO, from_end: bool):
        self._path, self._prefix, self._stream = path, prefix, stream
        self._offset = path.stat().st_size if from_end and path.exists() else 0
        self._pending, self._printed_at = b"", 0.0

    def poll(self, *, last: bool) -> None:
        try:
            with open(self._path, "rb") as file:
                if file.seek(0, 2) < self._offset:  # the file was replaced
                    self._offset, self._pending = 0, b""
                file.seek(self._offset)
                new = file.read()
        except FileNotFoundError:
            return
        self._offset += len(new)
        *lines, self._pending = (self._pending + new).split(b"\n")
        for line in lines:
            self._print(line)
        if self._pending and (last or len(self._pending) > LONGEST_LINE):
            self._print(self._pending)
            self._pending = b""
        elif b"\r" in self._pending and time.monotonic() - self._printed_at > REWRITE_SECONDS:
            state, _, self._pending = self._pending.rpartition(b"\r")
            self._print(state)

    def _print(self, line: bytes) -> None:
        """Print a line as a terminal would leave it: the text after the last carriage return that has one."""
        states = [state for state in line.split(b"\r") if state.strip()]
        text = STYLE.sub("", states[-1].decode("utf-8", "replace")) if states else ""
        print(self._prefix + printable(text, kept="\t"), file=self._stream, flush=True)
        self._printed_at = time.monotonic()
