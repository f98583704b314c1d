"""`Block` and `Stack`: the layers of an encoder or a decoder, and the cache that a decoder reads and fills.

A stack keeps its layers' parameters stacked, with a leading dim Y, whether they are then scanned (compile time that
does not grow with depth) or unrolled (faster on a CPU): one layout in memory, on disk and in optimizers. Scanning and
recomputation are plain `jax.lax.scan` and `jax.checkpoint` over a pure function of one layer's parameters.
Called by `transformer`; `generate` makes caches longer and takes the layers apart.
"""

from functools import partial
from operator import itemgetter
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5like.config.schema import ModelConfig
from t5like.model import layers as lay
from t5like.model import mlp, positions
from t5like.model.attention import Attention, KeyValues, fused
from t5like.model.kernels import tpu_attention
from t5like.model.masks import MaskSpec
from t5like.sharding.logical_axes import constrain
from t5like.types import Tree

REMAT = {  # ModelConfig.remat -> what the forward pass keeps
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # The projections whose results are worth their memory most: rotated, so that this is not done again either.
    "qk": jax.checkpoint_policies.save_only_these_names("query", "key"),
}


class Context(NamedTuple):
    """What every layer of a stack reads besides its input; the same for all of them.

    Attributes:
        bias_1NLS: relative bias of self-attention that all layers share, or None.
        mask_B1LS: what self-attention may see, as an array or a rule, or None: everything.
        positions_BL: position of each token in its text.
        encoded_BSD: the encoder's output, for a decoder that reads one; None when `Cache.cross` holds its keys.
        cross_mask_B1LS: what cross-attention may see, or None.
        first: index of the first token in the cache.
    """

    bias_1NLS: jax.Array | None
    mask_B1LS: jax.Array | MaskSpec | None
    positions_BL: jax.Array
    encoded_BSD: jax.Array | None = None
    cross_mask_B1LS: jax.Array | MaskSpec | None = None
    first: jax.Array | int = 0


class Cache(NamedTuple):
    """Keys and values for decoding, of one layer. A stack has a tuple of them, or, scanned, one with a leading dim Y.

    Attributes:
        own: of the text decoded so far.
        cross: of the encoder's output, computed once; None in a decoder-only model.
    """

    own: KeyValues
    cross: KeyValues | None


Caches = Cache | tuple[Cache, ...]


def cache_length(cache: Caches) -> int:
    """Tokens that a stack's cache has places for."""
    return jax.tree.leaves(cache)[0].shape[-2]


def grow_cache(cache: Caches, length: int) -> Caches:
    """A stack's cache with places for `length` tokens."""
    pad = lambda x: jnp.pad(x, [*[(0, 0)] * (x.ndim - 2), (0, length - x.shape[-2]), (0, 0)])
    is_cache = lambda x: isinstance(x, Cache)
    return jax.tree.map(lambda each: Cache(jax.tree.map(pad, each.own), each.cross), cache, is_leaf=is_cache)


def unstack_layers(layers: Tree) -> tuple[Tree, ...]:
    """The parameters of each layer of a stack, by slices, which are copies; those of an unstacked one as they are."""
    if isinstance(layers, tuple):
        return layers
    return tuple(jax.tree.map(itemgetter(y), layers) for y in range(jax.tree.leaves(layers)[0].shape[0]))


def _fused(config: ModelConfig, x_BLD: jax.Array, keys: int, mask_B1LS: jax.Array | MaskSpec | None) -> bool:
    """Whether self-attention with a relative bias is one kernel."""
    return fused(config.kernels, config.head_dim, config.dtype, *x_BLD.shape[:2], keys, mask_B1LS, biased=True)


