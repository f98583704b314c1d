"""Tokens per second, step time and MFU, measured between logs."""

import contextlib
import time
from collections.abc import Callable, Iterator


class Throughput:
    """Times completed steps: tokens per second, seconds per step, MFU and the time left.

    The first step compiles and is not counted. Call `tick` when the values of a step have arrived on the host; read all
    steps in flight before a `pause`.
    """

    def __init__(
        self,
        flops_per_step: float,
        peak: float | None,
        *,
        measured: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`flops_per_step` and `peak` are of the whole run, not of this process; clock: returns seconds.

        `measured`: `peak` was measured, maybe beside other load, so steps that are faster raise it.
        """
        self._flops_per_step, self._peak, self._clock = flops_per_step, peak, clock
        self._measured = measured
        self._first: float | None = None  # time of the first completed step
        self._steps = 0  # since the first
        self._interval_steps = 0  # since the last `read`, as are the next three
        self._begin = self._tokens = self._paused = 0.0

    def tick(self, tokens: float) -> None:
        """Count one completed step; tokens: of all processes, without padding."""
        if self._first is None:
            self._first = self._begin = self._clock()
            return
        self._steps += 1
        self._interval_steps += 1
        self._tokens += tokens

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the block (evaluation, checkpoints) from the speed, but not from the time left."""
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
            rate = self._flops_per_step / seconds
            self._peak = max(self._peak, rate) if self._measured else self._peak
            values["train/mfu"] = rate / self._peak
        self._interval_steps, self._begin, self._tokens, self._paused = 0, now, 0.0, 0.0
        return values

    def seconds_left(self, steps_left: int) -> float | None:
        """Remaining seconds of the run, with pauses at their share so far; None before a step has been timed."""
        return (self._clock() - self._first) / self._steps * steps_left if self._steps else None
