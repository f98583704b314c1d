"""One attention over a decoder's own keys and those of the encoder's output, as in T5Gemma 2 (Zhang et al. 2025).

One softmax and one set of projections serve both. The encoder's keys are normalized as the decoder's, but not rotated,
and no window hides them. Called by `attention`, and `joint_mask` by `stack`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from t5like.model.cache import KeyValues
from t5like.model.masks import MaskSpec
from t5like.sharding.logical_axes import constrain


def merge(
    own: KeyValues,
    encoder: KeyValues,
    bias_1NLS: jax.Array | None,
    own_mask: MaskSpec,
    encoder_mask: MaskSpec | None,
    queries: int,
) -> tuple[KeyValues, jax.Array | None, MaskSpec]:
    """Keys and values of both, the decoder's first, with their relative bias (0 for the encoder's) and mask.

    Args:
        own: keys and values of the decoder, S of them.
        encoder: keys and values of the encoder's output. Several consecutive rows of `own` may share a row of it.
        bias_1NLS: relative bias of self-attention, or None.
        own_mask: of the decoder's keys.
        encoder_mask: of the encoder's keys; its rows are those of `encoder`, with the queries of all rows that share
            one of them. None: `own_mask` is a `joint_mask`, of all keys.
        queries: L.
    """
    join = lambda *pair: constrain(jnp.concatenate(pair, axis=2), "batch", "act_heads", None, None)
    if encoder_mask is None:
        return KeyValues(*map(join, own, encoder)), None, own_mask
    keys, encoder_keys = own.k_BKSH.shape[2], encoder.k_BKSH.shape[2]
    rows = own.k_BKSH.shape[0]
    texts = rows // encoder.k_BKSH.shape[0]
    own_B1LS = _array(own_mask, (rows, 1, queries, keys))
    encoder_B1LS = _array(encoder_mask, (rows // texts, 1, texts * queries, encoder_keys))
    mask_B1LS = jnp.concatenate([own_B1LS, encoder_B1LS.reshape(rows, 1, queries, encoder_keys)], axis=3)
    if texts > 1:
        encoder = KeyValues(*(jnp.repeat(x_BKSH, texts, axis=0) for x_BKSH in encoder))
    if bias_1NLS is not None:
        bias_1NLS = jnp.pad(bias_1NLS, ((0, 0), (0, 0), (0, 0), (0, encoder_keys)))
    return KeyValues(*map(join, own, encoder)), bias_1NLS, MaskSpec(allowed_B1LS=mask_B1LS)


def joint_mask(own: MaskSpec, encoder: MaskSpec, rows: int, keys: int, encoder_keys: int) -> MaskSpec | None:
    """The mask of all keys as one specification for a fused kernel, if there is one, to which a window can be added.

    The encoder's keys are like a prefix, which a causal mask does not hide. As they are behind all queries, no window
    of earlier tokens hides them either.

    Args:
        own: of the decoder's keys, causal.
        encoder: of the encoder's keys, with the same query segments.
        rows: B.
        keys: of the decoder, in each row.
        encoder_keys: of the encoder, in each row.
    """
    arrays = own.allowed_B1LS is not None or encoder.allowed_B1LS is not None
    if arrays or not own.causal or own.query_segments_BL is not encoder.query_segments_BL:
        return None
    prefix_BS = jnp.zeros((rows, keys), bool) if own.prefix_BS is None else own.prefix_BS
    prefix_BS = jnp.concatenate([prefix_BS, jnp.ones((rows, encoder_keys), bool)], axis=1)
    segments_BS = own.key_segments_BS
    if segments_BS is not None:
        segments_BS = jnp.concatenate([segments_BS, encoder.key_segments_BS], axis=1)
    return dataclasses.replace(own, key_segments_BS=segments_BS, prefix_BS=prefix_BS)


def _array(mask: MaskSpec, shape: tuple[int, ...]) -> jax.Array:
    array = mask.build(*shape[2:])
    return jnp.ones(shape, bool) if array is None else jnp.broadcast_to(array, shape)
