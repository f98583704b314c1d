"""Profiler traces of a few training steps."""

from pathlib import Path

import jax


class Profiler:
    """Records three steps of the run, from `first` on, for TensorBoard or Perfetto; never, if `first` is 0."""

    def __init__(self, directory: Path, first: int):
        self._directory, self._first, self._running = directory, first, False

    def before(self, step: int) -> None:
        """Call before each step. The metrics are read a step late, so four steps on the three are surely done."""
        if self._first and step == self._first:
            jax.profiler.start_trace(str(self._directory))
            self._running = True
        elif step == self._first + 4:
            self.stop()

    def stop(self) -> None:
        """Write what was recorded."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
