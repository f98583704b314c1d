"""What this process is doing, and for how long it has made no progress: for messages, heartbeats and the watchdog.

There is one `Activity` per process, `activity`. The main thread writes it with `enter` and `progress`; the threads of
`watchdog` and `liveness` read it.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Literal

# computing: the use of a processor is progress, as in compiling or training a tokenizer.
# strict: only an explicit call of `enter` or `progress` is, as in the training loop.
# waiting: for other processes; then their progress counts.
Mode = Literal["computing", "strict", "waiting"]
LONGEST_TICK = 2.0  # s that one call of `tick` counts at most: a process that was stopped and continues is not stuck


class Activity:
    """The current phase of a process.

    Attributes:
        phase: what it does, for messages.
        step: the training step, or None.
        mode: what counts as progress.
        times: the time limit of the phase as a multiple of `train.process_timeout_seconds`.
        idle: seconds without progress while the process was running.
        busy: seconds without other progress than the use of a processor.
        on_enter: called when a phase has been entered.
    """

    def __init__(self):
        self.phase, self.step, self.mode, self.times = "start", None, "computing", 1
        self.idle = self.busy = 0.0
        self.on_enter: Callable[[], None] = lambda: None
        self._ticked: float | None = None

    def enter(self, phase: str, step: int | None = None, *, mode: Mode = "strict", times: int = 1) -> None:
        """Enter a phase, which is progress."""
        self.phase, self.step, self.mode, self.times = phase, step, mode, times
        self.progress()
        self.on_enter()

    def progress(self) -> None:
        """Note progress in the current phase."""
        self.idle = self.busy = 0.0

    def tick(self, *, computed: bool) -> None:
        """Count the time since the last call; `computed`: a processor was used in that time."""
        now = time.monotonic()
        passed = 0.0 if self._ticked is None else min(now - self._ticked, LONGEST_TICK)
        self._ticked = now
        self.busy += passed
        self.idle = 0.0 if computed and self.mode == "computing" else self.idle + passed

    def describe(self) -> str:
        """The phase as a part of a message: ``in a training step at step 7``."""
        return describe_phase(self.phase, self.step)


def describe_phase(phase: str, step: int | None) -> str:
    """A phase as a part of a message."""
    return f"in {phase}" + ("" if step is None else f" at step {step:,}")


activity = Activity()


@contextlib.contextmanager
def in_phase(phase: str, step: int | None = None, *, mode: Mode = "strict", times: int = 1) -> Iterator[None]:
    """Enter a phase for a block.

    After the block its name stays, because it describes a failure before the next phase best; the mode and the time
    limit before the block apply again.
    """
    before = activity.mode, activity.times
    activity.enter(phase, step, mode=mode, times=times)
    try:
        yield
    finally:
        activity.mode, activity.times = before
        activity.progress()
