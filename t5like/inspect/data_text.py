"""The report of `t5like inspect data` on a terminal: coloured, or plain text where colours can't be shown.

    row 12  wiki/span_corruption
      encoder  9 of 9 tokens
               A│ <extra_id_0>│ D│ E│ F│ <extra_id_1>│</s>
      targets  6 of 6 positions have a target

Tokens are separated by a line, and sentinels stand where the gaps are. Without colours, tokens without weight are in
parentheses; several such positions in a row are only counted. A masked place of an encoder-only row is followed by its
target in braces.
"""

import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any

from t5like.errors import printable

SEPARATOR = "│"
MOST_TOKENS = 1_200  # of a sequence on a terminal
FEWEST_FOLDED = 2  # positions without a target in a row, which are counted instead of shown
WIDTH = 110  # of plain text
INDENT = 11
STYLES = {"sentinel": "bold magenta", "special": "cyan", "unknown": "bold red", "byte": "yellow", "text": ""}
NO_WEIGHT = "dim"
TARGET = "bold green"
BAR = 40  # widest bar of a histogram, in characters

Part = tuple[str, str]  # text and style
Line = list[Part]


def show(report: dict[str, Any]) -> None:
    """Print a report to standard output."""
    from rich import console, text

    screen = console.Console(highlight=False, markup=False, emoji=False)
    colours = screen.is_terminal and not os.environ.get("NO_COLOR") and screen.color_system is not None
    for line in lines(report, width=min(screen.width, 160) if screen.is_terminal else WIDTH, plain=not colours):
        if colours:
            screen.print(text.Text.assemble(*line), soft_wrap=True)
        else:
            print("".join(part for part, _ in line))


def lines(report: dict[str, Any], *, width: int, plain: bool) -> Iterator[Line]:
    """The lines of a report; `plain`: without styles, with signs for what they would say."""
    yield from _header(report)
    for row in report["rows"]:
        yield []
        yield from _row(row, width, plain)
    for source in report["sources"]:
        yield []
        yield from _source(source)
    yield []
    if not report["warnings"]:
        yield [("warnings   none", "green")]
    for warning in report["warnings"]:
        yield [("warning    ", "bold red"), (printable(warning["text"]), "")]


def _header(report: dict[str, Any]) -> Iterator[Line]:
    last = report["first_row"] + report["batch_size"] - 1
    yield [
        ("step       ", "bold"),
        (f"{report['step']:,} of {report['num_steps']:,}: rows {report['first_row']:,} to {last:,}", ""),
        (f" ({len(report['rows'])} of {report['batch_size']:,} are shown)", ""),
    ]
    yield [("tokenizer  ", "bold"), (printable(f"{report['tokenizer']}, {report['vocab_size']:,} ids"), "")]
    for note in report["notes"]:
        yield [("note       ", "bold"), (printable(note), "")]
    if batch := report["batch"]:
        examined = "" if batch["examined"] == batch["rows"] else f" (measured on {batch['examined']:,} rows)"
        yield [("batch      ", "bold"), (f"{_fill(batch['fill'])}{examined}", "")]
        for part in batch["parts"] if len(batch["parts"]) > 1 else ():
            name = printable(f"{part['source']}/{part['denoiser']}")
            yield [("           ", ""), (f"{name}: {part['rows']:,} rows, {_fill(part['fill'])}", "")]


def _fill(fill: dict[str, dict[str, float]]) -> str:
    parts = []
    for side, values in fill.items():
        kind = "with weight" if side == "targets" else "filled"
        text = f"{side} {values['tokens']:,} of {values['positions']:,} positions {kind} ({values['share']:.1%})"
        if values.get("tokens_per_segment"):
            text += f", {values['tokens_per_segment']:,.1f} tokens per segment"
        parts.append(text)
    return "; ".join(parts)


# ---- Rows ----


