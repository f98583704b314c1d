"""Profiler traces of a few training steps."""

import sys
from pathlib import Path

import jax

from t5like.errors import one_line


class Profiler:
    """Records three steps from `first` on, for TensorBoard or Perfetto; records nothing if `first` is 0."""

    def __init__(self, directory: Path, first: int):
        self._directory, self._first, self._running = directory, first, False

    def before(self, step: int) -> None:
        """Call before each step. Metrics are read one step late, so after four steps the three are complete."""
        if self._first and step == self._first and not self._running:  # a run may go back while it records
            jax.profiler.start_trace(str(self._directory))
            self._running = True
        elif step == self._first + 4:
            self.stop()

    def stop(self) -> None:
        """Stop recording and write the trace; the run continues without it if it can't be written."""
        if not self._running:
            return
        self._running = False
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:  # JAX raises the second one for a full disk
            reason = one_line(error) or type(error).__name__
            print(f"t5like: WARNING: the profile in {self._directory} can't be written: {reason}", file=sys.stderr)
