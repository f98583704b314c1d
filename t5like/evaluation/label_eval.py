"""Evaluation of models that predict labels: predictions for held-out examples, their scores, and samples.

`open_evaluator` gives this evaluator or that of generated texts (`task_eval`), by the objective; both have the same
methods.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from t5like.config.schema import Config
from t5like.data.objectives.masking import CLS
from t5like.data.supervised.labelled import LabelledExamples
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.distributed.watchdog import watchdog
from t5like.errors import ConfigError
from t5like.evaluation import label_metrics
from t5like.evaluation.task_eval import MAX_TRAIN_TARGETS, TaskEvaluator
from t5like.inference.encoder_rows import EncoderRow, label_outputs
from t5like.inference.target_scores import SCORING_ROWS
from t5like.types import Batch, Tree

RULES = {
    "accuracy": "share of right labels",
    "macro_f1": "mean over the labels of their F1",
    "matthews": "correlation of predicted and right labels",
    "pearson": "linear correlation",
    "spearman": "correlation of the ranks",
    "entity_f1": "F1 of entities of all types together (CoNLL 2003)",
}


class LabelEvaluator:
    """Predicts the labels of held-out examples, and scores the predictions; see `TaskEvaluator`.

    `baselines` scores the most frequent label of the training examples, for each text or word.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        tokenizer: Tokenizer,
        train: Sequence[LabelledExamples],
        heldout: Sequence[LabelledExamples],
    ):
        """`config` is resolved for `mesh`; `train` and `heldout` are the results of `pipeline.open_split`."""
        self.config, self.mesh, self.tokenizer, self._train = config, mesh, tokenizer, train
        read = partial(_examples, config, tokenizer)
        per_source = -(-config.evaluate.max_examples // len(heldout))
        self._examples = [example for source in heldout for example in read(source, per_source)]
        self._right = [label for _, label in self._examples]

    @property
    def count(self) -> int:
        """Number of rows that one call processes."""
        return len(self._examples)

    def __call__(
        self, params: Tree, progress: Callable[[int], None] = lambda done: None
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """``eval/score/METRIC`` in percent, and a record of each example: inputs, target, prediction."""
        with (
            jax.set_mesh(self.mesh),
            watchdog("task evaluation", times=2 + self.count // SCORING_ROWS, mode="computing"),
        ):
            outputs = label_outputs(self.config, params, [row for row, _ in self._examples], progress)
        predicted = [
            predictions(self.config, output, row) for output, (row, _) in zip(outputs, self._examples, strict=True)
        ]
        records = [
            {
                "inputs": row_text(self.tokenizer, row),
                "target": label_text(self.config, right),
                "prediction": label_text(self.config, found),
            }
            for (row, right), found in zip(self._examples, predicted, strict=True)
        ]
        return self._scores("eval/score", predicted), records

    def describe(self) -> dict[str, str]:
        """``eval/rule/METRIC``: what each metric is."""
        return {f"eval/rule/{name}": RULES[name] for name in self.config.evaluate.metrics}

    def baselines(self) -> dict[str, float]:
        """``baseline/majority/METRIC`` in percent; none of a regression, whose mean has no correlation."""
        if self.config.data.label_objective == "regression":
            return {}
        counts: Counter[int] = Counter()
        for source in self._train:
            for _, label in _examples(self.config, self.tokenizer, source, MAX_TRAIN_TARGETS):
                counts.update(label.tolist())
        most_frequent = min(counts, key=lambda label: (-counts[label], label))
        return self._scores("baseline/majority", [np.full_like(right, most_frequent) for right in self._right])

    def _scores(self, prefix: str, predicted: Sequence[np.ndarray]) -> dict[str, float]:
        names, labels = self.config.evaluate.metrics, self.config.data.labels
        scores = label_metrics.score(names, predicted, self._right, labels)
        return {f"{prefix}/{name}": value for name, value in scores.items()}


def open_evaluator(config: Config, *arguments: Any) -> TaskEvaluator | LabelEvaluator:
    """The evaluator of predictions for a config's objective; other arguments as in `LabelEvaluator.__init__`."""
    return (LabelEvaluator if config.data.label_objective else TaskEvaluator)(config, *arguments)


def predictions(config: Config, output: np.ndarray, row: EncoderRow) -> np.ndarray:
    """The number of a regression [1], the index of the best label [1], or of that of each word [W].

    A word without tokens has the label with index 0.
    """
    if config.data.label_objective == "regression":
        return output
    if config.data.label_objective == "classification":
        return output.argmax(-1)[None]
    places_W = np.array(row.words, np.int64)
    return np.where(places_W < 0, 0, output[places_W].argmax(-1)) if len(places_W) else np.zeros(0, np.int64)


def prediction(config: Config, output: np.ndarray, row: EncoderRow) -> dict[str, Any]:
    """What a model predicts for a row, by name: a value; a label and the probability of each; a label for each word."""
    found = predictions(config, output, row)
    if config.data.label_objective == "regression":
        return {"value": float(found[0])}
    names = [config.data.labels[index] for index in found]
    if config.data.label_objective == "token_classification":
        return {"labels": names}
    odds_C = np.exp(output.astype(np.float64) - output.max())
    return {
        "label": names[0],
        "probabilities": dict(zip(config.data.labels, (odds_C / odds_C.sum()).tolist(), strict=True)),
    }


def check_labels(config: Config) -> None:
    """Raise ConfigError if a model does not predict labels."""
    if config.data.label_objective is None:
        raise ConfigError(
            f"data.objective={','.join(config.data.objective)}: this model predicts no labels; use t5like generate, or "
            "a run of data.objective=classification, regression or token_classification"
        )


def label_text(config: Config, label: np.ndarray) -> str:
    """Indices of labels as their names, with spaces between them; a number with 6 digits."""
    if config.data.label_objective == "regression":
        return f"{label[0]:.6g}"
    return " ".join(config.data.labels[index] for index in label)


def row_text(tokenizer: Tokenizer, row: EncoderRow) -> str:
    """The text of a row without [CLS]; the texts of a pair with a tab between them."""
    return "\t".join(tokenizer.decode(part) for part in (row.ids[1 : row.second], row.ids[row.second :]) if part)


def _examples(
    config: Config, tokenizer: Tokenizer, examples: LabelledExamples, count: int
) -> list[tuple[EncoderRow, np.ndarray]]:
    """The first `count` examples of a source, each with its label: one number, or one for each word with a token."""
    found, cls = [], int(tokenizer.sentinel_ids[CLS])
    window = lambda first, length: examples.stream.windows(np.array([first]), length)[0]
    for unit in range(min(len(examples), count)):
        first, length = int(examples.begin_N[unit]), int(examples.lengths_NC[unit, 0]) - 1
        ids = [cls, *window(first, length).tolist()]
        label, words = examples.label_N[unit : unit + 1], np.zeros(0, np.int64)
        if config.data.label_objective == "token_classification":
            number_T = window(int(examples.cut_N[unit]), length - 1)
            label, words = number_T[number_T > 0] - 1, 1 + np.flatnonzero(number_T)
        second = ids.index(tokenizer.eos_id) + 1
        found.append((EncoderRow(ids, second, words.tolist()), label))
    return found


# ---- Samples ----


def show_labelled(config: Config, tokenizer: Tokenizer, title: str, batch: Batch, params: Tree) -> str:
    """The first text of a row, with its right label and the predicted one."""
    real_S = batch.encoder_segments_BS[0] == 1
    targets_N = batch.targets_BL[0][real_S & (batch.weights_BL[0] > 0)]
    ids = batch.encoder_BS[0][real_S].tolist()
    words = np.flatnonzero(batch.weights_BL[0][real_S] > 0).tolist()
    row = EncoderRow(ids, ids.index(tokenizer.eos_id) + 1, words)
    [output] = label_outputs(config, params, [row])
    truth, found = (label_text(config, each) for each in (targets_N, predictions(config, output, row)))
    return f"---- {title} ----\n{row_text(tokenizer, row)}\n  truth  {truth}\n  model  {found}\n"


def baselines(config: Config, targets_N: np.ndarray) -> Mapping[str, float]:
    """Held-out losses of predictors without any input; see `heldout.Evaluator.baselines`.

    ``baseline/mean`` is the squared error of predicting the mean of the targets, their variance.
    """
    if config.data.label_objective == "regression":
        return {"baseline/mean": float(np.var(targets_N, dtype=np.float64))}
    counts_C = np.bincount(targets_N.astype(np.int64), minlength=config.data.num_outputs)
    share = counts_C[counts_C > 0] / counts_C.sum()
    return {"baseline/uniform": float(np.log(len(counts_C))), "baseline/unigram": float(-(share * np.log(share)).sum())}
