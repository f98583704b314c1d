"""One writer for a run directory: an advisory lock on its file `.lock`, which the system releases when a process ends.

The file itself means nothing and stays: a process that is killed leaves no lock behind. A file system without locks, as
some network file systems are, does without.
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
    """Take a run directory, which exists, for this process, until the end of `released`, or of the process.

    Raises:
        CheckpointError: another process has it.
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
        return  # ENOLCK, EOPNOTSUPP, EBADF: no locks here
    _locks.append(descriptor)


@contextlib.contextmanager
def released() -> Iterator[None]:
    """Release at its end what `lock` took within."""
    try:
        yield
    finally:
        while _locks:
            os.close(_locks.pop())
