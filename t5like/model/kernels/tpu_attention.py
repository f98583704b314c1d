"""What libtpu makes faster programs of: attention as one Pallas kernel, and a gated MLP's gradients kept apart.

Plain attention writes float32 scores [B, N, L, S] to main memory and reads them in several passes. In the kernel they
never leave the core, forward or backward: one program does a head of a row. Keys and values are there whole, queries
come a block at a time, so a softmax sees all its scores: no running maximum as in FlashAttention (Dao et al. 2022),
whose other idea this is: the backward pass saves nothing but the operands and computes the weights again. What may be
seen is a rule, worked out in the core; a block of queries reads only the keys that a causal mask and a window leave it.
The relative bias is read once per head, its gradient is summed over the rows in the core. Over `context` a device has
its own queries and gathers keys and values. What a core's memory does not hold (`fits`) stays plain.

`attention.fused` says when the kernel is used, `mesh.settle` on which machines. Compiled for TPUs, and run in Pallas'
interpreter on CPUs (the tests); it has not run on a TPU yet.
"""

import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from t5like.sharding.logical_axes import RULES, batch_parts, constrain, device_kind, spec
from t5like.types import MASKED

SCORES = 2**19  # of a block of queries, about; at least 128 queries
LANES = 128  # where a block of queries or its keys begin is a multiple, which the core's memory needs
UNROLLED = 8  # blocks that are written out one behind the other; more of them are loops, which compile faster
BUFFERS = 6  # float32 values of a block's scores that are alive at once
DEFAULT = 12 * 2**20  # bytes of a core's memory: if a kernel needs no more, the compiler's default is enough
MEMORY = 48 * 2**20  # that a kernel may have; a core of a v5p has 64 MiB, those below 128 and 16
MEMORIES = {"TPU v5 lite": 96 * 2**20, "TPU v6 lite": 96 * 2**20, "TPU v4": 14 * 2**20, "TPU v3": 14 * 2**20}


def fits(queries: int, keys: int, head_dim: int, dtype: str, *, biased: bool) -> bool:
    """Whether a head's operands and a block's scores fit in the memory of a core of the devices that this is for."""
    return _memory(queries, keys, head_dim, jnp.dtype(dtype).itemsize, biased) <= _most_memory()


def _most_memory() -> int:
    return MEMORIES.get(device_kind(), MEMORY)


def _memory(queries: int, keys: int, head_dim: int, width: int, biased: bool) -> int:
    """Bytes of the core's memory for the backward pass: operands and results twice, segments, sums, bias, scores."""
    head = 2 * width * (3 * queries + 4 * keys) + 2 * 4 * keys
    bias = queries * keys * (width + 4) if biased else 0
    scores = 4 * BUFFERS * keys * _size(queries, keys)
    return pl.cdiv(head_dim, LANES) * LANES * head + 2 * 4 * LANES * queries + bias + scores


def spread(bias_1NLS: jax.Array) -> jax.Array:
    """The bias once for each part of the batch, [R, N, L, S]: on every device one, as before.

    Its gradient then stays on the device through all layers, and is summed over devices once behind them.
    """
    bias_RNLS = jnp.broadcast_to(bias_1NLS, (batch_parts(), *bias_1NLS.shape[1:]))
    return constrain(bias_RNLS, "batch", "act_heads", "length", None)


class KernelSpec(NamedTuple):
    """What is known of a kernel when it is compiled, beside shapes. `window` 0: none that leaves out a key."""

    causal: bool
    window: int
    interpret: bool


class KernelInputs(NamedTuple):
    """What a kernel reads, as arrays or references; None where there is none."""

    q_BNLH: Any
    k_BNSH: Any
    v_BNSH: Any
    bias_1NLS: Any = None
    query_segments_BL1: Any = None
    key_segments_B1S: Any = None
    prefix_B1S: Any = None  # int32, not 0 at keys that may be seen from before them
    first: Any = None  # int32 [1], the place of the first query among the keys; None: 0
    gradient_BNLH: Any = None  # of the output; only for the backward pass


