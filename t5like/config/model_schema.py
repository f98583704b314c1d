"""The fields of the section `model`: architecture and sizes. Part of `schema`, which says how fields are written."""

import dataclasses
import math
from typing import Annotated, Literal

from t5like.config.field_types import LARGEST, NotNegative, Range, Share

DECODER_SIZES = ("model_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim")  # fields of decoder_...
MlpKind = Literal["relu", "gelu", "gelu_exact", "gated_gelu", "gated_gelu_exact", "gated_silu"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotaryConfig:
    # base of the frequencies (rope_theta); the longest wavelength is about 2 pi x base tokens
    base: Annotated[float, Range(1, 1e12)] = 10_000.0
    # Extension to texts longer than those of the original training. linear divides all frequencies by factor. llama3
    # divides the low ones. yarn blends both by a ramp and scales attention. See `model.rotary.rotary_frequencies`.
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: Annotated[float, Range(1e-6, 1e6)] = 1.0  # length of the longer texts / original_length
    original_length: NotNegative = 0  # llama3, yarn: tokens of a text in the original training
    # llama3: frequencies with fewer full turns than this in the original length are divided by factor
    low_frequency_factor: Annotated[float, Range(1e-6, 1e6)] = 1.0
    # llama3: frequencies with more full turns than this in the original length stay unchanged
    high_frequency_factor: Annotated[float, Range(1e-6, 1e9)] = 4.0
    # yarn: frequencies with fewer full turns than this in the original length are divided by factor
    beta_slow: Annotated[float, Range(1e-6, 1e6)] = 1.0
    # yarn: frequencies with more full turns than this in the original length stay unchanged
    beta_fast: Annotated[float, Range(1e-6, 1e9)] = 32.0
    # yarn: multiplies queries and keys; 0: 0.1 ln(factor) + 1
    attention_factor: Annotated[float, Range(0, 1e6)] = 0.0
    # base of the local layers of model.layer_pattern, whose frequencies are then not scaled (Gemma 3); 0: base
    local_base: Annotated[float, Range(0, 1e12)] = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    architecture: Literal["encoder_decoder", "decoder", "encoder"] = "encoder_decoder"  # as in T5; Llama and GPT; BERT
    num_layers: Annotated[int, Range(1, 1000)] = 8  # layers of each stack
    num_decoder_layers: Annotated[int, Range(0, 1000)] = 0  # layers of the decoder of an encoder-decoder; 0: num_layers
    model_dim: Annotated[int, Range(1, 2**20)] = 512  # dimension of the residual stream (d_model)
    num_heads: Annotated[int, Range(1, 2**14)] = 6  # query heads of each attention
    num_kv_heads: Annotated[int, Range(0, 2**14)] = 0  # key and value heads, for grouped-query attention; 0: num_heads
    head_dim: Annotated[int, Range(1, 2**14)] = 64  # dimension of a head
    mlp_dim: Annotated[int, Range(1, 2**24)] = 1024  # hidden dimension of the MLP (d_ff)
    # Sizes of an encoder-decoder's decoder, where they differ from the encoder's (T5Gemma 9B-2B); 0: as in the encoder.
    decoder_model_dim: Annotated[int, Range(0, 2**20)] = 0  # needs separate_embeddings if it differs
    decoder_num_heads: Annotated[int, Range(0, 2**14)] = 0  # query heads of the decoder; 0: as in the encoder
    decoder_num_kv_heads: Annotated[int, Range(0, 2**14)] = 0  # the decoder's heads of keys and values; 0: num_kv_heads
    decoder_head_dim: Annotated[int, Range(0, 2**14)] = 0  # dimension of the decoder's heads; 0: head_dim
    decoder_mlp_dim: Annotated[int, Range(0, 2**24)] = 0  # hidden dimension of the decoder's MLP; 0: mlp_dim
    # activation of the MLP; gelu, gated_gelu: the tanh approximation; gated_gelu_exact as in ModernBERT
    mlp: MlpKind = "gated_gelu"
    positions: Literal["relative", "rotary", "learned"] = "relative"  # as in T5; Llama; GPT-2 and BERT
    relative_buckets: Annotated[int, Range(4, 2**16)] = 32  # relative positions: number of distance buckets
    # relative positions: from this distance on, in tokens, all share the last bucket
    relative_max_distance: Annotated[int, Range(1, LARGEST)] = 128
    # one relative position bias for all layers of a stack (T5), or one per layer (UMT5)
    relative_bias: Literal["shared", "per_layer"] = "shared"
    rotary: RotaryConfig = RotaryConfig()  # rotary position embeddings, for positions=rotary
    max_length: Annotated[int, Range(1, 2**24)] = 1024  # learned positions: number of positions
    norm: Literal["rms", "layer"] = "rms"  # RMSNorm, as in T5 and Llama; LayerNorm, as in GPT-2 and BERT
    # pre: norm the input of each attention and MLP. post: norm after the residual sum, as in BERT. sandwich: norm the
    # input and the output of each, as in Gemma 2.
    norm_position: Literal["pre", "post", "sandwich"] = "pre"
    norm_offset: bool = False  # multiply by 1 + scale instead of scale, which then begins at 0, as in Gemma
    norm_bias: bool = True  # a bias in each LayerNorm; false, as in ModernBERT. RMSNorm has none.
    norm_epsilon: Annotated[float, Range(1e-30, 1)] = 1e-6  # added to the mean square (rms) or variance (layer)
    embedding_norm: bool = False  # norm after the sum of the embeddings, as in BERT
    # whether the first layer has a norm before its attention; ModernBERT has embedding_norm in its place
    first_attention_norm: bool = True
    biases: bool = False  # biases on all dense layers
    # factor on token embeddings; sqrt_dim: square root of model_dim, rounded to dtype, as in Gemma
    embedding_scale: Literal["none", "sqrt_dim"] = "none"
    # encoder-decoder: the decoder has an embedding of its own, to which tied_embeddings then refers, as in T5Gemma
    separate_embeddings: bool = False
    tied_embeddings: bool = False  # use the token embedding as the output head
    # multiply attention logits by attention_scale_dim**-0.5; T5 has this factor in its initialization instead
    scale_attention: bool = False
    attention_scale_dim: NotNegative = 0  # query_pre_attn_scalar of Gemma; 0: head_dim
    # attention logits x, before a relative bias is added, become c tanh(x / c) with this c (Gemma 2: 50); 0: unchanged
    attention_softcap: Annotated[float, Range(0, 1e6)] = 0.0
    logits_softcap: Annotated[float, Range(0, 1e6)] = 0.0  # the same for the logits of tokens (Gemma 2: 30)
    # encoder-decoder: no cross-attention layers; self-attention of the decoder also reads the encoder's output, with
    # one softmax and the same projections, as in T5Gemma 2
    merged_attention: bool = False
    qk_norm: bool = False  # norm on the query and key of each head, as in Qwen3
    # sliding window, in tokens, the current token included: earlier tokens, in an encoder also later ones; 0: no window
    attention_window: NotNegative = 0
    # the window of an encoder-decoder's encoder, where it differs (T5Gemma); 0: attention_window
    encoder_window: NotNegative = 0
    # the same for later tokens, the current one included (T5Gemma 2); 0: as for earlier tokens
    encoder_window_ahead: NotNegative = 0
    # Types of the layers of each stack, repeated from the first layer, such as local,local,local,local,local,global.
    # Only local layers have attention_window. Empty: it applies to all layers.
    layer_pattern: tuple[Literal["local", "global"], ...] = ()
    # activations of the layers' MLPs, repeated from the first layer, all gated or none; empty: mlp in all layers
    mlp_pattern: tuple[MlpKind, ...] = ()
    # model_dim: multiply logits by model_dim**-0.5. auto: the same if embeddings are tied and init=t5, as in T5 1.0;
    # else none.
    logits_scale: Literal["auto", "none", "model_dim"] = "auto"
    # Initialization. t5: scaled by fan-in (Mesh TensorFlow). gpt2: N(0, 0.02), smaller in deep stacks. bert: N(0, 0.02)
    # everywhere.
    init: Literal["t5", "gpt2", "bert"] = "t5"
    # Initial values of attention. random: as init says. local, for short runs of encoder-decoders: relative biases, if
    # there are any, prefer tokens near the query, and queries and keys of cross-attention prefer inputs that are equal.
    attention_init: Literal["random", "local"] = "random"
    # Encoder-only: number of token type embeddings (type_vocab_size), for the first and second text of a pair; 0: none.
    # If there are any, the model has BERT's pooler and next-sentence classifier, for any objective.
    token_types: Annotated[int, Range(0, 2**16)] = 0
    # encoder-only with token types: pooler and next-sentence classifier; false: without, as in BertForMaskedLM
    next_sentence_head: bool = True
    # mlm, encoder-only: a dense layer and a norm before the output projection, a bias on the logits
    head: Literal["plain", "mlm"] = "plain"
    # classification and regression: the head reads the first token ([CLS]), as in BERT, or the mean over the text
    pooling: Literal["first", "mean"] = "first"
    # a scalar for each position: PPO's values, or the score of a reward model; set by the rl section where it needs one
    scalar_head: bool = False
    dropout_rate: Share = 0.0  # share of values that dropout sets to 0 in training
    # the rows of the embedding are padded to a multiple of this; padding rows have probability 0
    vocab_multiple: Annotated[int, Range(1, 2**24)] = 128
    # dtype of the computation; auto: bfloat16 on accelerators, float32 on a CPU
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # how layers are compiled; auto: scan on accelerators, unroll on a CPU
    layers: Literal["auto", "scan", "unroll"] = "auto"
    # cpu: backward passes written for XLA:CPU, see model/kernels/cpu.py; tpu, gpu: fused attention, see
    # model/kernels/tpu_attention.py and gpu_attention.py; auto: by the device
    kernels: Literal["auto", "plain", "cpu", "tpu", "gpu"] = "auto"
    # What the backward pass recomputes. none: nothing. dots: all but matmuls. qk: all but queries and keys. full: all.
    remat: Literal["none", "dots", "qk", "full"] = "none"

    @property
    def has_encoder(self) -> bool:
        """Whether there is an encoder: not in a decoder-only model."""
        return self.architecture != "decoder"

    @property
    def has_decoder(self) -> bool:
        """Whether there is a decoder: not in an encoder-only model."""
        return self.architecture != "encoder"

    @property
    def has_next_sentence_head(self) -> bool:
        """Whether there is a head for sentence pairs: only in an encoder with token types."""
        return self.architecture == "encoder" and self.token_types > 0 and self.next_sentence_head

    @property
    def decoder_layers(self) -> int:
        """Layers of the decoder; only an encoder-decoder can have another number than `num_layers`."""
        return (self.num_decoder_layers if self.has_encoder else 0) or self.num_layers

    @property
    def in_decoder(self) -> "ModelConfig":
        """The model with the sizes of the decoder's layers, which only an encoder-decoder can have."""
        sizes = {name: getattr(self, f"decoder_{name}") for name in DECODER_SIZES}
        changes = {name: size for name, size in sizes.items() if size}
        return dataclasses.replace(self, **changes) if changes and self.architecture == "encoder_decoder" else self

    def window(self, *, causal: bool) -> tuple[int, int]:
        """Self-attention's limits on earlier and on later tokens, as in `masks.window_mask`; 0: no limit."""
        if causal or not self.attention_window:
            return self.attention_window, 0
        window = self.encoder_window or self.attention_window
        return window, self.encoder_window_ahead or window

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values: fewer than `num_heads` in grouped-query attention."""
        return self.num_kv_heads or self.num_heads

    @property
    def scales_logits(self) -> bool:
        """Whether logits are multiplied by model_dim**-0.5, as in T5 with one table for embeddings and head."""
        if self.logits_scale == "auto":
            return self.tied_embeddings and self.init == "t5" and self.embedding_scale == "none"
        return self.logits_scale == "model_dim"

    @property
    def pattern_length(self) -> int:
        """Layers after which `layer_pattern` and `mlp_pattern` both repeat; 1: all layers are alike."""
        return math.lcm(max(len(self.layer_pattern), 1), max(len(self.mlp_pattern), 1))

    @property
    def longest_text(self) -> int:
        """Maximum number of tokens of a text: the number of learned positions, otherwise unlimited."""
        return self.max_length if self.positions == "learned" else 2**31 - 1
