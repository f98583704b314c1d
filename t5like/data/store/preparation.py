"""Prepare the data of a run: a tokenizer and one token store per source, made once, in parallel, and reused after that.

Below `data.cache_directory`: ``tokenizers/<key>/tokenizer.model`` for tokenizers trained here, ``stores/<name>-<key>/``
(see `data.token_store`), ``tfds/``. Keys are made of all settings that the content depends on, not of the data
themselves: those have fingerprints, and data that changed under the same name are refused, never mixed. A store is made
in pieces, each whole or not there (`data.pieces`), so killing `prepare` loses the pieces in work, and several machines
may prepare one store.

Called by `train`, `evaluate` and the command line. JAX is never imported here: worker processes start in a moment.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t5like import __version__
from t5like.config.schema import Config, DataConfig
from t5like.data.sources.files import SourceGone
from t5like.data.sources.source import canonical, open_source
from t5like.data.sources.templates import form_of
from t5like.data.store import statistics
from t5like.data.store.manifest import SPLITS, add_up, sealed, token_dtype
from t5like.data.store.shards import Documents, Job, bar, draws, finished_shard, hashes_of, write_shards
from t5like.data.store.token_store import FORMAT, Stream, TokenStore, file_digest, read_again
from t5like.data.tokenizers.tokenizer import Tokenizer, train_tokenizer
from t5like.errors import CheckpointError, DataError
from t5like.io.atomic import remove_stale_temporaries, replace_file
from t5like.io.paths import cache_directory, expand
from t5like.io.strict_json import loads
from t5like.metrics.progress import status

__all__ = ["Prepared", "Stream", "TokenStore", "prepare"]

SMALLEST_PIECE, LARGEST_PIECE, PIECES = 2**18, 2**28, 64  # bytes of text, and how many pieces between those limits
TINY = 2**25  # bytes of text that one process tokenizes before others would have started


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
        CheckpointError: `data.cache_directory` can't be written.
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
            if empty := store.manifest.get("empty"):
                notes.append(f"data.source={source.spec}: {empty:,} examples have empty targets and are left out")
    except OSError as error:
        reason = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
        raise CheckpointError(f"data.cache_directory={config.data.cache_directory} can't be used: {reason}") from error
    return Prepared(tokenizer, tokenizer_path, tuple(stores), tuple(notes))


def find(config: Config) -> tuple[Tokenizer | None, tuple[TokenStore | None, ...]]:
    """What `prepare` has made for this config, None for what it would have to make. Opens no source, so data that have
    changed since are not noticed.

    Raises:
        DataError: the tokenizer that `tokenizer.path` names is missing, or one does not fit the config.
    """
    own = not config.tokenizer.path
    path = _own_tokenizer_path(config) if own else expand(config.tokenizer.path)
    if own and not (path.parent / "trained_on.json").exists():
        return None, (None,) * len(config.data.source)
    tokenizer = Tokenizer.load(path, num_sentinels=config.tokenizer.num_sentinels)
    tokenizer.check(config.tokenizer)
    stores = [_finished_store(config.data, _Opened(spec), tokenizer) for spec in config.data.source]
    return tokenizer, tuple(stores)


@dataclasses.dataclass(frozen=True)
class _Opened:
    """A source and its fingerprint, or why it can't be had."""

    spec: str
    documents: Documents | None = None
    fingerprint: str = ""
    gone: SourceGone | None = None


def _open(spec: str, data: DataConfig) -> _Opened:
    try:
        form = form_of(data)
        source = open_source(spec, data, form.wanted if form else None)
        return _Opened(spec, Documents(source, form), source.fingerprint())
    except SourceGone as gone:
        return _Opened(spec, gone=gone)


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _source_settings(data: DataConfig, spec: str) -> list[Any]:
    settings = [canonical(spec), data.text_field, data.split, data.text_documents, data.heldout_fraction]
    return [*settings, _form_settings(data)] if form_of(data) else settings


def _form_settings(data: DataConfig) -> dict[str, str]:
    """What the examples of records depend on; nothing for running text."""
    if form_of(data) is None:
        return {}
    if data.messages_field:
        return {"messages_field": data.messages_field}
    return {"inputs_template": data.inputs_template, "targets_template": data.targets_template}


# --- tokenizer -------------------------------------------------------------------------------------------------------


