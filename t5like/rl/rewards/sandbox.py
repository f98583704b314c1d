"""Processes for code that nobody has read: no network, little of everything, and an end for all their children.

`protection` finds out once what this machine permits, and `start` then runs functions in such processes:

    | what      | namespaces (Linux; root, or user namespaces)        | limits (elsewhere)                            |
    |-----------|-----------------------------------------------------|-----------------------------------------------|
    | network   | none: a network namespace without interfaces        | refused by an audit hook                      |
    | files     | all read-only but an empty directory of 16 MiB      | opening for writing is refused by the hook    |
    | processes | 8, in a PID namespace of their own                  | other programs and forks are refused by it    |
    | end       | the kernel ends all processes of the PID namespace  | group, user id and orphans are killed         |

An audit hook is a part of the interpreter: it stops ordinary code, not a determined attacker. In both cases the user id
is an unused one if this process is root's, without any capabilities, and time, memory, sizes and numbers of files are
limited (setrlimit). Only the standard library is imported: this runs in an interpreter without packages.
"""

import contextlib
import ctypes
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

MEMORY = 256 * 2**20  # bytes of address space of a process; Python needs about 30 MiB of them
FILE = 2**20  # bytes of a file
FILES = 32  # open files
PROCESSES = 8  # with threads
DISK = 16 * 2**20  # bytes of all files together
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWIPC = (
    0x20000,
    0x10000000,
    0x20000000,
    0x40000000,
    2**27,
)
_MS_NOSUID_NODEV, _MS_REC_PRIVATE = 2 | 4, 16384 | 262144
_MOUNT_SETATTR, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = 442, 0x8000, 1  # the same number on every Linux architecture
_PDEATHSIG, _DUMPABLE, _CHILD_SUBREAPER, _NO_NEW_PRIVS = 1, 4, 36, 38  # of prctl
_FIRST_USER = 4_000_000_000  # user ids that no account has: they are negative as 32-bit numbers
_REFUSED = ("socket", "subprocess", "ctypes", "shutil", "pty", "os.exec", "os.fork", "os.posix_spawn", "os.spawn")
_REFUSED += ("os.system", "os.kill", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink")
_REFUSED += ("os.chmod", "os.chown", "os.truncate", "os.utime", "os.putenv", "os.chdir", "signal.pthread_kill")
_LIBRARY = os.path.dirname(os.__file__)
# The library for other users, also if directories above it are closed to them: Linux opens it by its descriptor.
LIBRARY_DESCRIPTOR = os.open(_LIBRARY, os.O_RDONLY)
LIBRARY = f"/proc/self/fd/{LIBRARY_DESCRIPTOR}" if sys.platform == "linux" else _LIBRARY
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> None:
    """On Linux, let the kernel kill this process when the thread that started it ends."""
    if sys.platform == "linux":
        _libc.prctl(_PDEATHSIG, signal.SIGKILL)


def protection(*, namespaces: bool = True) -> str:
    """Prepare this process for `start`: ``namespaces`` or ``limits``. With namespaces it has no network from then on.

    Called once, in a process with one thread that does nothing else.

    Args:
        namespaces: whether to try them.
    """
    if sys.platform != "linux":
        return "limits"
    _libc.prctl(_CHILD_SUBREAPER, 1)
    if not namespaces:
        return "limits"
    user, group = os.geteuid(), os.getegid()
    try:
        if user:
            _unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC)
            for name, text in (
                ("setgroups", "deny"),
                ("uid_map", f"{user} {user} 1"),
                ("gid_map", f"{group} {group} 1"),
            ):
                with open(f"/proc/self/{name}", "w", encoding="utf-8") as file:
                    file.write(text)
        else:
            _unshare(CLONE_NEWNET | CLONE_NEWIPC)
        return "namespaces" if _works("namespaces") else "limits"
    except OSError:
        return "limits"


def check(kind: str) -> None:
    """Raise RuntimeError if processes in such a sandbox don't start, or can't import from Python's library."""
    if not _works(kind):
        raise RuntimeError(f"no sandbox is possible here; can all users read {_LIBRARY}, and start processes?")


def _works(kind: str) -> bool:
    trial = start(kind, lambda: os.stat(os.path.join(LIBRARY, "ast.py")), 10.0)
    code = trial.wait(10.0)
    end([trial])
    return code == 0


class Box:
    """A running sandbox.

    Attributes:
        pid: of the process that this one waits for.
    """

    def __init__(self, pid: int, user: int) -> None:
        self.pid, self._user, self._code = pid, user, None

    def wait(self, seconds: float) -> int | None:
        """The exit code, negative for a signal; None if it has not ended."""
        end = time.monotonic() + seconds
        while self._code is None and time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
            else:
                time.sleep(0.002)
        return self._code

    def kill(self) -> None:
        """End the process and, with its namespace or user, what it has started; `end` does the rest."""
        if self._code is None:
            for kill in (os.kill, os.killpg):
                with contextlib.suppress(OSError):
                    kill(self.pid, signal.SIGKILL)
        if self._user:
            _kill_user(self._user)


def start(kind: str, target: Callable[[], None], seconds: float) -> Box:
    """Run a function in a sandbox; open file descriptors stay open in it.

    Args:
        kind: what `protection` returned.
        target: its process ends with code 0 after it, with 1 after an exception.
        seconds: of CPU time of each process, rounded up.
    """
    pid = os.fork()
    if pid == 0:
        _supervise(kind, target, seconds)  # does not return
    return Box(pid, _FIRST_USER + pid if os.geteuid() == 0 and kind == "limits" else 0)


