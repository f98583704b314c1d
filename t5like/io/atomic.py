"""Atomic writes: files and directories that appear at their path only when they are complete.

Every module that writes a file which others read later uses `atomic_write` or `replace_file`; new directories are made
by `atomic_directory`. A process that is killed leaves a hidden temporary file, never a part of a file at its path.
"""

import contextlib
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from t5like.errors import CheckpointError, ConfigError, UserError
from t5like.io.paths import temporary_beside
from t5like.io.storage import sync


def check_free(path: Path, flag: str) -> None:
    """Refuse a path that is not free for a new directory; an empty directory is free.

    Args:
        path: the path.
        flag: the command line flag that named it.

    Raises:
        ConfigError: there is a file or a directory with content.
    """
    try:
        free = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    except OSError as error:
        raise CheckpointError(f"{flag}={path} can't be used: {error.strerror}; name another one") from None
    if not free:
        raise ConfigError(f"{flag}={path} exists and is not an empty directory; name another one")


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory, which is renamed to `path` at the end of the with statement if nothing failed.

    Raises:
        CheckpointError: it can't be made or written.
    """
    temporary = temporary_beside(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path} can't be written: {error.strerror or error}; name another one") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def atomic_write(path: Path, error: type[UserError] | None = None, remedy: str = "") -> Iterator[BinaryIO]:
    """Yield a temporary file, which is renamed to `path` at the end of the with statement if nothing failed.

    Args:
        path: where the file appears, flushed to the disk with its directory.
        error: the exception that replaces an OSError; None: the OSError is raised as it is.
        remedy: end of that exception's message.
    """
    temporary = temporary_beside(path, socket.gethostname())
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)  # the new name must survive a loss of power
    except BaseException as failure:
        temporary.unlink(missing_ok=True)
        if error is None or not isinstance(failure, OSError):
            raise
        reason = failure.strerror or failure
        raise error(f"{path} can't be written: {reason}" + f"; {remedy}" * bool(remedy)) from None


def replace_file(path: Path, content: bytes | str, error: type[UserError] | None = None, remedy: str = "") -> None:
    """Write a file's whole content with `atomic_write`; a string is encoded as UTF-8."""
    with atomic_write(path, error, remedy) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def remove_stale_temporaries(directory: Path) -> None:
    """Remove the temporary files of `atomic_write` that killed processes of this host left in a directory."""
    for path in directory.glob(f".*.{socket.gethostname()}-*"):
        pid = path.name.rpartition("-")[2]
        if pid.isdigit() and not _is_alive(int(pid)):
            path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # the process of another user
        return True
    return True
