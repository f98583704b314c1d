"""The kernels of `gpu_attention`: what one program computes.

References are to whole arrays in main memory; a program reads the blocks that it needs. Shapes of blocks are powers of
two, as Triton requires: rows behind the end of an array are filled by masks. Products of matrices run on tensor cores
and add up in float32.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from t5like.model.kernels.fused_attention import KernelSpec, matmul
from t5like.types import MASKED

LOG2_E = float(np.log2(np.e))  # the kernels use powers of two, which the hardware computes
BIAS_ALIGNMENT = 128  # queries and keys that a bias vector covers are rounded up to this: no block reads beyond it
HIDDEN_QUERY = 1e30  # logarithmic sum of the queries that fill a block: their weights are 0


class Blocks(NamedTuple):
    """How a kernel is cut: queries and keys of a block (powers of two), warps of a program, stages of its loads."""

    queries: int
    keys: int
    warps: int
    stages: int


def rounded_up(size: int, multiple: int) -> int:
    return pl.cdiv(size, multiple) * multiple


def padded_head_dim(head_dim: int) -> int:
    return max(pl.next_power_of_2(head_dim), 16)


class KernelInputs(NamedTuple):
    """What a kernel reads, as arrays or references to all of them; None where there is none."""

    q_BNLH: Any
    k_BKSH: Any
    v_BKSH: Any
    bias_NW: Any = None  # in the dtype of q: Triton would copy wider numbers to shared memory first, element by element
    query_segments_BL: Any = None
    key_segments_BS: Any = None
    prefix_BS: Any = None  # int32, not 0 at keys that a causal mask does not hide
    prefix_end_B: Any = None  # index behind the last such key
    first: Any = None  # int32 [1], index of the first query among the keys; None: 0
    gradient_BNLH: Any = None  # of the output; from here on only for the backward pass
    log_sums_BNL: Any = None  # of a query's scores, to base 2
    mean_BNL: Any = None  # of the gradients of a query's weights, under these weights


class Sizes(NamedTuple):
    """Of a device's arrays; groups: heads that read the same keys."""

    queries: int
    keys: int
    head_dim: int
    groups: int


