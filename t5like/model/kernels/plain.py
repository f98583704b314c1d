"""Attention for any device, with gradients by autodiff. Used by `attention`."""

import jax
import jax.numpy as jnp

from t5like.types import MASKED


def attend(
    q_BNLH: jax.Array,
    k_BNSH: jax.Array,
    v_BNSH: jax.Array,
    bias_1NLS: jax.Array | None,
    mask_B1LS: jax.Array | None,
    softcap: float = 0.0,
) -> jax.Array:
    """softmax(q k + bias) v over the keys that the mask allows, in float32; a query without keys gets 0."""
    scores_BNLS = masked_scores(q_BNLH, k_BNSH, bias_1NLS, mask_B1LS, softcap)
    weights_BNLS = jnp.exp(scores_BNLS - jax.lax.stop_gradient(scores_BNLS.max(-1, keepdims=True)))
    out_BNLH = jnp.einsum(
        "BNLS,BNSH->BNLH", weights_BNLS.astype(v_BNSH.dtype), v_BNSH, preferred_element_type=jnp.float32
    )
    # Dividing after the values instead of before costs H columns instead of S.
    out_BNLH = out_BNLH / weights_BNLS.sum(-1, keepdims=True)
    return out_BNLH if mask_B1LS is None else jnp.where(mask_B1LS.any(-1, keepdims=True), out_BNLH, 0.0)


def soft_capped(x: jax.Array, cap: float) -> jax.Array:
    """Values in (-cap, cap), about x where x is small (Gemma 2, Gemma Team 2024, section 2); x itself for cap 0."""
    return cap * jnp.tanh(x / cap) if cap else x


def masked_scores(
    q_BNLH: jax.Array,
    k_BNSH: jax.Array,
    bias_1NLS: jax.Array | None,
    mask_B1LS: jax.Array | None,
    softcap: float = 0.0,
) -> jax.Array:
    """q k, soft-capped, + bias, float32 [B, N, L, S]; a large negative number where the mask is False."""
    scores_BNLS = jnp.einsum("BNLH,BNSH->BNLS", q_BNLH, k_BNSH, preferred_element_type=jnp.float32)
    scores_BNLS = soft_capped(scores_BNLS, softcap)
    if bias_1NLS is not None:
        scores_BNLS = scores_BNLS + bias_1NLS
    if mask_B1LS is not None:
        scores_BNLS = jnp.where(mask_B1LS, scores_BNLS, MASKED)
    return scores_BNLS
