"""Losses of pairs against formulas and finite differences in float64; padding, microbatches, extreme probabilities."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5like.config.rl_schema import RLConfig
from t5like.optim.losses import Loss
from t5like.rl.preference_loss import preference_loss, reward_model_loss

METHODS = ("dpo", "ipo", "orpo", "simpo")
CHOSEN, REJECTED = "chosen_log_p_B", "rejected_log_p_B"
REFERENCES = ("reference_chosen_log_p_B", "reference_rejected_log_p_B")


def config(method: str, **changed) -> RLConfig:
    return RLConfig(method=method, **{"beta": 0.7, "margin": 0.4} | changed)


def example(rng, pairs=6) -> dict[str, np.ndarray]:
    x = {"chosen_tokens_B": rng.integers(1, 9, pairs), "rejected_tokens_B": rng.integers(1, 9, pairs)}
    for name in (CHOSEN, REJECTED, *REFERENCES):
        tokens = x["chosen_tokens_B" if "chosen" in name else "rejected_tokens_B"]
        x[name] = -rng.uniform(0.2, 1.5, pairs) * tokens
    return x


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def loop(rl: RLConfig, x: dict[str, np.ndarray]) -> float:
    """The sum over pairs by the definitions of the papers, one pair at a time."""
    total = 0.0
    for i, (n, m) in enumerate(zip(x["chosen_tokens_B"], x["rejected_tokens_B"], strict=True)):
        chosen, rejected, reference_chosen, reference_rejected = (
            x[name][i] for name in (CHOSEN, REJECTED, *REFERENCES)
        )
        a, b = chosen - reference_chosen, rejected - reference_rejected
        if rl.method == "dpo":
            total -= math.log(sigmoid(rl.beta * (a - b)))
        elif rl.method == "ipo":
            total += (a / n - b / m - 1 / (2 * rl.beta)) ** 2
        elif rl.method == "simpo":
            total -= math.log(sigmoid(rl.beta / n * chosen - rl.beta / m * rejected - rl.margin))
        else:
            p, q = math.exp(chosen / n), math.exp(rejected / m)
            ratio = (p / (1 - p)) / (q / (1 - q))
            total += -chosen / n - rl.beta * math.log(sigmoid(math.log(ratio)))
    return total


@functools.cache
def compiled(rl: RLConfig):
    def objective(learned, rest):
        loss = preference_loss(rl, **learned, **rest)
        return loss.objective, loss

    return jax.jit(jax.grad(objective, has_aux=True))


def gradients_and_loss(rl: RLConfig, x: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], Loss]:
    """The gradients of every argument but the numbers of tokens, and the loss."""
    learned = {name: jnp.asarray(array, jnp.float32) for name, array in x.items() if "tokens" not in name}
    return compiled(rl)(learned, {name: jnp.asarray(array) for name, array in x.items() if "tokens" in name})


def loss_of(rl: RLConfig, x: dict[str, np.ndarray]) -> Loss:
    return gradients_and_loss(rl, x)[1]


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients_are_those_of_a_loop_in_float64(rng, method):
    rl, x = config(method), example(rng)
    of_all, loss = gradients_and_loss(rl, x)
    np.testing.assert_allclose(loss.objective, loop(rl, x), rtol=1e-5)
    assert loss.metrics["loss"].total == loss.objective and loss.metrics["loss"].weight == 6
    for name, gradient in of_all.items():
        for i in range(6):
            moved = [x[name] + sign * 1e-6 * (np.arange(6) == i) for sign in (1, -1)]
            high, low = (loop(rl, x | {name: array}) for array in moved)
            wanted = 0.0 if name in REFERENCES else (high - low) / 2e-6
            np.testing.assert_allclose(gradient[i], wanted, rtol=1e-4, atol=1e-6, err_msg=f"{name} {i}")


def one_pair(chosen: float, rejected: float, tokens: int = 1) -> dict[str, np.ndarray]:
    return {
        CHOSEN: np.array([chosen], np.float32),
        REJECTED: np.array([rejected], np.float32),
        "chosen_tokens_B": np.array([tokens]),
        "rejected_tokens_B": np.array([tokens]),
        REFERENCES[0]: np.array([-5.0], np.float32),
        REFERENCES[1]: np.array([-5.0], np.float32),
    }


def test_dpo_of_a_difference_of_2():
    loss = loss_of(config("dpo", beta=0.1), one_pair(-4.0, -6.0))
    assert float(loss.objective) == pytest.approx(0.598139, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_rewards_and_log_probabilities_are_reported_as_by_trl(rng, method):
    rl, x = config(method), example(rng)
    means = {name: value.mean() for name, value in loss_of(rl, x).metrics.items()}
    if method in ("dpo", "ipo"):
        chosen, rejected = x[CHOSEN], x[REJECTED]
        rewards = [0.7 * (chosen - x[REFERENCES[0]]), 0.7 * (rejected - x[REFERENCES[1]])]
    else:
        chosen, rejected = x[CHOSEN] / x["chosen_tokens_B"], x[REJECTED] / x["rejected_tokens_B"]
        rewards = [0.7 * chosen, 0.7 * rejected]
    wanted = {
        "logps/chosen": chosen.mean(),
        "logps/rejected": rejected.mean(),
        "rewards/chosen": rewards[0].mean(),
        "rewards/rejected": rewards[1].mean(),
        "rewards/margins": (rewards[0] - rewards[1]).mean(),
        "rewards/accuracies": (rewards[0] > rewards[1]).mean(),
        "loss": loop(rl, x) / 6,
    } | ({"nll_loss": -chosen.mean()} if method == "orpo" else {})
    assert means == pytest.approx(wanted, rel=1e-5)
    assert 0 < means["rewards/accuracies"] < 1


def test_weights_equal_to_the_reference_prefer_half_of_the_pairs(rng):
    x = example(rng)
    x[REFERENCES[0]], x[REFERENCES[1]] = x[CHOSEN], x[REJECTED]
    loss = preference_loss(config("dpo"), **x)
    assert loss.metrics["rewards/accuracies"].total / 6 == 0.5 and loss.metrics["rewards/margins"].total == 0


@pytest.mark.parametrize("method", METHODS)
def test_padding_pairs_leave_every_denominator_whatever_their_values(rng, method):
    rl, x = config(method), example(rng)
    padded = {name: np.append(array, np.nan if array.dtype == float else 0) for name, array in x.items()}
    padded["chosen_tokens_B"] = padded["chosen_tokens_B"].astype(int)
    padded["rejected_tokens_B"] = padded["rejected_tokens_B"].astype(int)
    of_all, loss = gradients_and_loss(rl, padded)
    wanted_of_all, wanted_loss = gradients_and_loss(rl, x)
    for ours, wanted in zip(jax.tree.leaves(loss), jax.tree.leaves(wanted_loss), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-6)
    for name, gradient in of_all.items():
        np.testing.assert_allclose(gradient, np.append(wanted_of_all[name], 0.0), rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_microbatches_add_up_to_the_whole_batch(rng, method):
    rl, x = config(method), example(rng)
    x["chosen_tokens_B"][2] = 0  # padding: the microbatches have two pairs and three
    parts = [loss_of(rl, {name: array[rows] for name, array in x.items()}) for rows in (slice(0, 3), slice(3, 6))]
    total = jax.tree.map(lambda a, b: a + b, *parts)
    for ours, wanted in zip(jax.tree.leaves(total), jax.tree.leaves(loss_of(rl, x)), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-5)


def log_odds(log_p: float) -> float:
    return log_p - math.log(-math.expm1(log_p))


def test_the_odds_ratio_is_exact_near_probability_0_and_1():
    rl = config("orpo", beta=1.0)
    for chosen, rejected in [(-1e-5, -2e-5), (-0.69, -0.7), (-40.0, -60.0), (-1e-5, -50.0), (-60.0, -1e-5)]:
        wanted = -chosen + np.logaddexp(0.0, log_odds(rejected) - log_odds(chosen))
        assert float(loss_of(rl, one_pair(chosen, rejected)).objective) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_losses_and_gradients_are_finite_at_probability_0_and_1(method):
    pairs = [(0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (-1e4, -1.0), (-1e4, 0.0)]
    x = {name: np.repeat(array, len(pairs)) for name, array in one_pair(0.0, 0.0).items()}
    x |= {CHOSEN: np.array(pairs, np.float32)[:, 0], REJECTED: np.array(pairs, np.float32)[:, 1]}
    of_all, loss = gradients_and_loss(config(method), x)
    assert np.isfinite(loss.objective) and all(np.isfinite(gradient).all() for gradient in of_all.values())


def test_a_reward_model_learns_by_bradley_terry_with_a_margin(rng):
    chosen, rejected = rng.normal(size=(2, 5))
    rl = RLConfig(method="reward_model", margin=0.3)
    score = lambda chosen: reward_model_loss(rl, chosen, jnp.asarray(rejected, jnp.float32))
    loss, gradient = jax.jit(lambda x: (score(x), jax.grad(lambda x: score(x).objective)(x)))(
        jnp.asarray(chosen, jnp.float32)
    )
    margins = [a - b - 0.3 for a, b in zip(chosen, rejected, strict=True)]
    np.testing.assert_allclose(loss.objective, -sum(math.log(sigmoid(margin)) for margin in margins), rtol=1e-5)
    np.testing.assert_allclose(gradient, [sigmoid(margin) - 1 for margin in margins], rtol=1e-5)
    means = {name: value.mean() for name, value in loss.metrics.items()}
    assert means == pytest.approx(
        {
            "loss": float(loss.objective) / 5,
            "rewards/chosen": chosen.mean(),
            "rewards/rejected": rejected.mean(),
            "rewards/margins": (chosen - rejected).mean(),
            "rewards/accuracies": (chosen > rejected).mean(),
        },
        rel=1e-5,
    )


def test_padding_pairs_of_a_reward_model_have_no_weight():
    rl = RLConfig(method="reward_model")
    scores = jnp.array([1.0, jnp.nan]), jnp.array([0.5, jnp.inf])
    loss = jax.jit(lambda a, b: reward_model_loss(rl, a, b, jnp.array([1, 0])))(*scores)
    assert float(loss.objective) == pytest.approx(math.log1p(math.exp(-0.5)), rel=1e-6)
    assert loss.metrics["loss"].weight == 1 and loss.metrics["rewards/chosen"].mean() == 1


def test_no_other_method_is_a_loss_of_pairs():
    with pytest.raises(ValueError, match="policy"):
        preference_loss(config("policy"), *(jnp.ones(1) for _ in range(4)))
