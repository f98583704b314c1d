"""Documents in files: which files a source has, what identifies them, and text files, whole or in passages.

What lines, tables and Parquet files have in common is here as well; they are in `lines`, `csv_files` and
`parquet_files`. All are classes with the methods of `sources.Source`; those whose documents have fields give them whole
as well (`record`), for supervised examples. What is wrong with a file is a `DataError` that names file and place.
"""

import glob
import hashlib
import io
import json
import os
from collections.abc import Iterable
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
_SAMPLED, _BLOCKS, _BLOCK = 2**20, 64, 4096  # a file above 1 MiB is fingerprinted by 64 blocks of 4 KiB
_BLOCK_OF_BORDERS = 1024  # bytes that are read at a time to find the end of a line


class SourceGone(DataError):
    """The data are not there (any more); a token store made of them may still be."""


class Wanted(NamedTuple):
    """The fields that are read of each record, and how a message begins that says which there are."""

    names: tuple[str, ...]
    fix: str = "set data.text_field to"


class Record(NamedTuple):
    """One example: its fields (those wanted, at least) as texts, numbers, lists and dicts; and where it stands."""

    fields: dict[str, Any]
    where: str


def matching_files(spec: str, pattern: str) -> list[str]:
    """The files of a glob, sorted; directories are passed over, empty files refused.

    A name that is there as it stands is not a pattern: ``runs/a[b]c/*.txt`` reads the files of the directory ``a[b]c``
    if there is one, else those of ``abc``.
    """
    try:
        matches = glob.glob(_names_escaped(str(expand(pattern))), recursive=True)
    except ValueError as error:
        raise SourceGone(f"data.source={spec}: no file matches ({error})") from None
    paths = sorted(os.path.abspath(path) for path in matches if not os.path.isdir(path))
    if not paths:
        raise SourceGone(f"data.source={spec}: no file matches; check the path, and quote the * in the shell")
    for path in paths:
        with _open(path) as file:
            if not file.read(1):
                raise DataError(f"{path} is empty; remove it, or narrow data.source={spec}")
    return paths


def _names_escaped(pattern: str) -> str:
    """A pattern whose first names match only themselves, as far as they are there; `*` and `**` are never names."""
    names = pattern.split("/")
    for number, name in enumerate(names):
        if name and (not name.strip("*") or not os.path.lexists("/".join(names[: number + 1]))):
            break
        names[number] = glob.escape(name)
    return "/".join(names)


def fingerprint_files(paths: list[str], *more: str) -> str:
    """Digest of names, sizes and contents, and of `more`.

    Files above 1 MiB are sampled in 64 blocks of 4 KiB from first to last, so an edit that keeps the size and misses
    every block goes unseen. Directories are left out: data may move.
    """
    digest = hashlib.sha256(json.dumps(more).encode())
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


class TextFiles:
    """Each file is one document, without its byte-order mark if it has one."""

    def __init__(self, name: str, paths: list[str]) -> None:
        self.name, self.paths = name, paths

    @property
    def size_hint(self) -> int:
        return sum(map(size_of, self.paths))

    def fingerprint(self) -> str:
        return fingerprint_files(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> str:
        path = self.paths[number]
        with _open(path) as file:
            raw = file.read(LARGEST_DOCUMENT + 1)
        if len(raw) > LARGEST_DOCUMENT:
            raise DataError(f"{path} is more than the 64 MiB of one document; use data.text_documents=passage")
        refuse_other_formats(raw[:HEAD], path)
        text = raw.removeprefix(MARK)
        return decode_utf8(text, path, begin=len(raw) - len(text))


class Passages:
    """Files cut behind the first line end after every 16 KiB; together the passages of a file are the file.

    A line that goes on for another 48 KiB is cut inside, between two characters.
    """

    def __init__(self, name: str, paths: list[str]) -> None:
        self.name, self.paths = name, paths

    @property
    def size_hint(self) -> int:
        return sum(map(size_of, self.paths))

    def fingerprint(self) -> str:
        return fingerprint_files(self.paths)

    def __len__(self) -> int:
        return int(self._index[0][-1])

    def __getitem__(self, number: int) -> str:
        firsts, borders = self._index
        file = int(np.searchsorted(firsts, number, "right")) - 1
        begin, end = borders[file][number - firsts[file] :][:2].tolist()
        with _open(self.paths[file]) as opened:
            opened.seek(begin)
            raw = opened.read(end - begin)
        if len(raw) < end - begin:
            raise DataError(f"{self.paths[file]} has become shorter while it was read; prepare again")
        text = raw.removeprefix(MARK) if begin == 0 else raw
        return decode_utf8(text, self.paths[file], begin=end - len(text))

    @cached_property
    def _index(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """First passage of each file (and their number), and each file's borders, 0 and its size among them."""
        borders = [_cut(path) for path in self.paths]
        return np.cumsum([0, *(len(b) - 1 for b in borders)]), borders


def _cut(path: str) -> np.ndarray:
    """The borders of a file's passages. Reads what lies around them, not the file."""
    borders = [0]
    with _open(path) as file:
        refuse_other_formats(file.read(HEAD), path)
        size = file.seek(0, io.SEEK_END)
        while size - borders[-1] > PASSAGE:
            borders.append(_border(file, borders[-1] + PASSAGE, min(borders[-1] + 4 * PASSAGE, size)))
    return np.array([*borders, size] if borders[-1] < size else borders, np.int64)


def _border(file: BinaryIO, least: int, most: int) -> int:
    """The first end of a line from `least` to `most`, offsets in a file; if there is none, `most` or a bit less."""
    place = least - 1
    while place < most:
        block = os.pread(file.fileno(), min(_BLOCK_OF_BORDERS, most - place), place)
        if not block:
            break  # the file has become shorter; who reads the passage says so
        if end := block.find(b"\n") + 1:
            return place + end
        place += len(block)
    for border in range(most, most - 4, -1):  # a character has at most four bytes
        if (os.pread(file.fileno(), 1, border) or b" ")[0] & 0xC0 != 0x80:  # not inside a character
            return border
    return most


def text_of(record: Record, wanted: Wanted) -> str:
    """The one field that is wanted of a record, if it is a text."""
    require_fields(record.where, record.fields, wanted)
    text = record.fields[wanted.names[0]]
    if not isinstance(text, str):
        kind = type(text).__name__
        raise DataError(
            f"{record.where}: {wanted.names[0]!r} is a {kind}, not a text; remove it, or set data.text_field"
        )
    if len(text) > LARGEST_DOCUMENT:
        raise DataError(f"{record.where}: {wanted.names[0]!r} is more than the 64 MiB of one document; split it")
    return text


def require_fields(where: str, fields: Iterable[str], wanted: Wanted) -> None:
    """Refuse if one of the wanted fields is not there."""
    for name in wanted.names:
        if name not in fields:
            names = ", ".join(map(repr, fields)) or "(none)"
            raise DataError(f"{where}: there is no field {name!r}; {wanted.fix} one of {names}")


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
