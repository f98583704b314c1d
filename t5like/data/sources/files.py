"""Sources that are files: glob patterns, fingerprints, the base class of all such sources, and text files.

Text files are read whole (`TextFiles`) or in passages (`Passages`). Lines, CSV and Parquet files are in `lines`,
`csv_files` and `parquet_files`. All implement `source.Source`; those with fields implement `source.RecordSource` for
supervised examples. Errors in a file raise a `DataError` that names the file and the line or row.
"""

import glob
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from t5like.data.sources.encoding import HEAD, MARK, decode_utf8, refuse_other_formats
from t5like.errors import DataError
from t5like.io.paths import expand
from t5like.io.regular_files import reading as _open
from t5like.io.regular_files import size_of

LARGEST_DOCUMENT = 64 * 2**20  # bytes
PASSAGE = 2**14  # bytes
# A file that unpacks to more than this many bytes may have at most this ratio of unpacked to stored bytes. Text has 3
# to 20, zeros have 1032 in gzip and more in Zstandard; Apache POI's ZipSecureFile refuses a ratio of 100.
UNCHECKED_BYTES, LARGEST_RATIO = 2**30, 200
_SAMPLED, _BLOCKS, _BLOCK = 2**20, 64, 4096  # a file above 1 MiB is fingerprinted by 64 blocks of 4 KiB
_BORDER_BLOCK = 1024  # bytes that are read at a time to find the end of a line


def refuse_bomb(path: str, unpacked: int, stored: Callable[[], int]) -> None:
    """Refuse a decompression bomb: a small file that would be read for days.

    Args:
        path: the file.
        unpacked: bytes that were unpacked so far.
        stored: returns the bytes of the file that they were stored in.

    Raises:
        DataError: the ratio is too large.
    """
    if unpacked > UNCHECKED_BYTES and unpacked > LARGEST_RATIO * stored():
        raise DataError(
            f"{path} unpacks to more than {LARGEST_RATIO} times its size ({unpacked:,} bytes from {stored():,}), which "
            "text does not: it may be a decompression bomb; if it is not, store it without compression"
        )


class SourceMissing(DataError):
    """The data don't exist, or not any more; a token store prepared from them may still exist."""


class RequiredFields(NamedTuple):
    """The fields that a caller needs of each record.

    Attributes:
        names: of the fields.
        fix: the advice in a message about a missing field; the names of the existing fields follow it.
        fixes: that of some fields, if it is another one.
    """

    names: tuple[str, ...]
    fix: str = "set data.text_field to"
    fixes: Mapping[str, str] = {}  # never changed; a read-only view of it could not be sent to workers


class Record(NamedTuple):
    """The fields of one document (at least those required), and its location for messages: file and line or row.

    Values are texts, numbers, lists and dicts.
    """

    fields: dict[str, Any]
    where: str


def matching_files(spec: str, pattern: str) -> list[str]:
    """The files that match a glob pattern, sorted; directories are skipped, empty files refused.

    An existing name is not a pattern: ``runs/a[b]c/*.txt`` reads the files of the directory ``a[b]c`` if it exists,
    else those of ``abc``.
    """
    try:
        matches = glob.glob(_escape_existing_names(str(expand(pattern))), recursive=True)
    except ValueError as error:
        raise SourceMissing(f"data.source={spec}: no file matches ({error})") from None
    paths = sorted(os.path.abspath(path) for path in matches if not os.path.isdir(path))
    if not paths:
        raise SourceMissing(f"data.source={spec}: no file matches; check the path, and quote the * in the shell")
    for path in paths:
        with _open(path) as file:
            if not file.read(1):
                raise DataError(f"{path} is empty; remove it, or narrow data.source={spec}")
    return paths


def _escape_existing_names(pattern: str) -> str:
    """Escape the first names of a pattern as far as they exist; `*` and `**` are never names."""
    names = pattern.split("/")
    for depth, name in enumerate(names):
        if name and (not name.strip("*") or not os.path.lexists("/".join(names[: depth + 1]))):
            break
        names[depth] = glob.escape(name)
    return "/".join(names)


