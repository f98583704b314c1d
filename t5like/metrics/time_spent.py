"""Where the time of a run goes: seconds of each part between two lines of metrics, measured on process 0's host.

Every moment belongs to one part, so the parts of all lines add up to the time since the start of the run:

    start     until the first step: devices, data, restoring or making the state, compiling
    data      waiting for a batch
    inputs    making the arrays of a step: transfer to the devices; in `t5like rl` also the answers and their rewards
    device    dispatching steps and waiting for their results
    evaluate, save
    pauses    verifying data, comparing replicas, rewinding, recording bad steps, compiling for rows of another shape
    host      all the rest
    undone    not measured: the sum of the parts in the lines that a restart or a rewind has removed

On an accelerator the host waits for data while the devices still compute; then this time is not lost, unless the
devices have become idle: ``time/device`` is near 0. A line costs ten calls of a clock.
"""

import contextlib
import time
from collections.abc import Callable, Iterator

from t5like.metrics.profiler import activity

PREFIX = "time/"
PARTS = ("start", "data", "inputs", "device", "evaluate", "save", "pauses", "host", "undone")


class TimeSpent:
    """Seconds by part, since the last `read`. Parts may be nested: time belongs to the innermost."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        """Begin in the part ``start``."""
        self._clock, self._last = clock, clock()
        self._parts = ["start"]
        self._seconds: dict[str, float] = {}

    def begin_steps(self) -> None:
        """From now on, time outside of all blocks is that of the host."""
        self._pass()
        self._parts[0] = "host"

    @contextlib.contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Count the block as `part`, under whose name it also appears in profiles."""
        self._pass()
        self._parts.append(part)
        try:
            with activity(part):
                yield
        finally:
            self._pass()
            self._parts.pop()

    def add_undone(self, seconds: float) -> None:
        """Add the time of lines that were removed."""
        if seconds:
            self._seconds["undone"] = self._seconds.get("undone", 0.0) + seconds

    def read(self) -> dict[str, float]:
        """The seconds of each part since the last call, by metric name; parts without time are left out."""
        self._pass()
        seconds, self._seconds = self._seconds, {}
        return {f"{PREFIX}{part}": seconds[part] for part in PARTS if part in seconds}

    def _pass(self) -> None:
        now = self._clock()
        self._seconds[self._parts[-1]] = self._seconds.get(self._parts[-1], 0.0) + now - self._last
        self._last = now
