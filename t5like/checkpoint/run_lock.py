"""One writer for a run directory: its file `.lock` is locked, names the process that writes, and shows that it lives.

The file contains host, process id and start time as JSON. It is locked with flock(2), which the system releases when a
process ends, however it ends. Some network file systems lock nothing, or only among the processes of one host. So the
owner also touches the file every `BEAT_SECONDS`, and reads it again: of two processes that started at the same moment,
the one whose entry was overwritten ends. An entry of another host is stale when the file was not touched for
`STALE_SECONDS`. Ages are measured by the file system's clock, not by those of the hosts.

Called by `run_directory`, and by `cli.main` to release it. Several processes of one run have one lock, of process 0.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from t5like.errors import CheckpointError, printable
from t5like.io.strict_json import loads

FILE = ".lock"
BEAT_SECONDS = 5.0  # between two times that the owner touches the file
STALE_SECONDS = 30.0  # without a touch: the owner on another host has ended
FIRST_LOOKS = (0.5, 1.0, 2.0)  # seconds after locking, to find another process that started at the same moment
LONGEST = 4096  # bytes of the file
ADVICE = "wait until it has ended, or use another --workdir"


class _Owned(NamedTuple):
    """A lock of this process."""

    descriptor: int
    path: Path
    entry: dict[str, Any]
    released: threading.Event


_locks: list[_Owned] = []


def lock(workdir: Path, on_taken: Callable[[str], None] = lambda message: None) -> None:
    """Lock an existing run directory for this process, until the end of the block of `released` or of the process.

    Args:
        workdir: the run directory.
        on_taken: called in a thread when another process has overwritten the entry of this one; ends the process.

    Raises:
        CheckpointError: another process has locked it.
        OSError: the directory can't be written.
    """
    path = workdir / FILE
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if any(os.path.samestat(os.fstat(descriptor), os.fstat(own.descriptor)) for own in _locks):
            os.close(descriptor)
            return
        locks = _flock(descriptor)
        if locks is False or _is_alive(_read(path), path, locks=bool(locks)):
            raise _in_use(workdir, _read(path))
        entry = _entry()
        text = json.dumps(entry).encode()
        os.pwrite(descriptor, text, 0)
        os.ftruncate(descriptor, len(text))
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(descriptor)
        raise
    owned = _Owned(descriptor, path, entry, threading.Event())
    _locks.append(owned)
    threading.Thread(target=_beat, args=(owned, on_taken), daemon=True, name="run lock").start()


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
            owned = _locks.pop()
            owned.released.set()
            with contextlib.suppress(OSError):
                if _read(owned.path) == owned.entry:
                    os.ftruncate(owned.descriptor, 0)
            os.close(owned.descriptor)


def _flock(descriptor: int) -> bool | None:
    """Lock a file; False: another process has locked it; None: the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None  # ENOLCK, EOPNOTSUPP, EBADF
    return True


def _entry() -> dict[str, Any]:
    """Describe this process; `token` makes the entry unique."""
    return {
        "host": socket.gethostname(),
        "process_id": os.getpid(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
        "started_ticks": _start_ticks(os.getpid()),
        "token": secrets.token_hex(8),
    }


def _machine() -> str:
    """Identify the running system and the process ids that it shows: containers of one host have different ones."""
    parts = []
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join([socket.gethostname(), *parts])


def _start_ticks(process_id: int) -> int | None:
    """Return when a process of this system started, in its clock's ticks; None: there is none, or it is not known."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = Path(f"/proc/{process_id}/stat").read_text("utf-8", "replace")
        return int(text.rpartition(")")[2].split()[19])
    return None


def _read(path: Path) -> dict[str, Any]:
    """Return the entry of a lock file; empty if it has none that can be read."""
    with contextlib.suppress(OSError, ValueError), path.open("rb") as file:
        entry = loads(file.read(LONGEST))
        if isinstance(entry, dict) and isinstance(entry.get("host"), str) and type(entry.get("process_id")) is int:
            return entry
    return {}


def _is_alive(owner: dict[str, Any], path: Path, *, locks: bool) -> bool:
    """Whether the process of an entry still writes. It may take `STALE_SECONDS`.

    Args:
        owner: the entry.
        path: of the lock file.
        locks: this process has locked the file, so no other process of this system has.
    """
    if not owner:
        return False
    if owner.get("machine") == _machine():
        ticks = _start_ticks(owner["process_id"])
        return not locks and ticks is not None and ticks == owner.get("started_ticks")
    first, started = _touched(path), time.monotonic()
    while (watched := time.monotonic() - started) < STALE_SECONDS:
        with tempfile.TemporaryFile(dir=path.parent) as probe:
            age = os.fstat(probe.fileno()).st_mtime - (touched := _touched(path))
        if touched != first:
            return True
        if age > STALE_SECONDS and watched > 2 * BEAT_SECONDS:  # a clock that was set shows no age
            break
        time.sleep(BEAT_SECONDS / 10)
    return False


def _touched(path: Path) -> float:
    with path.open("rb") as file:  # opening makes a network file system ask its server
        return os.fstat(file.fileno()).st_mtime


def _in_use(workdir: Path, owner: dict[str, Any]) -> CheckpointError:
    who = "another process"
    if owner:
        host, started = (printable(str(owner.get(name)), longest=100) for name in ("host", "started"))
        who = f"process {owner['process_id']} on {host}, started {started}"
    return CheckpointError(f"--workdir={workdir} is in use by {who}; {ADVICE}")


def _beat(owned: _Owned, on_taken: Callable[[str], None]) -> None:
    """Touch the file until the lock is released, and look for the entry of another process."""
    waits = [*FIRST_LOOKS]
    while not owned.released.wait(waits.pop(0) if waits else BEAT_SECONDS):
        with contextlib.suppress(OSError):  # a slow or lost file system; saving a checkpoint reports it
            other = _read(owned.path)
            if other and other != owned.entry and not owned.released.is_set():
                on_taken(str(_in_use(owned.path.parent, other)))
            os.utime(owned.descriptor)
