"""Warnings about the data of a run that a careful person would give: each one line, with its number and a remedy.

The limits are not exact: each stands beside its reason.
"""

from typing import Any

from t5like.errors import printable
from t5like.inspect.row_checks import Finding
from t5like.inspect.step_data import Plan, StepData

MOST_EPOCHS = 4  # of text; more repetitions bring little (Muennighoff et al. 2023, arXiv:2305.16264, section 5)
MOST_EXAMPLE_EPOCHS = 10  # of supervised examples
FEWEST_HELDOUT = 10  # documents; the mean loss of fewer depends on their choice
LOWEST_FILL = 0.5  # of the positions of encoder or decoder
MOST_OUTSIDE = 0.05  # share of tokens that are unknown or single bytes
MOST_SCRIPT_IN_BYTES = 0.5  # share of a script's letters
LEAST_SCRIPT = 0.001  # share of all letters, of a script that is mentioned
MOST_DUPLICATES = 0.01  # share of the documents
MOST_CONTROL = 0.001  # share of the documents
MOST_COPIED = 0.01  # share of the held-out documents


def warnings(data: StepData, batch: dict[str, Any], sources: list[dict[str, Any]]) -> list[Finding]:
    """All warnings about the fill of the batch and the sources, as `inspect.data` describes them."""
    found = _fill(data, batch)
    for source in sources:
        for rule in (_duplicates, _heldout, _overlap, _vocabulary, _control):
            found += rule(source)
        found += _epochs(data, source)
    return found


def warnings_of_prompts(plan: Plan, count: int) -> list[Finding]:
    """Warnings about the prompts of `t5like rl`."""
    size = plan.config.data.batch_size
    if count >= size:
        return []
    text = f"{count:,} prompts are fewer than data.batch_size={size}: a step repeats prompts; use more records"
    return [Finding("fewer_rows_than_a_batch", f"{text}, or data.batch_size={max(count, 1)}")]


def _fill(data: StepData, batch: dict[str, Any]) -> list[Finding]:
    """Sides of the whole batch that are mostly padding; single denoisers of a mixture may be, by their lengths."""
    found, config = [], data.plan.config
    for side in ("encoder", "decoder"):
        share = batch["fill"].get(side, {}).get("share", 1.0)
        if share >= LOWEST_FILL:
            continue
        field = "data.inputs_length" if side == "encoder" else "data.targets_length"
        if "supervised" in config.data.objective and not config.data.packing:
            remedy = f"use data.packing=True, or a smaller {field}"
        elif "causal_lm" in config.data.objective and side == "encoder":
            remedy = "use model.architecture=decoder, or objective prefix_lm"
        else:
            remedy = f"use a smaller {field}"
        least = min(batch["parts"], key=lambda part: part["fill"][side]["share"])
        where = f", {least['fill'][side]['share']:.1%} in rows of {least['source']}/{least['denoiser']}"
        text = f"rows are mostly padding: {share:.1%} of the {side}'s positions hold tokens"
        found.append(Finding("mostly_padding", f"{text}{where if len(batch['parts']) > 1 else ''}; {remedy}"))
    return found


def _duplicates(source: dict[str, Any]) -> list[Finding]:
    documents = sum(split["documents"] for split in source["counts"].values())
    duplicates, copies = source["duplicates"] or 0, source["train"]["copies"]
    if duplicates <= MOST_DUPLICATES * documents:
        return []
    text = (
        f"{source['name']}: {duplicates:,} of {documents:,} documents are exact copies of another one "
        f"({duplicates / documents:.1%}); remove the copies"
    )
    if copies["count"] > 1:
        text += f"; {copies['count']:,} of {source['train']['decoded']:,} are {_quoted(copies['text'])}"
    return [Finding("duplicates", text)]


