"""`t5like generate` behind its flags: one prompt, a file of prompts, or a conversation on standard input.

Called by `main`; `generate` makes the answers. A file's answers are written in its order, some dozens at a time, so
that a killed command continues where it was. A row's answer depends on the row, its number and the settings alone.
"""

import dataclasses
import errno
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from t5like.data.sources.lines import read_json_lines
from t5like.errors import CheckpointError, ConfigError, DataError, UserError
from t5like.inference.generate import Answer, Generator
from t5like.inference.infilling import fill
from t5like.inference.sampling import DecodingOptions
from t5like.io.atomic import replace_file
from t5like.io.strict_json import InvalidJSON, loads
from t5like.metrics.progress import Progress

ROWS = 32  # prompts of one call
WINDOW = 8 * ROWS  # prompts that are ordered by length before they are answered, and written together
MADE = ("prediction", "filled", "log_prob", "num_tokens", "predictions")  # fields of an answered row


def show(generator: Generator, decoding: DecodingOptions, prompt: str) -> None:
    """Print the answer to a prompt, or several with their log-probabilities."""
    answers = _answers(generator, decoding, prompt)
    for answer in answers:
        text = _filled(generator, prompt, answer.text)
        print(f"{answer.log_prob:.3f}\t{text}" if len(answers) > 1 else text, flush=True)


