"""The one schema of a run: every field, its unit and its default, as frozen dataclasses.

A file in `configs/` defines ``get_config() -> ml_collections.ConfigDict``: it takes `default()` and sets what differs.
`config_file` reads it, `rules` says which values go together.
"""

import dataclasses
from typing import Literal

import ml_collections

Objective = Literal["span_corruption", "mlm", "mlm_nsp", "prefix_lm", "causal_lm", "ul2", "supervised"]
Metric = Literal["exact_match", "f1", "accuracy", "bleu", "chrf", "rouge1", "rouge2", "rougeL"]
Adaptation = Literal["architecture", "vocabulary", "depth"]
ARCHITECTURES: dict[str, tuple[str, ...]] = {  # which models can learn from an objective's rows
    "span_corruption": ("encoder_decoder", "decoder"),
    "mlm": ("encoder",),
    "mlm_nsp": ("encoder",),
    "prefix_lm": ("encoder_decoder", "decoder"),
    "causal_lm": ("encoder_decoder", "decoder"),
    "ul2": ("encoder_decoder", "decoder"),
    "supervised": ("encoder_decoder", "decoder"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    path: str = ""  # a SentencePiece model or a tokenizer.json; empty: train one on the data
    vocab_size: int = 32_100  # ids of text and sentinels together; the model pads its rows to `model.vocab_multiple`
    # <extra_id_0> has the highest id, and they count down (T5); 2, [MASK] and [CLS], of a tokenizer.json like BERT's
    num_sentinels: int = 100
    model_type: Literal["unigram", "bpe"] = "unigram"
    sample_characters: int = 20_000_000  # how much text a new tokenizer is trained on, drawn by document
    character_coverage: float = 0.9995  # characters beyond it are spelled in bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    # python_stdlib | tfds:NAME | text:GLOB | jsonl:GLOB | parquet:GLOB | hf:NAME, one or several; with the objective
    # supervised also tsv:GLOB and task:NAME
    source: tuple[str, ...] = ("python_stdlib",)
    rates: tuple[float, ...] = ()  # how often each source is drawn from; empty: in proportion to its rows an epoch
    split: str = "train"  # of TFDS and Hugging Face data sets
    text_field: str = "text"  # of TFDS, JSONL, Parquet and Hugging Face data sets
    # What one document is in text files: a file, a line, or a passage of about 16 KiB that ends with a line. auto: a
    # file if there are at least 100 of them, else a passage, so that a part of a few large files can be held out.
    text_documents: Literal["auto", "file", "line", "passage"] = "auto"
    directory: str = "~/.cache/t5like"  # where tokenizers and token stores are kept, for all runs
    heldout_fraction: float = 0.01  # of the documents (at least one), chosen by a hash of their text, never trained on
    num_workers: int = 0  # processes that tokenize; 0: one per core
    objective: tuple[Objective, ...] = ("span_corruption",)  # one or several, each on every source
    objective_rates: tuple[float, ...] = ()  # how often each objective is drawn; empty: all alike
    # Steps at which the rates change. rates and objective_rates then hold one list per phase, one behind another:
    # objective=span_corruption,prefix_lm objective_rates=1,0,0,1 change_steps=1000 turns from one to the other.
    change_steps: tuple[int, ...] = ()
    batch_size: int = 128  # rows per step, over all devices and microbatches
    inputs_length: int = 512  # tokens
    targets_length: int = 114  # tokens; a decoder-only model reads rows of inputs_length + targets_length
    noise_density: float = 0.15  # span corruption and MLM: share of the tokens that are masked
    mean_span_length: float = 3.0  # span corruption: tokens per masked span
    whole_words: bool = False  # MLM: all pieces of a word are masked together
    document_borders: Literal["concatenate", "segments"] = "concatenate"  # segments: no attention across documents
    # Supervised: how an example's fields become the text that is read and the text that is learned.
    inputs_template: str = "{inputs}"
    targets_template: str = "{targets}"
    messages_field: str = ""  # chat instead of templates: the field with a list of {"role": ..., "content": ...}
    packing: bool = True  # supervised: several examples in a row, which don't see each other; else one
    prefetch: int = 4  # steps made ahead in background threads


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    architecture: Literal["encoder_decoder", "decoder", "encoder"] = "encoder_decoder"
    num_layers: int = 8  # of the encoder and of the decoder each
    num_decoder_layers: int = 0  # 0: num_layers
    model_dim: int = 512
    num_heads: int = 6
    num_kv_heads: int = 0  # grouped-query attention; 0: num_heads
    head_dim: int = 64
    mlp_dim: int = 1024
    mlp: Literal["relu", "gelu", "gelu_exact", "gated_gelu", "gated_silu"] = "gated_gelu"  # gelu: tanh approximation
    positions: Literal["relative", "rotary", "learned"] = "relative"
    relative_buckets: int = 32
    relative_max_distance: int = 128  # tokens
    relative_bias: Literal["shared", "per_layer"] = "shared"  # one for all layers of a stack (T5), or one each (UMT5)
    rotary_base: float = 10_000.0
    # Rotary positions for texts longer than those that the base was trained on: linear divides all frequencies by
    # rotary_factor, llama3 the low ones, yarn by a ramp and scales attention; see `model.layers.rotary_frequencies`.
    rotary_scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    rotary_factor: float = 1.0  # how much longer texts may get
    rotary_original_length: int = 0  # llama3, yarn: tokens of the texts that the base was trained on
    rotary_low: float = 1.0  # llama3: full turns in the original length below which a frequency counts as low
    rotary_high: float = 4.0  # llama3: turns above which it stays
    rotary_slow: float = 1.0  # yarn: turns below which a frequency is divided
    rotary_fast: float = 32.0  # yarn: turns above which it stays
    rotary_attention: float = 0.0  # yarn: factor on queries and keys; 0: 0.1 ln(rotary_factor) + 1
    max_length: int = 1024  # rows of learned positions
    norm: Literal["rms", "layer"] = "rms"
    norm_position: Literal["pre", "post"] = "pre"
    norm_epsilon: float = 1e-6
    embedding_norm: bool = False  # a norm behind the sum of the embeddings, as in BERT
    biases: bool = False  # on every dense layer
    tied_embeddings: bool = False
    scale_attention: bool = False  # multiply q k by head_dim**-0.5; T5 does not, it folds that into the init
    qk_norm: bool = False  # a norm on each head's query and key (Qwen3)
    attention_window: int = 0  # decoder-only: how many tokens each sees, itself and those just before; 0: all
    # model_dim: logits are multiplied by model_dim**-0.5. auto: where embeddings are tied and init is t5, as in T5 1.0.
    logits_scale: Literal["auto", "none", "model_dim"] = "auto"
    # t5: scaled by fan-in (Mesh TensorFlow); gpt2: N(0, 0.02), smaller in deep stacks; bert: N(0, 0.02) everywhere
    init: Literal["t5", "gpt2", "bert"] = "t5"
    # Encoder-only: rows of the embeddings of a pair's first and second text. If there are any, there is also BERT's
    # pooler with the next-sentence classifier, whatever the objective: parameters follow from this section alone.
    token_types: int = 0
    pair_head: bool = True  # false: without that pooler and classifier, as in BertForMaskedLM
    head: Literal["plain", "mlm"] = "plain"  # mlm, encoder-only: a dense layer and a norm first, a bias on the logits
    dropout_rate: float = 0.0
    vocab_multiple: int = 128  # embedding rows are padded up to it; padding rows never win a softmax
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the computation; auto: bfloat16 on accelerators
    layers: Literal["auto", "scan", "unroll"] = "auto"  # auto: scan on accelerators, unroll on a CPU
    # cpu: backward passes written for XLA:CPU, see model/cpu.py; tpu: attention as one kernel, see model/tpu.py
    kernels: Literal["auto", "plain", "cpu", "tpu"] = "auto"
    # What the backward pass recomputes: nothing, all but matmuls, all but queries and keys, all.
    remat: Literal["none", "dots", "qk", "full"] = "none"

    @property
    def longest_text(self) -> int:
        """Tokens that there are positions for: any number, unless positions are learned."""
        return self.max_length if self.positions == "learned" else 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    name: Literal["adafactor", "adamw", "adamw_rms", "lion", "muon"] = "adafactor"
    learning_rate: float = 0.01  # at its highest
    schedule: Literal["constant", "rsqrt", "cosine", "linear", "wsd"] = "rsqrt"
    warmup_steps: int = 10_000  # linear from 0; rsqrt is flat during it instead, as in T5
    decay_steps: int = 0  # wsd: steps of the decay at the end
    final_fraction: float = 0.0  # of learning_rate, at the end of cosine, linear and wsd
    b1: float = 0.9  # of Adam and Lion; Muon's momentum is 0.95
    b2: float = 0.999  # Lion's authors use 0.99
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    no_decay: tuple[str, ...] = (".*(scale|bias).*",)  # parameter names, as regular expressions
    frozen: tuple[str, ...] = ()  # parameter names, as regular expressions, that keep their first value
    clip_norm: float = 1.0  # global gradient norm; 0: no clipping
    ema_decay: float = 0.0  # moving average of the parameters, kept beside them and evaluated; 0: none


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    num_steps: int = 524_288
    microbatches: int = 1  # a step's rows are worked through in that many parts; their gradients are summed
    z_loss: float = 1e-4  # weight of log(Z)^2
    label_smoothing: float = 0.0
    loss_chunk: int = 0  # target tokens per chunk of the loss; 0: all at once
    log_every: int = 10  # steps
    eval_every: int = 1_000  # steps; it is also done before the first step and after the last
    eval_batches: int = 16  # batches of held-out text per evaluation
    checkpoint_every: int = 1_000  # steps
    keep_checkpoints: int = 3  # the newest ones
    keep_every: int = 0  # steps whose checkpoints are kept for good; 0: none
    max_bad_steps: int = 3  # updates with a non-finite gradient that are skipped in a row before the run gives up
    wait_seconds: int = 600  # that a process waits for the others, where there are several, before the run ends (76)
    profile_step: int = 0  # writes a profile of the 3 steps from this one; 0: none
    # XLA's, as NAME=VALUE, of the train step, after those of compiler_options.py; none: without those.
    compiler_options: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    data: int = -1  # devices per axis; at most one axis is -1: what is left
    fsdp: int = 1
    tensor: int = 1
    # Splits a row's length, for inputs too long for one device. It must divide data.inputs_length (decoder-only: the
    # row); targets that it does not divide stay whole.
    context: int = 1
    slices: int = 1  # parts of the machine that a slower network joins (TPU slices); data is split over them first


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig:
    # A run directory whose weights this run begins with, at step 0. Its tokenizer comes with them, unless adapt has
    # vocabulary. A relative path is made absolute.
    checkpoint: str = ""
    step: int = -1  # of its checkpoints; -1: the latest; an import's weights are those of step 0
    new: tuple[str, ...] = ()  # parameter names, as regular expressions, that begin at random all the same
    # What may differ from the model that the weights are of; anything else has to fit. RUN/init_from.txt says for each
    # parameter how it began. architecture: an encoder-decoder from a decoder-only model, both stacks from its layers,
    # cross-attention at random. vocabulary: another tokenizer; rows go by piece, those of new pieces begin at the mean.
    # depth: more layers, the old stack repeated.
    adapt: tuple[Adaptation, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    # Of the texts that are generated for held-out supervised examples; see `scores`. Empty: held-out loss alone.
    metrics: tuple[Metric, ...] = ()
    choices: tuple[str, ...] = ()  # all possible answers: the likeliest is taken, nothing is generated; empty: generate
    max_new_tokens: int = 0  # generated per example; 0: data.targets_length
    max_examples: int = 256  # held-out examples that are scored, the first ones


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    seed: int = 0
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    init_from: InitConfig = InitConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding: the vocabulary padded up to `model.vocab_multiple`."""
        return -(-self.tokenizer.vocab_size // self.model.vocab_multiple) * self.model.vocab_multiple

    @property
    def row_length(self) -> int:
        """Tokens of a decoder-only row."""
        return self.data.inputs_length + self.data.targets_length


def default() -> ml_collections.ConfigDict:
    """A config file's starting point: every field at its default. Unknown names are refused when they are set."""
    # Types are checked by `resolve`, which takes one string for a list of them; ConfigDict would not.
    return ml_collections.ConfigDict(dataclasses.asdict(Config()), type_safe=False).lock()
