"""`Transformer`: one model for encoder-decoder, decoder-only and encoder-only, by the config.

Embeddings below its stacks (`stack`), heads above them. Called by `step` (training, evaluation) and `generate`
(`encode`, `prepare_cache`, `decode`). Token types, and the heads for masked tokens and for pairs, are BERT's (Devlin et
al. 2019, section 3, and the released code).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5like.config.schema import Config
from t5like.model import heads
from t5like.model import layers as lay
from t5like.model.attention import fused
from t5like.model.kernels import cpu
from t5like.model.masks import MaskSpec, causal_mask, window_mask
from t5like.model.stack import Caches, Stack, cache_length
from t5like.sharding.logical_axes import constrain
from t5like.types import MASKED, Batch


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
            if model.next_sentence_head:
                self.pairs = heads.PairClassifier(model)
        if model.embedding_norm:
            self.embedding_norm = lay.Norm(model)
        if model.has_encoder:
            self.encoder = Stack(model, model.num_layers, causal=False)
        if model.has_decoder:
            self.decoder = Stack(model, model.decoder_layers, causal=True, cross=model.has_encoder)
        if not model.tied_embeddings:
            # Half of T5's standard deviation: the logits of an untrained model then have variance 1/4 and its loss is
            # ln V + 1/8. At the full one, Mesh TensorFlow's, it would be ln V + 1/2.
            head = lay.kernel_init(model, model.model_dim, ("embed", "vocab"), scale=0.5)
            self.head = self.param("head", head, (model.model_dim, config.vocab_rows), jnp.float32)
        if model.head == "mlm":
            self.mlm = heads.MlmTransform(model)
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",))
            self.head_bias = self.param("head_bias", zeros, (config.vocab_rows,), jnp.float32)

    def __call__(self, batch: Batch, *, train: bool = False) -> jax.Array:
        """Float32 logits [B, L, V] of a batch."""
        hidden_BLD = self.hidden(batch, train=train)
        if self.is_initializing() and self.config.model.token_types and self.config.model.next_sentence_head:
            self.pair_logits(hidden_BLD)  # for its parameters: no token's logits depend on them
        return self.logits(hidden_BLD)

    def hidden(self, batch: Batch, *, train: bool = False) -> jax.Array:
        """The decoder's output [B, L, D] for a batch; encoder-only: the encoder's, L = S."""
        encoded_BSD = None
        if self.config.model.has_encoder:
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
            cross_mask = MaskSpec(False, segments_BL, batch.encoder_segments_BS)
            cross_mask = self._by_rule(cross_mask, rows, length, encoded_BSD.shape[1], cross=True)
        mask = MaskSpec(True, segments_BL, segments_BL, batch.prefix_BL, self.config.model.attention_window)
        mask = self._by_rule(mask, rows, length, length)
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
            mask = self._by_rule(MaskSpec(False, segments_BS, segments_BS), *ids_BS.shape, ids_BS.shape[1])
        x_BSD = self._embed(ids_BS, positions_BS, token_types_BS, train=train)
        x_BSD, _ = self.encoder(x_BSD, mask_B1LS=mask, positions_BL=positions_BS, train=train)
        return self._drop_output(x_BSD, train=train)

    def _by_rule(self, seen: MaskSpec, rows: int, queries: int, keys: int, *, cross: bool = False):
        """The rule itself for a fused kernel, else its array or None, once for all layers."""
        model = self.config.model
        biased = model.positions == "relative" and not cross
        if fused(model.kernels, model.head_dim, model.dtype, rows, queries, keys, seen, biased=biased):
            return seen
        return seen.mask(queries, keys)

    def pair_logits(self, hidden_BSD: jax.Array) -> jax.Array:
        """Whether a pair's second text follows its first: float32 logits [B, 2] of yes and no. Needs token types."""
        return self.pairs(hidden_BSD)

    def logits(self, hidden_BLD: jax.Array) -> jax.Array:
        """The output head: float32 logits [B, L, V]; vocabulary rows that are padding are masked."""
        config, model = self.config, self.config.model
        if model.head == "mlm":
            hidden_BLD = self.mlm(hidden_BLD)
        kernel_DV = self.embedding.T if model.tied_embeddings else self.head
        if heads.scales_logits(model):
            # Mesh TensorFlow: tied logits are scaled, because the embedding has standard deviation 1.
            hidden_BLD = hidden_BLD * model.model_dim**-0.5
        multiply = cpu.matmul if model.kernels == "cpu" and model.dtype == "float32" else heads.project_to_vocabulary
        logits_BLV = multiply(hidden_BLD, kernel_DV.astype(model.dtype))
        logits_BLV = constrain(logits_BLV, "batch", "length", "act_vocab")
        if model.head == "mlm":
            logits_BLV = logits_BLV + self.head_bias[None, None]
        if config.vocab_rows == config.tokenizer.vocab_size:
            return logits_BLV
        real_V = jnp.arange(config.vocab_rows) < config.tokenizer.vocab_size
        return jnp.where(real_V[None, None], logits_BLV, MASKED)

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
        if window := self.config.model.attention_window:
            mask_B1LS = mask_B1LS & window_mask(ids_BL.shape[1], cache_length(cache), first, window, fork)
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
        x_BLD = heads.embed(self.embedding, ids_BL, model.dtype)
        if model.positions == "learned":
            # Padding may lie behind the last position; `generate` sees to it that text does not.
            x_BLD = x_BLD + heads.embed(self.positions, jnp.minimum(positions_BL, model.max_length - 1), model.dtype)
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