def _tokenizer(config: Config, opened: Sequence[_Opened], progress: bool) -> tuple[Tokenizer, Path]:
    """The configured tokenizer, or one trained on the sources, now or earlier."""
    if config.tokenizer.path:
        path = expand(config.tokenizer.path)
    else:
        path = _own_tokenizer_path(config)
        directory = path.parent
        fingerprints = [source.fingerprint for source in opened]
        trained_on = _trained_on(directory, len(opened))
        if trained_on is None:
            _train(config, opened, path, progress)
            record = {"sources": fingerprints, "sha256": file_digest(path)}
            replace_file(directory / "trained_on.json", json.dumps(record))  # after the model: says that it is there
        else:
            for source, fingerprint in zip(opened, trained_on, strict=True):
                if source.documents and source.fingerprint != fingerprint:
                    raise _changed(source.spec, "a tokenizer was trained on it", directory)
    tokenizer = Tokenizer.load(path, num_sentinels=config.tokenizer.num_sentinels)
    tokenizer.check(config.tokenizer)
    return tokenizer, path


def _trained_on(directory: Path, num_sources: int) -> list[str] | None:
    """The fingerprints of the sources that the tokenizer in a directory was trained on; None if none is there yet.

    A directory that was written before there was a checksum has the fingerprints alone.

    Raises:
        DataError: the record or the tokenizer is damaged.
    """
    path = directory / "trained_on.json"
    again = f"remove {directory} to train that tokenizer again"
    try:
        record = loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        record = None
    sources = record.get("sources") if isinstance(record, dict) else record
    if not isinstance(sources, list) or len(sources) != num_sources:
        raise DataError(f"{path} is damaged; {again}")
    model = directory / "tokenizer.model"
    if isinstance(record, dict) and (not model.is_file() or file_digest(model) != record.get("sha256")):
        raise DataError(f"{model} is damaged or missing (sha256 differs); {again}")
    return sources


def _own_tokenizer_path(config: Config) -> Path:
    """Where a tokenizer that is trained on the sources lies."""
    settings = [_source_settings(config.data, spec) for spec in config.data.source]
    training = {k: v for k, v in dataclasses.asdict(config.tokenizer).items() if k != "extra_eos_ids"}
    key = _key(FORMAT, settings, config.data.rates, training)
    return cache_directory(config.data.cache_directory) / "tokenizers" / key / "tokenizer.model"


def _train(config: Config, opened: Sequence[_Opened], path: Path, progress: bool) -> None:
    for source in opened:
        if source.gone:
            raise source.gone
    thresholds = [_threshold(config.data, source, progress) for source in opened]
    with status("training a tokenizer", show=progress):
        train_tokenizer(_sample(config, [source.documents for source in opened], thresholds), config.tokenizer, path)
    for source in opened:
        _refuse_if_changed(source)


def _sample(config: Config, opened: Sequence[Documents], thresholds: Sequence[float]) -> Iterator[str]:
    """About `tokenizer.sample_characters` (in fact bytes) of training documents, from each source by its rate."""
    sizes = [documents.source.size_hint for documents in opened]
    shares = np.reshape(config.data.rates or sizes, (-1, len(opened))).sum(axis=0).tolist()  # of all phases together
    for documents, size, share, threshold in zip(opened, sizes, shares, thresholds, strict=True):
        kept = config.tokenizer.sample_characters * share / sum(shares) / max(size, 1)
        for number in range(len(documents)):
            if parts := documents[number]:
                heldout, draw = draws(parts)
                if heldout >= threshold and draw < kept:
                    yield from (part.text for part in parts)


def _threshold(data: DataConfig, source: _Opened, progress: bool) -> float:
    """The hash below which a document is held out: `heldout_fraction`, or just above the smallest if none is below it.

    Reads only until it has seen a document of each kind.

    Raises:
        DataError: there is nothing to train on, or nothing else to hold out.
    """
    seen = set()
    with status(f"reading {source.spec}", show=progress):  # a large file of lines is read to its end, to count them
        for number in range(len(source.documents)):
            if parts := source.documents[number]:
                seen.add(draws(parts)[0])
            if seen and min(seen) < data.heldout_fraction <= max(seen):
                return data.heldout_fraction
    if len(seen) < 2 and source.documents.form:
        raise DataError(
            f"data.source={source.spec} has {len(seen)} different inputs with targets, and one has to be held out; "
            "use more examples"
        )
    if len(seen) < 2:
        raise DataError(
            f"data.source={source.spec} has only one document (or copies of one), and one has to be held "
            "out; use more text, or data.text_documents=line for a text file"
        )
    if max(seen) < data.heldout_fraction:
        raise DataError(
            f"data.heldout_fraction={data.heldout_fraction:g} leaves none of the {len(seen)} documents in "
            f"data.source={source.spec} to train on; use data.heldout_fraction=0.1"
        )
    return math.nextafter(min(seen), 1.0)


