"""Documents by number, as texts or as records of fields: one class per kind of source, all with the same few methods
(`Source`, `RecordSource`).

`open_source` turns a word of `data.source` into one; `data.corpus` reads it, in several processes: a source pickles as
its names and its index, never as open files. Sources that are files are in `data.files` and the modules that it names;
here are the data sets of libraries. Packages that a source needs are imported where it starts to use them. What is
wrong with the data is a `DataError` in one line.
"""

import contextlib
import logging
import os
import platform
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from t5like.config.schema import DataConfig
from t5like.data.sources.csv_files import CommaSeparated
from t5like.data.sources.encoding import decode_utf8
from t5like.data.sources.files import (
    Passages,
    Record,
    SourceGone,
    TextFiles,
    Wanted,
    fingerprint_files,
    matching_files,
    one_line,
    require_fields,
    text_of,
)
from t5like.data.sources.lines import JsonLines, Lines, TabSeparated
from t5like.data.sources.parquet_files import ParquetFiles
from t5like.errors import ConfigError, DataError
from t5like.io.paths import cache_directory, expand

KINDS = "python_stdlib, tfds:NAME, text:GLOB, jsonl:GLOB, parquet:GLOB, csv:GLOB, tsv:GLOB, hf:NAME, task:NAME"
RECORD_FILES = {"jsonl": JsonLines, "parquet": ParquetFiles, "csv": CommaSeparated, "tsv": TabSeparated}
MANY_FILES = 100  # text files that are documents as they stand; fewer are cut into passages
_ROWS = 1024  # rows of a Hugging Face data set in memory at a time


class Source(Protocol):
    """Documents 0 .. len - 1, each a str of at most 64 MiB of UTF-8.

    Attributes:
        name: the word of `data.source` that it was opened by.
        size_hint: bytes of text in all documents together, about.
    """

    name: str
    size_hint: int

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> str: ...

    def fingerprint(self) -> str:
        """Hex digest that changes when the data do. Does not read everything: see `fingerprint_files`."""


class RecordSource(Source, Protocol):
    """A source whose documents have fields; the text of a document is one of them."""

    def record(self, number: int) -> Record: ...


def canonical(spec: str) -> str:
    """A source's name that means the same from every working directory and, for the standard library, every Python."""
    kind, _, rest = spec.partition(":")
    if kind == "python_stdlib":
        return f"python_stdlib:{platform.python_version()}"
    if kind in ("text", *RECORD_FILES) or (kind == "hf" and os.path.isdir(expand(rest))):
        return f"{kind}:{os.path.abspath(expand(rest))}"
    return spec


def open_source(spec: str, data: DataConfig, wanted: Wanted | None = None) -> Source:
    """Open one word of `data.source`; builds the standard-library corpus, or a task, if it is not there yet.

    Args:
        wanted: fields that `record` will be asked for (the source is then a `RecordSource`); None: `data.text_field`.

    Raises:
        ConfigError: there is no such kind of source, or it has no fields and some are wanted.
        SourceGone: nothing is found under that name.
        DataError: a file is empty or can't be read, a package is missing, a data set has another form.
    """
    kind, _, rest = spec.partition(":")
    fields = wanted or Wanted((data.text_field,))
    match kind:
        case "python_stdlib" if not rest:
            return _open_stdlib(spec, data, wanted or Wanted(("text",)))
        case "tfds" if rest:
            return _open_tfds(spec, rest, data, fields)
        case "task" if rest:
            return _open_task(spec, rest, data, fields)
        case "text" if rest and wanted:
            raise ConfigError(
                f"data.source={spec} has no fields, which data.objective=supervised needs; use jsonl:GLOB or csv:GLOB"
            )
        case "text" if rest:
            return _text_source(spec, _files(spec, rest), data.text_documents)
        case _ if rest and kind in RECORD_FILES:
            return RECORD_FILES[kind](spec, _files(spec, rest), fields)
        case "hf" if rest:
            return HuggingFace(spec, rest, data.split, fields)
    raise ConfigError(f"data.source={spec!r} must be one of {KINDS}, such as text:my_texts/*.txt")


