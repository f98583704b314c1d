"""Pretraining and fine-tuning with a teacher (`distill.teacher`) as a `task.Task`."""

from collections.abc import Callable
from pathlib import Path

import jax

from t5like.checkpoint import teacher as teachers
from t5like.config.schema import Config
from t5like.optim import distillation, train_state
from t5like.sharding import memory
from t5like.train.pretraining import Pretraining
from t5like.train.task import Task
from t5like.tree import num_parameters
from t5like.types import Batch, Metrics, Taught, TrainState


def open_task(config: Config, mesh: jax.sharding.Mesh, workdir: Path, show: Callable[[str], None]) -> Task:
    """The task of `t5like train`; arguments and errors as in `Pretraining`."""
    return (Distillation if config.distill.teacher else Pretraining)(config, mesh, workdir, show)


class Distillation(Pretraining):
    """Pretraining whose batches have the teacher's parameters; evaluation is that of the data's loss."""

    model_batch = staticmethod(distillation.rows_of)

    def __init__(self, config: Config, mesh: jax.sharding.Mesh, workdir: Path, show: Callable[[str], None]):
        """Open the data and read the teacher.

        Raises:
            ConfigError, DataError, CheckpointError: also if the teacher can't be used.
        """
        teacher = teachers.open_teacher(config, mesh)
        super().__init__(config, mesh, workdir, show)
        teachers.check_tokenizer(config, teacher, self.tokenizer)
        abstract = train_state.abstract_state(config, self.spec, mesh)
        memory.check_training(config, self.spec, abstract, mesh, teacher=teacher.abstract)
        self.loss_fn = distillation.distilled_loss(teacher.config)
        self.spec = Taught(self.spec, teacher.abstract)
        self.data = {**self.data, teachers.FIELD: teacher.identity}
        self._teacher = teachers.read_params(config, teacher)
        count = num_parameters(teacher.abstract)
        self.lines.append(f"teacher    {count:,} parameters, {teacher.identity}, {config.distill.teacher}")

    def device_batch(self, state: TrainState, index: int, batch: Batch) -> tuple[Taught, Metrics]:
        rows, metrics = super().device_batch(state, index, batch)
        return Taught(rows, self._teacher), metrics

    def rows_of(self, index: int) -> tuple[Taught, Batch]:
        arrays, rows = super().rows_of(index)
        return Taught(arrays, self._teacher), rows
