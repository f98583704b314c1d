"""Sampled answers with their rewards and advantages: what a step of `t5like rl` learns from.

`Collector.collect` is a function of (config, parameters, row numbers): the same on any number of processes and devices,
and after any kill. Each process has all answers on the host.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from t5like.config.schema import Config
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.distributed.watchdog import watchdog
from t5like.rl import advantages
from t5like.rl.prompts import Example, PromptBatches, Prompts
from t5like.rl.rollouts import Answers, Sampler
from t5like.rl.scorer import Scorer
from t5like.types import Sum, Tree


class Collected(NamedTuple):
    """The answers of a step.

    Attributes:
        examples: B prompts.
        answers: G for each.
        rewards_RBG: float64 value of each reward; NaN: it failed.
        total_BG: float64 weighted sum with penalties; NaN: the answer is left out.
        seconds: of sampling and of the rewards.
    """

    examples: list[Example]
    answers: Answers
    rewards_RBG: np.ndarray
    total_BG: np.ndarray
    seconds: tuple[float, float]

    def first(self, count: int) -> "Collected":
        """The first prompts alone."""
        answers = Answers(*(values[:count] for values in self.answers))
        return Collected(
            self.examples[:count], answers, self.rewards_RBG[:, :count], self.total_BG[:count], self.seconds
        )


class Collector:
    """Samples and scores answers to training and to held-out prompts."""

    def __init__(self, config: Config, mesh: jax.sharding.Mesh, tokenizer: Tokenizer, prompts: Prompts, scorer: Scorer):
        """`config` is resolved for `mesh`."""
        self._config, self._prompts, self._scorer = config, prompts, scorer
        self._sampler = Sampler(config, mesh, tokenizer)

    def collect(self, params: Tree, batches: PromptBatches, rows_B: np.ndarray) -> Collected:
        """Answers to the training prompts of these rows.

        With `rl.redraws`, prompts whose answers all have the same reward are replaced, in their order, by prompts of
        further rollouts whose answers differ.
        """
        collected = None
        for redraw in range(self._config.rl.redraws + 1):
            examples = [self._prompts.train[index] for index in batches.indices(rows_B, redraw)]
            new = self._score(params, examples, rows_B, redraw)
            collected = _replace_equal(collected, new) if collected else new
            if advantages.has_spread(collected.total_BG).all():
                break
        return collected

    def answer(self, params: Tree, examples: Sequence[Example]) -> Collected:
        """One answer to each of these prompts by greedy decoding; as many prompts as `data.batch_size`."""
        return self._score(params, examples, np.arange(len(examples)), 0, greedy=True)

    def _score(
        self, params: Tree, examples: Sequence[Example], rows_B: np.ndarray, redraw: int, *, greedy: bool = False
    ) -> Collected:
        rl, started = self._config.rl, time.monotonic()
        with watchdog("sampling answers", times=2, mode="computing"):
            answers = self._sampler(
                params,
                [example.prompt for example in examples],
                rows_B,
                answers=1 if greedy else rl.answers_per_prompt,
                temperature=0.0 if greedy else rl.temperature,
                seed=(self._config.seed + redraw * 0x9E3779B1) % 2**32,
            )
        sampled = time.monotonic()
        with watchdog("computing rewards", times=2, mode="computing"):
            rewards_RBG = self._scorer([self._prompts.row(example) for example in examples], answers.texts)
        known_RBG = np.nan_to_num(rewards_RBG) if rl.failed_reward == "zero" else rewards_RBG
        total_BG = np.tensordot(np.asarray(self._scorer.weights, np.float64), known_RBG, 1)
        if rl.overlong_tokens and not greedy:
            limit = self._config.data.targets_length
            total_BG = total_BG + advantages.overlong_penalty(answers.lengths_BG, limit, rl.overlong_tokens)
        seconds = sampled - started, time.monotonic() - sampled
        return Collected(list(examples), answers, rewards_RBG, total_BG, seconds)


def _replace_equal(old: Collected, new: Collected) -> Collected:
    """`old`, with its prompts without spread replaced by those of `new` that have it."""
    targets = np.flatnonzero(~advantages.has_spread(old.total_BG))
    sources = np.flatnonzero(advantages.has_spread(new.total_BG))[: len(targets)]
    order = np.arange(len(old.examples))
    order[targets[: len(sources)]] = len(old.examples) + sources
    pick = lambda first, second: [(first + second)[index] for index in order]
    take = lambda first, second, axis=0: np.take(np.concatenate([first, second], axis), order, axis)
    answers = Answers(
        pick(old.answers.ids, new.answers.ids),
        pick(old.answers.texts, new.answers.texts),
        take(old.answers.log_p_BGL, new.answers.log_p_BGL),
        take(old.answers.truncated_BG, new.answers.truncated_BG),
    )
    seconds = old.seconds[0] + new.seconds[0], old.seconds[1] + new.seconds[1]
    return Collected(
        pick(old.examples, new.examples),
        answers,
        take(old.rewards_RBG, new.rewards_RBG, 1),
        take(old.total_BG, new.total_BG),
        seconds,
    )


def metrics(scorer: Scorer, collected: Collected) -> dict[str, Sum]:
    """Metrics of sampled answers, named as TRL names them, over the answers whose reward is known."""
    answers, total_BG = collected.answers, collected.total_BG
    lengths_BG, complete_BG = answers.lengths_BG, ~answers.truncated_BG
    sampling, scoring = collected.seconds
    values = {
        "reward": _sum(total_BG),
        "reward_std": _sum(_spread(total_BG)),
        "frac_reward_zero_std": _sum(1.0 - advantages.has_spread(total_BG)),
        "completions/mean_length": _sum(lengths_BG),
        "completions/min_length": Sum(lengths_BG.min(), 1),
        "completions/max_length": Sum(lengths_BG.max(), 1),
        "completions/clipped_ratio": _sum(answers.truncated_BG),
        "completions/mean_terminated_length": _sum(np.where(complete_BG, lengths_BG, np.nan)),
        "failed_rewards": Sum(np.isnan(collected.rewards_RBG).sum(), 1),
        "rollout_seconds": Sum(sampling, 1),
        "reward_seconds": Sum(scoring, 1),
        "rollout_tokens_per_second": Sum(lengths_BG.sum(), sampling),
    }
    for name, values_BG in zip(scorer.names, collected.rewards_RBG, strict=True):
        values |= {f"rewards/{name}/mean": _sum(values_BG), f"rewards/{name}/std": _sum(_spread(values_BG))}
    return {name: Sum(*map(np.float32, value)) for name, value in values.items()}


def mean(values: np.ndarray) -> float:
    """The mean of the values that are known; 0 without any."""
    return _sum(values).mean()


def _sum(values: np.ndarray) -> Sum:
    """The sum of the values that are known, and their number."""
    known = values[np.isfinite(values)]
    return Sum(known.sum(), known.size)


def _spread(values_BG: np.ndarray) -> np.ndarray:
    """The standard deviation of each prompt's known values (ddof 1, as TRL's); NaN with fewer than two."""
    return np.array(
        [np.std(row[np.isfinite(row)], ddof=1) if np.isfinite(row).sum() > 1 else np.nan for row in values_BG]
    )