def _files(spec: str, pattern: str) -> list[str]:
    if os.path.isdir(expand(pattern)):
        raise DataError(f"data.source={spec} is a directory; name the files in it, as in {spec.rstrip('/')}/*")
    return matching_files(spec, pattern)


def _text_source(spec: str, paths: list[str], documents: str) -> Source:
    if documents == "auto":
        documents = "file" if len(paths) >= MANY_FILES else "passage"
    return {"file": TextFiles, "line": Lines, "passage": Passages}[documents](spec, paths)


class Tfds:
    """A TFDS data set that lies on disk in a random-access format. TensorFlow is never imported."""

    def __init__(self, name: str, directory: str, split: str, wanted: Wanted) -> None:
        self.name, self.directory, self.split, self.wanted = name, directory, split, wanted
        with _failures(f"data.source={name} in {directory}"):
            info = self._builder.info
            try:
                self.size_hint = int(info.splits[split].num_bytes or info.dataset_size)
            except ValueError as error:
                rule = f"data.split={split!r} is not a split of data.source={name}"
                raise DataError(f"{rule}: {one_line(error)}") from None
        require_fields(f"data.source={name}", sorted(info.features), wanted)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if not key.startswith("_")}

    def fingerprint(self) -> str:
        files = sorted(str(path) for path in _listed(self.directory) if path.is_file())
        return fingerprint_files(files, self.split)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, number: int) -> str:
        return text_of(self.record(number), self.wanted)

    def record(self, number: int) -> Record:
        where = f"data.source={self.name}: example {number}"
        with _failures(f"{where} in {self.directory}"):
            record = self._records[number]
        features = self._builder.info.features
        return Record({name: _plain(record[name], features[name], where) for name in self.wanted.names}, where)

    @cached_property
    def _builder(self) -> Any:
        import tensorflow_datasets as tfds

        return tfds.builder_from_directory(self.directory)

    @cached_property
    def _records(self) -> Any:
        with _failures(f"data.source={self.name} in {self.directory}"):
            try:
                return self._builder.as_data_source(split=self.split)
            except NotImplementedError:
                raise DataError(
                    f"data.source={self.name}: {self.directory} is in a format without random access; prepare it again "
                    "with tfds build --file_format=array_record"
                ) from None


def _listed(directory: str) -> list[Path]:
    try:
        return list(Path(directory).iterdir())
    except OSError as error:
        raise DataError(f"{directory} can't be read: {error.strerror}") from None


def _open_tfds(spec: str, name: str, data: DataConfig, wanted: Wanted) -> Tfds:
    import tensorflow_datasets as tfds

    with _failures(f"data.source={spec}"):
        try:
            builder = tfds.builder(name)
        except (tfds.core.registered.DatasetNotFoundError, ImportError) as error:
            raise SourceGone(f"data.source={spec}: {str(error).splitlines()[0]}") from None
    if not builder.is_prepared():
        raise SourceGone(
            f"data.source={spec} is not in {builder.data_dir}; prepare it with tfds build {name} "
            "--file_format=array_record, or set TFDS_DATA_DIR to where it is"
        )
    return Tfds(spec, str(builder.data_dir), data.split, wanted)


def _open_stdlib(spec: str, data: DataConfig, wanted: Wanted) -> Tfds:
    from t5like.data.sources.python_stdlib import PythonStdlib

    return Tfds(spec, _built(PythonStdlib, data), "train", wanted)


def _open_task(spec: str, name: str, data: DataConfig, wanted: Wanted) -> Tfds:
    from t5like.data.sources.python_tasks import NAMES, Tasks

    if name not in NAMES:
        raise ConfigError(f"data.source={spec}: there is no task {name!r}; use task: and one of {', '.join(NAMES)}")
    return Tfds(spec, _built(Tasks, data, config=name), data.split, wanted)


