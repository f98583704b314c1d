"""The end of a process when it makes no progress, or when another one fails, hangs or is lost.

* A thread counts the seconds without progress of this process (`activity`). After `train.process_timeout_seconds` it
  prints all stacks, and the process exits with 76. It also arms the timers of `last_resort`, which end a process whose
  interpreter does not run after `train.heartbeat_timeout_seconds`.
* A process that fails, or has lost another one, sends the reason to all (`liveness`), which exit with its code.

A regular exit would wait 100 seconds in JAX's shutdown barrier, so these processes end with `os._exit`. Nothing is
lost, because all files are written atomically.
"""

import contextlib
import ctypes
import faulthandler
import functools
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import NoReturn

from t5like.config.schema import TrainConfig
from t5like.distributed.activity import Mode, activity, in_phase
from t5like.distributed.descriptions import REPORT_SECONDS
from t5like.distributed.last_resort import LastResort
from t5like.distributed.liveness import RESTART, End
from t5like.distributed.processes import current
from t5like.distributed.runtime_errors import is_process_lost
from t5like.errors import ProcessLost, UserError, one_line
from t5like.io.streams import write_error

COMPUTING_TIMES = 24  # a phase that uses a processor and shows no other progress may take as many times the limit
COMPUTED = 0.05  # of the time, at least: the use of a processor that counts as progress
RECEIVE_SECONDS = 2.0  # for the other processes to receive the reason why this one ends
grace_seconds = 25.0  # `train.preemption_grace_seconds`
HOST = socket.gethostname()
_ending = threading.Lock()  # held by the thread that ends the process


@functools.cache
def last_resort() -> LastResort:
    """The native timers of this process."""
    return LastResort()


@contextlib.contextmanager
def watchdog(phase: str, step: int | None = None, *, times: int = 1, mode: Mode = "device") -> Iterator[None]:
    """Limit a block that waits for devices to `times` x `train.process_timeout_seconds` without progress."""
    with in_phase(phase, step, mode=mode, times=times):
        yield


@contextlib.contextmanager
def watching(limits: TrainConfig) -> Iterator[None]:
    """Watch this process during the block: it ends with 76 if it makes no progress."""
    global grace_seconds
    grace_seconds = limits.preemption_grace_seconds
    activity.__init__()
    stopped = threading.Event()
    heartbeat = limits.heartbeat_timeout_seconds
    late = f"does not respond: its interpreter has not run for {heartbeat} s; its stacks are above; {RESTART}"
    activity.on_enter = lambda: last_resort().set_message(f"{describe()}, {late}")
    activity.on_enter()
    last_resort().arm(heartbeat)
    thread = threading.Thread(target=_watch, args=(limits, stopped), daemon=True, name="watchdog")
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        last_resort().disarm()
        activity.__init__()


def _watch(limits: TrainConfig, stopped: threading.Event) -> None:
    seconds, heartbeat = limits.process_timeout_seconds, limits.heartbeat_timeout_seconds
    interval = min(seconds / 10, heartbeat / 10, 1.0)
    used, started = time.process_time(), time.monotonic()
    while not stopped.wait(interval):
        now_used, now = time.process_time(), time.monotonic()
        activity.tick(computed=now_used - used > COMPUTED * (now - started))
        used, started = now_used, now
        last_resort().arm(heartbeat)
        if reason := overdue(seconds):
            faulthandler.dump_traceback(all_threads=True, file=2)
            end(ProcessLost.exit_code, f"{describe()}, {reason}; its stacks are above; {RESTART}")


def overdue(seconds: float) -> str:
    """Why this process is stuck; empty: it is not. `seconds`: `train.process_timeout_seconds`."""
    idle, limit, process = activity.idle, activity.times * seconds, current()
    if activity.mode == "waiting" and process is not None:
        idle = min(idle, process.liveness.least_idle())
    if activity.mode in ("waiting", "device"):
        limit += REPORT_SECONDS  # a process that does not wait for others can name the reason better
    if activity.mode == "computing" and activity.busy > COMPUTING_TIMES * limit:
        return f"has computed for {activity.busy:.0f} s without any other progress"
    if idle <= limit:
        return ""
    return f"has made no progress for {idle:.0f} s"


def describe() -> str:
    """This process and what it does, as the beginning of a message."""
    process = current()
    name = "the process" if process is None else f"process {process.info.process}"
    return f"{name} on {HOST}, {activity.describe()}"


def end_by_other(reason: End) -> None:
    """End this process because of another one: `on_end` of `Liveness`."""
    end(reason.code, reason.message, from_other=reason.from_other)


def fail(error: BaseException, *, debug: bool) -> NoReturn:
    """End this process, one of several, because of an error, and send the reason to the others."""
    process, cause = current(), error
    trace = traceback.format_exc()
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lost = is_process_lost(cause)
    if lost or (isinstance(error, UserError) and process.info.process):
        # The error may follow from one in another process: process 0 removes the files of a checkpoint that it could
        # not write, and the others then miss their files. Then the first reason is reported.
        deadline = time.monotonic() + RECEIVE_SECONDS
        while process.liveness.end is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if reason := process.liveness.end:
            end(reason.code, reason.message, trace if debug else "", from_other=reason.from_other)
    if isinstance(error, UserError) and not lost:
        end(error.exit_code, str(error), trace if debug else "")
    if isinstance(error, KeyboardInterrupt):
        end(getattr(error, "exit_code", 130), str(error) or "stopped")
    if lost:
        text = one_line(cause, longest=200)
        message = f"{describe()}, another process is lost: {text}; {RESTART}"
        end(ProcessLost.exit_code, message, trace if debug else "")
    end(70, "internal error; please report it with the lines above", trace)


def end(code: int, message: str, trace: str = "", *, from_other: bool = False) -> NoReturn:
    """Print the reason, send it to the others unless one of them has sent it, and exit. Only the first thread does."""
    if not _ending.acquire(blocking=False):
        time.sleep(1e6)
    process = current()
    named = process is None or from_other or message.startswith("process")
    message = message if named else f"process {process.info.process}: {message}"
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        print(f"{trace}t5like: {message}", file=sys.stderr, flush=True)
    with contextlib.suppress(Exception):
        if process is not None:
            if not from_other:
                process.liveness.publish_end(code, message)
            process.liveness.wait_until_received(RECEIVE_SECONDS)
    with contextlib.suppress(Exception):
        for child in multiprocessing.active_children():
            child.kill()
    os._exit(code)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(_: int) -> None:
    time.sleep(RECEIVE_SECONDS / 2)  # another thread ends the process if it knows the reason
    if not _ending.acquire(blocking=False):
        time.sleep(1e6)
    write_error(f"t5like: {describe()}, another process is lost, see above; {RESTART}\n")
    os._exit(ProcessLost.exit_code)


def exit_on_abort() -> None:
    """Exit with 76 when JAX aborts because its coordination service is lost.

    A handler of Python's `signal` module would run only after the abort; this one runs during it. It needs the
    interpreter lock: a process that is wedged with it is ended by `last_resort`.
    """
    ctypes.CDLL(None).signal(signal.SIGABRT, _on_abort)
