"""Attention in a window, block by block, so that scores outside of the window are never computed.

A block of C queries attends to its own block of keys and to the neighboring ones that the window reaches, as in
Longformer's sliding chunks (Beltagy et al. 2020, section 3.2). The blocks become rows of a batch, so that any kernel
for whole rows computes them, with its gradients. For L queries and a window of W tokens, scores take L (W + C)
numbers or L (2 W + C) where it reaches to both sides, instead of L^2. Used by `attention` for the kernels `plain` and
`cpu`; fused kernels skip blocks themselves.
"""

import jax
import jax.numpy as jnp

from t5like.model.masks import MaskSpec, segment_mask
from t5like.sharding.logical_axes import constrain, context_size

BLOCK = 64  # queries of a block, C; measured on a CPU with windows of 64 to 512 tokens
LARGEST_SHARE = 0.6  # of all keys that a block may read; above it, copying keys takes the time that is saved


def skips_keys(mask: MaskSpec, queries: int, keys: int) -> bool:
    """Whether blocks read so much less than all keys that they take less time; not on a mesh that splits rows."""
    bounded = mask.window > 0 and (mask.causal or mask.window_ahead > 0)
    if not bounded or queries != keys or mask.prefix_BS is not None or mask.allowed_B1LS is not None:
        return False
    return context_size() == 1 and keys_of_block(mask) <= LARGEST_SHARE * keys


def keys_of_block(mask: MaskSpec) -> int:
    """Keys that each block of queries reads."""
    return (1 + sum(_neighbors(mask))) * BLOCK


def _neighbors(mask: MaskSpec) -> tuple[int, int]:
    """Blocks of keys before and after a block that its queries read."""
    ahead = 0 if mask.causal else mask.window_ahead - 1
    return -(-(mask.window - 1) // BLOCK), -(-ahead // BLOCK)


def to_blocks(
    q_BNLH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, bias_1NLS: jax.Array | None, mask: MaskSpec
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, MaskSpec]:
    """The operands of attention with M blocks of each row as rows: queries [B M, N, C, H], keys [B M, K, span, H].

    Args:
        q_BNLH: queries.
        k_BKSH: keys, as many as queries.
        v_BKSH: values.
        bias_1NLS: depends on key - query only, so that all blocks have the same bias.
        mask: one that `skips_keys`.
    """
    rows, length, size = q_BNLH.shape[0], q_BNLH.shape[2], BLOCK
    before, after = _neighbors(mask)
    count = -(-length // size)

    def queries(x, axis):  # [B, .., L, ..] -> [B M, .., C, ..]
        x = _padded(x, axis, 0, count * size - length)
        x = x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 1).reshape(rows * count, *x.shape[1:axis], *x.shape[axis + 1 :])

    def keys(x, axis):  # [B, .., S, ..] -> [B M, .., span, ..]
        x = _padded(x, axis, before * size, count * size - length + after * size)
        x = x.reshape(*x.shape[:axis], before + count + after, size, *x.shape[axis + 1 :])
        shifted = [jax.lax.slice_in_dim(x, i, i + count, axis=axis) for i in range(before + 1 + after)]
        x = jnp.moveaxis(jnp.concatenate(shifted, axis + 1), axis, 1)
        return x.reshape(rows * count, *x.shape[2:])

    span = (before + 1 + after) * size
    if bias_1NLS is not None:
        bias_1NLS = bias_1NLS[:, :, before * size : (before + 1) * size, :span]
    allowed_MCS = _allowed_by_index(mask, length, before, span)
    allowed_B1LS = jnp.broadcast_to(allowed_MCS, (rows, *allowed_MCS.shape)).reshape(rows * count, 1, size, span)
    if mask.query_segments_BL is not None:
        allowed_B1LS &= segment_mask(queries(mask.query_segments_BL, 1), keys(mask.key_segments_BS, 1))
    split = lambda x: constrain(x, "batch", "act_heads", None, None)
    q_BNLH, k_BKSH, v_BKSH = split(queries(q_BNLH, 2)), split(keys(k_BKSH, 2)), split(keys(v_BKSH, 2))
    return q_BNLH, k_BKSH, v_BKSH, bias_1NLS, MaskSpec(allowed_B1LS=allowed_B1LS)


def from_blocks(out_BNLH: jax.Array, rows: int, length: int) -> jax.Array:
    """The outputs of the blocks of `to_blocks`, [B M, N, C, H], as rows [B, N, L, H]."""
    x = out_BNLH.reshape(rows, -(-length // BLOCK), *out_BNLH.shape[1:]).swapaxes(1, 2)
    return x.reshape(*x.shape[:2], -1, x.shape[-1])[:, :, :length]


def _allowed_by_index(mask: MaskSpec, length: int, before: int, span: int) -> jax.Array:
    """[M, C, span]: which keys each query of a block attends to, without segments."""
    first_M11 = jnp.arange(0, length, BLOCK)[:, None, None]
    query_MC1 = first_M11 + jnp.arange(BLOCK)[None, :, None]
    key_M1S = first_M11 - before * BLOCK + jnp.arange(span)[None, None]
    behind = query_MC1 - key_M1S
    last = 0 if mask.causal else 1 - mask.window_ahead
    return (behind < mask.window) & (behind >= last) & (key_M1S >= 0) & (key_M1S < length)


def _padded(x: jax.Array, axis: int, before: int, after: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (before, after)
    return jnp.pad(x, widths)
