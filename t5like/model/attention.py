"""Multi-head attention: masks from segments, the attention function, the module with its key-value cache.

`attend` is the one place where scores become outputs; bias and mask come separately, because fused kernels treat them
differently. T5 does not divide scores by sqrt(H) (it folds that into the query's initialisation); configs of other
families set `scale_attention`.
"""

from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from t5like.config.schema import ModelConfig
from t5like.model.kernels import cpu, tpu_attention
from t5like.model.layers import Dense, Norm, dropout, projections
from t5like.model.masks import MaskSpec
from t5like.model.positions import rotate
from t5like.sharding.logical_axes import batch_parts, constrain, context_size
from t5like.types import MASKED

GROUPED_DECODE_MAX_QUERIES = (
    64  # queries of a group that stand side by side instead of the keys being repeated for each head
)


class KeyValues(NamedTuple):
    """Keys and values of one attention: a decoding cache (S the longest text), or those of the encoder's output."""

    k_BKSH: jax.Array
    v_BKSH: jax.Array


def fused(
    kernels: str,
    head_dim: int,
    dtype: str,
    rows: int,
    queries: int,
    keys: int,
    seen: jax.Array | MaskSpec | None,
    *,
    biased: bool,
) -> bool:
    """Whether attention is `model.tpu`'s kernel: the one place that decides. Else it is plain, on every machine.

    Plain: masks that are arrays (decoding), lengths that are too long, and rows that the mesh does not divide.
    """
    if kernels != "tpu" or isinstance(seen, jax.Array) or rows % batch_parts():
        return False
    parts = context_size() if queries % context_size() == 0 else 1
    return tpu_attention.fits(queries // parts, keys, head_dim, dtype, biased=biased)


def attend(
    q_BNLH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    *,
    bias_1NLS: jax.Array | None = None,
    mask_B1LS: jax.Array | MaskSpec | None = None,
    kernels: str = "plain",
) -> jax.Array:
    """softmax(q k + bias) v with float32 scores, per head.

    Args:
        q_BNLH: queries; already scaled.
        k_BKSH: keys. With fewer heads (K < N) each serves N / K query heads, in order (Ainslie et al. 2023).
        v_BKSH: values.
        bias_1NLS: added to the scores, the same for all rows; for a fused kernel from `tpu.spread`.
        mask_B1LS: bool, True where attention is allowed, first dim 1 or B; or a rule. A query that may see nothing
            gets 0, not an average of what it must not see.
        kernels: as in `ModelConfig`.

    Returns:
        [B, N, L, H] in the dtype of v.
    """
    groups = q_BNLH.shape[1] // k_BKSH.shape[1]
    rows, _, length, head_dim = q_BNLH.shape
    biased = bias_1NLS is not None
    if fused(kernels, head_dim, q_BNLH.dtype, rows, length, k_BKSH.shape[2], mask_B1LS, biased=biased):
        rule, segments = mask_B1LS or MaskSpec(), None
        if rule.query_segments_BL is not None:
            segments = rule.query_segments_BL, rule.key_segments_BS
        return tpu_attention.attend(
            q_BNLH, k_BKSH, v_BKSH, bias_1NLS, segments, rule.prefix_BS, causal=rule.causal, window=rule.window
        )
    if isinstance(mask_B1LS, MaskSpec):
        mask_B1LS = mask_B1LS.mask(length, k_BKSH.shape[2])
    if groups > 1 and length < k_BKSH.shape[2] and length * groups <= GROUPED_DECODE_MAX_QUERIES:
        return _attend_grouped(q_BNLH, k_BKSH, v_BKSH, bias_1NLS, mask_B1LS, kernels)
    if groups > 1:
        k_BKSH, v_BKSH = (jnp.repeat(x, groups, axis=1) for x in (k_BKSH, v_BKSH))
    if context_size() > 1:
        # Keys and values are gathered, queries stay split: so are scores, their largest use, and all that follows.
        k_BKSH, v_BKSH = (constrain(x, "batch", "act_heads", None, None) for x in (k_BKSH, v_BKSH))
        if mask_B1LS is not None:
            mask_B1LS = constrain(mask_B1LS, None if mask_B1LS.shape[0] == 1 else "batch", None, "length", None)
    if kernels == "cpu":
        out_BNLH = cpu.attend(q_BNLH, k_BKSH, v_BKSH, bias_1NLS, mask_B1LS)
    else:
        out_BNLH = _attend(q_BNLH, k_BKSH, v_BKSH, bias_1NLS, mask_B1LS)
    if mask_B1LS is not None:
        out_BNLH = jnp.where(mask_B1LS.any(-1, keepdims=True), out_BNLH, 0.0)
    return out_BNLH.astype(v_BKSH.dtype)


def _attend_grouped(q_BNLH, k_BKSH, v_BKSH, bias_1NLS, mask_B1LS, kernels) -> jax.Array:
    """A group's heads stand side by side as queries: decoding would else repeat its whole cache in every step."""
    heads, groups = k_BKSH.shape[1], q_BNLH.shape[1] // k_BKSH.shape[1]
    side = lambda x: x.reshape(x.shape[0], heads, -1, x.shape[-1])
    bias_1KLS = None if bias_1NLS is None else side(bias_1NLS)
    if mask_B1LS is not None:
        mask_B1LS = jnp.tile(mask_B1LS, (1, 1, groups, 1))
    out = attend(side(q_BNLH), k_BKSH, v_BKSH, bias_1NLS=bias_1KLS, mask_B1LS=mask_B1LS, kernels=kernels)
    return out.reshape(q_BNLH.shape)


def _attend(q_BNLH, k_BNSH, v_BNSH, bias_1NLS, mask_B1LS) -> jax.Array:
    scores_BNLS = jnp.einsum("BNLH,BNSH->BNLS", q_BNLH, k_BNSH, preferred_element_type=jnp.float32)
    if bias_1NLS is not None:
        scores_BNLS = scores_BNLS + bias_1NLS
    if mask_B1LS is not None:
        scores_BNLS = jnp.where(mask_B1LS, scores_BNLS, MASKED)
    weights_BNLS = jnp.exp(scores_BNLS - jax.lax.stop_gradient(scores_BNLS.max(-1, keepdims=True)))
    out_BNLH = jnp.einsum(
        "BNLS,BNSH->BNLH", weights_BNLS.astype(v_BNSH.dtype), v_BNSH, preferred_element_type=jnp.float32
    )
    # Dividing after the values instead of before costs H columns instead of S.
    return out_BNLH / weights_BNLS.sum(-1, keepdims=True)


class Attention(nn.Module):
    """Attention of x to itself or to a source, with query, key, value and out kernels of heads and head_dim joined."""

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        kv_heads = config.kv_heads
        # T5 folds 1/sqrt(H) into the query's initialisation instead of scaling the scores (Mesh TensorFlow).
        scale = 1.0 if config.scale_attention else config.head_dim**-0.5
        self.query = Dense(config, config.num_heads * config.head_dim, ("embed", "heads"), scale=scale)
        self.key = Dense(config, kv_heads * config.head_dim, ("embed", "kv_heads"))
        self.value = Dense(config, kv_heads * config.head_dim, ("embed", "kv_heads"))
        self.out = Dense(config, config.model_dim, ("heads", "embed"), residual=True)
        if config.qk_norm:
            self.query_norm, self.key_norm = Norm(config), Norm(config)

    def _queries(self, projected: jax.Array, positions_BL: jax.Array | None = None) -> jax.Array:
        q_BNLH = self._heads(projected, positions_BL, self.config.qk_norm and self.query_norm)
        return checkpoint_name(self._scale(q_BNLH), "query")  # what `stack.REMAT` may keep, by name

    def _source(self, keys: jax.Array, values: jax.Array, positions_BS: jax.Array | None = None) -> KeyValues:
        k_BKSH = self._heads(keys, positions_BS, self.config.qk_norm and self.key_norm)
        return KeyValues(checkpoint_name(k_BKSH, "key"), self._heads(values))

    def _heads(self, x: jax.Array, positions_BL: jax.Array | None = None, norm: Norm | Literal[False] = False):
        """[B, L, heads * H] -> [B, heads, L, H], normed and then rotated where the config says so."""
        if self.config.kernels == "tpu" and self.config.head_dim < 128:
            # Else libtpu lets the product write [.., H], half of a register's 128 lanes: 40 to 49 % of the peak (XXL).
            x = jax.lax.optimization_barrier(x)
        x_BLNH = x.reshape(*x.shape[:2], -1, self.config.head_dim)
        if norm:
            x_BLNH = norm(x_BLNH)
        if positions_BL is not None:
            x_BLNH = rotate(x_BLNH, positions_BL, self.config)
        return constrain(x_BLNH.transpose(0, 2, 1, 3), "batch", "act_heads", "length", None)

    def _scale(self, q: jax.Array) -> jax.Array:
        return q * self.config.head_dim**-0.5 if self.config.scale_attention else q

    def keys_values(self, source_BSD: jax.Array) -> KeyValues:
        """Keys and values of a source, for `cross`."""
        return self._source(*projections((source_BSD, self.key), (source_BSD, self.value)))

    def cross(
        self, x_BLD: jax.Array, source: KeyValues | jax.Array, *, mask_B1LS: jax.Array | MaskSpec | None, train: bool
    ) -> jax.Array:
        """Attention of x [B, L, D] to a source [B, S, D], or to its keys and values: [B, L, D]."""
        if isinstance(source, KeyValues):
            queries = self.query(x_BLD)
        else:
            keys, values, queries = projections((source, self.key), (source, self.value), (x_BLD, self.query))
            source = self._source(keys, values)
        q_BNLH = self._queries(queries)
        return self._finish(attend(q_BNLH, *source, mask_B1LS=mask_B1LS, kernels=self.config.kernels), train=train)

    def __call__(
        self,
        x_BLD: jax.Array,
        *,
        bias_1NLS: jax.Array | None,
        mask_B1LS: jax.Array | MaskSpec | None,
        positions_BL: jax.Array,
        train: bool,
        cache: KeyValues | None = None,
        first: jax.Array | int = 0,
    ) -> tuple[jax.Array, KeyValues | None]:
        """Self-attention of x [B, L, D].

        Args:
            x_BLD: the input.
            bias_1NLS: relative bias, or None.
            mask_B1LS: what may be seen, or None: everything.
            positions_BL: position of each token in its text, for rotary positions.
            train: whether to drop out.
            cache: keys and values of earlier tokens; this call's are written at `first` and all are attended to.
            first: index of x's first token in the cache.

        Returns:
            the output [B, L, D] and the new cache, or None without one.
        """
        rotary_BL = positions_BL if self.config.positions == "rotary" else None
        queries, keys, values = projections((x_BLD, self.query), (x_BLD, self.key), (x_BLD, self.value))
        q_BNLH = self._queries(queries, rotary_BL)
        new = self._source(keys, values, rotary_BL)
        if cache is not None:
            new = cache = KeyValues(
                *(
                    jax.lax.dynamic_update_slice_in_dim(old, part, first, axis=2)
                    for old, part in zip(cache, new, strict=True)
                )
            )
        out_BNLH = attend(q_BNLH, *new, bias_1NLS=bias_1NLS, mask_B1LS=mask_B1LS, kernels=self.config.kernels)
        return self._finish(out_BNLH, train=train), cache

    def _finish(self, out_BNLH: jax.Array, *, train: bool) -> jax.Array:
        out = out_BNLH.transpose(0, 2, 1, 3)
        return self.out(dropout(self, out.reshape(*out.shape[:2], -1), self.config.dropout_rate, train=train))
