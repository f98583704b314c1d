"""Prepare the data of a run: a tokenizer and one token store per source, in parallel, unless they exist already.

`data.cache_directory` contains ``tokenizers/<key>/tokenizer.model`` for tokenizers trained here,
``stores/<name>-<key>/`` (see `token_store`), and ``tfds/``. A key is a hash of all settings that the content depends
on, but not of the data: those have fingerprints, and data that changed under the same name are refused, never mixed. A
store is written in shards, each atomically (`shards`). If `prepare` is killed, only the unfinished shards are lost, and
several machines may prepare one store together.

Called by `train`, `evaluate` and the command line. JAX is never imported here, so that worker processes start quickly.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t5like import __version__
from t5like.config.schema import Config, DataConfig
from t5like.data.sources.files import SourceMissing
from t5like.data.sources.labels import Labelled, example_format
from t5like.data.sources.source import canonical, open_source
from t5like.data.store import statistics
from t5like.data.store.manifest import SPLITS, add_checksum, sum_counts, token_dtype
from t5like.data.store.shards import Documents, ShardJob, finished_shard, hashes_path, split_draws, write_shards
from t5like.data.store.token_store import FORMAT, SHARDS_FOLDER, TokenStore, file_digest, repair_advice
from t5like.data.tokenizers.tokenizer import Tokenizer, train_tokenizer
from t5like.errors import CheckpointError, DataError, printable
from t5like.io.atomic import remove_stale_temporaries, replace_file
from t5like.io.paths import cache_directory, expand
from t5like.io.strict_json import loads
from t5like.metrics.progress import Progress, status

NUM_SHARDS = 64  # of a store, as long as the size of a shard is within these limits
SMALLEST_SHARD, LARGEST_SHARD = 2**18, 2**28  # bytes of text
TINY = 2**25  # bytes of text that one process tokenizes before workers would have started


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run's tokenizer and token stores, in the order of `data.source`; notes are lines to print for the user."""

    tokenizer: Tokenizer
    tokenizer_path: Path
    stores: tuple[TokenStore, ...]
    notes: tuple[str, ...] = ()


def prepare(config: Config, *, progress: bool = True) -> Prepared:
    """Load or train the tokenizer and complete the token stores; returns existing ones unchanged.

    Args:
        progress: show progress on stderr.

    Raises:
        ConfigError: a source has an unknown type.
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
            if source.missing:
                notes.append(f"{source.missing}; using the existing token store {store.directory}")
            if empty := store.manifest.get("empty"):
                notes.append(f"data.source={source.spec}: {empty:,} examples have empty targets and are left out")
    except OSError as error:
        reason = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
        raise CheckpointError(f"data.cache_directory={config.data.cache_directory} can't be used: {reason}") from error
    return Prepared(tokenizer, tokenizer_path, tuple(stores), tuple(notes))


def find_prepared(config: Config) -> tuple[Tokenizer | None, tuple[TokenStore | None, ...]]:
    """The existing tokenizer and token stores of a config, None for those that `prepare` would have to make.

    Opens no source, so it does not detect that data have changed.

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
    """A source and its fingerprint, or the reason why it is missing."""

    spec: str
    documents: Documents | None = None
    fingerprint: str = ""
    missing: SourceMissing | None = None


def _open(spec: str, data: DataConfig) -> _Opened:
    try:
        format = example_format(data)
        source = open_source(spec, data, format.required if format else None)
        return _Opened(spec, Documents(source, format), source.fingerprint())
    except SourceMissing as error:
        return _Opened(spec, missing=error)


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _source_settings(data: DataConfig, spec: str) -> list[Any]:
    settings = [canonical(spec), data.text_field, data.split, data.text_documents, data.heldout_fraction]
    return [*settings, _format_settings(data)] if example_format(data) else settings


