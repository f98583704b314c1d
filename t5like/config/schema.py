"""All config fields of a run, with units, ranges and defaults, as frozen dataclasses.

A field's comment, above it or at the end of its line, is its help text: `t5like train --help` prints it
(`config.field_help`). A file in `configs/` defines ``get_config() -> ml_collections.ConfigDict``, which changes fields
of `default()`. `config.loader` reads such a file, and `config.checks` refuses values that can't be combined.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

import ml_collections

from t5like.config.distill_schema import DistillConfig
from t5like.config.field_types import LARGEST, Axis, NotNegative, Positive, Range, Rates, Share
from t5like.config.lora_schema import LoRAConfig
from t5like.config.model_schema import ModelConfig
from t5like.config.rl_schema import RLConfig

LabelObjective = Literal["classification", "regression", "token_classification"]
Objective = Literal["span_corruption", "mlm", "mlm_nsp", "prefix_lm", "causal_lm", "ul2", "supervised", LabelObjective]
Metric = Literal["exact_match", "f1", "accuracy", "bleu", "chrf", "rouge1", "rouge2", "rougeL"]
LabelMetric = Literal["accuracy", "macro_f1", "matthews", "pearson", "spearman", "entity_f1"]
AnyMetric = Literal[Metric, LabelMetric]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
Adaptation = Literal["architecture", "vocabulary", "depth"]
ARCHITECTURES: dict[str, tuple[str, ...]] = {  # the architectures that each objective supports
    "span_corruption": ("encoder_decoder", "decoder"),
    "mlm": ("encoder",),
    "mlm_nsp": ("encoder",),
    "prefix_lm": ("encoder_decoder", "decoder"),
    "causal_lm": ("encoder_decoder", "decoder"),
    "ul2": ("encoder_decoder", "decoder"),
    "supervised": ("encoder_decoder", "decoder"),
    "classification": ("encoder",),
    "regression": ("encoder",),
    "token_classification": ("encoder",),
}
LANGUAGES = (  # codes of ISO 639-1
    "aa ab ae af ak am an ar as av ay az ba be bg bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en "
    "eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja "
    "jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb "
    "nd ne ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq "
    "sr ss st su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    path: str = ""  # a SentencePiece model or a tokenizer.json; empty: train a tokenizer on the data
    # number of ids, sentinels included; the model pads its embedding to a multiple of model.vocab_multiple
    vocab_size: Annotated[int, Range(1, 2**24)] = 32_100
    # Number of <extra_id_N> tokens. <extra_id_0> has the highest id, as in T5. For a tokenizer.json like that of BERT:
    # 2, [MASK] and [CLS].
    num_sentinels: Annotated[int, Range(0, 2**16)] = 100
    model_type: Literal["unigram", "bpe"] = "unigram"  # SentencePiece model type of a new tokenizer
    # characters of the training text of a new tokenizer, sampled by document
    sample_characters: Annotated[int, Range(1, 2**40)] = 20_000_000
    # share of the characters that get a token of their own; the others are encoded as bytes
    character_coverage: Annotated[float, Range(above=0, most=1)] = 0.9995
    # ids that end a generated text, in addition to the tokenizer's end-of-sequence id, as in Llama 3; set by an import,
    # unused in training
    extra_eos_ids: Annotated[tuple[int, ...], Range(0, 2**24)] = ()
    # the id that the decoder of an encoder-decoder reads in place of 0, with which its rows begin (T5Gemma: 2); set by
    # an import
    decoder_start_id: Annotated[int, Range(0, 2**24)] = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    # One or several of python_stdlib, tfds:NAME, text:GLOB, jsonl:GLOB, parquet:GLOB, csv:GLOB, tsv:GLOB, hf:NAME; for
    # the objective supervised also task:NAME. Rows are shuffled, so the order of the files does not matter.
    source: tuple[str, ...] = ("python_stdlib",)
    # names of the sources in metrics and tables; empty: derived from the sources, see `data.sources.names`
    source_names: tuple[str, ...] = ()
    rates: Rates = ()  # mixing rate of each source; empty: in proportion to its rows per epoch
    split: str = "train"  # split of TFDS and Hugging Face data sets
    text_field: str = "text"  # field with the text, in TFDS, JSONL, Parquet, CSV, TSV and Hugging Face data sets
    # The unit of a document in text files: a file, a line, or a passage of about 16 KiB that ends with a line. auto: a
    # file if there are at least 100 files, else a passage, so that a part of a few large files can be held out.
    text_documents: Literal["auto", "file", "line", "passage"] = "auto"
    cache_directory: str = "~/.cache/t5like"  # directory of the tokenizers and token stores, shared by all runs
    # share of the documents (at least one) that is never trained on, selected by a hash of the text
    heldout_fraction: Annotated[float, Range(above=0, below=1)] = 0.01
    num_workers: Annotated[int, Range(0, 1024)] = 0  # processes that tokenize; 0: one per CPU core
    objective: tuple[Objective, ...] = ("span_corruption",)  # one or several objectives; each applies to every source
    objective_rates: Rates = ()  # mixing rate of each objective; empty: equal rates
    # Steps at which the mixing rates change. rates and objective_rates then contain one list per phase, concatenated.
    # objective=span_corruption,prefix_lm objective_rates=1,0,0,1 phase_boundaries=1000 switches from the first
    # objective to the second at step 1000.
    phase_boundaries: Annotated[tuple[int, ...], Range(1, LARGEST)] = ()
    batch_size: Annotated[int, Range(1, 2**24)] = 128  # rows per step, over all devices and microbatches
    inputs_length: Annotated[int, Range(0, 2**20)] = 512  # tokens of the inputs of a row
    # tokens of the targets of a row; a decoder-only row has inputs_length + targets_length tokens
    targets_length: Annotated[int, Range(1, 2**20)] = 114
    # span corruption and MLM: share of the tokens that are masked
    noise_density: Annotated[float, Range(above=0, below=1)] = 0.15
    # objective mlm: noise_density in each phase of phase_boundaries, such as 0.3,0.15,0.05; held-out rows always have
    # noise_density. Empty: noise_density in all phases.
    phase_noise_density: Annotated[tuple[float, ...], Range(above=0, below=1)] = ()
    mean_span_length: Annotated[float, Range(1, 2**20)] = 3.0  # span corruption: mean number of tokens per masked span
    whole_word_masking: bool = False  # MLM: mask all pieces of a word together
    # Whether tokens attend to other documents in the same row, as in T5. A row is a window of the concatenated
    # documents.
    cross_document_attention: bool = True
    # supervised and label objectives: template that builds the inputs from the fields of an example;
    # token_classification: one field with the words, a list or a text with white space between them
    inputs_template: str = "{inputs}"
    second_template: str = ""  # classification, regression: template of the second text of a pair; empty: single texts
    # template of the targets; classification: the name or index of a label; regression: a number;
    # token_classification: one field with the label of each word
    targets_template: str = "{targets}"
    labels: tuple[str, ...] = ()  # classification, token_classification: the names of the labels, in order
    # supervised: field with a list of {"role": ..., "content": ...}, used instead of the templates; empty: templates
    messages_field: str = ""
    # examples: pack several into a row, without attention between them (t5like rl: prompts, and answers, in its
    # updates); false: one per row
    packing: bool = True
    prefetch: Annotated[int, Range(1, 1000)] = 4  # batches that background threads prepare in advance

    @property
    def label_objective(self) -> LabelObjective | None:
        """The objective if it is one that predicts labels with a head of an encoder: it is then the only one."""
        return next((name for name in self.objective if name in get_args(LabelObjective)), None)

    @property
    def has_examples(self) -> bool:
        """Whether the data are examples with inputs and targets, not running text."""
        return "supervised" in self.objective or self.label_objective is not None

    @property
    def num_outputs(self) -> int:
        """Outputs of the head that predicts labels: one for each label, or the number of a regression."""
        return len(self.labels) if self.labels else 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    # adamw_rms: update sizes in proportion to the RMS of each parameter, as in nanoT5. stable_adamw: AdamW with clipped
    # updates instead of clipped gradients, as in ModernBERT (use clip_norm=0).
    name: Literal["adafactor", "adamw", "adamw_rms", "stable_adamw", "lion", "muon"] = "adafactor"
    learning_rate: Annotated[float, Range(1e-30, 1e38)] = 0.01  # peak learning rate
    # Learning rate after the warm-up. wsd: constant, then linear decay in the last decay_steps.
    schedule: Literal["constant", "rsqrt", "cosine", "linear", "wsd"] = "rsqrt"
    # steps of linear warm-up from 0; rsqrt: steps of constant learning rate instead, as in T5
    warmup_steps: NotNegative = 10_000
    decay_steps: NotNegative = 0  # wsd: steps of the decay at the end
    final_fraction: Share = 0.0  # cosine, linear and wsd: final learning rate as a fraction of learning_rate
    # Muon: learning rate of the parameters that Adam updates (embeddings, head, tables, vectors) over learning_rate
    adam_factor: Annotated[float, Range(1e-6, 1e6)] = 1.0
    b1: Share = 0.9  # Adam and Lion: decay rate of the first moment; Muon always has momentum 0.95
    b2: Share = 0.999  # Adam: decay rate of the second moment; Lion: of the momentum (its authors use 0.99)
    epsilon: Annotated[float, Range(1e-30, 1)] = 1e-8  # epsilon of Adam
    # decoupled: each update subtracts learning rate x weight_decay x parameter
    weight_decay: Annotated[float, Range(0, 1e6)] = 0.0
    # parameters without weight decay, as regular expressions of their names
    no_decay: tuple[str, ...] = (".*(scale|bias).*",)
    frozen: tuple[str, ...] = ()  # parameters that are not trained, as regular expressions of their names
    clip_norm: Annotated[float, Range(0, 1e30)] = 1.0  # maximum global norm of the gradient; 0: no clipping
    ema_decay: Share = 0.0  # decay of a moving average of the parameters, which evaluation uses; 0: none


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    num_steps: Positive = 524_288  # updates of the whole run
    # parts into which each batch is split; their gradients are summed before the update
    microbatches: Annotated[int, Range(1, 2**20)] = 1
    z_loss: Annotated[float, Range(0, 1e6)] = 1e-4  # weight of the auxiliary loss log(Z)^2
    label_smoothing: Share = 0.0  # probability that moves from the target to all other tokens, as in T5X
    loss_chunk: NotNegative = 0  # target tokens per chunk of the loss computation; 0: all in one chunk
    log_every: Positive = 10  # steps between lines of training metrics
    # Steps between statistics of each layer and parameter in the metrics (norms, update ratios, activations); 0: none.
    # Such a step takes about two and a half times as long.
    stats_every: NotNegative = 0
    eval_every: Positive = 1_000  # steps between evaluations; the first is before step 1, the last at the end
    # additional evaluations of the loss after 1/2, 1/4, 1/8, ... of eval_every
    early_evals: Annotated[int, Range(0, 31)] = 4
    eval_batches: Positive = 16  # held-out batches per evaluation
    checkpoint_every: Positive = 1_000  # steps between checkpoints
    keep_checkpoints: Positive = 3  # number of latest checkpoints to keep
    keep_every: NotNegative = 0  # also keep the checkpoints at multiples of this step; 0: none
    on_failed_save: Literal["stop", "continue"] = "stop"  # after a save that failed in spite of retries; stop: exit 4
    # A step is a spike if its loss or gradient norm is more than this times the median of recent steps; 0: no check.
    spike_factor: Annotated[float, Range(0, 1e6)] = 0.0
    on_spike: Literal["skip", "keep"] = "skip"  # whether the update of a spike is skipped or made
    # An update that is not finite is skipped. After this number of such steps or spikes in a row the run rewinds.
    max_skipped_updates: Positive = 3
    # rewinds to a checkpoint before bad steps, which pass over the batches that led to them, before the run ends (5)
    max_rewinds: NotNegative = 3
    keep_bad_steps: Annotated[int, Range(0, 10_000)] = 10  # steps whose rows and norms RUN/bad_steps keeps; 0: none
    # steps between comparisons of the replicated state on different devices; the run ends (76) if one differs; 0: none
    compare_replicas_every: NotNegative = 0
    # seconds without progress before the run ends (76); compiling and tokenizing make progress while they compute
    process_timeout_seconds: Annotated[int, Range(1, 604_800)] = 600
    # seconds without a heartbeat before a process is lost (76): it is stopped, or its host failed
    heartbeat_timeout_seconds: Annotated[int, Range(2, 604_800)] = 120
    # seconds after a signal before a run that can't save its state, as it compiles or waits for data, ends (75) without
    preemption_grace_seconds: Annotated[int, Range(1, 604_800)] = 25
    profile_step: NotNegative = 0  # first of 3 steps to profile; 0: no profile
    # XLA options of the train step as NAME=VALUE, added to those of sharding/xla_options.py; none: without the latter
    compiler_options: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    # Devices of the data axis: data parallelism with replicated parameters. In all axes: -1 is the number of remaining
    # devices, for at most one axis.
    data: Axis = -1
    fsdp: Axis = 1  # devices that share the rows of a batch and the parameters (fully sharded data parallelism)
    tensor: Axis = 1  # devices that share the heads, the MLP dimension and the vocabulary
    # Devices that share the tokens of a row, for inputs too long for one device. Must divide data.inputs_length
    # (decoder-only: the length of the row). Targets that it does not divide are replicated.
    context: Axis = 1
    # groups of devices with a slower network between them (TPU slices); the data axis spans them first
    slices: Annotated[int, Range(1, 2**20)] = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig:
    # Run directory with the initial parameters of this run, which starts at step 0. The run uses its tokenizer,
    # unless adapt contains vocabulary. A relative path becomes absolute.
    checkpoint: str = ""
    step: Annotated[int, Range(-1, LARGEST)] = -1  # step of the checkpoint; -1: the newest good one; 0: an import
    # parameters that start from random values, as regular expressions of their names
    reinitialize: tuple[str, ...] = ()
    # Differences from the model of the checkpoint that are allowed. RUN/init_from.txt has the source of each parameter.
    # architecture: a decoder-only model initializes both stacks of an encoder-decoder; cross-attention starts as its
    # self-attention, or random if the shapes differ. An encoder-decoder initializes an encoder, with its encoder.
    # vocabulary: another tokenizer; rows are copied by token, new tokens get the mean. depth: more layers; the old
    # stack is repeated.
    adapt: tuple[Adaptation, ...] = ()
    # Run directory of a decoder-only model for the decoder of an encoder-decoder, its head and the embeddings that both
    # stacks share; the encoder then comes from the first stack of init_from.checkpoint.
    decoder_checkpoint: str = ""
    # step of decoder_checkpoint; -1: the newest good one
    decoder_step: Annotated[int, Range(-1, LARGEST)] = -1
    # Updates at the start in which only some parameters learn: with adapt=architecture cross-attention and the
    # encoder's relative bias, and always those of reinitialize and a new scalar head.
    warmup_steps: NotNegative = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    # Metrics of predictions for held-out examples (`evaluation.text_metrics`); empty: held-out loss only. Of labels
    # (`evaluation.label_metrics`): accuracy, macro_f1, matthews; pearson, spearman (regression); entity_f1 (labels
    # O, B-NAME, I-NAME).
    metrics: tuple[AnyMetric, ...] = ()
    # ISO 639-1 code that decides the word segmentation of predictions; auto: by script; see `evaluation.segmentation`
    language: str = "auto"
    # all possible targets; the most likely is predicted without generation; empty: generate
    answer_choices: tuple[str, ...] = ()
    # maximum number of generated tokens per example; 0: data.targets_length
    max_new_tokens: Annotated[int, Range(0, 2**20)] = 0
    max_examples: Positive = 256  # number of held-out examples to evaluate, the first ones
    # Whether every evaluation of `train.eval_every` writes predictions for three held-out passages to samples/STEP.txt
    # of the run directory. samples.txt at the end of a run is always written.
    samples: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    # Where metrics go besides metrics.jsonl; empty: nowhere. wandb, mlflow and trackio need their packages, and their
    # own environment variables for addresses and keys. A tracker that fails does not stop the run.
    trackers: tuple[Tracker, ...] = ("tensorboard",)
    project: str = "t5like"  # the project of wandb and trackio, the experiment of mlflow


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0  # random seed of parameters, order of rows, masks and dropout
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    init_from: InitConfig = InitConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    metrics: MetricsConfig = MetricsConfig()
    distill: DistillConfig = DistillConfig()
    rl: RLConfig = RLConfig()
    lora: LoRAConfig = LoRAConfig()

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding: the vocabulary padded up to `model.vocab_multiple`."""
        return -(-self.tokenizer.vocab_size // self.model.vocab_multiple) * self.model.vocab_multiple

    @property
    def row_length(self) -> int:
        """Tokens of a decoder-only row."""
        return self.data.inputs_length + self.data.targets_length

    def of_model(self) -> "Config":
        """What the model and its parameters depend on; the other fields have their defaults.

        A program that is traced for it serves all runs of one model in a process.
        """
        head = DataConfig(objective=self.data.objective, labels=self.data.labels)
        return Config(
            model=self.model,
            tokenizer=dataclasses.replace(self.tokenizer, path=""),
            data=head if self.data.label_objective else DataConfig(),
            lora=self.lora,
        )


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


def changed_fields(config: Config) -> dict[str, Any]:
    """The values that are not the default, by dotted name."""
    default = flatten(Config())
    return {name: value for name, value in flatten(config).items() if value != default[name]}


def get(config: Config, name: str) -> Any:
    """The value of a field or section by dotted name."""
    return functools.reduce(getattr, name.split("."), config)


def default() -> ml_collections.ConfigDict:
    """All fields at their defaults, for a config file to change. Setting an unknown name raises an error."""
    # Not type-safe: `resolve` checks types, and accepts one string where a list is expected.
    return ml_collections.ConfigDict(dataclasses.asdict(Config()), type_safe=False).lock()
