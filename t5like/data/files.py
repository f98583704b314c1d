"""Documents in files: text, lines, JSON lines, tab-separated values, Parquet. Classes with the methods of
`sources.Source`; those whose documents have fields give them whole as well (`record`), for supervised examples.

Reading in order is cheap and takes constant memory; jumping about is allowed but may cost a read from the start of the
file (.gz, .zst) or of a row group (Parquet). What is wrong with a file is a `DataError` that names file and line.
"""

import contextlib
import glob
import hashlib
import io
import json
import mmap
import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from t5like.errors import DataError

LARGEST_DOCUMENT = 64 * 2**20  # bytes
PASSAGE = 2**14  # bytes
_SAMPLED, _BLOCKS, _BLOCK = 2**20, 64, 4096  # a file above 1 MiB is fingerprinted by 64 blocks of 4 KiB
_STRIDE = 1024  # lines between two remembered places in a file
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5": "zstd"}


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
    """The files of a glob, sorted; directories are passed over, empty files refused."""
    matches = glob.glob(os.path.expanduser(pattern), recursive=True)
    paths = sorted(os.path.abspath(path) for path in matches if not os.path.isdir(path))
    if not paths:
        raise SourceGone(f"data.source={spec}: no file matches; check the path, and quote the * in the shell")
    for path in paths:
        with _open(path) as file:
            if not file.read(1):
                raise DataError(f"{path} is empty; remove it, or narrow data.source={spec}")
    return paths


def _open(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}") from None


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
        return sum(map(os.path.getsize, self.paths))

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
        return decode_utf8(raw.removeprefix(b"\xef\xbb\xbf"), path)


