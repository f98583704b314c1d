"""Prompts of `t5like generate`: one prompt, a file of prompts, or lines of standard input.

`cli.commands` calls this module; `inference.generate` generates the text. Predictions for a file are written in the
order of its rows, a window at a time, so that a killed command continues where it stopped. A row's prediction depends
only on the row, its number and the settings.
"""

import dataclasses
import errno
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from t5like.data.sources.lines import parse_json_line, read_json_lines
from t5like.errors import CheckpointError, ConfigError, DataError, UserError
from t5like.inference.generate import Answer, Generator
from t5like.inference.infilling import completed
from t5like.inference.sampling import DecodingOptions
from t5like.io.atomic import replace_file
from t5like.io.strict_json import loads
from t5like.metrics.progress import Progress

BATCH_SIZE = 32  # prompts of one call
WINDOW = 8 * BATCH_SIZE  # prompts that are sorted by length, batched, and written together
OUTPUT_FIELDS = ("prediction", "filled", "log_prob", "num_tokens", "predictions")  # added to each row


def print_prediction(generator: Generator, decoding: DecodingOptions, prompt: str) -> None:
    """Print the prediction for a prompt, or several predictions with their log-probabilities."""
    answers = _generate(generator, decoding, prompt)
    for answer in answers:
        text = _filled(generator, prompt, answer.text)
        print(f"{answer.log_prob:.3f}\t{text}" if len(answers) > 1 else text, flush=True)


