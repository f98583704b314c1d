"""Files of records that are appended while a run goes on and that the run can do without: metrics and their events.

A full disk must not stop a run: what can't be written is kept in memory and written later, each record whole or not at
all. There is no thread and no queue, so nothing can block. Called by `metrics.writers`.
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

LARGEST_BACKLOG = 64 * 2**20  # bytes of records that wait for free space; later ones are lost


class AppendingFile:
    """A file to which records are appended. Failures are reported, never raised."""

    def __init__(self, path: Path, report: Callable[[str], None]):
        """Open or create a file.

        Args:
            path: the file.
            report: called with a line of text when writing fails, and when it succeeds again.

        Raises:
            OSError: it can't be created.
        """
        self._path, self._report = path, report
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self._size = os.fstat(self._descriptor).st_size
        self._waiting: list[bytes] = []
        self._waiting_bytes = self._lost = 0

    def append(self, record: bytes) -> None:
        """Append a record, and before it those that could not be written earlier."""
        if self._waiting_bytes + len(record) > LARGEST_BACKLOG:
            self._lost += 1
            return
        failed_before = bool(self._waiting)
        self._waiting.append(record)
        self._waiting_bytes += len(record)
        try:
            self._write(b"".join(self._waiting))
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._size)  # a part of a record would make the file unreadable
            if not failed_before:
                reason = error.strerror or error
                self._report(
                    f"WARNING: {self._path} can't be written: {reason}; the run continues, and what belongs into this "
                    "file is written when that is possible again"
                )
            return
        if failed_before:
            lost = f", except {self._lost} records" if self._lost else ""
            self._report(f"{self._path} can be written again; nothing is missing{lost}")
        self._waiting, self._waiting_bytes, self._lost = [], 0, 0

    def close(self) -> None:
        """Close the file; records that could not be written are reported."""
        if self._descriptor < 0:
            return
        if self._waiting:
            missing = len(self._waiting) + self._lost
            self._report(f"WARNING: {missing} records are missing in {self._path}, which could not be written")
        with contextlib.suppress(OSError):
            os.close(self._descriptor)
        self._descriptor = -1

    def _write(self, data: bytes) -> None:
        if os.fstat(self._descriptor).st_size > self._size:  # the rest of a record, if it could not be cut off before
            os.ftruncate(self._descriptor, self._size)
        written = 0
        while written < len(data):
            written += os.write(self._descriptor, data[written:])
        self._size += written
