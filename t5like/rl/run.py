"""`t5like rl`: opens rewards and task, and calls the training loop."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from t5like.config.schema import Config
from t5like.errors import ConfigError
from t5like.rl.on_policy import OnPolicy
from t5like.rl.pairs import Pairs
from t5like.rl.rewards.pool import RewardPool
from t5like.rl.rewards.reward import ModelReward, open_rewards, required_fields
from t5like.rl.scorer import Scorer
from t5like.train.loop import train


def run(
    config: Config, workdir: Path, allowed: Sequence[str] = (), on_step: Callable[[int], None] | None = None
) -> None:
    """Train by `rl.method` until `train.num_steps`; arguments and errors as in `train.loop.train`.

    Raises:
        ConfigError: the config has no method, or a reward can't be used.
    """
    if config.rl.method == "none":
        raise ConfigError("rl.method=none is for t5like train; use rl.method=policy, or a config of configs/rl")
    start = partial(train, config, workdir, on_step=on_step, allowed=allowed)
    if config.rl.uses_pairs:
        start(open_task=Pairs)
        return
    rewards, rl = open_rewards(config), config.rl
    in_pool = [reward for reward in rewards if not isinstance(reward, ModelReward)]
    with RewardPool(in_pool, rl.reward_workers, rl.reward_timeout_seconds) as pool:
        scorer = Scorer(rewards, pool)
        start(open_task=partial(OnPolicy, scorer=scorer, fields=required_fields(rewards).names))