def _row(row: dict[str, Any], width: int, plain: bool) -> Iterator[Line]:
    follows = {True: ", the second text follows the first", False: ", the second text is another one", None: ""}
    name = printable(f"{row['source']}/{row['denoiser']}")
    if row["objective"] != row["denoiser"]:
        name += f" ({row['objective']})"
    yield [(f"row {row['row']:,}  {name}{follows[row.get('second_text_follows')]}", "bold")]
    for sequence in row["sequences"]:
        yield [(f"  {sequence['name']:9}", "bold"), (describe_sequence(sequence), "dim")]
        segments = sequence["segments"]
        if len([each for each in segments if each["segment"]]) < 2:
            yield from _tokens(sequence, 0, len(sequence["ids"]), width, plain)
            continue
        for each in segments:
            where = f"positions {each['first_position']} to {each['last_position']}"
            label = f"segment {each['segment']}" if each["segment"] else "padding"
            yield [(" " * INDENT, ""), (f"{label}: {each['tokens']} tokens, {where}", "dim")]
            yield from _tokens(sequence, each["start"], each["start"] + each["tokens"], width, plain)


def describe_sequence(sequence: dict[str, Any]) -> str:
    """Fill of a sequence in words."""
    if has_targets := _is_of_targets(sequence):
        text = f"{sequence['weighted']:,} of {sequence['length']:,} positions have a target"
    else:
        text = f"{sequence['tokens']:,} of {sequence['length']:,} positions filled"
    if waste := sequence["length"] - sequence["tokens"]:
        text += f", {waste:,} padding ({waste / sequence['length']:.1%})"
    if "weighted" in sequence and not has_targets:
        text += f", {sequence['weighted']:,} with weight"
    if sequence.get("prefix"):
        text += f", a prefix of {sequence['prefix']:,} visible to all"
    return text


def _tokens(sequence: dict[str, Any], start: int, stop: int, width: int, plain: bool) -> Iterator[Line]:
    """Tokens with separators, in lines of at most `width` characters."""
    shown = list(itertools.islice(pieces(sequence, start, stop), MOST_TOKENS))
    end, line, used = shown[-1][1] if shown else stop, [], 0
    for index, after in shown:
        parts = token_parts(sequence, index, plain) if after == index + 1 else [(folded(after - index), NO_WEIGHT)]
        if after < end:
            parts = [*parts, (SEPARATOR, NO_WEIGHT)]
        size = sum(len(text) for text, _ in parts)
        if line and used + size > width - INDENT:
            yield [(" " * INDENT, ""), *line]
            line, used = [], 0
        line += parts
        used += size
    if line:
        yield [(" " * INDENT, ""), *line]
    if end < stop:
        yield [(" " * INDENT, ""), (f"... and {stop - end:,} tokens more, which --html shows", "dim")]


def _is_of_targets(sequence: dict[str, Any]) -> bool:
    """Whether a sequence has a target at each position with weight; masked places have targets beside their tokens."""
    return "weights" in sequence and "targets" not in sequence


