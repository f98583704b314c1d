"""Documents by number: one class per kind of source, all with the same few methods (`Source`).

`open_source` turns a word of `data.source` into one; `data.corpus` reads it, in several processes: a source pickles as
its names and its index, never as open files. Sources that are files are in `data.files`; here are the data sets of
libraries. Packages that a source needs are imported where it starts to use them. What is wrong with the data is a
`DataError` in one line.
"""

import contextlib
import os
import platform
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from t5like.config import DataConfig
from t5like.data.files import (
    Lines,
    ParquetFiles,
    Passages,
    SourceGone,
    TextFiles,
    checked_text,
    decode_utf8,
    fingerprint_files,
    matching_files,
    no_field,
    one_line,
)
from t5like.errors import ConfigError, DataError

KINDS = "python_stdlib, tfds:NAME, text:GLOB, jsonl:GLOB, parquet:GLOB, hf:NAME"
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


def canonical(spec: str) -> str:
    """A source's name that means the same from every working directory and, for the standard library, every Python."""
    kind, _, rest = spec.partition(":")
    if kind == "python_stdlib":
        return f"python_stdlib:{platform.python_version()}"
    if kind in ("text", "jsonl", "parquet") or (kind == "hf" and os.path.isdir(os.path.expanduser(rest))):
        return f"{kind}:{os.path.abspath(os.path.expanduser(rest))}"
    return spec


def open_source(spec: str, data: DataConfig) -> Source:
    """Open one word of `data.source`; builds the standard-library corpus if it is not there yet.

    Raises:
        ConfigError: there is no such kind of source.
        SourceGone: nothing is found under that name.
        DataError: a file is empty or can't be read, a package is missing, a data set has another form.
    """
    kind, _, rest = spec.partition(":")
    match kind:
        case "python_stdlib" if not rest:
            return _open_stdlib(spec, Path(data.directory).expanduser() / "tfds")
        case "tfds" if rest:
            return _open_tfds(spec, rest, data)
        case "text" if rest:
            return _text_source(spec, matching_files(spec, rest), data.text_documents)
        case "jsonl" if rest:
            return Lines(spec, matching_files(spec, rest), data.text_field)
        case "parquet" if rest:
            return ParquetFiles(spec, matching_files(spec, rest), data.text_field)
        case "hf" if rest:
            return HuggingFace(spec, rest, data.split, data.text_field)
    raise ConfigError(f"data.source={spec!r} must be one of {KINDS}, such as text:my_texts/*.txt")


def _text_source(spec: str, paths: list[str], documents: str) -> Source:
    if documents == "auto":
        documents = "file" if len(paths) >= MANY_FILES else "passage"
    return {"file": TextFiles, "line": Lines, "passage": Passages}[documents](spec, paths)


class Tfds:
    """A TFDS data set that lies on disk in a random-access format. TensorFlow is never imported."""

    def __init__(self, name: str, directory: str, split: str, field: str) -> None:
        self.name, self.directory, self.split, self.field = name, directory, split, field
        try:
            info = self._builder.info
            self.size_hint = int(info.splits[split].num_bytes or info.dataset_size)
        except ValueError as error:
            raise DataError(f"data.split={split!r} is not a split of data.source={name}: {one_line(error)}") from None
        if field not in info.features:
            raise DataError(no_field(f"data.source={name}", field, sorted(info.features)))

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if not key.startswith("_")}

    def fingerprint(self) -> str:
        files = sorted(str(path) for path in Path(self.directory).iterdir() if path.is_file())
        return fingerprint_files(files, self.split)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, number: int) -> str:
        where = f"data.source={self.name}: example {number}"
        try:
            record = self._records[number]
        except (RuntimeError, ValueError, OSError) as error:
            reason = one_line(error) or "damaged file"  # for a truncated file the library has no words
            raise DataError(f"{where} in {self.directory} can't be read: {reason}") from None
        text = record[self.field]
        if not isinstance(text, bytes):
            raise DataError(f"{where}: {self.field!r} is a {type(text).__name__}, not a text; set data.text_field")
        return decode_utf8(text, where)

    @cached_property
    def _builder(self) -> Any:
        import tensorflow_datasets as tfds

        return tfds.builder_from_directory(self.directory)

    @cached_property
    def _records(self) -> Any:
        try:
            return self._builder.as_data_source(split=self.split)
        except NotImplementedError:
            raise DataError(
                f"data.source={self.name}: {self.directory} is in a format without random access; prepare it again "
                "with tfds build --file_format=array_record"
            ) from None


