"""Multi-head attention: the attention function, and the module with its projections and its key-value cache.

`attend` is the one place where scores become outputs. Bias and mask are separate arguments, because the fused kernel
treats them differently. T5 does not divide scores by sqrt(H) (it folds that into the query's initialization); configs
of other families set `scale_attention`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from t5like.config.model_schema import ModelConfig
from t5like.model import intermediates
from t5like.model.attention_plan import FUSED, Kernel
from t5like.model.cache import KeyValues
from t5like.model.initial_attention import equal_inputs
from t5like.model.kernels import cpu, gpu_attention, local_attention, plain, tpu_attention
from t5like.model.layers import Dense, Norm, dropout, projections
from t5like.model.masks import MaskSpec
from t5like.model.merged_attention import merge
from t5like.model.rotary import rotate
from t5like.sharding.logical_axes import constrain, context_size

# Up to so many queries of a group, the heads of the group become queries of one head; else keys are repeated per head.
GROUPED_DECODE_MAX_QUERIES = 64


def attend(
    q_BNLH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    *,
    bias_1NLS: jax.Array | None = None,
    mask: MaskSpec = MaskSpec(),  # noqa: B008  (frozen)
    kernel: Kernel = "plain",
    softcap: float = 0.0,
) -> jax.Array:
    """softmax(q k + bias) v with float32 scores, per head.

    Args:
        q_BNLH: queries; already scaled.
        k_BKSH: keys. With fewer heads (K < N) each serves N / K query heads, in order (Ainslie et al. 2023).
        v_BKSH: values.
        bias_1NLS: added to the scores, the same for all rows, by key - query under a window; for a fused kernel from
            `tpu_attention.bias_per_batch_shard` or `gpu_attention.bias_per_shard`.
        mask: which keys a query attends to. A query that attends to none gets 0, not an average of hidden values.
        kernel: of `AttentionPlan`.
        softcap: see `plain.soft_capped`; applied to q k.

    Returns:
        [B, N, L, H] in the dtype of v.
    """
    if kernel in FUSED:
        fused = tpu_attention if kernel == "tpu" else gpu_attention
        return fused.attend(q_BNLH, k_BKSH, v_BKSH, bias_1NLS, mask, softcap=softcap)
    groups, length = q_BNLH.shape[1] // k_BKSH.shape[1], q_BNLH.shape[2]
    if local_attention.skips_keys(mask, length, k_BKSH.shape[2]):
        *blocks, bias_1NLS, mask = local_attention.to_blocks(q_BNLH, k_BKSH, v_BKSH, bias_1NLS, mask)
        out_BNLH = attend(*blocks, bias_1NLS=bias_1NLS, mask=mask, kernel=kernel, softcap=softcap)
        return local_attention.from_blocks(out_BNLH, q_BNLH.shape[0], length)
    mask_B1LS = mask.build(length, k_BKSH.shape[2])
    if groups > 1 and length < k_BKSH.shape[2] and length * groups <= GROUPED_DECODE_MAX_QUERIES:
        return _attend_grouped(q_BNLH, k_BKSH, v_BKSH, bias_1NLS, mask_B1LS, kernel, softcap)
    if groups > 1:
        k_BKSH, v_BKSH = (jnp.repeat(x, groups, axis=1) for x in (k_BKSH, v_BKSH))
    if context_size() > 1:
        # Keys and values are gathered, queries stay split: so are scores, their largest use, and all that follows.
        k_BKSH, v_BKSH = (constrain(x, "batch", "act_heads", None, None) for x in (k_BKSH, v_BKSH))
        if mask_B1LS is not None:
            mask_B1LS = constrain(mask_B1LS, None if mask_B1LS.shape[0] == 1 else "batch", None, "length", None)
    inputs = (q_BNLH, k_BKSH, v_BKSH, bias_1NLS, mask_B1LS, softcap)
    return (cpu.attend if kernel == "cpu" else plain.attend)(*inputs).astype(v_BKSH.dtype)


def _attend_grouped(q_BNLH, k_BKSH, v_BKSH, bias_1NLS, mask_B1LS, kernel, softcap) -> jax.Array:
    """Treat the heads of a group as queries of one head: decoding would else repeat its whole cache in every step."""
    heads, groups = k_BKSH.shape[1], q_BNLH.shape[1] // k_BKSH.shape[1]
    join = lambda x: x.reshape(x.shape[0], heads, -1, x.shape[-1])
    bias_1KLS = None if bias_1NLS is None else join(bias_1NLS)
    if mask_B1LS is not None:  # all queries may have one mask, such as several texts of one prompt
        mask_B1LS = jnp.broadcast_to(mask_B1LS, (*mask_B1LS.shape[:2], q_BNLH.shape[2], mask_B1LS.shape[3]))
        mask_B1LS = jnp.tile(mask_B1LS, (1, 1, groups, 1))
    mask = MaskSpec(allowed_B1LS=mask_B1LS)
    out = attend(join(q_BNLH), k_BKSH, v_BKSH, bias_1NLS=bias_1KLS, mask=mask, kernel=kernel, softcap=softcap)
    return out.reshape(q_BNLH.shape)


def attention_weights(
    q_BNLH: jax.Array,
    k_BKSH: jax.Array,
    *,
    bias_1NLS: jax.Array | None = None,
    mask: MaskSpec,
    kernel: Kernel,
    softcap: float = 0.0,
) -> jax.Array:
    """The weights that `attend` multiplies values with, [B, N, L, S] float32; computed plainly, for any kernel."""
    k_BNSH = jnp.repeat(k_BKSH, q_BNLH.shape[1] // k_BKSH.shape[1], axis=1)
    mask_B1LS = mask.build(q_BNLH.shape[2], k_BNSH.shape[2])
    if bias_1NLS is not None and kernel == "gpu":
        bias_1NLS = gpu_attention.bias_array(bias_1NLS, q_BNLH.shape[2], k_BNSH.shape[2])
    bias_1NLS = None if bias_1NLS is None else bias_1NLS[:1]  # the TPU kernel's has equal copies
    weights_BNLS = jax.nn.softmax(plain.masked_scores(q_BNLH, k_BNSH, bias_1NLS, mask_B1LS, softcap), axis=-1)
    return weights_BNLS if mask_B1LS is None else jnp.where(mask_B1LS, weights_BNLS, 0.0)


class Attention(nn.Module):
    """Attention of x to itself or to a source, with query, key, value and out kernels of heads and head_dim joined."""

    config: ModelConfig
    to_encoder: bool = False

    def setup(self) -> None:
        config = self.config
        kv_heads = config.kv_heads
        # T5 folds 1/sqrt(H) into the query's initialization instead of scaling the scores (Mesh TensorFlow).
        scale = 1.0 if config.scale_attention else config.head_dim**-0.5
        query, key = equal_inputs(config, scale) if self.to_encoder else (None, None)
        self.query = Dense(config, config.num_heads * config.head_dim, ("embed", "heads"), scale=scale, pattern=query)
        self.key = Dense(config, kv_heads * config.head_dim, ("embed", "kv_heads"), pattern=key)
        self.value = Dense(config, kv_heads * config.head_dim, ("embed", "kv_heads"))
        self.out = Dense(config, config.model_dim, ("heads", "embed"), residual=True)
        if config.qk_norm:
            self.query_norm, self.key_norm = Norm(config), Norm(config)

    def _queries(self, projected: jax.Array, positions_BL: jax.Array | None = None) -> jax.Array:
        q_BNLH = self._heads(projected, positions_BL, self.query_norm if self.config.qk_norm else None)
        return checkpoint_name(self._scale(q_BNLH), "query")  # a name for the policies of `stack.REMAT`

    def _source(self, keys: jax.Array, values: jax.Array, positions_BS: jax.Array | None = None) -> KeyValues:
        k_BKSH = self._heads(keys, positions_BS, self.key_norm if self.config.qk_norm else None)
        return KeyValues(checkpoint_name(k_BKSH, "key"), self._heads(values))

    def _heads(self, x: jax.Array, positions_BL: jax.Array | None = None, norm: Norm | None = None):
        """[B, L, heads * H] -> [B, heads, L, H]: normalized with `norm`, then rotated by `positions_BL`, if given."""
        if self.config.kernels == "tpu" and self.config.head_dim < 128:
            # Without it libtpu lets the matmul write [.., H], half of a register's 128 lanes: 40 to 49 % of peak (XXL).
            x = jax.lax.optimization_barrier(x)
        x_BLNH = x.reshape(*x.shape[:2], -1, self.config.head_dim)
        if norm is not None:
            x_BLNH = norm(x_BLNH)
        if positions_BL is not None:
            x_BLNH = rotate(x_BLNH, positions_BL, self.config)
        return constrain(x_BLNH.transpose(0, 2, 1, 3), "batch", "act_heads", "length", None)

    def _scale(self, q: jax.Array) -> jax.Array:
        config = self.config
        return q * (config.attention_scale_dim or config.head_dim) ** -0.5 if config.scale_attention else q

    def keys_values(self, source_BSD: jax.Array) -> KeyValues:
        """Keys and values of a source, for `cross`."""
        return self._source(*projections((source_BSD, self.key), (source_BSD, self.value)))

    def cross(
        self,
        x_BLD: jax.Array,
        source: KeyValues | jax.Array,
        *,
        mask: MaskSpec,
        kernel: Kernel,
        train: bool,
    ) -> jax.Array:
        """Attention of x [B, L, D] to a source [B, S, D], or to its keys and values: [B, L, D].

        Several consecutive rows of x may have one row of the source. They become queries of one row, so that its keys
        and values are computed once; the mask is of these rows.
        """
        rows, length = x_BLD.shape[:2]
        sources = source.k_BKSH.shape[0] if isinstance(source, KeyValues) else source.shape[0]
        if sources != rows:
            x_BLD = x_BLD.reshape(sources, rows // sources * length, -1)
        if isinstance(source, KeyValues):
            queries = self.query(x_BLD)
        else:
            keys, values, queries = projections((source, self.key), (source, self.value), (x_BLD, self.query))
            source = self._source(keys, values)
        out_BLD = self._attend(self._queries(queries), source, None, mask, kernel, train=train)
        return out_BLD.reshape(rows, length, -1)

    def __call__(
        self,
        x_BLD: jax.Array,
        *,
        bias_1NLS: jax.Array | None,
        mask: MaskSpec,
        kernel: Kernel,
        positions_BL: jax.Array,
        train: bool,
        cache: KeyValues | None = None,
        first_query: jax.Array | int = 0,
        source: KeyValues | jax.Array | None = None,
        source_mask: MaskSpec | None = None,
    ) -> tuple[jax.Array, KeyValues | None]:
        """Self-attention of x [B, L, D].

        Args:
            x_BLD: the input.
            bias_1NLS: relative bias, or None.
            mask: which keys a query attends to.
            kernel: of `AttentionPlan`.
            positions_BL: position of each token in its text, for rotary positions.
            train: whether to drop out.
            cache: keys and values of earlier tokens; this call's are written from index `first_query` on.
            first_query: index of x's first token in the cache.
            source: further keys and values, or what they are projected from; see `merged_attention`. None: none.
            source_mask: of them.

        Returns:
            the output [B, L, D] and the new cache, or None without one.
        """
        rotary_BL = positions_BL if self.config.positions == "rotary" else None
        queries, keys, values = projections((x_BLD, self.query), (x_BLD, self.key), (x_BLD, self.value))
        q_BNLH = self._queries(queries, rotary_BL)
        own = self._source(keys, values, rotary_BL)
        if cache is not None:
            update = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, first_query, axis=2)
            own = cache = KeyValues(*map(update, cache, own))
        if source is not None:
            source = source if isinstance(source, KeyValues) else self.keys_values(source)
            own, bias_1NLS, mask = merge(own, source, bias_1NLS, mask, source_mask, x_BLD.shape[1])
        return self._attend(q_BNLH, own, bias_1NLS, mask, kernel, train=train), cache

    def _attend(self, q_BNLH: jax.Array, source: KeyValues, bias_1NLS, mask: MaskSpec, kernel: Kernel, *, train: bool):
        """Attention and the output projection: [B, L, D]."""
        how = {"bias_1NLS": bias_1NLS, "mask": mask, "kernel": kernel, "softcap": self.config.attention_softcap}
        intermediates.record(self, f"{self.name}_weights", lambda: attention_weights(q_BNLH, source.k_BKSH, **how))
        out = attend(q_BNLH, *source, **how).transpose(0, 2, 1, 3)
        return self.out(dropout(self, out.reshape(*out.shape[:2], -1), self.config.dropout_rate, train=train))
