"""Advantages against closed forms and loops in float64; rewards that failed; groups without spread."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from t5like.rl.advantages import advantages, gae, has_spread, overlong_penalty, whiten

NAN = float("nan")
GROUP_KINDS = ("grpo", "dr_grpo", "rloo")


def loop(kind: str, rewards_BG: np.ndarray) -> np.ndarray:
    """The definitions, one answer at a time."""
    result = np.zeros(rewards_BG.shape)
    for b, g in np.ndindex(rewards_BG.shape):
        reward = rewards_BG[b, g]
        group = rewards_BG[b] if kind != "reinforce" else rewards_BG.ravel()
        valid = [r for r in group if np.isfinite(r)]
        if not np.isfinite(reward) or len(set(valid)) < 2:
            continue
        mean = sum(valid) / len(valid)
        if kind == "grpo":
            std = (sum((r - mean) ** 2 for r in valid) / (len(valid) - 1)) ** 0.5
            result[b, g] = (reward - mean) / (std + 1e-4)
        elif kind == "rloo":
            result[b, g] = reward - (sum(valid) - reward) / (len(valid) - 1)
        else:
            result[b, g] = reward - mean
    return result


@pytest.mark.parametrize("kind, value", [("grpo", 0.86588), ("rloo", 0.66667), ("dr_grpo", 0.5), ("reinforce", 0.5)])
def test_advantages_of_two_right_and_two_wrong_answers(kind, value):
    np.testing.assert_allclose(advantages(kind, [[1, 0, 0, 1]]), [[value, -value, -value, value]], atol=5e-6)


@pytest.mark.parametrize("kind", [*GROUP_KINDS, "reinforce"])
def test_advantages_are_those_of_a_loop(rng, kind):
    rewards = rng.normal(size=(7, 5)) * 10
    rewards[1] = 2.5
    rewards[2, :3] = NAN
    rewards[3, 1:] = NAN
    rewards[4] = NAN
    rewards[5, 0], rewards[5, 1] = np.inf, -np.inf
    result = advantages(kind, rewards)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, loop(kind, rewards), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [*GROUP_KINDS, "reinforce"])
def test_an_answer_whose_reward_failed_has_advantage_0_and_is_in_no_baseline(kind):
    with_failed = advantages(kind, [[1.0, NAN, 0.0, 0.0]])
    assert with_failed[0, 1] == 0
    np.testing.assert_array_equal(with_failed[:, [0, 2, 3]], advantages(kind, [[1.0, 0.0, 0.0]]))


@pytest.mark.parametrize("kind", GROUP_KINDS)
@pytest.mark.parametrize(
    "group",
    [[0.7] * 4, [0.3, 0.1 + 0.2, 0.3, 0.3], [-1e6, 1e-4 - 1e6, -1e6, -1e6], [NAN, NAN, 5.0, NAN], [NAN] * 4],
    ids=["equal", "equal but for rounding", "equal and large", "one reward", "none"],
)
def test_a_group_without_spread_has_advantage_0(kind, group):
    np.testing.assert_array_equal(advantages(kind, [group, [0.0, 1.0, 2.0, 3.0]])[0], 0.0)
    np.testing.assert_array_equal(has_spread([group, [0.0, 1.0, 2.0, 3.0]]), [False, True])


def test_groups_do_not_affect_each_other_unless_the_baseline_is_that_of_the_step(rng):
    rewards = rng.normal(size=(3, 4))
    other = rewards.copy()
    other[1:] += rng.normal(size=(2, 4))
    for kind in GROUP_KINDS:
        np.testing.assert_array_equal(advantages(kind, rewards)[0], advantages(kind, other)[0])
    assert (advantages("reinforce", rewards)[0] != advantages("reinforce", other)[0]).all()


def test_the_batch_mean_keeps_the_advantage_of_a_group_whose_answers_are_all_right():
    np.testing.assert_array_equal(advantages("reinforce", [[1, 1], [0, 0]]), [[0.5, 0.5], [-0.5, -0.5]])
    np.testing.assert_array_equal(advantages("reinforce", [[1, 1], [1, NAN]]), np.zeros((2, 2)))


def test_no_other_name_is_an_advantage_of_rewards():
    with pytest.raises(ValueError, match="gae"):
        advantages("gae", [[1, 0]])


def ragged(rng, groups=2, size=3, length=6):
    lengths = rng.integers(1, length + 1, (groups, size))
    return np.arange(length) < lengths[..., None]


@pytest.mark.parametrize("discount, gae_lambda", list(itertools.product([1.0, 0.9], [1.0, 0.95, 0.0])))
def test_gae_is_the_sum_of_discounted_differences(rng, discount, gae_lambda):
    mask = ragged(rng)
    rewards, values = rng.normal(size=mask.shape), rng.normal(size=mask.shape)
    wanted = np.zeros(mask.shape)
    for b, g in np.ndindex(mask.shape[:2]):
        n = mask[b, g].sum()
        v = np.append(values[b, g, :n], 0.0)  # after the last token: 0
        delta = rewards[b, g, :n] + discount * v[1:] - v[:-1]
        for t in range(n):
            wanted[b, g, t] = sum((discount * gae_lambda) ** (k - t) * delta[k] for k in range(t, n))
    result, returns = gae(rewards, values, mask, discount, gae_lambda)
    assert result.dtype == returns.dtype == np.float32
    np.testing.assert_allclose(result, wanted, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(returns, np.where(mask, wanted + values, 0), rtol=1e-6, atol=1e-6)


def test_with_lambda_1_the_return_of_each_token_is_its_discounted_reward_to_go():
    reward_at_the_end = np.zeros((1, 1, 4))
    reward_at_the_end[..., 3] = 2.0
    _, returns = gae(reward_at_the_end, np.full((1, 1, 4), 0.7), np.ones((1, 1, 4)), 0.5, 1.0)
    np.testing.assert_allclose(returns, [[[0.25, 0.5, 1.0, 2.0]]], rtol=1e-6)


def test_gae_skips_masked_tokens_whatever_they_hold():
    mask = np.array([[[1, 0, 1, 0, 0]]])
    rewards, values = np.array([[[0.5, NAN, 2.0, NAN, 9.0]]]), np.array([[[1.0, NAN, 3.0, 7.0, NAN]]])
    short = gae(rewards[..., [0, 2]], values[..., [0, 2]], np.ones((1, 1, 2)), 0.9, 0.8)
    for x, wanted in zip(gae(rewards, values, mask, 0.9, 0.8), short, strict=True):
        np.testing.assert_array_equal(x[..., [0, 2]], wanted)
        np.testing.assert_array_equal(x[..., [1, 3, 4]], 0.0)


def test_whitened_advantages_have_mean_0_and_variance_1_over_the_tokens(rng):
    mask = ragged(rng)
    values = np.where(mask, rng.normal(3, 5, mask.shape), NAN)
    result = whiten(values, mask)
    assert result.dtype == np.float32 and (result[~mask] == 0).all()
    np.testing.assert_allclose(result[mask].mean(), 0, atol=1e-6)
    np.testing.assert_allclose(result[mask].astype(np.float64).var(ddof=1), 1, rtol=1e-5)
    order = np.argsort(values[mask])
    assert (np.diff(result[mask][order]) > 0).all()


def test_whitening_equal_advantages_gives_0():
    np.testing.assert_allclose(whiten(np.full((1, 2, 3), 0.1), np.ones((1, 2, 3))), 0.0, atol=1e-9)
    np.testing.assert_array_equal(whiten([[[4.0, 2.0]]], [[[1, 0]]]), 0.0)
    np.testing.assert_array_equal(whiten([[[4.0, 2.0]]], [[[0, 0]]]), 0.0)


def test_the_overlong_penalty_falls_to_minus_1_over_the_last_tokens_and_no_further():
    lengths = [[0, 11, 12, 13, 15], [16, 17, 30, 1000, 14]]
    wanted = [[0, 0, 0, -0.25, -0.75], [-1, -1, -1, -1, -0.5]]
    np.testing.assert_array_equal(overlong_penalty(lengths, limit=16, buffer=4), wanted)
    np.testing.assert_array_equal(overlong_penalty(lengths, limit=16, buffer=0), np.zeros((2, 5)))


def test_processes_that_compute_rewards_do_not_load_jax():
    command = "import sys, t5like.rl.advantages; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0
