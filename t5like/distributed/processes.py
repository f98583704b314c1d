"""Several processes as one run: they agree, wait for each other with a limit, and end together.

`joined` is the whole life of a process among others: it meets them (`meeting`), JAX's coordination service connects
them, and they end together. Inside it, `gather`, `agree`, `told` and `wait` are host-side waits; each has a name and a
time limit, and what runs out says which process waited in which phase, at which step, and for whom. `limit` does the
same around what JAX waits for by itself, such as a step's values. Alone, all of this is nothing: values come straight
back, and limits don't exist. Called by `main` (`joined`), `train`, `run` and `evaluate`.

How a run ends: a process that fails tells the others why, and all exit with its code. One that dies or hangs is missed
by a limit, by a broken connection or by JAX's heartbeat: the others exit with 76. JAX answers a missing heartbeat with
an abort, and leaving in peace would mean 100 seconds in its shutdown barrier; so failing processes leave by `os._exit`.
Nothing is lost by that: files appear whole or not at all.
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
from jax.experimental import multihost_utils

from t5like.config import loader
from t5like.config.schema import Config
from t5like.distributed.launchers import ProcessInfo
from t5like.distributed.rendezvous import GRACE, REMEDY, disagreement, join, processes
from t5like.errors import ConfigError, Preempted, ProcessLost, UserError
from t5like.io.streams import write_error

PREPARE_SECONDS = (
    3600.0  # seconds without progress after which making the data has failed: a tokenizer is trained in silence
)
OVER = "t5like/over"  # the key that ends the run: empty, or who failed and why
Value = TypeVar("Value")


class ProcessFailed(UserError):
    """Another process failed, in a way of its own; this one ends with the same exit code."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


# --- the run ----------------------------------------------------------------------------------------------------------


class _Run:
    """What this process knows of the run that it is part of."""

    def __init__(self, begin: ProcessInfo, seconds: float):
        self.begin, self.seconds = begin, seconds
        self.phase, self.step, self.until = "start", None, None
        self.counts: Counter[str] = Counter()
        self.ending = threading.Lock()
        from jax._src import distributed  # its key-value service has no public name; Orbax uses it like this too

        self.client = distributed.global_state.client

    def where(self) -> str:
        """This process, and what it is doing."""
        at = "" if self.step is None else f" at step {self.step:,}"
        return f"process {self.begin.process} on {socket.gethostname()}, in {self.phase}{at}"


_run: _Run | None = None


def is_primary() -> bool:
    """Whether this is process 0, which writes and speaks for all."""
    return _run is None or _run.begin.process == 0


@contextlib.contextmanager
def process_group(
    begin: ProcessInfo | None, config: Config, facts: Mapping[str, str], *, debug: bool = False
) -> Iterator[None]:
    """Be one of the run's processes (None: alone). What fails inside ends all of them, this one by `os._exit`.

    Args:
        begin: from `launchers.detect_process`.
        config: of the run; all must have the same.
        facts: what else must be the same, such as versions, by name.
        debug: show the traceback of a failure.

    Raises:
        UserError: before all have met; and `Preempted`, which all raise at the same step.
    """
    global _run
    if begin is None:
        yield
        return
    try:
        _start(begin, config, facts)
        yield
        barrier("the end")
    except Preempted:
        barrier("the end")
        _leave()
        raise
    except BaseException as error:
        if _run is None:
            raise
        _fail(error, debug)
    _leave()


