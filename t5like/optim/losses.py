"""Losses as sums (total, weight), which are divided once, after microbatches, devices and hosts are added.

All in float32. `step` computes the logits of a batch at once (`cross_entropy`) or in chunks (`in_chunks`); `nats`
returns the loss of each token, for log-likelihoods.
Sources: z-loss is Mesh TensorFlow's, as T5 1.1 and PaLM (section 5) train with; label smoothing (Szegedy et al. 2016,
section 7) is T5X's (`losses.compute_weighted_cross_entropy`); next-sentence prediction is BERT's (Devlin et al. 2019,
section 3.1).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5like.types import Metrics, Sum, Tree


class Loss(NamedTuple):
    """The objective of the optimizer, summed over target tokens, and the metrics.

    Attributes:
        objective: float32 scalar: nats, z-loss and smoothing, weighted and summed.
        metrics: `loss` (nats of the true target alone), `z_loss`, `accuracy`, `nsp_loss`, `nsp_accuracy`; each weighted
            and summed. `by_component` (nats) and `rows_by_component` are [C], one sum per component of the data.
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
    component_B1: jax.Array | None = None,
    num_components: int = 1,
) -> Loss:
    """Cross entropy of the logits with the targets.

    Args:
        logits_BLV: any float; computed in float32. Masked vocabulary rows have a very low value.
        targets_BL: ids below V.
        weights_BL: float32, 0 for positions that are no targets.
        vocab_size: how many of the V rows are real.
        z_loss: factor of log(Z)^2, which keeps the logits from drifting.
        label_smoothing: share of the target's probability that is spread evenly over the other real rows. The entropy
            of that distribution is subtracted, so that the least possible objective is 0. T5X's vocabulary counts all
            V rows; here masked rows are excluded.
        component_B1: int32 below `num_components`, the component of each row: the metrics get `by_component`. None: one
            component, no such metric.
        num_components: C.
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
    if component_B1 is not None:
        of_rows = partial(sum_by_component, component_B1=component_B1, num_components=num_components)
        nats_B1, weights_B1 = (nats_BL * weights_BL).sum(1, keepdims=True), weights_BL.sum(1, keepdims=True)
        metrics["by_component"] = Sum(of_rows(nats_B1), of_rows(weights_B1))
    return Loss((objective_BL * weights_BL).sum(), metrics)


def sum_by_component(x_B1: jax.Array, component_B1: jax.Array, num_components: int) -> jax.Array:
    """float32 [C]: the sum of the rows of each component. Not a matmul, which would round to bfloat16 on a TPU."""
    return jnp.where(component_B1 == jnp.arange(num_components)[None], x_B1.astype(jnp.float32), 0.0).sum(0)


def next_sentence(logits_B2: jax.Array, follows_B1: jax.Array, *, row_weight: float) -> Loss:
    """Cross entropy of whether the second text of each pair follows the first.

    BERT minimizes the mean over masked tokens plus the mean over pairs. The objective here is one sum, divided once by
    the weight of `loss`, the number of masked tokens: a pair's nats are multiplied by `row_weight`, the masked tokens
    of a full row. If all rows are full, that is BERT's sum of means; the pair of a short row has the same weight as
    that of a long row. Sums of microbatches, devices and hosts add up to the sum of the global batch.

    Args:
        logits_B2: float32; column 0: it follows, 1: it does not (BERT's order).
        follows_B1: int32 1: it follows, 0: it does not, -1: the row has no pair.
        row_weight: masked tokens that a full row is expected to have.

    Returns:
        the objective, and the metrics `nsp_loss` (nats per pair) and `nsp_accuracy`.
    """
    counts_B = (follows_B1[:, 0] >= 0).astype(jnp.float32)
    margin_B = logits_B2[:, 0] - logits_B2[:, 1]  # logit of "follows"
    sign_B = jnp.where(follows_B1[:, 0] == 1, 1.0, -1.0)
    nats = (jax.nn.softplus(-sign_B * margin_B) * counts_B).sum()
    correct = ((sign_B * margin_B > 0) * counts_B).sum()
    metrics = {"nsp_loss": Sum(nats, counts_B.sum()), "nsp_accuracy": Sum(correct, counts_B.sum())}
    return Loss(row_weight * nats, metrics)


def nats(logits_BLV: jax.Array, targets_BL: jax.Array) -> jax.Array:
    """float32 [B, L]: nats of each target, -log p, which `cross_entropy` weights and sums.

    Args:
        logits_BLV: any float; computed in float32.
        targets_BL: ids below V.
    """
    log_z_BL, true_BL, _ = _log_z(logits_BLV.astype(jnp.float32), targets_BL)
    return log_z_BL - true_BL


def _log_z(logits_BLV, targets_BL):
    """log Z, the target's logit and the highest one, each [B, L], of float32 logits."""
    top_BL = logits_BLV.max(-1)
    log_z_BL = top_BL + jnp.log(jnp.exp(logits_BLV - top_BL[..., None]).sum(-1))
    return log_z_BL, jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0], top_BL


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _per_token(logits_BLV, targets_BL, z_loss, label_smoothing, vocab_size):
    """Objective, nats, log Z and whether the target is most likely, each [B, L]; only the objective has a gradient.

    The gradient is written by hand: one pass over the logits, where autodiff would scatter into a second array.
    """
    return _per_token_forward(logits_BLV, targets_BL, z_loss, label_smoothing, vocab_size)[0]


