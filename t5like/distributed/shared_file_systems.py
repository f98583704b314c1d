"""Directories that several processes share: which processes see the same one, and work that one process does for them.

Called by `train.loop` and `evaluation.heldout` for the data directory, and by `run_directory` for the run directory.
"""

import contextlib
import secrets
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax

from t5like.distributed.processes import PREPARE_SECONDS, Process, all_gather, barrier, broadcast, current, wait_for_key
from t5like.distributed.rendezvous import describe_processes
from t5like.distributed.watchdog import watchdog
from t5like.errors import ConfigError, ProcessLost

Value = TypeVar("Value")


def sharers(name: str, directory: Path) -> list[int]:
    """Return the ranks of the processes that share this process's directory; empty if it does not exist."""
    process = current()
    if process is None:
        return [0]
    mark = broadcast(f"a number for {name}", secrets.token_hex(8))
    own_mark = directory / f".{mark}-{process.info.process}"
    with contextlib.suppress(OSError):
        own_mark.touch()
    barrier(f"marking {name}")
    ranks = sorted(int(path.name.rpartition("-")[2]) for path in directory.glob(f".{mark}-*"))
    barrier(f"looking at {name}")
    own_mark.unlink(missing_ok=True)
    return ranks


def share(name: str, directory: Path) -> tuple[int, int]:
    """Return this process's index among those that share its directory, and their number."""
    process = current()
    rank, sharing = process.info.process if process else 0, sharers(name, directory)
    return (sharing.index(rank), len(sharing)) if rank in sharing else (0, 1)  # the directory may be read-only


def check_shared(workdir: Path) -> None:
    """Refuse a run directory that is not on a file system shared by all processes; process 0 has created it.

    Raises:
        ConfigError: with the same message in all processes.
    """
    seen = all_gather("the run directory", str(int(0 in sharers("the run directory", workdir))))
    if blind := [str(rank) for rank, sees in enumerate(seen) if sees == "0"]:
        raise ConfigError(
            f"--workdir={workdir} of process 0 is not seen by {describe_processes(blind)}; "
            "use a file system that all share"
        )


def once_per_file_system(name: str, directory: Path, work: Callable[[], Value]) -> Value:
    """Do work whose result is in a directory: in one process of each file system first, then in the others.

    The others wait as long as the directory grows, at most an hour without growth, and print a line every minute.
    """
    process = current()
    if process is None:
        return work()
    with contextlib.suppress(OSError):  # `work` raises the error
        directory.mkdir(parents=True, exist_ok=True)
    leader = min(sharers(name, directory), default=process.info.process)
    key = f"t5like/{name}/{leader}"
    process.phase = name
    if leader == process.info.process:
        done = threading.Event()
        publish = (process, f"{key}/growth", directory, done)
        threading.Thread(target=_publish_growth, args=publish, daemon=True).start()
        value = work()
        done.set()
        process.client.key_value_set(f"{key}/done", "yes")
    else:
        _wait_for_leader(process, key, leader)
        with watchdog(f"the end of {name}"):
            value = work()
    all_gather(f"the end of {name}", seconds=PREPARE_SECONDS)  # other file systems may take longer
    return value


def _wait_for_leader(process: Process, key: str, leader: int) -> None:
    start = printed = grown = time.monotonic()
    growth = ""
    while wait_for_key(process, f"{key}/done", 2) is None:
        now, before = time.monotonic(), growth
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            growth = process.client.key_value_try_get(f"{key}/growth")
        grown = now if growth != before else grown
        if now - grown > PREPARE_SECONDS:
            raise ProcessLost(f"{process.describe()}, waited {now - grown:.0f} s without progress for process {leader}")
        if now - printed > 60:
            printed = now
            print(
                f"{process.describe()}, has waited for process {leader} for {(now - start) / 60:.0f} min; "
                f"{growth or 'nothing'} written so far",
                file=sys.stderr,
                flush=True,
            )


def _publish_growth(process: Process, key: str, directory: Path, done: threading.Event) -> None:
    while not done.wait(20):
        with contextlib.suppress(OSError):
            size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
            process.client.key_value_set(key, f"{size / 1e6:,.1f} MB in {directory}", allow_overwrite=True)
