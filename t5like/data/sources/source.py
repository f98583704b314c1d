"""Document sources: random access by index to texts, or to records with fields; one class per type of source.

`open_source` opens one entry of `data.source`; `preparation` reads it in several processes, so a source pickles as its
names and its index, never with open files. Sources that are files are in `files` and the modules that it names; TFDS
and Hugging Face data sets are here. Packages that a source needs are imported on first use. Errors in the data raise a
`DataError` with a message of one line.
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
    RequiredFields,
    SourceMissing,
    TextFiles,
    check_fields,
    fingerprint_files,
    matching_files,
    record_text,
)
from t5like.data.sources.lines import JsonLines, Lines, TabSeparated
from t5like.data.sources.parquet_files import ParquetFiles
from t5like.data.sources.reasoning_gym import open_reasoning_gym
from t5like.errors import ConfigError, DataError, one_line
from t5like.io.paths import cache_directory, expand

SOURCE_TYPES = (
    "python_stdlib, tfds:NAME, text:GLOB, jsonl:GLOB, parquet:GLOB, csv:GLOB, tsv:GLOB, hf:NAME, task:NAME, "
    "reasoning_gym:TASK"
)
RECORD_FILES = {"jsonl": JsonLines, "parquet": ParquetFiles, "csv": CommaSeparated, "tsv": TabSeparated}
MIN_FILES_AS_DOCUMENTS = 100  # text files; fewer files are split into passages
_BLOCK_ROWS = 1024  # rows of a Hugging Face data set in memory at a time


class Source(Protocol):
    """Documents by index, each a str of at most 64 MiB of UTF-8.

    Attributes:
        name: the entry of `data.source`.
        size_hint: approximate bytes of text in all documents.
    """

    name: str
    size_hint: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> str: ...

    def fingerprint(self) -> str:
        """Hex digest that changes with the data. Large files are sampled: see `fingerprint_files`."""


class RecordSource(Source, Protocol):
    """A source whose documents have fields; the text of a document is one of them."""

    def record(self, index: int) -> Record: ...


def canonical(spec: str) -> str:
    """A source's name without dependence on the working directory; it includes the version of the standard library."""
    source_type, _, rest = spec.partition(":")
    if source_type == "python_stdlib":
        return f"python_stdlib:{platform.python_version()}"
    if source_type in ("text", *RECORD_FILES) or (source_type == "hf" and os.path.isdir(expand(rest))):
        return f"{source_type}:{os.path.abspath(expand(rest))}"
    return spec


def open_source(spec: str, data: DataConfig, required: RequiredFields | None = None) -> Source:
    """Open one entry of `data.source`; builds the standard-library corpus, or a task, if it does not exist yet.

    Args:
        required: fields that the caller will read from `record` (the source is then a `RecordSource`); None:
            `data.text_field`.

    Raises:
        ConfigError: the type of source is unknown, or the source has no fields although some are required.
        SourceMissing: the data don't exist.
        DataError: a file is empty or can't be read, a package is missing, or a data set has an unknown format.
    """
    source_type, _, rest = spec.partition(":")
    fields = required or RequiredFields((data.text_field,))
    match source_type:
        case "python_stdlib" if not rest:
            return _open_stdlib(spec, data, required or RequiredFields(("text",)))
        case "tfds" if rest:
            return _open_tfds(spec, rest, data, fields)
        case "task" if rest:
            return _open_task(spec, rest, data, fields)
        case "reasoning_gym" if rest:
            return open_reasoning_gym(spec, data.cache_directory, fields)
        case "text" if rest and required:
            raise ConfigError(
                f"data.source={spec} has no fields, which data.objective=supervised needs; use jsonl:GLOB or csv:GLOB"
            )
        case "text" if rest:
            return _text_source(spec, _files(spec, rest), data.text_documents)
        case _ if rest and source_type in RECORD_FILES:
            return RECORD_FILES[source_type](spec, _files(spec, rest), fields)
        case "hf" if rest:
            return HuggingFace(spec, rest, data.split, fields)
    raise ConfigError(f"data.source={spec!r} must be one of {SOURCE_TYPES}, such as text:my_texts/*.txt")


