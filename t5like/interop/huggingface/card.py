"""The model card of an exported run: what it is, what it was trained on, what it reached, how to load and repeat it.

Everything is taken from the run directory. What only people can say (license, language, limitations) is left to fill
in, marked. Called by `hf.directory`. The front matter's fields are those of Hugging Face's model cards.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from t5like import tree
from t5like.checkpoint import run_directory
from t5like.config.schema import Config, flatten
from t5like.data.sources.source import canonical
from t5like.io.atomic import replace_file
from t5like.io.paths import cache_directory
from t5like.io.strict_json import loads
from t5like.metrics import writers

KINDS = {  # architecture: pipeline_tag, class of transformers, what it is
    "encoder_decoder": ("text2text-generation", "AutoModelForSeq2SeqLM", "encoder-decoder"),
    "decoder": ("text-generation", "AutoModelForCausalLM", "decoder-only model"),
    "encoder": ("fill-mask", "AutoModelForMaskedLM", "encoder-only model"),
}
OBJECTIVES = {
    "span_corruption": "span corruption (gaps are marked `<extra_id_N>`, and the model says what was there)",
    "prefix_lm": "prefix language modelling (a text goes on)",
    "causal_lm": "causal language modelling (a text goes on)",
    "ul2": "UL2 (a mixture of denoisers with mode tokens)",
    "mlm": "masked language modelling",
    "mlm_nsp": "masked language modelling and next-sentence prediction",
    "supervised": "supervised examples (an input and its answer)",
}
# Where and how a run works, not what it learns: of no use on another machine.
LEFT_OUT = ("tokenizer.path", "data.cache_directory", "data.num_workers", "mesh.", "model.dtype", "model.layers")
FILL = "*Fill in.*"


def write(directory: Path, workdir: Path, loaded: run_directory.Run, family: str) -> None:
    """Write README.md for the export of a run, of a family ("t5", "llama", ...)."""
    config = run_directory.saved_config(workdir)
    records = writers.read(workdir)
    parts = [
        _front_matter(config, family),
        f"# {_kind(config)[:1].upper()}{_kind(config)[1:]} of {_size(loaded)}",
        _what_it_is(config, loaded, family),
        "## Use\n\n" + _snippet(config, loaded),
    ]
    if loaded.step == 0 and not records:
        parts.append(f"## Training\n\n{FILL} The weights were imported by t5like, which did not train them.")
    else:
        versions = run_directory.checkpoints_of(workdir, config).meta(loaded.step).versions
        begun = (
            "Training began with imported weights, which t5like did not train.\n\n" if (workdir / "hf").is_dir() else ""
        )
        parts.append("## Training\n\n" + begun + _training(config, loaded))
        parts.append("## Results\n\n" + _results(records, loaded.step))
        parts.append("## How it was made\n\n" + _how(config, versions))
    parts.append(f"## Limitations\n\n{FILL} What was it not tested on, what does it get wrong, who should not use it?")
    replace_file(directory / "README.md", "\n\n".join(parts) + "\n")


def _front_matter(config: Config, family: str) -> str:
    tags = ["t5like", family, *(objective.replace("_", "-") for objective in config.data.objective)]
    return "\n".join(
        [
            "---",
            "license: unknown  # fill in, such as apache-2.0",
            "language: und  # fill in, such as en, or a list",
            "library_name: transformers",
            f"pipeline_tag: {KINDS[config.model.architecture][0]}",
            "tags:",
            *(f"- {tag}" for tag in dict.fromkeys(tags)),
            "---",
        ]
    )


def _kind(config: Config) -> str:
    return KINDS[config.model.architecture][2]


def _size(loaded: run_directory.Run) -> str:
    return f"{tree.num_parameters(loaded.params):,} parameters"


def _what_it_is(config: Config, loaded: run_directory.Run, family: str) -> str:
    model = config.model
    layers = f"{model.num_layers} layers"
    if model.architecture == "encoder_decoder":
        layers = f"{model.num_layers} encoder and {model.decoder_layers} decoder layers"
    article = "A" if model.architecture == "decoder" else "An"
    return (
        f"{article} {_kind(config)} of the {family} family, with {_size(loaded)}: {layers}, model dimension "
        f"{model.model_dim}, {model.num_heads} heads of {model.head_dim}, MLP dimension {model.mlp_dim} ({model.mlp}), "
        f"{model.positions} positions, a vocabulary of {loaded.tokenizer.vocab_size:,}."
    )


def new_tokens(config: Config) -> int:
    """How many tokens to generate unless a reader says: `t5like generate`'s, or half of the positions."""
    return min(64, config.model.longest_text // 2)


def _snippet(config: Config, loaded: run_directory.Run) -> str:
    architecture, tokenizer = config.model.architecture, loaded.tokenizer
    name = KINDS[architecture][1]
    if architecture == "encoder":
        name = "AutoModelForPreTraining" if config.model.token_types else name
        body = [
            f'inputs = tokenizer("A text with a {tokenizer.sentinel_names[0]} in it.", return_tensors="pt")',
            f"logits = model(**inputs).{'prediction_logits' if config.model.token_types else 'logits'}[0]",
            'print(tokenizer.decode(logits[inputs["input_ids"][0] == tokenizer.mask_token_id].argmax(-1)))',
        ]
    else:
        gap = "<extra_id_0> " if {"span_corruption", "ul2"} & set(config.data.objective) else ""
        body = [
            f'ids = tokenizer.encode("A text with {gap}what you want to ask", return_tensors="pt")',
            f"print(tokenizer.decode(model.generate(ids, max_new_tokens={new_tokens(config)})[0]))",
        ]
    lines = [
        f"from transformers import {name}, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("DIR")',
        f'model = {name}.from_pretrained("DIR")',
        *body,
    ]
    return _fenced("python", lines) + "\n\nDIR is this directory, or its name on the hub."


def _training(config: Config, loaded: run_directory.Run) -> str:
    data = config.data
    read = data.batch_size * config.row_length if data.inputs_length else data.batch_size * data.targets_length
    if config.model.architecture == "encoder":
        read = data.batch_size * data.inputs_length
    rows = f"{data.batch_size:,} rows of {data.inputs_length:,} input" + (
        "" if config.model.architecture == "encoder" else f" and {data.targets_length:,} target"
    )
    lines = [
        f"* **Objective**: {'; '.join(OBJECTIVES[objective] for objective in data.objective)}.",
        *(f"* **Data**: `{source}`{tokens}." for source, tokens in _sources(config, loaded.tokenizer.hash)),
        f"* **Held out**: {100 * data.heldout_fraction:g} % of the documents, never trained on.",
        f"* **Steps**: {loaded.step:,}, each of {rows} tokens; {loaded.step * read:,} tokens at most.",
        f"* **Optimizer**: {config.optimizer.name}, learning rate {config.optimizer.learning_rate:g} "
        f"({config.optimizer.schedule}, {config.optimizer.warmup_steps:,} steps of warm-up).",
        f"* **Tokenizer**: {loaded.tokenizer.vocab_size:,} ids, {loaded.tokenizer.num_sentinels} of them sentinels.",
    ]
    if config.init_from.checkpoint:
        lines.insert(0, f"* **Begun with** the weights of `{config.init_from.checkpoint}`.")
    return "\n".join(lines)


def _sources(config: Config, tokenizer_hash: str) -> Iterator[tuple[str, str]]:
    """Each source, and the size of its token store where that is still there."""
    sizes, settings = {}, dataclasses.asdict(config.data)
    del settings["source"]  # compared below, each by itself
    for path in cache_directory(config.data.cache_directory).glob("stores/*/manifest.json"):
        try:
            manifest = loads(path.read_bytes())
            same = all(settings[name] == value for name, value in manifest.items() if name in settings)
            if same and manifest["tokenizer"] == tokenizer_hash:
                sizes[manifest["source"]] = manifest["splits"]["train"]
        except (OSError, ValueError, KeyError):  # a store in the making, or a damaged one: no matter here
            continue
    for source in config.data.source:
        size = sizes.get(canonical(source))
        yield source, f", {size['tokens']:,} tokens in {size['documents']:,} documents" if size else ""


def _results(records: list[dict[str, Any]], step: int) -> str:
    """The held-out values that stood last at this step, next to those of models that read nothing."""
    values: dict[str, float] = {}
    at = 0
    for record in records:
        if record["step"] <= step:
            kept = ("eval/", "baseline/", "train/loss")
            found = {name: value for name, value in record.items() if name.startswith(kept) and value is not None}
            at = record["step"] if any(name.startswith("eval/") for name in found) else at
            values |= found
    if not values:
        return "Nothing was measured in this run."
    names = {
        "eval/loss": "held-out loss, nats per target token",
        "baseline/unigram": "the same of always saying how frequent each token is",
        "baseline/uniform": "the same of guessing evenly",
        "train/loss": "training loss, last reported",
        "eval/perplexity": "held-out perplexity",
        "eval/accuracy": "share of held-out target tokens that are right",
        "eval/bits_per_byte": "held-out bits per byte of target text",
    }
    others = [name for name in values if name not in names and not name.endswith("tokens") and "/share/" not in name]
    rows = [f"| {names.get(name, f'`{name}`')} | {values[name]:.4g} |" for name in (*names, *others) if name in values]
    return "\n".join([f"Measured at step {at:,}.", "", "| | |", "|---|---:|", *rows])


def _how(config: Config, versions: Mapping[str, str]) -> str:
    lines = [
        "from t5like import config as schema",
        "",
        "",
        "def get_config():",
        "    config = schema.default()",
        *(f"    config.{name} = {value!r}" for name, value in _changed(config)),
        "    return config",
    ]
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"With this as `made.py`, `t5like train --config=made.py --workdir=RUN`:\n\n{_fenced('python', lines)}\n\n"
        f"Versions: {made}."
    )


def _changed(config: Config) -> Iterator[tuple[str, Any]]:
    """Names and values of the fields that are not at their default, but for those of LEFT_OUT."""
    default = flatten(Config())
    for name, value in flatten(config).items():
        if value != default[name] and not name.startswith(LEFT_OUT):
            yield name, value


def _fenced(language: str, lines: list[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```"])
