"""The life of a process: the watchdog, signals, and, as one of several, rendezvous, JAX's service, and a common end.

`process_group` surrounds a command in each process. Called by `cli.commands`.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping

import jax

from t5like.config import loader
from t5like.config.schema import Config
from t5like.distributed import preemption
from t5like.distributed.activity import activity
from t5like.distributed.launchers import ProcessInfo
from t5like.distributed.liveness import Liveness
from t5like.distributed.processes import Process, assert_equal, barrier, current, set_current
from t5like.distributed.rendezvous import Group, rendezvous
from t5like.distributed.watchdog import end_by_other, exit_on_abort, fail, watchdog, watching
from t5like.errors import ConfigError, Preempted


@contextlib.contextmanager
def process_group(
    info: ProcessInfo | None,
    config: Config,
    facts: Mapping[str, str],
    *,
    debug: bool = False,
    continues: bool = False,
) -> Iterator[None]:
    """Run the block as one of the run's processes. An error in it ends all of them, this one by `os._exit`.

    Args:
        info: from `launchers.detect_process`; None: the process runs alone.
        config: of the run; it must be equal in all processes.
        facts: other values by name that must be equal, such as versions.
        debug: print the traceback of an error.
        continues: the same command, started again, continues: a signal of a scheduler ends it with exit code 75 in any
            phase.

    Raises:
        UserError: before the group is complete; and `Preempted`, which all processes raise at the same step.
    """
    preemption.reset()
    with watching(config.train), preemption.receive_signals() if continues else contextlib.nullcontext():
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
    seconds, heartbeat = config.train.process_timeout_seconds, config.train.heartbeat_timeout_seconds
    activity.enter("waiting for the other processes to start", times=2)  # it has a time limit of its own
    group = rendezvous(info, {**facts, "config": loader.to_json(config)}, seconds=seconds)
    activity.enter("starting JAX's coordination service", mode="computing")
    _start_service(info, group, seconds, heartbeat)
    liveness = Liveness(
        info.process,
        group.connections,
        group.hosts,
        heartbeat,
        on_end=end_by_other,
        vote=preemption.stop.vote,
        on_agreed=preemption.stop.agree,
    )
    set_current(Process(info, liveness))
    with watchdog("starting the devices", mode="computing"):
        count, kind = jax.local_device_count(), jax.local_devices()[0].device_kind
    if jax.process_count() != info.num_processes:
        raise ConfigError(
            f"{info.launcher} started {info.num_processes} processes, but the runtime of the devices has "
            f"{jax.process_count()}; start one process per host, or set the runtime's variables for several"
        )
    assert_equal("devices", f"{count} x {kind}", "give each process as many")


def _start_service(info: ProcessInfo, group: Group, seconds: float, heartbeat: float) -> None:
    """Start JAX's coordination service, which its collective operations need.

    Its own heartbeat and its handler of SIGTERM are not used: they would end a process without naming another one.
    """
    host, _, port = info.coordinator.rpartition(":")
    bind_address = f"[{group.address}]:{port}" if ":" in group.address else f"{group.address}:{port}"
    os.environ.setdefault("no_grpc_proxy", host)  # a web proxy does not lead to hosts of the same network
    jax.config.update("jax_check_proxy_envs", False)
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    exit_on_abort()
    jax.distributed.initialize(
        info.coordinator if info.process else bind_address,
        info.num_processes,
        info.process,
        local_device_ids=info.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=max(int(seconds), 60),
        heartbeat_timeout_seconds=max(2 * int(heartbeat), 60),
        shutdown_timeout_seconds=60,
        coordinator_bind_address=bind_address,
    )


def _leave() -> None:
    """End the group when all processes have reached the end."""
    process = current()
    activity.enter("the end", mode="computing")
    process.liveness.leave()
    jax.distributed.shutdown()
    set_current(None)
    process.liveness.close()
