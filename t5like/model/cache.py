"""The key-value caches of decoding. Used by `attention` and `stack`; `generate` grows them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class KeyValues(NamedTuple):
    """Keys and values of one attention: a decoding cache (S its length), or those of the encoder's output."""

    k_BKSH: jax.Array
    v_BKSH: jax.Array


class Cache(NamedTuple):
    """Keys and values for decoding, of one layer. A stack has a tuple of them, or, scanned, one with a leading dim Y.

    Attributes:
        own: of the text decoded so far.
        cross: of the encoder's output, computed once; None in a decoder-only model.
    """

    own: KeyValues
    cross: KeyValues | None


Caches = Cache | tuple[Cache, ...]


def cache_length(cache: Caches) -> int:
    """The number of tokens that a stack's cache can hold."""
    return jax.tree.leaves(cache)[0].shape[-2]


def grow_cache(cache: Caches, length: int) -> Caches:
    """A stack's cache, padded so that it can hold `length` tokens."""
    pad = lambda x: jnp.pad(x, [*[(0, 0)] * (x.ndim - 2), (0, length - x.shape[-2]), (0, 0)])
    is_cache = lambda x: isinstance(x, Cache)
    return jax.tree.map(lambda each: Cache(jax.tree.map(pad, each.own), each.cross), cache, is_leaf=is_cache)
