"""Directories that several processes share: which processes see the same one, and work that one process does for them.

Called by `train.loop` and `evaluation.heldout` for the data directory, and by `run_directory` for the run directory.
"""

import contextlib
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import jax

from t5like.distributed.activity import activity, in_phase
from t5like.distributed.descriptions import describe_processes
from t5like.distributed.processes import Process, all_gather, barrier, broadcast, current, wait_for_key
from t5like.distributed.watchdog import describe
from t5like.errors import ConfigError

GROWTH_SECONDS = 20.0  # between two looks at the size of a directory
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

    The others wait as long as the first one makes progress, and print a line every minute. Its progress is the use of a
    processor, or growth of the directory.
    """
    process = current()
    if process is None:
        with in_phase(name, mode="computing"), _watch_growth(directory):
            return work()
    with contextlib.suppress(OSError):  # `work` raises the error
        directory.mkdir(parents=True, exist_ok=True)
    leader = min(sharers(name, directory), default=process.info.process)
    key = f"t5like/{name}/{leader}"
    if leader == process.info.process:
        publish = lambda growth: process.client.key_value_set(f"{key}/growth", growth, allow_overwrite=True)
        with in_phase(name, mode="computing"), _watch_growth(directory, publish):
            value = work()
        process.client.key_value_set(f"{key}/done", "yes")
    else:
        with in_phase(f"{name}, which process {leader} does", mode="waiting"):
            _wait_for_leader(process, key, leader)
        with in_phase(f"the end of {name}", mode="computing"):
            value = work()
    barrier(f"the end of {name}")  # other file systems may take longer
    return value


def _wait_for_leader(process: Process, key: str, leader: int) -> None:
    start = printed = time.monotonic()
    growth = ""
    while wait_for_key(process, f"{key}/done", 2) is None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            growth = process.client.key_value_try_get(f"{key}/growth")
        if (now := time.monotonic()) - printed > 60:
            printed = now
            print(
                f"{describe()}, has waited for {(now - start) / 60:.0f} min; {growth or 'nothing'} written so far",
                file=sys.stderr,
                flush=True,
            )


@contextlib.contextmanager
def _watch_growth(directory: Path, publish: Callable[[str], None] = lambda growth: None) -> Iterator[None]:
    """Note progress whenever a directory grows during the block; `publish` gets its size as text."""
    done, phase = threading.Event(), activity.phase

    def watch():
        before = ""
        while not done.wait(GROWTH_SECONDS):
            with contextlib.suppress(OSError, jax.errors.JaxRuntimeError):
                size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
                growth = f"{size / 1e6:,.1f} MB in {directory}"
                publish(growth)
                if growth != before and activity.phase == phase:
                    activity.progress()
                before = growth

    threading.Thread(target=watch, daemon=True, name="growth").start()
    try:
        yield
    finally:
        done.set()
