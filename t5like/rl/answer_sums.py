"""Sums over the tokens of each answer, of which a row may contain several (`packing`).

The number of an answer in its row is that of its segment, from 1. Without numbers, each row is one answer. Sums are
products with a mask, in float32: a scatter-add would add in another order each time on a GPU.
"""

import jax
import jax.numpy as jnp

from t5like.types import Array

MOST_ANSWERS = 16  # in a row


def most_answers(length: int) -> int:
    """The most answers that a row of so many positions may contain: A of the arrays here."""
    return min(length, MOST_ANSWERS)


def sums(x_BGL: Array, answers_BGL: Array | None) -> Array:
    """float32 [B, G, A]: the sum over each answer of a row; [B, G, 1] if rows are answers. 0 where there is none."""
    x_BGL = x_BGL.astype(jnp.float32)
    if answers_BGL is None:
        return x_BGL.sum(-1, keepdims=True)
    return jnp.where(_is_answer(answers_BGL), x_BGL[..., None], 0.0).sum(-2)


def at_tokens(sums_BGA: Array, answers_BGL: Array | None) -> Array:
    """[B, G, L]: at each token the value of its answer, 0 for padding; unchanged, [B, G, 1], if rows are answers."""
    if answers_BGL is None:
        return sums_BGA
    return jnp.where(_is_answer(answers_BGL), sums_BGA[..., None, :], 0.0).sum(-1)


def _is_answer(answers_BGL: Array) -> Array:
    """bool [B, G, L, A]: whether a token is one of an answer."""
    shape = (*answers_BGL.shape, most_answers(answers_BGL.shape[-1]))
    return answers_BGL[..., None] == 1 + jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
