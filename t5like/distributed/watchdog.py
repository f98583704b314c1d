"""Time limits for what waits inside JAX, and the end of a process when another one fails, hangs or is lost.

A process that fails writes the reason to the coordination service, and all processes exit with its code. A process that
dies or hangs is detected by a time limit, by a broken connection or by JAX's heartbeat: the others exit with 76. JAX
reacts to a missing heartbeat with SIGABRT, and a regular exit would wait 100 seconds in its shutdown barrier; so these
processes end with `os._exit`. Nothing is lost, because all files are written atomically.
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

import jax

from t5like.distributed.processes import END_KEY, Process, ProcessFailed, current
from t5like.distributed.rendezvous import REPORT_SECONDS
from t5like.distributed.runtime_errors import is_process_lost, is_timeout
from t5like.errors import ProcessLost, UserError, one_line
from t5like.io.streams import write_error


@contextlib.contextmanager
def watchdog(phase: str, step: int | None = None, *, times: int = 1) -> Iterator[None]:
    """Limit a block that waits for other processes in JAX to `times` x `process_timeout_seconds`, then exit with 76."""
    process = current()
    if process is None:
        yield
        return
    before = process.deadline
    process.phase, process.step = phase, step
    process.deadline = time.monotonic() + times * process.seconds
    try:
        yield
    finally:
        process.deadline = before  # the phase stays: it describes a failure before the next one best


def start_watching() -> None:
    """Start the thread that ends this process when another one has failed or a time limit is over."""
    threading.Thread(target=_watch, args=(current(),), daemon=True, name="watchdog").start()


def _watch(process: Process) -> None:
    while True:
        remaining = 5.0 if process.deadline is None else process.deadline - time.monotonic()
        try:
            end = process.client.blocking_key_value_get(END_KEY, int(1000 * min(max(remaining, 0.2), 5)))
        except jax.errors.JaxRuntimeError as error:
            if current() is not process:
                return
            if not is_timeout(error):
                time.sleep(REPORT_SECONDS)  # the main thread may have a more precise reason
                _end(process, 76, f"{process.describe()}, process 0 is lost; start all of them again")
            if process.deadline is not None and time.monotonic() > process.deadline:
                faulthandler.dump_traceback(all_threads=True)
                message = "waited too long: a process is lost or does not respond; start all of them again"
                _end(process, 76, f"{process.describe()}, {message}")
            continue
        if end and current() is process:
            time.sleep(REPORT_SECONDS / 2)  # the main thread may have received it too
            failure: dict[str, Any] = json.loads(end)
            _end(process, failure["code"], failure["message"], from_other=True)
        return


def fail(error: BaseException, *, debug: bool) -> NoReturn:
    """End this process because of an error, and report the reason to the other processes."""
    process, cause = current(), error
    trace = traceback.format_exc()
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lost = is_process_lost(cause)
    if lost or (isinstance(error, UserError) and process.info.process):
        # The error may follow from one in another process: process 0 removes the files of a checkpoint that it could
        # not write, and the others then miss their files. Then the first reason is reported.
        with contextlib.suppress(Exception):
            if (end := process.client.blocking_key_value_get(END_KEY, 2000)) and (failure := json.loads(end)):
                _end(process, failure["code"], failure["message"], trace if debug else "", from_other=True)
    if isinstance(error, UserError) and not lost:
        from_other = isinstance(error, ProcessFailed)
        _end(process, error.exit_code, str(error), trace if debug else "", from_other=from_other)
    if isinstance(error, KeyboardInterrupt):
        _end(process, getattr(error, "exit_code", 130), str(error) or "stopped")
    if lost:
        text = one_line(cause, longest=200)
        message = f"{process.describe()}, another process is lost: {text}; start all of them again"
        _end(process, 76, message, trace if debug else "")
    _end(process, 70, "internal error; please report it with the lines above", trace)


def _end(process: Process, code: int, message: str, trace: str = "", *, from_other: bool = False) -> NoReturn:
    """Print the reason, report it to the others unless one of them sent it, and exit. Only the first thread does."""
    if not process.ending.acquire(blocking=False):
        time.sleep(1e6)
    prefix = "" if from_other or message.startswith("process") else f"process {process.info.process}: "
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        print(f"{trace}t5like: {prefix}{message}", file=sys.stderr, flush=True)
    with contextlib.suppress(Exception):
        if not from_other:
            process.client.key_value_set(END_KEY, json.dumps({"code": code, "message": prefix + message}))
    with contextlib.suppress(Exception):
        process.client.key_value_set(f"t5like/left/{process.info.process}", "")
        deadline = time.monotonic() + REPORT_SECONDS
        while process.info.process == 0 and time.monotonic() < deadline:  # the service ends with process 0
            if len(process.client.key_value_dir_get("t5like/left")) == process.info.num_processes:
                break
            time.sleep(0.05)
    os._exit(code)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(_: int) -> None:
    process = current()
    name = "a process" if process is None else process.describe()
    write_error(f"t5like: {name}, another process is lost, see above; start all of them again\n")
    os._exit(ProcessLost.exit_code)


def exit_on_abort() -> None:
    """Exit with 76 when JAX aborts because of a missing heartbeat or a lost coordinator.

    A handler of Python's `signal` module would run only after the abort; this C handler runs during it.
    """
    ctypes.CDLL(None).signal(signal.SIGABRT, _on_abort)
