"""Digests of arrays, stored in a checkpoint's metadata, so that a changed bit is never restored silently.

Called by `checkpoints`, before arrays are written and after they are read onto devices, and by `verification`, which
reads them in blocks on the host.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t5like.sharding.mesh import on_cpus
from t5like.types import Array

PART_BYTES = 8 * 2**20  # of an array whose digest is computed at once on a device
HOST_ELEMENTS = 2**15  # of a block, on the host
HOST_BYTES = 16 * 2**20  # of a state on CPUs whose digests are computed on the host: programs take longer to compile
KEYS = (0x9E3779B1, 0x7FEB352D)  # of the two lanes


class Leaf(NamedTuple):
    """A stored array without its values."""

    shape: tuple[int, ...]
    dtype: str
    digest: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def describe(leaves: Mapping[str, Array]) -> dict[str, Leaf]:
    """Return shape, dtype and digest of each array."""
    return examine(leaves)[0]


def on_one_cpu(leaves: Mapping[str, Array]) -> bool:
    """Whether all arrays are on one CPU device. There a digest takes longer than a step should wait: 1 s for 1 GB."""
    if not all(isinstance(leaf, jax.Array) for leaf in leaves.values()):
        return False
    devices = set().union(*(leaf.sharding.device_set for leaf in leaves.values()))
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


def snapshot(leaves: Mapping[str, Array]) -> dict[str, Array]:
    """Arrays on one CPU device that keep these values when the given arrays are donated; their memory is shared.

    XLA:CPU copies a donated array instead of writing into memory that a NumPy view still uses.
    """
    return {name: jax.device_put(np.asarray(leaf), leaf.sharding) for name, leaf in leaves.items()}


def not_finite(leaves: Mapping[str, Array]) -> list[str]:
    """Return the names of arrays on one CPU with NaN or infinity, as `examine` does, in a fifth of the time."""
    floats = [name for name, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return [name for name in floats if not _is_finite(np.asarray(leaves[name]).reshape(-1))]


def _is_finite(values: np.ndarray) -> bool:
    """Whether all values are finite; in parts that fit into a processor's cache."""
    parts = range(0, values.size, HOST_ELEMENTS)
    with np.errstate(invalid="ignore"):  # a warning about bfloat16
        return all(np.isfinite(values[start : start + HOST_ELEMENTS]).all() for start in parts)


def examine(leaves: Mapping[str, Array]) -> tuple[dict[str, Leaf], list[str]]:
    """Return shape, dtype and digest of each array, and the names of those with NaN or infinity.

    On one device the leaves are processed sequentially: on a CPU, one program for all of them needs twice the memory.
    """
    if sum(leaf.nbytes for leaf in leaves.values()) <= HOST_BYTES and all(map(is_on_host, leaves.values())):
        sums = {name: _sum_blocks(leaf) for name, leaf in leaves.items()}
    elif all(len(leaf.sharding.device_set) == 1 for leaf in leaves.values() if isinstance(leaf, jax.Array)):
        sums = {name: jax.device_get(_sum_parts(leaf)) for name, leaf in leaves.items()}
    else:
        sums = jax.device_get(_sums(dict(leaves)))
    described = {
        name: Leaf(tuple(leaf.shape), str(leaf.dtype), tuple(int(lane) for lane in sums[name][:2]))
        for name, leaf in leaves.items()
    }
    return described, [name for name in leaves if sums[name][2]]


def is_on_host(x: Array) -> bool:
    """Whether all of an array is in the memory of this process."""
    return not isinstance(x, jax.Array) or (x.is_fully_addressable and on_cpus(x.sharding.device_set))


def _sum_blocks(x: Array) -> tuple[int, int, int]:
    """Like `digest`, on the host, from the blocks that the devices have; third: 1 if a value is not finite, else 0."""
    blocks = [(np.asarray(x), (0,) * x.ndim)]
    if isinstance(x, jax.Array):
        shards = [shard for shard in x.addressable_shards if shard.replica_id == 0]
        blocks = [(np.asarray(shard.data), [part.start or 0 for part in shard.index]) for shard in shards]
    lanes = np.array([digest_block(block, offset, x.shape) for block, offset in blocks], np.uint64).sum(0) % 2**32
    wrong = jnp.issubdtype(x.dtype, jnp.floating) and not all(_is_finite(block.reshape(-1)) for block, _ in blocks)
    return int(lanes[0]), int(lanes[1]), int(wrong)


