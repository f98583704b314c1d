"""`t5like rl`, and `t5like evaluate` for its runs: opens rewards and task; the training loop does the rest."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from t5like.checkpoint.run_directory import Run
from t5like.config.schema import Config
from t5like.errors import ConfigError
from t5like.rl.on_policy import OnPolicy
from t5like.rl.pairs import Pairs
from t5like.rl.prompts import first_rows
from t5like.rl.rewards.audit import MOST_ROWS, Audit
from t5like.rl.rewards.audit import audit as rewards_audit
from t5like.rl.rewards.pool import RewardPool
from t5like.rl.rewards.reward import ModelReward, open_rewards, required_fields
from t5like.rl.scorer import Scorer
from t5like.train.loop import train
from t5like.types import TrainState

Opener = Callable[..., OnPolicy | Pairs]


@contextlib.contextmanager
def opened(config: Config) -> Iterator[Opener]:
    """The task of a config, as a function of (config resolved on a mesh, mesh, run directory, function that prints).

    Raises:
        ConfigError: a reward can't be used.
    """
    if config.rl.uses_pairs:
        yield Pairs
        return
    rewards, rl = open_rewards(config), config.rl
    in_pool = [reward for reward in rewards if not isinstance(reward, ModelReward)]
    with RewardPool(in_pool, rl.reward_workers, rl.reward_timeout_seconds) as pool:
        yield partial(OnPolicy, scorer=Scorer(rewards, pool))


def run(
    config: Config, workdir: Path, allowed: Sequence[str] = (), on_step: Callable[[int], None] | None = None
) -> None:
    """Train by `rl.method` until `train.num_steps`; arguments and errors as in `train.loop.train`.

    Raises:
        ConfigError: the config has no method, or a reward can't be used.
    """
    if config.rl.method == "none":
        raise ConfigError("rl.method=none is for t5like train; use rl.method=policy, or a config of configs/rl")
    with opened(config) as open_task:
        train(config, workdir, on_step=on_step, allowed=allowed, open_task=open_task)


def audit(config: Config) -> Audit:
    """What the rewards of a config pay for right, empty and junk answers (`rewards.audit`).

    Raises:
        ConfigError, DataError: a reward or the data can't be used.
    """
    if config.rl.method != "policy":
        raise ConfigError(f"--audit needs rewards, which rl.method={config.rl.method} has not; use rl.method=policy")
    rewards = open_rewards(config)
    rows = first_rows(config, required_fields(rewards).names, MOST_ROWS)
    return rewards_audit(rewards, rows, timeout_seconds=config.rl.reward_timeout_seconds)


def evaluate(loaded: Run, workdir: Path) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Rewards of all held-out prompts, with records of the answers; or metrics of all held-out pairs.

    Args:
        loaded: a run of `t5like rl`.
        workdir: its directory.
    """
    path = str(workdir / "tokenizer.model")
    config = dataclasses.replace(loaded.config, tokenizer=dataclasses.replace(loaded.config.tokenizer, path=path))
    with opened(config) as open_task:
        task = open_task(config, loaded.mesh, workdir, lambda _: None)
        task.start(TrainState(np.int32(loaded.step), loaded.params, None))
        values, records = task.evaluate_all(loaded.params)
    return {"step": loaded.step, **values}, records


def table(values: Mapping[str, float]) -> str:
    """The values of `evaluate` as text, one per line."""
    width = max(map(len, values))
    lines = [f"{name:{width}}  {value:.4f}" for name, value in values.items() if name != "step"]
    return f"held out, step {values['step']:,}\n" + "\n".join(lines)
