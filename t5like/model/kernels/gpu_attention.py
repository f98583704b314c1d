"""Attention for NVIDIA GPUs as fused Pallas kernels, with T5's relative position bias and its exact gradient.

FlashAttention-2 (Dao 2023): a program has a block of queries, reads keys and values block by block, and keeps a running
maximum and sum, so that scores [B, N, L, S] never leave the registers. The backward pass recomputes the weights from
their logarithmic sums, in three kernels: one for the gradients of keys and values, one for those of queries, one for
the bias. Blocks that a causal mask or a window hides are skipped. Heads of a group share their keys: none are repeated.

The bias depends on key - query only. The kernels read it from a vector of all distances, a few KiB that stay in a
core's cache: no bias [N, L, S] exists. Its gradient needs the sums of the scores' gradients along diagonals. Blocks on
one diagonal of blocks have the same distances, so a program adds up their scores' gradients as they are, over rows and
blocks, and only one block per diagonal of blocks is written. There are no atomic additions, so results are the same in
every run. (cuDNN's attention takes a bias only as an array, and in JAX its gradient only for one row: issue
jax-ml/jax#30593. So it is not used.)

It is written for Pallas' Triton backend: compiled for NVIDIA GPUs from compute capability 8.0 (A100) on, run by the
interpreter on CPUs (the tests), and compiled for an H100 without one (`make gpu`). It has not run on a GPU yet. JAX
0.11 still has this backend, with a warning that a later version will not.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from t5like.model.kernels.fused_attention import KernelSpec, Operands, attend_on_shards
from t5like.model.kernels.gpu_attention_kernels import (
    BIAS_ALIGNMENT,
    Blocks,
    KernelInputs,
    Program,
    Sizes,
    bias_kernel,
    forward_kernel,
    keys_kernel,
    padded_head_dim,
    queries_kernel,
    rounded_up,
)
from t5like.model.masks import MaskSpec
from t5like.sharding.logical_axes import batch_parts, constrain, context_size
from t5like.sharding.logical_axes import spec as partition

MAX_HEAD_BYTES = 512  # of a vector of a query: 256 numbers in bfloat16
BIAS_PROGRAMS = 1024  # of the kernel for the bias's gradient, approximately: several for each core of a GPU


# By kernel and bytes of a query's vector (up to 128: 64 numbers in bfloat16), without and with a bias, whose addresses
# take registers. Chosen by what the compiler reports for an H100 and an A100: no or few spilled registers, two programs
# or more at a time in a core where possible, and blocks of 128 queries where loads of keys would else take the
# bandwidth of the L2 cache. Not measured.
BLOCKS = {
    ("forward", 128): (Blocks(128, 64, 8, 3), Blocks(64, 64, 4, 3)),
    ("queries", 128): (Blocks(128, 64, 8, 3), Blocks(64, 32, 4, 3)),
    ("keys", 128): (Blocks(64, 64, 4, 3), Blocks(32, 64, 4, 3)),
    ("bias", 128): (Blocks(64, 64, 4, 3),) * 2,
    ("forward", 256): (Blocks(128, 128, 8, 2), Blocks(64, 64, 4, 2)),
    ("queries", 256): (Blocks(64, 64, 4, 2),) * 2,
    ("keys", 256): (Blocks(64, 64, 4, 2), Blocks(32, 64, 4, 2)),
    ("bias", 256): (Blocks(64, 64, 4, 2),) * 2,
    ("forward", 512): (Blocks(64, 64, 4, 2),) * 2,
    ("queries", 512): (Blocks(64, 32, 4, 2),) * 2,
    ("keys", 512): (Blocks(32, 64, 8, 2),) * 2,
    ("bias", 512): (Blocks(64, 64, 8, 2),) * 2,
}


def fits(queries: int, keys: int, head_dim: int, dtype: str) -> bool:
    """Whether the blocks fit in the registers of a core: rows may have any length."""
    return head_dim * jnp.dtype(dtype).itemsize <= MAX_HEAD_BYTES


def distances(queries: int, keys: int) -> np.ndarray:
    """Key - query for each entry of a bias vector, int [P, W]; P > 1: a vector for each shard of a split length."""
    parts = context_size() if queries % context_size() == 0 else 1
    behind = rounded_up(queries // parts, BIAS_ALIGNMENT) - 1
    first_P1 = np.arange(parts)[:, None] * (queries // parts)
    return np.arange(-behind, rounded_up(keys, BIAS_ALIGNMENT)) - first_P1


def bias_of(table_RN: jax.Array, buckets_PW: np.ndarray) -> jax.Array:
    """The bias for `attend`, from a table of buckets and the bucket of each of the `distances`.

    A matmul looks it up, because its gradient adds up in the same order in every run, and a scatter's does not.
    """
    one_hot_PWR = jax.nn.one_hot(buckets_PW, table_RN.shape[0], dtype=table_RN.dtype)
    highest = jax.lax.Precision.HIGHEST  # every bit of the table
    return bias_per_shard(jnp.einsum("PWR,RN->PNW", one_hot_PWR, table_RN, precision=highest))


def bias_per_shard(bias_PNW: jax.Array) -> jax.Array:
    """The bias of `distances`, [P, N, W] float32, for `attend`: once for each shard of the batch, [R, P, N, W].

    Its gradient then stays on the device through all layers, and is summed over devices once behind them.
    """
    bias_RPNW = jnp.broadcast_to(bias_PNW, (batch_parts(), *bias_PNW.shape))
    return constrain(bias_RPNW, *_bias_axes(bias_PNW.shape[0]))


def bias_array(bias_RPNW: jax.Array, queries: int, keys: int) -> jax.Array:
    """The same bias as an array [1, N, L, S], for what looks at weights."""
    rows = queries // bias_RPNW.shape[1]
    index_LS = np.arange(keys) - np.arange(rows)[:, None] + rounded_up(rows, BIAS_ALIGNMENT) - 1
    return jnp.concatenate(list(bias_RPNW[0][:, :, index_LS]), axis=1)[None]


def _bias_axes(parts: int) -> tuple[str | None, ...]:
    return "batch", "parts" if parts > 1 else None, "act_heads", None


def attend(
    q_BNLH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    bias_RPNW: jax.Array | None = None,
    mask: MaskSpec = MaskSpec(),  # noqa: B008  (immutable)
    *,
    softcap: float = 0.0,
    interpret: bool = False,
) -> jax.Array:
    """softmax(q k + bias, where allowed) v, as `attention.attend`.

    Args:
        q_BNLH: queries; already scaled. H as in `fits`.
        k_BKSH: keys, of as many heads or fewer.
        v_BKSH: values.
        bias_RPNW: added to the scores by distance, from `bias_per_shard`; it has a gradient.
        mask: without `allowed_B1LS`.
        softcap: see `KernelSpec`.
        interpret: run as plain JAX, on any machine.

    Returns:
        [B, N, L, H] in the dtype of v; 0 for a query that attends to no key.
    """
    operands = Operands(q_BNLH, k_BKSH, v_BKSH, bias_RPNW, None, None, None)
    bias_partition = partition(_bias_axes(1 if bias_RPNW is None else bias_RPNW.shape[1]))
    return attend_on_shards(_attend_shard, operands, mask, bias_partition, softcap=softcap, interpret=interpret)


def _attend_shard(spec: KernelSpec, operands: Operands) -> jax.Array:
    """`attend` on one device."""
    q_BNLH, k_BKSH, v_BKSH, bias, *segments, prefix_BS, first = operands
    inputs = KernelInputs(q_BNLH, k_BKSH, v_BKSH, None, *segments, first=first)
    if bias is not None:
        inputs = inputs._replace(bias_NW=bias[0, 0])
    if prefix_BS is not None:
        end_B = jnp.where(prefix_BS, jnp.arange(1, 1 + prefix_BS.shape[1], dtype=jnp.int32), 0).max(-1)
        inputs = inputs._replace(prefix_BS=prefix_BS.astype(jnp.int32), prefix_end_B=end_B)
    return _attend(spec, inputs)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spec: KernelSpec, inputs: KernelInputs) -> jax.Array:
    return _attend_forward(spec, inputs)[0]


def _attend_forward(spec, inputs):
    q_BNLH, blocks = inputs.q_BNLH, _blocks("forward", inputs)
    rows, heads, queries, _ = q_BNLH.shape
    grid = (pl.cdiv(queries, blocks.queries), heads, rows)
    out = jax.ShapeDtypeStruct(q_BNLH.shape, inputs.v_BKSH.dtype)
    log_sums = jax.ShapeDtypeStruct((rows, heads, queries), jnp.float32)
    out_BNLH, log_sums_BNL = _call(forward_kernel, spec, inputs, blocks, grid, [out, log_sums])
    return out_BNLH, (inputs._replace(log_sums_BNL=log_sums_BNL), out_BNLH)


def _attend_backward(spec, saved, gradient_BNLH):
    inputs, out_BNLH = saved
    mean_BNL = (gradient_BNLH.astype(jnp.float32) * out_BNLH.astype(jnp.float32)).sum(-1)
    inputs = inputs._replace(gradient_BNLH=gradient_BNLH, mean_BNL=mean_BNL)
    (rows, heads, queries, _), (_, kv_heads, keys, _) = inputs.q_BNLH.shape, inputs.k_BKSH.shape
    blocks = _blocks("keys", inputs)
    grid = (pl.cdiv(keys, blocks.keys), kv_heads, rows)
    k_out, v_out = _call(keys_kernel, spec, inputs, blocks, grid, [inputs.k_BKSH, inputs.v_BKSH])
    blocks = _blocks("queries", inputs)
    grid = (pl.cdiv(queries, blocks.queries), heads, rows)
    (q_out,) = _call(queries_kernel, spec, inputs, blocks, grid, [inputs.q_BNLH])
    bias_out = None if inputs.bias_NW is None else _bias_gradient(spec, inputs)
    return (KernelInputs(q_out, k_out, v_out, bias_out),)


_attend.defvjp(_attend_forward, _attend_backward)


def _bias_gradient(spec: KernelSpec, inputs: KernelInputs) -> jax.Array:
    """The gradient of `bias_NW`, from the sums of blocks on each diagonal of blocks."""
    blocks = _blocks("bias", inputs)
    (rows, heads, queries, _), keys = inputs.q_BNLH.shape, inputs.k_BKSH.shape[2]
    behind, ahead = pl.cdiv(queries, blocks.queries), pl.cdiv(keys, blocks.keys)
    diagonals, size = behind + ahead - 1, blocks.keys
    most = max(BIAS_PROGRAMS // (diagonals * heads), 1)
    parts = max(parts for parts in range(1, rows + 1) if rows % parts == 0 and parts <= most)
    like = jax.ShapeDtypeStruct((parts, heads, diagonals, size, size), jnp.float32)
    (sums,) = _call(bias_kernel, spec, inputs, blocks, (diagonals, heads, parts), [like])
    # Row i of a block, reversed and shifted by i: distances stand in columns, from 1 - size to size - 1.
    flat = jnp.pad(sums.sum(0)[:, :, ::-1], ((0, 0), (0, 0), (0, 0), (0, size))).reshape(heads, diagonals, -1)
    sums_NDW = flat[:, :, :-size].reshape(heads, diagonals, size, 2 * size - 1).sum(2)
    # A diagonal's negative distances are the positive ones of the diagonal before it.
    none = jnp.zeros((heads, 1, size))
    before = jnp.pad(sums_NDW[:, :, : size - 1], ((0, 0), (0, 0), (1, 0)))
    after = sums_NDW[:, :, size - 1 :]
    sums_NW = (jnp.concatenate([before, none], 1) + jnp.concatenate([none, after], 1)).reshape(heads, -1)
    # sums_NW begins at distance -behind * size, the bias vector at 1 - the rounded number of queries.
    start = rounded_up(queries, BIAS_ALIGNMENT) - 1 - behind * size
    width = inputs.bias_NW.shape[1]
    if start < 0:
        sums_NW, start = sums_NW[:, -start:], 0
    gradient_NW = jnp.pad(sums_NW[:, :width], ((0, 0), (start, max(width - start - sums_NW.shape[1], 0))))
    return gradient_NW[:, :width]


def _blocks(kernel: str, inputs: KernelInputs) -> Blocks:
    """The blocks of a kernel, not larger than short rows need; a product of matrices needs 16 of everything."""
    size = max(padded_head_dim(inputs.q_BNLH.shape[3]) * inputs.q_BNLH.dtype.itemsize, 128)
    blocks = BLOCKS[kernel, size][inputs.bias_NW is not None]
    fits = lambda size, length: min(size, max(pl.next_power_of_2(length), 16))
    queries, keys = fits(blocks.queries, inputs.q_BNLH.shape[2]), fits(blocks.keys, inputs.k_BKSH.shape[2])
    if kernel == "bias":
        queries = keys = min(queries, keys)
    return blocks._replace(queries=queries, keys=keys)


def _call(kernel, spec: KernelSpec, inputs: KernelInputs, blocks: Blocks, grid, outputs) -> list[jax.Array]:
    """Run a kernel on a grid of programs (block, head, row); its references are to whole arrays."""
    (_, heads, queries, head_dim), (_, kv_heads, keys, _) = inputs.q_BNLH.shape, inputs.k_BKSH.shape
    sizes = Sizes(queries, keys, head_dim, heads // kv_heads)
    if inputs.bias_NW is not None:
        inputs = inputs._replace(bias_NW=inputs.bias_NW.astype(inputs.q_BNLH.dtype))

    def whole(x):
        shape = x.shape
        if x.ndim == 4:  # rows of a power of two in length, which only loads with a mask reach
            shape = (*shape[:3], padded_head_dim(shape[3]))
        return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))

    return pl.pallas_call(
        partial(_run, kernel, spec, sizes, blocks, len(outputs)),
        grid=grid,
        in_specs=[None if x is None else whole(x) for x in inputs],
        out_specs=[whole(x) for x in outputs],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=spec.interpret,
        name=_name(kernel, spec, inputs, blocks),
    )(*inputs)


def _name(kernel, spec: KernelSpec, inputs: KernelInputs, blocks: Blocks) -> str:
    """The name of a kernel, with the keys that a block of queries reads where a window leaves fewer than all.

    From it `plan.gpu_time` knows how much a kernel computes.
    """
    name, ahead = f"attention_{kernel.__name__.removesuffix('_kernel')}", 1 if spec.causal else spec.window_ahead
    if not spec.window or not ahead or inputs.prefix_BS is not None:
        return name
    read = rounded_up(spec.window + ahead - 2 + blocks.queries, blocks.keys)
    return f"{name}_of_{read}_keys" if read < inputs.k_BKSH.shape[2] else name


def _run(kernel, spec: KernelSpec, sizes: Sizes, blocks: Blocks, outputs: int, *refs) -> None:
    kernel(Program(spec, sizes, blocks, KernelInputs(*refs[:-outputs])), *refs[-outputs:])
