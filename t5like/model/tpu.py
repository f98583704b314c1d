"""What libtpu makes faster programs of: attention as one Pallas kernel, and the gradient of a gate kept apart.

Plain attention writes float32 scores [B, N, L, S] to main memory and reads them in several passes. In the kernel they
never leave the core, forward or backward: one program does a head of a row. Keys and values are there whole, queries
come a block at a time, so a softmax sees all its scores: no running maximum as in FlashAttention (Dao et al. 2022),
whose other idea this is: the backward pass saves nothing but the operands and computes the weights again. Under a
causal mask a block of queries reads only the keys up to its last one. The relative bias is read once per head, its
gradient is summed over the rows in the core.

`attention.fused` says when the kernel is used, `mesh.settle` on which machines. Compiled for TPUs, and run in Pallas'
interpreter on CPUs (the tests); it has not run on a TPU yet.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from t5like.mesh import batch_parts, constrain, spec
from t5like.types import MASKED

LONGEST = 4096  # queries or keys: a head's operands and a block's scores must fit in the core's memory
SCORES = 2**19  # of a block of queries, about; at least 128 queries
SMALL = 2**21  # scores of all blocks up to which the memory that a kernel gets by default is enough
MEMORY = 48 * 2**20  # bytes of the core's memory, for longer rows


def spread(bias_1NLS: jax.Array) -> jax.Array:
    """The bias once for each part of the batch, [R, N, L, S]: on every device one, as before.

    Its gradient then stays on the device through all layers, and is summed over devices once behind them.
    """
    bias_RNLS = jnp.broadcast_to(bias_1NLS, (batch_parts(), *bias_1NLS.shape[1:]))
    return constrain(bias_RNLS, "batch", "act_heads", None, None)


@jax.custom_vjp
def apart(x: jax.Array) -> jax.Array:
    """x, whose gradient is written to memory before it is used.

    The gradient of a gated MLP's gate goes into two products. libtpu puts the activation's derivative into both, which
    then reach 47 and 49 % of the peak (Llama 2 7B on v5e, benchmarks/RESULTS.md).
    """
    return x


apart.defvjp(lambda x: (x, None), lambda _, gradient: (jax.lax.optimization_barrier(gradient),))


def attend(
    q_BNLH: jax.Array,
    k_BNSH: jax.Array,
    v_BNSH: jax.Array,
    bias_RNLS: jax.Array | None = None,
    segments: tuple[jax.Array, jax.Array] | None = None,
    *,
    causal: bool,
    interpret: bool = False,
) -> jax.Array:
    """softmax(q k + bias, where allowed) v, as `attention.attend`.

    Args:
        q_BNLH: queries; already scaled.
        k_BNSH: keys.
        v_BNSH: values.
        bias_RNLS: added to the scores, from `spread`.
        segments: of queries [B, L] and keys [B, S]: only the same may be seen, and no padding (0).
        causal: whether a query sees only the keys up to its own place.
        interpret: run as plain JAX, on any machine.

    Returns:
        [B, N, L, H] in the dtype of v; 0 where nothing may be seen.
    """
    one = partial(_attend, causal, interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return one(q_BNLH, k_BNSH, v_BNSH, bias_RNLS, segments)
    # The compiler can't split a kernel: each device runs its own, on its rows and heads.
    heads, rows = spec(("batch", "act_heads", None, None)), spec(("batch", None))
    return jax.shard_map(one, in_specs=(heads, heads, heads, heads, rows), out_specs=heads, check_vma=False)(
        q_BNLH, k_BNSH, v_BNSH, bias_RNLS, segments
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(causal, interpret, q_BNLH, k_BNSH, v_BNSH, bias_1NLS, segments):
    operands, specs = _operands(q_BNLH, k_BNSH, v_BNSH, bias_1NLS, segments)
    return _call(
        partial(_forward_kernel, causal, bias_1NLS is not None, segments is not None),
        operands,
        specs,
        [(q_BNLH, v_BNSH.dtype)],
        products=2,
        causal=causal,
        interpret=interpret,
    )[0]


def _attend_forward(causal, interpret, *operands):
    return _attend(causal, interpret, *operands), operands


def _attend_backward(causal, interpret, saved, gradient_BNLH):
    q_BNLH, k_BNSH, v_BNSH, bias_1NLS, segments = saved
    operands, specs = _operands(q_BNLH, k_BNSH, v_BNSH, bias_1NLS, segments, gradient_BNLH)
    outputs = [(x, x.dtype) for x in (q_BNLH, k_BNSH, v_BNSH)]
    if bias_1NLS is not None:
        outputs.append((bias_1NLS, jnp.float32))
    gradients = _call(
        partial(_backward_kernel, causal, bias_1NLS is not None, segments is not None),
        operands,
        specs,
        outputs,
        products=5,
        causal=causal,
        interpret=interpret,
    )
    if bias_1NLS is not None:
        return (*gradients[:3], gradients[3].astype(bias_1NLS.dtype), None)
    return (*gradients, None, None)


_attend.defvjp(_attend_forward, _attend_backward)


def _block_of(shape: tuple[int, ...]) -> pl.BlockSpec:
    """One head of a row, or of what all rows share."""
    if shape[0] == 1:
        return pl.BlockSpec((1, 1, *shape[2:]), lambda head, row: (0, head, 0, 0))
    return pl.BlockSpec((1, 1, *shape[2:]), lambda head, row: (row, head, 0, 0))


def _operands(q_BNLH, k_BNSH, v_BNSH, bias_1NLS, segments, gradient_BNLH=None):
    """What a kernel reads, in its order, and the block of each that one program sees."""
    operands = [x for x in (q_BNLH, k_BNSH, v_BNSH, gradient_BNLH, bias_1NLS) if x is not None]
    specs = [_block_of(x.shape) for x in operands]
    if segments is not None:
        queries_BL1, keys_B1S = segments[0][:, :, None], segments[1][:, None]
        operands += [queries_BL1, keys_B1S]
        specs += [pl.BlockSpec((1, *x.shape[1:]), lambda head, row: (row, 0, 0)) for x in (queries_BL1, keys_B1S)]
    return operands, specs


def _call(kernel, operands, specs, outputs, *, products, causal, interpret):
    rows, heads, queries, head_dim = operands[0].shape
    keys = operands[1].shape[2]
    seen = sum((q.stop - q.start) * k.stop for q, k in _blocks(queries, keys, causal))
    scratch = [pltpu.VMEM((keys, head_dim), jnp.float32)] * 2 if products == 5 else []
    return pl.pallas_call(
        kernel,
        grid=(heads, rows),  # rows inside: a head's bias stays where it is
        in_specs=specs,
        out_specs=[_block_of(like.shape) for like, _ in outputs],
        out_shape=[jax.ShapeDtypeStruct(like.shape, dtype) for like, dtype in outputs],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=MEMORY if queries * keys > SMALL else None,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * rows * heads * seen * head_dim,
            transcendentals=rows * heads * seen,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in [*operands, *(like for like, _ in outputs)]),
        ),
        interpret=interpret,
        name=f"attention_{'forward' if products == 2 else 'backward'}",
    )(*operands)


def _blocks(queries: int, keys: int, causal: bool) -> list[tuple[slice, slice]]:
    """Queries of each block, and the keys that it reads."""
    size = min(queries, max(SCORES // keys // 128, 1) * 128)
    ends = [(first, min(first + size, queries)) for first in range(0, queries, size)]
    return [(slice(first, end), slice(0, min(end, keys) if causal else keys)) for first, end in ends]


def _weights(q_LH, k_SH, bias_ref, segments, causal, queries, keys):
    """Weights of the values [L, S], float32, not divided, and what to multiply them with [L, 1]."""
    scores_LS = jax.lax.dot_general(q_LH, k_SH, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    if bias_ref is not None:
        scores_LS = scores_LS + bias_ref[0, 0, queries, keys].astype(jnp.float32)
    seen_LS = None
    if causal:
        place = partial(jax.lax.broadcasted_iota, jnp.int32, scores_LS.shape)
        seen_LS = place(0) + queries.start >= place(1)
    if segments is not None:
        of_queries_L1, of_keys_1S = segments[0][0, queries], segments[1][0, :, keys]
        same_LS = (of_queries_L1 == of_keys_1S) & (of_keys_1S != 0)
        seen_LS = same_LS if seen_LS is None else seen_LS & same_LS
    if seen_LS is not None:
        scores_LS = jnp.where(seen_LS, scores_LS, MASKED)
    weights_LS = jnp.exp(scores_LS - scores_LS.max(-1, keepdims=True))
    if segments is None:
        return weights_LS, 1 / weights_LS.sum(-1, keepdims=True)
    weights_LS = jnp.where(seen_LS, weights_LS, 0.0)
    return weights_LS, 1 / jnp.maximum(weights_LS.sum(-1, keepdims=True), 1e-30)  # some query may see nothing


def _forward_kernel(causal, has_bias, has_segments, q_ref, k_ref, v_ref, *refs):
    bias_ref = refs[0] if has_bias else None
    segments, out_ref = refs[-3:-1] if has_segments else None, refs[-1]
    for queries, keys in _blocks(q_ref.shape[2], k_ref.shape[2], causal):
        weights_LS, scale_L1 = _weights(
            q_ref[0, 0, queries], k_ref[0, 0, keys], bias_ref, segments, causal, queries, keys
        )
        v_SH = v_ref[0, 0, keys]
        out_LH = jnp.dot(weights_LS.astype(v_SH.dtype), v_SH, preferred_element_type=jnp.float32)
        out_ref[0, 0, queries] = (out_LH * scale_L1).astype(out_ref.dtype)


def _backward_kernel(causal, has_bias, has_segments, q_ref, k_ref, v_ref, gradient_ref, *refs):
    *refs, k_sum_SH, v_sum_SH = refs
    outputs = 4 if has_bias else 3
    read, (q_out, k_out, v_out, *bias_out) = refs[:-outputs], refs[-outputs:]
    bias_ref, segments = read[0] if has_bias else None, read[-2:] if has_segments else None
    k_sum_SH[...] = jnp.zeros_like(k_sum_SH)
    v_sum_SH[...] = jnp.zeros_like(v_sum_SH)
    if has_bias:

        @pl.when(pl.program_id(1) == 0)
        def _():
            bias_out[0][...] = jnp.zeros_like(bias_out[0])

    over = lambda left, right, dims: jax.lax.dot_general(
        left, right, (dims, ((), ())), preferred_element_type=jnp.float32
    )
    for queries, keys in _blocks(q_ref.shape[2], k_ref.shape[2], causal):
        q_LH, gradient_LH = q_ref[0, 0, queries], gradient_ref[0, 0, queries]
        k_SH, v_SH = k_ref[0, 0, keys], v_ref[0, 0, keys]
        weights_LS, scale_L1 = _weights(q_LH, k_SH, bias_ref, segments, causal, queries, keys)
        weights_LS = weights_LS * scale_L1
        v_sum_SH[keys] += over(weights_LS.astype(v_SH.dtype), gradient_LH, ((0,), (0,)))
        of_weights_LS = over(gradient_LH, v_SH, ((1,), (1,)))
        of_scores_LS = weights_LS * (of_weights_LS - (weights_LS * of_weights_LS).sum(-1, keepdims=True))
        if has_bias:
            bias_out[0][0, 0, queries, keys] += of_scores_LS
        of_scores_LS = of_scores_LS.astype(q_LH.dtype)
        q_out[0, 0, queries] = over(of_scores_LS, k_SH, ((1,), (0,))).astype(q_out.dtype)
        k_sum_SH[keys] += over(of_scores_LS, q_LH, ((0,), (0,)))
    k_out[0, 0] = k_sum_SH[...].astype(k_out.dtype)
    v_out[0, 0] = v_sum_SH[...].astype(v_out.dtype)
