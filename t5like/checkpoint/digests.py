"""Digests of arrays, stored in a checkpoint's metadata, so that a changed bit is never restored silently.

Called by `checkpoints`, before arrays are written and after they are read.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t5like.types import Array

PART_BYTES = 8 * 2**20  # of an array whose digest is computed at once


class Leaf(NamedTuple):
    """A stored array without its values."""

    shape: tuple[int, ...]
    dtype: str
    digest: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def describe(leaves: Mapping[str, Array]) -> dict[str, Leaf]:
    """Return shape, dtype and digest of each array.

    On one device the leaves are processed sequentially: on a CPU, one program for all of them needs twice the memory.
    """
    if all(len(leaf.sharding.device_set) == 1 for leaf in leaves.values() if isinstance(leaf, jax.Array)):
        digests = {name: jax.device_get(_digest_in_parts(leaf)) for name, leaf in leaves.items()}
    else:
        digests = jax.device_get(_digests(dict(leaves)))
    return {
        name: Leaf(tuple(leaf.shape), str(leaf.dtype), tuple(int(lane) for lane in digests[name]))
        for name, leaf in leaves.items()
    }


@jax.jit
def _digests(leaves: dict[str, Array]) -> dict[str, tuple[Array, Array]]:
    """One program for all leaves: on many CPU devices, programs that run in parallel can block each other."""
    return {name: digest(leaf) for name, leaf in leaves.items()}


def _digest_in_parts(x: Array) -> tuple[Array, Array]:
    """Like `digest`, in parts of some MB: otherwise a CPU needs twice the memory of the largest leaf in addition."""
    rows = max(PART_BYTES // max(x.nbytes // max(x.shape[0], 1), 1), 1) if x.ndim else 1
    if not x.ndim or x.shape[0] <= rows:
        return digest(x)
    sums = (0, 0)
    for start in range(0, x.shape[0], rows):
        part = jax.lax.dynamic_slice_in_dim(x, start, min(rows, x.shape[0] - start))
        lanes = jax.device_get(digest(part, np.uint32(start)))  # waits, so that only one part exists at a time
        sums = tuple((total + int(lane)) % 2**32 for total, lane in zip(sums, lanes, strict=True))
    return sums


@jax.jit
def digest(x: Array, first_row: Array | int = 0) -> tuple[Array, Array]:
    """Return two uint32 that depend on the bits and the position of every element, but not on the sharding.

    Each lane is the wrapping sum of ``mix(bits ^ key(index))``, where mix is MurmurHash3's 32-bit finalizer. That is a
    bijection, so one changed element always changes the digest. `first_row`: index of x's first row in a larger array.
    """
    bits = (
        x.astype(jnp.uint32)
        if x.dtype == bool
        else jax.lax.bitcast_convert_type(
            x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
        ).astype(jnp.uint32)
    )
    index = jnp.zeros(bits.shape, jnp.uint32)
    for dim, size in enumerate(bits.shape):
        position = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dim)
        index = index * np.uint32(size % 2**32) + (position if dim else position + jnp.uint32(first_row))

    def lane(key: int) -> Array:
        mixed = bits ^ (index * np.uint32(key) + np.uint32(key >> 1))
        mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x85EBCA6B)
        mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
        return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)

    return lane(0x9E3779B1), lane(0x7FEB352D)
