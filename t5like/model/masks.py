"""Attention masks as specifications: fused kernels evaluate them block by block, `MaskSpec.build` makes the array."""

import dataclasses
from functools import partial, reduce

import jax
import jax.numpy as jnp


def window_mask(
    queries: int,
    keys: int,
    first_query: jax.Array | int,
    window: int,
    branch_start: int | None = None,
    *,
    window_ahead: int = 0,
) -> jax.Array:
    """[1, 1, L, S]: True where the key is less than `window` positions before the query, or at or after it.

    Args:
        queries: L.
        keys: S.
        first_query: index of the first query among the keys.
        window: tokens: the query itself and the window - 1 before it.
        branch_start: from this index on, each group of L consecutive keys has one position; so have the queries.
        window_ahead: keys must also be less than so many positions after the query; 0: no limit.
    """
    position = lambda index: (
        index
        if branch_start is None
        else jnp.where(index < branch_start, index, branch_start + (index - branch_start) // queries)
    )
    query_L1 = position(jnp.arange(queries)[:, None] + first_query)
    key_1S = position(jnp.arange(keys)[None, :])
    allowed_LS = key_1S > query_L1 - window
    if window_ahead:
        allowed_LS = allowed_LS & (key_1S < query_L1 + window_ahead)
    return allowed_LS[None, None]


def causal_mask(queries: int, keys: int, first_query: jax.Array | int = 0) -> jax.Array:
    """[1, 1, L, S]: True where the key is not after the query."""
    return (jnp.arange(keys)[None, :] <= jnp.arange(queries)[:, None] + first_query)[None, None]


def segment_mask(query_segments_BL: jax.Array, key_segments_BS: jax.Array) -> jax.Array:
    """[B, 1, L, S]: True where query and key belong to the same document and the key is not padding (segment 0)."""
    same = query_segments_BL[:, None, :, None] == key_segments_BS[:, None, None, :]
    return same & (key_segments_BS != 0)[:, None, None, :]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["query_segments_BL", "key_segments_BS", "prefix_BS", "allowed_B1LS"],
    meta_fields=["causal", "window", "window_ahead"],
)
@dataclasses.dataclass(frozen=True)
class MaskSpec:
    """Which keys a query attends to: those that all of these conditions allow. The default allows every key.

    Attributes:
        causal: only keys up to the query's own index, and those of a prefix.
        query_segments_BL: with `key_segments_BS`, as in `segment_mask`; both None: one document, no padding.
        prefix_BS: bool, True at keys that a causal mask does not hide; None: no such keys.
        allowed_B1LS: bool, an explicit mask, first dim 1 or B; None: no condition. Fused kernels do not take it.
        window: as in `window_mask`; 0: no window. By index in the row: documents that follow each other, and padding
            on the left, shift query and key alike.
        window_ahead: as in `window_mask`.
    """

    causal: bool = False
    query_segments_BL: jax.Array | None = None
    key_segments_BS: jax.Array | None = None
    prefix_BS: jax.Array | None = None
    allowed_B1LS: jax.Array | None = None
    window: int = 0
    window_ahead: int = 0

    def build(
        self, queries: int, keys: int, first_query: jax.Array | int = 0, branch_start: int | None = None
    ) -> jax.Array | None:
        """The mask as an array, [1 or B, 1, L, S]; None where every key is allowed. Arguments as in `window_mask`."""
        masks = [] if self.allowed_B1LS is None else [self.allowed_B1LS]
        if self.causal:
            before = causal_mask(queries, keys, first_query)
            masks.append(before if self.prefix_BS is None else before | self.prefix_BS[:, None, None, :])
        if self.window:
            ahead = self.window_ahead
            masks.append(window_mask(queries, keys, first_query, self.window, branch_start, window_ahead=ahead))
        if self.query_segments_BL is not None:
            masks.append(segment_mask(self.query_segments_BL, self.key_segments_BS))
        return reduce(jnp.logical_and, masks) if masks else None
