"""Selects the positions of rows that have few targets, so that the head computes no logits of others.

BERT's released code does so for masked tokens (`gather_indexes` in run_pretraining.py). Called by `step`.
"""

import jax
import jax.numpy as jnp

from t5like.config.schema import Config
from t5like.data.objectives.head_length import head_length
from t5like.sharding.logical_axes import constrain
from t5like.types import Batch, Tree


def at_targets(config: Config, hidden: Tree, batch: Batch) -> tuple[Tree, jax.Array, jax.Array]:
    """Hidden values [B, L, ...], targets and weights [B, L] of a batch, at the positions that have a weight.

    Returns:
        the three as [B, T, ...], T of `head_length`, in their order in the row, and behind them zeros; unchanged if L
        is not above T. Exact: matmuls with 0 and 1. The gradient of an index would be a scatter.
    """
    targets_BL, weights_BL, most = batch.targets_BL, batch.weights_BL, head_length(config)
    if targets_BL.shape[1] <= most:
        return hidden, targets_BL, weights_BL
    has_weight_BL = weights_BL != 0  # also NaN, which must not be lost
    number_BL = jnp.where(has_weight_BL, jnp.cumsum(has_weight_BL, axis=1), 0)
    chosen_BTL = number_BL[:, None] == jnp.arange(1, most + 1)[None, :, None]

    def select(x: jax.Array) -> jax.Array:
        x = jnp.einsum("BTL,BL...->BT...", chosen_BTL.astype(x.dtype), x, precision="highest")
        return constrain(x, "batch", "length", *[None] * (x.ndim - 2))

    of_ids = lambda x_BL: jnp.where(chosen_BTL, x_BL[:, None], 0).sum(-1)
    return jax.tree.map(select, hidden), of_ids(targets_BL), of_ids(weights_BL)