def _per_token_forward(logits_BLV, targets_BL, z_loss, label_smoothing, vocab_size):
    log_z_BL, true_BL, top_BL = _log_z(logits_BLV, targets_BL)
    nats_BL = objective_BL = log_z_BL - true_BL
    if label_smoothing:
        # target share * nats + other share * (nats of all real rows - nats) - entropy
        target, other = _shares(label_smoothing, vocab_size)
        all_BL = vocab_size * log_z_BL - logits_BLV[..., :vocab_size].sum(-1)
        entropy = -(target * math.log(target) + (vocab_size - 1) * other * math.log(other + 1e-20))
        objective_BL = (target - other) * nats_BL + other * all_BL - entropy
    objective_BL = objective_BL + z_loss * jnp.square(log_z_BL)
    # true == top is argmax == target but for exact ties, and needs no second pass over the vocabulary.
    return (objective_BL, nats_BL, log_z_BL, true_BL >= top_BL), (logits_BLV, targets_BL, log_z_BL)


def _per_token_backward(z_loss, label_smoothing, vocab_size, saved, gradients):
    logits_BLV, targets_BL, log_z_BL = saved
    gradient_BL1 = gradients[0][..., None]
    row_V = jnp.arange(logits_BLV.shape[-1])[None, None]
    target, other = _shares(label_smoothing, vocab_size)
    # d objective / d logit = (1 + 2 z log Z) p - (target share - other share) [target] - other share [real row]
    share_BLV = jnp.exp(logits_BLV - log_z_BL[..., None]) * ((1 + 2 * z_loss * log_z_BL[..., None]) * gradient_BL1)
    if label_smoothing:
        share_BLV = share_BLV - jnp.where(row_V < vocab_size, other, 0.0) * gradient_BL1
    hit_BLV = row_V == targets_BL[..., None]
    return jnp.where(hit_BLV, share_BLV - (target - other) * gradient_BL1, share_BLV), None


def _shares(label_smoothing, vocab_size):
    """Probability of the target and of each other real row, under label smoothing."""
    return 1 - label_smoothing, label_smoothing / (vocab_size - 1)


_per_token.defvjp(_per_token_forward, _per_token_backward)


def in_chunks(
    loss: Callable[[Tree, jax.Array, jax.Array], Loss],
    hidden: Tree,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    chunk: int,
) -> Loss:
    """Sum `loss` over chunks of the length, so that the float32 logits of the whole batch are never in memory.

    Args:
        loss: (hidden, targets, weights) of a chunk -> Loss; it applies the output head. Its logits are recomputed in
            the backward pass.
        hidden: inputs of the head, arrays [B, L, ...].
        targets_BL: ids.
        weights_BL: float32.
        chunk: positions of each row per chunk; a last short chunk is padded with weight 0.

    With fsdp each chunk gathers the head again, so chunks pay only if the logits are the peak of memory.
    """
    rows, length = targets_BL.shape
    count = -(-length // chunk)

    def split(x):  # [B, L, ...] -> [count, B, chunk, ...]
        x = jnp.pad(x, [(0, 0), (0, count * chunk - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, count, chunk, *x.shape[2:]), 1, 0)

    parts = jax.lax.map(jax.checkpoint(lambda args: loss(*args)), jax.tree.map(split, (hidden, targets_BL, weights_BL)))
    return jax.tree.map(lambda x: x.sum(0), parts)