def pieces(sequence: dict[str, Any], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """First index and end of what is shown as one: a token, or `FEWEST_FOLDED` or more positions without a target."""
    weights = sequence["weights"] if _is_of_targets(sequence) else [1.0] * stop
    for light, run in itertools.groupby(range(start, stop), lambda index: not weights[index] > 0):
        indices = list(run)
        if light and len(indices) >= FEWEST_FOLDED:
            yield indices[0], indices[-1] + 1
        else:
            yield from ((index, index + 1) for index in indices)


def folded(count: int) -> str:
    """What stands for positions without a target."""
    return f"({count:,} positions without a target)"


def token_parts(sequence: dict[str, Any], index: int, plain: bool) -> Line:
    """One token, with its target if it is at a masked place."""
    text, style = printable(sequence["texts"][index]), STYLES[sequence["kinds"][index]]
    targets = sequence.get("targets")
    if targets:
        target = targets[index]
        return [(text, style)] if target is None else [(text, style), (f"{{{printable(target)}}}", TARGET)]
    if sequence.get("weights") and not sequence["weights"][index] > 0:
        return [(f"({text})", "") if plain else (text, f"{style} {NO_WEIGHT}".strip())]
    return [(text, style)]


# ---- Sources ----


def _source(source: dict[str, Any]) -> Iterator[Line]:
    counts, train, overlap = source["counts"], source["train"], source["overlap"]
    name = printable(source["name"])
    yield [("source     ", "bold"), (f"{name}: {counts_text(source)}", "")]
    for each in source["epochs"]:
        efficiency = f", packing efficiency {each['packing_efficiency']:.0%}" if "packing_efficiency" in each else ""
        text = (
            f"{each['denoiser']}: {each['rows']:,} rows an epoch, {each['epochs']:,.2f} epochs in the run{efficiency}"
        )
        yield [("           ", ""), (printable(text), "")]
    yield [("held out   ", "bold"), (overlap_text(counts["heldout"], overlap), "")]
    lengths = train["lengths"]
    measured = "" if train["measured"] == train["documents"] else f", measured on {train['measured']:,} documents"
    text = (
        f"median {lengths['median']:,.0f}, mean {lengths['mean']:,.1f}, longest {lengths['longest']:,} tokens{measured}"
    )
    yield [("lengths    ", "bold"), (text, "")]
    yield from _histogram(lengths["histogram"])
    for title, key in (("longest", "longest"), ("oddest", "oddest")):
        what = "documents with the most nats per character; characters have their frequency in this source"
        yield [(f"{title:11}", "bold"), ("documents with the most tokens" if key == "longest" else what, "")]
        for document in train[key]:
            number = f"{document['nats_per_character']:.2f}" if key == "oddest" else f"{document['tokens']:,}"
            yield [(f"{number:>10} ", ""), (printable(document["text"]), "dim")]


def counts_text(source: dict[str, Any]) -> str:
    """Documents, tokens and fit of the tokenizer of one source, in words."""
    counts, train = source["counts"]["train"], source["train"]
    total = max(counts["tokens"], 1)
    parts = [f"{counts['documents']:,} documents, {counts['tokens']:,} tokens"]
    parts.append(f"{train['characters_per_token']:.2f} characters per token")
    if "unknown" in counts:
        parts.append(f"{counts['unknown'] / total:.2%} unknown, {counts['byte_fallback'] / total:.2%} in bytes")
    if source["duplicates"] is not None:
        parts.append(f"{source['duplicates']:,} exact duplicates")
    if train["scripts"]:
        parts.append("letters " + ", ".join(f"{each['name']} {each['share']:.1%}" for each in train["scripts"][:4]))
    if train["decoded"] < train["documents"]:
        parts.append(f"characters from {train['decoded']:,} documents")
    return "; ".join(parts)


def overlap_text(heldout: dict[str, int], overlap: dict[str, Any]) -> str:
    """Held-out documents and how many of them occur in the training text, in words."""
    text = f"{heldout['documents']:,} documents, {heldout['tokens']:,} tokens"
    if not overlap["documents"]:
        return f"{text}; too short for a search of runs of 13 tokens"
    share = overlap["searched"] / max(overlap["training_tokens"], 1)
    searched = "" if share >= 1 else f", in {share:.1%} of the training tokens"
    return (
        f"{text}; {overlap['copied']:,} of {overlap['documents']:,} occur by half or more in the training text (runs "
        f"of 13 tokens{searched})"
    )


def _histogram(bins: Iterable[list[int]]) -> Iterator[Line]:
    bins = list(bins)
    most = max((count for *_, count in bins), default=0)
    labels = [f"{low:,}" if low == high else f"{low:,}-{high:,}" for low, high, _ in bins]
    wide = max(map(len, labels), default=0)
    for label, (_, _, count) in zip(labels, bins, strict=True):
        eighths = round(8 * BAR * count / max(most, 1))
        bar = "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]
        bar = bar or ("▏" if count else "")
        yield [(" " * INDENT, ""), (f"{label:>{wide}} ", "dim"), (bar, "blue"), (f" {count:,}", "")]