def _start(begin: ProcessInfo, config: Config, facts: Mapping[str, str]) -> None:
    """Meet the others, start JAX's service, and compare the devices."""
    global _run
    seconds = config.train.process_timeout_seconds
    address = join(begin, {**facts, "config": loader.to_json(config)}, seconds=seconds)
    host, _, port = begin.coordinator.rpartition(":")
    here = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    os.environ.setdefault("no_grpc_proxy", host)  # a proxy for the web does not lead to a neighbour
    jax.config.update("jax_check_proxy_envs", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    _catch_abort()
    jax.distributed.initialize(
        begin.coordinator if begin.process else here,
        begin.num_processes,
        begin.process,
        local_device_ids=begin.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=max(int(seconds), 60),
        heartbeat_timeout_seconds=int(min(max(seconds / 2, 10), 60)),
        shutdown_timeout_seconds=60,
        coordinator_bind_address=here,
    )
    _run = _Run(begin, seconds)
    threading.Thread(target=_watch, daemon=True, name="watch").start()
    with watchdog("starting the devices"):
        count, kind = jax.local_device_count(), jax.local_devices()[0].device_kind
    if jax.process_count() != begin.num_processes:
        raise ConfigError(
            f"{begin.launcher} started {begin.num_processes} processes, but the devices' runtime knows of "
            f"{jax.process_count()}; start one process per host, or set the runtime's variables for several"
        )
    assert_equal("devices", f"{count} x {kind}", "give each process as many")


def _leave() -> None:
    """End the run in peace: all have come to the end."""
    global _run
    run, _run = _run, None
    run.phase = "the end"
    if run.begin.process == 0:
        run.client.key_value_set(OVER, "")
    jax.distributed.shutdown()


def all_gather(name: str, value: str = "", *, step: int | None = None, seconds: float | None = None) -> list[str]:
    """The values of all processes, in order. All must call it with the same name, in the same order.

    Raises:
        PeerLost: not all came within `seconds` (default: `train.process_timeout_seconds`).
        PeerFailed: one of them has failed meanwhile.
    """
    run = _run
    if run is None:
        return [value]
    seconds = run.seconds if seconds is None else seconds
    run.phase, run.step = name, step
    run.counts[name] += 1
    key = f"t5like/{name}/{run.counts[name]}"
    run.client.key_value_set(f"{key}/{run.begin.process}", value)
    if run.begin.process == 0:
        found = _collect(run, key, seconds)
        run.client.key_value_set(f"{key}:all", json.dumps(found))
        return found
    answer = _get(run, f"{key}:all", seconds + GRACE)  # process 0 knows who is missing, and says so first
    if answer is None:
        raise ProcessLost(f"{run.where()}, waited {seconds:.0f} s for process 0; start all of them again")
    return json.loads(answer)


def _collect(run: _Run, key: str, seconds: float) -> list[str]:
    until, pause = time.monotonic() + seconds, 0.001
    while True:
        there = {int(name.rpartition("/")[2]): value for name, value in run.client.key_value_dir_get(key)}
        if len(there) == run.begin.num_processes:
            return [there[number] for number in range(run.begin.num_processes)]
        if time.monotonic() > until:
            missing = [str(number) for number in range(run.begin.num_processes) if number not in there]
            raise ProcessLost(
                f"{run.where()}, waited {seconds:.0f} s for {processes(missing)}; start all of them again"
            )
        _raise_if_over(run)
        time.sleep(pause := min(pause * 2, 0.2))


def _get(run: _Run, key: str, seconds: float) -> str | None:
    """The value of a key as soon as it is there; None if it is not in time."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        try:
            return run.client.blocking_key_value_get(key, int(1000 * min(left, 1)) + 1)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        _raise_if_over(run)
    return None


def _raise_if_over(run: _Run) -> None:
    try:
        over = run.client.key_value_try_get(OVER)
    except jax.errors.JaxRuntimeError:
        return  # there is no such key
    if over:
        failed = json.loads(over)
        raise ProcessFailed(failed["message"], failed["code"])


def assert_equal(name: str, value: str, remedy: str = REMEDY) -> None:
    """Make sure that all processes have the same value.

    Raises:
        ConfigError: one has another; the line names both, and is the same everywhere.
    """
    values = all_gather(name, json.dumps([socket.gethostname(), value]))
    (host, ours), *others = map(json.loads, values)
    for number, (their_host, theirs) in enumerate(others, start=1):
        if theirs != ours:
            them, us = f"process {number} on {their_host}", f"process 0 on {host}"
            raise ConfigError(disagreement(name, them, us, theirs, ours, remedy))


def broadcast(name: str, value: str) -> str:
    """Process 0's value, everywhere."""
    return all_gather(name, value if is_primary() else "")[0]


def barrier(name: str, *, step: int | None = None) -> None:
    """Go on when all processes are here; as `gather`."""
    all_gather(name, step=step)


@contextlib.contextmanager
def watchdog(phase: str, step: int | None = None, *, times: int = 1) -> Iterator[None]:
    """Exit with 76 if the code inside, which waits for other processes, takes `times` x `process_timeout_seconds`."""
    run = _run
    if run is None:
        yield
        return
    before = run.until
    run.phase, run.step, run.until = phase, step, time.monotonic() + times * run.seconds
    try:
        yield
    finally:
        run.until = before  # the phase stays: what fails before the next one is best told by it


def should_stop(step: int) -> bool:
    """Whether all processes stop after this step, because one of them was told to. Ask after each step, everywhere."""
    return multihost_utils.reached_preemption_sync_point(step)


def is_multi_process() -> bool:
    """Whether this process is one of several."""
    return _run is not None


# --- directories that some processes share ----------------------------------------------------------------------------


def sharers(name: str, directory: Path) -> list[int]:
    """The processes that see this process's directory as theirs. A directory that is not there is shared by nobody."""
    if _run is None:
        return [0]
    number = broadcast(f"a number for {name}", secrets.token_hex(8))
    mine = directory / f".{number}-{_run.begin.process}"
    with contextlib.suppress(OSError):
        mine.touch()
    barrier(f"marking {name}")
    found = sorted(int(path.name.rpartition("-")[2]) for path in directory.glob(f".{number}-*"))
    barrier(f"looking at {name}")
    mine.unlink(missing_ok=True)
    return found


def share(name: str, directory: Path) -> tuple[int, int]:
    """This process's place among those that see its directory as theirs, and how many these are."""
    process, sharing = _run.begin.process if _run else 0, sharers(name, directory)
    return (sharing.index(process), len(sharing)) if process in sharing else (0, 1)  # it may be read-only


def check_shared_file_system(workdir: Path) -> None:
    """Refuse a run directory that is not one and the same to all processes; process 0 has made it.

    Raises:
        ConfigError: the same line everywhere.
    """
    seen = all_gather("the run directory", str(int(0 in sharers("the run directory", workdir))))
    if blind := [str(number) for number, sees in enumerate(seen) if sees == "0"]:
        raise ConfigError(
            f"--workdir={workdir} of process 0 is not seen by {processes(blind)}; use a file system that all share"
        )


def once_per_file_system(name: str, directory: Path, work: Callable[[], Value]) -> Value:
    """Do work that leaves its result in a directory: first one process of each file system, then the others.

    Those wait as long as the directory grows or an hour has not passed, and say so every minute.
    """
    run = _run
    if run is None:
        return work()
    with contextlib.suppress(OSError):  # `work` says what is wrong
        directory.mkdir(parents=True, exist_ok=True)
    leader = min(sharers(name, directory), default=run.begin.process)
    key = f"t5like/{name}/{leader}"
    run.phase = name
    if leader == run.begin.process:
        done = threading.Event()
        threading.Thread(target=_publish_growth, args=(run, f"{key}/growth", directory, done), daemon=True).start()
        value = work()
        done.set()
        run.client.key_value_set(f"{key}/done", "yes")
        all_gather(f"the end of {name}", seconds=PREPARE_SECONDS)  # on other file systems it may take longer
        return value
    began = shown = moved = time.monotonic()
    growth = ""
    while _get(run, f"{key}/done", 2) is None:
        now, before = time.monotonic(), growth
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            growth = run.client.key_value_try_get(f"{key}/growth")
        moved = now if growth != before else moved
        if now - moved > PREPARE_SECONDS:
            raise ProcessLost(f"{run.where()}, waited {now - moved:.0f} s without progress for process {leader}")
        if now - shown > 60:
            shown = now
            print(
                f"{run.where()}, waits for process {leader} since {(now - began) / 60:.0f} min; "
                f"{growth or 'nothing'} written so far",
                file=sys.stderr,
                flush=True,
            )
    with watchdog(f"the end of {name}"):
        value = work()
    all_gather(f"the end of {name}", seconds=PREPARE_SECONDS)
    return value


def _publish_growth(run: _Run, key: str, directory: Path, done: threading.Event) -> None:
    while not done.wait(20):
        with contextlib.suppress(OSError):
            size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
            run.client.key_value_set(key, f"{size / 1e6:,.1f} MB in {directory}", allow_overwrite=True)


# --- how a run ends ---------------------------------------------------------------------------------------------------

LOST = re.compile(
    r"gloo|closed by peer|reset by peer|broken pipe|connection (refused|closed|reset)|heartbeat|coordination"
    r"|UNAVAILABLE|DEADLINE_EXCEEDED|barrier|NCCL|remote process|ABORTED",
    re.IGNORECASE,
)


def _fail(error: BaseException, debug: bool) -> NoReturn:
    """End this process because of an error, and tell the others."""
    run, cause = _run, error
    lines = traceback.format_exc()
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lost = _is_loss(cause)
    if lost or (isinstance(error, UserError) and run.begin.process):
        # Perhaps another has failed before, and this only follows: process 0 clears away the checkpoint that it could
        # not write, and the others miss their files. Then its reason counts.
        with contextlib.suppress(Exception):
            if (over := run.client.blocking_key_value_get(OVER, 2000)) and (failed := json.loads(over)):
                _end(run, failed["code"], failed["message"], lines if debug else "", foreign=True)
    if isinstance(error, UserError) and not lost:
        _end(run, error.exit_code, str(error), lines if debug else "", foreign=isinstance(error, ProcessFailed))
    if isinstance(error, KeyboardInterrupt):
        _end(run, getattr(error, "exit_code", 130), str(error) or "stopped")
    if lost:
        text = " ".join(str(cause).split())[:200]
        _end(run, 76, f"{run.where()}, another process is lost: {text}; start all of them again", lines * debug)
    _end(run, 70, "internal error; please report it with the lines above", lines)


def _is_loss(error: BaseException) -> bool:
    """Whether an error of JAX's runtime means that another process is gone."""
    kind = isinstance(error, jax.errors.JaxRuntimeError) or type(error).__name__ in ("ValueError", "XlaRuntimeError")
    return kind and LOST.search(str(error)) is not None


def _end(run: _Run, code: int, message: str, lines: str = "", *, foreign: bool = False) -> NoReturn:
    """Say why, let the others know unless they said it, and exit. Only the first thread that comes here does it."""
    if not run.ending.acquire(blocking=False):
        time.sleep(1e6)
    who = "" if foreign or message.startswith("process") else f"process {run.begin.process}: "
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        print(f"{lines}t5like: {who}{message}", file=sys.stderr, flush=True)
    with contextlib.suppress(Exception):
        if not foreign:
            run.client.key_value_set(OVER, json.dumps({"code": code, "message": who + message}))
    with contextlib.suppress(Exception):
        run.client.key_value_set(f"t5like/left/{run.begin.process}", "")
        until = time.monotonic() + GRACE
        while run.begin.process == 0 and time.monotonic() < until:  # the service ends with process 0
            if len(run.client.key_value_dir_get("t5like/left")) == run.begin.num_processes:
                break
            time.sleep(0.05)
    os._exit(code)


def _watch() -> None:
    """A thread's life: end the process when another has failed or a limit has run out."""
    run = _run
    while True:
        left = 5.0 if run.until is None else run.until - time.monotonic()
        try:
            over = run.client.blocking_key_value_get(OVER, int(1000 * min(max(left, 0.2), 5)))
        except jax.errors.JaxRuntimeError as error:
            if _run is not run:
                return
            if "DEADLINE_EXCEEDED" not in str(error):
                time.sleep(GRACE)  # the main thread may know more
                _end(run, 76, f"{run.where()}, process 0 is lost; start all of them again")
            if run.until is not None and time.monotonic() > run.until:
                faulthandler.dump_traceback(all_threads=True)
                _end(run, 76, f"{run.where()}, waited too long: a process is lost or stuck; start all of them again")
            continue
        if over and _run is run:
            time.sleep(GRACE / 2)  # the main thread may have noticed too
            failed: dict[str, Any] = json.loads(over)
            _end(run, failed["code"], failed["message"], foreign=True)
        return


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(_: int) -> None:
    where = "a process" if _run is None else _run.where()
    write_error(f"t5like: {where}, another process is lost, see above; start all of them again\n")
    os._exit(ProcessLost.exit_code)


def _catch_abort() -> None:
    """Give JAX's abort, its answer to a missing heartbeat or a lost coordinator, the exit code that says so.

    Python's own handlers would run only after the abort; this one is called in the middle of it.
    """
    ctypes.CDLL(None).signal(signal.SIGABRT, _on_abort)
