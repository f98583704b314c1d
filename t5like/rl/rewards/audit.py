"""`audit` scores answers whose reward is known before anything is trained: the right one, an empty one, junk.

A policy finds what a reward pays for. Some public scorers pay for any text, or raise exceptions for the answers of an
untrained model; of reasoning-gym, `game_of_life_halting` gives 1 to every answer that is not empty.

    reward         right    empty    x        prompt   number
    reasoning_gym  1        0        1        1        1
    reasoning_gym: PAYS FOR JUNK: "x" gets 1, the right answer 1
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from t5like.errors import printable
from t5like.rl.rewards.functions import INPUTS, TARGETS
from t5like.rl.rewards.pool import RewardPool
from t5like.rl.rewards.reward import ModelReward, Reward

MOST_ROWS = 20
COLUMN = 9  # characters of a column of the table
NUMBER = "7919"
LEAST_PAY = 0.02  # as a part of the right answer's reward, from which on junk is called paid
# Answers by name, as functions of the row.
ANSWERS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "right": lambda row: str(row.get(TARGETS, "")),
    "empty": lambda row: "",
    "x": lambda row: "x",
    "prompt": lambda row: str(row.get(INPUTS, "")),
    "number": lambda row: NUMBER,
}
JUNK = tuple(name for name in ANSWERS if name != "right")


class Audit(NamedTuple):
    """What `audit` has found.

    Attributes:
        lines: a table of mean rewards, then a line for each warning.
        passed: whether there is no warning.
        useless: names of the rewards that failed for every answer.
    """

    lines: list[str]
    passed: bool
    useless: list[str]


def audit(
    rewards: Sequence[Reward | ModelReward], rows: Sequence[Mapping[str, Any]], *, timeout_seconds: float = 10.0
) -> Audit:
    """Score the right answer (the targets), an empty one and junk for up to `MOST_ROWS` rows.

    Args:
        rewards: `open_rewards` of a config; reward models are listed, not scored.
        rows: as `RewardPool.score` takes them, with the prompt's text under ``inputs``.
        timeout_seconds: `rl.reward_timeout_seconds`.
    """
    rows = rows[:MOST_ROWS]
    functions = [reward for reward in rewards if isinstance(reward, Reward)]
    width = max(len("reward"), *(len(reward.name) for reward in rewards)) + 2
    columns = "".join(f"{name:<{COLUMN}}" for name in ANSWERS)
    lines, warnings = [f"{'reward':<{width}}{columns}".rstrip()], []
    with RewardPool(functions, 1, timeout_seconds) as pool:
        scores_RBG = pool.score(rows, [[make(row) for make in ANSWERS.values()] for row in rows])
    targets = [str(row.get(TARGETS, "")).strip() for row in rows]
    known_B = np.array([bool(target) for target in targets])
    for reward, scores_BG in zip(functions, scores_RBG, strict=True):
        means = {}
        for (name, make), scores_B in zip(ANSWERS.items(), scores_BG.T, strict=True):
            is_right_B = np.array([make(row).strip() == target for row, target in zip(rows, targets, strict=True)])
            means[name] = _mean(scores_B[known_B & is_right_B if name == "right" else ~(known_B & is_right_B)])
        cells = "".join(f"{_number(means[name]):<{COLUMN}}" for name in ANSWERS)
        lines.append(f"{reward.name:<{width}}{cells}".rstrip())
        warnings += [f"{reward.name}: {text}" for text in _warnings(means)]
        if failure := pool.first_failures.get(reward.name):
            count = f"{pool.failures[reward.name]} of {scores_BG.size} rewards"
            warnings.append(f"{reward.name}: FAILS for {count}; the first: {printable(failure)}")
    lines += [f"{reward.name}: a reward model, not audited" for reward in rewards if isinstance(reward, ModelReward)]
    if not known_B.all():
        lines.append(f"{(~known_B).sum()} of {len(rows)} rows list no right answer")
    useless = [reward.name for reward, scores in zip(functions, scores_RBG, strict=True) if np.isnan(scores).all()]
    return Audit(lines + (warnings or ["no warnings"]), not warnings, useless)


def _warnings(means: Mapping[str, float]) -> list[str]:
    """Warnings about the mean rewards of a function, by name of the answer; NaN: not known."""
    right, best = means["right"], np.nanmax([0.0, *means.values()])
    found = []
    if right < best:
        found.append(f"THE RIGHT ANSWER IS NOT THE BEST: it gets {_number(right)}, another one {_number(best)}")
    elif right < 1:
        found.append(f"THE RIGHT ANSWER DOES NOT GET 1 but {_number(right)}")
    limit = LEAST_PAY * (right if right > 0 else 1.0)
    than = "" if np.isnan(right) else f", the right answer {_number(right)}"
    for name in JUNK:
        if means[name] > limit:
            found.append(f"PAYS FOR JUNK: {_shown(name)} gets {_number(means[name])}{than}")
    return found


def _shown(name: str) -> str:
    return {"empty": "an empty answer", "x": '"x"', "prompt": "the prompt", "number": f'"{NUMBER}"'}[name]


def _mean(scores: np.ndarray) -> float:
    """The mean of the rewards that have not failed; NaN if there are none."""
    scores = scores[~np.isnan(scores)]
    return float(scores.mean()) if scores.size else float("nan")


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3g}"