class Block(nn.Module):
    """One layer: self-attention, cross-attention where there is an encoder to read, MLP; each a residual."""

    config: ModelConfig
    cross: bool = False
    causal: bool = False

    def setup(self) -> None:
        config = self.config
        if config.positions == "relative" and config.relative_bias == "per_layer":
            self.relative_bias = positions.RelativeBias(config, bidirectional=not self.causal)
        self.attention, self.attention_norm = Attention(config), lay.Norm(config)
        if self.cross:
            self.cross_attention, self.cross_attention_norm = Attention(config), lay.Norm(config)
        self.mlp, self.mlp_norm = mlp.Mlp(config), lay.Norm(config)

    def __call__(
        self,
        x_BLD: jax.Array,
        context: Context,
        cache: Cache | None = None,
        *,
        fork: int | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, Cache | None]:
        """Map [B, L, D] to [B, L, D]; the cache comes back with this call's keys and values in it."""
        own, bias_1NLS = None, context.bias_1NLS
        if self.config.positions == "relative" and self.config.relative_bias == "per_layer":
            keys = x_BLD.shape[1] if cache is None else cache_length(cache)
            bias_1NLS = self.relative_bias(x_BLD.shape[1], keys, first_query=context.first, fork=fork)
            if _fused(self.config, x_BLD, keys, context.mask_B1LS):
                bias_1NLS = tpu_attention.spread(bias_1NLS)

        def attend(y_BLD):
            nonlocal own
            y_BLD, own = self.attention(
                y_BLD,
                bias_1NLS=bias_1NLS,
                mask_B1LS=context.mask_B1LS,
                positions_BL=context.positions_BL,
                train=train,
                cache=cache and cache.own,
                first=context.first,
            )
            return y_BLD

        def cross(y_BLD):
            source = cache.cross if cache else context.encoded_BSD
            return self.cross_attention.cross(y_BLD, source, mask_B1LS=context.cross_mask_B1LS, train=train)

        x_BLD = self._residual(x_BLD, self.attention_norm, attend, train=train)
        if self.cross:
            x_BLD = self._residual(x_BLD, self.cross_attention_norm, cross, train=train)
        x_BLD = self._residual(x_BLD, self.mlp_norm, partial(self.mlp, train=train), train=train)
        return x_BLD, cache and Cache(own, cache.cross)

    def _residual(self, x_BLD: jax.Array, norm: lay.Norm, sublayer, *, train: bool) -> jax.Array:
        """x + sublayer(norm(x)), or norm(x + sublayer(x)) with post-norm."""
        if self.config.norm_position == "post":
            y_BLD = norm(x_BLD + lay.dropout(self, sublayer(x_BLD), self.config.dropout_rate, train=train))
        else:
            y_BLD = x_BLD + lay.dropout(self, sublayer(norm(x_BLD)), self.config.dropout_rate, train=train)
        return constrain(y_BLD, "batch", "length", "act_embed")

    def keys_values(self, encoded_BSD: jax.Array) -> KeyValues:
        """The layer's cross-attention keys and values."""
        return self.cross_attention.keys_values(encoded_BSD)


