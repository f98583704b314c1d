"""The metrics of each step: read from the device, summed, written and printed. Used by `loop`."""

from collections.abc import Callable, Mapping

import jax

from t5like import tree
from t5like.config.schema import Config
from t5like.data import pipeline
from t5like.distributed.watchdog import watchdog
from t5like.errors import printable
from t5like.metrics import writers
from t5like.metrics.progress import Progress
from t5like.metrics.throughput import Throughput
from t5like.metrics.time_spent import TimeSpent
from t5like.sharding import mesh as meshes
from t5like.train import statistics
from t5like.train.rewind import BadSteps
from t5like.types import COMPONENT_METRICS, Metrics, TrainState, add_metrics, host_metrics

LAST = ("tokens", "grad_norm", "learning_rate", "skipped_updates", "spikes")  # metrics of the last step alone


def print_line(text: str) -> None:
    """Print a line and flush, so that a log file shows it at once; it may contain names from outside."""
    print(printable(text), flush=True)


class StepReporter:
    """Reads each step's metrics from the device and passes them to the metric files and the progress bar.

    Metrics of components (`pipeline.components`) and all of `t5like rl` are over the steps since the last log, because
    one step has few rows of each component, and few answers.
    """

    def __init__(
        self,
        config: Config,
        writer: writers.Writer,
        progress: Progress,
        throughput: Throughput,
        spent: TimeSpent,
        bad_steps: BadSteps,
        on_bad_step: Callable[[int, dict[str, float]], None],
        on_step: Callable[[int], None] | None = None,
    ):
        """Report to these.

        Args:
            on_bad_step: called with the number of completed steps and the metrics of a bad step.
            on_step: called with the number of completed steps at the end of each report.
        """
        self._config, self._train = config, config.train
        self._writer, self._progress, self._throughput = writer, progress, throughput
        self._spent = spent
        spent.add_undone(writer.undone_seconds)
        spent.begin_steps()
        self._bad_steps, self._on_bad_step, self._on_step = bad_steps, on_bad_step, on_step
        self._names = pipeline.component_names(config)
        self._sums: Metrics = {}  # since the last log

    def __call__(self, done: int, on_device: Metrics) -> None:
        """Report a completed step. Then `bad_steps` is up to date."""
        with self._spent.of("device"), watchdog("a training step", done):
            sums = jax.device_get(on_device)
        layers = statistics.take(sums)
        values = {f"train/{name}": value for name, value in host_metrics(sums).items()}
        self._throughput.tick(values.pop("train/tokens"))
        of_rl = self._config.rl.method != "none"
        new = {name: value for name, value in sums.items() if name in COMPONENT_METRICS or (of_rl and name not in LAST)}
        self._sums = add_metrics(self._sums, new) if self._sums else new
        if reason := self._bad_steps.observe(done, values):
            action = "update skipped" if values["train/skipped_updates"] else "update made"
            self._progress.note(f"step {done:,}: {reason}, {action} ({self._bad_steps.history.bad_steps} in a row)")
            with self._throughput.pause(), self._spent.of("pauses"):
                self._on_bad_step(done, values)
        if done % self._train.log_every == 0 or done == self._train.num_steps or reason:
            values |= {f"train/{name}": value for name, value in host_metrics(self._sums).items()}
            values |= self._throughput.read()
            values |= _of_updates(values, self._config.rl.updates_per_rollout)
            if "by_component" in self._sums:
                values |= writers.by_component("train", self._names, self._sums)
            self._sums = {}
            if done != self._train.num_steps:  # there, the loop writes them after the last checkpoint
                values |= self._spent.read()
            self._writer.write(done, values)
        if layers:
            self._writer.write(done, layers)
        self._progress.update(done, values, self._throughput.seconds_left(self._train.num_steps - done))
        if self._on_step:
            self._on_step(done)

    def go_back(self, step: int) -> None:
        """Continue after an earlier step; its later metrics are removed."""
        bad = self._bad_steps.last[0]
        self._progress.note(f"rewind     to step {step:,}; the batches up to step {bad:,} are passed over")
        self._sums = {}
        self._writer.go_back(step)
        self._spent.add_undone(self._writer.undone_seconds)
        self._progress.go_back(step)


def _of_updates(values: Mapping[str, float], updates_per_rollout: int) -> dict[str, float]:
    """Time and speed of the updates of `t5like rl`, without sampling and rewards; nothing for other runs."""
    if not {"train/rollout_seconds", "train/step_seconds"} <= values.keys():
        return {}
    sampling = (values["train/rollout_seconds"] + values["train/reward_seconds"]) / updates_per_rollout
    seconds = values["train/step_seconds"] - sampling
    if seconds <= 0:
        return {}
    tokens = values["train/tokens_per_second"] * values["train/step_seconds"]
    return {"train/update_seconds": seconds, "train/update_tokens_per_second": tokens / seconds}


def describe_devices(config: Config, abstract: TrainState, mesh: jax.sharding.Mesh) -> list[str]:
    """The model's size and the mesh, as lines to print."""
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    size = f"{tree.num_parameters((abstract.params, abstract.base)):,} parameters"
    if abstract.base is not None:
        size += f", {tree.num_parameters(abstract.params):,} of them trained (LoRA, rank {config.lora.rank})"
    counted = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return [
        f"model      {size}, {config.model.architecture}, {config.model.dtype}",
        f"devices    {mesh.size} x {mesh.devices.flat[0].device_kind}{counted}, {axes}",
        *(f"           {line}" for line in meshes.unsplit_lengths(config, mesh)),
    ]
