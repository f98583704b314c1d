"""Files and directories that appear at their path only when they are complete."""

import contextlib
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from t5like.errors import CheckpointError, ConfigError
from t5like.io.paths import temporary_beside


def check_free(place: Path, flag: str) -> None:
    """Refuse a place that holds anything; an empty directory will do.

    Raises:
        ConfigError: it is taken. `flag` is what named it.
    """
    try:
        free = not place.exists() or (place.is_dir() and not any(place.iterdir()))
    except OSError as error:
        raise CheckpointError(f"{flag}={place} can't be used: {error.strerror}; name another one") from None
    if not free:
        raise ConfigError(f"{flag}={place} exists and is not an empty directory; name another one")


@contextlib.contextmanager
def atomic_directory(place: Path) -> Iterator[Path]:
    """A directory to fill in a with statement; it appears at `place` when that ends well, and not at all otherwise.

    Raises:
        CheckpointError: it can't be made or written.
    """
    beside = temporary_beside(place)
    try:
        beside.mkdir(parents=True)
        yield beside
        beside.replace(place)
    except OSError as error:
        raise CheckpointError(f"{place} can't be written: {error.strerror or error}; name another one") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write in a with statement; it appears at `path` when that ends well, and not at all otherwise."""
    temporary = temporary_beside(path, socket.gethostname())
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_stale_temporaries(directory: Path) -> None:
    """Remove what killed processes of this machine had begun with `written_whole`."""
    for path in directory.glob(f".*.{socket.gethostname()}-*"):
        pid = path.name.rpartition("-")[2]
        if pid.isdigit() and not _is_alive(int(pid)):
            path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
