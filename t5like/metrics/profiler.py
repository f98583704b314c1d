"""Profiler traces of a few training steps."""

from pathlib import Path

import jax


class Profiler:
    """Records three steps from `first` on, for TensorBoard or Perfetto; records nothing if `first` is 0."""

    def __init__(self, directory: Path, first: int):
        self._directory, self._first, self._running = directory, first, False

    def before(self, step: int) -> None:
        """Call before each step. Metrics are read one step late, so after four steps the three are complete."""
        if self._first and step == self._first:
            jax.profiler.start_trace(str(self._directory))
            self._running = True
        elif step == self._first + 4:
            self.stop()

    def stop(self) -> None:
        """Stop recording and write the trace."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
