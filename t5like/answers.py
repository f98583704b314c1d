"""Answers to held-out supervised examples: generated, or chosen by likelihood; scored, and kept to be read.

Used by `train` at each evaluation and by `t5like evaluate`, where the config names `evaluate.metrics`. An example is
asked as it was trained on; a conversation once for each of the assistant's turns. `scores` measures the texts.
Choosing among given answers by their total log-likelihood is the rank classification of T0 (Sanh et al. 2022, section
6.1) and of GPT-3 (Brown et al. 2020, section 2.4).
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from t5like import distributed, losses, scores, segmentation
from t5like.config import Config
from t5like.data.examples import Examples
from t5like.data.text import START
from t5like.data.token_store import written_whole
from t5like.data.tokenizer import Tokenizer
from t5like.errors import ConfigError
from t5like.generate import Generator, Prompt, eos_ids
from t5like.mesh import to_host
from t5like.model.transformer import Transformer
from t5like.types import Batch, Tree

ROWS = 32  # prompts that are answered at a time
COUNTED = 10_000  # training answers among which the most frequent is found


class Question(NamedTuple):
    """A held-out example: what the model is asked, the same without START, and the right ids without EOS."""

    prompt: Prompt
    read: list[int]
    answer: list[int]


def questions(config: Config, examples: Examples, count: int) -> list[Question]:
    """The first `count` questions of a split, as rows of supervised examples would show them."""
    found: list[Question] = []
    decoder_only = config.model.architecture == "decoder"
    for unit in range(min(len(examples), count)):
        begin, cut = int(examples.begin_N[unit]), int(examples.cut_N[unit])
        first = int(examples.first_N[unit])
        for start, stop in examples.learned_M2[first : first + int(examples.count_N[unit])].tolist():
            # A conversation on a decoder-only model has cut == begin and several answers in one unit.
            read = examples.stream.windows(np.array([begin]), start - begin)[0].tolist()
            answer = examples.stream.windows(np.array([start]), stop - start - 1)[0].tolist()
            if not decoder_only:
                prompt = Prompt(read)
            elif config.data.messages_field:
                prompt = Prompt([START, *read])
            else:
                prompt = Prompt([*read, START], cut - begin)
            found.append(Question(prompt, read, answer))
    return found[:count]


class Answers:
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
        each = -(-config.evaluate.max_examples // len(heldout))
        self.questions = [question for examples in heldout for question in questions(config, examples, each)]
        self.right = [[tokenizer.decode(question.answer)] for question in self.questions]
        self._scores("eval/score", ["a"] * len(self.right))  # says what is not installed
        self.rules = scores.rules_for(self.right, config.evaluate.language)
        self._train = train
        self._choices = [[*tokenizer.encode(text), tokenizer.eos_id] for text in config.evaluate.choices]
        longest = max(map(len, self._choices), default=0)
        if longest > config.data.targets_length:
            raise ConfigError(
                f"data.targets_length={config.data.targets_length} must be at least {longest}, the longest of "
                f"evaluate.choices in tokens; use {longest}"
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
        with jax.set_mesh(self.mesh), distributed.limit("answers", times=2 + len(self.questions) // ROWS):
            said, nats_NC = (self._choose if self._choices else self._generate)(params, progress)
        records = [
            {"inputs": self.tokenizer.decode(question.read), "target": right, "prediction": text}
            for question, [right], text in zip(self.questions, self.right, said, strict=True)
        ]
        if nats_NC is not None:
            for record, nats_C in zip(records, nats_NC.tolist(), strict=True):
                record["nats"] = dict(zip(self.config.evaluate.choices, nats_C, strict=True))
        return self._scores("eval/score", said), records

    def describe(self) -> dict[str, str]:
        """``eval/rule/METRIC``: how it takes texts of this language apart."""
        return {f"eval/rule/{name}": self.rules.describe(name) for name in self.config.evaluate.metrics}

    def baselines(self) -> dict[str, float]:
        """``baseline/majority/METRIC`` and so on, in percent."""
        targets = [
            self.tokenizer.decode(question.answer)
            for examples in self._train
            for question in questions(self.config, examples, COUNTED)
        ]
        inputs = [self.tokenizer.decode(question.read) for question in self.questions]
        words = round(np.mean([segmentation.num_words(target) for target in targets]))
        said = {
            "majority": [scores.majority_baseline(targets)] * len(inputs),
            "copy": scores.copy_baseline(inputs),
            "lead": scores.lead_baseline(inputs, max(words, 1)),
        }
        return {
            name: value
            for kind, texts in said.items()
            for name, value in self._scores(f"baseline/{kind}", texts).items()
        }

    def _scores(self, prefix: str, said: Sequence[str]) -> dict[str, float]:
        found = scores.score(self.config.evaluate.metrics, said, self.right, self.config.evaluate.language)
        return {f"{prefix}/{name}": value for name, value in found.items()}

    def _generate(self, params: Tree, progress: Callable[[int], None]) -> tuple[list[str], None]:
        generator = Generator(self.config, params, self.tokenizer)
        width = max(len(question.prompt.ids) for question in self.questions)
        said: list[str] = []
        for begin in range(0, len(self.questions), ROWS):
            prompts = [question.prompt for question in self.questions[begin : begin + ROWS]]
            filled = prompts + prompts[:1] * (ROWS - len(prompts))  # one shape for all, so that one program does
            most = self.config.evaluate.max_new_tokens or self.config.data.targets_length
            said += generator.texts(generator.ids(filled, max_new_tokens=most, width=width)[: len(prompts)])
            progress(len(said))
        return said, None

    def _choose(self, params: Tree, progress: Callable[[int], None]) -> tuple[list[str], np.ndarray]:
        pairs = [(question.prompt, choice) for question in self.questions for choice in self._choices]
        width = max(len(question.prompt.ids) for question in self.questions)
        ends = eos_ids(self.config, self.tokenizer)
        nats: list[float] = []
        for begin in range(0, len(pairs), ROWS):
            some = pairs[begin : begin + ROWS]
            batch = answered(self.config, some + some[:1] * (ROWS - len(some)), width, max(map(len, self._choices)))
            nats += to_host(scored(self.config, params, batch, ends).nats_B)[: len(some)].tolist()
            progress(len(nats))
        nats_NC = np.reshape(nats, (len(self.questions), -1))
        return [self.config.evaluate.choices[best] for best in nats_NC.argmin(1)], nats_NC


def answered(config: Config, pairs: Sequence[tuple[Prompt, Sequence[int]]], width: int, longest: int) -> Batch:
    """Rows of prompts and their answers, as in training: `width` ids for the prompt, `longest` for the answer."""
    if config.model.architecture == "decoder":
        rows = len(pairs), width + longest
        ids_BL, targets_BL, segments_BL = (np.zeros(rows, np.int32) for _ in range(3))
        weights_BL, prefix_BL = np.zeros(rows, np.float32), np.zeros(rows, bool)
        for row, (prompt, answer) in enumerate(pairs):
            read, end = len(prompt.ids), len(prompt.ids) + len(answer) - 1
            ids_BL[row, :end] = [*prompt.ids, *answer[:-1]]
            targets_BL[row, read - 1 : end] = answer
            weights_BL[row, read - 1 : end] = 1
            segments_BL[row, :end] = 1
            prefix_BL[row, : prompt.prefix] = True
        return Batch(ids_BL, targets_BL, weights_BL, decoder_segments_BL=segments_BL, prefix_BL=prefix_BL)
    ids_BS, segments_BS = (np.zeros((len(pairs), width), np.int32) for _ in range(2))
    ids_BL, targets_BL = (np.zeros((len(pairs), longest), np.int32) for _ in range(2))
    weights_BL = np.zeros((len(pairs), longest), np.float32)
    for row, (prompt, answer) in enumerate(pairs):
        ids_BS[row, : len(prompt.ids)] = prompt.ids
        segments_BS[row, : len(prompt.ids)] = 1
        ids_BL[row, : len(answer)] = [START, *answer[:-1]]
        targets_BL[row, : len(answer)] = answer
        weights_BL[row, : len(answer)] = 1
    ones_BL = np.ones(ids_BL.shape, np.int32)
    return Batch(ids_BL, targets_BL, weights_BL, ids_BS, segments_BS, ones_BL)


class Scored(NamedTuple):
    """Of each row's weighted targets together.

    Attributes:
        nats_B: float32, their -log p; the likeliest has the fewest.
        greedy_B: bool, whether each of them is the likeliest token at its place.
    """

    nats_B: jax.Array
    greedy_B: jax.Array


@partial(jax.jit, static_argnames=("config", "ends"))
def scored(config: Config, params: Tree, batch: Batch, ends: tuple[int, ...] = ()) -> Scored:
    """How likely the rows' targets are, given what the rows read.

    Where `ends`, the ids that end a text, are several, the first of them as a target stands for any.
    """
    logits_BLV = Transformer(config).apply({"params": params}, batch)
    nats_BL = losses.nats(logits_BLV, batch.targets_BL)
    hit_BL = logits_BLV.argmax(-1) == batch.targets_BL
    if len(ends) > 1:
        ends_BLE = logits_BLV[..., np.array(ends)].astype(jnp.float32)
        one_BL = jnp.take_along_axis(logits_BLV, batch.targets_BL[..., None], axis=-1)[..., 0].astype(jnp.float32)
        end_BL = batch.targets_BL == ends[0]
        nats_BL = jnp.where(end_BL, nats_BL + one_BL - jax.nn.logsumexp(ends_BLE, axis=-1), nats_BL)
        hit_BL = jnp.where(end_BL, ends_BLE.max(-1) >= logits_BLV.max(-1), hit_BL)
    likeliest_BL = hit_BL | (batch.weights_BL == 0)
    return Scored((nats_BL * batch.weights_BL).sum(1), likeliest_BL.all(1))


def write_predictions(workdir: Path, name: int | str, records: Sequence[dict[str, Any]]) -> Path:
    """Write ``predictions/NAME.jsonl`` in a run directory, whole or not at all; NAME is or begins with the step."""
    path = workdir / "predictions" / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with written_whole(path) as file:
        file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
    return path
