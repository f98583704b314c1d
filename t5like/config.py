"""The one schema of a run: every field, its unit and its default; and the way from a config file to a frozen `Config`.

A file in `configs/` defines ``get_config() -> ml_collections.ConfigDict``: it takes `default()` and sets what differs.
`load` runs the file, applies ``--config.section.field=value`` and gives a frozen `Config` to everything else. Wrong
keys, types and combinations are refused here, before JAX starts. What needs devices is checked in `mesh`, what needs an
objective's arithmetic in `data.pipeline`. A config inside a checkpoint is JSON (`to_json`, `from_json`): data, no code.
"""

import dataclasses
import difflib
import importlib.util
import json
import math
import sys
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import ml_collections

from t5like.errors import ConfigError

FORMAT = 1  # of a saved config; a later version upgrades older numbers and refuses newer ones

Objective = Literal["span_corruption", "mlm", "mlm_nsp", "prefix_lm", "causal_lm", "ul2", "supervised"]
Metric = Literal["exact_match", "f1", "accuracy", "bleu", "chrf", "rouge1", "rouge2", "rougeL"]
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
    path: str = ""  # a SentencePiece model; empty: train one on the data
    vocab_size: int = 32_100  # ids of text and sentinels together; the model pads its rows to `model.vocab_multiple`
    num_sentinels: int = 100  # <extra_id_0> has the highest id, and they count down (T5)
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
    rotary_base: float = 10_000.0
    max_length: int = 1024  # rows of learned positions
    norm: Literal["rms", "layer"] = "rms"
    norm_position: Literal["pre", "post"] = "pre"
    norm_epsilon: float = 1e-6
    embedding_norm: bool = False  # a norm behind the sum of the embeddings, as in BERT
    biases: bool = False  # on every dense layer
    tied_embeddings: bool = False
    scale_attention: bool = False  # multiply q k by head_dim**-0.5; T5 does not, it folds that into the init
    # t5: scaled by fan-in (Mesh TensorFlow); gpt2: N(0, 0.02), smaller in deep stacks; bert: N(0, 0.02) everywhere
    init: Literal["t5", "gpt2", "bert"] = "t5"
    # Encoder-only: rows of the embeddings of a pair's first and second text. If there are any, there is also BERT's
    # pooler with the next-sentence classifier, whatever the objective: parameters follow from this section alone.
    token_types: int = 0
    head: Literal["plain", "mlm"] = "plain"  # mlm, encoder-only: a dense layer and a norm first, a bias on the logits
    dropout_rate: float = 0.0
    vocab_multiple: int = 128  # embedding rows are padded up to it; padding rows never win a softmax
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the computation; auto: bfloat16 on accelerators
    layers: Literal["auto", "scan", "unroll"] = "auto"  # auto: scan on accelerators, unroll on a CPU
    kernels: Literal["auto", "plain", "cpu"] = "auto"  # cpu: backward passes written for XLA:CPU, see model/cpu.py
    remat: Literal["none", "dots", "full"] = "none"  # what the backward pass recomputes: nothing, all but matmuls, all


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
    profile_step: int = 0  # writes a profile of the 3 steps from this one; 0: none


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    data: int = -1  # devices per axis; at most one axis is -1: what is left
    fsdp: int = 1
    tensor: int = 1
    context: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig:
    checkpoint: str = ""  # a run directory whose weights this run begins with, at step 0; its tokenizer comes with them
    step: int = 0  # of its checkpoints; 0: the latest
    new: tuple[str, ...] = ()  # parameter names, as regular expressions, that begin at random all the same


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


def load(path: str | Path, overrides: typing.Sequence[tuple[str, str]] = ()) -> Config:
    """Run a config file and resolve what it returns.

    Args:
        path: a Python file that defines ``get_config() -> ConfigDict``.
        overrides: ("section.field", "value as text") pairs from the command line, applied in order.

    Raises:
        ConfigError: the file is missing or broken, or a field is.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ConfigError(f"--config={path}: no such file; try --config=configs/tiny.py")
    spec = importlib.util.spec_from_file_location("t5like_config_file", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config={path} must be a Python file, such as configs/tiny.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # a config may import the one beside it that it varies
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:  # whatever it is, it is the file's
        raise ConfigError(f"--config={path} failed: {type(error).__name__}: {' '.join(str(error).split())}") from error
    finally:
        sys.path.pop(0)
    if not isinstance(config, Mapping | ml_collections.ConfigDict):
        raise ConfigError(f"--config={path}: get_config() must return a ConfigDict, not {type(config).__name__}")
    values = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
    for name, text in overrides:
        override(values, name, text)
    return resolve(values)


def override(values: dict, name: str, text: str) -> None:
    """Set ``section.field`` of a nested dict from a command line's text, typed by the schema."""
    section, cls = values, Config
    *parents, leaf = name.split(".")
    for parent in parents:
        inner = _types(cls).get(parent)
        if inner is None:
            raise ConfigError(_unknown(f"--config.{name}", parent, cls))
        if not dataclasses.is_dataclass(inner):
            raise ConfigError(
                f"--config.{name}: {parent!r} is a field and has none of its own; "
                f"use --config.{name.rpartition('.')[0]}=VALUE"
            )
        section, cls = section.setdefault(parent, {}), inner
    wanted = _types(cls).get(leaf)
    if wanted is None:
        raise ConfigError(_unknown(f"--config.{name}", leaf, cls))
    if dataclasses.is_dataclass(wanted):
        raise ConfigError(f"--config.{name} is a section; set one of its fields: {', '.join(_types(wanted))}")
    section[leaf] = _parse(name, text, wanted)


