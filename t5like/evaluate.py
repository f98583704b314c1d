"""Held-out loss: the same loss as in training, over held-out rows, next to baselines computed from the same rows.

`Evaluator` is used during training and by `t5like evaluate`; its numbers do not depend on devices or processes: each
held-out row counts once, and rows that only fill the last batch weigh nothing.
"""

import dataclasses
import math
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from t5like import distributed
from t5like import mesh as meshes
from t5like import step as steps
from t5like.answers import Answers
from t5like.config import Config
from t5like.data import corpus, pipeline
from t5like.data.pipeline import Batches
from t5like.data.text import Vocabulary
from t5like.data.tokenizer import Tokenizer
from t5like.metrics import by_component
from t5like.run import Run
from t5like.types import Tree, host_metrics


class Evaluator:
    """Evaluates parameters on the first `train.eval_batches` held-out batches (all, if there are fewer)."""

    def __init__(self, config: Config, mesh: Mesh, heldout: Batches, tokenizer: Tokenizer):
        """`config` is settled on `mesh`."""
        self.config, self.mesh, self.heldout, self.tokenizer = config, mesh, heldout, tokenizer
        self.num_batches = min(config.train.eval_batches, heldout.num_batches)
        self._rows = meshes.local_rows(mesh, config.data.batch_size)
        self._step = steps.jit_eval_step(config, mesh)
        self._names = pipeline.component_names(config)

    def __call__(self, params: Tree) -> dict[str, float]:
        """Means on held-out rows.

        Returns:
            ``eval/loss`` (nats per target token), ``eval/perplexity``, ``eval/bits_per_byte`` (of the targets' text:
            sentinels and EOS have no bytes, but their nats count), ``eval/accuracy``, ``eval/tokens`` that they rest
            on; ``eval/nsp_loss`` and ``eval/nsp_accuracy`` of pairs; and values by component (`metrics.by_component`).
        """
        size = self.config.data.batch_size
        total = steps.zero_metrics(self.config, pipeline.spec(self.config))
        with jax.set_mesh(self.mesh), distributed.limit("evaluation", times=2 + self.num_batches // 16):
            for index in range(self.num_batches):
                rows = self.heldout.at(index, self._rows)
                total = self._step(params, meshes.to_global(rows, self.mesh, size), total)
            total = jax.device_get(total)
        values = host_metrics(total)
        found = {
            "eval/loss": values["loss"],
            "eval/perplexity": math.exp(min(values["loss"], 700.0)),
            "eval/accuracy": values["accuracy"],
            "eval/tokens": float(total["loss"].weight),
        }
        if self._bytes:
            found["eval/bits_per_byte"] = float(total["loss"].total) / math.log(2) / self._bytes
        found |= {f"eval/{name}": values[name] for name in ("nsp_loss", "nsp_accuracy") if name in values}
        if "by_component" in total:
            found |= by_component("eval", self._names, total)
        return found

    def baselines(self) -> dict[str, float]:
        """Nats per target token of predictors that read nothing, on the same rows.

        ``baseline/uniform`` is ln of the vocabulary. ``baseline/unigram`` is the entropy of the held-out targets' own
        frequencies: no constant prediction can do better on them, so whoever beats it has read the context.
        """
        share = self._counts_V[self._counts_V > 0] / self._counts_V.sum()
        return {
            "baseline/uniform": math.log(self.config.tokenizer.vocab_size),
            "baseline/unigram": float(-(share * np.log(share)).sum()),
        }

    @cached_property
    def _counts_V(self) -> np.ndarray:
        """How often each id is a target of the evaluated rows; counted by the process that writes it down."""
        counts_V = np.zeros(self.config.vocab_rows)
        if not distributed.primary():
            return counts_V
        for index in range(self.num_batches):
            batch = self.heldout.at(index)
            counts_V += np.bincount(batch.targets_BL.reshape(-1), batch.weights_BL.reshape(-1), self.config.vocab_rows)
        return counts_V

    @cached_property
    def _bytes(self) -> float:
        """UTF-8 bytes of all evaluated targets."""
        return float(self._counts_V[: self.tokenizer.vocab_size] @ self.tokenizer.bytes_V)


def evaluate_run(run: Run, tokenizer_path: Path) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Evaluate a run on all of its held-out text, with its own tokenizer.

    Returns:
        values, baselines and the step; ``eval/left_out``, the number of held-out examples that no row can hold, if
        there are any; and the records of `Answers`, where the config names `evaluate.metrics`.
    """
    config = dataclasses.replace(
        run.config,
        tokenizer=dataclasses.replace(run.config.tokenizer, path=str(tokenizer_path)),
        train=dataclasses.replace(run.config.train, eval_batches=2**31),
    )
    directory = Path(config.data.directory).expanduser()
    work = partial(corpus.prepare, config)
    stores = distributed.once_per_file_system("preparing the data", directory, work).stores
    heldout = pipeline.open_split(config, stores, "heldout")
    batches = Batches(config, Vocabulary.of(run.tokenizer), heldout, heldout=True)
    evaluator = Evaluator(config, run.mesh, batches, run.tokenizer)
    values = {"step": run.step, **evaluator(run.params)}
    values |= evaluator.baselines() if distributed.primary() else {}
    if left_out := sum(getattr(part, "too_long", 0) for part in heldout):
        values["eval/left_out"] = left_out
    if not config.evaluate.metrics:
        return values, []
    answers = Answers(config, run.mesh, run.tokenizer, pipeline.open_split(config, stores, "train"), heldout)
    found, records = answers(run.params)
    return values | found | answers.baselines(), records
