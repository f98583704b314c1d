"""Failures of storage: a full or read-only disk, a quota, a device or a network file system that does not respond.

The system reports them as an OSError, TensorStore as the text of an error without a number. Called by `checkpoint`,
which tries again, by `metrics.writers`, which continues without metrics, and by `cli.commands`, so that a failure of
storage anywhere in a command ends it with exit code 4.
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from t5like.errors import CheckpointError
from t5like.io import streams

# No space, no permission to write, a limit: waiting rarely helps, freeing space does.
PERSISTENT = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM})
# A device or a server that does not respond now: a later try may succeed.
TRANSIENT = frozenset(
    {
        *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.ENOLCK, errno.ENODEV, errno.ENXIO),
        *(errno.ECONNRESET, errno.ECONNREFUSED, errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTDOWN, errno.EHOSTUNREACH),
        *(errno.ENETDOWN, errno.ENETUNREACH),
    }
)
OS_ERROR = re.compile(r"os_error_code='(\d+)'")  # in a message of TensorStore


def error_number(error: BaseException) -> int:
    """Return the system's error number in an exception or its causes; 0 if there is none."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno:
            return cause.errno
        if match := OS_ERROR.search(str(cause)):
            return int(match[1])
        cause = cause.__cause__
    return 0


def is_transient(error: BaseException) -> bool:
    """Whether the same operation may succeed a few seconds later."""
    return error_number(error) in TRANSIENT


@contextlib.contextmanager
def storage_errors(workdir: Path | None = None) -> Iterator[None]:
    """Raise an OSError of storage that nothing else has handled as a CheckpointError.

    Args:
        workdir: the run directory of the command, if it has one: there every OSError is one of storage, for example
            when the directory has been removed or renamed.
    """
    try:
        yield
    except OSError as error:
        path = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
        in_workdir = workdir is not None and Path(path).is_relative_to(workdir) if path else False
        if error is streams.lost_output or (error.errno not in PERSISTENT | TRANSIENT and not in_workdir):
            raise
        where = path or workdir or "the storage"
        raise CheckpointError(f"{where} can't be used: {error.strerror}; check the disk and the path") from error


def sync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to the disk. File systems without this operation ignore it.

    Raises:
        OSError: the disk has failed.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Flush all files below a directory and the directories themselves, the innermost first."""
    for parent, _, files in os.walk(directory, topdown=False):
        for name in files:
            sync(Path(parent, name))
        sync(Path(parent))


def format_bytes(size: float) -> str:
    """Return a size such as ``12.3 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