def _open_tfds(spec: str, name: str, data: DataConfig) -> Tfds:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name)
    except (ValueError, ImportError) as error:
        raise SourceGone(f"data.source={spec}: {str(error).splitlines()[0]}") from None
    if not builder.is_prepared():
        raise SourceGone(
            f"data.source={spec} is not in {builder.data_dir}; prepare it with tfds build {name} "
            "--file_format=array_record, or set TFDS_DATA_DIR to where it is"
        )
    return Tfds(spec, str(builder.data_dir), data.split, data.text_field)


def _open_stdlib(spec: str, directory: Path) -> Tfds:
    """Open the standard-library corpus below `directory`, after building it there if it is missing."""
    import tensorflow_datasets as tfds

    from t5like.data.python_stdlib import PythonStdlib

    builder = PythonStdlib(data_dir=directory, file_format="array_record")
    if not builder.is_prepared():
        tfds.disable_progress_bar()
        try:
            with contextlib.redirect_stdout(None):  # TFDS announces itself there
                builder.download_and_prepare()
        except OSError as error:
            if not PythonStdlib(data_dir=directory, file_format="array_record").is_prepared():  # nor by another process
                raise DataError(f"data.directory={directory.parent} can't be written: {one_line(error)}") from None
    return Tfds(spec, str(builder.data_dir), "train", "text")


class HuggingFace:
    """A data set of the package `datasets`: ``NAME``, ``OWNER/NAME`` or ``OWNER/NAME/CONFIG`` of the hub or its cache
    (``HF_HUB_OFFLINE=1`` keeps it off the network), or a directory that ``save_to_disk`` wrote. Runs no code of it."""

    def __init__(self, name: str, path: str, split: str, field: str) -> None:
        self.name, self.path, self.split, self.field = name, path, split, field
        rows = self._rows
        if field not in rows.column_names:
            raise DataError(no_field(f"data.source={name}", field, rows.column_names))
        self.size_hint = int(rows.data.nbytes)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if not key.startswith("_")}

    def fingerprint(self) -> str:
        return fingerprint_files([row["filename"] for row in self._rows.cache_files], self.split, str(len(self._rows)))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> str:
        block, inner = divmod(number, _ROWS)
        if self._block[0] != block:
            self._block = block, self._rows[block * _ROWS : (block + 1) * _ROWS][self.field]
        return checked_text(self._block[1][inner], self.field, f"data.source={self.name}: row {number}")

    @cached_property
    def _block(self) -> tuple[int, list[Any]]:
        return -1, []

    @cached_property
    def _rows(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise DataError(f"data.source={self.name} needs the package datasets; pip install 't5like[hf]'") from None
        local = os.path.expanduser(self.path)
        try:
            if os.path.isdir(local):
                found = datasets.load_from_disk(local)
                if isinstance(found, datasets.DatasetDict):
                    found = found[self.split]
            else:
                owner, name, config = [*self.path.split("/", 2), None, None][:3]
                found = datasets.load_dataset(f"{owner}/{name}" if name else owner, config, split=self.split)
        except (OSError, ValueError, KeyError) as error:
            raise SourceGone(f"data.source={self.name}, data.split={self.split}: {one_line(error)}") from None
        return found.select_columns([self.field]) if self.field in found.column_names else found
