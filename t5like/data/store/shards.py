"""The shards of a token store: ranges of a source's documents, tokenized in parallel, each written atomically.

`preparation` plans the shards and decides when a store is complete; `token_store` describes the files. Worker processes
receive a `ShardJob` once and then shard numbers; they import what this module imports, and never JAX.
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
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from t5like.data.sources.labels import Labelled
from t5like.data.sources.source import RecordSource, Source
from t5like.data.sources.templates import Chat, Part, Templates, inputs_text
from t5like.data.store.label_numbers import encode_examples
from t5like.data.store.manifest import COUNTS, SPLITS, check_record, token_dtype
from t5like.data.store.statistics import count_tokens
from t5like.data.store.token_store import file_digest
from t5like.data.tokenizers.tokenizer import Tokenizer, refuse_surrogates
from t5like.errors import DataError, UserError
from t5like.io.atomic import atomic_write, replace_file
from t5like.io.signals import block_terminal_signals
from t5like.io.strict_json import loads

BATCH = 2**20  # characters that the tokenizer gets at a time


@dataclasses.dataclass(frozen=True)
class Documents:
    """The documents of a source by index, each as its parts: those of an example, or one part for running text.

    Attributes:
        format: turns a record into the parts of an example; None: the documents are running text.
    """

    source: Source | RecordSource
    format: Templates | Chat | Labelled | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Part, ...]:
        """The parts of a document; empty for an example without targets, which is not stored.

        Raises:
            DataError: the record does not have the format, or its text has a lone surrogate.
        """
        parts = self.format.parts(self.source.record(index)) if self.format else (Part(self.source[index]),)
        try:
            refuse_surrogates([part.text for part in parts])
        except DataError as error:
            raise DataError(f"data.source={self.source.name}: document {index}: {error}") from None
        return parts


def split_draws(parts: Sequence[Part]) -> tuple[float, float]:
    """Two pseudorandom numbers in [0, 1), a hash of the inputs: the first decides the split, the second is free."""
    return tuple(number / 2**64 for number in _hashes(inputs_text(parts).encode()))


def _hashes(text: bytes) -> tuple[int, int]:
    """Two independent numbers of 64 bits."""
    digest = hashlib.blake2b(text, digest_size=16).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")


class _Document(NamedTuple):
    """A document to store: its parts, their size in UTF-8, and a hash of all of them."""

    parts: tuple[Part, ...]
    heldout: bool
    num_bytes: int
    hash: int

    @classmethod
    def of(cls, parts: tuple[Part, ...], heldout_below: float) -> "_Document":
        content = inputs_text(parts).encode()
        draw, content_hash = _hashes(content)
        if len(parts) > 1:
            content = "\0".join(part.text for part in parts).encode()
            content_hash = _hashes(content)[1]
        return cls(parts, draw / 2**64 < heldout_below, len(content) - (len(parts) - 1), content_hash)


@dataclasses.dataclass(frozen=True)
class ShardJob:
    """Everything that a worker needs to write any shard of a store.

    Attributes:
        directory: the store's folder of shards; its name on disk is ``pieces``.
        heldout_below: documents whose first draw (`split_draws`) is below this are held out.
    """

    directory: Path
    documents: Documents
    fingerprint: str
    tokenizer: Tokenizer
    heldout_below: float
    documents_per_shard: int

    def document_range(self, shard: int) -> range:
        """The indices of a shard's documents."""
        begin = shard * self.documents_per_shard
        return range(begin, min(begin + self.documents_per_shard, len(self.documents)))


def hashes_path(directory: Path, shard: int) -> Path:
    """The file with a uint64 hash of each document of a shard."""
    return directory / f"{shard:05d}.hashes"


def finished_shard(job: ShardJob, shard: int) -> dict[str, Any] | None:
    """The record of a shard that is complete, undamaged, and was made from the same data; else None."""
    try:
        record = loads((job.directory / f"{shard:05d}.json").read_bytes())
        check_record(record, shard, job.tokenizer.vocab_size, targets=job.documents.format is not None)
        if record["fingerprint"] != job.fingerprint:
            return None
        files = record["files"].items()
        if any((job.directory / name).stat().st_size != file["bytes"] for name, file in files):
            return None
        intact = all(file_digest(job.directory / name) == file["sha256"] for name, file in files)
        return record if intact else None
    except (FileNotFoundError, ValueError):  # not written yet, or damaged
        return None