def _files(spec: str, pattern: str) -> list[str]:
    if os.path.isdir(expand(pattern)):
        raise DataError(f"data.source={spec} is a directory; name the files in it, as in {spec.rstrip('/')}/*")
    return matching_files(spec, pattern)


def _text_source(spec: str, paths: list[str], documents: str) -> Source:
    if documents == "auto":
        documents = "file" if len(paths) >= MIN_FILES_AS_DOCUMENTS else "passage"
    return {"file": TextFiles, "line": Lines, "passage": Passages}[documents](spec, paths)


class _LibrarySource:
    """Base of data sets that a library reads. Attributes that begin with ``_`` are caches, which are not pickled."""

    required: RequiredFields

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __getitem__(self, index: int) -> str:
        return record_text(self.record(index), self.required)

    def record(self, index: int) -> Record:
        raise NotImplementedError


class Tfds(_LibrarySource):
    """A TFDS data set on disk in a random-access format. TensorFlow is never imported."""

    def __init__(self, name: str, directory: str, split: str, required: RequiredFields) -> None:
        self.name, self.directory, self.split, self.required = name, directory, split, required
        with _data_errors(f"data.source={name} in {directory}"):
            info = self._builder.info
            try:
                self.size_hint = int(info.splits[split].num_bytes or info.dataset_size)
            except ValueError as error:
                rule = f"data.split={split!r} is not a split of data.source={name}"
                raise DataError(f"{rule}: {one_line(error)}") from None
        check_fields(f"data.source={name}", sorted(info.features), required)

    def fingerprint(self) -> str:
        files = sorted(str(path) for path in _list_directory(self.directory) if path.is_file())
        return fingerprint_files(files, self.split)

    def __len__(self) -> int:
        return len(self._records)

    def record(self, index: int) -> Record:
        where = f"data.source={self.name}: example {index}"
        with _data_errors(f"{where} in {self.directory}"):
            record = self._records[index]
        features = self._builder.info.features
        return Record({name: _to_python(record[name], features[name], where) for name in self.required.names}, where)

    @cached_property
    def _builder(self) -> Any:
        import tensorflow_datasets as tfds

        return tfds.builder_from_directory(self.directory)

    @cached_property
    def _records(self) -> Any:
        with _data_errors(f"data.source={self.name} in {self.directory}"):
            try:
                return self._builder.as_data_source(split=self.split)
            except NotImplementedError:
                raise DataError(
                    f"data.source={self.name}: {self.directory} is in a format without random access; prepare it again "
                    "with tfds build --file_format=array_record"
                ) from None


def _list_directory(directory: str) -> list[Path]:
    try:
        return list(Path(directory).iterdir())
    except OSError as error:
        raise DataError(f"{directory} can't be read: {error.strerror}") from None


def _open_tfds(spec: str, name: str, data: DataConfig, required: RequiredFields) -> Tfds:
    import tensorflow_datasets as tfds

    with _data_errors(f"data.source={spec}"):
        try:
            builder = tfds.builder(name)
        except (tfds.core.registered.DatasetNotFoundError, ImportError) as error:
            raise SourceMissing(f"data.source={spec}: {str(error).splitlines()[0]}") from None
    if not builder.is_prepared():
        raise SourceMissing(
            f"data.source={spec} is not in {builder.data_dir}; prepare it with tfds build {name} "
            "--file_format=array_record, or set TFDS_DATA_DIR to where it is"
        )
    return Tfds(spec, str(builder.data_dir), data.split, required)


def _open_stdlib(spec: str, data: DataConfig, required: RequiredFields) -> Tfds:
    from t5like.data.sources.python_stdlib import PythonStdlib

    return Tfds(spec, _build(PythonStdlib, data), "train", required)


def _open_task(spec: str, name: str, data: DataConfig, required: RequiredFields) -> Tfds:
    from t5like.data.sources.python_tasks import NAMES, Tasks

    if name not in NAMES:
        raise ConfigError(f"data.source={spec}: there is no task {name!r}; use task: and one of {', '.join(NAMES)}")
    return Tfds(spec, _build(Tasks, data, config=name), data.split, required)