def _format_settings(data: DataConfig) -> dict[str, str]:
    """The settings that decide how a record becomes an example; empty for running text."""
    if example_format(data) is None:
        return {}
    if data.messages_field:
        return {"messages_field": data.messages_field}
    templates = {"inputs_template": data.inputs_template, "targets_template": data.targets_template}
    if data.label_objective is None:
        return templates
    labels = {"label_objective": data.label_objective, "label_names": ",".join(data.labels)}
    return {**templates, "second_template": data.second_template, **labels}


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
            replace_file(directory / "trained_on.json", json.dumps(record))  # last: it marks the model as complete
        else:
            for source, fingerprint in zip(opened, trained_on, strict=True):
                if source.documents and source.fingerprint != fingerprint:
                    raise _changed(source.spec, "a tokenizer was trained on it", directory)
    tokenizer = Tokenizer.load(path, num_sentinels=config.tokenizer.num_sentinels)
    tokenizer.check(config.tokenizer)
    return tokenizer, path


def _trained_on(directory: Path, num_sources: int) -> list[str] | None:
    """The fingerprints of the sources that the tokenizer in a directory was trained on; None if there is none yet.

    Earlier versions wrote the list of fingerprints alone, without a checksum.

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
    """The path of a tokenizer that is trained on the config's sources."""
    settings = [_source_settings(config.data, spec) for spec in config.data.source]
    unused = ("extra_eos_ids", "decoder_start_id")
    training = {k: v for k, v in dataclasses.asdict(config.tokenizer).items() if k not in unused}
    key = _key(FORMAT, settings, config.data.rates, training)
    return cache_directory(config.data.cache_directory) / "tokenizers" / key / "tokenizer.model"


def _train(config: Config, opened: Sequence[_Opened], path: Path, progress: bool) -> None:
    for source in opened:
        if source.missing:
            raise source.missing
    thresholds = [_threshold(config.data, source, progress) for source in opened]
    with status("training a tokenizer", show=progress):
        train_tokenizer(_sample(config, [source.documents for source in opened], thresholds), config.tokenizer, path)
    for source in opened:
        _refuse_if_changed(source)


def _sample(config: Config, opened: Sequence[Documents], thresholds: Sequence[float]) -> Iterator[str]:
    """Training documents of about `tokenizer.sample_characters` bytes in total, from each source by its rate."""
    sizes = [documents.source.size_hint for documents in opened]
    shares = np.reshape(config.data.rates or sizes, (-1, len(opened))).sum(axis=0).tolist()  # summed over phases
    for documents, size, share, threshold in zip(opened, sizes, shares, thresholds, strict=True):
        sampled = config.tokenizer.sample_characters * share / sum(shares) / max(size, 1)
        for index in range(len(documents)):
            if parts := documents[index]:
                split_draw, sample_draw = split_draws(parts)
                if split_draw >= threshold and sample_draw < sampled:
                    numbers = isinstance(documents.format, Labelled)  # its targets are no text
                    yield from (part.text for part in parts if not (numbers and part.is_target))


def _threshold(data: DataConfig, source: _Opened, progress: bool) -> float:
    """The draw (`split_draws`) below which a document is held out: `data.heldout_fraction`.

    If no draw is below it, the threshold is just above the smallest draw, so that one document is held out. Reads the
    source only until there is a document in each split.

    Raises:
        DataError: one of the splits would be empty.
    """
    draws = set()
    with status(f"reading {source.spec}", show=progress):  # counting the lines of a large file takes time
        for index in range(len(source.documents)):
            if parts := source.documents[index]:
                draws.add(split_draws(parts)[0])
            if draws and min(draws) < data.heldout_fraction <= max(draws):
                return data.heldout_fraction
    if len(draws) < 2 and source.documents.format:
        raise DataError(
            f"data.source={source.spec} has {len(draws)} different inputs with targets, and one has to be held out; "
            "use more examples"
        )
    if len(draws) < 2:
        by_line = source.spec.startswith("text:") and data.text_documents != "line"
        raise DataError(
            f"data.source={source.spec} has only one document (or copies of one), and one has to be held out; use more "
            f"text{', or data.text_documents=line if each line is a document' if by_line else ''}"
        )
    if max(draws) < data.heldout_fraction:
        raise DataError(
            f"data.heldout_fraction={data.heldout_fraction:g} leaves none of the {len(draws)} documents in "
            f"data.source={source.spec} to train on; use data.heldout_fraction=0.1"
        )
    return math.nextafter(min(draws), 1.0)