class Stack(nn.Module):
    """Y blocks with stacked parameters, the relative bias that they may share, and the norm behind them."""

    config: ModelConfig
    num_layers: int
    causal: bool
    cross: bool = False

    def setup(self) -> None:
        config = self.config
        if config.positions == "relative" and config.relative_bias == "shared":
            self.relative_bias = positions.RelativeBias(config, bidirectional=not self.causal)
        if config.norm_position == "pre":
            self.final_norm = lay.Norm(config)
        unstack_layers = self.has_variable("params", "layers") and isinstance(
            self.get_variable("params", "layers"), tuple
        )
        self.layers = self.get_variable("params", "layers") if unstack_layers else self.param("layers", self._init)

    @property
    def block(self) -> Block:
        """One layer, bound to no parameters: it is applied to slices of `layers`."""
        return Block(self.config, self.cross, self.causal, parent=None)

    def _init(self, key: jax.Array) -> Tree:
        """Initialise each layer from its own key; every leaf gets a leading dim `layers`."""
        x_BLD = jnp.zeros((1, 1, self.config.model_dim), self.config.dtype)
        context = Context(None, None, jnp.zeros((1, 1), jnp.int32), x_BLD if self.cross else None)
        layers = jax.vmap(lambda k: self.block.init(k, x_BLD, context)["params"])(
            jax.random.split(key, self.num_layers)
        )
        is_box = lambda x: isinstance(x, nn.meta.AxisMetadata)
        return jax.tree.map(lambda box: box.add_axis(0, {nn.PARTITION_NAME: "layers"}), layers, is_leaf=is_box)

    def __call__(
        self,
        x_BLD: jax.Array,
        *,
        mask_B1LS: jax.Array | MaskSpec | None,
        positions_BL: jax.Array,
        encoded_BSD: jax.Array | None = None,
        cross_mask_B1LS: jax.Array | MaskSpec | None = None,
        cache: Caches | None = None,
        first: jax.Array | int = 0,
        fork: int | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, Caches | None]:
        """Run all layers and the final norm on [B, L, D]; with a cache, on tokens that continue it at `first`.

        From place `fork` of the cache on, each L tokens that follow each other stand at the same position.
        """
        bias_1NLS, queries, keys = None, x_BLD.shape[1], x_BLD.shape[1] if cache is None else cache_length(cache)
        if self.config.positions == "relative" and self.config.relative_bias == "shared":
            bias_1NLS = self.relative_bias(queries, keys, first_query=first, fork=fork)
        if bias_1NLS is not None and _fused(self.config, x_BLD, keys, mask_B1LS):
            bias_1NLS = tpu_attention.spread(bias_1NLS)
        context = Context(bias_1NLS, mask_B1LS, positions_BL, encoded_BSD, cross_mask_B1LS, first)
        if self.is_initializing():  # `_init` has made the layers' parameters, and nothing depends on their values
            return (self.final_norm(x_BLD) if self.config.norm_position == "pre" else x_BLD), cache
        dropping = train and self.config.dropout_rate > 0
        keys_Y = jax.random.split(self.make_rng("dropout"), self.num_layers) if dropping else None

        def layer(x_BLD, context, params, key, cache):
            rngs = {"dropout": key} if dropping else None
            return self.block.apply({"params": params}, x_BLD, context, cache, fork=fork, train=train, rngs=rngs)

        if self.config.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT[self.config.remat], prevent_cse=self.config.layers == "unroll")
        if self.config.layers == "scan":
            x_BLD, cache = jax.lax.scan(lambda x, each: layer(x, context, *each), x_BLD, (self.layers, keys_Y, cache))
        else:
            x_BLD, cache = self._unroll(layer, x_BLD, context, keys_Y, cache)
        return (self.final_norm(x_BLD) if self.config.norm_position == "pre" else x_BLD), cache

    def _unroll(self, layer, x_BLD, context: Context, keys_Y, cache: tuple[Cache, ...] | None):
        caches, layers = [], unstack_layers(self.layers)
        for y in range(self.num_layers):
            key = None if keys_Y is None else keys_Y[y]
            x_BLD, new = layer(x_BLD, context, layers[y], key, cache and cache[y])
            caches.append(new)
        return x_BLD, cache and tuple(caches)

    def prepare_cache(self, rows: int, length: int, encoded_BSD: jax.Array | None) -> Caches:
        """An empty cache for `length` tokens, with the keys and values of the encoder's output."""
        config = self.config
        shape = (rows, config.kv_heads, length, config.head_dim)
        zeros = constrain(jnp.zeros(shape, config.dtype), "batch", "act_heads", None, None)

        def layer(params):
            cross = None
            if encoded_BSD is not None:
                cross = self.block.apply({"params": params}, encoded_BSD, method="keys_values")
            return Cache(KeyValues(zeros, zeros), cross)

        if config.layers == "scan":
            return jax.lax.map(layer, self.layers)
        return tuple(layer(params) for params in unstack_layers(self.layers))
