"""Task evaluation: predictions for held-out supervised examples, generated or chosen by likelihood, and their scores.

Used by `train` at each evaluation and by `t5like evaluate`, where the config names `evaluate.metrics`. An example has
the prompt that it has in training; a conversation is one example for each of the assistant's turns. `text_metrics`
scores the predictions. Choosing among given answers by their total log-likelihood is the rank classification of T0
(Sanh et al. 2022, section 6.1) and of GPT-3 (Brown et al. 2020, section 2.4).
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from t5like.config.schema import Config
from t5like.data.supervised.examples import Examples
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.distributed.watchdog import watchdog
from t5like.errors import ConfigError
from t5like.evaluation import segmentation, text_metrics
from t5like.inference.generate import Generator, eos_ids
from t5like.inference.prompt_format import Prompt, PromptFormat
from t5like.inference.target_scores import SCORING_ROWS, score_targets, scoring_batch
from t5like.io.atomic import replace_file
from t5like.sharding.placement import to_host
from t5like.types import Tree

MAX_TRAIN_TARGETS = 10_000  # training examples from which the majority baseline is computed


class EvalExample(NamedTuple):
    """A held-out example.

    Attributes:
        prompt: the model's prompt.
        inputs: the prompt's ids without the decoder's start token.
        target: the ids of the reference answer, without EOS.
    """

    prompt: Prompt
    inputs: list[int]
    target: list[int]


def eval_examples(prompt_format: PromptFormat, examples: Examples, count: int) -> list[EvalExample]:
    """The first `count` examples of a split, with the prompts that rows of supervised examples have."""
    result: list[EvalExample] = []
    for unit in range(min(len(examples), count)):
        begin = int(examples.begin_N[unit])
        first = int(examples.first_N[unit])
        for start, stop in examples.targets_M2[first : first + int(examples.count_N[unit])].tolist():
            # A conversation of a decoder-only model is one unit with several answers.
            inputs = examples.stream.windows(np.array([begin]), start - begin)[0].tolist()
            target = examples.stream.windows(np.array([start]), stop - start - 1)[0].tolist()
            result.append(EvalExample(prompt_format.input_prompt(inputs), inputs, target))
    return result[:count]


class TaskEvaluator:
    """Predicts the targets of held-out examples, and scores the predictions.

    `baselines` scores predictions that need no model, on the same examples: the most frequent target of the training
    examples (majority), the input itself (copy), and its first words (lead).
    """

    def __init__(
        self, config: Config, mesh: Mesh, tokenizer: Tokenizer, train: Sequence[Examples], heldout: Sequence[Examples]
    ):
        """`config` is resolved for `mesh`; `train` and `heldout` are the results of `pipeline.open_split`.

        Raises:
            ConfigError: a metric's package is not installed, or a choice is longer than a target may be.
        """
        self.config, self.mesh, self.tokenizer = config, mesh, tokenizer
        self.prompt_format = PromptFormat.of(config, tokenizer)
        per_source = -(-config.evaluate.max_examples // len(heldout))
        self.examples = [
            example for source in heldout for example in eval_examples(self.prompt_format, source, per_source)
        ]
        self.references = [[tokenizer.decode(example.target)] for example in self.examples]
        self._scores("eval/score", ["a"] * len(self.references))  # raises if a metric's package is not installed
        self.rules = text_metrics.rules_for(self.references, config.evaluate.language)
        self._train = train
        self._choices = [[*tokenizer.encode(text), tokenizer.eos_id] for text in config.evaluate.answer_choices]
        longest = max(map(len, self._choices), default=0)
        if longest > config.data.targets_length:
            raise ConfigError(
                f"data.targets_length={config.data.targets_length} must be at least {longest}, the longest of "
                f"evaluate.answer_choices in tokens; use {longest}"
            )

    @property
    def count(self) -> int:
        """Number of rows that one call processes: one per example, or one per example and choice."""
        return len(self.examples) * max(len(self._choices), 1)

    def __call__(
        self, params: Tree, progress: Callable[[int], None] = lambda done: None
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """``eval/score/METRIC`` in percent, and a record of each example: inputs, target, prediction, choices' nats.

        `progress` is called with the number of rows done, of `count`.
        """
        with (
            jax.set_mesh(self.mesh),
            watchdog("task evaluation", times=2 + len(self.examples) // SCORING_ROWS, mode="computing"),
        ):
            predictions, nats_NC = (self._choose if self._choices else self._generate)(params, progress)
        records = [
            {"inputs": self.tokenizer.decode(example.inputs), "target": reference, "prediction": text}
            for example, [reference], text in zip(self.examples, self.references, predictions, strict=True)
        ]
        if nats_NC is not None:
            for record, nats_C in zip(records, nats_NC.tolist(), strict=True):
                record["nats"] = dict(zip(self.config.evaluate.answer_choices, nats_C, strict=True))
        return self._scores("eval/score", predictions), records

    def describe(self) -> dict[str, str]:
        """``eval/rule/METRIC``: how each metric normalizes and segments texts of this language."""
        return {f"eval/rule/{name}": self.rules.describe(name) for name in self.config.evaluate.metrics}

    def baselines(self) -> dict[str, float]:
        """``baseline/majority/METRIC`` and so on, in percent."""
        targets = [
            self.tokenizer.decode(example.target)
            for source in self._train
            for example in eval_examples(self.prompt_format, source, MAX_TRAIN_TARGETS)
        ]
        inputs = [self.tokenizer.decode(example.inputs) for example in self.examples]
        num_words = round(np.mean([segmentation.num_words(target) for target in targets]))
        predictions_of = {
            "majority": [text_metrics.majority_baseline(targets)] * len(inputs),
            "copy": text_metrics.copy_baseline(inputs),
            "lead": text_metrics.lead_baseline(inputs, max(num_words, 1)),
        }
        return {
            name: value
            for baseline, predictions in predictions_of.items()
            for name, value in self._scores(f"baseline/{baseline}", predictions).items()
        }

    def _scores(self, prefix: str, predictions: Sequence[str]) -> dict[str, float]:
        evaluate = self.config.evaluate
        scores = text_metrics.score(evaluate.metrics, predictions, self.references, evaluate.language)
        return {f"{prefix}/{name}": value for name, value in scores.items()}

    def _generate(self, params: Tree, progress: Callable[[int], None]) -> tuple[list[str], None]:
        generator = Generator(self.config, params, self.tokenizer)
        width = max(len(example.prompt.ids) for example in self.examples)
        max_new_tokens = self.config.evaluate.max_new_tokens or self.config.data.targets_length
        predictions: list[str] = []
        for begin in range(0, len(self.examples), SCORING_ROWS):
            prompts = [example.prompt for example in self.examples[begin : begin + SCORING_ROWS]]
            padded = prompts + prompts[:1] * (SCORING_ROWS - len(prompts))  # one shape, so that one program is compiled
            ids_BL = generator.ids(padded, max_new_tokens=max_new_tokens, width=width)
            predictions += generator.texts(ids_BL[: len(prompts)])
            progress(len(predictions))
        return predictions, None

    def _choose(self, params: Tree, progress: Callable[[int], None]) -> tuple[list[str], np.ndarray]:
        pairs = [(example.prompt, choice) for example in self.examples for choice in self._choices]
        prompt_length = max(len(example.prompt.ids) for example in self.examples)
        target_length = max(map(len, self._choices))
        ids = eos_ids(self.config, self.tokenizer)
        nats: list[float] = []
        for begin in range(0, len(pairs), SCORING_ROWS):
            part = pairs[begin : begin + SCORING_ROWS]
            padded = part + part[:1] * (SCORING_ROWS - len(part))
            batch = scoring_batch(self.config, padded, prompt_length, target_length)
            nats += to_host(score_targets(self.config.of_model(), params, batch, ids).nats_B)[: len(part)].tolist()
            progress(len(nats))
        nats_NC = np.reshape(nats, (len(self.examples), -1))
        return [self.config.evaluate.answer_choices[best] for best in nats_NC.argmin(1)], nats_NC


def write_predictions(workdir: Path, name: int | str, records: Sequence[dict[str, Any]]) -> Path:
    """Write ``predictions/NAME.jsonl`` in a run directory, atomically; NAME is or begins with the step."""
    path = workdir / "predictions" / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    replace_file(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path
