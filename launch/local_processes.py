"""Starts the processes of a run on this machine, waits for them, and ends all of them when one fails.

Each process is the leader of its own process group, so that Ctrl-C reaches only the launcher, which passes it on once.
No process outlives the launcher: it ends the groups, and on Linux the kernel ends the processes if it is killed.
Called by `launch.local`.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from launch.job import RESTART_CODES, JobSpec
from t5like.errors import ConfigError
from t5like.io.signals import termination_signals

POLL_SECONDS = 0.1
REPORT_SECONDS = 10.0  # for the other processes to end by themselves after one has failed
FORCE_SECONDS = 1.0  # after which a second signal ends the processes without saving
# The kernel kills the process when the launcher ends; PR_SET_PDEATHSIG is 1 (linux/prctl.h) and survives execve. A
# program of its own, because code that runs between fork and exec of a process with threads can deadlock.
DIE_WITH_LAUNCHER = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]):
    os._exit(76)
os.execvp(sys.argv[2], sys.argv[2:])
"""


class Ending(NamedTuple):
    """How the processes of one start ended.

    Attributes:
        code: exit code of the run: 0, 75, 76, or that of the first error.
        reason: of a code that is not 0, for a message.
        process: the number of the process that the reason is about.
    """

    code: int
    reason: str = ""
    process: int = 0


class Signals:
    """Termination signals that the launcher received.

    Attributes:
        received: whether there was one.
        forced: whether there was a second one, which ends the processes at once.
    """

    def __init__(self):
        self.received, self.forced, self._first = False, False, 0.0

    def __call__(self, number: int, frame: object) -> None:
        """Handle a signal."""
        now = time.monotonic()
        if not self.received:
            self.received, self._first = True, now
        elif now - self._first > FORCE_SECONDS:
            self.forced = True


@contextlib.contextmanager
def record_signals() -> Iterator[Signals]:
    """Record termination signals in the block, instead of raising an exception."""
    record = Signals()
    before = {number: signal.signal(number, record) for number in [*termination_signals(), signal.SIGUSR1]}
    try:
        yield record
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def environment(job: JobSpec) -> dict[str, str]:
    """Return the variables that all processes of a job get in addition to those of the shell."""
    variables = {"PYTHONUNBUFFERED": "1"}
    if job.platform == "cpu":
        variables["JAX_PLATFORMS"] = "cpu"
    if job.compile_cache:
        variables["JAX_COMPILATION_CACHE_DIR"] = job.compile_cache
    return variables | {"T5LIKE_NUM_PROCESSES": str(job.num_processes)} | dict(job.env)


def rank_environment(job: JobSpec, process: int) -> dict[str, str]:
    """Return the variables that only one process gets."""
    variables = {"T5LIKE_PROCESS_ID": str(process)} if job.num_processes > 1 else {}
    if job.gpus_per_node and job.processes_per_node > 1:
        variables["JAX_LOCAL_DEVICE_IDS"] = str(process)  # one GPU each
    return variables


def start(
    job: JobSpec, command: Sequence[str], paths: Sequence[Path], environ: Mapping[str, str] = os.environ
) -> list[subprocess.Popen]:
    """Start all processes; the output of each is appended to its file.

    Raises:
        ConfigError: the interpreter or the working directory does not exist.
    """
    shared = {**environ, **environment(job)}
    if job.num_processes > 1:
        shared |= {"T5LIKE_COORDINATOR": f"127.0.0.1:{free_port()}", "T5LIKE_RENDEZVOUS_SECRET": secrets.token_hex(16)}
    processes: list[subprocess.Popen] = []
    if shutil.which(job.python) is None:
        raise ConfigError(f"--python={job.python} is no program of this machine; use --python={sys.executable}")
    if sys.platform == "linux":
        command = [sys.executable, "-I", "-S", "-c", DIE_WITH_LAUNCHER, str(os.getpid()), *command]
    try:
        for number, path in enumerate(paths):
            with open(path, "ab") as log:
                processes.append(
                    subprocess.Popen(
                        command,
                        env=shared | rank_environment(job, number),
                        cwd=job.directory or None,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
    except OSError as error:
        end(processes)
        raise ConfigError(
            f"{error.filename} can't be used: {error.strerror}; check --directory={job.directory}"
        ) from None
    except BaseException:
        end(processes)
        raise
    return processes


def free_port() -> int:
    """Return a port of this machine that no program uses now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def wait(
    processes: Sequence[subprocess.Popen], signals: Signals, grace: float, poll: Callable[[], None] = lambda: None
) -> Ending:
    """Wait until all processes have ended; end the others soon after one has failed.

    Args:
        processes: from `start`.
        signals: passed on as SIGTERM; a second one ends all at once.
        grace: seconds to save after a signal, or after another process was preempted.
        poll: called several times a second.
    """
    deadline, passed_on = float("inf"), False
    while True:
        codes = [process.poll() for process in processes]
        poll()
        failed = [code for code in codes if code]
        now = time.monotonic()
        if None not in codes or now > deadline or signals.forced:
            break
        if signals.received and not passed_on:
            passed_on, deadline = True, now + grace
            for process, code in zip(processes, codes, strict=True):
                if code is None:
                    process.send_signal(signal.SIGTERM)
        elif failed and not passed_on:
            deadline = min(deadline, now + (grace if set(failed) == {75} else REPORT_SECONDS))
        time.sleep(POLL_SECONDS)
    end(processes)
    return ending(codes)


def end(processes: Sequence[subprocess.Popen]) -> None:
    """Kill the processes and all that they have started."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: PermissionError for a zombie
            os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.wait()


def ending(codes: Sequence[int | None]) -> Ending:
    """Return how a run ended whose processes had these exit codes; None: it was still running and was killed.

    An error that would come again is the reason if there is one: the other processes may have ended with 76 after it.
    Then a process that was killed by others, one that lost another, one that had to be killed, and preemption.
    """
    ranked = {}
    for process, code in enumerate(codes):
        if code is None:
            ranked.setdefault(3, Ending(76, "did not end in time and was killed", process))
        elif code < 0:
            ranked.setdefault(1, Ending(76, f"was ended by {signal_name(-code)}", process))
        elif code and code not in RESTART_CODES:
            ranked.setdefault(0, Ending(code, f"ended with exit code {code}", process))
        elif code == 76:
            ranked.setdefault(2, Ending(76, "lost another process", process))
        elif code == 75:
            ranked.setdefault(4, Ending(75, "was preempted and has saved", process))
    return ranked[min(ranked)] if ranked else Ending(0)


def signal_name(number: int) -> str:
    """Return the name of a signal, such as SIGKILL."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
