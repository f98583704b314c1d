"""One attention over a decoder's own keys and those of the encoder's output, as in T5Gemma 2 (Zhang et al. 2025).

One softmax and one set of projections serve both. The encoder's keys are normalized as the decoder's, but not rotated,
and no window hides them. Called by `attention`.
"""

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
    encoder_mask: MaskSpec,
    queries: int,
) -> tuple[KeyValues, jax.Array | None, MaskSpec]:
    """Keys and values of both, the decoder's first, with their relative bias (0 for the encoder's) and mask.

    Args:
        own: keys and values of the decoder, S of them.
        encoder: keys and values of the encoder's output. Several consecutive rows of `own` may share a row of it.
        bias_1NLS: relative bias of self-attention, or None.
        own_mask: of the decoder's keys.
        encoder_mask: of the encoder's keys; its rows are those of `encoder`, with the queries of all rows that share
            one of them.
        queries: L.
    """
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
    join = lambda *pair: constrain(jnp.concatenate(pair, axis=2), "batch", "act_heads", None, None)
    return KeyValues(*map(join, own, encoder)), bias_1NLS, MaskSpec(allowed_B1LS=mask_B1LS)


def _array(mask: MaskSpec, shape: tuple[int, ...]) -> jax.Array:
    array = mask.build(*shape[2:])
    return jnp.ones(shape, bool) if array is None else jnp.broadcast_to(array, shape)