def resolve(values: Mapping) -> Config:
    """Make the frozen config from nested dicts. Absent fields take their default; see `check` for what is refused."""
    config = _build(Config, values, "")
    if config.init_from.checkpoint and not config.tokenizer.path:
        path = str(Path(config.init_from.checkpoint) / "tokenizer.model")
        config = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, path=path))
    check(config)
    return config


def to_json(config: Config) -> str:
    """The resolved config as text, one field a line, for a run directory or a checkpoint."""
    return json.dumps({"format": FORMAT, **dataclasses.asdict(config)}, indent=1)


def from_json(text: str) -> Config:
    """Read what `to_json` wrote; as strict as `resolve`."""
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ConfigError("this is not a saved config: it must be a JSON object")
    if (written := values.pop("format", None)) != FORMAT:
        raise ConfigError(f"config format={written} is not the format {FORMAT} that this version reads")
    return resolve(values)


def difference(old: Config, new: Config) -> list[str]:
    """The fields that differ, as ``section.field: old -> new``."""
    pairs = zip(_flat(dataclasses.asdict(old)), _flat(dataclasses.asdict(new)), strict=True)
    return [f"{name}: {was!r} -> {now!r}" for (name, was), (_, now) in pairs if was != now]


def check(config: Config) -> None:
    """Refuse what no machine could run.

    Raises:
        ConfigError: with field, value, rule, and a value that would work.
    """
    tokenizer, data, model, optimizer, train = (
        config.tokenizer,
        config.data,
        config.model,
        config.optimizer,
        config.train,
    )

    def require(holds: bool, field: str, rule: str) -> None:
        if not holds:
            value = config
            for part in field.split("."):
                value = getattr(value, part)
            raise ConfigError(f"{field}={value!r} {rule}")

    for field in (
        "data.batch_size",
        "data.targets_length",
        "data.prefetch",
        "model.num_layers",
        "model.model_dim",
        "model.num_heads",
        "model.head_dim",
        "model.mlp_dim",
        "model.vocab_multiple",
        "model.max_length",
        "model.relative_buckets",
        "train.num_steps",
        "train.microbatches",
        "train.log_every",
        "train.eval_every",
        "train.eval_batches",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.max_bad_steps",
        "tokenizer.sample_characters",
        "evaluate.max_examples",
    ):
        require(_get(config, field) >= 1, field, "must be at least 1")
    for field in (
        "seed",
        "data.inputs_length",
        "data.num_workers",
        "model.num_decoder_layers",
        "model.num_kv_heads",
        "model.token_types",
        "optimizer.warmup_steps",
        "optimizer.decay_steps",
        "optimizer.weight_decay",
        "optimizer.clip_norm",
        "train.z_loss",
        "train.loss_chunk",
        "train.keep_every",
        "train.profile_step",
        "tokenizer.num_sentinels",
        "init_from.step",
        "evaluate.max_new_tokens",
    ):
        require(_get(config, field) >= 0, field, "must be at least 0")
    for field in ("optimizer.learning_rate", "optimizer.epsilon", "model.norm_epsilon", "model.rotary_base"):
        require(_get(config, field) > 0, field, "must be more than 0")
    for field in (
        "optimizer.b1",
        "optimizer.b2",
        "optimizer.ema_decay",
        "model.dropout_rate",
        "train.label_smoothing",
        "optimizer.final_fraction",
    ):
        require(0 <= _get(config, field) < 1, field, "must be at least 0 and less than 1")
    require(config.seed < 2**32, "seed", "must be less than 2**32")
    require(
        0 < tokenizer.character_coverage <= 1,
        "tokenizer.character_coverage",
        "must be above 0 and at most 1; use 0.9995",
    )
    smallest = 3 + 256 + tokenizer.num_sentinels
    require(
        tokenizer.vocab_size > smallest,
        "tokenizer.vocab_size",
        f"must be more than {smallest} (3 special ids, 256 bytes, {tokenizer.num_sentinels} sentinels); "
        f"use {smallest + 1000}",
    )

    require(len(data.source) >= 1, "data.source", "must name a source, such as python_stdlib or text:my_texts/*.txt")
    require(0 < data.heldout_fraction < 1, "data.heldout_fraction", "must lie between 0 and 1; use 0.01")
    require(0 < data.noise_density < 1, "data.noise_density", "must lie between 0 and 1; use 0.15")
    require(data.mean_span_length >= 1, "data.mean_span_length", "must be at least 1; use 3.0")
    require(len(data.objective) >= 1, "data.objective", "must name an objective, such as span_corruption")
    require(len(set(data.objective)) == len(data.objective), "data.objective", "must not name an objective twice")
    defaults = DataConfig()
    for field in ("inputs_template", "targets_template", "messages_field", "packing"):
        require(
            "supervised" in data.objective or getattr(data, field) == getattr(defaults, field),
            f"data.{field}",
            "needs data.objective=supervised",
        )
    for field in ("inputs_template", "targets_template"):
        require(
            not data.messages_field or getattr(data, field) == getattr(defaults, field),
            f"data.{field}",
            "can't go with data.messages_field, whose messages are the text; use one of them",
        )
    require(
        not data.whole_words or {"mlm", "mlm_nsp"} & set(data.objective),
        "data.whole_words",
        "needs data.objective=mlm or mlm_nsp",
    )
    for field in ("step", "new"):
        require(
            bool(config.init_from.checkpoint) or not getattr(config.init_from, field),
            f"init_from.{field}",
            "needs init_from.checkpoint",
        )
    for objective in data.objective:
        if model.architecture not in ARCHITECTURES[objective]:
            raise ConfigError(
                f"data.objective={objective} needs model.architecture={' or '.join(ARCHITECTURES[objective])}, "
                f"not {model.architecture}"
            )
        require(
            data.inputs_length >= 1 or (objective == "causal_lm" and model.architecture == "decoder"),
            "data.inputs_length",
            f"must be at least 1 for {objective}",
        )
    require(
        "supervised" not in data.objective or len(data.objective) == 1,
        "data.objective",
        "can't mix supervised with objectives on running text; use supervised alone",
    )
    evaluate = config.evaluate
    require(
        not evaluate.metrics or "supervised" in data.objective,
        "evaluate.metrics",
        "need data.objective=supervised, whose examples have an answer; leave it empty",
    )
    require(
        not evaluate.choices or len(set(evaluate.choices)) == len(evaluate.choices) > 1,
        "evaluate.choices",
        "must be at least two different answers, or empty; use yes,no",
    )
    require(not evaluate.choices or evaluate.metrics, "evaluate.choices", "need evaluate.metrics; use accuracy")
    require(
        list(data.change_steps) == sorted(set(data.change_steps)) and all(step > 0 for step in data.change_steps),
        "data.change_steps",
        "must be positive steps in ascending order; use 1000,2000",
    )
    phases = 1 + len(data.change_steps)
    for field, of, names in (
        ("data.rates", "data.source", data.source),
        ("data.objective_rates", "data.objective", data.objective),
    ):
        rates = _get(config, field)
        require(
            len(rates) in (0, len(names) * phases),
            field,
            f"must have one rate for each of the {len(names)} in {of}"
            + (f" in each of the {phases} phases, {len(names) * phases} in all" if phases > 1 else "")
            + ", or be empty",
        )
        lists = [rates[start : start + len(names)] for start in range(0, len(rates), len(names))]
        require(
            all(rate >= 0 for rate in rates) and all(sum(each) > 0 for each in lists),
            field,
            "must not be negative and must not sum to 0"
            + (" in any phase" if phases > 1 else "")
            + "; use "
            + ",".join("1" for _ in rates),
        )

    heads = model.num_kv_heads or model.num_heads
    require(
        model.num_heads % heads == 0,
        "model.num_kv_heads",
        f"must divide model.num_heads={model.num_heads}; use {math.gcd(heads, model.num_heads)}",
    )
    require(
        model.positions != "rotary" or model.head_dim % 2 == 0,
        "model.head_dim",
        f"must be even for rotary positions; use {model.head_dim + 1}",
    )
    require(model.relative_buckets % 4 == 0, "model.relative_buckets", "must be a multiple of 4; use 32")
    require(
        model.relative_max_distance > model.relative_buckets // 2,
        "model.relative_max_distance",
        f"must be more than half of model.relative_buckets={model.relative_buckets}; use {4 * model.relative_buckets}",
    )
    encoder_only = model.architecture == "encoder"
    require(
        encoder_only or not model.token_types,
        "model.token_types",
        f"needs model.architecture=encoder, not {model.architecture}; use 0",
    )
    require(
        encoder_only or model.head == "plain",
        "model.head",
        f"needs model.architecture=encoder, not {model.architecture}; use plain",
    )
    require(
        "mlm_nsp" not in data.objective or model.token_types >= 2,
        "model.token_types",
        "must be at least 2 for data.objective=mlm_nsp; use 2",
    )
    longest = {"decoder": config.row_length, "encoder": data.inputs_length}.get(
        model.architecture, max(data.inputs_length, data.targets_length)
    )
    require(
        model.positions != "learned" or model.max_length >= longest,
        "model.max_length",
        f"must be at least the longest row, {longest}, with learned positions; use {longest}",
    )
    asked = config.row_length if model.architecture == "decoder" else data.targets_length
    if evaluate.metrics and evaluate.max_new_tokens and model.architecture == "decoder":
        asked = data.inputs_length + evaluate.max_new_tokens
    require(
        not evaluate.metrics or model.positions != "learned" or model.max_length >= asked,
        "model.max_length",
        f"must be at least {asked} for the answers of evaluate.max_new_tokens, with learned positions; use {asked}",
    )

    require(
        data.batch_size % train.microbatches == 0,
        "data.batch_size",
        f"must be a multiple of train.microbatches={train.microbatches}; use "
        f"{-(-data.batch_size // train.microbatches) * train.microbatches}",
    )
    require(
        optimizer.schedule != "wsd" or 1 <= optimizer.decay_steps <= train.num_steps - optimizer.warmup_steps,
        "optimizer.decay_steps",
        "must be at least 1 and fit between the warm-up and train.num_steps="
        f"{train.num_steps}; use {max(1, (train.num_steps - optimizer.warmup_steps) // 5)}",
    )

    axes = dataclasses.asdict(config.mesh)
    for axis, size in axes.items():
        require(size == -1 or size >= 1, f"mesh.{axis}", "must be at least 1, or -1 for what is left")
    if (free := [axis for axis, size in axes.items() if size == -1])[1:]:
        raise ConfigError(
            f"mesh.{free[0]}=-1 and mesh.{free[1]}=-1: only one axis can take what is left; use mesh.{free[1]}=1"
        )