def end(boxes: list[Box]) -> None:
    """End sandboxes and all their processes. They must be all that this process has: it has no other children."""
    for each in boxes:
        each.kill()
    began = time.monotonic()
    while (passed := time.monotonic() - began) < 5:
        try:
            if os.waitpid(-1, os.WNOHANG)[0]:
                continue
        except ChildProcessError:
            return
        for pid in _children() if passed > 0.02 else ():  # orphans, whose subreaper this process is
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)


def _supervise(kind: str, target: Callable[[], None], seconds: float) -> None:
    """In the child: enter the namespaces, whose first process is a grandchild, and end with its exit code."""
    code = 1
    try:
        die_with_parent()
        user = _FIRST_USER + os.getpid()
        if kind == "namespaces":
            _unshare(CLONE_NEWPID | CLONE_NEWNS)
            _hide_files()
            inner = os.fork()
            if inner:
                os.closerange(0, 2**16)  # the other side sees the end of the inner process
                os._exit(int(os.waitpid(inner, 0)[1] != 0))
        _restrict(kind, user, seconds)
        target()
        code = 0
    except BaseException:  # noqa: S110  the parent sees the exit code
        pass
    finally:
        os._exit(code)


def _restrict(kind: str, user: int, seconds: float) -> None:
    """Give up what this process may do, for good."""
    os.setsid()
    if kind == "namespaces":
        _mount("proc", "/proc", "proc", required=False)  # of this PID namespace only; else it is read-only
        os.chdir(_scratch())
    else:
        os.chdir("/")
    cpu = int(seconds) + 1
    present = 0 if os.geteuid() == 0 else _processes_of(os.geteuid())
    limits = {
        "CPU": cpu, "AS": MEMORY, "FSIZE": FILE, "NOFILE": FILES, "NPROC": PROCESSES + present, "CORE": 0,
        "MEMLOCK": 0, "MSGQUEUE": 0, "NICE": 0, "RTPRIO": 0,
    }  # fmt: skip
    for name, limit in limits.items():
        number = getattr(resource, f"RLIMIT_{name}", None)
        if number is not None:
            with contextlib.suppress(ValueError, OSError):  # not on this system
                hard = resource.getrlimit(number)[1]
                limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
                resource.setrlimit(number, (limit, limit))
    if os.geteuid() == 0:
        _become(user)
    os.environ.clear()
    if sys.platform == "linux":
        die_with_parent()  # a change of the user has reset it
        _libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
        _libc.prctl(_DUMPABLE, 0, 0, 0, 0)  # other processes of the same user can't read or trace this one
        _drop_capabilities()
    if kind == "limits":
        sys.addaudithook(_refuse)


def _become(user: int) -> None:
    os.setgroups([])
    for each in (user, 65534):  # a container may have 65,536 user ids only
        try:
            os.setresgid(each, each, each)
            os.setresuid(each, each, each)
            return
        except OSError:
            continue
    raise PermissionError("no other user id is possible")


def _drop_capabilities() -> None:
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    if _libc.capset(header, (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook for systems without namespaces. Hooks can't be removed."""
    if event.startswith(_REFUSED):
        raise PermissionError(f"{event} is not allowed here")
    if (
        event == "open"
        and arguments[0] != os.devnull
        and isinstance(arguments[2], int)
        and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    ):
        raise PermissionError("files can't be written here")


def _unshare(flags: int) -> None:
    if _libc.unshare(flags):
        raise OSError(ctypes.get_errno(), "unshare")


def _hide_files() -> None:
    """All files read-only, apart from an empty directory in memory."""
    if _libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC_PRIVATE), None):
        raise OSError(ctypes.get_errno(), "mount")
    attributes = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_RDONLY, 0, 0, 0)
    if _libc.syscall(_MOUNT_SETATTR, -100, b"/", _AT_RECURSIVE, attributes, ctypes.sizeof(attributes)):
        raise OSError(ctypes.get_errno(), "mount_setattr")
    _mount("tmpfs", _scratch(), f"size={DISK},nr_inodes=1024,mode=1777", required=True)


def _scratch() -> str:
    return "/dev/shm" if os.path.isdir("/dev/shm") else "/tmp"  # noqa: S108  mounted over, in this namespace


def _mount(kind: str, directory: str, options: str, *, required: bool) -> None:
    data = options.encode() if kind == "tmpfs" else None
    flags = ctypes.c_ulong(_MS_NOSUID_NODEV)
    if _libc.mount(kind.encode(), directory.encode(), kind.encode(), flags, data) and required:
        raise OSError(ctypes.get_errno(), f"mount {directory}")


def _processes_of(user: int) -> int:
    """The processes and threads of a user, which count towards RLIMIT_NPROC; 1,000 where that is not known."""
    if sys.platform != "linux":
        return 1_000
    count = 0
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{name}").st_uid == user:
                count += len(os.listdir(f"/proc/{name}/task"))
    return count


def _kill_user(user: int) -> None:
    """Kill all processes of a user id that only one sandbox has; the kernel does it at once."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setresuid(user, user, user)
            os.kill(-1, signal.SIGKILL)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def _children() -> list[int]:
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc") if sys.platform == "linux" else ()):
        with (
            contextlib.suppress(OSError, IndexError),
            open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file,
        ):
            if int(file.read().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(name))
    return found