def attend(
    q_BNLH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    bias_RNLS: jax.Array | None = None,
    segments: tuple[jax.Array, jax.Array] | None = None,
    prefix_BS: jax.Array | None = None,
    *,
    causal: bool = False,
    window: int = 0,
    interpret: bool = False,
) -> jax.Array:
    """softmax(q k + bias, where allowed) v, as `attention.attend`.

    Args:
        q_BNLH: queries; already scaled.
        k_BKSH: keys, of as many heads or fewer.
        v_BKSH: values.
        bias_RNLS: added to the scores, from `spread`.
        segments: of queries [B, L] and keys [B, S]: only the same may be seen, and no padding (0).
        prefix_BS: True at keys that a causal mask does not hide.
        causal: whether a query sees only the keys up to its own place.
        window: how many keys a query sees, up to its own place; 0: all.
        interpret: run as plain JAX, on any machine.

    Returns:
        [B, N, L, H] in the dtype of v; 0 where nothing may be seen.
    """
    queries, keys = q_BNLH.shape[2], k_BKSH.shape[2]
    rule = KernelSpec(causal, window if window < keys else 0, interpret)
    query_segments_BL, key_segments_BS = segments or (None, None)
    prefix_BS = prefix_BS if causal else None
    operands = (q_BNLH, k_BKSH, v_BKSH, bias_RNLS, query_segments_BL, key_segments_BS, prefix_BS)
    one = partial(_attend_part, rule, queries, keys)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return one(*operands)
    # The compiler can't split a kernel: each device runs its own, on its rows, heads and queries.
    heads = lambda length: spec(("batch", "act_heads", "length", None), (1, 1, length, 1))
    own = spec(("batch", "length"), (1, queries))
    specs = (
        heads(queries),
        heads(keys),
        heads(keys),
        heads(queries),
        own,
        spec(("batch", None)),
        spec(("batch", None)),
    )
    return jax.shard_map(one, in_specs=specs, out_specs=heads(queries), check_vma=False)(*operands)


def _attend_part(rule, queries, keys, q_BNLH, k_BKSH, v_BKSH, bias_1NLS, query_segments_BL, key_segments_BS, prefix_BS):
    """On one device, which has its part of `queries` and `keys`."""
    if k_BKSH.shape[2] < keys:  # the backward pass of gathering sums each part on the device that has it
        k_BKSH, v_BKSH = (jax.lax.all_gather(x, RULES["length"], axis=2, tiled=True) for x in (k_BKSH, v_BKSH))
    first = None
    if q_BNLH.shape[2] < queries and (rule.causal or rule.window):
        first = (jax.lax.axis_index(RULES["length"]) * q_BNLH.shape[2])[None]
    groups = q_BNLH.shape[1] // k_BKSH.shape[1]
    k_BNSH, v_BNSH = (jnp.repeat(x, groups, axis=1) if groups > 1 else x for x in (k_BKSH, v_BKSH))
    given = KernelInputs(q_BNLH, k_BNSH, v_BNSH, bias_1NLS, first=first)
    if query_segments_BL is not None:
        given = given._replace(
            query_segments_BL1=query_segments_BL[:, :, None], key_segments_B1S=key_segments_BS[:, None]
        )
    if prefix_BS is not None:
        given = given._replace(prefix_B1S=prefix_BS[:, None].astype(jnp.int32))
    return _attend(rule, given)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rule: KernelSpec, given: KernelInputs):
    return _call(_forward_kernel, rule, given, [(given.q_BNLH, given.v_BNSH.dtype)], products=2)[0]


def _attend_backward(rule, given, gradient_BNLH):
    outputs = [(x, x.dtype) for x in given[:3]]
    if given.bias_1NLS is not None:
        outputs.append((given.bias_1NLS, jnp.float32))
    gradients = _call(_backward_kernel, rule, given._replace(gradient_BNLH=gradient_BNLH), outputs, products=5)
    return (KernelInputs(*(ours.astype(x.dtype) for ours, x in zip(gradients, given, strict=False))),)


_attend.defvjp(lambda rule, given: (_attend(rule, given), given), _attend_backward)