def interactive(generator: Generator, decoding: DecodingOptions) -> None:
    """Read standard input to its end, and print the prediction for each line.

    Raises:
        DataError: it is not UTF-8, or it is no terminal and has no lines.
    """
    terminal, any_line = sys.stdin.isatty(), False
    while True:
        if terminal:
            print("> ", end="", flush=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError:
            raise DataError("standard input is not UTF-8; convert it, or use --prompts_file") from None
        if not line:
            if not (terminal or any_line):
                raise DataError("standard input has no prompts; write one in each line, or use --prompt=TEXT")
            return
        any_line = True
        try:
            print_prediction(generator, decoding, line.rstrip("\r\n"))
        except UserError as error:
            if not terminal:
                raise
            print(f"t5like: {error}", file=sys.stderr)


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a file of prompts; blank lines are skipped.

    Raises:
        DataError: the file can't be read, or a line is not a row with a prompt; with the line number.
    """
    rows = []
    for row, where in read_json_lines(path, "--prompts_file"):
        if not isinstance(row.get("prompt"), str):
            raise DataError(f'--prompts_file={where} must have a text in "prompt"; as in {{"prompt": "a text"}}')
        if taken := [name for name in OUTPUT_FIELDS if name in row]:
            raise DataError(f'--prompts_file={where} already has a "{taken[0]}"; rename that field')
        rows.append(row)
    if not rows:
        raise DataError(f'--prompts_file={path} has no prompts; a line is one, as in {{"prompt": "a text"}}')
    return rows


def generate_file(
    generator: Generator,
    decoding: DecodingOptions,
    path: Path,
    rows: Sequence[dict[str, Any]],
    output: Path | None,
    source: dict[str, Any],
) -> None:
    """Write the rows of a file with their predictions, in order, to a file or standard output; keep existing rows.

    Args:
        generator: the model.
        decoding: the decoding options.
        path: the file of the rows, for messages.
        rows: from `read_prompts`.
        output: the JSON lines file to write or continue; None: standard output.
        source: run and step. They are written beside the output with the decoding options; an output continues only
            with the same ones.

    Raises:
        DataError: a prompt is too long or not allowed, or the output has rows of other prompts.
        ConfigError: the output was started with another model or other options.
        CheckpointError: the output can't be written.
    """
    if output is not None:
        check_output(output, path)
    prompts = []
    for number, row in enumerate(rows, 1):
        try:
            if generator.config.model.has_decoder:
                prompts.append(generator.prompt(row["prompt"]))
                generator.check(prompts[-1], decoding)
        except UserError as error:
            raise type(error)(f"--prompts_file={path}: prompt {number}: {error}") from None
    if output is None:
        for window in _predict_windows(generator, decoding, rows, prompts, 0):
            print(_json_lines(window), end="", flush=True)
        return
    try:
        done, rest = _resume(output, rows, {**source, "decoding": dataclasses.asdict(decoding)})
        bar, written = Progress(len(rows), step=done, unit="prompt"), done
        with open(output, "ab") as file, bar:
            update = bar.timed()
            for window in _predict_windows(generator, decoding, rows, prompts, done):
                text = _json_lines(window).encode()
                if not text.startswith(rest):
                    raise DataError(
                        f"--output={output}:{done + 1} has no end, and is not the beginning of the row that belongs "
                        "there; remove that line, or use another --output"
                    )
                _write(file, text[len(rest) :])
                rest = b""
                update(written := written + len(window))
    except OSError as error:
        raise CheckpointError(f"--output={output} can't be written: {error.strerror}; use another --output") from None
    print(f"predictions  {output}: {len(rows)} rows" + (f", {done} of them kept" if done else ""))


def _predict_windows(generator, decoding, rows, prompts, begin: int) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows from index `begin` with their predictions, a window at a time."""
    if generator.config.model.architecture == "encoder":
        for row in rows[begin:]:
            yield [{**row, "prediction": generator([row["prompt"]])[0]}]
        return
    for first in range(begin, len(rows), WINDOW):
        numbers = range(first, min(first + WINDOW, len(rows)))
        by_length = sorted(numbers, key=lambda number: len(prompts[number].ids))
        predictions: dict[int, list[Answer]] = {}
        for start in range(0, len(by_length), BATCH_SIZE):
            batch = by_length[start : start + BATCH_SIZE]
            padding = batch[:1] * (min(BATCH_SIZE, len(rows)) - len(batch))  # one shape for all calls
            padded = batch + padding
            answers = generator.answer([prompts[number] for number in padded], decoding, rows=padded)
            predictions |= dict(zip(batch, answers[: len(batch)], strict=True))
        yield [_output_row(generator, rows[number], predictions[number]) for number in numbers]


def _output_row(generator: Generator, row: dict[str, Any], answers: Sequence[Answer]) -> dict[str, Any]:
    def values(answer: Answer) -> dict[str, Any]:
        filled = {}
        if "<extra_id_" in row["prompt"]:
            filled = {"filled": _filled(generator, row["prompt"], answer.text)}
        return {
            "prediction": answer.text,
            **filled,
            "log_prob": round(answer.log_prob, 5),
            "num_tokens": len(answer.ids),
        }

    several = {"predictions": [values(answer) for answer in answers]} if len(answers) > 1 else {}
    return {**row, **values(answers[0]), **several}


def _generate(generator: Generator, decoding: DecodingOptions, prompt: str) -> list[Answer]:
    if generator.config.model.architecture == "encoder":
        return [Answer(generator([prompt])[0], [], 0.0, [])]
    return generator.answer([generator.prompt(prompt)], decoding)[0]


def _filled(generator: Generator, prompt: str, text: str) -> str:
    """The prompt with its <extra_id_N> spans replaced, if it has any; else the generated text."""
    return completed(prompt, text) if generator.config.model.has_decoder else text


# ---- Files ----


def check_output(output: Path, prompts: Path) -> None:
    """Refuse an output that would overwrite the prompts, or is not a regular file.

    Raises:
        ConfigError: the output, or the file of settings beside it, is the file of prompts.
        CheckpointError: the output is a directory, a device or similar, or can't be written.
    """
    try:
        for path in (output, _settings_of(output)):
            if path.exists() and path.samefile(prompts.expanduser()):
                raise ConfigError(f"--output={output} would write into --prompts_file={prompts}; use another --output")
        if not output.name or (output.exists() and not output.is_file()):
            raise CheckpointError(f"--output={output} is not a regular file; use another --output, or none to print")
        if output.exists() and not os.access(output, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise CheckpointError(f"--output={output} can't be written: {error.strerror}; use another --output") from None


def _settings_of(output: Path) -> Path:
    return output.parent / f"{output.name}.settings.json"


def _resume(output: Path, rows: Sequence[dict[str, Any]], settings: dict[str, Any]) -> tuple[int, bytes]:
    """Prepare an output for appending; return the number of its rows, and the beginning of the next one.

    Existing bytes do not change. A last line without a newline gets one if it is a complete row. It is returned if it
    may be the beginning of the next row, as a killed command leaves it.

    Raises:
        DataError, ConfigError: see `generate_file`.
    """
    beside = _settings_of(output)
    settings = json.loads(json.dumps(settings))
    content = output.read_bytes() if output.exists() else b""
    known = _refuse_other_settings(output, beside, settings, begun=bool(content))
    complete = content.rfind(b"\n") + 1
    count, last = content.count(b"\n"), content[complete:]
    truncated = count < len(rows) and _is_beginning(last, rows[count])
    lines = (content[:complete] if truncated else content).split(b"\n")
    for number, line in enumerate(lines if lines[-1] else lines[:-1], 1):
        row = parse_json_line(line, f"--output={output}:{number}").fields
        kept = {name: row.get(name) for name in row if name not in OUTPUT_FIELDS}
        if "prediction" not in row or number > len(rows) or _json_lines([kept]) != _json_lines([rows[number - 1]]):
            raise DataError(
                f"--output={output}:{number} has another prompt than that line of --prompts_file; use another --output"
            )
    if content and not known:
        raise DataError(
            f"--output={output} has predictions, but {beside.name} with their settings does not exist; "
            "use another --output"
        )
    if last and not truncated:
        with open(output, "ab") as file:
            file.write(b"\n")
        count += 1
    if count == 0:  # replaces the settings of an output that was removed
        replace_file(beside, json.dumps(settings, indent=1) + "\n")
    return count, last if truncated else b""


def _is_beginning(line: bytes, row: dict[str, Any]) -> bool:
    """Whether a line without a newline is an incomplete output row of `row`."""
    try:
        loads(line)
        return False  # complete but for its newline, or not from t5like
    except ValueError:
        written = _json_lines([row]).encode().removesuffix(b"}\n")
        return line[: len(written)] == written[: len(line)]


def _refuse_other_settings(output: Path, beside: Path, settings: dict[str, Any], *, begun: bool) -> bool:
    """Whether the file of settings beside an output exists; refuse settings that differ from those of today.

    Args:
        output: the output.
        beside: the file of settings.
        settings: run, step and decoding options of this command.
        begun: whether the output has rows.
    """
    try:
        saved = loads(beside.read_bytes())
        before = {name: saved.get(name) for name in settings}, dict(saved["decoding"])
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{beside} is not a file of settings from t5like; remove it, or use another --output") from None
    for was, now in zip(before, (settings, settings["decoding"]), strict=True):
        for name, value in now.items():
            if begun and name != "decoding" and was.get(name) != value:
                raise ConfigError(
                    f"--output={output} was started with {name}={was.get(name)}, which is now {value}; "
                    "use another --output"
                )
    return True


def _json_lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write(file: BinaryIO, text: bytes) -> None:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
