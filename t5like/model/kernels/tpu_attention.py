"""Attention for TPUs as one fused Pallas kernel.

Plain attention writes float32 scores [B, N, L, S] to main memory and reads them in several passes. In the kernel they
never leave the core, forward or backward: one program computes a head of a row. Keys and values are in the core's
memory (VMEM) as a whole, queries come in blocks, so a softmax reads all its scores at once: there is no running maximum
as in FlashAttention (Dao et al. 2022). Its other idea is used: the backward pass saves only the operands and recomputes
the weights. The mask is a `MaskSpec`, evaluated in the core; a block of queries reads only the keys that a causal mask
and a window allow, on one side or on both. The relative bias is read once per head, and its gradient is summed over the
rows in the core. Over the mesh axis `context` a device has its own queries and gathers keys and values. Lengths that do
not fit in VMEM (`fits`) use the plain kernel.

`attention_plan` decides when the kernel is used, `sharding.auto` on which machines. It is compiled for TPUs, and runs
in Pallas' interpreter on CPUs (the tests); it has not run on a TPU yet.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from t5like.model.kernels.fused_attention import KernelSpec, Operands, attend_on_shards, matmul
from t5like.model.masks import MaskSpec
from t5like.sharding.logical_axes import batch_parts, constrain, device_kind
from t5like.sharding.logical_axes import spec as partition
from t5like.types import MASKED

SCORES_PER_BLOCK = 2**19  # of a block of queries, approximately; at least 128 queries
NUM_LANES = 128  # of a vector register: blocks of queries and their keys start at a multiple, as VMEM needs
MAX_UNROLLED_BLOCKS = 8  # more blocks than these become loops, which compile faster
LIVE_SCORE_BUFFERS = 6  # float32 arrays of a block's scores that are alive at once
DEFAULT_VMEM_BYTES = 12 * 2**20  # a kernel that needs no more runs with the compiler's default limit
VMEM_LIMIT_BYTES = 48 * 2**20  # of a kernel; a core of a v5p has 64 MiB, those below 128 and 16
VMEM_LIMIT_BYTES_BY_CHIP = {
    "TPU v5 lite": 96 * 2**20,
    "TPU v6 lite": 96 * 2**20,
    "TPU v4": 14 * 2**20,
    "TPU v3": 14 * 2**20,
}


def fits(queries: int, keys: int, head_dim: int, dtype: str, *, biased: bool) -> bool:
    """Whether a head's operands and a block's scores fit in the memory of a core of the devices that this is for."""
    return _vmem_bytes(queries, keys, head_dim, jnp.dtype(dtype).itemsize, biased) <= _vmem_limit()


def _vmem_limit() -> int:
    return VMEM_LIMIT_BYTES_BY_CHIP.get(device_kind(), VMEM_LIMIT_BYTES)


def _vmem_bytes(queries: int, keys: int, head_dim: int, width: int, biased: bool) -> int:
    """Bytes of the core's memory for the backward pass: operands and results twice, segments, sums, bias, scores."""
    head = 2 * width * (3 * queries + 4 * keys) + 2 * 4 * keys
    bias = queries * keys * (width + 4) if biased else 0
    scores = 4 * LIVE_SCORE_BUFFERS * keys * _block_size(queries, keys)
    return pl.cdiv(head_dim, NUM_LANES) * NUM_LANES * head + 2 * 4 * NUM_LANES * queries + bias + scores


def bias_per_batch_shard(bias_1NLS: jax.Array) -> jax.Array:
    """The bias once for each shard of the batch, [R, N, L, S]: every device still holds one.

    Its gradient then stays on the device through all layers, and is summed over devices once behind them.
    """
    bias_RNLS = jnp.broadcast_to(bias_1NLS, (batch_parts(), *bias_1NLS.shape[1:]))
    return constrain(bias_RNLS, "batch", "act_heads", "length", None)


class KernelInputs(NamedTuple):
    """What a kernel reads, as arrays or references; None where there is none."""

    q_BNLH: Any
    k_BNSH: Any
    v_BNSH: Any
    bias_1NLS: Any = None
    query_segments_BL1: Any = None
    key_segments_B1S: Any = None
    prefix_B1S: Any = None  # int32, not 0 at keys that a causal mask does not hide
    first: Any = None  # int32 [1], index of the first query among the keys; None: 0
    gradient_BNLH: Any = None  # of the output; only for the backward pass


