"""Held-out loss: the same loss as in training, over held-out rows, next to baselines computed from the same rows.

`Evaluator` is used during training and by `t5like evaluate`; its numbers do not depend on devices or processes: each
held-out row counts once, and rows that only fill the last batch weigh nothing.
"""

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from t5like import mesh as meshes
from t5like import step as steps
from t5like.config import Config
from t5like.data import corpus
from t5like.data.text import Vocabulary
from t5like.data.pipeline import Batches
from t5like.run import Run
from t5like.types import Sum, Tree, host_metrics


class Evaluator:
    """Evaluates parameters on the first `train.eval_batches` held-out batches (all, if there are fewer)."""

    def __init__(self, config: Config, mesh: Mesh, heldout: Batches):
        """`config` is settled on `mesh`."""
        self.config, self.mesh, self.heldout = config, mesh, heldout
        self.num_batches = min(config.train.eval_batches, heldout.num_batches)
        self._rows = meshes.local_rows(mesh, config.data.batch_size)
        self._step = steps.jit_eval_step(config, mesh)

    def __call__(self, params: Tree) -> dict[str, float]:
        """Mean values per target token: ``eval/loss`` in nats, ``eval/accuracy``, and how many tokens they rest on."""
        size = self.config.data.batch_size
        total = {name: Sum(np.float32(0), np.float32(0)) for name in ("loss", "z_loss", "accuracy")}
        with jax.set_mesh(self.mesh):
            for index in range(self.num_batches):
                rows = self.heldout.at(index, self._rows)
                total = self._step(params, meshes.to_global(rows, self.mesh, size), total)
        values = host_metrics(total)
        return {
            "eval/loss": values["loss"],
            "eval/accuracy": values["accuracy"],
            "eval/tokens": float(total["loss"].weight),
        }

    def baselines(self) -> dict[str, float]:
        """Nats per target token of predictors that read nothing, on the same rows.

        ``baseline/uniform`` is ln of the vocabulary. ``baseline/unigram`` is the entropy of the held-out targets' own
        frequencies: no constant prediction can do better on them, so whoever beats it has read the context.
        """
        counts_V = np.zeros(self.config.vocab_rows)
        for index in range(self.num_batches):
            batch = self.heldout.at(index)
            counts_V += np.bincount(batch.targets_BL.reshape(-1), batch.weights_BL.reshape(-1), self.config.vocab_rows)
        share = counts_V[counts_V > 0] / counts_V.sum()
        return {
            "baseline/uniform": math.log(self.config.tokenizer.vocab_size),
            "baseline/unigram": float(-(share * np.log(share)).sum()),
        }


def evaluate_run(run: Run, tokenizer_path: Path) -> dict[str, float]:
    """Evaluate a run on all of its held-out text, with the run's own tokenizer: values, baselines and the step."""
    config = dataclasses.replace(
        run.config,
        tokenizer=dataclasses.replace(run.config.tokenizer, path=str(tokenizer_path)),
        train=dataclasses.replace(run.config.train, eval_batches=2**31),
    )
    stores = corpus.prepare(config).stores
    vocabulary = Vocabulary.of(run.tokenizer)
    evaluator = Evaluator(
        config, run.mesh, Batches(config, vocabulary, [s.split("heldout") for s in stores], heldout=True)
    )
    return {"step": run.step, **evaluator(run.params), **evaluator.baselines()}
