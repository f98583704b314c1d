"""`Transformer`: one model for encoder-decoder, decoder-only and encoder-only, by the config.

Embeddings in front of its stacks (`stack`), heads behind them. Called by `step` (training, evaluation) and `generate`
(`encode`, `prepare_cache`, `decode`). Token types, and the heads for masked tokens and for pairs, are BERT's (Devlin et
al. 2019, section 3, and the released code).
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5like.config.schema import Config
from t5like.data.tokenizers.vocabulary import DECODER_START_ID
from t5like.model import embeddings, heads
from t5like.model import layers as lay
from t5like.model.block import LayerOutput
from t5like.model.cache import Caches
from t5like.model.kernels import cpu
from t5like.model.kernels.plain import soft_capped
from t5like.model.label_head import LabelHead
from t5like.model.masks import MaskSpec
from t5like.model.stack import Stack
from t5like.sharding.logical_axes import constrain
from t5like.types import MASKED, NO_AUXILIARY, Auxiliary, Batch


class Hidden(NamedTuple):
    """What the output heads read, [B, L, D], and what all layers return besides it."""

    x_BLD: jax.Array
    auxiliary: Auxiliary


class Transformer(nn.Module):
    """The model. `hidden` maps a batch to the heads' input; `logits` and, for pairs, `pair_logits` are the heads."""

    config: Config

    def setup(self) -> None:
        config, model = self.config, self.config.model
        t5, last = model.init == "t5", model.in_decoder  # of the stack whose output the heads read
        for name, dim in {"embedding": model.model_dim, "decoder_embedding": last.model_dim}.items():
            if name == "embedding" or model.separate_embeddings:
                table = lay.normal(embeddings.initial_std(model, dim), ("vocab", "embed"))
                setattr(self, name, lay.parameter(self, name, table, (config.vocab_rows, dim)))
        if model.positions == "learned":
            learned = lay.normal(1.0 if t5 else 0.02, ("positions", "embed"))
            self.positions = lay.parameter(self, "positions", learned, (model.max_length, model.model_dim))
        if model.token_types:
            types = lay.normal(1.0 if t5 else 0.02, ("token_types", "embed"))
            self.token_types = lay.parameter(self, "token_types", types, (model.token_types, model.model_dim))
        if model.has_next_sentence_head and not config.data.label_objective:
            self.pairs = heads.PairClassifier(model)
        if model.embedding_norm:
            self.embedding_norm = lay.Norm(model)
        if model.has_encoder:
            self.encoder = Stack(model, model.num_layers, causal=False)
        if model.has_decoder:
            cross_dim = model.model_dim if model.has_encoder else 0
            self.decoder = Stack(last, model.decoder_layers, causal=True, cross_dim=cross_dim)
        if objective := config.data.label_objective:
            self.label_head = LabelHead(model, config.data.num_outputs, objective != "token_classification")
            return  # without a head for the vocabulary
        if not model.tied_embeddings:
            # Half of T5's standard deviation: the logits of an untrained model then have variance 1/4 and its loss is
            # ln V + 1/8. At the full one, Mesh TensorFlow's, it would be ln V + 1/2.
            head = lay.kernel_init(model, last.model_dim, ("embed", "vocab"), scale=0.5)
            self.head = lay.parameter(self, "head", head, (last.model_dim, config.vocab_rows))
        if model.scalar_head:
            self.scalar_head = heads.ScalarHead(last)
        if model.head == "mlm":
            self.mlm = heads.MlmTransform(model)
            self.head_bias = lay.parameter(self, "head_bias", lay.constant(0.0, ("vocab",)), (config.vocab_rows,))

    def __call__(self, batch: Batch, *, train: bool = False) -> jax.Array:
        """Float32 logits [B, L, V] of a batch; of labels [B, S, C]."""
        hidden_BLD = self.hidden(batch, train=train).x_BLD
        if self.config.data.label_objective:
            return self.label_logits(hidden_BLD, batch.encoder_segments_BS, train=train)
        if self.is_initializing() and self.config.model.has_next_sentence_head:
            self.pair_logits(hidden_BLD)  # for its parameters: no token's logits depend on them
        if self.is_initializing() and self.config.model.scalar_head:
            self.scalars(hidden_BLD)
        return self.logits(hidden_BLD)

    def hidden(self, batch: Batch, *, train: bool = False) -> Hidden:
        """The decoder's output [B, L, D] for a batch; encoder-only: the encoder's, L = S.

        The decoder may have G rows for each row of the encoder, which are consecutive: answers to one prompt, which is
        encoded once.
        """
        encoded_BSD, encoder_auxiliary = None, NO_AUXILIARY
        if self.config.model.has_encoder:
            encoded_BSD, _, encoder_auxiliary = self._encode(
                batch.encoder_BS,
                batch.encoder_segments_BS,
                batch.encoder_positions_BS,
                batch.token_types_BS,
                train=train,
            )
        if not self.config.model.has_decoder:
            return Hidden(encoded_BSD, encoder_auxiliary)
        segments_BL, cross_mask = batch.decoder_segments_BL, MaskSpec()
        sources_BL = segments_BL if batch.decoder_sources_BL is None else batch.decoder_sources_BL
        if sources_BL is not None and encoded_BSD is not None:
            if sources_BL.shape[0] != encoded_BSD.shape[0]:  # several texts of one row are its queries
                sources_BL = sources_BL.reshape(encoded_BSD.shape[0], -1)
            cross_mask = MaskSpec(False, sources_BL, batch.encoder_segments_BS)
        positions_BL = _positions(batch.decoder_BL, batch.decoder_positions_BL)
        x_BLD, _, auxiliary = self.decoder(
            self._embed(batch.decoder_BL, positions_BL, decoder=True, train=train),
            mask=MaskSpec(True, segments_BL, segments_BL, batch.prefix_BL),
            positions_BL=positions_BL,
            encoded_BSD=encoded_BSD,
            cross_mask=cross_mask,
            train=train,
        )
        return Hidden(self._drop_output(x_BLD, train=train), encoder_auxiliary.merged(auxiliary))

    def encode(self, ids_BS: jax.Array, segments_BS: jax.Array | None = None) -> jax.Array:
        """The encoder's output [B, S, D], without dropout. Of a model with token types, all tokens have type 0."""
        return self._encode(ids_BS, segments_BS).x_BLD

    def _encode(
        self,
        ids_BS: jax.Array,
        segments_BS: jax.Array | None,
        positions_BS: jax.Array | None = None,
        token_types_BS: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> LayerOutput:
        positions_BS = _positions(ids_BS, positions_BS)
        x_BSD = self._embed(ids_BS, positions_BS, token_types_BS, train=train)
        mask = MaskSpec(False, segments_BS, segments_BS)
        output = self.encoder(x_BSD, mask=mask, positions_BL=positions_BS, train=train)
        return output._replace(x_BLD=self._drop_output(output.x_BLD, train=train))

    def pair_logits(self, hidden_BSD: jax.Array) -> jax.Array:
        """Whether a pair's second text follows its first: float32 logits [B, 2], yes and no. Needs token types."""
        return self.pairs(hidden_BSD)

    def scalars(self, hidden_BLD: jax.Array) -> jax.Array:
        """A number for each position: float32 [B, L]. Needs `model.scalar_head`."""
        return self.scalar_head(hidden_BLD)

    def label_logits(self, hidden_BSD: jax.Array, segments_BS: jax.Array | None, *, train: bool = False) -> jax.Array:
        """The output of `label_head.LabelHead`, float32 [B, S, C]. Needs an objective that predicts labels."""
        return self.label_head(hidden_BSD, segments_BS, train=train)

    def logits(self, hidden_BLD: jax.Array) -> jax.Array:
        """The output head: float32 logits [B, L, V]; vocabulary rows that are padding are masked."""
        config, model = self.config, self.config.model
        if model.head == "mlm":
            hidden_BLD = self.mlm(hidden_BLD)
        tied = self.decoder_embedding if model.separate_embeddings else self.embedding
        kernel_DV = tied.T if model.tied_embeddings else self.head
        if model.scales_logits:
            # Mesh TensorFlow: tied logits are scaled, because the embedding has standard deviation 1.
            hidden_BLD = hidden_BLD * model.in_decoder.model_dim**-0.5
        multiply = cpu.matmul if model.kernels == "cpu" and model.dtype == "float32" else heads.project_to_vocabulary
        logits_BLV = multiply(hidden_BLD, kernel_DV.astype(model.dtype))
        logits_BLV = constrain(logits_BLV, "batch", "length", "act_vocab")
        if model.head == "mlm":
            logits_BLV = logits_BLV + self.head_bias[None, None]
        logits_BLV = soft_capped(logits_BLV, model.logits_softcap)
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
        branch_start: int | None = None,
        last_only: bool = False,
    ) -> tuple[jax.Array, Caches]:
        """Run tokens that continue a cached text.

        Args:
            ids_BL: the tokens; their keys and values are written to the cache at first, first + 1, ...
            cache: from `prepare_cache` or an earlier call.
            first: index of the first token.
            positions_BL: positions in the text, where they differ from the index (rows padded on the left).
            mask_B1LS: bool, True at tokens of the cache that are attended to; None: all up to the token itself.
            cross_mask_B1LS: the same for the encoder's output; None: all of it.
            branch_start: where a row's text branches into L texts that are decoded in parallel: from this index on,
                each group of L consecutive tokens has one token of each text, all at the same position.
                `positions_BL` and `mask_B1LS` must agree with it.
            last_only: whether to return the last token's logits only.

        Returns:
            float32 logits [B, L or 1, V] and the cache with these tokens.
        """
        if positions_BL is None:
            positions_BL = _positions(ids_BL, None) + first
        x_BLD, cache, _ = self.decoder(
            self._embed(ids_BL, positions_BL, decoder=True, train=False),
            mask=MaskSpec(causal=mask_B1LS is None, allowed_B1LS=mask_B1LS),
            positions_BL=positions_BL,
            cross_mask=MaskSpec(allowed_B1LS=cross_mask_B1LS),
            cache=cache,
            first_query=first,
            branch_start=branch_start,
        )
        return self.logits(x_BLD[:, -1:] if last_only else x_BLD), cache

    def _embed(
        self,
        ids_BL: jax.Array,
        positions_BL: jax.Array,
        token_types_BL: jax.Array | None = None,
        *,
        decoder: bool = False,
        train: bool,
    ) -> jax.Array:
        model = self.config.model
        table_VD = self.decoder_embedding if decoder and model.separate_embeddings else self.embedding
        if decoder and model.has_encoder and (start := self.config.tokenizer.decoder_start_id):
            ids_BL = jnp.where(ids_BL == DECODER_START_ID, start, ids_BL)
        x_BLD = embeddings.scaled_embed(table_VD, ids_BL, model)
        if model.positions == "learned":
            # Padding may be behind the last position; `generate` refuses texts that are so long.
            x_BLD = x_BLD + heads.embed(self.positions, jnp.minimum(positions_BL, model.max_length - 1), model.dtype)
        if model.token_types:
            types_BL = jnp.zeros_like(ids_BL) if token_types_BL is None else token_types_BL
            # A matmul, because the gradient of a look-up would add every token into the same few rows sequentially.
            one_hot_BLC = jax.nn.one_hot(types_BL, model.token_types, dtype=model.dtype)
            x_BLD = x_BLD + one_hot_BLC @ self.token_types.astype(model.dtype)
        if model.embedding_norm:
            x_BLD = self.embedding_norm(x_BLD)
        return constrain(lay.dropout(self, x_BLD, model.dropout_rate, train=train), "batch", "length", "act_embed")

    def _drop_output(self, x_BLD: jax.Array, *, train: bool) -> jax.Array:
        """Dropout behind the final norm, as in T5. A post-norm stack has none here: its dropout is before the norm."""
        model = self.config.model
        return lay.dropout(self, x_BLD, 0.0 if model.norm_position == "post" else model.dropout_rate, train=train)


def _positions(ids_BL: jax.Array, positions_BL: jax.Array | None) -> jax.Array:
    """The positions; if they are None, counted from 0 along the row."""
    return jnp.broadcast_to(jnp.arange(ids_BL.shape[1])[None], ids_BL.shape) if positions_BL is None else positions_BL
