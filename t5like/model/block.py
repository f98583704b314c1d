"""`Block`: one layer of an encoder or a decoder. Called by `stack`."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5like.config.model_schema import ModelConfig
from t5like.model import intermediates
from t5like.model.attention import Attention
from t5like.model.attention_plan import AttentionPlan
from t5like.model.cache import Cache, Caches, KeyValues
from t5like.model.layers import Norm, dropout
from t5like.model.masks import MaskSpec
from t5like.model.mlp import Mlp
from t5like.model.positions import bias_module
from t5like.sharding.logical_axes import constrain
from t5like.types import Auxiliary


class LayerInputs(NamedTuple):
    """What a layer reads besides the residual stream and its cache; the same for all layers of one pattern position.

    Attributes:
        bias_1NLS: relative bias of self-attention that all layers share, or None.
        mask: of self-attention.
        positions_BL: position of each token in its text.
        encoded_BSD: the encoder's output, for a decoder that reads one; None when `Cache.cross` holds its keys.
        cross_mask: of cross-attention; None where `mask` is of the encoder's keys as well (merged attention).
        first_query: index of the first token in the cache.
        is_first: bool, whether this is the first layer, if it reads the embeddings without a norm; None: no such layer.
    """

    bias_1NLS: jax.Array | None
    mask: MaskSpec
    positions_BL: jax.Array
    encoded_BSD: jax.Array | None = None
    cross_mask: MaskSpec | None = MaskSpec()
    first_query: jax.Array | int = 0
    is_first: jax.Array | None = None


class LayerOutput(NamedTuple):
    """What a block returns, and a stack for all of its blocks.

    Attributes:
        x_BLD: the residual stream; of a stack, behind its final norm.
        cache: with the keys and values of this call; None without one.
        auxiliary: losses and statistics, as sums.
    """

    x_BLD: jax.Array
    cache: Caches | None
    auxiliary: Auxiliary


class Block(nn.Module):
    """One layer: self-attention, cross-attention where there is an encoder to read, MLP; each with a residual."""

    config: ModelConfig
    cross: bool = False
    causal: bool = False

    def setup(self) -> None:
        config = self.config
        self.relative_bias = bias_module(config, "per_layer", causal=self.causal)
        self.attention, self.attention_norm = Attention(config), Norm(config)
        if self.cross and not config.merged_attention:
            self.cross_attention, self.cross_attention_norm = Attention(config, to_encoder=True), Norm(config)
            if config.norm_position == "sandwich":
                self.cross_attention_output_norm = Norm(config)
        self.mlp, self.mlp_norm = Mlp(config), Norm(config)
        if config.norm_position == "sandwich":
            self.attention_output_norm, self.mlp_output_norm = Norm(config), Norm(config)

    def __call__(
        self,
        x_BLD: jax.Array,
        inputs: LayerInputs,
        cache: Cache | None = None,
        *,
        plan: AttentionPlan,
        train: bool = False,
    ) -> LayerOutput:
        """Map [B, L, D] to [B, L, D]."""
        bias_1NLS = inputs.bias_1NLS
        if self.relative_bias is not None:
            bias_1NLS = self.relative_bias(plan, inputs.first_query)
        source = cache.cross if cache else inputs.encoded_BSD
        attention_input_BLD = self._input(self.attention_norm, x_BLD)
        if inputs.is_first is not None:
            attention_input_BLD = jnp.where(inputs.is_first, x_BLD, attention_input_BLD)
        y_BLD, own = self.attention(
            attention_input_BLD,
            bias_1NLS=bias_1NLS,
            mask=inputs.mask,
            kernel=plan.self_attention,
            positions_BL=inputs.positions_BL,
            train=train,
            cache=cache and cache.own,
            first_query=inputs.first_query,
            source=source if self.config.merged_attention else None,
            source_mask=inputs.cross_mask,
        )
        intermediates.record(self, "attention_output", lambda: y_BLD)
        x_BLD = self._add("attention", x_BLD, y_BLD, train=train)
        if self.cross and not self.config.merged_attention:
            cross_BLD = self.cross_attention.cross(
                self._input(self.cross_attention_norm, x_BLD),
                source,
                mask=inputs.cross_mask,
                kernel=plan.cross_attention,
                train=train,
            )
            intermediates.record(self, "cross_attention_output", lambda: cross_BLD)
            x_BLD = self._add("cross_attention", x_BLD, cross_BLD, train=train)
        mlp_input_BLD = self._input(self.mlp_norm, x_BLD)
        intermediates.record(self, "mlp_input", lambda: mlp_input_BLD)
        mlp_BLD, auxiliary = self.mlp(mlp_input_BLD, train=train)
        intermediates.record(self, "mlp_output", lambda: mlp_BLD)
        x_BLD = self._add("mlp", x_BLD, mlp_BLD, train=train)
        intermediates.record(self, "residual", lambda: x_BLD)
        return LayerOutput(x_BLD, cache and Cache(own, cache.cross), auxiliary)

    def _input(self, norm: Norm, x_BLD: jax.Array) -> jax.Array:
        """What a sublayer reads of the residual stream x."""
        return x_BLD if self.config.norm_position == "post" else norm(x_BLD)

    def _add(self, sublayer: str, x_BLD: jax.Array, y_BLD: jax.Array, *, train: bool) -> jax.Array:
        """Add a sublayer's output y to the residual stream x."""
        if self.config.norm_position == "sandwich":
            y_BLD = getattr(self, f"{sublayer}_output_norm")(y_BLD)
        x_BLD = x_BLD + dropout(self, y_BLD, self.config.dropout_rate, train=train)
        if self.config.norm_position == "post":
            x_BLD = getattr(self, f"{sublayer}_norm")(x_BLD)
        return constrain(x_BLD, "batch", "length", "act_embed")

    def keys_values(self, encoded_BSD: jax.Array) -> KeyValues:
        """The keys and values of the encoder's output, as the layer attends to them."""
        attention = self.attention if self.config.merged_attention else self.cross_attention
        return attention.keys_values(encoded_BSD)
