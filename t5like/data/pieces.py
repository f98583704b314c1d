"""The pieces of a token store: ranges of a source's documents, tokenized side by side, each whole or not there.

`data.corpus` plans them and says when a store is complete; what lies in them is told in `data.token_store`. Workers are
processes that get a `Job` once and then numbers of pieces; they import what this module imports, and no JAX.
"""

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t5like.data.sources import RecordSource, Source
from t5like.data.templates import Chat, Part, Templates, inputs_of
from t5like.data.token_store import SPLITS, file_digest, token_dtype, written_whole
from t5like.data.tokenizer import Tokenizer, refuse_surrogates
from t5like.errors import DataError, UserError

BATCH = 2**20  # characters that go through SentencePiece at a time


@dataclasses.dataclass(frozen=True)
class Documents:
    """What is stored of a source, by number: the parts of an example, or a text as the only part.

    Attributes:
        form: how an example is made of a record; None: the source gives texts.
    """

    source: Source | RecordSource
    form: Templates | Chat | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> tuple[Part, ...]:
        """The parts of a document; nothing if it is an example without targets, which is left out.

        Raises:
            DataError: the record does not have the form, or holds what is no character.
        """
        form = self.form
        parts = form.parts(self.source.record(number)) if form else (Part(self.source[number]),)
        try:
            refuse_surrogates([part.text for part in parts])
        except DataError as error:
            raise DataError(f"data.source={self.source.name}: document {number}: {error}") from None
        return parts


