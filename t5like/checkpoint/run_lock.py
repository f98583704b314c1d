"""One writer for a run directory: an advisory lock on its file `.lock`, which the system releases when a process ends.

The file itself has no meaning and is never removed; a killed process leaves no lock. File systems without locks, such
as some network file systems, are used without one. Called by `run_directory`, and by `cli.main` to release it.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from t5like.errors import CheckpointError

FILE = ".lock"
_locks: list[int] = []  # descriptors of the locked files


def lock(workdir: Path) -> None:
    """Lock an existing run directory for this process, until the end of the block of `released` or of the process.

    Raises:
        CheckpointError: another process has locked it.
        OSError: the directory can't be written.
    """
    descriptor = os.open(workdir / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    if any(os.path.samestat(os.fstat(descriptor), os.fstat(own)) for own in _locks):
        os.close(descriptor)
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise CheckpointError(
                f"--workdir={workdir} is in use: another process writes this run; wait until it has ended, or use "
                "another --workdir"
            ) from None
        return  # ENOLCK, EOPNOTSUPP, EBADF: the file system has no locks
    _locks.append(descriptor)


def is_locked(workdir: Path) -> bool:
    """Return whether a process writes this run; False where the file system has no locks. Changes nothing."""
    try:
        descriptor = os.open(workdir / FILE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    finally:
        os.close(descriptor)
    return False


@contextlib.contextmanager
def released() -> Iterator[None]:
    """Release the locks of `lock` at the end of the block."""
    try:
        yield
    finally:
        while _locks:
            os.close(_locks.pop())
