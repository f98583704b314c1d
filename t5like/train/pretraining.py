"""Pretraining and supervised fine-tuning as a `task.Task`: rows of token stores, held-out loss, scores, samples."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from t5like.config.schema import Config
from t5like.data import pipeline
from t5like.data.pipeline import Batches
from t5like.data.sources.names import source_names
from t5like.data.store import fingerprints, preparation, statistics
from t5like.data.store.verification import Verification
from t5like.data.tokenizers.vocabulary import Vocabulary
from t5like.distributed import processes
from t5like.distributed.shared_file_systems import once_per_file_system
from t5like.evaluation.heldout import Evaluator
from t5like.evaluation.label_eval import open_evaluator
from t5like.evaluation.task_eval import write_predictions
from t5like.io.paths import cache_directory
from t5like.metrics.loss_curve import PICTURE
from t5like.optim import step
from t5like.sharding import placement
from t5like.train import completion
from t5like.types import Batch, Metrics, TrainState, Tree


class Pretraining:
    """See `task.Task` for all attributes and methods."""

    loss_fn = staticmethod(step.pretrain_loss)
    model_batch = staticmethod(step.unchanged)
    updates_per_batch = 1
    summary_files = (PICTURE, completion.SAMPLES)

    def __init__(self, config: Config, mesh: jax.sharding.Mesh, workdir: Path, show: Callable[[str], None]):
        """Prepare and open the data; `config` is resolved for `mesh`, `show` prints a line.

        Raises:
            ConfigError, DataError, CheckpointError: the data, or what the config asks of them, can't be used.
        """
        self._config, self._mesh, self._workdir = config, mesh, workdir
        self.directory = cache_directory(config.data.cache_directory)
        prepare = partial(preparation.prepare, config)
        prepared = once_per_file_system("preparing the data", self.directory, prepare)
        for note in prepared.notes:
            show(note)
        self.verification = Verification(prepared.stores)  # created before anything of the stores is read
        self.tokenizer, self.stores = prepared.tokenizer, prepared.stores
        self.data, self.spec = fingerprints.describe(config.data.source, self.stores), pipeline.spec(config)
        splits = {split: pipeline.open_split(config, self.stores, split) for split in ("train", "heldout")}
        vocabulary = Vocabulary.of(self.tokenizer)
        self.batches = Batches(config, vocabulary, splits["train"])
        self._heldout = Batches(config, vocabulary, splits["heldout"], heldout=True)
        self._evaluator = Evaluator(config, mesh, self._heldout, self.tokenizer)
        evaluated = (config, mesh, self.tokenizer, splits["train"], splits["heldout"])
        self._tasks = open_evaluator(*evaluated) if config.evaluate.metrics else None
        self.lines = [
            *(f"data       {line}" for line in self._statistics()),
            *(f"           {line}" for line in self.batches.describe()),
            *(f"           {part.note}" for parts in splits.values() for part in parts if getattr(part, "note", "")),
            *(f"metric     {name.removeprefix('eval/rule/')}: {rule}" for name, rule in self._rules().items()),
        ]

    def _statistics(self) -> Sequence[str]:
        data = self._config.data
        return statistics.lines(source_names(data), self.stores, data.source)

    def _rules(self) -> Mapping[str, str]:
        return self._tasks.describe() if self._tasks else {}

    def start(self, state: TrainState) -> None:
        """Nothing: the first state is all that the task needs."""

    def device_batch(self, state: TrainState, index: int, batch: Batch) -> tuple[Batch, Metrics]:
        return placement.to_global(batch, self._mesh, self._config.data.batch_size), {}

    def rows_of(self, index: int) -> tuple[Batch, Batch]:
        size = self._config.data.batch_size
        rows = self.batches.at(index, placement.local_rows(self._mesh, size))
        return placement.to_global(rows, self._mesh, size), self.batches.at(index)

    def baselines(self) -> tuple[dict[str, float], str]:
        values = self._evaluator.baselines()
        losses = ", ".join(f"{name.removeprefix('baseline/')} {value:.3f}" for name, value in values.items())
        unit = "squared error" if "baseline/mean" in values else "nats"
        return values | (self._tasks.baselines() if self._tasks else {}), f"baselines: {losses} {unit}"

    def evaluate(self, params: Tree, done: int, point: Callable[[], None], *, early: bool) -> tuple[dict, str]:
        values = self._evaluator(params, lambda batches: point())
        text = f"held-out loss {values['eval/loss']:.3f}"
        if "eval/accuracy" in values:  # not in regression
            targets = "labels" if self._config.data.label_objective else "tokens"
            text += f", {100 * values['eval/accuracy']:.1f} % of {targets} right"
        if self._tasks and not early:
            scores, records = self._tasks(params, lambda rows: point())
            values |= scores
            text += "".join(f", {name.removeprefix('eval/score/')} {value:.1f} %" for name, value in scores.items())
            if processes.is_primary():
                write_predictions(self._workdir, done, records)
        if self._config.evaluate.samples and not early:
            path = self._workdir / completion.SAMPLES_OF_STEPS / f"{done}.txt"
            completion.write_samples(self._config, self._mesh, self.tokenizer, self._heldout, params, path)
        return values, text

    def summarize(self, params: Tree, fingerprints: Mapping[str, Any]) -> list[str]:
        return completion.write_summary(
            self._config, self._mesh, self.tokenizer, self._heldout, self._workdir, fingerprints, params
        )
