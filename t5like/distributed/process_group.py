"""The life of a process as one of several: rendezvous, JAX's coordination service, and a common end.

`process_group` surrounds a command in each process. Called by `cli.commands`.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping

import jax

from t5like.config import loader
from t5like.config.schema import Config
from t5like.distributed.launchers import ProcessInfo
from t5like.distributed.processes import END_KEY, Process, assert_equal, barrier, current, set_current
from t5like.distributed.rendezvous import rendezvous
from t5like.distributed.watchdog import exit_on_abort, fail, start_watching, watchdog
from t5like.errors import ConfigError, Preempted


@contextlib.contextmanager
def process_group(
    info: ProcessInfo | None, config: Config, facts: Mapping[str, str], *, debug: bool = False
) -> Iterator[None]:
    """Run the block as one of the run's processes. An error in it ends all of them, this one by `os._exit`.

    Args:
        info: from `launchers.detect_process`; None: the process runs alone.
        config: of the run; it must be equal in all processes.
        facts: other values by name that must be equal, such as versions.
        debug: print the traceback of an error.

    Raises:
        UserError: before the group is complete; and `Preempted`, which all processes raise at the same step.
    """
    if info is None:
        yield
        return
    try:
        _start(info, config, facts)
        yield
        barrier("the end")
    except Preempted:
        barrier("the end")
        _leave()
        raise
    except BaseException as error:
        if current() is None:
            raise
        fail(error, debug=debug)
    _leave()


def _start(info: ProcessInfo, config: Config, facts: Mapping[str, str]) -> None:
    """Wait for the other processes, start JAX's coordination service, and compare the devices."""
    seconds = config.train.process_timeout_seconds
    address = rendezvous(info, {**facts, "config": loader.to_json(config)}, seconds=seconds)
    host, _, port = info.coordinator.rpartition(":")
    bind_address = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    os.environ.setdefault("no_grpc_proxy", host)  # a web proxy does not lead to hosts of the same network
    jax.config.update("jax_check_proxy_envs", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    exit_on_abort()
    jax.distributed.initialize(
        info.coordinator if info.process else bind_address,
        info.num_processes,
        info.process,
        local_device_ids=info.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=max(int(seconds), 60),
        heartbeat_timeout_seconds=int(min(max(seconds / 2, 10), 60)),
        shutdown_timeout_seconds=60,
        coordinator_bind_address=bind_address,
    )
    set_current(Process(info, seconds))
    start_watching()
    with watchdog("starting the devices"):
        count, kind = jax.local_device_count(), jax.local_devices()[0].device_kind
    if jax.process_count() != info.num_processes:
        raise ConfigError(
            f"{info.launcher} started {info.num_processes} processes, but the runtime of the devices has "
            f"{jax.process_count()}; start one process per host, or set the runtime's variables for several"
        )
    assert_equal("devices", f"{count} x {kind}", "give each process as many")


def _leave() -> None:
    """End the group when all processes have reached the end."""
    process = current()
    set_current(None)
    process.phase = "the end"
    if process.info.process == 0:
        process.client.key_value_set(END_KEY, "")
    jax.distributed.shutdown()
