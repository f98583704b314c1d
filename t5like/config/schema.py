"""The one schema of a run: every field, its unit, range and default, as frozen dataclasses.

A field's comment, above it or at the end of its line, is its help: `t5like train --help` shows it (`config_help`).
A file in `configs/` defines ``get_config() -> ml_collections.ConfigDict``: it takes `default()` and sets what differs.
`config_file` reads it, `rules` says which values go together.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Annotated, Any, Literal

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
LANGUAGES = (  # ISO 639-1's codes
    "aa ab ae af ak am an ar as av ay az ba be bg bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en "
    "eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja "
    "jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb "
    "nd ne ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq "
    "sr ss st su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu"
)


@dataclasses.dataclass(frozen=True)
class Range:
    """The values that a field of numbers may have, each end included (`least`, `most`) or not (`above`, `below`)."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """The rule, as in ``at least 1 and at most 1,000``."""
        number = lambda end: f"{end:,}" if isinstance(end, int) else f"{end:g}"
        ends = {"at least": self.least, "more than": self.above, "at most": self.most, "less than": self.below}
        return " and ".join(f"{words} {number(end)}" for words, end in ends.items() if end is not None)


LARGEST = 2**31 - 1  # of what is counted in 32 bits: steps, positions
Positive = Annotated[int, Range(1, LARGEST)]
NotNegative = Annotated[int, Range(0, LARGEST)]
Share = Annotated[float, Range(least=0, below=1)]
Rates = Annotated[tuple[float, ...], Range(0, 1e9)]
Axis = Annotated[int, Range(-1, 2**20)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    path: str = ""  # a SentencePiece model or a tokenizer.json; empty: train one on the data
    # ids of text and sentinels together; the model pads its rows to `model.vocab_multiple`
    vocab_size: Annotated[int, Range(1, 2**24)] = 32_100
    # <extra_id_0> has the highest id, and they count down (T5); 2, [MASK] and [CLS], of a tokenizer.json like BERT's
    num_sentinels: Annotated[int, Range(0, 2**16)] = 100
    model_type: Literal["unigram", "bpe"] = "unigram"  # SentencePiece's, of a new tokenizer
    # how much text a new tokenizer is trained on, drawn by document
    sample_characters: Annotated[int, Range(1, 2**40)] = 20_000_000
    character_coverage: Annotated[float, Range(above=0, most=1)] = 0.9995  # characters beyond it are spelled in bytes
    # Ids that end a generated text besides the tokenizer's own end-of-sequence id, as Llama 3 and its kin have them. An
    # import sets it; nothing is trained on them.
    extra_eos_ids: Annotated[tuple[int, ...], Range(0, 2**24)] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    # python_stdlib | tfds:NAME | text:GLOB | jsonl:GLOB | parquet:GLOB | csv:GLOB | tsv:GLOB | hf:NAME, one or several;
    # with the objective supervised also task:NAME. Rows are shuffled, whatever their order in the files.
    source: tuple[str, ...] = ("python_stdlib",)
    # Of each source, for metrics and tables; empty: what tells them apart, see `data.source_names`.
    source_names: tuple[str, ...] = ()
    rates: Rates = ()  # how often each source is drawn from; empty: in proportion to its rows an epoch
    split: str = "train"  # of TFDS and Hugging Face data sets
    text_field: str = "text"  # of TFDS, JSONL, Parquet, CSV, TSV and Hugging Face data sets
    # What one document is in text files: a file, a line, or a passage of about 16 KiB that ends with a line. auto: a
    # file if there are at least 100 of them, else a passage, so that a part of a few large files can be held out.
    text_documents: Literal["auto", "file", "line", "passage"] = "auto"
    cache_directory: str = "~/.cache/t5like"  # where tokenizers and token stores are kept, for all runs
    # of the documents (at least one), chosen by a hash of their text, never trained on
    heldout_fraction: Annotated[float, Range(above=0, below=1)] = 0.01
    num_workers: Annotated[int, Range(0, 1024)] = 0  # processes that tokenize; 0: one per core
    objective: tuple[Objective, ...] = ("span_corruption",)  # one or several, each on every source
    objective_rates: Rates = ()  # how often each objective is drawn; empty: all alike
    # Steps at which the rates change. rates and objective_rates then hold one list per phase, one behind another:
    # objective=span_corruption,prefix_lm objective_rates=1,0,0,1 phase_boundaries=1000 turns from one to the other.
    phase_boundaries: Annotated[tuple[int, ...], Range(1, LARGEST)] = ()
    batch_size: Annotated[int, Range(1, 2**24)] = 128  # rows per step, over all devices and microbatches
    inputs_length: Annotated[int, Range(0, 2**20)] = 512  # tokens that a row reads
    # tokens; a decoder-only model reads rows of inputs_length + targets_length
    targets_length: Annotated[int, Range(1, 2**20)] = 114
    # span corruption and MLM: share of the tokens that are masked
    noise_density: Annotated[float, Range(above=0, below=1)] = 0.15
    mean_span_length: Annotated[float, Range(1, 2**20)] = 3.0  # span corruption: tokens per masked span
    whole_word_masking: bool = False  # MLM: all pieces of a word are masked together
    # Whether a token attends to the other documents of its row, as in T5. A row is a window of the concatenated
    # documents.
    cross_document_attention: bool = True
    # Supervised: how an example's fields become the text that is read and the text that is learned.
    inputs_template: str = "{inputs}"
    targets_template: str = "{targets}"  # the text that is learned
    messages_field: str = ""  # chat instead of templates: the field with a list of {"role": ..., "content": ...}
    packing: bool = True  # supervised: several examples in a row, which don't see each other; else one
    prefetch: Annotated[int, Range(1, 1000)] = 4  # steps made ahead in background threads


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotaryConfig:
    base: Annotated[float, Range(1, 1e12)] = 10_000.0  # rope_theta; the longest wavelength is about 2 pi x base tokens
    # Extension to texts longer than those of the original training. linear divides all frequencies by factor. llama3
    # divides the low ones. yarn blends both by a ramp and scales attention. See `model.positions.rotary_frequencies`.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    architecture: Literal["encoder_decoder", "decoder", "encoder"] = "encoder_decoder"  # T5; Llama, GPT; BERT
    num_layers: Annotated[int, Range(1, 1000)] = 8  # of the encoder and of the decoder each
    num_decoder_layers: Annotated[int, Range(0, 1000)] = 0  # 0: num_layers
    model_dim: Annotated[int, Range(1, 2**20)] = 512  # numbers of a token's hidden state
    num_heads: Annotated[int, Range(1, 2**14)] = 6  # of each attention
    num_kv_heads: Annotated[int, Range(0, 2**14)] = 0  # grouped-query attention; 0: num_heads
    head_dim: Annotated[int, Range(1, 2**14)] = 64  # numbers of a head's queries, keys and values each
    mlp_dim: Annotated[int, Range(1, 2**24)] = 1024  # numbers between an MLP's two products
    mlp: Literal["relu", "gelu", "gelu_exact", "gated_gelu", "gated_silu"] = "gated_gelu"  # gelu: tanh approximation
    positions: Literal["relative", "rotary", "learned"] = "relative"  # T5; Llama; GPT-2 and BERT
    relative_buckets: Annotated[int, Range(4, 2**16)] = 32  # distances that a bias tells apart
    relative_max_distance: Annotated[int, Range(1, LARGEST)] = 128  # tokens; larger distances share a bucket
    relative_bias: Literal["shared", "per_layer"] = "shared"  # one for all layers of a stack (T5), or one each (UMT5)
    rotary: RotaryConfig = RotaryConfig()  # rotary position embeddings, for positions=rotary
    max_length: Annotated[int, Range(1, 2**24)] = 1024  # rows of learned positions
    norm: Literal["rms", "layer"] = "rms"  # T5 and Llama; GPT-2 and BERT
    norm_position: Literal["pre", "post"] = "pre"  # of each attention and MLP; post: behind them, as in BERT
    norm_epsilon: Annotated[float, Range(1e-30, 1)] = 1e-6  # added to the mean square
    embedding_norm: bool = False  # a norm behind the sum of the embeddings, as in BERT
    biases: bool = False  # on every dense layer
    tied_embeddings: bool = False  # the output head is the embedding
    scale_attention: bool = False  # multiply q k by head_dim**-0.5; T5 does not, it folds that into the init
    qk_norm: bool = False  # a norm on each head's query and key (Qwen3)
    attention_window: NotNegative = 0  # decoder-only: how many tokens each sees, itself and those just before; 0: all
    # model_dim: logits are multiplied by model_dim**-0.5. auto: where embeddings are tied and init is t5, as in T5 1.0.
    logits_scale: Literal["auto", "none", "model_dim"] = "auto"
    # t5: scaled by fan-in (Mesh TensorFlow); gpt2: N(0, 0.02), smaller in deep stacks; bert: N(0, 0.02) everywhere
    init: Literal["t5", "gpt2", "bert"] = "t5"
    # Encoder-only: rows of the embeddings of a pair's first and second text. If there are any, there is also BERT's
    # pooler with the next-sentence classifier, whatever the objective: parameters follow from this section alone.
    token_types: Annotated[int, Range(0, 2**16)] = 0
    next_sentence_head: bool = True  # false: without that pooler and classifier, as in BertForMaskedLM
    head: Literal["plain", "mlm"] = "plain"  # mlm, encoder-only: a dense layer and a norm first, a bias on the logits
    dropout_rate: Share = 0.0  # share of values that are set to 0 in training
    # embedding rows are padded up to it; padding rows never win a softmax
    vocab_multiple: Annotated[int, Range(1, 2**24)] = 128
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the computation; auto: bfloat16 on accelerators
    layers: Literal["auto", "scan", "unroll"] = "auto"  # auto: scan on accelerators, unroll on a CPU
    # cpu: backward passes written for XLA:CPU, see model/cpu.py; tpu: attention as one kernel, see model/tpu.py
    kernels: Literal["auto", "plain", "cpu", "tpu"] = "auto"
    # What the backward pass recomputes: nothing, all but matmuls, all but queries and keys, all.
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
    def decoder_layers(self) -> int:
        """Layers of the decoder; only an encoder-decoder can have another number than `num_layers`."""
        return (self.num_decoder_layers if self.has_encoder else 0) or self.num_layers

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values: fewer than `num_heads` in grouped-query attention."""
        return self.num_kv_heads or self.num_heads

    @property
    def longest_text(self) -> int:
        """Tokens that there are positions for: any number, unless positions are learned."""
        return self.max_length if self.positions == "learned" else 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    # adamw_rms: steps in proportion to the size of each parameter, as in nanoT5
    name: Literal["adafactor", "adamw", "adamw_rms", "lion", "muon"] = "adafactor"
    learning_rate: Annotated[float, Range(1e-30, 1e38)] = 0.01  # at its highest
    # Of the learning rate behind the warm-up. wsd: constant, then decay_steps of linear decay.
    schedule: Literal["constant", "rsqrt", "cosine", "linear", "wsd"] = "rsqrt"
    warmup_steps: NotNegative = 10_000  # linear from 0; rsqrt is flat during it instead, as in T5
    decay_steps: NotNegative = 0  # wsd: steps of the decay at the end
    final_fraction: Share = 0.0  # of learning_rate, at the end of cosine, linear and wsd
    b1: Share = 0.9  # of Adam and Lion; Muon's momentum is 0.95
    b2: Share = 0.999  # of Adam and Lion; Lion's authors use 0.99
    epsilon: Annotated[float, Range(1e-30, 1)] = 1e-8  # of Adam
    weight_decay: Annotated[float, Range(0, 1e6)] = 0.0  # an update takes learning rate x this x parameter away
    no_decay: tuple[str, ...] = (".*(scale|bias).*",)  # parameter names, as regular expressions
    frozen: tuple[str, ...] = ()  # parameter names, as regular expressions, that keep their first value
    clip_norm: Annotated[float, Range(0, 1e30)] = 1.0  # global gradient norm; 0: no clipping
    ema_decay: Share = 0.0  # moving average of the parameters, kept beside them and evaluated; 0: none


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    num_steps: Positive = 524_288  # updates of the whole run
    # a step's rows are worked through in that many parts; their gradients are summed
    microbatches: Annotated[int, Range(1, 2**20)] = 1
    z_loss: Annotated[float, Range(0, 1e6)] = 1e-4  # weight of log(Z)^2
    label_smoothing: Share = 0.0  # probability of a target that goes to the other tokens, as in T5X
    loss_chunk: NotNegative = 0  # target tokens per chunk of the loss; 0: all at once
    log_every: Positive = 10  # steps
    eval_every: Positive = 1_000  # steps; it is also done before the first step and after the last
    # evaluations before that, after 1/2, 1/4, 1/8, ... of eval_every: of the loss alone
    early_evals: Annotated[int, Range(0, 31)] = 4
    eval_batches: Positive = 16  # batches of held-out text per evaluation
    checkpoint_every: Positive = 1_000  # steps
    keep_checkpoints: Positive = 3  # the newest ones
    keep_every: NotNegative = 0  # steps whose checkpoints are kept for good; 0: none
    # An update with a non-finite gradient is skipped. The run ends (5) after so many skipped updates in a row.
    max_skipped_updates: Positive = 3
    # With several processes: the longest time that a process waits for the others before the run ends (76).
    process_timeout_seconds: Annotated[int, Range(1, 604_800)] = 600
    profile_step: NotNegative = 0  # writes a profile of the 3 steps from this one; 0: none
    # XLA's, as NAME=VALUE, of the train step, after those of compiler_options.py; none: without those.
    compiler_options: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    # Devices per axis; at most one axis is -1: what is left. Those of data have other rows, and all parameters.
    data: Axis = -1
    fsdp: Axis = 1  # each has other rows, and a part of every parameter
    tensor: Axis = 1  # each has a part of the heads, MLP dim and vocabulary
    # Splits a row's length, for inputs too long for one device. It must divide data.inputs_length (decoder-only: the
    # row); targets that it does not divide stay whole.
    context: Axis = 1
    # parts of the machine that a slower network joins (TPU slices); data is split over them first
    slices: Annotated[int, Range(1, 2**20)] = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig:
    # A run directory whose weights this run begins with, at step 0. Its tokenizer comes with them, unless adapt has
    # vocabulary. A relative path is made absolute.
    checkpoint: str = ""
    # of its checkpoints; -1: the latest; an import's weights are those of step 0
    step: Annotated[int, Range(-1, LARGEST)] = -1
    reinitialize: tuple[str, ...] = ()  # parameter names, as regular expressions, that begin at random all the same
    # What may differ from the model that the weights are of; anything else has to fit. RUN/init_from.txt says for each
    # parameter how it began. architecture: an encoder-decoder from a decoder-only model, both stacks from its layers,
    # cross-attention at random. vocabulary: another tokenizer; rows go by piece, those of new pieces begin at the mean.
    # depth: more layers, the old stack repeated.
    adapt: tuple[Adaptation, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    # Of the texts that are generated for held-out supervised examples; see `scores`. Empty: held-out loss alone.
    metrics: tuple[Metric, ...] = ()
    language: str = "auto"  # of the answers, an ISO 639-1 code: what a word is; auto: by their letters; see `scores`
    answer_choices: tuple[
        str, ...
    ] = ()  # all possible answers: the likeliest is taken, nothing is generated; empty: generate
    max_new_tokens: Annotated[int, Range(0, 2**20)] = 0  # generated per example; 0: data.targets_length
    max_examples: Positive = 256  # held-out examples that are scored, the first ones


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0  # of everything random: parameters, order of rows, masks, dropout
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


def sections(cls: type = Config, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Prefix and class of each section: ``("", Config)``, ..., ``("model.rotary.", RotaryConfig)``."""
    yield prefix, cls
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.default):
            yield from sections(type(field.default), f"{prefix}{field.name}.")


def flatten(config: Config) -> dict[str, Any]:
    """All values by dotted name, such as ``model.rotary.base``."""
    return {
        f"{prefix}{field.name}": get(config, f"{prefix}{field.name}")
        for prefix, cls in sections()
        for field in dataclasses.fields(cls)
        if not dataclasses.is_dataclass(field.default)
    }


def get(config: Config, name: str) -> Any:
    """The value of a field or section by dotted name."""
    return functools.reduce(getattr, name.split("."), config)


def default() -> ml_collections.ConfigDict:
    """A config file's starting point: every field at its default. Unknown names are refused when they are set."""
    # Types are checked by `resolve`, which takes one string for a list of them; ConfigDict would not.
    return ml_collections.ConfigDict(dataclasses.asdict(Config()), type_safe=False).lock()