def _heldout(source: dict[str, Any]) -> list[Finding]:
    count = source["counts"]["heldout"]["documents"]
    if count >= FEWEST_HELDOUT:
        return []
    total = count + source["counts"]["train"]["documents"]
    share = min(max(2 * FEWEST_HELDOUT / total, 0.01), 0.5)
    text = (
        f"{source['name']}: {count:,} of {total:,} documents are held out: their loss depends on which ones; use "
        f"data.heldout_fraction={share:.2g}" + ("" if total > 4 * FEWEST_HELDOUT else ", or more or smaller documents")
    )
    return [Finding("few_heldout_documents", text)]


def _overlap(source: dict[str, Any]) -> list[Finding]:
    overlap = source["overlap"]
    if overlap["copied"] <= MOST_COPIED * overlap["documents"]:
        return []
    text = (
        f"{source['name']}: {overlap['copied']:,} of {overlap['documents']:,} held-out documents occur, by half or "
        f"more, in the training text, such as {_quoted(overlap['example'])}: the held-out loss is too low; remove near "
        "copies"
    )
    return [Finding("heldout_overlap", text)]


def _vocabulary(source: dict[str, Any]) -> list[Finding]:
    found, counts = [], source["counts"]["train"]
    outside = (counts.get("unknown", 0) + counts.get("byte_fallback", 0)) / max(counts["tokens"], 1)
    scripts = [
        script
        for script in source["train"]["scripts"]
        if script["in_bytes"] > MOST_SCRIPT_IN_BYTES and script["share"] >= LEAST_SCRIPT
    ]
    remedy = "use a tokenizer that was trained on this text, a larger tokenizer.vocab_size or character_coverage"
    for script in scripts:
        text = (
            f"{source['name']}: {script['in_bytes']:.0%} of the {script['name']} letters ({script['share']:.1%} of all "
            f"letters) are single bytes, two or more tokens for a letter; {remedy}"
        )
        found.append(Finding("script_in_bytes", text))
    if outside > MOST_OUTSIDE:
        what = "unknown" if counts.get("unknown", 0) > counts.get("byte_fallback", 0) else "single bytes"
        text = f"{source['name']}: {outside:.1%} of the tokens are {what}, which the vocabulary lacks; {remedy}"
        found.append(Finding("outside_vocabulary", text))
    return found


def _control(source: dict[str, Any]) -> list[Finding]:
    control, decoded = source["train"]["control"], source["train"]["decoded"]
    if control["documents"] <= MOST_CONTROL * decoded:
        return []
    characters = ", ".join(f"{code} in {count:,}" for code, count in control["characters"])
    text = (
        f"{source['name']}: {control['documents']:,} of {decoded:,} documents have control or replacement characters "
        f"({characters}); remove them, or read the text with its right encoding"
    )
    return [Finding("control_characters", text)]


def _epochs(data: StepData, source: dict[str, Any]) -> list[Finding]:
    config, found = data.plan.config, []
    epochs = sum(each["epochs"] for each in source["epochs"])  # each denoiser reads the whole source
    most = MOST_EXAMPLE_EPOCHS if "supervised" in config.data.objective else MOST_EPOCHS
    if epochs > most:
        steps = max(int(config.train.num_steps * most / epochs), 1)
        rate = "a lower rate in data.rates, " if len(config.data.source) > 1 else ""
        text = (
            f"{source['name']} repeats {epochs:,.1f} times in the {config.train.num_steps:,} steps of the run; use "
            f"more text, {rate}or train.num_steps={steps}"
        )
        found.append(Finding("repeated_source", text))
    size, total = config.data.batch_size, data.batches.drawn_rows().sum()
    for each in source["epochs"]:
        rows = size * each["drawn"] / max(total, 1)  # of a batch, in the mean
        if each["rows"] < rows:
            text = (
                f"{source['name']}/{each['denoiser']} has {each['rows']:,} rows an epoch, fewer than its {rows:,.0f} "
                f"rows of a batch of {size:,}: a step repeats rows; use more documents, shorter rows, or a smaller "
                "data.batch_size"
            )
            found.append(Finding("fewer_rows_than_a_batch", text))
    return found


def _quoted(text: str) -> str:
    return f'"{printable(text, longest=60)}"'
