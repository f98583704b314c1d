"""This process among those of the run, and collective operations on the host: all_gather, broadcast, barrier.

Each collective has a name and a time limit. If the time is over, the message contains which process waited in which
phase, at which step, and for which processes. With one process they return at once and have no limits. Called by the
training loop and by all modules that write files; `process_group` sets the current process.
"""

import json
import socket
import time
from collections import Counter

import jax

from t5like.distributed.activity import in_phase
from t5like.distributed.descriptions import REMEDY, describe_difference
from t5like.distributed.launchers import ProcessInfo
from t5like.distributed.liveness import Liveness
from t5like.distributed.runtime_errors import is_timeout
from t5like.errors import ConfigError


class Process:
    """The state of this process as one of several.

    Attributes:
        info: rank and addresses.
        liveness: the connections to the other processes.
        counts: how often each collective has been called, by name.
        client: JAX's coordination service.
    """

    def __init__(self, info: ProcessInfo, liveness: Liveness):
        self.info, self.liveness = info, liveness
        self.counts: Counter[str] = Counter()
        from jax._src import distributed  # the key-value service has no public name; Orbax uses the same one

        self.client = distributed.global_state.client


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


def all_gather(name: str, value: str = "", *, step: int | None = None) -> list[str]:
    """Return the values of all processes, by rank. All processes must make the same calls in the same order.

    There is no time limit here. A process that does not come is lost or makes no progress, and `liveness` or its own
    watchdog ends the run; one that takes long, because it compiles or prepares data, is waited for.
    """
    process = _current
    if process is None:
        return [value]
    with in_phase(name, step, mode="waiting"):
        process.counts[name] += 1
        key = f"t5like/{name}/{process.counts[name]}"
        process.client.key_value_set(f"{key}/{process.info.process}", value)
        if process.info.process:
            return json.loads(wait_for_key(process, f"{key}:all"))
        values = _collect(process, key)
        process.client.key_value_set(f"{key}:all", json.dumps(values))
        return values


def _collect(process: Process, key: str) -> list[str]:
    pause, count = 0.001, process.info.num_processes
    while True:
        values = {int(name.rpartition("/")[2]): value for name, value in process.client.key_value_dir_get(key)}
        if len(values) == count:
            return [values[rank] for rank in range(count)]
        time.sleep(pause := min(pause * 2, 0.2))


def wait_for_key(process: Process, key: str, seconds: float = float("inf")) -> str | None:
    """Wait until a key of the coordination service is set; returns its value, or None after `seconds`."""
    deadline = time.monotonic() + seconds
    while (remaining := deadline - time.monotonic()) > 0:
        try:
            return process.client.blocking_key_value_get(key, int(1000 * min(remaining, 1)) + 1)
        except jax.errors.JaxRuntimeError as error:
            if not is_timeout(error):
                raise
    return None


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
