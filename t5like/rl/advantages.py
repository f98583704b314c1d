"""Advantages of sampled answers: how much better an answer is than a baseline. On the host, in float64, without JAX.

Papers: GRPO (Shao et al. 2024, arXiv:2402.03300), Dr. GRPO (Liu et al. 2025, arXiv:2503.20783), RLOO (Ahmadian et al.
2024, arXiv:2402.14740), DAPO (Yu et al. 2025, arXiv:2503.14476), GAE (Schulman et al. 2016, arXiv:1506.02438).
"""

from typing import Literal

import numpy as np

STD_EPSILON = 1e-4  # added to the standard deviation of a group, as in TRL
WHITEN_EPSILON = 1e-8  # added to the variance of the advantages of PPO, as in TRL
SAME_REWARD = 1e-8  # rewards of a group that differ by less, relative to the larger of 1 and |reward|, are equal


def advantages(kind: Literal["grpo", "dr_grpo", "rloo", "reinforce"], rewards_BG: np.ndarray) -> np.ndarray:
    """float32 [B, G]: the advantage of each answer over the other answers.

    Args:
        kind: `rl.advantage`.
            grpo: (reward - mean) / (standard deviation + 1e-4) of the answers to the prompt; the standard deviation
            divides by G - 1, as in TRL.
            dr_grpo: reward - mean of the answers to the prompt.
            rloo: reward - mean of the other answers to the prompt.
            reinforce: reward - mean of all answers of the step.
        rewards_BG: of the whole step. A reward that is not finite is that of an answer whose reward failed: its
            advantage is 0, and it is part of no mean and no standard deviation.

    Groups with fewer than two rewards, or with equal rewards (`has_spread`), have advantage 0. For `reinforce` the
    whole step is the group.
    """
    rewards_BG = np.asarray(rewards_BG, np.float64)
    if kind == "reinforce":
        return _within_groups("dr_grpo", rewards_BG.reshape(1, -1)).reshape(rewards_BG.shape).astype(np.float32)
    return _within_groups(kind, rewards_BG).astype(np.float32)


def _within_groups(kind, rewards_BG):
    valid_BG = np.isfinite(rewards_BG)
    count_B1 = valid_BG.sum(1, keepdims=True)
    centered_BG = np.where(valid_BG, rewards_BG - _mean(rewards_BG, valid_BG), 0.0)
    others_B1 = np.maximum(count_B1 - 1, 1)
    if kind == "grpo":
        centered_BG = centered_BG / (np.sqrt(np.square(centered_BG).sum(1, keepdims=True) / others_B1) + STD_EPSILON)
    elif kind == "rloo":  # reward - mean of the n - 1 others = n / (n - 1) * (reward - mean of all n)
        centered_BG = centered_BG * count_B1 / others_B1
    elif kind != "dr_grpo":
        raise ValueError(f"no advantage {kind!r} of rewards")
    return np.where(has_spread(rewards_BG)[:, None], centered_BG, 0.0)


def _mean(rewards_BG, valid_BG):
    """[B, 1]: the mean of the valid rewards of each group; 0 without any."""
    total_B1 = np.where(valid_BG, rewards_BG, 0.0).sum(1, keepdims=True)
    return total_B1 / np.maximum(valid_BG.sum(1, keepdims=True), 1)


def has_spread(rewards_BG: np.ndarray) -> np.ndarray:
    """bool [B]: whether the rewards of a prompt's answers differ; without, the prompt has no gradient (DAPO).

    Rewards that are not finite do not count; a group with fewer than two others has no spread. Differences below 1e-8,
    relative to the larger of 1 and the largest |reward|, are rounding errors of a weighted sum, and do not count.
    """
    rewards_BG = np.asarray(rewards_BG, np.float64)
    valid_BG = np.isfinite(rewards_BG)
    high_B = np.where(valid_BG, rewards_BG, -np.inf).max(1)
    low_B = np.where(valid_BG, rewards_BG, np.inf).min(1)
    size_B = np.maximum(np.where(valid_BG, np.abs(rewards_BG), 0.0).max(1), 1.0)
    return high_B - low_B > SAME_REWARD * size_B


def gae(
    rewards_BGL: np.ndarray, values_BGL: np.ndarray, mask_BGL: np.ndarray, discount: float, gae_lambda: float
) -> tuple[np.ndarray, np.ndarray]:
    """Generalized advantage estimation of each token, for PPO.

    delta_t = r_t + discount * V_{t+1} - V_t, advantage_t = delta_t + discount * gae_lambda * advantage_{t+1}, and
    return_t = advantage_t + V_t. After the last token of an answer, V and the advantage are 0.

    Args:
        rewards_BGL: the reward for each token; that of the answer is at its last token.
        values_BGL: V_t, the value at the position that predicts token t, thus before it is known.
        mask_BGL: 1 at the tokens of an answer. Others are skipped, whatever their rewards and values. An answer whose
            reward failed must be masked.
        discount: gamma, 0 to 1.
        gae_lambda: lambda, 0 to 1. 1: returns are discounted sums of rewards. 0: one step of temporal difference.

    Returns:
        (advantages, returns), each float32 [B, G, L], 0 where the mask is 0. Advantages are not whitened (`whiten`).
    """
    mask_BGL = np.asarray(mask_BGL) > 0
    rewards_BGL = np.asarray(rewards_BGL, np.float64)
    values_BGL = np.where(mask_BGL, np.asarray(values_BGL, np.float64), 0.0)
    advantages_BGL = np.zeros_like(values_BGL)
    next_value = next_advantage = np.zeros(values_BGL.shape[:-1])
    for t in reversed(range(values_BGL.shape[-1])):
        real, value = mask_BGL[..., t], values_BGL[..., t]
        advantage = rewards_BGL[..., t] + discount * next_value - value + discount * gae_lambda * next_advantage
        advantages_BGL[..., t] = np.where(real, advantage, 0.0)
        next_value = np.where(real, value, next_value)
        next_advantage = np.where(real, advantage, next_advantage)
    return advantages_BGL.astype(np.float32), (advantages_BGL + values_BGL).astype(np.float32)


def whiten(advantages_BGL: np.ndarray, mask_BGL: np.ndarray) -> np.ndarray:
    """float32: the advantages of the step's tokens with mean 0 and variance 1; 0 where the mask is 0.

    The variance divides by the number of tokens - 1, as in TRL. A step without spread has advantage 0.
    """
    mask_BGL = np.asarray(mask_BGL) > 0
    tokens = np.asarray(advantages_BGL, np.float64)[mask_BGL]
    whitened_BGL = np.zeros(mask_BGL.shape, np.float32)
    if tokens.size > 1:
        whitened_BGL[mask_BGL] = (tokens - tokens.mean()) / np.sqrt(tokens.var(ddof=1) + WHITEN_EPSILON)
    return whitened_BGL


def overlong_penalty(lengths_BG: np.ndarray, limit: int, buffer: int) -> np.ndarray:
    """float32 [B, G], -1 to 0: DAPO's soft penalty for long answers (section 3.4, equation 13), added to the reward.

    0 up to `limit - buffer` tokens, then it falls linearly, to -1 at `limit` tokens and beyond.

    Args:
        lengths_BG: tokens of each answer, with EOS. Not characters.
        limit: tokens, such as `data.targets_length`.
        buffer: tokens before the limit over which the penalty falls; 0: no penalty.
    """
    lengths_BG = np.asarray(lengths_BG, np.float64)
    if not buffer:
        return np.zeros(lengths_BG.shape, np.float32)
    return np.clip((limit - buffer - lengths_BG) / buffer, -1.0, 0.0).astype(np.float32)