def _built(builder_class: Any, data: DataConfig, **options: str) -> str:
    """The directory of a data set of ours below `data.cache_directory`; it is built there if it is missing."""
    import tensorflow_datasets as tfds

    directory = cache_directory(data.cache_directory) / "tfds"
    make = lambda: builder_class(data_dir=directory, file_format="array_record", **options)
    with _quiet():
        builder = make()
        if not builder.is_prepared():
            tfds.disable_progress_bar()
            try:
                builder.download_and_prepare()
            except OSError as error:
                if not make().is_prepared():  # nor by another process
                    raise DataError(
                        f"data.cache_directory={directory.parent} can't be written: {one_line(error)}"
                    ) from None
    return str(builder.data_dir)


@contextlib.contextmanager
def _failures(where: str) -> Iterator[None]:
    """Failures within become a DataError: of a damaged file, a library may raise anything, at times without a word."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{where} can't be read: {one_line(error) or 'damaged file'}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what TFDS announces on stdout, and its warning that what is about to be built is not there yet."""
    log, wanted = logging.getLogger("absl"), lambda record: "has no dataset_info.json" not in record.getMessage()
    log.addFilter(wanted)
    try:
        with contextlib.redirect_stdout(None):
            yield
    finally:
        log.removeFilter(wanted)


def _plain(value: Any, feature: Any, where: str) -> Any:
    """A value of a library as text, number, list or dict; a class label as its name. `feature` is the library's type.

    A sequence of dicts is a dict of sequences in TFDS, and stays one.
    """
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
    if isinstance(value, bytes):
        return decode_utf8(value, where)
    if isinstance(value, Mapping):
        return {key: _plain(part, inner[key], where) for key, part in value.items()}
    if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim):
        return [_plain(part, inner, where) for part in value]
    value = value.item() if isinstance(value, np.generic | np.ndarray) else value
    if hasattr(feature, "int2str") and isinstance(value, int) and value >= 0:  # -1: no label
        return feature.int2str(value)
    return value


class HuggingFace:
    """A data set of the package `datasets`: ``NAME``, ``OWNER/NAME`` or ``OWNER/NAME/CONFIG`` of the hub or its cache
    (``HF_HUB_OFFLINE=1`` keeps it off the network), or a directory that ``save_to_disk`` wrote. Runs no code of it."""

    def __init__(self, name: str, path: str, split: str, wanted: Wanted) -> None:
        self.name, self.path, self.split, self.wanted = name, path, split, wanted
        rows = self._rows
        require_fields(f"data.source={name}", rows.column_names, wanted)
        self.size_hint = int(rows.data.nbytes)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if not key.startswith("_")}

    def fingerprint(self) -> str:
        return fingerprint_files([row["filename"] for row in self._rows.cache_files], self.split, str(len(self._rows)))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> str:
        return text_of(self.record(number), self.wanted)

    def record(self, number: int) -> Record:
        block, inner = divmod(number, _ROWS)
        where, features = f"data.source={self.name}: row {number}", self._rows.features
        if self._block[0] != block:
            with _failures(where):
                self._block = block, self._rows[block * _ROWS : (block + 1) * _ROWS]
        fields = {name: _plain(self._block[1][name][inner], features[name], where) for name in self.wanted.names}
        return Record(fields, where)

    @cached_property
    def _block(self) -> tuple[int, dict[str, list[Any]]]:
        return -1, {}

    @cached_property
    def _rows(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise DataError(f"data.source={self.name} needs the package datasets; pip install 't5like[hf]'") from None
        local = expand(self.path)
        try:
            if os.path.isdir(local):
                found = datasets.load_from_disk(local)
                if isinstance(found, datasets.DatasetDict):
                    found = found[self.split]
            else:
                owner, name, config = [*self.path.split("/", 2), None, None][:3]
                found = datasets.load_dataset(f"{owner}/{name}" if name else owner, config, split=self.split)
        except Exception as error:  # see `_failures`
            raise SourceGone(f"data.source={self.name}, data.split={self.split}: {one_line(error)}") from None
        names = list(self.wanted.names)
        return found.select_columns(names) if set(names) <= set(found.column_names) else found
