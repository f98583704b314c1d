"""The loss of a policy on sampled answers, as sums: clipped ratios, KL, entropy, values. In float32.

Papers: PPO (Schulman et al. 2017, arXiv:1707.06347, section 3), GRPO (Shao et al. 2024, arXiv:2402.03300, section 4.1),
DAPO (Yu et al. 2025, arXiv:2503.14476, sections 3.1 and 3.3), Dr. GRPO (Liu et al. 2025, arXiv:2503.20783, section
3.2), GSPO (Zheng et al. 2025, arXiv:2507.18071, section 4). Estimators of the KL divergence: Schulman 2020,
http://joschu.net/blog/kl-approx.html; truncated importance weights: Ionides 2008, doi:10.1198/106186008X320456.

Every term is one number per token, and all terms are aggregated alike (`rl.aggregation`), so that the objective is one
sum, which is divided once by the weight of the metric `loss`. One device, a mesh and microbatches give the same number.

Metrics, as sums; the mean is over tokens, or over answers with * if `rl.ratio` is "sequence":
    loss: its weight is the denominator of the aggregation.
    ratio/mean*, ratio/max: ratio of the probability to that before the first update with these answers; the largest.
    clip_ratio/low_mean*, clip_ratio/high_mean*, clip_ratio/region_mean*: share that is clipped, below, above, either.
    sampler_gap, sampler_kl: |log p - log p of the sampler|; KL(sampler || trainer) by k3.
    importance_weight/mean, importance_weight/capped: the weight; the share at the cap.
    kl, entropy, value_loss: without their coefficients.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from t5like.config.rl_schema import RLConfig
from t5like.optim.losses import Loss
from t5like.rl import answer_sums
from t5like.types import Largest, Metrics, Sum

LARGEST_LOG_RATIO = 20.0  # log-ratios are clamped to +-20 before exp, which is 4.9e8: finite also in sums of squares


def kl(estimator: Literal["k1", "k2", "k3", "k3_plus"], log_p: jax.Array, reference_log_p: jax.Array) -> jax.Array:
    """Estimate of KL(policy || reference) from each token that the policy sampled; nats, of any shape.

    With d = log p - log p of the reference: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. In expectation k1 and k3 are
    the KL divergence, and k2 nearly; k2 and k3 are never negative. Only the gradient of k2 is in expectation that of
    KL(policy || reference): that of k1 is 0, and that of k3 is of KL(reference || policy). k3_plus has the value of k3
    and the gradient of k2. As a part of the reward, which has no gradient, use k1.

    Args:
        estimator: `rl.kl_estimator`.
        log_p: of the sampled tokens under the policy.
        reference_log_p: of the same tokens under the reference; it has no gradient.
    """
    difference = log_p - jax.lax.stop_gradient(reference_log_p)
    if estimator == "k1":
        return difference
    k2 = 0.5 * jnp.square(difference)
    if estimator == "k2":
        return k2
    k3 = jnp.expm1(_clamped(-difference)) + difference
    return k3 if estimator == "k3" else k2 + jax.lax.stop_gradient(k3 - k2)


def policy_loss(
    rl: RLConfig,
    max_answer_tokens: int,
    log_p_BGL: jax.Array,
    advantages_BGL: jax.Array,
    mask_BGL: jax.Array,
    *,
    answers_BGL: jax.Array | None = None,
    old_log_p_BGL: jax.Array | None = None,
    sampler_log_p_BGL: jax.Array | None = None,
    reference_log_p_BGL: jax.Array | None = None,
    entropy_BGL: jax.Array | None = None,
    values_BGL: jax.Array | None = None,
    old_values_BGL: jax.Array | None = None,
    returns_BGL: jax.Array | None = None,
) -> Loss:
    """The clipped policy loss, with the KL divergence, the entropy bonus and the value loss that `rl` asks for.

    A masked token has no effect, whatever its values. An answer without tokens is in no denominator. Only the first
    log-probabilities, the entropy and the values have a gradient.

    Args:
        rl: the config section.
        max_answer_tokens: `data.targets_length`, for the aggregation "constant".
        log_p_BGL: of the tokens of the answers, at the sampling temperature. Leading dims are arbitrary.
        advantages_BGL: of each token, or [B, G, 1], of each row.
        mask_BGL: 1 at the tokens of an answer, with EOS.
        answers_BGL: the number of each token's answer in its row, from 1; 0: padding. None: each row is one answer.
        old_log_p_BGL: before the first update with these answers; None: this is the first update (on policy).
        sampler_log_p_BGL: as the sampler computed it. The policy term of each token is multiplied by
            min(exp(old - sampler), `rl.importance_cap`), if that is not 0.
        reference_log_p_BGL: of the reference model, for the KL divergence.
        entropy_BGL: of the distribution of each token.
        values_BGL: V_t, for PPO, with the next two.
        old_values_BGL, returns_BGL: the values that `advantages.gae` read, and its returns.
    """
    mask_BGL = mask_BGL > 0
    tokens, constants = partial(_tokens, mask_BGL), lambda x_BGL: jax.lax.stop_gradient(_tokens(mask_BGL, x_BGL))
    log_p_BGL = tokens(log_p_BGL)
    old_BGL = constants(log_p_BGL if old_log_p_BGL is None else old_log_p_BGL)
    loss_BGL, metrics = _surrogate(rl, log_p_BGL, old_BGL, constants(advantages_BGL), mask_BGL, answers_BGL)
    if sampler_log_p_BGL is not None:
        weight_BGL, of_weights = _importance(rl, old_BGL, constants(sampler_log_p_BGL), mask_BGL)
        loss_BGL, metrics = loss_BGL * weight_BGL, metrics | of_weights
    if reference_log_p_BGL is not None:
        kl_BGL = kl(rl.kl_estimator, log_p_BGL, constants(reference_log_p_BGL))
        metrics["kl"] = _mean(kl_BGL, mask_BGL)
        loss_BGL += (rl.kl_coefficient if rl.kl_as == "loss" else 0.0) * kl_BGL
    if entropy_BGL is not None:
        metrics["entropy"] = _mean(tokens(entropy_BGL), mask_BGL)
        loss_BGL -= rl.entropy_coefficient * tokens(entropy_BGL)
    if values_BGL is not None:
        value_BGL = _value_loss(rl, tokens(values_BGL), constants(old_values_BGL), constants(returns_BGL))
        metrics["value_loss"] = _mean(value_BGL, mask_BGL)
        loss_BGL += rl.value_coefficient * value_BGL
    metrics["loss"] = _aggregated(rl, max_answer_tokens, loss_BGL, mask_BGL, answers_BGL)
    return Loss(metrics["loss"].total, metrics)


def _tokens(mask_BGL, x_BGL):
    """float32, 0 where masked, so that a masked token has no gradient either, also if it is not finite."""
    return jnp.where(mask_BGL, x_BGL.astype(jnp.float32), 0.0)


def _surrogate(rl, log_p_BGL, old_BGL, advantages_BGL, mask_BGL, answers_BGL) -> tuple[jax.Array, Metrics]:
    """-min(ratio * advantage, clipped ratio * advantage) of each token."""
    log_ratio_BGL = log_p_BGL - old_BGL
    mean = _mean
    if rl.ratio == "sequence":
        # The value is the mean over the answer; each token has the gradient of its own log-probability (GSPO-token,
        # section 4.3). The sum is the gradient of GSPO if the advantage and the importance weight are the same for all
        # tokens of an answer.
        means_BGA, _ = _of_answers(log_ratio_BGL, mask_BGL, answers_BGL)
        means_BGL = jax.lax.stop_gradient(answer_sums.at_tokens(means_BGA, answers_BGL))
        log_ratio_BGL = log_p_BGL - jax.lax.stop_gradient(log_p_BGL) + means_BGL
        mean = partial(_mean_of_answers, answers_BGL=answers_BGL)
    ratio_BGL = jnp.exp(_clamped(log_ratio_BGL))
    low, high = 1 - rl.clip_low, 1 + rl.clip_high
    loss_BGL = -jnp.minimum(ratio_BGL * advantages_BGL, jnp.clip(ratio_BGL, low, high) * advantages_BGL)
    is_low_BGL = (ratio_BGL < low) & (advantages_BGL < 0)
    is_high_BGL = (ratio_BGL > high) & (advantages_BGL > 0)
    return loss_BGL, {
        "ratio/mean": mean(ratio_BGL, mask_BGL),
        "ratio/max": Largest(jnp.max(ratio_BGL * mask_BGL)),
        "clip_ratio/low_mean": mean(is_low_BGL, mask_BGL),
        "clip_ratio/high_mean": mean(is_high_BGL, mask_BGL),
        "clip_ratio/region_mean": mean(is_low_BGL | is_high_BGL, mask_BGL),
    }


def _importance(rl, old_BGL, sampler_BGL, mask_BGL) -> tuple[jax.Array | float, Metrics]:
    """The weight of each token for the difference of sampler and trainer; 1 if the correction is off."""
    metrics = {
        "sampler_gap": _mean(jnp.abs(old_BGL - sampler_BGL), mask_BGL),
        "sampler_kl": _mean(kl("k3", sampler_BGL, old_BGL), mask_BGL),  # the sampler drew the tokens
    }
    if not rl.importance_cap:
        return 1.0, metrics
    weight_BGL = jnp.exp(_clamped(old_BGL - sampler_BGL))
    capped_BGL = jnp.minimum(weight_BGL, rl.importance_cap)
    return capped_BGL, metrics | {
        "importance_weight/mean": _mean(capped_BGL, mask_BGL),
        "importance_weight/capped": _mean(weight_BGL > rl.importance_cap, mask_BGL),
    }


def _value_loss(rl, values_BGL, old_values_BGL, returns_BGL):
    """Half the squared error of each value, or of the clipped value if it is larger, as in OpenAI's code of PPO."""
    error_BGL = jnp.square(values_BGL - returns_BGL)
    if rl.value_clip:
        change_BGL = jnp.clip(values_BGL - old_values_BGL, -rl.value_clip, rl.value_clip)
        error_BGL = jnp.maximum(error_BGL, jnp.square(old_values_BGL + change_BGL - returns_BGL))
    return 0.5 * error_BGL