class Program(NamedTuple):
    """What the kernels share: loads, scores of a block, and which blocks a mask leaves."""

    spec: KernelSpec
    sizes: Sizes
    blocks: Blocks
    inputs: KernelInputs

    def queries(self, array, row, head, start, fill=0):
        """A block's part of an array of queries, [L, H] or [L]; `fill` behind the last query."""
        return self._load(array, (row, head), start, self.blocks.queries, self.sizes.queries, fill)

    def keys(self, array, row, head, start):
        """A block's part of an array of keys, [S, H]; 0 behind the last key."""
        return self._load(array, (row, head), start, self.blocks.keys, self.sizes.keys, 0)

    def store(self, out, value, index, start) -> None:
        """Write rows [.., H] or [..], as the dtype of the output."""
        size, limit = value.shape[0], out.shape[len(index)]
        columns = (pl.ds(0, value.shape[1]),) if value.ndim == 2 else ()
        mask = self._inside(start, size, limit, value.ndim == 2)
        plgpu.store(out.at[(*index, pl.ds(start, size), *columns)], value.astype(out.dtype), mask=mask)

    def _load(self, array, index, start, size, limit, fill):
        is_matrix = len(array.shape) > len(index) + 1
        columns = (pl.ds(0, array.shape[-1]),) if is_matrix else ()
        mask = self._inside(start, size, limit, is_matrix)
        at = array.at[(*index, pl.ds(start, size), *columns)]
        return plgpu.load(at, mask=mask, other=None if mask is None else jnp.asarray(fill, array.dtype))

    def _inside(self, start, size, limit, is_matrix):
        """Which elements of a block exist; None: all."""
        width, padded = self.sizes.head_dim, padded_head_dim(self.sizes.head_dim)
        rows = start + jnp.arange(size) < limit if limit % size else None
        if not is_matrix:
            return rows
        rows = None if rows is None else jnp.broadcast_to(rows[:, None], (size, padded))
        columns = jnp.broadcast_to((jnp.arange(padded) < width)[None], (size, padded)) if padded > width else None
        return rows if columns is None else columns if rows is None else rows & columns

    def scores(self, q_LH, k_SH, row, head, first_query, first_key, *, transposed=False):
        """Scores of a block times log2(e), [L, S] or [S, L], -inf where the mask is False; slope of the soft cap."""
        inputs, sizes, (queries, keys, *_) = self.inputs, self.sizes, self.blocks
        scores, slope = self.spec.capped(matmul(k_SH, q_LH, 1, 1) if transposed else matmul(q_LH, k_SH, 1, 1))
        along_queries = lambda x: x[None, :] if transposed else x[:, None]
        along_keys = lambda x: x[:, None] if transposed else x[None, :]
        query, key = along_queries(first_query + jnp.arange(queries)), along_keys(first_key + jnp.arange(keys))
        if inputs.bias_NW is not None:
            offset = rounded_up(sizes.queries, BIAS_ALIGNMENT) - 1
            scores += plgpu.load(inputs.bias_NW.at[head, key - query + offset]).astype(jnp.float32)
        scores *= LOG2_E
        behind = prefix = query_segments = key_segments = None
        if self.spec.by_index:
            behind = query - key + self._first()
        if inputs.prefix_BS is not None:
            prefix = along_keys(self._load(inputs.prefix_BS, (row,), first_key, keys, sizes.keys, 0))
        if inputs.query_segments_BL is not None:
            query_segments = along_queries(
                self._load(inputs.query_segments_BL, (row,), first_query, queries, sizes.queries, 0)
            )
            key_segments = along_keys(self._load(inputs.key_segments_BS, (row,), first_key, keys, sizes.keys, 0))
        allowed = self.spec.allowed(behind, prefix, query_segments, key_segments)
        if sizes.keys % keys and query_segments is None:
            allowed = key < sizes.keys if allowed is None else allowed & (key < sizes.keys)
        return scores if allowed is None else jnp.where(allowed, scores, -jnp.inf), slope

    def _first(self):
        return 0 if self.inputs.first is None else self.inputs.first[0]

    def key_blocks(self, row, first_query):
        """The range of blocks of keys that a block of queries attends to."""
        spec, start, end = self.spec, 0, self.sizes.keys
        earliest = first_query + self._first()
        latest = earliest + self.blocks.queries - 1
        if spec.causal:
            end = jnp.minimum(end, latest + 1)
        if self.inputs.prefix_end_B is not None:
            end = jnp.maximum(end, self.inputs.prefix_end_B[row])
        if spec.window:
            start = jnp.maximum(start, earliest - spec.window + 1)
        if spec.window_ahead:
            end = jnp.minimum(end, latest + spec.window_ahead)
        return _block_range(start, end, self.blocks.keys)

    def query_blocks(self, row, first_key):
        """The range of blocks of queries that attend to a block of keys."""
        spec, start, end = self.spec, 0, self.sizes.queries
        earliest = first_key - self._first()
        latest = earliest + self.blocks.keys - 1
        if spec.causal:
            start = jnp.maximum(start, earliest)
        if self.inputs.prefix_BS is not None:
            end_of_prefix = self.inputs.prefix_end_B[row]
            start = jnp.where(first_key < end_of_prefix, 0, start)
        if spec.window:
            end = jnp.minimum(end, latest + spec.window)
        if spec.window_ahead:
            start = jnp.maximum(start, earliest - spec.window_ahead + 1)
        return _block_range(start, end, self.blocks.queries)

    def visible_diagonal(self, distance):
        """Whether any query attends to a key in the blocks whose first keys are so far ahead of their first queries."""
        spec, size = self.spec, self.blocks.keys
        nearest, farthest = (distance - self._first() + step for step in (1 - size, size - 1))
        visible = nearest < spec.window_ahead if spec.window_ahead else nearest <= self.sizes.keys
        if spec.causal and self.inputs.prefix_BS is None:
            visible &= nearest <= 0
        if spec.window:
            visible &= farthest > -spec.window
        return visible


