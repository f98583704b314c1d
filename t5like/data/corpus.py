"""Prepare the data of a run: a tokenizer and one token store per source, made once, in parallel, and reused after that.

Below `data.directory`: ``tokenizers/<key>/tokenizer.model`` for tokenizers trained here, ``stores/<name>-<key>/`` (see
`data.token_store`), ``tfds/``. Keys are made of all settings that the content depends on, not of the data themselves:
those have fingerprints, and data that changed under the same name are refused, never mixed. A store is made in pieces,
each whole or not there, so killing `prepare` loses the pieces in work, and several machines may prepare one store.

Called by `train`, `evaluate` and the command line. JAX is never imported here: worker processes start in a moment.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import random
import re
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t5like import __version__
from t5like.config import Config, DataConfig
from t5like.data.files import SourceGone
from t5like.data.sources import Source, canonical, open_source
from t5like.data.token_store import (
    FORMAT,
    SPLITS,
    Stream,
    TokenStore,
    file_digest,
    remove_leftovers,
    token_dtype,
    written_whole,
)
from t5like.data.tokenizer import Tokenizer, refuse_surrogates, train_tokenizer
from t5like.errors import CheckpointError, DataError, UserError

__all__ = ["Prepared", "Stream", "TokenStore", "prepare"]

SMALLEST_PIECE, LARGEST_PIECE, PIECES = 2**18, 2**28, 64  # bytes of text, and how many pieces between those limits
TINY = 2**25  # bytes of text that one process tokenizes before others would have started
BATCH = 2**20  # characters that go through SentencePiece at a time


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What `prepare` made or found: stores in the order of `data.source`; notes are lines that the user should see."""

    tokenizer: Tokenizer
    tokenizer_path: Path
    stores: tuple[TokenStore, ...]
    notes: tuple[str, ...] = ()


def prepare(config: Config, *, progress: bool = True) -> Prepared:
    """Load or train the tokenizer and complete the token stores; does nothing the second time.

    Args:
        progress: show what takes time, on stderr.

    Raises:
        ConfigError: a source has an unknown kind.
        DataError: data or tokenizer are missing, malformed, too small, or changed since they were prepared.
        CheckpointError: `data.directory` can't be written.
    """
    try:
        opened = [_open(spec, config.data) for spec in config.data.source]
        tokenizer, tokenizer_path = _tokenizer(config, opened, progress)
        stores, notes = [], []
        for source in opened:
            store = _finished_store(config.data, source, tokenizer)
            stores.append(store := store or _build_store(config.data, source, tokenizer, progress))
            if source.gone:
                notes.append(f"{source.gone}; going on with what was prepared of it, {store.directory}")
    except OSError as error:
        reason = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
        raise CheckpointError(f"data.directory={config.data.directory} can't be used: {reason}") from error
    return Prepared(tokenizer, tokenizer_path, tuple(stores), tuple(notes))


@dataclasses.dataclass(frozen=True)
class _Opened:
    """A source and its fingerprint, or why it can't be had."""

    spec: str
    source: Source | None = None
    fingerprint: str = ""
    gone: SourceGone | None = None


def _open(spec: str, data: DataConfig) -> _Opened:
    try:
        source = open_source(spec, data)
        return _Opened(spec, source, source.fingerprint())
    except SourceGone as gone:
        return _Opened(spec, gone=gone)


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _source_settings(data: DataConfig, spec: str) -> list[Any]:
    return [canonical(spec), data.text_field, data.split, data.text_documents, data.heldout_fraction]


def _draws(text: str) -> tuple[float, float]:
    """Two numbers in [0, 1) from a hash of the text: one decides whether it is held out, one is free for sampling."""
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big") / 2**64, int.from_bytes(digest[8:], "big") / 2**64


# --- tokenizer -------------------------------------------------------------------------------------------------------


def _tokenizer(config: Config, opened: Sequence[_Opened], progress: bool) -> tuple[Tokenizer, Path]:
    """The configured tokenizer, or one trained on the sources, now or earlier."""
    if config.tokenizer.path:
        path = Path(config.tokenizer.path).expanduser()
    else:
        settings = [_source_settings(config.data, source.spec) for source in opened]
        key = _key(FORMAT, settings, config.data.rates, dataclasses.asdict(config.tokenizer))
        directory = Path(config.data.directory).expanduser() / "tokenizers" / key
        path = directory / "tokenizer.model"
        fingerprints = [source.fingerprint for source in opened]
        try:
            trained_on = json.loads((directory / "trained_on.json").read_text("utf-8"))
        except (FileNotFoundError, ValueError):
            trained_on = None
        if trained_on is None:
            _train(config, opened, path, progress)
            with written_whole(directory / "trained_on.json") as file:  # after the model: says that it is there
                file.write(json.dumps(fingerprints).encode())
        else:
            for source, fingerprint in zip(opened, trained_on, strict=True):
                if source.source and source.fingerprint != fingerprint:
                    raise _changed(source.spec, "a tokenizer was trained on it", directory)
    tokenizer = Tokenizer.load(path, num_sentinels=config.tokenizer.num_sentinels)
    tokenizer.check(config.tokenizer)
    return tokenizer, path


