"""Losses on targets, as sums: (total, weight) is divided once, after microbatches, devices and hosts are added.

All in float32. `step` decides whether the logits exist whole (`cross_entropy`) or a chunk at a time (`in_chunks`).
Sources: z-loss is Mesh TensorFlow's, as T5 1.1 and PaLM (section 5) train with; label smoothing is Szegedy et al. 2016.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5like.types import Metrics, Sum


class Loss(NamedTuple):
    """What the optimizer descends, summed over target tokens, and what people read.

    Attributes:
        objective: float32 scalar: nats, z-loss and smoothing, weighted and summed.
        metrics: `loss` (nats of the true target alone), `z_loss`, `accuracy`; each weighted and summed.
    """

    objective: jax.Array
    metrics: Metrics


def cross_entropy(
    logits_BLV: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    *,
    vocab_size: int,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> Loss:
    """Cross entropy of the logits with the targets.

    Args:
        logits_BLV: any float; computed in float32. Masked vocabulary rows hold a very low value.
        targets_BL: ids below V.
        weights_BL: float32, 0 for positions that don't count.
        vocab_size: how many of the V rows are real.
        z_loss: factor of log(Z)^2, which keeps the logits from drifting.
        label_smoothing: share of the probability that is spread evenly over the real rows.
    """
    logits_BLV = logits_BLV.astype(jnp.float32)
    objective_BL, nats_BL, log_z_BL, correct_BL = _per_token(
        logits_BLV, targets_BL, z_loss, label_smoothing, vocab_size
    )
    weight = weights_BL.sum()
    metrics = {
        "loss": Sum((nats_BL * weights_BL).sum(), weight),
        "z_loss": Sum((z_loss * jnp.square(log_z_BL) * weights_BL).sum(), weight),
        "accuracy": Sum((correct_BL * weights_BL).sum(), weight),
    }
    return Loss((objective_BL * weights_BL).sum(), metrics)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _per_token(logits_BLV, targets_BL, z_loss, label_smoothing, vocab_size):
    """Objective, nats, log Z and whether the target is the likeliest, each [B, L]; only the objective has a gradient.

    That is written by hand: one pass over the logits, where autodiff would scatter into a second array of their size.
    """
    return _per_token_forward(logits_BLV, targets_BL, z_loss, label_smoothing, vocab_size)[0]


def _per_token_forward(logits_BLV, targets_BL, z_loss, label_smoothing, vocab_size):
    top_BL = logits_BLV.max(-1)
    log_z_BL = top_BL + jnp.log(jnp.exp(logits_BLV - top_BL[..., None]).sum(-1))
    true_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
    nats_BL = objective_BL = log_z_BL - true_BL
    if label_smoothing:
        even_BL = log_z_BL - logits_BLV[..., :vocab_size].mean(-1)
        objective_BL = (1 - label_smoothing) * nats_BL + label_smoothing * even_BL
    objective_BL = objective_BL + z_loss * jnp.square(log_z_BL)
    # true == top is argmax == target but for exact ties, and needs no second pass over the vocabulary.
    return (objective_BL, nats_BL, log_z_BL, true_BL >= top_BL), (logits_BLV, targets_BL, log_z_BL)


def _per_token_backward(z_loss, label_smoothing, vocab_size, saved, gradients):
    logits_BLV, targets_BL, log_z_BL = saved
    gradient_BL1 = gradients[0][..., None]
    row_V = jnp.arange(logits_BLV.shape[-1])[None, None]
    # d objective / d logit = (1 + 2 z log Z) p - (1 - s) [target] - s / V [real row]
    share_BLV = jnp.exp(logits_BLV - log_z_BL[..., None]) * ((1 + 2 * z_loss * log_z_BL[..., None]) * gradient_BL1)
    if label_smoothing:
        share_BLV = share_BLV - jnp.where(row_V < vocab_size, label_smoothing / vocab_size, 0.0) * gradient_BL1
    hit_BLV = row_V == targets_BL[..., None]
    return jnp.where(hit_BLV, share_BLV - (1 - label_smoothing) * gradient_BL1, share_BLV), None


_per_token.defvjp(_per_token_forward, _per_token_backward)


def in_chunks(
    loss: Callable[[jax.Array, jax.Array, jax.Array], Loss],
    hidden_BLD: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    chunk: int,
) -> Loss:
    """Sum `loss` over chunks of the length, so that the float32 logits of the whole batch never exist.

    Args:
        loss: (hidden, targets, weights) of a chunk -> Loss; it applies the output head. Its logits are computed again
            in the backward pass instead of being kept.
        hidden_BLD: what the head reads.
        targets_BL: ids.
        weights_BL: float32.
        chunk: positions of each row per chunk; a last short chunk is padded with weight 0.

    Under fsdp each chunk gathers the head again: it pays where the logits are the peak of memory, not otherwise.
    """
    rows, length = targets_BL.shape
    count = -(-length // chunk)

    def split(x):  # [B, L, ...] -> [count, B, chunk, ...]
        x = jnp.pad(x, [(0, 0), (0, count * chunk - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, count, chunk, *x.shape[2:]), 1, 0)

    parts = jax.lax.map(
        jax.checkpoint(lambda args: loss(*args)), (split(hidden_BLD), split(targets_BL), split(weights_BL))
    )
    return jax.tree.map(lambda x: x.sum(0), parts)
