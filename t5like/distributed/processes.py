"""This process among those of the run, and collective operations on the host: all_gather, broadcast, barrier.

Each collective has a name and a time limit. If the time is over, the message contains which process waited in which
phase, at which step, and for which processes. With one process they return at once and have no limits. Called by the
training loop and by all modules that write files; `process_group` sets the current process.
"""

import json
import socket
import threading
import time
from collections import Counter

import jax
from jax.experimental import multihost_utils

from t5like.distributed.launchers import ProcessInfo
from t5like.distributed.rendezvous import REMEDY, REPORT_SECONDS, describe_difference, describe_processes
from t5like.distributed.runtime_errors import is_timeout
from t5like.errors import ConfigError, ProcessLost, UserError

# Without progress for this time, preparing the data has failed. Training a tokenizer shows no progress.
PREPARE_SECONDS = 3600.0
END_KEY = "t5like/over"  # key of the coordination service that ends the run: empty, or which process failed and why


class ProcessFailed(UserError):
    """Another process failed with an error of its own; this one ends with the same exit code."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class Process:
    """The state of this process as one of several.

    Attributes:
        info: rank and addresses.
        seconds: time limit of a collective, `train.process_timeout_seconds`.
        phase: what the process does, for messages.
        step: the training step, or None.
        deadline: `time.monotonic` at which the watchdog ends the process, or None.
        counts: how often each collective has been called, by name.
        ending: held by the thread that ends the process.
        client: JAX's coordination service.
    """

    def __init__(self, info: ProcessInfo, seconds: float):
        self.info, self.seconds = info, seconds
        self.phase, self.step, self.deadline = "start", None, None
        self.counts: Counter[str] = Counter()
        self.ending = threading.Lock()
        from jax._src import distributed  # the key-value service has no public name; Orbax uses the same one

        self.client = distributed.global_state.client

    def describe(self) -> str:
        """The process and what it does, as the beginning of a message."""
        at_step = "" if self.step is None else f" at step {self.step:,}"
        return f"process {self.info.process} on {socket.gethostname()}, in {self.phase}{at_step}"


_current: Process | None = None


def current() -> Process | None:
    """This process as one of several; None if it runs alone."""
    return _current


def set_current(process: Process | None) -> None:
    """Set what `current` returns; called by `process_group`."""
    global _current
    _current = process


def is_primary() -> bool:
    """Whether this is process 0, which prints and writes for all."""
    return _current is None or _current.info.process == 0


def is_multi_process() -> bool:
    """Whether this process is one of several."""
    return _current is not None


def all_gather(name: str, value: str = "", *, step: int | None = None, seconds: float | None = None) -> list[str]:
    """Return the values of all processes, by rank. All processes must make the same calls in the same order.

    Raises:
        ProcessLost: a process did not call it within `seconds` (default: `train.process_timeout_seconds`).
        ProcessFailed: a process has failed.
    """
    process = _current
    if process is None:
        return [value]
    seconds = process.seconds if seconds is None else seconds
    process.phase, process.step = name, step
    process.counts[name] += 1
    key = f"t5like/{name}/{process.counts[name]}"
    process.client.key_value_set(f"{key}/{process.info.process}", value)
    if process.info.process == 0:
        values = _collect(process, key, seconds)
        process.client.key_value_set(f"{key}:all", json.dumps(values))
        return values
    # Process 0 knows which processes are missing, so its time limit is the shorter one.
    values = wait_for_key(process, f"{key}:all", seconds + REPORT_SECONDS)
    if values is None:
        raise ProcessLost(f"{process.describe()}, waited {seconds:.0f} s for process 0; start all of them again")
    return json.loads(values)


def _collect(process: Process, key: str, seconds: float) -> list[str]:
    deadline, pause, count = time.monotonic() + seconds, 0.001, process.info.num_processes
    while True:
        values = {int(name.rpartition("/")[2]): value for name, value in process.client.key_value_dir_get(key)}
        if len(values) == count:
            return [values[rank] for rank in range(count)]
        if time.monotonic() > deadline:
            missing = [str(rank) for rank in range(count) if rank not in values]
            raise ProcessLost(
                f"{process.describe()}, waited {seconds:.0f} s for {describe_processes(missing)}; "
                "start all of them again"
            )
        _raise_if_ended(process)
        time.sleep(pause := min(pause * 2, 0.2))


def wait_for_key(process: Process, key: str, seconds: float) -> str | None:
    """Wait until a key of the coordination service is set; returns its value, or None after `seconds`."""
    deadline = time.monotonic() + seconds
    while (remaining := deadline - time.monotonic()) > 0:
        try:
            return process.client.blocking_key_value_get(key, int(1000 * min(remaining, 1)) + 1)
        except jax.errors.JaxRuntimeError as error:
            if not is_timeout(error):
                raise
        _raise_if_ended(process)
    return None


def _raise_if_ended(process: Process) -> None:
    try:
        end = process.client.key_value_try_get(END_KEY)
    except jax.errors.JaxRuntimeError:
        return  # the key is not set
    if end:
        failure = json.loads(end)
        raise ProcessFailed(failure["message"], failure["code"])


def assert_equal(name: str, value: str, remedy: str = REMEDY) -> None:
    """Check that all processes have the same value.

    Raises:
        ConfigError: two differ; the message contains both values, and is the same in all processes.
    """
    values = all_gather(name, json.dumps([socket.gethostname(), value]))
    (host, expected), *others = map(json.loads, values)
    for rank, (other_host, other) in enumerate(others, start=1):
        if other != expected:
            sides = (f"process {rank} on {other_host}", other), (f"process 0 on {host}", expected)
            raise ConfigError(describe_difference(name, *sides, remedy))


def broadcast(name: str, value: str) -> str:
    """Return process 0's value in all processes."""
    return all_gather(name, value if is_primary() else "")[0]


def barrier(name: str, *, step: int | None = None) -> None:
    """Wait until all processes have called it; raises as `all_gather`."""
    all_gather(name, step=step)


def should_stop(step: int) -> bool:
    """Whether all processes stop after this step, because one of them received SIGTERM. All call it after each step."""
    return multihost_utils.reached_preemption_sync_point(step)
