"""What the fused attention kernels share: the rules of a mask inside a kernel, and the split over the devices.

A fused kernel evaluates a `MaskSpec` block by block and never writes scores to main memory. `tpu_attention` and
`gpu_attention` are such kernels.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from t5like.model.masks import MaskSpec
from t5like.sharding.logical_axes import RULES
from t5like.sharding.logical_axes import spec as partition


class KernelSpec(NamedTuple):
    """What is static of a kernel besides shapes. Windows as in `MaskSpec`; 0 also where they hide no key."""

    causal: bool
    window: int
    window_ahead: int
    interpret: bool
    softcap: float = 0.0  # of `plain.soft_capped`, applied to q k before the bias is added

    def allowed(
        self, behind: jax.Array, prefix: jax.Array | None, query_segments: jax.Array | None, key_segments: jax.Array
    ) -> jax.Array | None:
        """Which keys queries attend to; None: all. The arguments broadcast to the shape of the scores of a block.

        Args:
            behind: index of the query - index of the key; used only under `by_index`.
            prefix: not 0 at keys that a causal mask does not hide, or None.
            query_segments: as in `MaskSpec`, or None.
            key_segments: used with `query_segments`.
        """
        conditions = []
        if self.causal:
            conditions.append(behind >= 0 if prefix is None else (behind >= 0) | (prefix != 0))
        if self.window:
            conditions.append(behind < self.window)
        if self.window_ahead:
            conditions.append(behind > -self.window_ahead)
        if query_segments is not None:
            conditions.append((query_segments == key_segments) & (key_segments != 0))
        return functools.reduce(jnp.logical_and, conditions) if conditions else None

    def capped(self, scores: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Scores q k of a block with the soft cap, and their derivative by q k; None: it is 1."""
        if not self.softcap:
            return scores, None
        share = jnp.tanh(scores * (1 / self.softcap))
        return self.softcap * share, 1 - share * share

    @property
    def by_index(self) -> bool:
        """Whether the mask depends on the indices of queries and keys."""
        return bool(self.causal or self.window or self.window_ahead)


class Operands(NamedTuple):
    """What a device computes its part of the attention from; None where there is none.

    All keys of its rows, and as many queries as the mesh axis `context` leaves it; `first` is the index of the first
    of them among the keys, int32 [1], or None for 0 and where no mask depends on it. The bias is the kernel's own.
    """

    q_BNLH: jax.Array
    k_BKSH: jax.Array
    v_BKSH: jax.Array
    bias: jax.Array | None
    query_segments_BL: jax.Array | None
    key_segments_BS: jax.Array | None
    prefix_BS: jax.Array | None
    first: jax.Array | None = None


def attend_on_shards(
    kernel: Callable[[KernelSpec, Operands], jax.Array],
    operands: Operands,
    mask: MaskSpec,
    bias_partition: PartitionSpec,
    *,
    softcap: float,
    interpret: bool,
) -> jax.Array:
    """Run a kernel on every device of the mesh for its rows, heads and queries: the compiler can't split a kernel.

    Args:
        kernel: computes the output [B, N, L, H] of its operands.
        operands: of the whole mesh; segments and prefix are taken from the mask.
        mask: without `allowed_B1LS`.
        bias_partition: how the bias is split.
        softcap: see `KernelSpec`.
        interpret: run as plain JAX, on any machine.

    Returns:
        [B, N, L, H] in the dtype of v.
    """
    assert mask.allowed_B1LS is None
    queries, keys = operands.q_BNLH.shape[2], operands.k_BKSH.shape[2]
    window, ahead = (size if size < keys else 0 for size in (mask.window, mask.window_ahead))
    spec = KernelSpec(mask.causal, window, ahead, interpret, softcap)
    operands = operands._replace(
        query_segments_BL=mask.query_segments_BL,
        key_segments_BS=mask.key_segments_BS,
        prefix_BS=mask.prefix_BS if mask.causal else None,
    )

    def attend_shard(*shards):
        local = Operands(*shards)
        if local.k_BKSH.shape[2] < keys:  # its backward pass sums each part on the device that has it
            gather = functools.partial(jax.lax.all_gather, axis_name=RULES["length"], axis=2, tiled=True)
            local = local._replace(k_BKSH=gather(local.k_BKSH), v_BKSH=gather(local.v_BKSH))
        own_queries = local.q_BNLH.shape[2]
        if own_queries < queries and spec.by_index:
            local = local._replace(first=(jax.lax.axis_index(RULES["length"]) * own_queries)[None])
        return kernel(spec, local)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attend_shard(*operands)
    heads = lambda length: partition(("batch", "act_heads", "length", None), (1, 1, length, 1))
    rows = partition(("batch", None))
    specs = Operands(
        heads(queries),
        heads(keys),
        heads(keys),
        bias_partition,
        partition(("batch", "length"), (1, queries)),
        rows,
        rows,
        rows,
    )
    return jax.shard_map(attend_shard, in_specs=tuple(specs), out_specs=heads(queries), check_vma=False)(*operands)


def matmul(left: jax.Array, right: jax.Array, left_dim: int, right_dim: int) -> jax.Array:
    """A float32 matmul that contracts these dims."""
    dims = (((left_dim,), (right_dim,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)