def _refuse_if_changed(source: _Opened) -> None:
    """Raise DataError if the data are not those any more whose fingerprint was taken before they were read."""
    if source.documents.source.fingerprint() != source.fingerprint:
        raise DataError(
            f"data.source={source.spec} changed while it was read; prepare again once nothing writes to it any more"
        )


def _changed(spec: str, since: str, directory: Path) -> DataError:
    return DataError(
        f"data.source={spec} has changed since {since}; put the old data back, or remove {directory} to prepare it anew"
    )


# --- stores ----------------------------------------------------------------------------------------------------------


def _store_directory(data: DataConfig, spec: str, tokenizer: Tokenizer) -> Path:
    readable = re.sub(r"[^A-Za-z0-9]+", "_", spec).strip("_")[-40:]
    key = _key(FORMAT, _source_settings(data, spec), tokenizer.hash)
    return cache_directory(data.cache_directory) / "stores" / f"{readable}-{key}"


def _finished_store(data: DataConfig, source: _Opened, tokenizer: Tokenizer) -> TokenStore | None:
    directory = _store_directory(data, source.spec, tokenizer)
    if not (directory / "manifest.json").exists():
        return None
    store = TokenStore.open(directory)
    if (store.manifest["tokenizer"], store.manifest["vocab_size"]) != (tokenizer.hash, tokenizer.vocab_size):
        raise DataError(f"{directory}/manifest.json names another tokenizer; {read_again(directory)}")
    if source.documents and source.fingerprint != store.manifest["fingerprint"]:
        raise _changed(source.spec, f"{store.manifest['splits']['train']['tokens']} tokens were made of it", directory)
    return store


def _build_store(data: DataConfig, opened: _Opened, tokenizer: Tokenizer, progress: bool) -> TokenStore:
    if opened.gone:
        raise opened.gone
    documents, size = opened.documents, max(opened.documents.source.size_hint, 1)
    threshold = _threshold(data, opened, progress)  # reads, and so checks, before anything is written
    directory = _store_directory(data, opened.spec, tokenizer)
    pieces = directory / "pieces"
    pieces.mkdir(parents=True, exist_ok=True)
    piece_bytes = min(max(size // PIECES, SMALLEST_PIECE), LARGEST_PIECE)
    per_piece = max(1, -(-len(documents) * piece_bytes // size))
    job = Job(pieces, documents, opened.fingerprint, tokenizer, threshold, per_piece)
    numbers = range(-(-len(documents) // per_piece))
    records = {number: record for number in numbers if (record := finished_shard(job, number))}
    missing = [number for number in numbers if number not in records]
    workers = min(data.num_workers or (1 if size < TINY else len(os.sched_getaffinity(0))), len(missing))
    with bar(opened.spec, len(numbers), len(records), progress) as advance:
        for number, record in write_shards(job, missing, workers):
            records[number] = record
            advance(sum(split["tokens"] for split in record["splits"].values()))
    try:
        _refuse_if_changed(opened)
    except DataError:
        for record in pieces.glob("*.json"):  # they say that the pieces are of the data that had this fingerprint
            record.unlink(missing_ok=True)
        raise
    _write_manifest(directory, data, opened, tokenizer, [records[number] for number in numbers])
    return TokenStore.open(directory)


def _write_manifest(
    directory: Path, data: DataConfig, source: _Opened, tokenizer: Tokenizer, records: list[dict[str, Any]]
) -> None:
    """Say that the store is complete; remove what else lies there."""
    pieces = directory / "pieces"
    duplicates = statistics.num_duplicates(hashes_of(pieces, record["number"]) for record in records)
    known = {f"{record['number']:05d}.json" for record in records} | {name for r in records for name in r["files"]}
    for path in pieces.iterdir():  # pieces of an earlier attempt on other data
        if path.name not in known and not path.name.startswith("."):
            path.unlink(missing_ok=True)
    remove_stale_temporaries(pieces)
    manifest = {
        "format": FORMAT,
        "version": __version__,
        "source": canonical(source.spec),
        "fingerprint": source.fingerprint,
        "text_field": data.text_field,
        "split": data.split,
        "text_documents": data.text_documents,
        "heldout_fraction": data.heldout_fraction,
        **_form_settings(data),
        "tokenizer": tokenizer.hash,
        "vocab_size": tokenizer.vocab_size,
        "dtype": token_dtype(tokenizer.vocab_size),
        "splits": {split: add_up(records, split) for split in SPLITS},
        "pieces": records,
    }
    if duplicates is not None:
        manifest["duplicates"] = duplicates
    if form_of(data):
        manifest["empty"] = sum(record["empty"] for record in records)
    replace_file(directory / "manifest.json", json.dumps(sealed(manifest), indent=1))
