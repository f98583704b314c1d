"""Files from users, opened only if they are regular files.

Sources are read several times: for a fingerprint, an index, a tokenizer, the token store. The bytes of a pipe can be
read only once, a device may never end, and opening a pipe without a writer waits for ever. So every file that a user
names as data, as prompts or as a tokenizer is opened here; each failure is a `DataError` with a message of one line.
"""

import contextlib
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from t5like.errors import DataError

_OTHERS = (
    (stat.S_ISDIR, "a directory; name a file"),
    (stat.S_ISFIFO, "a pipe, such as <(command) makes, and can be read only once; write the data to a file first"),
    (stat.S_ISSOCK, "a socket; write the data to a file first"),
    (stat.S_ISCHR, "a device, not a regular file; write the data to a file first"),
    (stat.S_ISBLK, "a device, not a regular file; write the data to a file first"),
)


def open_regular(path: str | Path, name: str = "") -> BinaryIO:
    """Open a regular file, or a link to one, for reading bytes.

    Args:
        path: the file.
        name: its name in messages; default: its path.

    Raises:
        DataError: it is no regular file, or can't be opened.
    """
    try:
        mode = os.stat(path).st_mode  # before opening: that may start a device, or wait for a pipe's writer
        for is_other, description in _OTHERS:
            if is_other(mode):
                raise DataError(f"{name or path} is {description}")
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{name or path} can't be read: {error.strerror or error}") from None
    except ValueError as error:  # a NUL in the path
        raise DataError(f"{name or ascii(path)} can't be read: {error}") from None


@contextlib.contextmanager
def reading(path: str | Path, name: str = "") -> Iterator[BinaryIO]:
    """`open_regular` for a with statement; an OSError inside the block becomes a DataError."""
    with open_regular(path, name) as file:
        try:
            yield file
        except OSError as error:
            raise DataError(f"{name or path} can't be read: {error.strerror or error}") from None


def read_regular(path: str | Path, name: str, largest: int) -> bytes:
    """Read a regular file of at most `largest` bytes.

    Raises:
        DataError: it is no regular file, can't be read, or is larger.
    """
    with reading(path, name) as file:
        if file.seek(0, io.SEEK_END) > largest:
            raise DataError(f"{name} is larger than {largest >> 20} MiB, so it is no such file; name another one")
        file.seek(0)
        return file.read(largest)


def size_of(path: str | Path) -> int:
    """Return the size of a file in bytes, without opening it."""
    try:
        return os.path.getsize(path)
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}") from None