def _refuse_if_changed(source: _Opened) -> None:
    """Raise DataError if the data have changed since their fingerprint was taken."""
    if source.documents.source.fingerprint() != source.fingerprint:
        raise DataError(
            f"data.source={source.spec} changed while it was read; prepare again when no program writes to it"
        )


def _changed(spec: str, since: str, directory: Path) -> DataError:
    return DataError(
        f"data.source={spec} has changed since {since}; restore the old data, or remove {directory} to prepare it again"
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
        raise DataError(f"{directory}/manifest.json names another tokenizer; {repair_advice(directory)}")
    if source.documents and source.fingerprint != store.manifest["fingerprint"]:
        raise _changed(
            source.spec, f"{store.manifest['splits']['train']['tokens']} tokens were prepared from it", directory
        )
    return store


def _build_store(data: DataConfig, opened: _Opened, tokenizer: Tokenizer, progress: bool) -> TokenStore:
    if opened.missing:
        raise opened.missing
    documents, size = opened.documents, max(opened.documents.source.size_hint, 1)
    threshold = _threshold(data, opened, progress)  # reads documents, so it finds errors before anything is written
    directory = _store_directory(data, opened.spec, tokenizer)
    shards_directory = directory / SHARDS_FOLDER
    shards_directory.mkdir(parents=True, exist_ok=True)
    shard_bytes = min(max(size // NUM_SHARDS, SMALLEST_SHARD), LARGEST_SHARD)
    per_shard = max(1, -(-len(documents) * shard_bytes // size))
    job = ShardJob(shards_directory, documents, opened.fingerprint, tokenizer, threshold, per_shard)
    shards = range(-(-len(documents) // per_shard))
    records = {shard: record for shard in shards if (record := finished_shard(job, shard))}
    missing = [shard for shard in shards if shard not in records]
    workers = min(data.num_workers or (1 if size < TINY else len(os.sched_getaffinity(0))), len(missing))
    num_tokens, start, unit = 0, time.monotonic(), f"tokenizing {printable(opened.spec)}: shard"
    with Progress(len(shards), step=len(records), primary=progress, unit=unit) as bar:
        show = bar.timed()
        for shard, record in write_shards(job, missing, workers):
            records[shard] = record
            num_tokens += sum(split["tokens"] for split in record["splits"].values())
            show(len(records), {"train/tokens_per_second": num_tokens / (time.monotonic() - start)})
    try:
        _refuse_if_changed(opened)
    except DataError:
        for path in shards_directory.glob("*.json"):  # their fingerprint is that of the data before the change
            path.unlink(missing_ok=True)
        raise
    _write_manifest(directory, data, opened, tokenizer, [records[shard] for shard in shards])
    return TokenStore.open(directory)


def _write_manifest(
    directory: Path, data: DataConfig, source: _Opened, tokenizer: Tokenizer, records: list[dict[str, Any]]
) -> None:
    """Write the manifest, which marks the store as complete; remove all other files from its folder of shards."""
    shards_directory = directory / SHARDS_FOLDER
    duplicates = statistics.num_duplicates(hashes_path(shards_directory, record["number"]) for record in records)
    known = {f"{record['number']:05d}.json" for record in records} | {name for r in records for name in r["files"]}
    for path in shards_directory.iterdir():  # shards of an earlier attempt on other data
        if path.name not in known and not path.name.startswith("."):
            path.unlink(missing_ok=True)
    remove_stale_temporaries(shards_directory)
    manifest = {
        "format": FORMAT,
        "version": __version__,
        "source": canonical(source.spec),
        "fingerprint": source.fingerprint,
        "text_field": data.text_field,
        "split": data.split,
        "text_documents": data.text_documents,
        "heldout_fraction": data.heldout_fraction,
        **_format_settings(data),
        "tokenizer": tokenizer.hash,
        "vocab_size": tokenizer.vocab_size,
        "dtype": token_dtype(tokenizer.vocab_size),
        "splits": {split: sum_counts(records, split) for split in SPLITS},
        "pieces": records,
    }
    if duplicates is not None:
        manifest["duplicates"] = duplicates
    if example_format(data):
        manifest["empty"] = sum(record["empty"] for record in records)
    replace_file(directory / "manifest.json", json.dumps(add_checksum(manifest), indent=1))
