"""`Block`, `Stack` and `Transformer`: one model for encoder-decoder, decoder-only and encoder-only, by the config.

A stack keeps its layers' parameters stacked, with a leading dim Y, whether they are then scanned (compile time that
does not grow with depth) or unrolled (faster on a CPU): one layout in memory, on disk and in optimizers. Scanning and
recomputation are plain `jax.lax.scan` and `jax.checkpoint` over a pure function of one layer's parameters.
Called by `step` (training, evaluation) and `generate` (`encode`, `prepare_cache`, `decode`). Token types, and the heads
for masked tokens and for pairs, are BERT's (Devlin et al. 2019, section 3, and the released code).
"""

from functools import partial
from operator import itemgetter
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5like.config import Config, ModelConfig
from t5like.mesh import constrain
from t5like.model import cpu, tpu
from t5like.model import layers as lay
from t5like.model.attention import Attention, KeyValues, Seen, causal_mask, fused, segment_mask, window_mask
from t5like.types import Batch, Tree

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
    mask_B1LS: jax.Array | Seen | None
    positions_BL: jax.Array
    encoded_BSD: jax.Array | None = None
    cross_mask_B1LS: jax.Array | Seen | None = None
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


def longer(cache: Caches, length: int) -> Caches:
    """A stack's cache with places for `length` tokens."""
    pad = lambda x: jnp.pad(x, [*[(0, 0)] * (x.ndim - 2), (0, length - x.shape[-2]), (0, 0)])
    is_cache = lambda x: isinstance(x, Cache)
    return jax.tree.map(lambda each: Cache(jax.tree.map(pad, each.own), each.cross), cache, is_leaf=is_cache)


def unstacked(layers: Tree) -> tuple[Tree, ...]:
    """The parameters of each layer of a stack, by slices, which are copies; those of an unstacked one as they are."""
    if isinstance(layers, tuple):
        return layers
    return tuple(jax.tree.map(itemgetter(y), layers) for y in range(jax.tree.leaves(layers)[0].shape[0]))


class Block(nn.Module):
    """One layer: self-attention, cross-attention where there is an encoder to read, MLP; each a residual."""

    config: ModelConfig
    cross: bool = False
    causal: bool = False

    def setup(self) -> None:
        config = self.config
        if config.positions == "relative" and config.relative_bias == "per_layer":
            self.relative_bias = lay.RelativeBias(config, bidirectional=not self.causal)
        self.attention, self.attention_norm = Attention(config), lay.Norm(config)
        if self.cross:
            self.cross_attention, self.cross_attention_norm = Attention(config), lay.Norm(config)
        self.mlp, self.mlp_norm = lay.Mlp(config), lay.Norm(config)

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
            if fused(self.config.kernels, *x_BLD.shape[:2], keys, context.mask_B1LS):
                bias_1NLS = tpu.spread(bias_1NLS)

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
            source = cache.cross if cache else self.cross_attention.keys_values(context.encoded_BSD)
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
            self.relative_bias = lay.RelativeBias(config, bidirectional=not self.causal)
        if config.norm_position == "pre":
            self.final_norm = lay.Norm(config)
        unstacked = self.has_variable("params", "layers") and isinstance(self.get_variable("params", "layers"), tuple)
        self.layers = self.get_variable("params", "layers") if unstacked else self.param("layers", self._init)

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
        mask_B1LS: jax.Array | Seen | None,
        positions_BL: jax.Array,
        encoded_BSD: jax.Array | None = None,
        cross_mask_B1LS: jax.Array | Seen | None = None,
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
        if self.config.attention_window:
            # By place in the row: padding on the left and documents behind each other shift query and key alike.
            window = window_mask(queries, keys, first, self.config.attention_window, fork)
            mask_B1LS = mask_B1LS.mask(queries, keys) if isinstance(mask_B1LS, Seen) else mask_B1LS
            mask_B1LS = window if mask_B1LS is None else mask_B1LS & window
        if bias_1NLS is not None and fused(self.config.kernels, x_BLD.shape[0], queries, keys, mask_B1LS):
            bias_1NLS = tpu.spread(bias_1NLS)
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
        caches, layers = [], unstacked(self.layers)
        for y in range(self.num_layers):
            key = None if keys_Y is None else keys_Y[y]
            x_BLD, new = layer(x_BLD, context, layers[y], key, cache and cache[y])
            caches.append(new)
        return x_BLD, cache and tuple(caches)

    def prepare_cache(self, rows: int, length: int, encoded_BSD: jax.Array | None) -> Caches:
        """An empty cache for `length` tokens, with the keys and values of the encoder's output."""
        config = self.config
        shape = (rows, config.num_kv_heads or config.num_heads, length, config.head_dim)
        zeros = constrain(jnp.zeros(shape, config.dtype), "batch", "act_heads", None, None)

        def layer(params):
            cross = None
            if encoded_BSD is not None:
                cross = self.block.apply({"params": params}, encoded_BSD, method="keys_values")
            return Cache(KeyValues(zeros, zeros), cross)

        if config.layers == "scan":
            return jax.lax.map(layer, self.layers)
        return tuple(layer(params) for params in unstacked(self.layers))