def attend(
    q_BNLH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    bias_RNLS: jax.Array | None = None,
    mask: MaskSpec = MaskSpec(),  # noqa: B008  (immutable)
    *,
    softcap: float = 0.0,
    interpret: bool = False,
) -> jax.Array:
    """softmax(q k + bias, where allowed) v, as `attention.attend`.

    Args:
        q_BNLH: queries; already scaled.
        k_BKSH: keys, of as many heads or fewer.
        v_BKSH: values.
        bias_RNLS: added to the scores, from `bias_per_batch_shard`.
        mask: without `allowed_B1LS`.
        softcap: see `KernelSpec`.
        interpret: run as plain JAX, on any machine.

    Returns:
        [B, N, L, H] in the dtype of v; 0 for a query that attends to no key.
    """
    operands = Operands(q_BNLH, k_BKSH, v_BKSH, bias_RNLS, None, None, None)
    bias_partition = partition(("batch", "act_heads", "length", None), (1, 1, q_BNLH.shape[2], 1))
    return attend_on_shards(_attend_shard, operands, mask, bias_partition, softcap=softcap, interpret=interpret)


def _attend_shard(spec: KernelSpec, operands: Operands) -> jax.Array:
    """`attend` on one device."""
    q_BNLH, k_BKSH, v_BKSH, query_segments_BL = (operands[i] for i in (0, 1, 2, 4))
    groups = q_BNLH.shape[1] // k_BKSH.shape[1]
    k_BNSH, v_BNSH = (jnp.repeat(x, groups, axis=1) if groups > 1 else x for x in (k_BKSH, v_BKSH))
    inputs = KernelInputs(q_BNLH, k_BNSH, v_BNSH, operands.bias, first=operands.first)
    if query_segments_BL is not None:
        inputs = inputs._replace(
            query_segments_BL1=query_segments_BL[:, :, None], key_segments_B1S=operands.key_segments_BS[:, None]
        )
    if operands.prefix_BS is not None:
        inputs = inputs._replace(prefix_B1S=operands.prefix_BS[:, None].astype(jnp.int32))
    return _attend(spec, inputs)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spec: KernelSpec, inputs: KernelInputs):
    return _call(_forward_kernel, spec, inputs, [(inputs.q_BNLH, inputs.v_BNSH.dtype)], matmuls=2)[0]


def _attend_backward(spec, inputs, gradient_BNLH):
    outputs = [(x, x.dtype) for x in inputs[:3]]
    if inputs.bias_1NLS is not None:
        outputs.append((inputs.bias_1NLS, jnp.float32))
    gradients = _call(_backward_kernel, spec, inputs._replace(gradient_BNLH=gradient_BNLH), outputs, matmuls=5)
    return (KernelInputs(*(gradient.astype(x.dtype) for gradient, x in zip(gradients, inputs, strict=False))),)


_attend.defvjp(lambda spec, inputs: (_attend(spec, inputs), inputs), _attend_backward)


def _block_specs(inputs: KernelInputs) -> list[pl.BlockSpec | None]:
    """The block of each input that one program of the grid reads."""
    head_of_row = lambda x: pl.BlockSpec((1, 1, *x.shape[2:]), lambda head, row: (row, head, 0, 0))
    row = lambda x: pl.BlockSpec((1, *x.shape[1:]), lambda head, row: (row, 0, 0))
    # The next head's bias is not read ahead: it would take its memory twice.
    head = lambda x: pl.BlockSpec((1, 1, *x.shape[2:]), lambda head, row: (0, head, 0, 0), pipeline_mode=pl.Buffered(1))
    scalar = lambda x: pl.BlockSpec(memory_space=pltpu.SMEM)
    makers = KernelInputs(head_of_row, head_of_row, head_of_row, head, row, row, row, scalar, head_of_row)
    return [None if x is None else make(x) for make, x in zip(makers, inputs, strict=True)]