def _types(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _get(config: Config, field: str) -> Any:
    section, _, name = field.rpartition(".")
    return getattr(getattr(config, section) if section else config, name)


def _flat(values: Mapping, prefix: str = "") -> list[tuple[str, Any]]:
    return [
        pair
        for key, value in values.items()
        for pair in (_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(prefix + key, value)])
    ]


def _unknown(where: str, key: str, cls: type) -> str:
    names = list(_types(cls))
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return f"{where}: there is no field {key!r}; " + (
        f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
    )


def _build(cls: type, values: Mapping, prefix: str):
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix.rstrip('.')}={values!r} must be a section with the fields {', '.join(_types(cls))}")
    types = _types(cls)
    for key in values:
        if key not in types:
            raise ConfigError(_unknown(f"{prefix}{key}", key, cls))
    return cls(
        **{
            key: _build(types[key], value, f"{prefix}{key}.")
            if dataclasses.is_dataclass(types[key])
            else _convert(prefix + key, value, types[key])
            for key, value in values.items()
        }
    )


def _wanted(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        if typing.get_origin(inner) is Literal:
            return "a list of " + ", ".join(map(str, typing.get_args(inner)))
        return "a list of " + {str: "strings", float: "numbers", int: "whole numbers"}[inner]
    return {bool: "true or false", int: "a whole number", float: "a finite number", str: "a string"}[kind]


def _convert(name: str, value: Any, kind: Any) -> Any:
    """Check a value against its annotation; whole numbers pass for floats, one string for a list of them."""
    if typing.get_origin(kind) is Literal:
        if value in typing.get_args(kind):
            return value
        near = difflib.get_close_matches(str(value), typing.get_args(kind), n=1)
        raise ConfigError(
            f"{name}={value!r} must be {_wanted(kind)}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    if typing.get_origin(kind) is tuple:
        items = (value,) if isinstance(value, str | int | float) else value
        if isinstance(items, list | tuple):
            return tuple(_convert(name, item, typing.get_args(kind)[0]) for item in items)
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    elif kind is not float and type(value) is kind:
        return value
    raise ConfigError(f"{name}={value!r} must be {_wanted(kind)}")


def _parse(name: str, text: str, kind: Any) -> Any:
    """Read a command line's text as the annotated type."""
    if typing.get_origin(kind) is tuple:
        return tuple(_parse(name, part, typing.get_args(kind)[0]) for part in text.split(",")) if text else ()
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if kind is int:
            number = int(text) if "e" not in text.lower() else float(text)
            if number != int(number):
                raise ValueError
            return int(number)
        if kind is float:
            return float(text)
    except (ValueError, KeyError, OverflowError):
        raise ConfigError(f"{name}={text!r} must be {_wanted(kind)}") from None
    return text