def _build(builder_class: Any, data: DataConfig, **options: str) -> str:
    """The directory of a data set that t5like builds below `data.cache_directory`; built now if it does not exist."""
    import tensorflow_datasets as tfds

    directory = cache_directory(data.cache_directory) / "tfds"
    make_builder = lambda: builder_class(data_dir=directory, file_format="array_record", **options)
    with _silence_tfds():
        builder = make_builder()
        if not builder.is_prepared():
            tfds.disable_progress_bar()
            try:
                builder.download_and_prepare()
            except OSError as error:
                if not make_builder().is_prepared():  # another process has not built it either
                    raise DataError(
                        f"data.cache_directory={directory.parent} can't be written: {one_line(error)}"
                    ) from None
    return str(builder.data_dir)


@contextlib.contextmanager
def _data_errors(where: str) -> Iterator[None]:
    """Convert exceptions to a DataError. For a damaged file, a library may raise anything, even without a message."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{where} can't be read: {one_line(error) or 'damaged file'}") from error


@contextlib.contextmanager
def _silence_tfds() -> Iterator[None]:
    """Suppress what TFDS prints on stdout, and its warning that the data set does not exist before it is built."""
    log, keep = logging.getLogger("absl"), lambda record: "has no dataset_info.json" not in record.getMessage()
    log.addFilter(keep)
    try:
        with contextlib.redirect_stdout(None):
            yield
    finally:
        log.removeFilter(keep)


def _to_python(value: Any, feature: Any, where: str) -> Any:
    """Convert a library's value to text, number, list or dict, and a class label to its name.

    A sequence of dicts is a dict of sequences in TFDS, and stays one. `feature` is the library's type of the value.
    """
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
    if isinstance(value, bytes):
        return decode_utf8(value, where)
    if isinstance(value, Mapping):
        return {key: _to_python(part, inner[key], where) for key, part in value.items()}
    if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim):
        return [_to_python(part, inner, where) for part in value]
    value = value.item() if isinstance(value, np.generic | np.ndarray) else value
    if hasattr(feature, "int2str") and isinstance(value, int) and value >= 0:  # -1: no label
        return feature.int2str(value)
    return value


class HuggingFace(_LibrarySource):
    """A data set of the package `datasets`: ``NAME``, ``OWNER/NAME`` or ``OWNER/NAME/CONFIG`` from the hub or its cache
    (``HF_HUB_OFFLINE=1`` disables the network), or a directory written by ``save_to_disk``. Its code is not run."""

    def __init__(self, name: str, path: str, split: str, required: RequiredFields) -> None:
        self.name, self.path, self.split, self.required = name, path, split, required
        rows = self._rows
        check_fields(f"data.source={name}", rows.column_names, required)
        self.size_hint = int(rows.data.nbytes)

    def fingerprint(self) -> str:
        return fingerprint_files([row["filename"] for row in self._rows.cache_files], self.split, str(len(self._rows)))

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, index: int) -> Record:
        block, row = divmod(index, _BLOCK_ROWS)
        where, features = f"data.source={self.name}: row {index}", self._rows.features
        if self._block[0] != block:
            with _data_errors(where):
                self._block = block, self._rows[block * _BLOCK_ROWS : (block + 1) * _BLOCK_ROWS]
        fields = {name: _to_python(self._block[1][name][row], features[name], where) for name in self.required.names}
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
                rows = datasets.load_from_disk(local)
                if isinstance(rows, datasets.DatasetDict):
                    rows = rows[self.split]
            else:
                owner, name, config = [*self.path.split("/", 2), None, None][:3]
                rows = datasets.load_dataset(f"{owner}/{name}" if name else owner, config, split=self.split)
        except Exception as error:  # see `_data_errors`
            raise SourceMissing(f"data.source={self.name}, data.split={self.split}: {one_line(error)}") from None
        names = list(self.required.names)
        return rows.select_columns(names) if set(names) <= set(rows.column_names) else rows