class Transformer(nn.Module):
    """The model. `hidden` maps a batch to what the heads read; `logits` and, for pairs, `pair_logits` are the heads."""

    config: Config

    def setup(self) -> None:
        config, model = self.config, self.config.model
        t5 = model.init == "t5"
        table = lay.normal(1.0 if t5 else 0.02, ("vocab", "embed"))
        self.embedding = self.param("embedding", table, (config.vocab_rows, model.model_dim), jnp.float32)
        if model.positions == "learned":
            learned = lay.normal(1.0 if t5 else 0.02, ("positions", "embed"))
            self.positions = self.param("positions", learned, (model.max_length, model.model_dim), jnp.float32)
        if model.token_types:
            types = lay.normal(1.0 if t5 else 0.02, ("token_types", "embed"))
            self.token_types = self.param("token_types", types, (model.token_types, model.model_dim), jnp.float32)
            if model.pair_head:
                self.pairs = lay.PairClassifier(model)
        if model.embedding_norm:
            self.embedding_norm = lay.Norm(model)
        encodes = model.architecture != "decoder"
        if encodes:
            self.encoder = Stack(model, model.num_layers, causal=False)
        if model.architecture != "encoder":
            decoder_layers = (model.num_decoder_layers or model.num_layers) if encodes else model.num_layers
            self.decoder = Stack(model, decoder_layers, causal=True, cross=encodes)
        if not model.tied_embeddings:
            # Half of T5's standard deviation: the logits of an untrained model then have variance 1/4 and its loss is
            # ln V + 1/8. At the full one, Mesh TensorFlow's, it would be ln V + 1/2.
            head = lay.kernel_init(model, model.model_dim, ("embed", "vocab"), scale=0.5)
            self.head = self.param("head", head, (model.model_dim, config.vocab_rows), jnp.float32)
        if model.head == "mlm":
            self.mlm = lay.MlmTransform(model)
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",))
            self.head_bias = self.param("head_bias", zeros, (config.vocab_rows,), jnp.float32)

    def __call__(self, batch: Batch, *, train: bool = False) -> jax.Array:
        """Float32 logits [B, L, V] of a batch."""
        hidden_BLD = self.hidden(batch, train=train)
        if self.is_initializing() and self.config.model.token_types and self.config.model.pair_head:
            self.pair_logits(hidden_BLD)  # for its parameters: no token's logits depend on them
        return self.logits(hidden_BLD)

    def hidden(self, batch: Batch, *, train: bool = False) -> jax.Array:
        """The decoder's output [B, L, D] for a batch; encoder-only: the encoder's, L = S."""
        encoded_BSD = None
        if self.config.model.architecture != "decoder":
            encoded_BSD = self.encode(
                batch.encoder_BS,
                batch.encoder_segments_BS,
                batch.encoder_positions_BS,
                batch.token_types_BS,
                train=train,
            )
        if self.config.model.architecture == "encoder":
            return encoded_BSD
        segments_BL, (rows, length) = batch.decoder_segments_BL, batch.decoder_BL.shape
        cross_mask = None
        if segments_BL is not None and encoded_BSD is not None:
            cross_mask = Seen(False, segments_BL, batch.encoder_segments_BS)
            cross_mask = self._by_rule(cross_mask, rows, length, encoded_BSD.shape[1])
        if batch.prefix_BL is None:
            mask = self._by_rule(Seen(True, segments_BL, segments_BL), rows, length, length)
        else:
            mask = causal_mask(length, length) | batch.prefix_BL[:, None, None, :]
            mask = mask if segments_BL is None else mask & segment_mask(segments_BL, segments_BL)
        positions_BL = _positions(batch.decoder_BL, batch.decoder_positions_BL)
        x_BLD = self._embed(batch.decoder_BL, positions_BL, train=train)
        x_BLD, _ = self.decoder(
            x_BLD,
            mask_B1LS=mask,
            positions_BL=positions_BL,
            encoded_BSD=encoded_BSD,
            cross_mask_B1LS=cross_mask,
            train=train,
        )
        return self._drop_output(x_BLD, train=train)

    def encode(
        self,
        ids_BS: jax.Array,
        segments_BS: jax.Array | None = None,
        positions_BS: jax.Array | None = None,
        token_types_BS: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """The encoder's output [B, S, D]. Of a model with token types, a text that brings none is a pair's first."""
        positions_BS = _positions(ids_BS, positions_BS)
        mask = None
        if segments_BS is not None:
            mask = self._by_rule(Seen(False, segments_BS, segments_BS), *ids_BS.shape, ids_BS.shape[1])
        x_BSD = self._embed(ids_BS, positions_BS, token_types_BS, train=train)
        x_BSD, _ = self.encoder(x_BSD, mask_B1LS=mask, positions_BL=positions_BS, train=train)
        return self._drop_output(x_BSD, train=train)

    def _by_rule(self, seen: Seen, rows: int, queries: int, keys: int) -> jax.Array | Seen | None:
        """The rule itself for a fused kernel, else its array, once for all layers."""
        return seen if fused(self.config.model.kernels, rows, queries, keys, seen) else seen.mask(queries, keys)

    def pair_logits(self, hidden_BSD: jax.Array) -> jax.Array:
        """Whether a pair's second text follows its first: float32 logits [B, 2] of yes and no. Needs token types."""
        return self.pairs(hidden_BSD)

    def logits(self, hidden_BLD: jax.Array) -> jax.Array:
        """The output head: float32 logits [B, L, V]; vocabulary rows that are padding are masked."""
        config, model = self.config, self.config.model
        if model.head == "mlm":
            hidden_BLD = self.mlm(hidden_BLD)
        kernel_DV = self.embedding.T if model.tied_embeddings else self.head
        if lay.scales_logits(model):
            # Mesh TensorFlow: tied logits are scaled, because the embedding has standard deviation 1.
            hidden_BLD = hidden_BLD * model.model_dim**-0.5
        multiply = cpu.matmul if model.kernels == "cpu" and model.dtype == "float32" else lay.project_to_vocabulary
        logits_BLV = multiply(hidden_BLD, kernel_DV.astype(model.dtype))
        logits_BLV = constrain(logits_BLV, "batch", "length", "act_vocab")
        if model.head == "mlm":
            logits_BLV = logits_BLV + self.head_bias[None, None]
        if config.vocab_rows == config.tokenizer.vocab_size:
            return logits_BLV
        real_V = jnp.arange(config.vocab_rows) < config.tokenizer.vocab_size
        return jnp.where(real_V[None, None], logits_BLV, lay.MASKED)

    def prepare_cache(self, rows: int, length: int, encoded_BSD: jax.Array | None = None) -> Caches:
        """An empty cache for `length` decoded tokens, cross-attention's keys and values computed."""
        return self.decoder.prepare_cache(rows, length, encoded_BSD)

    def decode(
        self,
        ids_BL: jax.Array,
        cache: Caches,
        first: jax.Array | int,
        *,
        positions_BL: jax.Array | None = None,
        mask_B1LS: jax.Array | None = None,
        cross_mask_B1LS: jax.Array | None = None,
        fork: int | None = None,
        last_only: bool = False,
    ) -> tuple[jax.Array, Caches]:
        """Run tokens that continue a cached text.

        Args:
            ids_BL: the tokens; their keys and values go into the cache at first, first + 1, ...
            cache: from `prepare_cache` or an earlier call.
            first: index of the first token.
            positions_BL: positions in the text, where they differ from the index (rows padded on the left).
            mask_B1LS: what may be seen of the cache; None: everything up to the token itself.
            cross_mask_B1LS: what may be seen of the encoder's output; None: everything.
            fork: where a row's text branches into L that go on side by side: of each L places from there on, one
                belongs to each, all at the same position. `positions_BL` and `mask_B1LS` must say the same.
            last_only: whether only the last token's logits are wanted.

        Returns:
            float32 logits [B, L or 1, V] and the longer cache.
        """
        if positions_BL is None:
            positions_BL = _positions(ids_BL, None) + first
        if mask_B1LS is None:
            mask_B1LS = causal_mask(ids_BL.shape[1], cache_length(cache), first)
        x_BLD, cache = self.decoder(
            self._embed(ids_BL, positions_BL, train=False),
            mask_B1LS=mask_B1LS,
            positions_BL=positions_BL,
            cross_mask_B1LS=cross_mask_B1LS,
            cache=cache,
            first=first,
            fork=fork,
        )
        return self.logits(x_BLD[:, -1:] if last_only else x_BLD), cache

    def _embed(
        self, ids_BL: jax.Array, positions_BL: jax.Array, token_types_BL: jax.Array | None = None, *, train: bool
    ) -> jax.Array:
        model = self.config.model
        x_BLD = lay.embed(self.embedding, ids_BL, model.dtype)
        if model.positions == "learned":
            # Padding may lie behind the last position; `generate` sees to it that text does not.
            x_BLD = x_BLD + lay.embed(self.positions, jnp.minimum(positions_BL, model.max_length - 1), model.dtype)
        if model.token_types:
            types_BL = jnp.zeros_like(ids_BL) if token_types_BL is None else token_types_BL
            # A product, because the gradient of a look-up would add every token into the same few rows one by one.
            one_hot_BLC = jax.nn.one_hot(types_BL, model.token_types, dtype=model.dtype)
            x_BLD = x_BLD + one_hot_BLC @ self.token_types.astype(model.dtype)
        if model.embedding_norm:
            x_BLD = self.embedding_norm(x_BLD)
        return constrain(lay.dropout(self, x_BLD, model.dropout_rate, train=train), "batch", "length", "act_embed")

    def _drop_output(self, x_BLD: jax.Array, *, train: bool) -> jax.Array:
        """Dropout behind the final norm, as in T5. A post-norm stack has none: it drops out before its last norm."""
        model = self.config.model
        return lay.dropout(self, x_BLD, model.dropout_rate if model.norm_position == "pre" else 0.0, train=train)


def _positions(ids_BL: jax.Array, given_BL: jax.Array | None) -> jax.Array:
    """Positions counted from 0 along the row, where the batch brings none."""
    return jnp.broadcast_to(jnp.arange(ids_BL.shape[1])[None], ids_BL.shape) if given_BL is None else given_BL
