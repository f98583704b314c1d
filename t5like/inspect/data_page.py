"""The report of `t5like inspect data` as one page of HTML: warnings, rows token by token, and the sources.

Each token is a box: its colour says what it is, and its tooltip has its id, position, segment and weight.
"""

import itertools
import math
from typing import Any

from t5like.errors import printable
from t5like.inspect import charts
from t5like.inspect.data_text import counts_text, describe_sequence, folded, overlap_text, pieces
from t5like.inspect.html import Markup, details, element, facts, grid, notice, page, paragraph, table

MOST_TOKENS = 8_192  # of a sequence
OPEN_ROWS = 4  # rows that are not folded
LEGEND = (
    ("sentinel", "gap (sentinel)"),
    ("special", "special token"),
    ("byte", "single byte"),
    ("unknown", "unknown"),
    ("light", "no weight"),
    ("target", "target of a masked place"),
)
STYLE = """
.tokens { font: .85rem/1.9 ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  margin: .2rem 0 .7rem; }
.t { border: 1px solid var(--line); border-radius: .25rem; padding: .15rem .1rem; margin: 0 1px;
  background: var(--panel);
  box-decoration-break: clone; -webkit-box-decoration-break: clone; }
.sentinel { background: var(--c3); color: var(--page); border-color: var(--c3); }
.special { color: var(--c0); border-color: var(--c0); } .byte { color: var(--c4); border-color: var(--c4); }
.unknown { background: var(--bad); border-color: var(--bad-edge); }
.light { opacity: .5; border-style: dashed; } .target { background: var(--good); border-color: var(--good-edge); }
.segment { color: var(--soft); font-size: .8rem; margin-top: .3rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .2rem; } h4 { font-size: .9rem; margin: .6rem 0 0; font-weight: 600; }
h4 span { font-weight: 400; color: var(--soft); }
"""


def render(report: dict[str, Any]) -> str:
    """The page."""
    title = f"Data of step {report['step']:,}"
    sections = [
        ("", _summary(report)),
        ("Warnings", _warnings(report["warnings"])),
        ("Rows", _rows(report["rows"])),
        *((f"Source {source['name']}", _source(source)) for source in report["sources"]),
    ]
    return page(title, sections, style=STYLE)


def _summary(report: dict[str, Any]) -> Any:
    last = report["first_row"] + report["batch_size"] - 1
    pairs = [
        ("step", f"{report['step']:,} of {report['num_steps']:,}"),
        ("rows", f"{report['first_row']:,} to {last:,}; {len(report['rows'])} of {report['batch_size']:,} are shown"),
        ("tokenizer", f"{report['tokenizer']}, {report['vocab_size']:,} ids"),
        *(("note", note) for note in report["notes"]),
    ]
    parts = [facts(pairs)]
    if batch := report["batch"]:
        header = ["source", "denoiser", "rows", "encoder filled", "decoder filled", "targets with weight"]
        rows = [
            [part["source"], part["denoiser"], part["rows"], *_shares(part["fill"])]
            for part in [*batch["parts"], {"source": "all", "denoiser": "", "rows": batch["examined"], **batch}]
        ]
        parts.append(table(header, rows))
    return parts


def _shares(fill: dict[str, dict[str, float]]) -> list[str]:
    return [f"{fill[side]['share']:.1%}" if side in fill else "" for side in ("encoder", "decoder", "targets")]


def _warnings(warnings: list[dict[str, str]]) -> Any:
    return [notice("warning", each["text"]) for each in warnings] or notice("good", "No warning.")


# ---- Rows ----


def _rows(rows: list[dict[str, Any]]) -> Any:
    legend = paragraph([[element("span", name, class_=f"t {kind}"), " "] for kind, name in LEGEND])
    drawn = [_row(row) for row in rows]
    hidden = drawn[OPEN_ROWS:]
    return [legend, *drawn[:OPEN_ROWS], details(f"{len(hidden)} more rows", *hidden) if hidden else ""]