@jax.jit
def _sums(leaves: dict[str, Array]) -> dict[str, tuple[Array, Array, Array]]:
    """One program for all leaves: on many CPU devices, programs that run in parallel can block each other."""
    return {name: digest(leaf) for name, leaf in leaves.items()}


def _sum_parts(x: Array) -> tuple[Array, Array, Array]:
    """Like `digest`, in parts of some MB: otherwise a CPU needs twice the memory of the largest leaf in addition."""
    rows = max(PART_BYTES // max(x.nbytes // max(x.shape[0], 1), 1), 1) if x.ndim else 1
    if not x.ndim or x.shape[0] <= rows:
        return digest(x)
    sums = (0, 0, 0)
    for start in range(0, x.shape[0], rows):
        part = jax.lax.dynamic_slice_in_dim(x, start, min(rows, x.shape[0] - start))
        lanes = jax.device_get(digest(part, np.uint32(start)))  # waits, so that only one part exists at a time
        sums = tuple((total + int(lane)) % 2**32 for total, lane in zip(sums, lanes, strict=True))
    return sums


@jax.jit
def digest(x: Array, first_row: Array | int = 0) -> tuple[Array, Array, Array]:
    """Return two uint32 that depend on the bits and the position of every element, but not on the sharding.

    Each lane is the wrapping sum of ``mix(bits ^ key(index))``, where mix is MurmurHash3's 32-bit finalizer. That is a
    bijection, so one changed element always changes the digest. `first_row`: index of x's first row in a larger array.
    The third number counts the elements that are NaN or infinite.
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

    not_finite = jnp.zeros((), jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.floating):
        not_finite = jnp.sum(~jnp.isfinite(x), dtype=jnp.uint32)
    return *(lane(key) for key in KEYS), not_finite


def digest_block(block: np.ndarray, offset: Sequence[int], shape: Sequence[int]) -> tuple[int, int]:
    """Return what a block of an array adds to its digest, computed on the host.

    Args:
        block: part of the array.
        offset: index of the block's first element in each dim of the array.
        shape: of the array.
    """
    width = {"bool": np.uint8, 1: np.uint8, 2: np.uint16}.get(
        "bool" if block.dtype == bool else block.dtype.itemsize, np.uint32
    )
    if block.dtype.itemsize == 8:  # as two words, of which `jax.lax.bitcast_convert_type` makes a last dim
        block, offset, shape = block[..., None].view(np.uint32), (*offset, 0), (*shape, 2)
    bits = np.ascontiguousarray(block).view(width)
    index = np.zeros((1,) * bits.ndim, np.uint32)
    for dim, size in enumerate(shape):
        position = np.arange(offset[dim], offset[dim] + bits.shape[dim], dtype=np.uint64).astype(np.uint32)
        index = index * np.uint32(size % 2**32) + position.reshape([-1 if at == dim else 1 for at in range(bits.ndim)])
    bits, index = bits.reshape(-1), index.reshape(-1)
    sums = [0, 0]
    for start in range(0, bits.size, HOST_ELEMENTS):  # each part fits into a processor's cache
        part = slice(start, start + HOST_ELEMENTS)
        for lane, key in enumerate(KEYS):
            sums[lane] += _sum_mixed(bits[part], index[part], key)
    return sums[0] % 2**32, sums[1] % 2**32


def _sum_mixed(bits: np.ndarray, index: np.ndarray, key: int) -> int:
    mixed = index * np.uint32(key)
    mixed += np.uint32(key >> 1)
    mixed ^= bits
    shifted = mixed >> np.uint32(16)
    for shift, factor in ((13, 0x85EBCA6B), (16, 0xC2B2AE35)):
        mixed ^= shifted
        mixed *= np.uint32(factor)
        np.right_shift(mixed, np.uint32(shift), out=shifted)
    mixed ^= shifted
    return int(mixed.sum(dtype=np.uint32))