def _train(config: Config, opened: Sequence[_Opened], path: Path, progress: bool) -> None:
    for source in opened:
        if source.gone:
            raise source.gone
    thresholds = [_threshold(config.data, source) for source in opened]
    with _status("training a tokenizer", progress):
        train_tokenizer(_sample(config, [source.source for source in opened], thresholds), config.tokenizer, path)


def _sample(config: Config, sources: Sequence[Source], thresholds: Sequence[float]) -> Iterator[str]:
    """About `tokenizer.sample_characters` (in fact bytes) of training documents, from each source by its rate."""
    shares = config.data.rates or [source.size_hint for source in sources]
    for source, share, threshold in zip(sources, shares, thresholds, strict=True):
        kept = config.tokenizer.sample_characters * share / sum(shares) / max(source.size_hint, 1)
        for number in range(len(source)):
            text = _document(source, number)
            heldout, draw = _draws(text)
            if heldout >= threshold and draw < kept:
                yield text


def _document(source: Source, number: int) -> str:
    text = source[number]
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            refuse_surrogates([text])
        except DataError as error:
            raise DataError(f"data.source={source.name}: document {number}: {error}") from None
    return text


def _threshold(data: DataConfig, source: _Opened) -> float:
    """The hash below which a document is held out: `heldout_fraction`, or just above the smallest if none is below it.

    Reads only until it has seen a document of each kind.

    Raises:
        DataError: there is nothing to train on, or nothing else to hold out.
    """
    draws = set()
    for number in range(len(source.source)):
        draws.add(_draws(_document(source.source, number))[0])
        if min(draws) < data.heldout_fraction <= max(draws):
            return data.heldout_fraction
    if len(draws) < 2:
        raise DataError(
            f"data.source={source.spec} has only one document (or copies of one), and one has to be held "
            "out; use more text, or data.text_documents=line for a text file"
        )
    if max(draws) < data.heldout_fraction:
        raise DataError(
            f"data.heldout_fraction={data.heldout_fraction:g} leaves none of the {len(draws)} documents in "
            f"data.source={source.spec} to train on; use data.heldout_fraction=0.1"
        )
    return math.nextafter(min(draws), 1.0)


def _changed(spec: str, since: str, directory: Path) -> DataError:
    return DataError(
        f"data.source={spec} has changed since {since}; put the old data back, or remove {directory} to prepare it anew"
    )


# --- stores ----------------------------------------------------------------------------------------------------------


def _store_directory(data: DataConfig, spec: str, tokenizer: Tokenizer) -> Path:
    readable = re.sub(r"[^A-Za-z0-9]+", "_", spec).strip("_")[-40:]
    key = _key(FORMAT, _source_settings(data, spec), tokenizer.hash)
    return Path(data.directory).expanduser() / "stores" / f"{readable}-{key}"


def _finished_store(data: DataConfig, source: _Opened, tokenizer: Tokenizer) -> TokenStore | None:
    directory = _store_directory(data, source.spec, tokenizer)
    if not (directory / "manifest.json").exists():
        return None
    store = TokenStore.open(directory)
    if source.source and source.fingerprint != store.manifest["fingerprint"]:
        raise _changed(source.spec, f"{store.manifest['splits']['train']['tokens']} tokens were made of it", directory)
    return store


@dataclasses.dataclass(frozen=True)
class _Job:
    """All that a worker needs to write any piece of a store."""

    pieces: Path
    source: Source
    fingerprint: str
    tokenizer: Tokenizer
    heldout_below: float
    documents_per_piece: int

    def documents(self, number: int) -> range:
        begin = number * self.documents_per_piece
        return range(begin, min(begin + self.documents_per_piece, len(self.source)))


