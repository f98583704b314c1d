"""The losses of `t5like rl` as functions for the train step: from parameters and an `Experience` to a `Loss`."""

import jax

from t5like.config.schema import Config
from t5like.optim.losses import Loss
from t5like.optim.step import LossFn
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
    mask_BGL = experience.mask_BGL
    log_p_BG = (scores(config, params, experience).log_p_BGL * mask_BGL).sum(-1)
    tokens_BG, references = mask_BGL.sum(-1), ()
    if experience.reference_log_p_BGL is not None:
        reference_BG = (experience.reference_log_p_BGL * mask_BGL).sum(-1)
        references = _pair(reference_BG)
    return preference_loss(config.rl, *_pair(log_p_BG), *_pair(tokens_BG), *references)


def reward_model_objective(config: Config, params: Tree, experience: Experience, _: jax.Array | None) -> Loss:
    """Bradley-Terry of the scores of pairs of answers, without dropout."""
    real_B = experience.mask_BGL.sum((1, 2)) > 0
    return reward_model_loss(config.rl, *_pair(answer_scores(config, params, experience)), real_B)


def answer_scores(config: Config, params: Tree, experience: Experience) -> Array:
    """The reward model's score of each answer, float32 [B, G]: its scalar head where the last token is predicted.

    In a decoder that position has all tokens of the answer but the last one, EOS, as its input; in an encoder also EOS.
    """
    return (scores(config, params, experience).values_BGL * last_tokens(experience.mask_BGL)).sum(-1)


def _pair(values_BG: Array) -> tuple[Array, Array]:
    return values_BG[:, CHOSEN], values_BG[:, REJECTED]