def _block_range(start, end, size):
    """Numbers of the first block and the one behind the last, for a range of rows."""
    start, end = (jnp.maximum(jnp.asarray(index, jnp.int32), 0) for index in (start, end))
    return jax.lax.div(start, jnp.int32(size)), jax.lax.div(end + (size - 1), jnp.int32(size))


def forward_kernel(program: Program, out_BNLH, log_sums_BNL) -> None:
    inputs, (block, head, row) = program.inputs, map(pl.program_id, range(3))
    first_query, kv_head = block * program.blocks.queries, jax.lax.div(head, jnp.int32(program.sizes.groups))
    q_LH = program.queries(inputs.q_BNLH, row, head, first_query)

    def add_keys(block, carry):
        out_LH, top_L, sum_L = carry
        first_key = block * program.blocks.keys
        k_SH, v_SH = (program.keys(x, row, kv_head, first_key) for x in (inputs.k_BKSH, inputs.v_BKSH))
        scores_LS, _ = program.scores(q_LH, k_SH, row, head, first_query, first_key)
        new_top_L = jnp.maximum(top_L, scores_LS.max(-1))
        weights_LS, scale_L = jnp.exp2(scores_LS - new_top_L[:, None]), jnp.exp2(top_L - new_top_L)
        sum_L = sum_L * scale_L + weights_LS.sum(-1)
        out_LH = out_LH * scale_L[:, None] + matmul(weights_LS.astype(v_SH.dtype), v_SH, 1, 0)
        return out_LH, new_top_L, sum_L

    # The maximum starts at a finite number, so that hidden scores, -inf, have the weight 0 from the first block on.
    size = program.blocks.queries
    start = jnp.zeros(q_LH.shape, jnp.float32), jnp.full((size,), MASKED, jnp.float32), jnp.zeros((size,), jnp.float32)
    out_LH, top_L, sum_L = jax.lax.fori_loop(*program.key_blocks(row, first_query), add_keys, start)
    sum_L = jnp.where(sum_L == 0, 1.0, sum_L)  # a query may attend to no key
    program.store(out_BNLH, out_LH / sum_L[:, None], (row, head), first_query)
    program.store(log_sums_BNL, top_L + jnp.log2(sum_L), (row, head), first_query)


def queries_kernel(program: Program, q_out) -> None:
    """The gradient of a block of queries."""
    inputs, (block, head, row) = program.inputs, map(pl.program_id, range(3))
    first_query, kv_head = block * program.blocks.queries, jax.lax.div(head, jnp.int32(program.sizes.groups))
    load = partial(program.queries, row=row, head=head, start=first_query)
    q_LH, d_out_LH, mean_L = load(inputs.q_BNLH), load(inputs.gradient_BNLH), load(inputs.mean_BNL)
    log_sum_L = load(inputs.log_sums_BNL, fill=HIDDEN_QUERY)

    def add_keys(block, d_q_LH):
        first_key = block * program.blocks.keys
        k_SH, v_SH = (program.keys(x, row, kv_head, first_key) for x in (inputs.k_BKSH, inputs.v_BKSH))
        scores_LS, slope_LS = program.scores(q_LH, k_SH, row, head, first_query, first_key)
        weights_LS = jnp.exp2(scores_LS - log_sum_L[:, None])
        d_scores_LS = weights_LS * (matmul(d_out_LH, v_SH, 1, 1) - mean_L[:, None])
        if slope_LS is not None:
            d_scores_LS *= slope_LS
        return d_q_LH + matmul(d_scores_LS.astype(k_SH.dtype), k_SH, 1, 0)

    start = jnp.zeros(q_LH.shape, jnp.float32)
    d_q_LH = jax.lax.fori_loop(*program.key_blocks(row, first_query), add_keys, start)
    program.store(q_out, d_q_LH, (row, head), first_query)


