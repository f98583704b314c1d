"""The model card of an exported run: the model, its training data, its results, and how to load and repeat it.

All values are from the run directory. Fields that need the author (license, language, limitations) are marked to be
filled in. Called by `convert`. The fields of the front matter are those of Hugging Face model cards.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from t5like import tree
from t5like.checkpoint import run_directory
from t5like.config.schema import Config, changed_fields
from t5like.data.sources.source import canonical
from t5like.interop.huggingface import label_heads
from t5like.io.atomic import replace_file
from t5like.io.paths import cache_directory
from t5like.io.strict_json import loads
from t5like.metrics import writers

ARCHITECTURES = {  # architecture: pipeline_tag, class in transformers, description
    "encoder_decoder": ("text2text-generation", "AutoModelForSeq2SeqLM", "encoder-decoder"),
    "decoder": ("text-generation", "AutoModelForCausalLM", "decoder-only model"),
    "encoder": ("fill-mask", "AutoModelForMaskedLM", "encoder-only model"),
}
OBJECTIVES = {
    "span_corruption": "span corruption (masked spans are replaced by `<extra_id_N>`, and the model predicts them)",
    "prefix_lm": "prefix language modelling (the model continues a text whose beginning is bidirectional)",
    "causal_lm": "causal language modelling (the model continues a text)",
    "ul2": "UL2 (a mixture of denoisers with mode tokens)",
    "mlm": "masked language modelling",
    "mlm_nsp": "masked language modelling and next-sentence prediction",
    "supervised": "supervised examples (an input and its answer)",
    "classification": "classification of texts",
    "regression": "regression (a number for each text)",
    "token_classification": "token classification (a label for each word)",
}
# Fields about the machine and not the model: of no use on another machine.
MACHINE_FIELDS = ("tokenizer.path", "data.cache_directory", "data.num_workers", "mesh.", "model.dtype", "model.layers")
FILL = "*Fill in.*"


def write(directory: Path, workdir: Path, loaded: run_directory.Run, family: str) -> None:
    """Write README.md for the export of a run in a family ("t5", "llama", ...)."""
    config = run_directory.saved_config(workdir)
    records = writers.read(workdir)
    parts = [
        _front_matter(config, family),
        f"# {_description(config)[:1].upper()}{_description(config)[1:]} of {_size(loaded)}",
        _model(config, loaded, family),
        "## Use\n\n" + _snippet(config, loaded),
    ]
    if loaded.step == 0 and not records:
        parts.append(f"## Training\n\n{FILL} The weights were imported into t5like, which did not train them.")
    else:
        versions = run_directory.checkpoints_of(workdir, config).meta(loaded.step).versions
        origin = (
            "Training started with imported weights, which t5like did not train.\n\n"
            if (workdir / "hf").is_dir()
            else ""
        )
        parts.append("## Training\n\n" + origin + _training(config, loaded))
        parts.append("## Results\n\n" + _results(records, loaded.step))
        parts.append("## How to repeat it\n\n" + _recipe(config, versions))
    questions = "On which data was the model not tested? Which errors does it make? For which uses is it not suitable?"
    parts.append(f"## Limitations\n\n{FILL} {questions}")
    replace_file(directory / "README.md", "\n\n".join(parts) + "\n")


def _front_matter(config: Config, family: str) -> str:
    task = label_heads.TASKS.get(config.data.label_objective)
    tags = ["t5like", family, *(objective.replace("_", "-") for objective in config.data.objective)]
    return "\n".join(
        [
            "---",
            "license: unknown  # fill in, such as apache-2.0",
            "language: und  # fill in, such as en, or a list",
            "library_name: transformers",
            f"pipeline_tag: {label_heads.TAGS.get(task) or ARCHITECTURES[config.model.architecture][0]}",
            "tags:",
            *(f"- {tag}" for tag in dict.fromkeys(tags)),
            "---",
        ]
    )


def _description(config: Config) -> str:
    return ARCHITECTURES[config.model.architecture][2]


def _size(loaded: run_directory.Run) -> str:
    return f"{tree.num_parameters(loaded.params):,} parameters"


def _model(config: Config, loaded: run_directory.Run, family: str) -> str:
    model = config.model
    layers = f"{model.num_layers} layers"
    if model.architecture == "encoder_decoder":
        layers = f"{model.num_layers} encoder and {model.decoder_layers} decoder layers"
    article = "A" if model.architecture == "decoder" else "An"
    return (
        f"{article} {_description(config)} of the {family} family, with {_size(loaded)}: {layers}, model dimension "
        f"{model.model_dim}, {model.num_heads} heads of {model.head_dim}, MLP dimension {model.mlp_dim} ({model.mlp}), "
        f"{model.positions} positions, a vocabulary of {loaded.tokenizer.vocab_size:,}."
    )


def new_tokens(config: Config) -> int:
    """The default number of new tokens: that of `t5like generate`, or at most half of the positions."""
    return min(64, config.model.longest_text // 2)


def _snippet(config: Config, loaded: run_directory.Run) -> str:
    architecture, tokenizer = config.model.architecture, loaded.tokenizer
    name = ARCHITECTURES[architecture][1]
    if config.data.label_objective:
        name = f"AutoModelFor{label_heads.TASKS[config.data.label_objective]}"
        body = [
            'inputs = tokenizer("A text.", return_tensors="pt")',
            "print(model(**inputs).logits, model.config.id2label)",
        ]
    elif architecture == "encoder":
        name = "AutoModelForPreTraining" if config.model.has_next_sentence_head else name
        body = [
            f'inputs = tokenizer("A text with a {tokenizer.sentinel_names[0]} in it.", return_tensors="pt")',
            f"logits = model(**inputs).{'prediction_logits' if config.model.has_next_sentence_head else 'logits'}[0]",
            'print(tokenizer.decode(logits[inputs["input_ids"][0] == tokenizer.mask_token_id].argmax(-1)))',
        ]
    else:
        sentinel = "<extra_id_0> " if {"span_corruption", "ul2"} & set(config.data.objective) else ""
        body = [
            f'ids = tokenizer.encode("A text with {sentinel}your prompt", return_tensors="pt")',
            f"print(tokenizer.decode(model.generate(ids, max_new_tokens={new_tokens(config)})[0]))",
        ]
    lines = [
        f"from transformers import {name}, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("DIR")',
        f'model = {name}.from_pretrained("DIR")',
        *body,
    ]
    return _fenced("python", lines) + "\n\nDIR is this directory, or its name on the Hugging Face Hub."


def _training(config: Config, loaded: run_directory.Run) -> str:
    data = config.data
    tokens_per_step = (
        data.batch_size * config.row_length if data.inputs_length else data.batch_size * data.targets_length
    )
    if config.model.architecture == "encoder":
        tokens_per_step = data.batch_size * data.inputs_length
    rows = f"{data.batch_size:,} rows of {data.inputs_length:,} input" + (
        "" if config.model.architecture == "encoder" else f" and {data.targets_length:,} target"
    )
    lines = [
        f"* **Objective**: {'; '.join(OBJECTIVES[objective] for objective in data.objective)}.",
        *(f"* **Data**: `{source}`{tokens}." for source, tokens in _sources(config, loaded.tokenizer.hash)),
        f"* **Held out**: {100 * data.heldout_fraction:g} % of the documents, not used for training.",
        f"* **Steps**: {loaded.step:,}, each of {rows} tokens; {loaded.step * tokens_per_step:,} tokens at most.",
        f"* **Optimizer**: {config.optimizer.name}, learning rate {config.optimizer.learning_rate:g} "
        f"({config.optimizer.schedule}, {config.optimizer.warmup_steps:,} steps of warm-up).",
        f"* **Tokenizer**: {loaded.tokenizer.vocab_size:,} ids, {loaded.tokenizer.num_sentinels} of them sentinels.",
    ]
    if config.distill.teacher:
        lines.insert(0, f"* **Teacher**: the predictions of `{config.distill.teacher}`, by distillation.")
    if config.init_from.checkpoint:
        lines.insert(0, f"* **Initial weights**: those of `{config.init_from.checkpoint}`.")
    return "\n".join(lines)


def _sources(config: Config, tokenizer_hash: str) -> Iterator[tuple[str, str]]:
    """Each source, and the size of its token store if it still exists."""
    sizes, settings = {}, dataclasses.asdict(config.data)
    del settings["source"]  # compared below, per source
    for path in cache_directory(config.data.cache_directory).glob("stores/*/manifest.json"):
        try:
            manifest = loads(path.read_bytes())
            same = all(settings[name] == value for name, value in manifest.items() if name in settings)
            if same and manifest["tokenizer"] == tokenizer_hash:
                sizes[manifest["source"]] = manifest["splits"]["train"]
        except (OSError, ValueError, KeyError):  # incomplete or damaged stores are skipped
            continue
    for source in config.data.source:
        size = sizes.get(canonical(source))
        yield source, f", {size['tokens']:,} tokens in {size['documents']:,} documents" if size else ""


def _results(records: list[dict[str, Any]], step: int) -> str:
    """The last held-out values up to this step, and the baselines without a model."""
    values: dict[str, float] = {}
    measured_at = 0
    for record in records:
        if record["step"] <= step:
            kept = ("eval/", "baseline/", "train/loss")
            metrics = {name: value for name, value in record.items() if name.startswith(kept) and value is not None}
            if any(name.startswith("eval/") for name in metrics):
                measured_at = record["step"]
            values |= metrics
    if not values:
        return "This run has no metrics."
    names = {
        "eval/loss": "held-out loss, nats per target token",
        "baseline/unigram": "loss of predicting token frequencies",
        "baseline/uniform": "loss of uniform predictions",
        "train/loss": "training loss, last logged",
        "eval/perplexity": "held-out perplexity",
        "eval/accuracy": "share of held-out target tokens predicted correctly",
        "eval/bits_per_byte": "held-out bits per byte of target text",
    }
    others = [name for name in values if name not in names and not name.endswith("tokens") and "/share/" not in name]
    rows = [f"| {names.get(name, f'`{name}`')} | {values[name]:.4g} |" for name in (*names, *others) if name in values]
    return "\n".join([f"Measured at step {measured_at:,}.", "", "| | |", "|---|---:|", *rows])


def _recipe(config: Config, versions: Mapping[str, str]) -> str:
    lines = [
        "from t5like import config as schema",
        "",
        "",
        "def get_config():",
        "    config = schema.default()",
        *(f"    config.{name} = {value!r}" for name, value in _changed(config)),
        "    return config",
    ]
    installed = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        "Save this as `config.py` and run `t5like train --config=config.py --workdir=RUN`:\n\n"
        f"{_fenced('python', lines)}\n\nVersions: {installed}."
    )


def _changed(config: Config) -> Iterator[tuple[str, Any]]:
    """Names and values of fields that differ from the default, except those of MACHINE_FIELDS."""
    return ((name, value) for name, value in changed_fields(config).items() if not name.startswith(MACHINE_FIELDS))


def _fenced(language: str, lines: list[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```"])
