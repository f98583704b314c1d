"""The evidence of a bad step, in the run directory: what was trained on, and how large each layer's gradient was.

    bad_steps/<step>/step.json     step, reason, loss, gradient norms, checkpoint before it, first row
                     rows.npz      the batch: an array for each field of `types.Batch`
                     text.jsonl    a line for each row: its number, inputs and targets as text

The gradient is computed again, at the parameters after the step. Those are the parameters before it, because the update
of a bad step is skipped; exceptions are `train.on_spike=keep`, and an accelerator that has made the next update.
`inspect.replay` runs the step again. Called by `report` through `loop`.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from t5like.checkpoint.checkpoints import Checkpoints
from t5like.config.schema import Config
from t5like.distributed import processes
from t5like.distributed.watchdog import watchdog
from t5like.errors import CheckpointError, Diverged
from t5like.io.atomic import atomic_directory
from t5like.optim import step
from t5like.optim.layer_statistics import norms_by_layer
from t5like.train.task import Task
from t5like.types import Batch, TrainState

FOLDER = "bad_steps"  # in a run directory


class Evidence:
    """Keeps the evidence of a run's bad steps, at most `train.keep_bad_steps` of them, the first ones."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        mesh: jax.sharding.Mesh,
        task: Task,
        checkpoints: Checkpoints,
    ):
        self._config, self._directory, self._mesh = config, workdir / FOLDER, mesh
        self._task, self._checkpoints = task, checkpoints

    def keep(
        self,
        state: TrainState,
        done: int,
        reason: str,
        values: Mapping[str, float],
        examine: Callable[..., str] | None = None,
    ) -> None:
        """Write the directory of a bad step, which was update `done` of the run. All processes call it.

        `examine`: see `loop.train`.

        Raises:
            CheckpointError: it can't be written.
            Diverged: with `examine`, unless the step is a spike.
        """
        self._write(state, done, reason, values)
        if examine and not values.get("train/spikes"):
            raise Diverged(examine(self._config, state, self._task.rows_of(done - 1)[0], done))

    def _write(self, state: TrainState, done: int, reason: str, values: Mapping[str, float]) -> None:
        kept = [path.name for path in self._directory.iterdir()] if self._directory.is_dir() else []
        full = len(kept) >= self._config.train.keep_bad_steps and str(done) not in kept
        if processes.broadcast("keeping a bad step", "full" if full else "") or not self._config.train.keep_bad_steps:
            return
        batch, whole = self._task.rows_of(done - 1)
        with watchdog("keeping a bad step", done, times=3), jax.set_mesh(self._mesh):
            norms = jax.device_get(self._gradient_norms(state.params, batch, jnp.int32(done - 1), state.base))
            self._checkpoints.wait()  # a checkpoint in progress is one before this step
        if not processes.is_primary():
            return
        record = {
            "step": done,
            "reason": reason,
            "loss": finite_or_text(values["train/loss"]),
            "grad_norm": finite_or_text(values["train/grad_norm"]),
            "checkpoint": max((saved for saved in self._checkpoints.steps() if saved < done), default=None),
            "first_row": self._task.batches.schedule.first_row(done - 1),
            "batch_size": self._config.data.batch_size,
            "grad_norm_by_parameter": {name: finite_or_text(value) for name, value in norms.items()},
        }
        path = self._directory / str(done)
        shutil.rmtree(path, ignore_errors=True)  # of the same step, before a restart or a rewind
        with atomic_directory(path) as directory:
            np.savez(directory / "rows.npz", **{name: x for name, x in whole._asdict().items() if x is not None})
            (directory / "text.jsonl").write_text(
                "".join(
                    json.dumps(line, ensure_ascii=False) + "\n" for line in self._texts(whole, record["first_row"])
                ),
                encoding="utf-8",
            )
            (directory / "step.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def _texts(self, batch: Batch, first_row: int) -> list[dict[str, Any]]:
        inputs_BS = batch.decoder_BL if batch.encoder_BS is None else batch.encoder_BS
        decode = lambda ids, where: self._task.tokenizer.decode(ids[where].tolist(), keep_special=True)
        return [
            {
                "row": first_row + index,
                "inputs": decode(inputs, inputs != 0),
                "targets": decode(targets, weights != 0),
            }
            for index, (inputs, targets, weights) in enumerate(
                zip(inputs_BS, batch.targets_BL, batch.weights_BL, strict=True)
            )
        ]

    @cached_property
    def _gradient_norms(self):
        gradient = step.make_gradient(self._config, self._task.loss_fn)
        norms = lambda *arguments: norms_by_layer(gradient(*arguments)[0])
        return jax.jit(norms, out_shardings=NamedSharding(self._mesh, PartitionSpec()))


def finite_or_text(value: Any) -> Any:
    """A number, or a list of numbers, for JSON: one that is not finite becomes "nan", "inf" or "-inf"."""
    if np.ndim(value):
        return [finite_or_text(each) for each in value]
    return float(value) if math.isfinite(value) else str(float(value))


def read_record(workdir: Path, done: int) -> dict[str, Any] | None:
    """The ``step.json`` of a bad step; None if the run has kept none for it.

    Raises:
        CheckpointError: it can't be read.
    """
    path = workdir / FOLDER / str(done) / "step.json"
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {error}; remove {path.parent}") from None