def draws(parts: Sequence[Part]) -> tuple[float, float]:
    """Two numbers in [0, 1) from a hash of what is read first: one decides whether it is held out, one is free."""
    digest = hashlib.blake2b(inputs_of(parts).encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big") / 2**64, int.from_bytes(digest[8:], "big") / 2**64


@dataclasses.dataclass(frozen=True)
class Job:
    """All that a worker needs to write any piece of a store."""

    pieces: Path
    documents: Documents
    fingerprint: str
    tokenizer: Tokenizer
    heldout_below: float
    documents_per_piece: int

    def numbers(self, piece: int) -> range:
        """The documents of a piece."""
        begin = piece * self.documents_per_piece
        return range(begin, min(begin + self.documents_per_piece, len(self.documents)))


def finished_piece(job: Job, number: int) -> dict[str, Any] | None:
    """The record of a piece that is whole and made of the same data."""
    try:
        record = json.loads((job.pieces / f"{number:05d}.json").read_text("utf-8"))
        whole = all((job.pieces / name).stat().st_size == file["bytes"] for name, file in record["files"].items())
        return record if whole and record["fingerprint"] == job.fingerprint else None
    except (FileNotFoundError, ValueError, KeyError):
        return None


def _write_piece(job: Job, number: int) -> dict[str, Any]:
    """Tokenize one range of documents; its files first, its record last."""
    kinds = ("tokens", "ends", "targets") if job.documents.form else ("tokens", "ends")
    names = {(split, kind): f"{number:05d}.{split}.{kind}" for split in SPLITS for kind in kinds}
    counts = {split: {"documents": 0, "tokens": 0} for split in SPLITS}
    with contextlib.ExitStack() as stack:
        files = {key: stack.enter_context(written_whole(job.pieces / name)) for key, name in names.items()}
        for documents, heldout in _batches(job, number):
            encoded = iter(job.tokenizer.encode_batch([part.text for parts in documents for part in parts]))
            tokenized = [[(next(encoded), part.learned) for part in parts] for parts in documents]
            for split, wanted in (("train", False), ("heldout", True)):
                chosen = [parts for parts, out in zip(tokenized, heldout, strict=True) if out == wanted]
                if chosen:
                    arrays = _arrays(job.tokenizer, chosen, counts[split]["tokens"])
                    for kind in kinds:
                        files[split, kind].write(arrays[kind].tobytes())
                    counts[split]["documents"] += len(chosen)
                    counts[split]["tokens"] += len(arrays["tokens"])
    described = {
        name: {"bytes": (job.pieces / name).stat().st_size, "sha256": file_digest(job.pieces / name)}
        for name in names.values()
    }
    record = {"number": number, "fingerprint": job.fingerprint, "splits": counts, "files": described}
    if job.documents.form:
        record["empty"] = len(job.numbers(number)) - sum(count["documents"] for count in counts.values())
    with written_whole(job.pieces / f"{number:05d}.json") as file:
        file.write(json.dumps(record).encode())
    return record


def _arrays(tokenizer: Tokenizer, documents: list[list[tuple[np.ndarray, bool]]], first: int) -> dict[str, np.ndarray]:
    """What the files of a split get for some documents, whose tokens begin at `first`."""
    eos = np.array([tokenizer.eos_id], np.int32)
    ids_P = [ids for parts in documents for ids, _ in parts]
    learned_P = np.array([learned for parts in documents for _, learned in parts])
    lengths_P = np.array([len(ids) + 1 for ids in ids_P])
    ends_P = first + np.cumsum(lengths_P)
    tokens = np.concatenate([piece for ids in ids_P for piece in (ids, eos)])
    return {
        "tokens": tokens.astype(token_dtype(tokenizer.vocab_size)),
        "ends": ends_P[np.cumsum([len(parts) for parts in documents]) - 1].astype("<u8"),
        "targets": np.stack([ends_P - lengths_P, ends_P], axis=1)[learned_P].astype("<u8"),
    }


def _batches(job: Job, number: int) -> Iterator[tuple[list[tuple[Part, ...]], list[bool]]]:
    """Documents of a piece, about `BATCH` characters at a time, and whether each is held out."""
    documents, heldout, size = [], [], 0
    for document in job.numbers(number):
        if not (parts := job.documents[document]):
            continue
        documents.append(parts)
        heldout.append(draws(parts)[0] < job.heldout_below)
        size += sum(len(part.text) for part in parts)
        if size >= BATCH:
            yield documents, heldout
            documents, heldout, size = [], [], 0
    if documents:
        yield documents, heldout


def write_pieces(job: Job, missing: Sequence[int], workers: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Write pieces in this process or in several; yields (number, record) as they come.

    Everyone starts somewhere else and skips what is there by then: machines that share a directory share the work.
    """
    start = random.randrange(len(missing)) if missing else 0
    queue = iter([*missing[start:], *missing[:start]])
    if workers <= 1:
        for number in queue:
            yield number, finished_piece(job, number) or _write_piece(job, number)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads (JAX, gRPC) may hang
    processes, connections = [], []
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=_serve, args=(job, theirs), daemon=True))
            processes[-1].start()
            theirs.close()
            connections.append(ours)
            ours.send(next(queue))
        while connections:
            for connection in multiprocessing.connection.wait(connections):
                yield _answer(connection)
                if (number := next(queue, None)) is None:
                    connections.remove(connection)
                    connection.close()
                else:
                    connection.send(number)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _answer(connection: multiprocessing.connection.Connection) -> tuple[int, dict[str, Any]]:
    try:
        answer = connection.recv()
    except (EOFError, ConnectionResetError):
        fix = "use a smaller data.num_workers"
        raise DataError(f"a tokenizing process was killed, perhaps for its memory; {fix}") from None
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _serve(job: Job, connection: multiprocessing.connection.Connection) -> None:
    """A worker's life: a number in, a piece written, its record out; ends when the other end is closed or gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the first process ends the others
    while True:
        try:
            number = connection.recv()
            answer = number, finished_piece(job, number) or _write_piece(job, number)
        except EOFError:
            return
        except (UserError, OSError) as error:
            answer = error
        except Exception:
            answer = RuntimeError(traceback.format_exc())
        try:
            connection.send(answer)
        except OSError:  # the first process was killed
            return


@contextlib.contextmanager
def bar(name: str, total: int, done: int, show: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar over pieces; gives a function that is called with the tokens of each finished one."""
    from rich import progress
    from rich.console import Console

    columns = [
        "{task.description}",
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        "pieces,",
        "{task.fields[rate]:.2f} M tokens/s,",
        progress.TimeRemainingColumn(),
        "left",
    ]
    tokens, began = 0, time.monotonic()
    with progress.Progress(*columns, console=Console(stderr=True), disable=not show) as bar:
        task = bar.add_task(f"tokenizing {name}", total=total, completed=done, rate=0.0)

        def advance(count: int) -> None:
            nonlocal tokens
            tokens += count
            bar.update(task, advance=1, rate=tokens / (time.monotonic() - began) / 1e6)

        yield advance
