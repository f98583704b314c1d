"""Profiler traces of a few training steps."""

import socket
import sys
from collections.abc import Callable
from pathlib import Path

import jax

from t5like.errors import one_line

PREFIX = "t5like: "  # of the names of the loop's own events
STEP = "step "  # begins a step; its number follows


def activity(name: str) -> jax.profiler.TraceAnnotation:
    """A context that appears in a trace under this name; it costs a microsecond when nothing is recorded."""
    return jax.profiler.TraceAnnotation(PREFIX + name)


class Profiler:
    """Records three steps from `first` on, for TensorBoard or Perfetto; records nothing if `first` is 0.

    Functions of Python are not recorded: it would slow down the host, and with it what is measured.
    """

    def __init__(self, directory: Path, first: int, summarize: Callable[[Path], None] | None = None):
        """Record into `directory`; `summarize` is called with the path of this process's trace."""
        self._directory, self._first, self._running, self._summarize = directory, first, False, summarize

    def before(self, step: int) -> None:
        """Call before each step. Metrics are read one step late, so after four steps the three are complete."""
        if self._first and step == self._first and not self._running:  # a run may go back while it records
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0
            jax.profiler.start_trace(str(self._directory), profiler_options=options)
            self._running = True
        elif step == self._first + 4:
            self.stop()
        with activity(f"{STEP}{step}"):
            pass

    def stop(self) -> None:
        """Stop recording, write the trace and summarize it; the run continues without what can't be written."""
        if not self._running:
            return
        self._running = False
        try:
            jax.profiler.stop_trace()
            if self._summarize:
                traces = self._directory.glob("plugins/profile/*/*.xplane.pb")  # other hosts may write there, too
                own = [path for path in traces if path.name == f"{socket.gethostname()}.xplane.pb"]
                self._summarize(max(own, key=lambda path: path.stat().st_mtime))
        except Exception as error:  # a full disk, or a trace that can't be read: a profile never ends a run
            reason = one_line(error) or type(error).__name__
            print(f"t5like: WARNING: the profile in {self._directory} is incomplete: {reason}", file=sys.stderr)