def _call(kernel, spec: KernelSpec, inputs: KernelInputs, outputs, *, matmuls: int) -> list[jax.Array]:
    rows, heads, queries, head_dim = inputs.q_BNLH.shape
    keys = inputs.k_BNSH.shape[2]
    scores = sum(group.size * group.blocks * group.keys for group in _block_groups(spec, inputs, queries, keys))
    specs, arrays = _block_specs(inputs), [*jax.tree.leaves(inputs), *(like for like, _ in outputs)]
    memory = _vmem_bytes(queries, keys, head_dim, inputs.q_BNLH.dtype.itemsize, inputs.bias_1NLS is not None)
    return pl.pallas_call(
        partial(kernel, spec),
        grid=(heads, rows),  # rows are the inner loop: a head's bias stays in VMEM
        in_specs=tuple(specs),
        out_specs=specs[: len(outputs)],
        out_shape=[jax.ShapeDtypeStruct(like.shape, dtype) for like, dtype in outputs],
        scratch_shapes=[pltpu.VMEM((keys, head_dim), jnp.float32)] * 2 if matmuls == 5 else [],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=None
            if memory <= DEFAULT_VMEM_BYTES
            else min(max(memory, VMEM_LIMIT_BYTES), _vmem_limit()),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * matmuls * rows * heads * scores * head_dim,
            transcendentals=rows * heads * scores,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
        ),
        interpret=spec.interpret,
        name=f"attention_{'forward' if matmuls == 2 else 'backward'}",
    )(*inputs)


class _BlockGroup(NamedTuple):
    """Consecutive blocks of queries. The keys of each end at `end`, or, with a window, move with the block."""

    first: int  # index of the first query
    size: int  # queries of a block
    blocks: int
    keys: int  # keys that a block reads
    end: int  # index behind the last key


def _reach(spec: KernelSpec, inputs: KernelInputs) -> tuple[int | None, int | None]:
    """Keys before and after its own index that a query attends to; None: no limit."""
    after = spec.window_ahead - 1 if spec.window_ahead else None
    if spec.causal and inputs.prefix_B1S is None:
        after = 0
    return spec.window - 1 if spec.window else None, after