def converse(generator: Generator, decoding: DecodingOptions) -> None:
    """Answer each line of standard input, until it ends."""
    typed = sys.stdin.isatty()
    while True:
        if typed:
            print("> ", end="", flush=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError:
            raise DataError("standard input is not UTF-8; send it as that, or use --prompts_file") from None
        if not line:
            return
        try:
            show(generator, decoding, line.rstrip("\r\n"))
        except UserError as error:
            if not typed:
                raise
            print(f"t5like: {error}", file=sys.stderr)


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of prompts; blank lines are none.

    Raises:
        DataError: it can't be read, or a line is not as it must be; with its number.
    """
    rows = []
    for row, where in read_json_lines(path, "--prompts_file"):
        if not isinstance(row.get("prompt"), str):
            raise DataError(f'--prompts_file={where} must have a text in "prompt"; as in {{"prompt": "a text"}}')
        if taken := [name for name in MADE if name in row]:
            raise DataError(f'--prompts_file={where} already has a "{taken[0]}"; rename that field')
        rows.append(row)
    if not rows:
        raise DataError(f'--prompts_file={path} has no prompts; a line is one, as in {{"prompt": "a text"}}')
    return rows


def answer_file(
    generator: Generator,
    decoding: DecodingOptions,
    path: Path,
    rows: Sequence[dict[str, Any]],
    output: Path | None,
    made_by: dict[str, Any],
) -> None:
    """Answer a file's rows, in order, into a file (or to standard output); what stands there already is kept.

    Args:
        generator: the model.
        decoding: how.
        path: where the rows are from, for messages.
        rows: of `read_prompts`.
        output: JSON lines, each a row and what was made of it.
        made_by: what else the answers depend on; kept beside the output, and refused to change, as are the settings.

    Raises:
        DataError: a prompt can't be answered, or the output has rows of other prompts.
        ConfigError: the output was begun with other settings.
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
        for answered in _answered(generator, decoding, rows, prompts, 0):
            print(_text(answered), end="", flush=True)
        return
    try:
        done = _kept(output, rows, {**made_by, "decoding": dataclasses.asdict(decoding)})
        bar, written = Progress(len(rows), step=done, unit="prompt"), done
        with open(output, "a", encoding="utf-8") as file, bar:
            show = bar.timed()
            for answered in _answered(generator, decoding, rows, prompts, done):
                _write(file, _text(answered))
                show(written := written + len(answered))
    except OSError as error:
        raise CheckpointError(f"--output={output} can't be written: {error.strerror}; use another --output") from None
    print(f"answers  {output}: {len(rows)} rows" + (f", {done} of them kept" if done else ""))


def _answered(generator, decoding, rows, prompts, begin: int) -> Iterator[list[dict[str, Any]]]:
    """The rows from `begin` on with their answers, a window at a time."""
    if generator.config.model.architecture == "encoder":
        for row in rows[begin:]:
            yield [{**row, "prediction": generator([row["prompt"]])[0]}]
        return
    for first in range(begin, len(rows), WINDOW):
        numbers = range(first, min(first + WINDOW, len(rows)))
        by_length = sorted(numbers, key=lambda number: len(prompts[number].ids))
        found: dict[int, list[Answer]] = {}
        for start in range(0, len(by_length), ROWS):
            some = by_length[start : start + ROWS]
            filled = some + some[:1] * (ROWS - len(some) if len(rows) > ROWS else 0)  # one shape for all calls
            answers = generator.answer([prompts[number] for number in filled], decoding, rows=filled)
            found |= dict(zip(some, answers[: len(some)], strict=True))
        yield [_row(generator, rows[number], found[number]) for number in numbers]


def _row(generator: Generator, row: dict[str, Any], answers: Sequence[Answer]) -> dict[str, Any]:
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


def _answers(generator: Generator, decoding: DecodingOptions, prompt: str) -> list[Answer]:
    if generator.config.model.architecture == "encoder":
        return [Answer(generator([prompt])[0], [], 0.0, [])]
    return generator.answer([generator.prompt(prompt)], decoding)[0]


def _filled(generator: Generator, prompt: str, text: str) -> str:
    """The prompt with its gaps filled, if it has any; else the answer."""
    gaps = "<extra_id_" in prompt and generator.config.model.has_decoder
    return fill(prompt, text) if gaps else text


# ---- Files ----


def check_output(output: Path, prompts: Path) -> None:
    """Refuse an output that is not a file of its own.

    Raises:
        ConfigError: it, or the file of settings beside it, is the file of prompts.
        CheckpointError: it is a directory, a device or the like, or can't be written.
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


def _kept(output: Path, rows: Sequence[dict[str, Any]], settings: dict[str, Any]) -> int:
    """Make ready to append to an output; the number of rows that it has.

    No line that is there changes. A last line without a newline gets one where it is a whole answer. It goes where it
    is the beginning of the next one, as a killed command leaves it.

    Raises:
        DataError, ConfigError: see `answer_file`.
    """
    beside = _settings_of(output)
    settings = json.loads(json.dumps(settings))
    content = output.read_bytes() if output.exists() else b""
    known = _refuse_other_settings(output, beside, settings, begun=bool(content))
    whole = content.rfind(b"\n") + 1
    count, unfinished = content.count(b"\n"), content[whole:]
    started = count < len(rows) and _is_beginning(unfinished, rows[count])
    for number, line in _lines(output, "--output", content[:whole] if started else content):
        row = _parsed(output, number, line, "--output")
        kept = {name: row.get(name) for name in row if name not in MADE}
        if "prediction" not in row or number > len(rows) or _text([kept]) != _text([rows[number - 1]]):
            raise DataError(
                f"--output={output}: line {number} answers another prompt than --prompts_file has there; "
                "use another --output"
            )
    if content and not known:
        raise DataError(
            f"--output={output} has answers, but {beside.name}, which says how they were made, is not there; "
            "use another --output"
        )
    if unfinished and started:
        os.truncate(output, whole)
    elif unfinished:
        with open(output, "ab") as file:
            file.write(b"\n")
        count += 1
    if count == 0:  # settings of an output that is gone say nothing
        replace_file(beside, json.dumps(settings, indent=1) + "\n")
    return count


def _is_beginning(unfinished: bytes, row: dict[str, Any]) -> bool:
    """Whether a line without an end is the first part, and not all, of what is written for a row."""
    try:
        loads(unfinished)
        return False  # whole but for its newline, or not ours
    except ValueError:
        written = _text([row]).encode().removesuffix(b"}\n")
        return unfinished[: len(written)] == written[: len(unfinished)]


def _refuse_other_settings(output: Path, beside: Path, settings: dict[str, Any], *, begun: bool) -> bool:
    """Whether the file beside an output says how its answers were made; refused if that is not as they are now."""
    try:
        before = loads(beside.read_bytes())
        made_by = {name: before.get(name) for name in settings}, dict(before["decoding"])
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{beside} is not what t5like wrote there; remove it, or use another --output") from None
    for was, now in zip(made_by, (settings, settings["decoding"]), strict=True):
        for name, value in now.items():
            if begun and name != "decoding" and was.get(name) != value:
                raise ConfigError(
                    f"--output={output} was begun with {name}={was.get(name)}, which is now {value}; "
                    "use another --output"
                )
    return True


def _lines(path: Path, flag: str, content: bytes) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(content.split(b"\n"), 1):
        if number == content.count(b"\n") + 1 and not line:
            return
        try:
            yield number, line.decode()
        except UnicodeDecodeError:
            raise DataError(f"{flag}={path}: line {number} is not UTF-8; save the file as that") from None


def _parsed(path: Path, number: int, line: str, flag: str) -> dict[str, Any]:
    try:
        row = loads(line)
    except InvalidJSON as error:
        raise DataError(f"{flag}={path}: line {number} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f'{flag}={path}: line {number} must be an object, as in {{"prompt": "a text"}}')
    return row


def _text(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write(file: TextIO, text: str) -> None:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