def _write_shard(job: ShardJob, shard: int) -> dict[str, Any]:
    """Tokenize the documents of a shard; write its files, then its record, and return the record."""
    contents = ("tokens", "ends", "targets") if job.documents.format else ("tokens", "ends")
    names = {(split, content): f"{shard:05d}.{split}.{content}" for split in SPLITS for content in contents}
    counts = {split: dict.fromkeys(COUNTS, 0) for split in SPLITS}
    hashes = array.array("Q")
    with contextlib.ExitStack() as stack:
        files = {key: stack.enter_context(atomic_write(job.directory / name)) for key, name in names.items()}
        for documents in _document_batches(job, shard):
            encoded = iter(_encode(job, [part for each in documents for part in each.parts]))
            tokenized = [[(next(encoded), part.is_target) for part in each.parts] for each in documents]
            hashes.extend(each.hash for each in documents)
            for split, heldout in (("train", False), ("heldout", True)):
                chosen = [parts for parts, each in zip(tokenized, documents, strict=True) if each.heldout == heldout]
                if chosen:
                    arrays = _arrays(job.tokenizer, chosen, counts[split]["tokens"])
                    for content in contents:
                        files[split, content].write(arrays[content].tobytes())
                    new = {"documents": len(chosen), "tokens": len(arrays["tokens"])}
                    new["bytes"] = sum(each.num_bytes for each in documents if each.heldout == heldout)
                    labelled = isinstance(job.documents.format, Labelled)  # its targets are no token ids
                    ids = [ids for parts in chosen for ids, is_target in parts if not (labelled and is_target)]
                    new |= count_tokens(job.tokenizer, np.concatenate(ids))
                    counts[split] = {name: counts[split][name] + new[name] for name in COUNTS}
    replace_file(hashes_path(job.directory, shard), np.asarray(hashes).astype("<u8").tobytes())
    described = {
        name: {"bytes": (job.directory / name).stat().st_size, "sha256": file_digest(job.directory / name)}
        for name in (*names.values(), hashes_path(job.directory, shard).name)
    }
    record = {"number": shard, "fingerprint": job.fingerprint, "splits": counts, "files": described}
    if job.documents.format:
        record["empty"] = len(job.document_range(shard)) - sum(count["documents"] for count in counts.values())
    replace_file(job.directory / f"{shard:05d}.json", json.dumps(record))
    return record


def _encode(job: ShardJob, parts: Sequence[Part]) -> list[np.ndarray]:
    """The numbers of each part, int32."""
    if isinstance(job.documents.format, Labelled):
        return encode_examples(job.documents.format.objective, job.tokenizer, parts)
    return job.tokenizer.encode_batch([part.text for part in parts])


def _arrays(tokenizer: Tokenizer, documents: list[list[tuple[np.ndarray, bool]]], first: int) -> dict[str, np.ndarray]:
    """The bytes that some documents add to each file of a split; their tokens begin at offset `first`."""
    eos = np.array([tokenizer.eos_id], np.int32)
    ids_P = [ids for parts in documents for ids, _ in parts]
    is_target_P = np.array([is_target for parts in documents for _, is_target in parts])
    lengths_P = np.array([len(ids) + 1 for ids in ids_P])
    ends_P = first + np.cumsum(lengths_P)
    tokens = np.concatenate([array for ids in ids_P for array in (ids, eos)])
    return {
        "tokens": tokens.astype(token_dtype(tokenizer.vocab_size)),
        "ends": ends_P[np.cumsum([len(parts) for parts in documents]) - 1].astype("<u8"),
        "targets": np.stack([ends_P - lengths_P, ends_P], axis=1)[is_target_P].astype("<u8"),
    }


def _document_batches(job: ShardJob, shard: int) -> Iterator[list[_Document]]:
    """The documents of a shard, in batches of about `BATCH` characters."""
    documents, size = [], 0
    for index in job.document_range(shard):
        if not (parts := job.documents[index]):
            continue
        documents.append(_Document.of(parts, job.heldout_below))
        size += sum(len(part.text) for part in parts)
        if size >= BATCH:
            yield documents
            documents, size = [], 0
    if documents:
        yield documents


def write_shards(job: ShardJob, missing: Sequence[int], workers: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Write shards in this process or in several; yields (shard number, record) in the order of completion.

    Each call starts at a random shard and skips those that are finished by then, so that machines which share a
    directory also share the work.
    """
    start = random.randrange(len(missing)) if missing else 0
    queue = iter([*missing[start:], *missing[:start]])
    if workers <= 1:
        for shard in queue:
            yield shard, finished_shard(job, shard) or _write_shard(job, shard)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads (JAX, gRPC) may hang
    processes, connections = [], []
    try:
        for _ in range(workers):
            connection, worker_end = context.Pipe()
            processes.append(context.Process(target=_serve, args=(job, worker_end), daemon=True))
            with block_terminal_signals():
                processes[-1].start()
            worker_end.close()
            connections.append(connection)
            connection.send(next(queue))
        while connections:
            for connection in multiprocessing.connection.wait(connections):
                yield _receive(connection)
                if (shard := next(queue, None)) is None:
                    connections.remove(connection)
                    connection.close()
                else:
                    connection.send(shard)
    finally:
        for process in processes:
            if process.pid:  # it was started
                process.terminate()
                process.join()


def _receive(connection: multiprocessing.connection.Connection) -> tuple[int, dict[str, Any]]:
    """The next result of a worker; its exceptions are raised here."""
    try:
        result = connection.recv()
    except (EOFError, ConnectionResetError):
        fix = "use a smaller data.num_workers"
        raise DataError(f"a tokenizing process was killed, perhaps for its memory; {fix}") from None
    if isinstance(result, BaseException):
        raise result
    return result


def _serve(job: ShardJob, connection: multiprocessing.connection.Connection) -> None:
    """Main loop of a worker: receive a shard number, write the shard, send its record; until the pipe closes."""
    for signal_number in (signal.SIGINT, signal.SIGHUP):  # a terminal signals all; the main process ends its workers
        signal.signal(signal_number, signal.SIG_IGN)
    while True:
        try:
            shard = connection.recv()
            result = shard, finished_shard(job, shard) or _write_shard(job, shard)
        except EOFError:
            return
        except (UserError, OSError) as error:
            result = error
        except Exception:
            result = RuntimeError(traceback.format_exc())
        try:
            connection.send(result)
        except OSError:  # the main process was killed
            return
