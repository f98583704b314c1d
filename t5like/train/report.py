"""The metrics of each step: read from the device, summed, written and printed. Used by `loop`."""

from collections.abc import Callable

import jax
import numpy as np

from t5like.config.schema import Config
from t5like.data import pipeline
from t5like.distributed.watchdog import watchdog
from t5like.errors import Diverged, printable
from t5like.metrics import writers
from t5like.metrics.progress import Progress
from t5like.metrics.throughput import Throughput
from t5like.types import COMPONENT_METRICS, Metrics, host_metrics


def print_line(text: str) -> None:
    """Print a line and flush, so that a log file shows it at once; it may contain names from outside."""
    print(printable(text), flush=True)


class StepReporter:
    """Reads each step's metrics from the device and passes them to the metric files and the progress bar.

    Metrics of components (`pipeline.components`) are means over the steps since the last log, because one step may
    have few rows of each.
    """

    def __init__(
        self,
        config: Config,
        writer: writers.Writer,
        progress: Progress,
        throughput: Throughput,
        on_step: Callable[[int], None] | None = None,
    ):
        """`on_step`: called with the number of completed steps at the end of each report."""
        self._train, self._writer, self._progress, self._throughput = config.train, writer, progress, throughput
        self._on_step = on_step
        self._names = pipeline.component_names(config)
        self._skipped_updates = 0
        self._components = None  # sums since the last log

    def __call__(self, done: int, on_device: Metrics) -> None:
        """Report a completed step.

        Raises:
            Diverged: too many updates in a row had a gradient that is not finite.
        """
        with watchdog("a training step", done):
            sums = jax.device_get(on_device)
        values = {f"train/{name}": value for name, value in host_metrics(sums).items()}
        self._skipped_updates = self._skipped_updates + 1 if values["train/skipped_updates"] else 0
        self._throughput.tick(values.pop("train/tokens"))
        if "by_component" in sums:
            new = {name: sums[name] for name in COMPONENT_METRICS}
            self._components = jax.tree.map(np.add, self._components, new) if self._components else new
        if self._skipped_updates:
            self._progress.note(
                f"step {done:,}: the gradient is not finite, update skipped ({self._skipped_updates} in a row)"
            )
        if done % self._train.log_every == 0 or done == self._train.num_steps or self._skipped_updates:
            values |= self._throughput.read()
            if self._components:
                values |= writers.by_component("train", self._names, self._components)
                self._components = None
            self._writer.write(done, values)
        self._progress.update(done, values, self._throughput.seconds_left(self._train.num_steps - done))
        if self._on_step:
            self._on_step(done)
        if self._skipped_updates >= self._train.max_skipped_updates:
            raise Diverged(
                f"the gradient was not finite at {self._skipped_updates} steps in a row up to step {done}; "
                "lower optimizer.learning_rate or raise optimizer.warmup_steps"
            )