def _blocks_of(given: KernelInputs) -> list[pl.BlockSpec | None]:
    """What one program sees of each."""
    head_of_row = lambda x: pl.BlockSpec((1, 1, *x.shape[2:]), lambda head, row: (row, head, 0, 0))
    row = lambda x: pl.BlockSpec((1, *x.shape[1:]), lambda head, row: (row, 0, 0))
    # The next head's bias is not read ahead: it would take its memory twice.
    head = lambda x: pl.BlockSpec((1, 1, *x.shape[2:]), lambda head, row: (0, head, 0, 0), pipeline_mode=pl.Buffered(1))
    scalar = lambda x: pl.BlockSpec(memory_space=pltpu.SMEM)
    kinds = KernelInputs(head_of_row, head_of_row, head_of_row, head, row, row, row, scalar, head_of_row)
    return [None if x is None else kind(x) for kind, x in zip(kinds, given, strict=True)]


def _call(kernel, rule: KernelSpec, given: KernelInputs, outputs, *, products: int) -> list[jax.Array]:
    rows, heads, queries, head_dim = given.q_BNLH.shape
    keys = given.k_BNSH.shape[2]
    seen = sum(group.size * group.blocks * group.keys for group in _groups(rule, given, queries, keys))
    specs, read = _blocks_of(given), [*jax.tree.leaves(given), *(like for like, _ in outputs)]
    memory = _memory(queries, keys, head_dim, given.q_BNLH.dtype.itemsize, given.bias_1NLS is not None)
    return pl.pallas_call(
        partial(kernel, rule),
        grid=(heads, rows),  # rows inside: a head's bias stays where it is
        in_specs=tuple(specs),
        out_specs=specs[: len(outputs)],
        out_shape=[jax.ShapeDtypeStruct(like.shape, dtype) for like, dtype in outputs],
        scratch_shapes=[pltpu.VMEM((keys, head_dim), jnp.float32)] * 2 if products == 5 else [],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=None if memory <= DEFAULT else min(max(memory, MEMORY), _most_memory()),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * rows * heads * seen * head_dim,
            transcendentals=rows * heads * seen,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in read),
        ),
        interpret=rule.interpret,
        name=f"attention_{'forward' if products == 2 else 'backward'}",
    )(*given)


class _Group(NamedTuple):
    """Blocks of queries behind each other. Their keys end at `end`, or, under a window, move with the block."""

    first: int  # query
    size: int  # queries of a block
    blocks: int
    keys: int  # that a block reads
    end: int


