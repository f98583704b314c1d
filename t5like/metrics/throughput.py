"""Tokens per second, step time and MFU, measured between logs."""

import contextlib
import time
from collections.abc import Callable, Iterator


class Throughput:
    """Times completed steps: tokens per second, seconds per step, MFU and the time left.

    The first step compiles and is not counted. `tick` comes when a step's values have arrived on the host, so read what
    is in flight before a `pause`.
    """

    def __init__(self, flops_per_step: float, peak: float | None, *, clock: Callable[[], float] = time.monotonic):
        """Start with `model_flops` and `peak_flops` of the whole run, not of this process; clock: in seconds."""
        self._flops_per_step, self._peak, self._clock = flops_per_step, peak, clock
        self._first: float | None = None  # when the first step was done
        self._steps = 0  # since then
        self._interval_steps = 0  # since the last `read`, as are the next three
        self._begin = self._tokens = self._paused = 0.0

    def tick(self, tokens: float) -> None:
        """Count one completed step with so many tokens, padding not among them, over all processes."""
        if self._first is None:
            self._first = self._begin = self._clock()
            return
        self._steps += 1
        self._interval_steps += 1
        self._tokens += tokens

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Keep what happens inside (evaluation, checkpoints) out of the speed; it does count for the time left."""
        start = self._clock()
        try:
            yield
        finally:
            if self._first is not None:
                self._paused += self._clock() - start

    def read(self) -> dict[str, float]:
        """The values since the last call, by metric name; none before a step has been timed."""
        if not self._interval_steps:
            return {}
        now = self._clock()
        seconds = max(now - self._begin - self._paused, 1e-9) / self._interval_steps
        tokens = self._tokens / self._interval_steps
        values = {"train/tokens_per_second": tokens / seconds, "train/step_seconds": seconds}
        if self._peak is not None:
            values["train/mfu"] = self._flops_per_step / seconds / self._peak
        self._interval_steps, self._begin, self._tokens, self._paused = 0, now, 0.0, 0.0
        return values

    def seconds_left(self, steps_left: int) -> float | None:
        """How long the run will take, pauses included at their share so far; None before a step has been timed."""
        return (self._clock() - self._first) / self._steps * steps_left if self._steps else None
