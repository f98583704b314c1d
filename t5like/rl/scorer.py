"""All rewards of a run, for the answers of a step: in worker processes, or on the devices for a reward model.

Each process computes the rewards of its own part of the prompts in its workers, and all processes exchange the values.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from t5like.distributed import processes
from t5like.rl.model_reward import RewardModel
from t5like.rl.rewards.pool import RewardPool
from t5like.rl.rewards.reward import ModelReward, Reward, required_fields


class Scorer:
    """Computes rewards.

    Attributes:
        names: of the rewards, for metrics.
        weights: of the rewards in their sum.
        fields: of a record that they need.
    """

    def __init__(self, rewards: Sequence[Reward | ModelReward], pool: RewardPool):
        """`pool` computes those of `rewards` that are no `ModelReward`, in their order."""
        self.names = [reward.name for reward in rewards]
        self.weights = [reward.weight for reward in rewards]
        self._pool = pool
        self._models = {
            index: RewardModel(Path(reward.directory))
            for index, reward in enumerate(rewards)
            if isinstance(reward, ModelReward)
        }
        self._in_pool = [index for index in range(len(rewards)) if index not in self._models]
        self.fields = required_fields([*rewards, *self._models.values()]).names

    def __call__(self, rows: Sequence[dict[str, Any]], answers: Sequence[Sequence[str]]) -> np.ndarray:
        """float64 [R, B, G], NaN for a reward that failed. All processes call it with all prompts of the batch.

        Args:
            rows: the fields of each prompt's record (`Prompts.row`).
            answers: texts, the same number G for each prompt.
        """
        rewards_RBG = np.full((len(self.names), len(rows), len(answers[0])), np.nan)
        if self._in_pool:
            rewards_RBG[self._in_pool] = self._score_in_pool(rows, answers)
        for index, model in self._models.items():
            rewards_RBG[index] = model(rows, answers)
        return rewards_RBG

    def failures(self) -> list[str]:
        """A line for each reward that has failed in this process: how often, and why the first time."""
        return [
            f"reward {name} failed for {count:,} answers; the first time: {self._pool.first_failures.get(name, '')}"
            for name, count in self._pool.failures.items()
            if count
        ]

    def _score_in_pool(self, rows: Sequence[dict[str, Any]], answers: Sequence[Sequence[str]]) -> np.ndarray:
        rank, count = jax.process_index(), jax.process_count()
        first, last = (len(rows) * part // count for part in (rank, rank + 1))
        own = self._pool.score(rows[first:last], answers[first:last])
        if count == 1:
            return own
        parts = processes.all_gather("the rewards", own.astype(np.float64).tobytes().hex())
        shape = len(self._in_pool), -1, len(answers[0])
        return np.concatenate([np.frombuffer(bytes.fromhex(part)).reshape(shape) for part in parts], axis=1)