def _row(row: dict[str, Any]) -> Markup:
    follows = {True: ", the second text follows the first", False: ", the second text is another one", None: ""}
    name = f"Row {row['row']:,}: {row['source']}, {row['denoiser']}{follows[row.get('second_text_follows')]}"
    return element("div", element("h3", name), [_sequence(sequence) for sequence in row["sequences"]])


def _sequence(sequence: dict[str, Any]) -> Markup:
    head = element("h4", sequence["name"], " ", element("span", describe_sequence(sequence)))
    segments = sequence["segments"]
    if len([each for each in segments if each["segment"]]) < 2:
        return element("div", head, _tokens(sequence, 0, len(sequence["ids"]), None))
    parts = []
    for each in segments:
        label = f"segment {each['segment']}" if each["segment"] else "padding"
        where = f"positions {each['first_position']} to {each['last_position']}"
        parts.append(element("div", f"{label}: {each['tokens']} tokens, {where}", class_="segment"))
        parts.append(_tokens(sequence, each["start"], each["start"] + each["tokens"], each["segment"]))
    return element("div", head, parts)


def _tokens(sequence: dict[str, Any], start: int, stop: int, segment: int | None) -> Markup:
    shown = list(itertools.islice(pieces(sequence, start, stop), MOST_TOKENS))
    end = shown[-1][1] if shown else stop
    tokens = [
        _token(sequence, index, segment) if after == index + 1 else [_folded(index, after)] for index, after in shown
    ]
    if end < stop:
        tokens.append(f" ... and {stop - end:,} tokens more")
    return element("div", tokens, class_="tokens")


def _folded(start: int, stop: int) -> Markup:
    title = f"indices {start} to {stop - 1}, weight 0"
    return element("span", folded(stop - start), class_="t light", title=title)


def _token(sequence: dict[str, Any], index: int, segment: int | None) -> list[Markup]:
    text, kind = printable(sequence["texts"][index]), sequence["kinds"][index]
    facts_of = [f"index {index}", f"id {sequence['ids'][index]}"]
    if segment is not None:
        facts_of.append(f"segment {segment}")
    if "reads" in sequence:
        facts_of.append(f"the decoder reads {printable(sequence['reads'][index])!r}")
    classes, target = ["t", kind], sequence.get("targets", {}) and sequence["targets"][index]
    if "weights" in sequence:
        weight = sequence["weights"][index]
        facts_of.append(f"weight {weight:g}")
        if not weight > 0 and "targets" not in sequence:
            classes.append("light")
    boxes = [element("span", text, class_=" ".join(classes), title=", ".join(facts_of))]
    if target:
        boxes.append(element("span", printable(target), class_="t target", title="target of the place before"))
    return boxes


# ---- Sources ----


def _source(source: dict[str, Any]) -> Any:
    train = source["train"]
    bins = train["lengths"]["histogram"]
    edges = [math.log2(low) if low else -1.0 for low, _, _ in bins] + [math.log2(high + 1) for _, high, _ in bins[-1:]]
    counts = [count for *_, count in bins]
    lengths = charts.histogram("Lengths of documents", edges, counts, x="log2 of the tokens", y="documents")
    scripts = charts.shares("Letters by script", {each["name"]: each["share"] for each in train["scripts"][:8]})
    epochs = [
        (each["denoiser"], f"{each['rows']:,} rows an epoch, {each['epochs']:,.2f} epochs in the run")
        for each in source["epochs"]
    ]
    return [
        facts(
            [
                ("source", source["spec"]),
                ("documents", counts_text(source)),
                ("held out", overlap_text(source["counts"]["heldout"], source["overlap"])),
                *epochs,
            ]
        ),
        grid(lengths, scripts),
        details(
            "Longest documents",
            table(["tokens", "text"], [[each["tokens"], printable(each["text"])] for each in train["longest"]]),
        ),
        details(
            "Oddest documents: the most nats per character, if each character has its frequency in this source",
            table(
                ["nats", "text"],
                [[round(each["nats_per_character"], 2), printable(each["text"])] for each in train["oddest"]],
            ),
        ),
    ]