def fingerprint_files(paths: list[str], *settings: str) -> str:
    """Digest of file names, sizes and contents, and of `settings`.

    Files above 1 MiB are sampled in 64 equally spaced blocks of 4 KiB, so an edit that keeps the size and changes no
    block is not detected. Directory names are not included: data may be moved.
    """
    digest = hashlib.sha256(json.dumps(settings).encode())
    for path in paths:
        with _open(path) as file:
            size = file.seek(0, io.SEEK_END)
            digest.update(json.dumps([os.path.basename(path), size]).encode())
            if size <= _SAMPLED:
                file.seek(0)
                digest.update(file.read())
            else:
                for block in range(_BLOCKS):
                    file.seek((size - _BLOCK) * block // (_BLOCKS - 1))
                    digest.update(file.read(_BLOCK))
    return digest.hexdigest()


class FileSource:
    """Base of sources that are files. A subclass defines `record` or `__getitem__`, and `_index` or `__len__`.

    Attributes:
        name: the entry of `data.source`.
        paths: the files, in order.
        required: fields that the caller needs of each record; None for sources without fields.
    """

    _index: tuple[Any, ...]  # the first item: int64, index of the first document of each part, then their number
    _cursor: Any = None  # an open file, in subclasses that read sequentially

    def __init__(self, name: str, paths: list[str], required: RequiredFields | None = None) -> None:
        self.name, self.paths, self.required = name, paths, required

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_cursor"}

    def __len__(self) -> int:
        return int(self._index[0][-1])

    def __getitem__(self, index: int) -> str:
        return record_text(self.record(index), self.required)

    def record(self, index: int) -> Record:
        raise NotImplementedError

    @property
    def size_hint(self) -> int:
        return sum(map(size_of, self.paths))

    def fingerprint(self) -> str:
        return fingerprint_files(self.paths)


class TextFiles(FileSource):
    """Each file is one document; a byte-order mark is removed."""

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> str:
        path = self.paths[index]
        with _open(path) as file:
            raw = file.read(LARGEST_DOCUMENT + 1)
        if len(raw) > LARGEST_DOCUMENT:
            raise DataError(f"{path} is more than the 64 MiB of one document; use data.text_documents=passage")
        refuse_other_formats(raw[:HEAD], path)
        text = raw.removeprefix(MARK)
        return decode_utf8(text, path, begin=len(raw) - len(text))


class Passages(FileSource):
    """Files split at the first line end after every 16 KiB; the passages of a file concatenate to the file.

    If a line continues for another 48 KiB, it is split between two characters.
    """

    def __getitem__(self, index: int) -> str:
        firsts, borders = self._index
        file = int(np.searchsorted(firsts, index, "right")) - 1
        begin, end = borders[file][index - firsts[file] :][:2].tolist()
        with _open(self.paths[file]) as opened:
            opened.seek(begin)
            raw = opened.read(end - begin)
        if len(raw) < end - begin:
            raise DataError(f"{self.paths[file]} has become shorter while it was read; prepare again")
        text = raw.removeprefix(MARK) if begin == 0 else raw
        return decode_utf8(text, self.paths[file], begin=end - len(text))

    @cached_property
    def _index(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """First passage of each file and the number of passages; byte offsets of each file's borders."""
        borders = [_passage_borders(path) for path in self.paths]
        return np.cumsum([0, *(len(b) - 1 for b in borders)]), borders


def _passage_borders(path: str) -> np.ndarray:
    """Byte offsets of the borders of a file's passages, 0 and the file's size included. Reads only around them."""
    borders = [0]
    with _open(path) as file:
        refuse_other_formats(file.read(HEAD), path)
        size = file.seek(0, io.SEEK_END)
        while size - borders[-1] > PASSAGE:
            borders.append(_border(file, borders[-1] + PASSAGE, min(borders[-1] + 4 * PASSAGE, size)))
    return np.array([*borders, size] if borders[-1] < size else borders, np.int64)


def _border(file: BinaryIO, least: int, most: int) -> int:
    """The offset after the first line end in [least, most]; without one, the last character border up to `most`."""
    offset = least - 1
    while offset < most:
        block = os.pread(file.fileno(), min(_BORDER_BLOCK, most - offset), offset)
        if not block:
            break  # the file has become shorter; reading the passage raises
        if end := block.find(b"\n") + 1:
            return offset + end
        offset += len(block)
    for border in range(most, most - 4, -1):  # a character has at most four bytes
        if (os.pread(file.fileno(), 1, border) or b" ")[0] & 0xC0 != 0x80:  # not inside a character
            return border
    return most


def record_text(record: Record, required: RequiredFields) -> str:
    """The text of a document: the required field, which must be a text."""
    check_fields(record.where, record.fields, required)
    name = required.names[0]
    text = record.fields[name]
    if not isinstance(text, str):
        kind = type(text).__name__
        raise DataError(f"{record.where}: {name!r} is a {kind}, not a text; remove it, or set data.text_field")
    if len(text) > LARGEST_DOCUMENT:
        raise DataError(f"{record.where}: {name!r} is more than the 64 MiB of one document; split it")
    return text


def check_fields(where: str, fields: Iterable[str], required: RequiredFields) -> None:
    """Raise DataError if a required field is missing, or its value is NaN or infinite; `fields`: a record, or names."""
    for name in required.names:
        if name not in fields:
            names = ", ".join(map(repr, fields)) or "(none)"
            raise DataError(
                f"{where}: there is no field {name!r}; {required.fixes.get(name, required.fix)} one of {names}"
            )
        if isinstance(fields, Mapping):
            refuse_not_finite(where, name, fields[name])


def refuse_not_finite(where: str, path: str, value: Any) -> None:
    """Raise DataError if the value at a path of a record is NaN or infinite, which Python's JSON reads and writes."""
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(
            f"{where}: {path!r} is {json.dumps(value)}, not a text or a finite number; correct it, or remove the line"
        )
