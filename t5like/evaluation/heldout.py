"""Held-out loss: the training loss on held-out rows, and baselines computed from the same rows.

`Evaluator` is used during training and by `t5like evaluate`. Its values do not depend on the number of devices or
processes: each held-out row counts once, and rows that pad the last batch have weight 0.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from t5like.checkpoint.run_directory import Run
from t5like.config.schema import Config
from t5like.data import pipeline
from t5like.data.pipeline import Batches
from t5like.data.store import preparation
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.data.tokenizers.vocabulary import Vocabulary
from t5like.distributed import processes, shared_file_systems
from t5like.distributed.watchdog import watchdog
from t5like.errors import printable
from t5like.evaluation import label_eval
from t5like.io.paths import cache_directory
from t5like.metrics.progress import Progress
from t5like.metrics.writers import by_component, perplexity
from t5like.optim import eval_step
from t5like.sharding import placement
from t5like.types import Metrics, Sum, Tree, host_metrics


class Evaluator:
    """Evaluates parameters on the first `train.eval_batches` held-out batches (all, if there are fewer)."""

    def __init__(self, config: Config, mesh: Mesh, heldout: Batches, tokenizer: Tokenizer, *, every: bool = False):
        """`config` is resolved for `mesh`; `every` also names a single source and objective, see `component_names`."""
        self.config, self.mesh, self.heldout, self.tokenizer = config, mesh, heldout, tokenizer
        self.num_batches = min(config.train.eval_batches, heldout.num_batches)
        self._rows = placement.local_rows(mesh, config.data.batch_size)
        self._step = eval_step.jit_eval_step(config, mesh)
        self._zeros: Metrics | None = None  # initial sums; their structure depends on the parameters' shapes
        self._names = pipeline.component_names(config, every=every)

    def __call__(self, params: Tree, progress: Callable[[int], None] = lambda done: None) -> dict[str, float]:
        """Means over held-out rows; `progress` is called with the number of batches done.

        Returns:
            ``eval/loss`` (nats per target token), ``eval/perplexity``, ``eval/bits_per_byte`` (of the targets' text:
            sentinels and EOS have no bytes, but their nats count), ``eval/accuracy``, ``eval/tokens`` (number of
            target tokens); ``eval/nsp_loss`` and ``eval/nsp_accuracy`` of pairs; and values by component
            (`metrics.writers.by_component`).
        """
        size = self.config.data.batch_size
        mode = "computing" if self._zeros is None else "device"  # the first call compiles
        with jax.set_mesh(self.mesh), watchdog("evaluation", times=2 + self.num_batches // 16, mode=mode):
            if self._zeros is None:
                self._zeros = eval_step.zero_metrics(self.config, params, pipeline.spec(self.config))
            total = self._zeros
            for index in range(self.num_batches):
                rows = self.heldout.at(index, self._rows)
                before, total = total, self._step(params, placement.to_global(rows, self.mesh, size), total)
                jax.block_until_ready(before)  # at most two batches are queued on the device
                progress(index + 1)
            total = jax.device_get(total)
        values = host_metrics(total)
        metrics = {"eval/loss": values["loss"], "eval/tokens": float(total["loss"].weight)}
        if "accuracy" in values:  # not in regression
            metrics |= {"eval/perplexity": perplexity(values["loss"]), "eval/accuracy": values["accuracy"]}
        _, bytes_C = self._targets
        if size := bytes_C.sum():
            metrics["eval/bits_per_byte"] = float(total["loss"].total) / math.log(2) / float(size)
        metrics |= {f"eval/{name}": values[name] for name in ("nsp_loss", "nsp_accuracy") if name in values}
        if "by_component" not in total:  # a single component, which has all rows
            one = Sum(np.ones(1), np.ones(1))
            total |= {"by_component": Sum(*(np.reshape(x, 1) for x in total["loss"])), "rows_by_component": one}
        return metrics | by_component("eval", self._names, total, bytes_C)

    def baselines(self) -> dict[str, float]:
        """Nats per target token of predictors without any input, on the same rows.

        ``baseline/uniform`` is ln of the vocabulary size. ``baseline/unigram`` is the entropy of the held-out targets'
        own frequencies: no constant prediction has a lower loss on them, so a model with a lower loss uses context.
        Of labels, see `label_eval.baselines`.
        """
        if self.config.data.label_objective:
            parts = [self.heldout.at(index) for index in range(self.num_batches)]
            targets = [batch.targets_BL[batch.weights_BL > 0] for batch in parts]
            return label_eval.baselines(self.config, np.concatenate(targets))
        counts_V, _ = self._targets
        share = counts_V[counts_V > 0] / counts_V.sum()
        return {
            "baseline/uniform": math.log(self.config.tokenizer.vocab_size),
            "baseline/unigram": float(-(share * np.log(share)).sum()),
        }

    @cached_property
    def _targets(self) -> tuple[np.ndarray, np.ndarray]:
        """Counts of each id in the targets of the evaluated rows [V], and UTF-8 bytes of each component's targets [C].

        Computed on the primary process, which writes the metrics.
        """
        counts_V, bytes_C = np.zeros(self.config.vocab_rows), np.zeros(len(pipeline.components(self.config)))
        if not processes.is_primary() or self.config.data.label_objective:
            return counts_V, bytes_C
        bytes_V = np.pad(self.tokenizer.bytes_V, (0, len(counts_V) - self.tokenizer.vocab_size))
        for index in range(self.num_batches):
            batch = self.heldout.at(index)
            counts_V += np.bincount(batch.targets_BL.reshape(-1), batch.weights_BL.reshape(-1), len(counts_V))
            bytes_B = (bytes_V[batch.targets_BL] * batch.weights_BL).sum(1)
            component_B = np.zeros(len(bytes_B), int) if batch.component_B1 is None else batch.component_B1[:, 0]
            np.add.at(bytes_C, component_B, bytes_B)
        return counts_V, bytes_C


def evaluate_run(run: Run, tokenizer_path: Path) -> tuple[dict[str, float | str], list[dict[str, Any]]]:
    """Evaluate a run on all of its held-out text, with its own tokenizer.

    Progress is shown on standard error: a bar on a terminal, else a line every few seconds.

    Returns:
        values, baselines and the step; ``eval/left_out``, the number of held-out examples that are longer than a row,
        if there are any; where the config names `evaluate.metrics`, how each metric normalizes and segments texts
        (``eval/rule/METRIC``); and the records of `task_eval`.
    """
    config = dataclasses.replace(
        run.config,
        tokenizer=dataclasses.replace(run.config.tokenizer, path=str(tokenizer_path)),
        train=dataclasses.replace(run.config.train, eval_batches=2**31),
    )
    directory = cache_directory(config.data.cache_directory)
    work = partial(preparation.prepare, config)
    stores = shared_file_systems.once_per_file_system("preparing the data", directory, work).stores
    heldout = pipeline.open_split(config, stores, "heldout")
    batches = Batches(config, Vocabulary.of(run.tokenizer), heldout, heldout=True)
    evaluator = Evaluator(config, run.mesh, batches, run.tokenizer, every=True)
    show = partial(Progress, primary=processes.is_primary())
    with show(evaluator.num_batches, unit="batch") as progress:
        metrics = evaluator(run.params, progress.timed())
    values = {"step": run.step, **metrics, **(evaluator.baselines() if processes.is_primary() else {})}
    if left_out := sum(getattr(part, "too_long", 0) for part in heldout):
        values["eval/left_out"] = left_out
    if not config.evaluate.metrics:
        return values, []
    train = pipeline.open_split(config, stores, "train")
    tasks = label_eval.open_evaluator(config, run.mesh, run.tokenizer, train, heldout)
    with show(tasks.count, unit="answer") as progress:
        scores, records = tasks(run.params, progress.timed())
    return values | scores | tasks.describe() | tasks.baselines(), records


def table(values: Mapping[str, float | str]) -> str:
    """The values of `evaluate_run` as text: a line for all rows, and one for each source, objective and component."""
    measures = ("loss", "perplexity", "bits_per_byte", "tokens")
    rows = {("all", ""): [values.get(f"eval/{measure}") for measure in measures]}
    for key in values:
        parts = key.split("/", 3)
        if parts[:2] == ["eval", "loss"] and len(parts) == 4:
            kind, name = parts[2:]
            rows[kind, printable(name)] = [values.get(f"eval/{measure}/{kind}/{name}") for measure in measures]
    components = [row for row in rows if row[0] == "component"]
    if len(components) == 1:
        del rows[components[0]]
    width = [max(len(row[column]) for row in rows) for column in (0, 1)]
    titles = ("loss", "perplexity", "bits/byte", "tokens")
    lines = [" " * (sum(width) + 2) + "".join(f"{title:>12}" for title in titles)]
    for (kind, name), numbers in rows.items():
        formats = ["{:.4f}"] * 3 + ["{:,.0f}"]
        cells = ["" if number is None else form.format(number) for number, form in zip(numbers, formats, strict=True)]
        lines.append(f"{kind:{width[0]}}  {name:{width[1]}}" + "".join(f"{cell:>12}" for cell in cells))
    for prefix, form in (("baseline/", "{:.4f}"), ("eval/score/", "{:.2f} %")):
        for key, value in values.items():
            if key.startswith(prefix):
                rule = values.get(key.replace("eval/score/", "eval/rule/")) if prefix == "eval/score/" else None
                lines.append(f"{key}  {form.format(value)}" + (f"  ({rule})" if rule else ""))
    return f"held out, step {values['step']:,}\n" + "\n".join(lines)
