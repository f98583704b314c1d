"""Distillation: the loss of the data, and the divergence from a teacher's predictions for the same rows.

    loss = (1 - weight) x loss of the data + weight x temperature^2 x KL(teacher || model)

per target, both distributions at `distill.temperature` (Hinton et al. 2015, arXiv:1503.02531, section 2; temperature^2
keeps the size of the gradients). The KL divergence is the cross entropy to the teacher's distribution less its entropy,
which has no gradient; so 0 is the least. The teacher's forward pass is a part of the train step, without dropout.
Its parameters come with the batch (`types.Taught`), because they are neither rows nor trained.

With `distill.top_k` the other tokens are one bucket: KL over top_k + 1 outcomes. Renormalized top-k probabilities would
teach that all other tokens are impossible.
"""

from functools import partial

import jax
import jax.numpy as jnp

from t5like.config.schema import Config
from t5like.model.transformer import Transformer
from t5like.optim.losses import Loss
from t5like.optim.step import LossFn, pretrain_loss
from t5like.types import MASKED, Array, Batch, Sum, Taught, Tree


def distilled_loss(teacher: Config) -> LossFn:
    """The loss of the train step for batches of type `Taught`; `teacher` is the teacher's config, resolved.

    Its metrics are those of `pretrain_loss`, whose `loss` is that of the data alone, and `distill_kl`, nats per target
    at the temperature. For a `Batch`, as in an evaluation, it is `pretrain_loss`.
    """

    def loss_fn(
        config: Config, params: Tree, batch: Batch, key: jax.Array | None, teacher_params: Tree | None = None
    ) -> Loss:
        if teacher_params is None:
            return pretrain_loss(config, params, batch, key)
        model = Transformer(teacher)
        taught_BLD = model.apply({"params": teacher_params}, batch, method="hidden").x_BLD

        def add(loss: Loss, logits_BLV: Array, weights_BL: Array, taught_BLD: Array) -> Loss:
            distill, size = config.distill, config.tokenizer.vocab_size
            apply = partial(model.apply, {"params": teacher_params}, taught_BLD)
            if config.data.label_objective:
                size, teacher_BLV = None, apply(batch.encoder_segments_BS, method="label_logits")
            else:
                teacher_BLV = apply(method="logits")  # whose padding rows may be more or fewer
            kl_BL = divergence(
                logits_BLV[..., :size], teacher_BLV[..., :size], temperature=distill.temperature, top_k=distill.top_k
            )
            kl = Sum((kl_BL * weights_BL).sum(), weights_BL.sum())
            objective = (1 - distill.weight) * loss.objective + distill.weight * distill.temperature**2 * kl.total
            return Loss(objective, loss.metrics | {"distill_kl": kl})

        return pretrain_loss(config, params, batch, key, (taught_BLD, add))

    return loss_fn


def rows_of(batch: Taught | Batch) -> Batch:
    """The `ModelBatch` of this loss."""
    return batch.rows if isinstance(batch, Taught) else batch


def divergence(logits_BLV: Array, teacher_BLV: Array, *, temperature: float, top_k: int) -> Array:
    """float32 [B, L]: KL(teacher || model) in nats, at a temperature.

    Args:
        logits_BLV: of the model, any float; computed in float32.
        teacher_BLV: of the teacher, for the same tokens.
        temperature: of both.
        top_k: the teacher's most likely tokens that are compared one by one, with those that are as likely as the last
            of them; the others are one outcome. 0: all are compared.
    """
    log_p_BLV, log_q_BLV = (
        jax.nn.log_softmax(x_BLV.astype(jnp.float32) / temperature) for x_BLV in (teacher_BLV, logits_BLV)
    )
    terms_BLV = jnp.exp(log_p_BLV) * (log_p_BLV - log_q_BLV)
    if not 0 < top_k < log_p_BLV.shape[-1]:
        return terms_BLV.sum(-1)
    single_BLV = _most_likely(log_p_BLV, top_k)
    log_sum = lambda x_BLV: jax.nn.logsumexp(jnp.where(single_BLV, MASKED, x_BLV), axis=-1)
    others_p_BL, others_q_BL = log_sum(log_p_BLV), log_sum(log_q_BLV)
    return jnp.where(single_BLV, terms_BLV, 0.0).sum(-1) + jnp.exp(others_p_BL) * (others_p_BL - others_q_BL)


def _most_likely(log_p_BLV: Array, count: int) -> Array:
    """bool [B, L, V]: the `count` highest values, which are at most 0, and those that are equal to the last of them.

    The bits of floats that are not negative are ordered as the floats are, so that 31 counts find the last value bit by
    bit. On a CPU that takes a sixth of the time of `jax.lax.top_k`, and a vocabulary that is split is not gathered.
    """
    bits_BLV = jax.lax.bitcast_convert_type(jnp.maximum(-log_p_BLV, 0.0), jnp.int32)

    def halve(index: Array, last_BL1: Array) -> Array:
        lower_BL1 = last_BL1 - (1 << (30 - index))
        enough_BL1 = (bits_BLV <= lower_BL1).sum(-1, keepdims=True) >= count
        return jnp.where(enough_BL1, lower_BL1, last_BL1)

    highest_BL1 = jnp.full((*log_p_BLV.shape[:-1], 1), 2**31 - 1, jnp.int32)
    return bits_BLV <= jax.lax.fori_loop(0, 31, halve, highest_BL1)
