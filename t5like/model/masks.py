"""Attention masks: causal, windowed, by segment; as arrays, or as a specification that kernels evaluate."""

import dataclasses
from functools import partial, reduce

import jax
import jax.numpy as jnp


def window_mask(
    queries: int, keys: int, first_query: jax.Array | int, window: int, fork: int | None = None
) -> jax.Array:
    """[1, 1, L, S]: True where the key is the query itself, one of the window - 1 before it, or after it.

    From place `fork` on, each L keys that follow each other stand at the same position, as the queries do.
    """
    position = lambda place: place if fork is None else jnp.where(place < fork, place, fork + (place - fork) // queries)
    query_L1 = position(jnp.arange(queries)[:, None] + first_query)
    return (position(jnp.arange(keys)[None, :]) > query_L1 - window)[None, None]


def causal_mask(queries: int, keys: int, first_query: jax.Array | int = 0) -> jax.Array:
    """[1, 1, L, S]: True where the key does not lie after the query."""
    return (jnp.arange(keys)[None, :] <= jnp.arange(queries)[:, None] + first_query)[None, None]


def segment_mask(query_segments_BL: jax.Array, key_segments_BS: jax.Array) -> jax.Array:
    """[B, 1, L, S]: True where query and key belong to the same document and the key is no padding (segment 0)."""
    same = query_segments_BL[:, None, :, None] == key_segments_BS[:, None, None, :]
    return same & (key_segments_BS != 0)[:, None, None, :]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["query_segments_BL", "key_segments_BS", "prefix_BS"],
    meta_fields=["causal", "window"],
)
@dataclasses.dataclass(frozen=True)
class MaskSpec:
    """What may be seen, by rule instead of as an array: a kernel works it out where it needs it.

    Attributes:
        causal: whether a query sees only the keys up to its own place, and those of a prefix.
        query_segments_BL: with `key_segments_BS`, as in `segment_mask`; both None: one document, no padding.
        prefix_BS: bool, True at keys that are seen from before them too; None: no such keys.
        window: as in `window_mask`; 0: none. By place in the row: documents behind each other, as padding on the left,
            shift query and key alike.
    """

    causal: bool = False
    query_segments_BL: jax.Array | None = None
    key_segments_BS: jax.Array | None = None
    prefix_BS: jax.Array | None = None
    window: int = 0

    def mask(self, queries: int, keys: int) -> jax.Array | None:
        """The same as an array, [1 or B, 1, L, S]; None: everything."""
        masks = []
        if self.causal:
            before = causal_mask(queries, keys)
            masks.append(before if self.prefix_BS is None else before | self.prefix_BS[:, None, None, :])
        if self.window:
            masks.append(window_mask(queries, keys, 0, self.window))
        if self.query_segments_BL is not None:
            masks.append(segment_mask(self.query_segments_BL, self.key_segments_BS))
        return reduce(jnp.logical_and, masks) if masks else None