def _size(queries: int, keys: int) -> int:
    """Queries of a block."""
    return min(queries, max(SCORES // keys // LANES, 1) * LANES)


def _groups(rule: KernelSpec, given: KernelInputs, queries: int, keys: int) -> Iterator[_Group]:
    """Blocks that read the same number of keys; the last one may be smaller.

    Under a causal mask no block of a group reads behind its last query, on the device whose queries are the last.
    """
    size = _size(queries, keys)
    whole = queries // size
    step = pl.cdiv(whole, UNROLLED)
    parts = [(first * size, size, min(step, whole - first)) for first in range(0, whole, step)]
    if queries % size:
        parts.append((whole * size, queries % size, 1))
    hidden = rule.causal and given.prefix_B1S is None
    for first, size, blocks in parts:
        end = keys - max(queries - first - size * blocks, 0) if hidden else keys
        reach = end
        if hidden and rule.window:  # from a multiple of LANES on
            reach = end - max(end - size - rule.window - LANES, 0) // LANES * LANES
        yield _Group(first, size, blocks, reach, end)


def _each_block(rule: KernelSpec, given: KernelInputs, do: Callable[[pl.Slice, pl.Slice], None]) -> None:
    """Do something with the queries of each block and the keys that it reads."""

    def block(group: _Group, number: int | jax.Array) -> None:
        first, key = group.first + number * group.size, 0
        if group.blocks > 1:
            first = pl.multiple_of(first, LANES)
        if group.keys < group.end:
            earliest = first + (0 if given.first is None else given.first[0]) - rule.window + 1
            key = jnp.clip(earliest, 0, group.end - group.keys) // LANES * LANES
            key = pl.multiple_of(key, LANES)
        do(pl.ds(first, group.size), pl.ds(key, group.keys))

    for group in _groups(rule, given, given.q_BNLH.shape[2], given.k_BNSH.shape[2]):
        if group.blocks == 1:
            block(group, 0)
        else:
            pl.loop(0, group.blocks)(partial(block, group))


def _seen(rule: KernelSpec, given: KernelInputs, queries: pl.Slice, keys: pl.Slice) -> jax.Array | None:
    """Which keys each query may see, [L, S]; None: all."""
    rules = []
    if rule.causal or rule.window:
        place = partial(jax.lax.broadcasted_iota, jnp.int32, (queries.size, keys.size))
        first = 0 if given.first is None else given.first[0]
        behind_LS = place(0) - place(1) + (queries.start + first - keys.start)
        if rule.causal and given.prefix_B1S is not None:
            rules.append((behind_LS >= 0) | (given.prefix_B1S[0, :, keys] != 0))
        elif rule.causal:
            rules.append(behind_LS >= 0)
        if rule.window:
            rules.append(behind_LS < rule.window)
    if given.query_segments_BL1 is not None:
        of_queries_L1, of_keys_1S = given.query_segments_BL1[0, queries], given.key_segments_B1S[0, :, keys]
        rules.append((of_queries_L1 == of_keys_1S) & (of_keys_1S != 0))
    return functools.reduce(jnp.logical_and, rules) if rules else None


def _weights(rule: KernelSpec, given: KernelInputs, queries: pl.Slice, keys: pl.Slice) -> tuple[jax.Array, jax.Array]:
    """Weights of the values [L, S], float32, not divided, and what to multiply them with [L, 1]."""
    scores_LS = _product(given.q_BNLH[0, 0, queries], given.k_BNSH[0, 0, keys], 1, 1)
    if given.bias_1NLS is not None:
        scores_LS = scores_LS + given.bias_1NLS[0, 0, queries, keys].astype(jnp.float32)
    seen_LS = _seen(rule, given, queries, keys)
    if seen_LS is not None:
        scores_LS = jnp.where(seen_LS, scores_LS, MASKED)
    weights_LS = jnp.exp(scores_LS - scores_LS.max(-1, keepdims=True))
    if given.query_segments_BL1 is None:
        return weights_LS, 1 / weights_LS.sum(-1, keepdims=True)
    weights_LS = jnp.where(seen_LS, weights_LS, 0.0)
    return weights_LS, 1 / jnp.maximum(weights_LS.sum(-1, keepdims=True), 1e-30)  # some query may see nothing


def _product(left: jax.Array, right: jax.Array, left_dim: int, right_dim: int) -> jax.Array:
    """Float32, summed over these dims."""
    dims = (((left_dim,), (right_dim,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)


def _forward_kernel(rule: KernelSpec, *refs) -> None:
    *refs, out_ref = refs
    given = KernelInputs(*refs)

    def block(queries, keys):
        weights_LS, scale_L1 = _weights(rule, given, queries, keys)
        v_SH = given.v_BNSH[0, 0, keys]
        out_LH = _product(weights_LS.astype(v_SH.dtype), v_SH, 1, 0)
        out_ref[0, 0, queries] = (out_LH * scale_L1).astype(out_ref.dtype)

    _each_block(rule, given, block)


def _backward_kernel(rule: KernelSpec, *refs) -> None:
    count = len(KernelInputs._fields)
    given, (q_out, k_out, v_out, *bias_out), (k_sum_SH, v_sum_SH) = (
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
        q_LH, gradient_LH = given.q_BNLH[0, 0, queries], given.gradient_BNLH[0, 0, queries]
        k_SH, v_SH = given.k_BNSH[0, 0, keys], given.v_BNSH[0, 0, keys]
        weights_LS, scale_L1 = _weights(rule, given, queries, keys)
        weights_LS = weights_LS * scale_L1
        v_sum_SH[keys] += _product(weights_LS.astype(v_SH.dtype), gradient_LH, 0, 0)
        of_weights_LS = _product(gradient_LH, v_SH, 1, 1)
        of_scores_LS = weights_LS * (of_weights_LS - (weights_LS * of_weights_LS).sum(-1, keepdims=True))
        if bias_out:
            bias_out[0][0, 0, queries, keys] += of_scores_LS
        of_scores_LS = of_scores_LS.astype(q_LH.dtype)
        q_out[0, 0, queries] = _product(of_scores_LS, k_SH, 1, 0).astype(q_out.dtype)
        k_sum_SH[keys] += _product(of_scores_LS, q_LH, 0, 0)

    _each_block(rule, given, block)
    k_out[0, 0] = k_sum_SH[...].astype(k_out.dtype)
    v_out[0, 0] = v_sum_SH[...].astype(v_out.dtype)
