"""The losses of `t5like rl` as functions for the train step: from parameters and an `Experience` to a `Loss`."""

import jax
import jax.numpy as jnp

from t5like.config.schema import Config
from t5like.optim.losses import Loss
from t5like.optim.step import LossFn
from t5like.rl import answer_sums
from t5like.rl.experience import Experience, last_tokens
from t5like.rl.policy_loss import policy_loss
from t5like.rl.preference_loss import preference_loss, reward_model_loss
from t5like.rl.scoring import scores
from t5like.types import Array, Batch, Tree

CHOSEN, REJECTED = 0, 1  # the answers of a pair


def loss_fn_of(config: Config) -> LossFn:
    """The loss of `rl.method`."""
    if config.rl.method == "policy":
        return policy_objective
    return reward_model_objective if config.rl.method == "reward_model" else preference_objective


def model_batch(experience: Experience) -> Batch:
    """The rows that the model reads."""
    return experience.rows()


def policy_objective(config: Config, params: Tree, experience: Experience, _: jax.Array | None) -> Loss:
    """The loss of sampled answers by their advantages. There is no dropout, because the sampler has none."""
    scored = scores(config, params, experience)
    return policy_loss(
        config.rl,
        config.data.targets_length,
        scored.log_p_BGL,
        experience.advantages_BGL,
        experience.mask_BGL,
        answers_BGL=experience.numbers_BGL,
        old_log_p_BGL=experience.old_log_p_BGL,
        sampler_log_p_BGL=experience.sampler_log_p_BGL,
        reference_log_p_BGL=experience.reference_log_p_BGL,
        entropy_BGL=scored.entropy_BGL,
        values_BGL=scored.values_BGL if experience.returns_BGL is not None else None,
        old_values_BGL=experience.old_values_BGL,
        returns_BGL=experience.returns_BGL,
    )


def preference_objective(config: Config, params: Tree, experience: Experience, _: jax.Array | None) -> Loss:
    """DPO, IPO, ORPO or SimPO of pairs of answers, without dropout."""
    total = lambda x_BGL: _pairs(x_BGL * experience.mask_BGL, experience)
    log_p, tokens = total(scores(config, params, experience).log_p_BGL), total(1.0)
    reference = () if experience.reference_log_p_BGL is None else total(experience.reference_log_p_BGL)
    return preference_loss(config.rl, *log_p, *tokens, *reference)


def reward_model_objective(config: Config, params: Tree, experience: Experience, _: jax.Array | None) -> Loss:
    """Bradley-Terry of the scores of pairs of answers, without dropout."""
    scored_BGL = _score_at_last(config, params, experience)
    has_tokens, _ = _pairs(experience.mask_BGL, experience)
    return reward_model_loss(config.rl, *_pairs(scored_BGL, experience), has_tokens)


def answer_scores(config: Config, params: Tree, experience: Experience) -> Array:
    """The reward model's score of each answer, float32 [B, G]; the rows are not packed.

    It is that of the scalar head where the last token is predicted. In a decoder that position has all tokens of the
    answer but the last one, EOS, as its input; in an encoder also EOS.
    """
    return _score_at_last(config, params, experience).sum(-1)


def _score_at_last(config: Config, params: Tree, experience: Experience) -> Array:
    """float32 [B, G, L]: the scalar head at the last token of each answer, 0 elsewhere."""
    values_BGL, mask_BGL, numbers_BGL = (
        scores(config, params, experience).values_BGL,
        experience.mask_BGL,
        experience.numbers_BGL,
    )
    if numbers_BGL is None:
        return values_BGL * last_tokens(mask_BGL)
    following_BGL = jnp.pad(numbers_BGL[..., 1:], [(0, 0), (0, 0), (0, 1)])
    return values_BGL * mask_BGL * (following_BGL != numbers_BGL)


def _pairs(x_BGL: Array, experience: Experience) -> tuple[Array, Array]:
    """The sums over the tokens of the chosen and of the rejected answer of each pair; 0 where there is no pair."""
    sums_BGA = answer_sums.sums(x_BGL, experience.numbers_BGL)
    sums_BN, places_BKG = sums_BGA.reshape(sums_BGA.shape[0], -1), experience.places_BKG
    if places_BKG is None:  # N = G
        return sums_BN[:, CHOSEN], sums_BN[:, REJECTED]
    take = lambda places_BK: jnp.take_along_axis(sums_BN, jnp.maximum(places_BK, 0), 1) * (places_BK >= 0)
    return take(places_BKG[..., CHOSEN]), take(places_BKG[..., REJECTED])
