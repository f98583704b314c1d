"""Answers to held-out supervised examples: generated, or chosen by likelihood; scored, and kept to be read.

Used by `train` at each evaluation and by `t5like evaluate`, where the config names `evaluate.metrics`. An example is
asked as it was trained on; a conversation once for each of the assistant's turns. `scores` measures the texts.
Choosing among given answers by their total log-likelihood is the rank classification of T0 (Sanh et al. 2022, section
6.1) and of GPT-3 (Brown et al. 2020, section 2.4).
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

COUNTED = 10_000  # training answers among which the most frequent is found


class EvalExample(NamedTuple):
    """A held-out example: what the model is asked, the same without START, and the right ids without EOS."""

    prompt: Prompt
    read: list[int]
    answer: list[int]


def eval_examples(prompt_format: PromptFormat, examples: Examples, count: int) -> list[EvalExample]:
    """The first `count` questions of a split, as rows of supervised examples would show them."""
    found: list[EvalExample] = []
    for unit in range(min(len(examples), count)):
        begin = int(examples.begin_N[unit])
        first = int(examples.first_N[unit])
        for start, stop in examples.targets_M2[first : first + int(examples.count_N[unit])].tolist():
            # A conversation on a decoder-only model has cut == begin and several answers in one unit.
            read = examples.stream.windows(np.array([begin]), start - begin)[0].tolist()
            answer = examples.stream.windows(np.array([start]), stop - start - 1)[0].tolist()
            found.append(EvalExample(prompt_format.input_prompt(read), read, answer))
    return found[:count]


class TaskEvaluator:
    """Asks a model the held-out examples, and scores what it says.

    `baselines` scores what needs no model, on the same examples: the most frequent answer of the training examples
    (majority), the input itself (copy), and its first words (lead).
    """

    def __init__(
        self, config: Config, mesh: Mesh, tokenizer: Tokenizer, train: Sequence[Examples], heldout: Sequence[Examples]
    ):
        """`config` is settled on `mesh`; `train` and `heldout` are `pipeline.open_split`'s.

        Raises:
            ConfigError: a metric's package is not installed, or a choice is longer than an answer may be.
        """
        self.config, self.mesh, self.tokenizer = config, mesh, tokenizer
        self.prompt_format = PromptFormat.of(config, tokenizer)
        each = -(-config.evaluate.max_examples // len(heldout))
        self.questions = [
            question for examples in heldout for question in eval_examples(self.prompt_format, examples, each)
        ]
        self.right = [[tokenizer.decode(question.answer)] for question in self.questions]
        self._scores("eval/score", ["a"] * len(self.right))  # says what is not installed
        self.rules = text_metrics.rules_for(self.right, config.evaluate.language)
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
        """How many rows one call takes: questions, each with all of its choices."""
        return len(self.questions) * max(len(self._choices), 1)

    def __call__(
        self, params: Tree, progress: Callable[[int], None] = lambda done: None
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """``eval/score/METRIC`` in percent, and a record of each example: inputs, target, prediction, choices' nats.

        `progress` hears how many rows of `count` are done.
        """
        with jax.set_mesh(self.mesh), watchdog("answers", times=2 + len(self.questions) // SCORING_ROWS):
            said, nats_NC = (self._choose if self._choices else self._generate)(params, progress)
        records = [
            {"inputs": self.tokenizer.decode(question.read), "target": right, "prediction": text}
            for question, [right], text in zip(self.questions, self.right, said, strict=True)
        ]
        if nats_NC is not None:
            for record, nats_C in zip(records, nats_NC.tolist(), strict=True):
                record["nats"] = dict(zip(self.config.evaluate.answer_choices, nats_C, strict=True))
        return self._scores("eval/score", said), records

    def describe(self) -> dict[str, str]:
        """``eval/rule/METRIC``: how it takes texts of this language apart."""
        return {f"eval/rule/{name}": self.rules.describe(name) for name in self.config.evaluate.metrics}

    def baselines(self) -> dict[str, float]:
        """``baseline/majority/METRIC`` and so on, in percent."""
        targets = [
            self.tokenizer.decode(question.answer)
            for examples in self._train
            for question in eval_examples(self.prompt_format, examples, COUNTED)
        ]
        inputs = [self.tokenizer.decode(question.read) for question in self.questions]
        words = round(np.mean([segmentation.num_words(target) for target in targets]))
        said = {
            "majority": [text_metrics.majority_baseline(targets)] * len(inputs),
            "copy": text_metrics.copy_baseline(inputs),
            "lead": text_metrics.lead_baseline(inputs, max(words, 1)),
        }
        return {
            name: value
            for kind, texts in said.items()
            for name, value in self._scores(f"baseline/{kind}", texts).items()
        }

    def _scores(self, prefix: str, said: Sequence[str]) -> dict[str, float]:
        found = text_metrics.score(self.config.evaluate.metrics, said, self.right, self.config.evaluate.language)
        return {f"{prefix}/{name}": value for name, value in found.items()}

    def _generate(self, params: Tree, progress: Callable[[int], None]) -> tuple[list[str], None]:
        generator = Generator(self.config, params, self.tokenizer)
        width = max(len(question.prompt.ids) for question in self.questions)
        said: list[str] = []
        for begin in range(0, len(self.questions), SCORING_ROWS):
            prompts = [question.prompt for question in self.questions[begin : begin + SCORING_ROWS]]
            filled = prompts + prompts[:1] * (
                SCORING_ROWS - len(prompts)
            )  # one shape for all, so that one program does
            most = self.config.evaluate.max_new_tokens or self.config.data.targets_length
            said += generator.texts(generator.ids(filled, max_new_tokens=most, width=width)[: len(prompts)])
            progress(len(said))
        return said, None

    def _choose(self, params: Tree, progress: Callable[[int], None]) -> tuple[list[str], np.ndarray]:
        pairs = [(question.prompt, choice) for question in self.questions for choice in self._choices]
        width = max(len(question.prompt.ids) for question in self.questions)
        ends = eos_ids(self.config, self.tokenizer)
        nats: list[float] = []
        for begin in range(0, len(pairs), SCORING_ROWS):
            some = pairs[begin : begin + SCORING_ROWS]
            batch = scoring_batch(
                self.config, some + some[:1] * (SCORING_ROWS - len(some)), width, max(map(len, self._choices))
            )
            nats += to_host(score_targets(self.config, params, batch, ends).nats_B)[: len(some)].tolist()
            progress(len(nats))
        nats_NC = np.reshape(nats, (len(self.questions), -1))
        return [self.config.evaluate.answer_choices[best] for best in nats_NC.argmin(1)], nats_NC


def write_predictions(workdir: Path, name: int | str, records: Sequence[dict[str, Any]]) -> Path:
    """Write ``predictions/NAME.jsonl`` in a run directory, whole or not at all; NAME is or begins with the step."""
    path = workdir / "predictions" / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    replace_file(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path