def _build_store(data: DataConfig, opened: _Opened, tokenizer: Tokenizer, progress: bool) -> TokenStore:
    if opened.gone:
        raise opened.gone
    source = opened.source
    directory = _store_directory(data, opened.spec, tokenizer)
    pieces = directory / "pieces"
    pieces.mkdir(parents=True, exist_ok=True)
    size = max(source.size_hint, 1)
    piece_bytes = min(max(size // PIECES, SMALLEST_PIECE), LARGEST_PIECE)
    per_piece = max(1, -(-len(source) * piece_bytes // size))
    job = _Job(pieces, source, opened.fingerprint, tokenizer, _threshold(data, opened), per_piece)
    numbers = range(-(-len(source) // per_piece))
    records = {number: record for number in numbers if (record := _finished_piece(job, number))}
    missing = [number for number in numbers if number not in records]
    workers = min(data.num_workers or (1 if size < TINY else len(os.sched_getaffinity(0))), len(missing))
    with _bar(opened.spec, len(numbers), len(records), progress) as advance:
        for number, record in _write_pieces(job, missing, workers):
            records[number] = record
            advance(sum(split["tokens"] for split in record["splits"].values()))
    _write_manifest(directory, data, opened, tokenizer, [records[number] for number in numbers])
    return TokenStore.open(directory)


def _write_manifest(
    directory: Path, data: DataConfig, source: _Opened, tokenizer: Tokenizer, records: list[dict[str, Any]]
) -> None:
    """Say that the store is complete; remove what else lies there."""
    pieces = directory / "pieces"
    known = {f"{record['number']:05d}.json" for record in records} | {name for r in records for name in r["files"]}
    for path in pieces.iterdir():  # pieces of an earlier attempt on other data
        if path.name not in known and not path.name.startswith("."):
            path.unlink(missing_ok=True)
    remove_leftovers(pieces)
    manifest = {
        "format": FORMAT,
        "version": __version__,
        "source": canonical(source.spec),
        "fingerprint": source.fingerprint,
        "text_field": data.text_field,
        "split": data.split,
        "text_documents": data.text_documents,
        "heldout_fraction": data.heldout_fraction,
        "tokenizer": tokenizer.hash,
        "vocab_size": tokenizer.vocab_size,
        "dtype": token_dtype(tokenizer.vocab_size),
        "splits": {
            split: {what: sum(r["splits"][split][what] for r in records) for what in ("documents", "tokens")}
            for split in SPLITS
        },
        "pieces": records,
    }
    with written_whole(directory / "manifest.json") as file:
        file.write(json.dumps(manifest, indent=1).encode())


# --- pieces ----------------------------------------------------------------------------------------------------------


def _finished_piece(job: _Job, number: int) -> dict[str, Any] | None:
    """The record of a piece that is whole and made of the same data."""
    try:
        record = json.loads((job.pieces / f"{number:05d}.json").read_text("utf-8"))
        whole = all((job.pieces / name).stat().st_size == file["bytes"] for name, file in record["files"].items())
        return record if whole and record["fingerprint"] == job.fingerprint else None
    except (FileNotFoundError, ValueError, KeyError):
        return None


def _write_piece(job: _Job, number: int) -> dict[str, Any]:
    """Tokenize one range of documents; its files first, its record last."""
    names = {(split, kind): f"{number:05d}.{split}.{kind}" for split in SPLITS for kind in ("tokens", "ends")}
    eos = np.array([job.tokenizer.eos_id], np.int32)
    dtype = token_dtype(job.tokenizer.vocab_size)
    counts = {split: {"documents": 0, "tokens": 0} for split in SPLITS}
    with contextlib.ExitStack() as stack:
        files = {key: stack.enter_context(written_whole(job.pieces / name)) for key, name in names.items()}
        for texts, heldout in _batches(job, number):
            encoded = job.tokenizer.encode_batch(texts)
            for split, wanted in (("train", False), ("heldout", True)):
                documents = [ids for ids, out in zip(encoded, heldout, strict=True) if out == wanted]
                if documents:
                    count = counts[split]
                    ends = count["tokens"] + np.cumsum([len(ids) + 1 for ids in documents])
                    tokens = np.concatenate([part for ids in documents for part in (ids, eos)])
                    files[split, "tokens"].write(tokens.astype(dtype).tobytes())
                    files[split, "ends"].write(ends.astype("<u8").tobytes())
                    count["documents"] += len(documents)
                    count["tokens"] = int(ends[-1])
    described = {
        name: {"bytes": (job.pieces / name).stat().st_size, "sha256": file_digest(job.pieces / name)}
        for name in names.values()
    }
    record = {"number": number, "fingerprint": job.fingerprint, "splits": counts, "files": described}
    with written_whole(job.pieces / f"{number:05d}.json") as file:
        file.write(json.dumps(record).encode())
    return record


def _batches(job: _Job, number: int) -> Iterator[tuple[list[str], list[bool]]]:
    """Texts of a piece, about `BATCH` characters at a time, and whether each is held out."""
    texts, heldout, size = [], [], 0
    for document in job.documents(number):
        text = _document(job.source, document)
        texts.append(text)
        heldout.append(_draws(text)[0] < job.heldout_below)
        size += len(text)
        if size >= BATCH:
            yield texts, heldout
            texts, heldout, size = [], [], 0
    if texts:
        yield texts, heldout


def _write_pieces(job: _Job, missing: Sequence[int], workers: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Write pieces in this process or in several; yields (number, record) as they come.

    Everyone starts somewhere else and skips what is there by then: machines that share a directory share the work.
    """
    start = random.randrange(len(missing)) if missing else 0
    queue = iter([*missing[start:], *missing[:start]])
    if workers <= 1:
        for number in queue:
            yield number, _finished_piece(job, number) or _write_piece(job, number)
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


def _serve(job: _Job, connection: multiprocessing.connection.Connection) -> None:
    """A worker's life: a number in, a piece written, its record out; ends when the other end is closed or gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the first process ends the others
    while True:
        try:
            number = connection.recv()
            answer = number, _finished_piece(job, number) or _write_piece(job, number)
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


# --- what the user sees ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _status(text: str, show: bool) -> Iterator[None]:
    from rich.console import Console  # workers do without it

    with Console(stderr=True).status(text) if show else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _bar(name: str, total: int, done: int, show: bool) -> Iterator[Callable[[int], None]]:
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