def _block_size(queries: int, keys: int, width: int | None = None) -> int:
    """Queries of a block; with a window of `width` keys not many more than half of them, or it would hide few keys."""
    size = max(SCORES_PER_BLOCK // keys // NUM_LANES, 1)
    if width is not None:
        size = min(size, pl.cdiv(width, 2 * NUM_LANES))
    return min(queries, size * NUM_LANES)


def _block_groups(spec: KernelSpec, inputs: KernelInputs, queries: int, keys: int) -> Iterator[_BlockGroup]:
    """Blocks that read the same number of keys; the last one may be smaller.

    No block of a group reads keys that are hidden behind its last query, on the device with the last queries. If keys
    are hidden on both sides, a block reads the others only, and those up to a multiple of NUM_LANES.
    """
    before, after = _reach(spec, inputs)
    width = None if before is None or after is None else before + 1 + after
    size = _block_size(queries, keys, width)
    full = queries // size
    step = pl.cdiv(full, MAX_UNROLLED_BLOCKS)
    parts = [(first * size, size, min(step, full - first)) for first in range(0, full, step)]
    if queries % size:
        parts.append((full * size, queries % size, 1))
    for first, size, blocks in parts:
        end = keys
        if after is not None:
            end = max(keys - queries, 0) + first + size * blocks + after
            end = min(keys, pl.cdiv(end, NUM_LANES) * NUM_LANES)
        span = end
        if width is not None:  # from a multiple of NUM_LANES on
            span = end - max(end - size - width - NUM_LANES, 0) // NUM_LANES * NUM_LANES
        yield _BlockGroup(first, size, blocks, span, end)


def _for_each_block(spec: KernelSpec, inputs: KernelInputs, body: Callable[[pl.Slice, pl.Slice], None]) -> None:
    """Call `body` with the queries of each block and the keys that it reads."""

    def block(group: _BlockGroup, number: int | jax.Array) -> None:
        first, key = group.first + number * group.size, 0
        if group.blocks > 1:
            first = pl.multiple_of(first, NUM_LANES)
        if group.keys < group.end:
            earliest = first + (0 if inputs.first is None else inputs.first[0]) - spec.window + 1
            key = jax.lax.div(jnp.clip(earliest, 0, group.end - group.keys), NUM_LANES) * NUM_LANES
            key = pl.multiple_of(key, NUM_LANES)
        body(pl.ds(first, group.size), pl.ds(key, group.keys))

    for group in _block_groups(spec, inputs, inputs.q_BNLH.shape[2], inputs.k_BNSH.shape[2]):
        if group.blocks == 1:
            block(group, 0)
        else:
            pl.loop(0, group.blocks)(partial(block, group))


def _block_mask(spec: KernelSpec, inputs: KernelInputs, queries: pl.Slice, keys: pl.Slice) -> jax.Array | None:
    """Which keys each query attends to, [L, S]; None: all."""
    behind_LS = prefix_1S = of_queries_L1 = of_keys_1S = None
    if spec.by_index:
        index = partial(jax.lax.broadcasted_iota, jnp.int32, (queries.size, keys.size))
        first = 0 if inputs.first is None else inputs.first[0]
        behind_LS = index(0) - index(1) + (queries.start + first - keys.start)
    if inputs.prefix_B1S is not None:
        prefix_1S = inputs.prefix_B1S[0, :, keys]
    if inputs.query_segments_BL1 is not None:
        of_queries_L1, of_keys_1S = inputs.query_segments_BL1[0, queries], inputs.key_segments_B1S[0, :, keys]
    return spec.allowed(behind_LS, prefix_1S, of_queries_L1, of_keys_1S)


def _weights(
    spec: KernelSpec, inputs: KernelInputs, queries: pl.Slice, keys: pl.Slice
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Softmax weights [L, S], float32, not normalized; the factor [L, 1] that does it; the slope of the soft cap."""
    scores_LS, slope_LS = spec.capped(matmul(inputs.q_BNLH[0, 0, queries], inputs.k_BNSH[0, 0, keys], 1, 1))
    if inputs.bias_1NLS is not None:
        scores_LS = scores_LS + inputs.bias_1NLS[0, 0, queries, keys].astype(jnp.float32)
    allowed_LS = _block_mask(spec, inputs, queries, keys)
    if allowed_LS is not None:
        scores_LS = jnp.where(allowed_LS, scores_LS, MASKED)
    weights_LS = jnp.exp(scores_LS - scores_LS.max(-1, keepdims=True))
    if inputs.query_segments_BL1 is None:
        return weights_LS, 1 / weights_LS.sum(-1, keepdims=True), slope_LS
    weights_LS = jnp.where(allowed_LS, weights_LS, 0.0)
    sums_L1 = jnp.maximum(weights_LS.sum(-1, keepdims=True), 1e-30)  # a query may attend to no key
    return weights_LS, 1 / sums_L1, slope_LS


def _forward_kernel(spec: KernelSpec, *refs) -> None:
    *refs, out_ref = refs
    inputs = KernelInputs(*refs)

    def block(queries, keys):
        weights_LS, scale_L1, _ = _weights(spec, inputs, queries, keys)
        v_SH = inputs.v_BNSH[0, 0, keys]
        out_LH = matmul(weights_LS.astype(v_SH.dtype), v_SH, 1, 0)
        out_ref[0, 0, queries] = (out_LH * scale_L1).astype(out_ref.dtype)

    _for_each_block(spec, inputs, block)


def _backward_kernel(spec: KernelSpec, *refs) -> None:
    count = len(KernelInputs._fields)
    inputs, (q_out, k_out, v_out, *bias_out), (k_sum_SH, v_sum_SH) = (
        KernelInputs(*refs[:count]),
        refs[count:-2],
        refs[-2:],
    )
    k_sum_SH[...] = jnp.zeros_like(k_sum_SH)
    v_sum_SH[...] = jnp.zeros_like(v_sum_SH)
    if bias_out:

        @pl.when(pl.program_id(1) == 0)
        def _():
            bias_out[0][...] = jnp.zeros_like(bias_out[0])

    def block(queries, keys):
        q_LH, d_out_LH = inputs.q_BNLH[0, 0, queries], inputs.gradient_BNLH[0, 0, queries]
        k_SH, v_SH = inputs.k_BNSH[0, 0, keys], inputs.v_BNSH[0, 0, keys]
        weights_LS, scale_L1, slope_LS = _weights(spec, inputs, queries, keys)
        weights_LS = weights_LS * scale_L1
        v_sum_SH[keys] += matmul(weights_LS.astype(v_SH.dtype), d_out_LH, 0, 0)
        d_weights_LS = matmul(d_out_LH, v_SH, 1, 1)
        d_scores_LS = weights_LS * (d_weights_LS - (weights_LS * d_weights_LS).sum(-1, keepdims=True))
        if bias_out:
            bias_out[0][0, 0, queries, keys] += d_scores_LS
        if slope_LS is not None:
            d_scores_LS = d_scores_LS * slope_LS
        d_scores_LS = d_scores_LS.astype(q_LH.dtype)
        q_out[0, 0, queries] = matmul(d_scores_LS, k_SH, 1, 0).astype(q_out.dtype)
        k_sum_SH[keys] += matmul(d_scores_LS, q_LH, 0, 0)

    _for_each_block(spec, inputs, block)
    k_out[0, 0] = k_sum_SH[...].astype(k_out.dtype)
    v_out[0, 0] = v_sum_SH[...].astype(v_out.dtype)
