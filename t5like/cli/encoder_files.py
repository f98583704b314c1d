"""`t5like predict` and `t5like embed`: labels and embeddings of the lines of a file or of standard input.

A line is a text; of a model that reads pairs, two texts with a tab between them. `inference.encoder_rows` computes.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np

from t5like.checkpoint.run_directory import Run
from t5like.data.sources.encoding import decode_utf8
from t5like.errors import CheckpointError, ConfigError, DataError
from t5like.evaluation import label_eval
from t5like.inference import encoder_rows
from t5like.inference.encoder_rows import EncoderRow
from t5like.io.atomic import atomic_write
from t5like.io.regular_files import reading
from t5like.metrics.progress import Progress

REMEDY = "use another --output"


def predict(run: Run, inputs: Path | None, output: Path | None) -> None:
    """Write a JSON line for each line of the inputs: its text, and what the model predicts.

    Args:
        run: a model with a head for labels.
        inputs: a text file; None: standard input.
        output: the file to write; None: standard output.

    Raises:
        ConfigError: the model has no such head, or a line is too long for it or has another number of texts.
        DataError: the inputs can't be read.
        CheckpointError: the output can't be written.
    """
    label_eval.check_labels(run.config)
    texts, rows = _rows(run, inputs)
    with Progress(len(rows), unit="text") as progress, jax.set_mesh(run.mesh):
        outputs = encoder_rows.label_outputs(run.config, run.params, rows, progress.timed())
    records = (
        {**text, **label_eval.prediction(run.config, values, row)}
        for text, values, row in zip(texts, outputs, rows, strict=True)
    )
    _write_lines(records, output)


def embed(run: Run, inputs: Path | None, output: Path) -> None:
    """Write an embedding for each line of the inputs: rows of a .npy file, float32, or JSON lines.

    Arguments and errors as in `predict`; the model may be any with an encoder.
    """
    if output.suffix not in (".npy", ".jsonl"):
        raise ConfigError(f"--output={output} must end in .npy or .jsonl; use --output=embeddings.npy")
    texts, rows = _rows(run, inputs)
    with Progress(len(rows), unit="text") as progress, jax.set_mesh(run.mesh):
        vectors_ND = encoder_rows.embeddings(run.config, run.params, rows, progress.timed())
    if output.suffix == ".jsonl":
        _write_lines(({**text, "embedding": x.tolist()} for text, x in zip(texts, vectors_ND, strict=True)), output)
        return
    with atomic_write(output, CheckpointError, REMEDY) as file:
        np.save(file, vectors_ND)


def _rows(run: Run, inputs: Path | None) -> tuple[list[dict[str, str]], list[EncoderRow]]:
    """The texts of each line by name, and as rows."""
    encoder_rows.check_encoder(run.config)
    texts, rows = [], []
    name = "standard input" if inputs is None else f"--inputs={inputs}"
    pairs = run.config.data.label_objective and run.config.data.second_template
    for number, line in enumerate(_lines(inputs, name), 1):
        parts = line.split("\t") if pairs else [line]
        try:
            if pairs and len(parts) != 2:
                raise ConfigError("it must have two texts with a tab between them, as this model reads pairs")
            rows.append(encoder_rows.row_of(run.config, run.tokenizer, *parts))
        except ConfigError as error:
            raise ConfigError(f"{name}: line {number}: {error}") from None
        texts.append(dict(zip(("text", "second"), parts, strict=False)))
    if not rows:
        raise DataError(f"{name} has no lines; write one text in each line")
    return texts, rows


def _lines(inputs: Path | None, name: str) -> list[str]:
    if inputs is None:
        try:
            return [line.rstrip("\r\n") for line in sys.stdin]
        except UnicodeDecodeError:
            raise DataError("standard input is not UTF-8; convert it, or use --inputs") from None
    with reading(inputs, name) as file:
        return [decode_utf8(line.rstrip(b"\r\n"), f"{name}: line {number}") for number, line in enumerate(file, 1)]


def _write_lines(records: Iterable[dict], output: Path | None) -> None:
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    if output is None:
        sys.stdout.writelines(lines)
        sys.stdout.flush()
        return
    with atomic_write(output, CheckpointError, REMEDY) as file:
        file.writelines(line.encode() for line in lines)
