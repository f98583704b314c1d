"""Losses of pairs of a chosen and a rejected answer, as sums over pairs: DPO, IPO, ORPO, SimPO, reward models. float32.

Papers: DPO (Rafailov et al. 2023, arXiv:2305.18290, equation 7), IPO (Azar et al. 2023, arXiv:2310.12036, equation 17;
with log-ratios per token, as TRL agreed with its authors), ORPO (Hong et al. 2024, arXiv:2403.07691), SimPO (Meng et
al. 2024, arXiv:2405.14734), reward models with a margin (Touvron et al. 2023, arXiv:2307.09288, section 3.2.2).

Metrics, as sums over pairs, with TRL's names: `rewards/chosen` and `rewards/rejected`, `rewards/margins` (their
difference), `rewards/accuracies` (share of pairs whose chosen answer has the higher reward), `logps/chosen` and
`logps/rejected`, and of ORPO `nll_loss`. The weight of `loss` is the number of pairs.
"""

import jax
import jax.numpy as jnp

from t5like.config.rl_schema import RLConfig
from t5like.optim.losses import Loss
from t5like.types import Metrics, Sum

LARGEST_MEAN_LOG_P = -1e-6  # of ORPO: at log p = 0 the odds p / (1 - p) are infinite


def preference_loss(
    rl: RLConfig,
    chosen_log_p_B: jax.Array,
    rejected_log_p_B: jax.Array,
    chosen_tokens_B: jax.Array,
    rejected_tokens_B: jax.Array,
    reference_chosen_log_p_B: jax.Array | None = None,
    reference_rejected_log_p_B: jax.Array | None = None,
) -> Loss:
    """The loss of `rl.method` "dpo", "ipo", "orpo" or "simpo".

    ORPO's log-likelihood is the mean over the tokens of each chosen answer, as in the paper, so that the loss is a sum
    over pairs; TRL averages it over all tokens of a batch.
    A pair whose chosen answer has no tokens is padding: it has no effect, whatever its values, and is not counted.

    Args:
        rl: the config section; `rl.beta` and `rl.margin` are those of the method.
        chosen_log_p_B: log-probability of each chosen answer, the sum over its tokens, with EOS. Any shape.
        rejected_log_p_B: of each rejected answer.
        chosen_tokens_B: number of tokens of each chosen answer.
        rejected_tokens_B: of each rejected answer.
        reference_chosen_log_p_B: under the reference model, without gradient; DPO and IPO need it.
        reference_rejected_log_p_B: of each rejected answer.

    Returns:
        The objective and the metrics. Rewards are beta times the log-ratio to the reference (DPO, IPO), or beta times
        the log-probability per token (ORPO, SimPO); `logps` are of the answer (DPO, IPO), or per token (ORPO, SimPO).
    """
    real_B = chosen_tokens_B > 0
    chosen_B, rejected_B = _finite(real_B, chosen_log_p_B), _finite(real_B, rejected_log_p_B)
    chosen_tokens_B, rejected_tokens_B = jnp.maximum(chosen_tokens_B, 1), jnp.maximum(rejected_tokens_B, 1)
    metrics = {}
    if rl.method in ("dpo", "ipo"):
        chosen_ratio_B = chosen_B - jax.lax.stop_gradient(_finite(real_B, reference_chosen_log_p_B))
        rejected_ratio_B = rejected_B - jax.lax.stop_gradient(_finite(real_B, reference_rejected_log_p_B))
        if rl.method == "dpo":
            loss_B = -jax.nn.log_sigmoid(rl.beta * (chosen_ratio_B - rejected_ratio_B))
        else:
            margin_B = chosen_ratio_B / chosen_tokens_B - rejected_ratio_B / rejected_tokens_B
            loss_B = jnp.square(margin_B - 1 / (2 * rl.beta))
    else:
        chosen_B, rejected_B = chosen_B / chosen_tokens_B, rejected_B / rejected_tokens_B
        chosen_ratio_B, rejected_ratio_B = chosen_B, rejected_B
        if rl.method == "simpo":
            loss_B = -jax.nn.log_sigmoid(rl.beta * (chosen_B - rejected_B) - rl.margin)
        elif rl.method == "orpo":
            metrics["nll_loss"] = _mean(-chosen_B, real_B)
            loss_B = -chosen_B - rl.beta * jax.nn.log_sigmoid(_log_odds(chosen_B) - _log_odds(rejected_B))
        else:
            raise ValueError(f"no loss of pairs {rl.method!r}")
    metrics |= {"loss": _mean(loss_B, real_B), "logps/chosen": _mean(chosen_B, real_B)}
    metrics |= {"logps/rejected": _mean(rejected_B, real_B)}
    metrics |= _rewards(rl.beta * chosen_ratio_B, rl.beta * rejected_ratio_B, real_B)
    return Loss(metrics["loss"].total, metrics)


def reward_model_loss(
    rl: RLConfig, chosen_score_B: jax.Array, rejected_score_B: jax.Array, real_B: jax.Array | None = None
) -> Loss:
    """-log sigmoid(score of the chosen answer - score of the rejected answer - `rl.margin`), summed over pairs.

    Args:
        rl: the config section.
        chosen_score_B: the scalar head's output for each chosen answer. Any shape.
        rejected_score_B: for each rejected answer.
        real_B: False or 0: the pair is padding; it has no effect, and is not counted. None: all pairs count.
    """
    real_B = jnp.ones(chosen_score_B.shape, bool) if real_B is None else real_B > 0
    chosen_B, rejected_B = _finite(real_B, chosen_score_B), _finite(real_B, rejected_score_B)
    loss = _mean(-jax.nn.log_sigmoid(chosen_B - rejected_B - rl.margin), real_B)
    return Loss(loss.total, {"loss": loss} | _rewards(chosen_B, rejected_B, real_B))


def _log_odds(mean_log_p_B):
    """log(p / (1 - p)) of log p <= 0; expm1 keeps the precision of 1 - p near p = 1."""
    return mean_log_p_B - jnp.log(-jnp.expm1(jnp.minimum(mean_log_p_B, LARGEST_MEAN_LOG_P)))


def _rewards(chosen_B, rejected_B, real_B) -> Metrics:
    return {
        "rewards/chosen": _mean(chosen_B, real_B),
        "rewards/rejected": _mean(rejected_B, real_B),
        "rewards/margins": _mean(chosen_B - rejected_B, real_B),
        "rewards/accuracies": _mean(jnp.sign(chosen_B - rejected_B) / 2 + 0.5, real_B),  # half of a tie
    }


def _mean(x_B, real_B) -> Sum:
    """Sum over pairs, and their number."""
    return Sum(jnp.sum(x_B * real_B, dtype=jnp.float32), jnp.sum(real_B, dtype=jnp.float32))


def _finite(real_B, x_B):
    """float32, -1 for padding, so that it has no gradient, also if it is not finite."""
    return jnp.where(real_B, x_B.astype(jnp.float32), -1.0)
