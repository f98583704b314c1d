"""`t5like inspect data`: the rows of a step as the model sees them, statistics of the sources, and warnings.

The report is one JSON object; `data_text` and `data_page` show it. Called by `cli.inspections`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from t5like.data.sources.names import source_names
from t5like.data.store import document_statistics, heldout_overlap
from t5like.errors import ConfigError
from t5like.inspect import data_warnings
from t5like.inspect.row_checks import check_rows
from t5like.inspect.rows import describe_rows, fill
from t5like.inspect.step_data import Plan, StepData, open_data
from t5like.metrics.progress import Progress
from t5like.rl.prompts import PromptBatches, Prompts
from t5like.types import Batch

Report = dict[str, Any]


def inspect_data(plan: Plan, count: int) -> Report:
    """The report of a step.

    Args:
        plan: which step.
        count: how many rows are described; at most the batch size.

    Raises:
        ConfigError, DataError, CheckpointError: the data can't be prepared or read.
    """
    if plan.config.rl.method != "none":
        return _prompts(plan, count)
    data = open_data(plan)
    rows, batch, findings = _rows(data, count)
    sources = _sources(data)
    report = {**_header(plan, data.tokenizer_path, data.notes), "batch": batch, "rows": rows, "sources": sources}
    report["warnings"] = [each._asdict() for each in [*findings, *data_warnings.warnings(data, batch, sources)]]
    return report


def _header(plan: Plan, tokenizer_path: Any, notes: Sequence[str]) -> Report:
    config = plan.config
    return {
        "step": plan.number,
        "num_steps": config.train.num_steps,
        "first_row": plan.first_row,
        "batch_size": config.data.batch_size,
        "architecture": config.model.architecture,
        "tokenizer": str(tokenizer_path),
        "vocab_size": config.tokenizer.vocab_size,
        "notes": [*plan.notes, *notes],
    }


# ---- Rows ----


def _rows(data: StepData, count: int) -> tuple[list[Report], Report, list[Any]]:
    """The described rows, the fill of the batch, and what is wrong with its rows."""
    config, first = data.plan.config, data.plan.first_row
    shown_N = data.shown_rows(count)
    described = describe_rows(
        config, data.tokenizer, data.components, data.rows(shown_N), data.component_of(shown_N), first + shown_N
    )
    examined_N = data.examined_rows()
    batch, component_N = data.rows(examined_N), data.component_of(examined_N)
    names = source_names(config.data)
    by_component = []
    for component in np.unique(component_N).tolist():
        part = Batch(*(None if x is None else x[component_N == component] for x in batch))
        each = data.components[component]
        by_component.append(
            {
                "source": names[each.source],
                "denoiser": each.name,
                "rows": len(part.targets_BL),
                "fill": fill(part),
            }
        )
    whole = {"rows": config.data.batch_size, "examined": len(examined_N), "fill": fill(batch), "parts": by_component}
    text_of = lambda rows_N, component: data.text(examined_N[rows_N], component)
    return described, whole, check_rows(data.tokenizer, data.components, batch, component_N, text_of)


# ---- Sources ----


def _sources(data: StepData) -> list[Report]:
    """Statistics of each source: its training documents, held-out documents, and how often the run repeats it."""
    config, tokenizer = data.plan.config, data.tokenizer
    names, described = source_names(config.data), []
    trained = [store.split("train") for store in data.stores]
    for number, (name, store) in enumerate(zip(names, data.stores, strict=True)):
        decoded = min(trained[number].num_documents, document_statistics.MOST_TEXTS)
        with Progress(decoded, unit=f"reading documents of {name}:") as bar:
            show = bar.timed()
            statistics = document_statistics.describe(trained[number], tokenizer, lambda done, show=show: show(done))
        heldout = store.split("heldout")
        searched = min(sum(stream.num_tokens for stream in trained), heldout_overlap.MOST_TOKENS)
        with Progress(searched, unit=f"searching held-out text of {name}:") as bar:
            show = bar.timed()
            overlap = heldout_overlap.measure(
                heldout, trained, tokenizer, lambda done, show=show, most=searched: show(min(done, most))
            )
        counts = store.manifest["splits"]
        described.append(
            {
                "name": name,
                "spec": config.data.source[number],
                "directory": str(store.directory),
                "counts": counts,
                "duplicates": store.manifest.get("duplicates"),
                "train": statistics,
                "overlap": overlap,
                "epochs": [each for each in _epochs(data) if each["source"] == name],
            }
        )
    return described


def _epochs(data: StepData) -> list[Report]:
    """For each component its rows, the steps' draws from it, and how many epochs these are."""
    names = source_names(data.plan.config.data)
    drawn_C = data.batches.drawn_rows()
    return [
        {
            "source": names[each.source],
            "denoiser": each.name,
            "rows": int(rows.count),
            "drawn": float(drawn),
            "epochs": float(drawn / rows.count),
            **({} if each.denoiser else {"packing_efficiency": float(rows.efficiency)}),
        }
        for each, rows, drawn in zip(data.components, data.batches.row_sources, drawn_C, strict=True)
    ]


# ---- Prompts of t5like rl ----


def _prompts(plan: Plan, count: int) -> Report:
    """The prompts of a step of `t5like rl`, with the answers of pairs."""
    from t5like.data.tokenizers.tokenizer import Tokenizer
    from t5like.inspect.rows import TokenTexts
    from t5like.io.paths import expand

    config = plan.config
    if not config.tokenizer.path:
        raise ConfigError(
            f"rl.method={config.rl.method} needs a model that is trained already; use --config.init_from.checkpoint=RUN"
        )
    path = expand(config.tokenizer.path)
    tokenizer = Tokenizer.load(path, num_sentinels=config.tokenizer.num_sentinels)
    tokenizer.check(config.tokenizer)
    rl = config.rl
    fields = [field.partition("/")[0] for field in (rl.chosen_field, rl.rejected_field)] if rl.uses_pairs else []
    prompts = Prompts(config, tokenizer, fields)
    batches, texts = PromptBatches(config, len(prompts.train)), TokenTexts(tokenizer)
    batches.follow(plan.schedule)
    rows_B, names, rows = batches.at(plan.number - 1), source_names(config.data), []
    for row, index in zip(rows_B[:count].tolist(), batches.indices(rows_B[:count]).tolist(), strict=True):
        example = prompts.train[index]
        sequences = [("prompt", example.prompt.ids), *zip(("chosen", "rejected"), example.answers, strict=False)]
        rows.append(
            {
                "row": row,
                "source": names[example.source],
                "objective": rl.method,
                "denoiser": f"record {example.record}",
                "sequences": [
                    {
                        "name": name,
                        "length": len(ids),
                        "tokens": len(ids),
                        "ids": [int(token) for token in ids],
                        "texts": [texts.text(int(token)) for token in ids],
                        "kinds": [texts.kind(int(token)) for token in ids],
                        "segments": [],
                    }
                    for name, ids in sequences
                ],
            }
        )
    notes = [f"{len(prompts.train):,} prompts, {len(prompts.heldout):,} held out", *prompts.notes]
    if not rl.uses_pairs:
        notes.append("answers are sampled in training: RUN/answers has those of a run")
    header = _header(plan, path, notes) | {"first_row": int(rows_B[0])}
    report = {**header, "batch": None, "rows": rows, "sources": []}
    report["warnings"] = [each._asdict() for each in data_warnings.warnings_of_prompts(plan, len(prompts.train))]
    return report
