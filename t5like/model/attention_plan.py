"""Which kernel computes each attention of a stack: decided here, once, before the layers run.

Masks, relative bias, layers and `plan.estimate` follow the plan. It contains only what is known when a program is
traced.
"""

from functools import partial
from typing import Literal, NamedTuple

from t5like.config.model_schema import ModelConfig
from t5like.model.kernels import gpu_attention, local_attention, tpu_attention
from t5like.model.masks import MaskSpec
from t5like.sharding.auto import FUSED
from t5like.sharding.logical_axes import batch_parts, context_size

Kernel = Literal["plain", "cpu", "tpu", "gpu"]  # those of `auto.FUSED` take a `MaskSpec`, others a mask array


class AttentionPlan(NamedTuple):
    """Sizes and kernels of the attentions in all layers of a stack.

    Attributes:
        queries: L, of self-attention and cross-attention.
        keys: S of self-attention; with a cache its length.
        self_attention: the kernel.
        cross_attention: the kernel, where there is an encoder to read.
        branch_start: from this index on, each group of L consecutive keys has one position, and so have the queries:
            a text that branches into L texts, decoded in parallel. None: positions are indices.
    """

    queries: int
    keys: int
    self_attention: Kernel = "plain"
    cross_attention: Kernel = "plain"
    branch_start: int | None = None

    def by_blocks(self, mask: MaskSpec) -> bool:
        """Whether `attention.attend` skips the keys outside of a window, where the kernel is not fused."""
        return self.branch_start is None and local_attention.skips_keys(mask, self.queries, self.keys)


def plan_attention(
    config: ModelConfig,
    rows: int,
    queries: int,
    keys: int,
    cross_keys: int = 0,
    *,
    texts: int = 1,
    one_mask: bool = False,
    cached: bool = False,
    branch_start: int | None = None,
) -> AttentionPlan:
    """Choose the kernels of a stack for inputs of these sizes on the mesh that is set.

    A fused kernel is not used with a cache, whose masks are arrays, for rows that the mesh does not divide, for lengths
    that do not fit in a TPU core's memory, and for heads that do not fit in a GPU core's registers. Merged
    attention has one if `one_mask`, without a relative bias.

    Args:
        config: its `kernels` is resolved.
        rows: B.
        queries: L.
        keys: S of self-attention.
        cross_keys: S of cross-attention; 0: there is none.
        texts: rows for each row of the source of cross-attention, which have their queries in one row of it.
        one_mask: whether merged attention has a mask from `merged_attention.joint_mask`.
        cached: whether the tokens continue a cache.
        branch_start: see `AttentionPlan`.
    """
    fallback: Kernel = "cpu" if config.kernels == "cpu" else "plain"
    merged, biased = config.merged_attention and cross_keys > 0, config.positions == "relative"
    unfused = merged and (biased or not one_mask)
    if config.kernels not in FUSED or unfused or cached or rows // texts % batch_parts():
        return AttentionPlan(queries, keys, fallback, fallback, branch_start)
    parts = context_size() if queries % context_size() == 0 else 1

    def kernel(queries: int, keys: int, *, biased: bool) -> Kernel:
        fits = gpu_attention.fits if config.kernels == "gpu" else partial(tpu_attention.fits, biased=biased)
        return config.kernels if fits(queries // parts, keys, config.head_dim, config.dtype) else "plain"

    own = kernel(queries, keys + (cross_keys if merged else 0), biased=biased)
    cross = own if merged else kernel(queries * texts, cross_keys, biased=False) if cross_keys else "plain"
    return AttentionPlan(queries, keys, own, cross, branch_start)
