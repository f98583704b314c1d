"""The pieces of a token store: ranges of a source's documents, tokenized side by side, each whole or not there.

`data.corpus` plans them and says when a store is complete; what lies in them is told in `data.token_store`. Workers are
processes that get a `Job` once and then numbers of pieces; they import what this module imports, and no JAX.
"""

import array
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
from typing import Any, NamedTuple

import numpy as np

from t5like.data.sources.source import RecordSource, Source
from t5like.data.sources.templates import Chat, Part, Templates, inputs_of
from t5like.data.store.manifest import COUNTS, SPLITS, check_record, token_dtype
from t5like.data.store.statistics import count_tokens
from t5like.data.store.token_store import file_digest
from t5like.data.tokenizers.tokenizer import Tokenizer, refuse_surrogates
from t5like.errors import DataError, UserError, printable
from t5like.io.atomic import atomic_write, replace_file
from t5like.io.signals import block_terminal_signals
from t5like.io.strict_json import loads
from t5like.metrics.progress import Progress

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
    return tuple(number / 2**64 for number in _hashes(inputs_of(parts).encode()))


def _hashes(text: bytes) -> tuple[int, int]:
    """Two independent numbers of 64 bits."""
    digest = hashlib.blake2b(text, digest_size=16).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")


class _Document(NamedTuple):
    """A document on its way into a piece: its parts, their bytes of UTF-8, and a hash of all of them."""

    parts: tuple[Part, ...]
    heldout: bool
    num_bytes: int
    hash: int

    @classmethod
    def of(cls, parts: tuple[Part, ...], heldout_below: float) -> "_Document":
        inputs = inputs_of(parts).encode()
        draw, whole_hash = _hashes(inputs)
        whole = inputs
        if len(parts) > 1:
            whole = "\0".join(part.text for part in parts).encode()
            whole_hash = _hashes(whole)[1]
        return cls(parts, draw / 2**64 < heldout_below, len(whole) - (len(parts) - 1), whole_hash)


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


def hashes_of(pieces: Path, number: int) -> Path:
    """The file with a hash of each document of a piece, uint64."""
    return pieces / f"{number:05d}.hashes"


def finished_shard(job: Job, number: int) -> dict[str, Any] | None:
    """The record of a piece that is whole, made of the same data, and has the bytes that were written."""
    try:
        record = loads((job.pieces / f"{number:05d}.json").read_bytes())
        check_record(record, number, job.tokenizer.vocab_size, targets=job.documents.form is not None)
        if record["fingerprint"] != job.fingerprint:
            return None
        sizes = ((job.pieces / name).stat().st_size == file["bytes"] for name, file in record["files"].items())
        if not all(sizes):
            return None
        digests = (file_digest(job.pieces / name) == file["sha256"] for name, file in record["files"].items())
        return record if all(digests) else None
    except (FileNotFoundError, ValueError):  # not there yet, or damaged
        return None


def _write_shard(job: Job, number: int) -> dict[str, Any]:
    """Tokenize one range of documents; its files first, its record last."""
    kinds = ("tokens", "ends", "targets") if job.documents.form else ("tokens", "ends")
    names = {(split, kind): f"{number:05d}.{split}.{kind}" for split in SPLITS for kind in kinds}
    counts = {split: dict.fromkeys(COUNTS, 0) for split in SPLITS}
    hashes = array.array("Q")
    with contextlib.ExitStack() as stack:
        files = {key: stack.enter_context(atomic_write(job.pieces / name)) for key, name in names.items()}
        for documents in _batches(job, number):
            encoded = iter(job.tokenizer.encode_batch([part.text for each in documents for part in each.parts]))
            tokenized = [[(next(encoded), part.learned) for part in each.parts] for each in documents]
            hashes.extend(each.hash for each in documents)
            for split, wanted in (("train", False), ("heldout", True)):
                chosen = [parts for parts, each in zip(tokenized, documents, strict=True) if each.heldout == wanted]
                if chosen:
                    arrays = _arrays(job.tokenizer, chosen, counts[split]["tokens"])
                    for kind in kinds:
                        files[split, kind].write(arrays[kind].tobytes())
                    new = {"documents": len(chosen), "tokens": len(arrays["tokens"])}
                    new["bytes"] = sum(each.num_bytes for each in documents if each.heldout == wanted)
                    new |= count_tokens(job.tokenizer, arrays["tokens"])
                    counts[split] = {name: counts[split][name] + new[name] for name in COUNTS}
    replace_file(hashes_of(job.pieces, number), np.asarray(hashes).astype("<u8").tobytes())
    described = {
        name: {"bytes": (job.pieces / name).stat().st_size, "sha256": file_digest(job.pieces / name)}
        for name in (*names.values(), hashes_of(job.pieces, number).name)
    }
    record = {"number": number, "fingerprint": job.fingerprint, "splits": counts, "files": described}
    if job.documents.form:
        record["empty"] = len(job.numbers(number)) - sum(count["documents"] for count in counts.values())
    replace_file(job.pieces / f"{number:05d}.json", json.dumps(record))
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


def _batches(job: Job, number: int) -> Iterator[list[_Document]]:
    """Documents of a piece, about `BATCH` characters at a time."""
    documents, size = [], 0
    for document in job.numbers(number):
        if not (parts := job.documents[document]):
            continue
        documents.append(_Document.of(parts, job.heldout_below))
        size += sum(len(part.text) for part in parts)
        if size >= BATCH:
            yield documents
            documents, size = [], 0
    if documents:
        yield documents


def write_shards(job: Job, missing: Sequence[int], workers: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Write pieces in this process or in several; yields (number, record) as they come.

    Everyone starts somewhere else and skips what is there by then: machines that share a directory share the work.
    """
    start = random.randrange(len(missing)) if missing else 0
    queue = iter([*missing[start:], *missing[:start]])
    if workers <= 1:
        for number in queue:
            yield number, finished_shard(job, number) or _write_shard(job, number)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads (JAX, gRPC) may hang
    processes, connections = [], []
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=_serve, args=(job, theirs), daemon=True))
            with block_terminal_signals():
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
            if process.pid:  # it was started
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
    for number in (signal.SIGINT, signal.SIGHUP):  # a terminal sends them to all; the first process ends the others
        signal.signal(number, signal.SIG_IGN)
    while True:
        try:
            number = connection.recv()
            answer = number, finished_shard(job, number) or _write_shard(job, number)
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
    """Progress over pieces; gives a function that is called with the tokens of each finished one."""
    tokens, finished, began = 0, done, time.monotonic()
    with Progress(total, step=done, primary=show, unit=f"tokenizing {printable(name)}: piece") as progress:

        def advance(count: int) -> None:
            nonlocal tokens, finished
            tokens, finished = tokens + count, finished + 1
            seconds = time.monotonic() - began
            left = seconds / (finished - done) * (total - finished)
            progress.update(finished, {"train/tokens_per_second": tokens / seconds}, left)

        yield advance