class Passages:
    """Files cut behind the first line end after every 16 KiB; together the passages of a file are the file.

    A line that goes on for another 48 KiB is cut inside, between two characters.
    """

    def __init__(self, name: str, paths: list[str]) -> None:
        self.name, self.paths = name, paths

    @property
    def size_hint(self) -> int:
        return sum(map(os.path.getsize, self.paths))

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
        return decode_utf8(raw.removeprefix(b"\xef\xbb\xbf") if begin == 0 else raw, self.paths[file])

    @cached_property
    def _index(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """First passage of each file (and their number), and each file's borders, 0 and its size among them."""
        borders = [_cut(path) for path in self.paths]
        return np.cumsum([0, *(len(b) - 1 for b in borders)]), borders


def _cut(path: str) -> np.ndarray:
    borders = [0]
    with _open(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        while len(text) - borders[-1] > PASSAGE:
            least, most = borders[-1] + PASSAGE, min(borders[-1] + 4 * PASSAGE, len(text))
            border = text.find(b"\n", least - 1, most) + 1 or most
            while border < len(text) and text[border] & 0xC0 == 0x80:  # inside a character
                border -= 1
            borders.append(border)
        return np.array([*borders, len(text)] if borders[-1] < len(text) else borders, np.int64)


class Lines:
    """Each line that is not blank is one document: as it stands, or as a JSON object if fields are `wanted`.

    Files may be compressed with gzip or Zstandard, which is told by their content, not their name. One scan finds every
    1024th line; between those, and in compressed files from the start, lines are read over.
    """

    _first = 0  # lines of each file that are no documents

    def __init__(self, name: str, paths: list[str], wanted: Wanted | None = None) -> None:
        self.name, self.paths, self.wanted = name, paths, wanted
        self._cursor: _Cursor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cursor": None}

    def fingerprint(self) -> str:
        return fingerprint_files(self.paths)

    @property
    def size_hint(self) -> int:
        return self._index[2]

    def __len__(self) -> int:
        return int(self._index[0][-1])

    def __getitem__(self, number: int) -> str:
        if self.wanted:
            return text_of(self.record(number), self.wanted)
        return _decode_line(*self._line(number))

    def record(self, number: int) -> Record:
        raw, where = self._line(number)
        try:
            fields = json.loads(decode_utf8(raw, where))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not valid JSON ({error}); every line must be one JSON object") from None
        if not isinstance(fields, dict):
            raise DataError(f"{where}: a JSON {type(fields).__name__}, but every line must be one JSON object")
        return Record(fields, where)

    def _line(self, number: int) -> tuple[bytes, str]:
        """The bytes of a document's line, and where it stands."""
        firsts, marks, _ = self._index
        file = int(np.searchsorted(firsts, number, "right")) - 1
        wanted = number - int(firsts[file]) + self._first
        cursor = self._cursor
        nearest = 0 if cursor is None or cursor.compressed else wanted // _STRIDE * _STRIDE
        if cursor is None or cursor.path != self.paths[file] or not nearest <= cursor.document <= wanted:
            if cursor:
                cursor.close()
            cursor = self._cursor = _Cursor(self.paths[file])
            cursor.seek(wanted // _STRIDE * _STRIDE, *marks[file][wanted // _STRIDE].tolist())
        while cursor.document <= wanted:
            if (raw := cursor.next()) is None:
                raise DataError(f"{cursor.path} has become shorter while it was read; prepare again")
        return raw, f"{cursor.path}:{cursor.line}"

    @cached_property
    def _index(self) -> tuple[np.ndarray, list[np.ndarray], int]:
        """First document of each file (and their number), places in each file, bytes; see `_scan`."""
        counts, marks, size = [0], [], 0
        for path in self.paths:
            count, places, length = _scan(path)
            counts.append(max(count - self._first, 0))
            marks.append(places)
            size += length
        if not sum(counts):
            raise DataError(f"data.source={self.name}: there are only blank lines{' below the first' * self._first}")
        return np.cumsum(counts), marks, size


class TabSeparated(Lines):
    """Each line is one document of cells between tabs; the first line of a file names the columns.

    Nothing is quoted or escaped: a cell holds neither tab nor line end (IANA, text/tab-separated-values).
    """

    _first = 1

    def record(self, number: int) -> Record:
        raw, where = self._line(number)
        path = where.rpartition(":")[0]
        if path not in self._columns:
            self._columns[path] = _column_names(path)
        names, cells = self._columns[path], _decode_line(raw, where).split("\t")
        if len(cells) != len(names):
            raise DataError(
                f"{where} has {len(cells)} cells, but the first line names {len(names)} columns "
                f"({', '.join(names)}); write one cell for each, with a tab between"
            )
        return Record(dict(zip(names, cells, strict=True)), where)

    @cached_property
    def _columns(self) -> dict[str, list[str]]:
        return {}


def _column_names(path: str) -> list[str]:
    with contextlib.closing(_Cursor(path)) as cursor:
        names = _decode_line(cursor.next() or b"", f"{path}:{cursor.line}").split("\t")
    if len(set(names)) < len(names) or not all(names):
        raise DataError(f"{path}: the first line must name the columns, each differently, but it is {names}")
    return names


class _Cursor:
    """A place in a file of lines: `document` lines that are not blank lie before it, `line` lines in all."""

    def __init__(self, path: str) -> None:
        self.path, self.document, self.line, self.offset = path, 0, 0, 0
        file = _open(path)
        method = _MAGIC.get(file.read(2))
        file.seek(0)
        self.compressed = method is not None
        if method:
            import pyarrow  # notices truncated and damaged files, for both methods

            file = io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(file), method), 2**20)
        self._file = file
        self._skip_mark()

    def close(self) -> None:
        self._file.close()

    def seek(self, document: int, offset: int, line: int) -> None:
        """Go to a remembered place; a compressed file stays at its start, and is read from there."""
        if not self.compressed and document:
            self._file.seek(offset)
            self.document, self.offset, self.line = document, offset, line

    def next(self) -> bytes | None:
        """The next line that is not blank, or None at the end."""
        while True:
            try:
                raw = self._file.readline(LARGEST_DOCUMENT + 1)
            except OSError as error:
                raise DataError(f"{self.path} can't be read after line {self.line}: {error}") from None
            if not raw:
                return None
            self.line += 1
            self.offset += len(raw)
            if len(raw) > LARGEST_DOCUMENT:
                raise DataError(f"{self.path}:{self.line}: more than the 64 MiB of one document; split the line")
            if not raw.isspace():
                self.document += 1
                return raw

    def _skip_mark(self) -> None:
        """Pass over a byte-order mark."""
        try:
            if self._file.peek(3)[:3] == b"\xef\xbb\xbf":
                self.offset = len(self._file.read(3))
        except OSError as error:
            raise DataError(f"{self.path} can't be read: {error}") from None


def _scan(path: str) -> tuple[int, np.ndarray, int]:
    """Count a file's documents; (count, int64 [count / 1024, 2] offset and line before every 1024th, bytes of text)."""
    cursor, marks = _Cursor(path), []
    try:
        while True:
            if cursor.document % _STRIDE == 0:
                marks.append((cursor.offset, cursor.line))
            if cursor.next() is None:
                return cursor.document, np.array(marks, np.int64), cursor.offset
    finally:
        cursor.close()


class ParquetFiles:
    """Each row is one document; only the columns `wanted` are read. One row group is in memory at a time."""

    def __init__(self, name: str, paths: list[str], wanted: Wanted) -> None:
        self.name, self.paths, self.wanted = name, paths, wanted
        self._group: tuple[int, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_group": None}

    def fingerprint(self) -> str:
        return fingerprint_files(self.paths)

    @property
    def size_hint(self) -> int:
        return self._index[2]

    def __len__(self) -> int:
        return int(self._index[0][-1])

    def __getitem__(self, number: int) -> str:
        return text_of(self.record(number), self.wanted)

    def record(self, number: int) -> Record:
        firsts, places, _ = self._index
        group = int(np.searchsorted(firsts, number, "right")) - 1
        path, inner = places[group]
        where = f"{path}: row {number - int(firsts[group])} of row group {inner}"
        if self._group is None or self._group[0] != group:
            self._group = None  # before the next one is read
            with _parquet(path) as file:
                table = file.read_row_group(inner, columns=list(self.wanted.names))
                self._group = group, {name: table.column(name) for name in self.wanted.names}
        row = number - int(firsts[group])
        try:
            return Record({name: column[row].as_py() for name, column in self._group[1].items()}, where)
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: invalid UTF-8 at byte {error.start} of the text") from None

    @cached_property
    def _index(self) -> tuple[np.ndarray, list[tuple[str, int]], int]:
        """First row of each row group (and the number of rows), file and number in it of each, bytes of text."""
        counts, places, size = [0], [], 0
        for path in self.paths:
            with _parquet(path) as file:
                names = file.schema_arrow.names
                require_fields(path, names, self.wanted)
                for group in range(file.num_row_groups):
                    columns = file.metadata.row_group(group)
                    if columns.num_rows:
                        counts.append(columns.num_rows)
                        places.append((path, group))
                        size += sum(
                            column.total_uncompressed_size
                            for column in map(columns.column, range(columns.num_columns))
                            if f"{column.path_in_schema}.".startswith(tuple(f"{name}." for name in self.wanted.names))
                        )
        if not places:
            raise DataError(f"data.source={self.name}: there are no rows")
        return np.cumsum(counts), places, size


@contextlib.contextmanager
def _parquet(path: str) -> Iterator[Any]:
    """An open Parquet file; failures while it is open become a DataError that names it."""
    import pyarrow.parquet

    with _open(path) as raw:
        try:
            with pyarrow.parquet.ParquetFile(raw) as file:
                yield file
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is not a Parquet file that can be read: {one_line(error)}") from None


def decode_utf8(raw: bytes, where: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: invalid UTF-8 at byte {error.start} ({error.reason}); convert the file") from None


def _decode_line(raw: bytes, where: str) -> str:
    return decode_utf8(raw.removesuffix(b"\n").removesuffix(b"\r"), where)


def text_of(record: Record, wanted: Wanted) -> str:
    """The one field that is wanted of a record, if it is a text."""
    require_fields(record.where, record.fields, wanted)
    text = record.fields[wanted.names[0]]
    if not isinstance(text, str):
        kind = type(text).__name__
        raise DataError(
            f"{record.where}: {wanted.names[0]!r} is a {kind}, not a text; remove it, or set data.text_field"
        )
    return text


def require_fields(where: str, fields: Iterable[str], wanted: Wanted) -> None:
    """Refuse if one of the wanted fields is not there."""
    for name in wanted.names:
        if name not in fields:
            names = ", ".join(map(repr, fields)) or "(none)"
            raise DataError(f"{where}: there is no field {name!r}; {wanted.fix} one of {names}")


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