def _aggregated(rl, max_answer_tokens, loss_BGL, mask_BGL, answers_BGL) -> Sum:
    """The loss of all tokens with the denominator of `rl.aggregation` as its weight."""
    if rl.aggregation == "token_mean":
        return _mean(loss_BGL, mask_BGL)
    if rl.aggregation == "sequence_mean":
        return _mean_of_answers(loss_BGL, mask_BGL, answers_BGL)
    answers = _mean_of_answers(loss_BGL, mask_BGL, answers_BGL).weight
    return Sum(_mean(loss_BGL, mask_BGL).total, answers * max_answer_tokens)


def _mean(x_BGL, mask_BGL) -> Sum:
    """Sum over tokens, and their number."""
    return Sum(jnp.sum(x_BGL * mask_BGL, dtype=jnp.float32), jnp.sum(mask_BGL, dtype=jnp.float32))


def _mean_of_answers(x_BGL, mask_BGL, answers_BGL) -> Sum:
    """Sum over answers of the mean of their tokens, and the number of answers that have tokens."""
    means_BGA, has_tokens_BGA = _of_answers(x_BGL, mask_BGL, answers_BGL)
    return Sum(means_BGA.sum(), jnp.sum(has_tokens_BGA, dtype=jnp.float32))


def _of_answers(x_BGL, mask_BGL, answers_BGL) -> tuple[jax.Array, jax.Array]:
    """The mean of each answer's tokens, 0 without any; whether it has tokens."""
    count_BGA = answer_sums.sums(mask_BGL, answers_BGL)
    return answer_sums.sums(x_BGL * mask_BGL, answers_BGL) / jnp.maximum(count_BGA, 1), count_BGA > 0


def _clamped(log_ratio):
    return jnp.clip(log_ratio, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