def keys_kernel(program: Program, k_out, v_out) -> None:
    """The gradients of a block of keys and values, for all heads that read them; scores are transposed."""
    inputs, (block, kv_head, row) = program.inputs, map(pl.program_id, range(3))
    first_key, groups = block * program.blocks.keys, program.sizes.groups
    k_SH, v_SH = (program.keys(x, row, kv_head, first_key) for x in (inputs.k_BKSH, inputs.v_BKSH))

    def add_queries(head, block, carry):
        d_k_SH, d_v_SH = carry
        first_query = block * program.blocks.queries
        load = partial(program.queries, row=row, head=head, start=first_query)
        q_LH, d_out_LH, mean_L = load(inputs.q_BNLH), load(inputs.gradient_BNLH), load(inputs.mean_BNL)
        log_sum_L = load(inputs.log_sums_BNL, fill=HIDDEN_QUERY)
        scores_SL, slope_SL = program.scores(q_LH, k_SH, row, head, first_query, first_key, transposed=True)
        weights_SL = jnp.exp2(scores_SL - log_sum_L[None])
        d_v_SH += matmul(weights_SL.astype(d_out_LH.dtype), d_out_LH, 1, 0)
        d_scores_SL = weights_SL * (matmul(v_SH, d_out_LH, 1, 1) - mean_L[None])
        if slope_SL is not None:
            d_scores_SL *= slope_SL
        d_k_SH += matmul(d_scores_SL.astype(q_LH.dtype), q_LH, 1, 0)
        return d_k_SH, d_v_SH

    carry = (jnp.zeros(k_SH.shape, jnp.float32),) * 2
    query_blocks = program.query_blocks(row, first_key)
    add_head = lambda head, carry: jax.lax.fori_loop(*query_blocks, partial(add_queries, head), carry)
    carry = (
        jax.lax.fori_loop(kv_head * groups, (kv_head + 1) * groups, add_head, carry)
        if groups > 1
        else add_head(kv_head, carry)
    )
    for out, gradient_SH in zip((k_out, v_out), carry, strict=True):
        program.store(out, gradient_SH, (row, kv_head), first_key)


def bias_kernel(program: Program, bias_out) -> None:
    """The sum of the scores' gradients in all blocks of a diagonal of blocks and in a part of the rows."""
    inputs, (queries, keys, size) = program.inputs, (*program.sizes[:2], program.blocks.keys)
    diagonal, head, part = map(pl.program_id, range(3))
    kv_head = jax.lax.div(head, jnp.int32(program.sizes.groups))
    ahead = diagonal - (pl.cdiv(queries, size) - 1)  # blocks of keys - blocks of queries
    first_block = jnp.maximum(0, -ahead)
    blocks = jnp.minimum(pl.cdiv(queries, size), pl.cdiv(keys, size) - ahead) - first_block
    rows = inputs.q_BNLH.shape[0] // bias_out.shape[0]

    def add_block(index, sum_LS):
        row = part * rows + jax.lax.div(index, blocks)
        first_query = (first_block + jax.lax.rem(index, blocks)) * size
        first_key = first_query + ahead * size
        load = partial(program.queries, row=row, head=head, start=first_query)
        q_LH, d_out_LH, mean_L = load(inputs.q_BNLH), load(inputs.gradient_BNLH), load(inputs.mean_BNL)
        log_sum_L = load(inputs.log_sums_BNL, fill=HIDDEN_QUERY)
        k_SH, v_SH = (program.keys(x, row, kv_head, first_key) for x in (inputs.k_BKSH, inputs.v_BKSH))
        scores_LS, _ = program.scores(q_LH, k_SH, row, head, first_query, first_key)
        weights_LS = jnp.exp2(scores_LS - log_sum_L[:, None])
        return sum_LS + weights_LS * (matmul(d_out_LH, v_SH, 1, 1) - mean_L[:, None])

    visible = program.visible_diagonal(ahead * size)
    sum_LS = jax.lax.fori_loop(
        jnp.int32(0), jnp.where(visible, rows * blocks, 0), add_block, jnp.zeros((size, size), jnp.float32)
    )
    plgpu.store(bias_out.at[part, head, diagonal, pl.ds(0, size), pl.ds(0, size)], sum_LS)
