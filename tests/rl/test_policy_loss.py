"""The policy loss against loops and finite differences in float64, and the traps of sums, masks, ratios and KL."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from t5like.config.rl_schema import RLConfig
from t5like.optim.losses import Loss
from t5like.rl.policy_loss import kl, policy_loss
from t5like.types import Sum, add_metrics

LONGEST = 7  # max_answer_tokens
AGGREGATIONS = ("token_mean", "sequence_mean", "constant")
EVERYTHING = {"kl_coefficient": 0.3, "kl_estimator": "k2", "entropy_coefficient": 0.2, "value_coefficient": 0.7}
LEARNED = ("log_p_BGL", "entropy_BGL", "values_BGL")  # the arguments that have a gradient


def example(rng, groups=2, size=3, length=5, noise=0.5) -> dict[str, np.ndarray]:
    """Ragged answers, one of them without tokens, with log-ratios far beyond the limits of the clipping."""
    shape = (groups, size, length)
    lengths = rng.integers(1, length + 1, shape[:2])
    lengths[0, 1] = 0
    log_p = -rng.exponential(1.0, shape)
    values = rng.normal(size=shape)
    return {
        "log_p_BGL": log_p,
        "advantages_BGL": rng.normal(size=(groups, size, 1)),
        "mask_BGL": (np.arange(length) < lengths[..., None]).astype(np.float64),
        "old_log_p_BGL": log_p + noise * rng.normal(size=shape),
        "sampler_log_p_BGL": log_p + noise * rng.normal(size=shape),
        "reference_log_p_BGL": log_p + noise * rng.normal(size=shape),
        "entropy_BGL": rng.exponential(1.0, shape),
        "values_BGL": values,
        "old_values_BGL": values + noise * rng.normal(size=shape),
        "returns_BGL": values + rng.normal(size=shape),
    }


def loop(rl: RLConfig, x: dict[str, np.ndarray]) -> float:
    """The mean loss by the definitions of the papers, one token at a time."""
    answers, tokens = [], 0
    for b, g in np.ndindex(x["mask_BGL"].shape[:2]):
        n = int(x["mask_BGL"][b, g].sum())
        a = {name: array[b, g, : n if array.shape[-1] > 1 else 1] for name, array in x.items()}
        log_ratios = a["log_p_BGL"] - a["old_log_p_BGL"]
        losses = []
        for t in range(n):
            ratio = np.exp(log_ratios.mean() if rl.ratio == "sequence" else log_ratios[t])
            advantage = np.broadcast_to(a["advantages_BGL"], n)[t]
            term = -min(ratio * advantage, min(max(ratio, 1 - rl.clip_low), 1 + rl.clip_high) * advantage)
            if rl.importance_cap:
                term *= min(np.exp(a["old_log_p_BGL"][t] - a["sampler_log_p_BGL"][t]), rl.importance_cap)
            term += rl.kl_coefficient * 0.5 * (a["log_p_BGL"][t] - a["reference_log_p_BGL"][t]) ** 2
            term -= rl.entropy_coefficient * a["entropy_BGL"][t]
            value, old, target = a["values_BGL"][t], a["old_values_BGL"][t], a["returns_BGL"][t]
            clipped = old + min(max(value - old, -rl.value_clip), rl.value_clip)
            term += rl.value_coefficient * 0.5 * max((value - target) ** 2, (clipped - target) ** 2)
            losses.append(term)
        tokens += n
        answers += [losses] if n else []
    if rl.aggregation == "token_mean":
        return sum(map(sum, answers)) / tokens
    if rl.aggregation == "sequence_mean":
        return sum(sum(losses) / len(losses) for losses in answers) / len(answers)
    return sum(map(sum, answers)) / (len(answers) * LONGEST)


def as_float32(x):
    return {name: jnp.asarray(array, jnp.float32) for name, array in x.items()}


@functools.cache
def compiled_loss(rl: RLConfig):
    return jax.jit(lambda x: policy_loss(rl, LONGEST, **x))


def loss_of(rl: RLConfig, x: dict[str, np.ndarray]) -> Loss:
    return compiled_loss(rl)(as_float32(x))


def mean_of(loss: Loss) -> float:
    """What the train step minimizes: the objective over the weight of the metric `loss`."""
    return float(loss.objective / loss.metrics["loss"].weight)


@functools.cache
def compiled_gradients(rl: RLConfig):
    def mean(learned, rest):
        loss = policy_loss(rl, LONGEST, **learned, **rest)
        return loss.objective / loss.metrics["loss"].weight, loss

    return jax.jit(jax.grad(mean, has_aux=True))


def gradients_and_loss(rl: RLConfig, x: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], Loss]:
    """The gradients of the mean loss."""
    x = as_float32(x)
    learned = {name: x.pop(name) for name in LEARNED if name in x}
    return compiled_gradients(rl)(learned, x)


def gradients(rl: RLConfig, x: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return gradients_and_loss(rl, x)[0]


@pytest.mark.parametrize("ratio, aggregation", list(itertools.product(["token", "sequence"], AGGREGATIONS)))
def test_loss_and_gradients_are_those_of_a_loop_in_float64(rng, ratio, aggregation):
    cap = 1.3 if ratio == "token" else 0.0  # with both, each token's gradient has its own importance weight
    rl = RLConfig(ratio=ratio, aggregation=aggregation, importance_cap=cap, **EVERYTHING)
    x = example(rng)
    of_all, loss = gradients_and_loss(rl, x)
    np.testing.assert_allclose(mean_of(loss), loop(rl, x), rtol=1e-5)
    for name, gradient in of_all.items():
        for place in np.ndindex(gradient.shape):
            high, low = (loop(rl, x | {name: moved}) for moved in moves(x[name], place))
            np.testing.assert_allclose(gradient[place], (high - low) / 2e-6, atol=2e-5, err_msg=f"{name} {place}")


def moves(array, place):
    """The array with one number moved up, and down, by 1e-6."""
    for sign in (1, -1):
        moved = array.copy()
        moved[place] += sign * 1e-6
        yield moved


def test_on_policy_the_gradient_is_that_of_reinforce(rng):
    """Without old log-probabilities each ratio is 1, and its gradient that of the log-probability."""
    x = example(rng)
    x = {name: x[name] for name in ("log_p_BGL", "advantages_BGL", "mask_BGL")}
    for ratio in ("token", "sequence"):
        rl = RLConfig(ratio=ratio, aggregation="token_mean")
        wanted = -x["advantages_BGL"] * x["mask_BGL"] / x["mask_BGL"].sum()
        of_all, loss = gradients_and_loss(rl, x)
        np.testing.assert_allclose(of_all["log_p_BGL"], wanted, rtol=1e-5)
        metrics = loss.metrics
        assert metrics["ratio/mean"].mean() == 1 and metrics["clip_ratio/region_mean"].mean() == 0


def test_only_the_policy_the_entropy_and_the_values_have_a_gradient(rng):
    x = as_float32(example(rng))
    of_all = jax.jit(jax.grad(lambda x: policy_loss(RLConfig(**EVERYTHING), LONGEST, **x).objective))(x)
    assert {name for name, gradient in of_all.items() if gradient.any()} == set(LEARNED)


def test_a_masked_token_has_no_effect_whatever_its_values(rng):
    x = example(rng)
    rl = RLConfig(**EVERYTHING)
    spoiled = {name: np.where(x["mask_BGL"] > 0, array, np.nan) for name, array in x.items()}
    spoiled["mask_BGL"] = x["mask_BGL"]
    for ours, wanted in zip(
        jax.tree.leaves(gradients_and_loss(rl, spoiled)),
        jax.tree.leaves(gradients_and_loss(rl, x)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_answers_without_tokens_leave_every_denominator(rng, aggregation):
    x = example(rng, groups=1, size=3)
    rl = RLConfig(aggregation=aggregation, ratio="sequence", **EVERYTHING)
    without = {name: array[:, [0, 2]] for name, array in x.items()}
    for ours, wanted in zip(
        jax.tree.leaves(loss_of(rl, x).metrics), jax.tree.leaves(loss_of(rl, without).metrics), strict=True
    ):
        np.testing.assert_allclose(ours, wanted, rtol=1e-6)
    nothing = loss_of(rl, x | {"mask_BGL": np.zeros((1, 3, 5))})
    assert not any(jax.tree.leaves(nothing))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_microbatches_add_up_to_the_whole_batch(rng, aggregation):
    """Their numbers of tokens differ: a mean of their means is another number."""
    rl = RLConfig(aggregation=aggregation, **EVERYTHING)
    x = example(rng, groups=4)
    whole = loss_of(rl, x)
    parts = [loss_of(rl, {name: array[[i]] for name, array in x.items()}) for i in range(4)]
    objective, metrics = (
        sum(part.objective for part in parts),
        functools.reduce(add_metrics, [part.metrics for part in parts]),
    )
    for ours, wanted in zip(jax.tree.leaves((objective, metrics)), jax.tree.leaves(tuple(whole)), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-6)
    assert abs(np.mean([mean_of(part) for part in parts]) - mean_of(whole)) > 1e-3


def test_a_mesh_gives_the_numbers_of_one_device(rng):
    rl = RLConfig(aggregation="sequence_mean", ratio="sequence", **EVERYTHING)
    x = as_float32(example(rng, groups=8))
    mesh = jax.make_mesh((8,), ("data",))
    split = jax.device_put(x, jax.sharding.NamedSharding(mesh, PartitionSpec("data")))
    assert len(split["log_p_BGL"].sharding.device_set) == 8
    for ours, wanted in zip(jax.tree.leaves(loss_of(rl, split)), jax.tree.leaves(loss_of(rl, x)), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-6)


def test_leading_dims_are_arbitrary_and_token_means_allow_packed_rows(rng):
    x = example(rng)
    x["advantages_BGL"] = np.broadcast_to(x["advantages_BGL"], x["mask_BGL"].shape)
    rl = RLConfig(aggregation="token_mean", **EVERYTHING)
    wanted = mean_of(loss_of(rl, x))
    for shape in ((6, 5), (1, 30)):  # one row per answer; all answers in one row
        ours = mean_of(loss_of(rl, {name: array.reshape(shape) for name, array in x.items()}))
        np.testing.assert_allclose(ours, wanted, rtol=1e-5)


@pytest.mark.parametrize("log_ratio", [1000.0, -1000.0])
def test_log_ratios_are_clamped_before_exp(log_ratio):
    x = {
        "log_p_BGL": np.full((1, 1, 2), -1.0),
        "advantages_BGL": np.full((1, 1, 1), -1.0),
        "mask_BGL": np.ones((1, 1, 2)),
        "old_log_p_BGL": np.full((1, 1, 2), -1.0 - log_ratio),
        "reference_log_p_BGL": np.full((1, 1, 2), -1.0 + log_ratio),
    }
    for ratio in ("token", "sequence"):
        rl = RLConfig(ratio=ratio, kl_coefficient=1.0, kl_estimator="k3")
        of_all, loss = gradients_and_loss(rl, x)
        assert np.isfinite(jax.tree.leaves(loss)).all()
        assert np.isfinite(of_all["log_p_BGL"]).all()
        assert float(loss.metrics["ratio/mean"].mean()) == pytest.approx(np.exp(np.sign(log_ratio) * 20), rel=1e-5)


def clipping(ratio: str = "token", **changed):
    """Ratios 0.5, 1 and 2 of three tokens of a good, and of a bad answer."""
    log_p = np.log([[[0.5, 1.0, 2.0], [0.5, 1.0, 2.0]]]) - 1
    x = {
        "log_p_BGL": log_p,
        "advantages_BGL": np.array([[[1.0], [-1.0]]]),
        "mask_BGL": np.ones((1, 2, 3)),
        "old_log_p_BGL": np.full((1, 2, 3), -1.0),
    }
    rl = RLConfig(ratio=ratio, **{"clip_low": 0.2, "clip_high": 0.28} | changed)
    return rl, x, loss_of(rl, x)


def test_clipped_tokens_are_counted_and_have_no_gradient():
    rl, x, loss = clipping()
    metrics = {name: value.mean() for name, value in loss.metrics.items()}
    assert metrics["clip_ratio/low_mean"] == metrics["clip_ratio/high_mean"] == pytest.approx(1 / 6)
    assert metrics["clip_ratio/region_mean"] == pytest.approx(2 / 6)
    assert metrics["ratio/mean"] == pytest.approx(3.5 / 3) and metrics["ratio/max"] == pytest.approx(2)
    assert float(loss.objective) == pytest.approx(-(0.5 + 1 + 1.28) + (0.8 + 1 + 2), rel=1e-6)
    np.testing.assert_allclose(
        gradients(rl, x)["log_p_BGL"], np.array([[[-0.5, -1, 0], [0, 1, 2]]]) / 6, rtol=1e-5, atol=1e-7
    )


def test_a_sequence_ratio_clips_whole_answers():
    _, x, loss = clipping("sequence")  # the geometric mean of the ratios is 1
    assert loss.metrics["clip_ratio/region_mean"].mean() == 0
    x = x | {"old_log_p_BGL": x["old_log_p_BGL"] - np.array([[[0.5], [0.0]]])}  # exp(0.5) > 1.28, advantage 1
    rl = RLConfig(ratio="sequence", clip_low=0.2, clip_high=0.28)
    loss = loss_of(rl, x)
    assert loss.metrics["clip_ratio/high_mean"] == Sum(1.0, 2.0)
    assert loss.metrics["clip_ratio/low_mean"] == Sum(0.0, 2.0)
    np.testing.assert_allclose(
        gradients(rl, x)["log_p_BGL"], np.array([[[0, 0, 0], [1, 1, 1]]]) / 6, rtol=1e-5, atol=1e-7
    )


def test_the_sampler_gap_is_reported_and_the_importance_weight_truncated(rng):
    x = example(rng)
    x = {name: x[name] for name in ("log_p_BGL", "advantages_BGL", "mask_BGL", "sampler_log_p_BGL")}
    mask, gap = x["mask_BGL"] > 0, (x["log_p_BGL"] - x["sampler_log_p_BGL"])
    weight = np.minimum(np.exp(gap), 1.2)
    rl = RLConfig(importance_cap=1.2)
    loss = loss_of(rl, x)
    metrics = {name: value.mean() for name, value in loss.metrics.items()}
    assert metrics["sampler_gap"] == pytest.approx(np.abs(gap)[mask].mean(), rel=1e-5)
    assert metrics["sampler_kl"] == pytest.approx((np.exp(gap) - 1 - gap)[mask].mean(), rel=1e-5)
    assert metrics["importance_weight/mean"] == pytest.approx(weight[mask].mean(), rel=1e-5)
    assert 0 < metrics["importance_weight/capped"] == pytest.approx((np.exp(gap) > 1.2)[mask].mean())
    wanted = -x["advantages_BGL"] * weight * mask  # the weight has no gradient
    for ratio in ("token", "sequence"):
        gradient = gradients(dataclasses.replace(rl, ratio=ratio), x)["log_p_BGL"]
        np.testing.assert_allclose(gradient, wanted / mask.sum(), rtol=1e-5, atol=1e-7)
    off = loss_of(dataclasses.replace(rl, importance_cap=0), x)
    np.testing.assert_allclose(off.objective, -(x["advantages_BGL"] * mask).sum(), rtol=1e-5)
    assert off.metrics["sampler_gap"].mean() == metrics["sampler_gap"]


def test_kl_as_reward_is_reported_and_no_term_of_the_loss(rng):
    x = example(rng)
    x = {name: x[name] for name in ("log_p_BGL", "advantages_BGL", "mask_BGL", "reference_log_p_BGL")}
    as_reward = loss_of(RLConfig(kl_as="reward", kl_coefficient=0.5, kl_estimator="k1"), x)
    as_loss = loss_of(RLConfig(kl_as="loss", kl_coefficient=0.5, kl_estimator="k1"), x)
    mask = x["mask_BGL"] > 0
    wanted = (x["log_p_BGL"] - x["reference_log_p_BGL"])[mask]
    for loss in (as_reward, as_loss):
        assert loss.metrics["kl"].mean() == pytest.approx(wanted.mean(), rel=1e-5)
    np.testing.assert_allclose(as_loss.objective - as_reward.objective, 0.5 * wanted.sum(), rtol=1e-5)
    np.testing.assert_allclose(as_reward.objective, -(x["advantages_BGL"] * mask).sum(), rtol=1e-5)


def test_value_clip_0_does_not_clip(rng):
    x = example(rng)
    mask = x["mask_BGL"] > 0
    loss = loss_of(RLConfig(value_clip=0), x)
    squares = 0.5 * np.square(x["values_BGL"] - x["returns_BGL"])[mask]
    assert loss.metrics["value_loss"].mean() == pytest.approx(squares.mean(), rel=1e-5)
    assert loss.metrics["value_loss"].mean() < loss_of(RLConfig(value_clip=0.2), x).metrics["value_loss"].mean()


@pytest.mark.parametrize("estimator, value", [("k1", 0.5), ("k2", 0.125), ("k3", 0.106531), ("k3_plus", 0.106531)])
def test_kl_of_a_token_by_each_estimator(estimator, value):
    assert float(kl(estimator, jnp.float32(-1.0), jnp.float32(-1.5))) == pytest.approx(value, abs=1e-6)
    assert abs(float(kl(estimator, jnp.float32(-1.0), jnp.float32(-1.0)))) == 0


def test_values_and_gradients_of_the_kl_estimators_in_expectation(rng):
    """Over all tokens of a vocabulary, weighted by their probability under the policy.

    k1 and k3 have the value of KL(policy || reference), k2 and k3_plus its gradient. The gradient of k1 is 0, and that
    of k3 is the gradient of KL(reference || policy).
    """
    logits, reference_logits = jnp.asarray(rng.normal(size=(2, 6)), jnp.float32)
    reference = jax.nn.log_softmax(reference_logits)

    def exact(logits, backward=False):
        log_p = jax.nn.log_softmax(logits)
        first, second = (reference, log_p) if backward else (log_p, reference)
        return jnp.sum(jnp.exp(first) * (first - second))

    @jax.jit
    def of_estimators(logits):
        share = jnp.exp(jax.nn.log_softmax(logits))  # the tokens are samples: their shares have no gradient
        expected = lambda x, name: jnp.sum(share * kl(name, jax.nn.log_softmax(x), reference))
        return {
            name: jax.value_and_grad(lambda x, name=name: expected(x, name))(logits)
            for name in ("k1", "k2", "k3", "k3_plus")
        }

    estimates = of_estimators(logits)
    value, gradient = jax.value_and_grad(exact)(logits)
    for name in ("k1", "k3", "k3_plus"):
        np.testing.assert_allclose(estimates[name][0], value, rtol=1e-5)
    for name in ("k2", "k3_plus"):
        np.testing.assert_allclose(estimates[name][1], gradient, atol=1e-6)
    np.testing.assert_allclose(estimates["k1"][1], 0, atol=1e-6)
    other = jax.grad(lambda x: exact(x, backward=True))(logits)
    np.testing.assert_allclose(estimates["k3"][1], other, atol=1e-6)
    assert np.abs(other - gradient).max() > 0.05
