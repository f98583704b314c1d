"""One decision about a checkpoint in all processes: what fails in one of them fails in all.

Each process reads and writes only its part of the arrays, and the following step needs all processes. Called by
`checkpoints`, `saving` and `recovery`.
"""

import contextlib
import json
import time
from collections.abc import Iterator

from t5like.distributed import processes
from t5like.errors import CheckpointError, DamagedCheckpoint
from t5like.io.storage import is_transient

POLL_SECONDS = 0.2  # until a thread that waits for other processes looks again whether one has failed


class SaveFailed(CheckpointError):
    """Storage failed during a save. Its files are removed, the earlier checkpoints are unchanged.

    Attributes:
        transient: whether the same save may succeed a few seconds later.
    """

    def __init__(self, message: str, *, transient: bool):
        super().__init__(message)
        self.transient = transient


class OtherFailed(CheckpointError):
    """A save ends here because another process could not write its part."""


@contextlib.contextmanager
def same_failure(name: str, step: int) -> Iterator[None]:
    """Raise a DamagedCheckpoint of the block in all processes if one of them has raised it. All must call it."""
    failure = ""
    try:
        yield
    except DamagedCheckpoint as error:
        failure = str(error)
    failures = list(filter(None, processes.all_gather(name, failure, step=step)))
    if failures:
        raise DamagedCheckpoint(failures[0])


class Attempt:
    """One save that all processes make together. All of them construct it in the same order.

    The main thread of a process that has failed says so with `fail`. The threads that write in the others then end at
    their next `barrier`, so that all main threads come to `outcome`.
    """

    def __init__(self, step: int):
        self._step, self._process = step, processes.current()
        if self._process is not None:
            self._process.counts["attempts to save"] += 1
            self._key = f"t5like/attempt/{self._process.counts['attempts to save']}"

    def barrier(self, *, key: str, timeout_ms: int) -> None:
        """Wait for the same call in all processes; called by threads of Orbax.

        Raises:
            OtherFailed: a process has failed.
            CheckpointError: a process has not come in this time.
        """
        process, key, deadline = self._process, f"{self._key}/{key}", time.monotonic() + timeout_ms / 1000
        process.client.key_value_set(f"{key}/{process.info.process}", "")
        while time.monotonic() < deadline:
            if process.info.process == 0 and len(process.client.key_value_dir_get(key)) == process.info.num_processes:
                process.client.key_value_set(f"{key}:all", "")
                return
            if process.info.process and processes.wait_for_key(process, f"{key}:all", POLL_SECONDS) is not None:
                return
            if process.client.key_value_dir_get(f"{self._key}/failed"):
                raise OtherFailed("another process could not write its part")
            if process.info.process == 0:
                time.sleep(POLL_SECONDS)
        raise CheckpointError(f"another process has not written its part in {timeout_ms / 1000:.0f} s")

    def fail(self) -> None:
        """Let the threads of the other processes end, because this process has failed."""
        if self._process is not None:
            self._process.client.key_value_set(f"{self._key}/failed/{self._process.info.process}", "")

    def outcome(self, name: str, failure: CheckpointError | None) -> SaveFailed | None:
        """Exchange the failures of all processes, None of those without one; returns the first, the same in all."""
        text = ""
        if failure is not None:
            rank = "" if self._process is None else f"process {self._process.info.process}: "
            text = json.dumps([f"{rank}{failure}", is_transient(failure)])
        failures = list(filter(None, processes.all_gather(name, text, step=self._step)))
        if not failures:
            return None
        message, transient = json.loads(failures[0])
        return SaveFailed(message, transient=transient)
