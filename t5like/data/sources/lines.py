"""Documents in files of lines: lines as they stand, JSON lines, tab-separated values; see `files`.

Files may be compressed with gzip or Zstandard, which is told by their content, not their name. Reading in order is
cheap and takes constant memory, whatever a file unpacks to: it is streamed, and neither one line nor a run of blank
lines may be longer than `LARGEST_DOCUMENT`. Jumping about is allowed but may cost a read over 1024 lines, or, in a
compressed file, from its start.
"""

import contextlib
import io
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from t5like.data.sources.encoding import GZIP, HEAD, MARK, ZSTANDARD, begins_with, decode_utf8, refuse_other_formats
from t5like.data.sources.files import LARGEST_DOCUMENT, Record, Wanted, fingerprint_files, text_of
from t5like.errors import DataError
from t5like.io.paths import expand
from t5like.io.regular_files import open_regular
from t5like.io.strict_json import InvalidJSON, loads

_STRIDE = 1024  # documents between two remembered places in a file
_SKIPPED = 64  # blank lines that are read one by one before more are passed over together


class Cursor:
    """A place in a file of lines.

    Attributes:
        path: the file.
        document: lines that are not blank before this place.
        line: lines before this place, blank ones among them.
        first_line: the number, from 1, of the line on which the document that `next` gave begins.
        offset: bytes before this place, unpacked.
        compressed: whether the file is.
    """

    def __init__(self, path: str) -> None:
        self.path, self.document, self.line, self.first_line, self.offset = path, 0, 0, 0, 0
        self._file = open_regular(path)
        try:
            with self._failures():
                head = self._file.peek(4)
                method = "gzip" if begins_with(GZIP, head) else "zstd" if begins_with(ZSTANDARD, head) else None
                self.compressed = method is not None
                if method:
                    import pyarrow  # notices truncated and damaged files, for both methods

                    unpacked = pyarrow.CompressedInputStream(pyarrow.PythonFile(self._file), method)
                    self._file = io.BufferedReader(unpacked, 2**20)
                    head = self._file.peek(HEAD)
            self._check(head[:HEAD])
            if head.startswith(MARK):
                self.offset = len(self._file.read(len(MARK)))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._file.close()

    def seek(self, document: int, offset: int, line: int) -> None:
        """Go to a remembered place; a compressed file stays at its start, and is read from there."""
        if not self.compressed and document:
            with self._failures():
                self._file.seek(offset)
            self.document, self.offset, self.line = document, offset, line

    def next(self) -> bytes | None:
        """The next line that is not blank, or None at the end.

        Raises:
            DataError: the file can't be read or unpacked, or a line or a run of blank lines is too long.
        """
        begin, blank_lines = self.offset, 0
        while raw := self.next_line():
            if not raw.isspace():
                self.document += 1
                self.first_line = self.line
                return raw
            blank_lines += 1
            if blank_lines > _SKIPPED:
                self._skip_blank_lines()
            if self.offset - begin > LARGEST_DOCUMENT:
                raise DataError(f"{self.path}:{self.line}: more than 64 MiB of blank lines in a row; remove them")
        return None

    def next_line(self) -> bytes:
        """The next line, blank or not; nothing at the end."""
        try:
            raw = self._file.readline(LARGEST_DOCUMENT + 1)
        except OSError as error:
            raise self._failure(error) from None
        self.line += bool(raw)
        self.offset += len(raw)
        if len(raw) > LARGEST_DOCUMENT:
            raise DataError(f"{self.path}:{self.line}: more than the 64 MiB of one document; split the line")
        return raw

    def _skip_blank_lines(self) -> None:
        """Pass over blank lines in what is buffered, all at once: a compressed file may unpack to gigabytes of them."""
        with self._failures():
            buffered = self._file.peek()
            blank = len(buffered) - len(buffered.lstrip())
            if size := buffered.rfind(b"\n", 0, blank) + 1:
                self._file.read(size)
        self.line += buffered.count(b"\n", 0, size)
        self.offset += size

    def _check(self, head: bytes) -> None:
        refuse_other_formats(head, self.path, self.compressed)
        if head.count(b"\r") > 1 + len(head) // 1024 and b"\n" not in head:
            raise DataError(f"{self.path}: its lines end with CR alone; convert it, as in tr '\\r' '\\n' < FILE > NEW")

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._failure(error) from None

    def _failure(self, error: OSError) -> DataError:
        after = f" after line {self.line}" if self.line else ""
        return DataError(f"{self.path} can't be read{after}: {error.strerror or error}")


class Lines:
    """Each line that is not blank is one document, as it stands.

    One scan finds every 1024th line; between those, and in compressed files from the start, lines are read over.
    """

    _first = 0  # lines of each file that are no documents
    _open_cursor = Cursor

    def __init__(self, name: str, paths: list[str]) -> None:
        self.name, self.paths = name, paths
        self._cursor: Cursor | None = None

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
        return _decode_line(*self._line(number))

    def _line(self, number: int) -> tuple[Any, str]:
        """What the cursor gives of a document, and where that stands."""
        firsts, marks, _ = self._index
        file = int(np.searchsorted(firsts, number, "right")) - 1
        wanted = number - int(firsts[file]) + self._first
        cursor = self._cursor
        nearest = 0 if cursor is None or cursor.compressed else wanted // _STRIDE * _STRIDE
        if cursor is None or cursor.path != self.paths[file] or not nearest <= cursor.document <= wanted:
            if cursor:
                cursor.close()
            self._cursor = None
            cursor = self._cursor = self._open_cursor(self.paths[file])
            cursor.seek(wanted // _STRIDE * _STRIDE, *marks[file][wanted // _STRIDE].tolist())
        while cursor.document <= wanted:
            if (raw := cursor.next()) is None:
                raise DataError(f"{cursor.path} has become shorter while it was read; prepare again")
        return raw, f"{cursor.path}:{cursor.first_line}"

    @cached_property
    def _index(self) -> tuple[np.ndarray, list[np.ndarray], int]:
        """First document of each file (and their number), places in each file, bytes; see `_scan`."""
        counts, marks, size = [0], [], 0
        for path in self.paths:
            count, places, length = self._scan(path)
            counts.append(max(count - self._first, 0))
            marks.append(places)
            size += length
        if not sum(counts):
            raise DataError(f"data.source={self.name}: there are only blank lines{' below the first' * self._first}")
        return np.cumsum(counts), marks, size

    def _scan(self, path: str) -> tuple[int, np.ndarray, int]:
        """Count a file's documents, lines of names among them.

        Returns:
            The count; int64 [count / 1024, 2], offset and line before every 1024th; bytes of text.
        """
        marks = []
        with contextlib.closing(self._open_cursor(path)) as cursor:
            while True:
                if cursor.document % _STRIDE == 0:
                    marks.append((cursor.offset, cursor.line))
                if cursor.next() is None:
                    return cursor.document, np.array(marks, np.int64), cursor.offset


class JsonLines(Lines):
    """Each line that is not blank is one document, a JSON object."""

    def __init__(self, name: str, paths: list[str], wanted: Wanted) -> None:
        super().__init__(name, paths)
        self.wanted = wanted

    def __getitem__(self, number: int) -> str:
        return text_of(self.record(number), self.wanted)

    def record(self, number: int) -> Record:
        return _parse_json(*self._line(number))


def read_json_lines(path: Path, flag: str) -> Iterator[Record]:
    """The rows of a file that a flag names, in order; as in `JsonLines`.

    Raises:
        DataError: the file can't be read, or a line is not one JSON object; with its number.
    """
    try:
        with contextlib.closing(Cursor(str(expand(path)))) as cursor:
            while (raw := cursor.next()) is not None:
                yield _parse_json(raw, f"{cursor.path}:{cursor.first_line}")
    except DataError as error:
        raise DataError(f"{flag}={error}") from None


def _parse_json(raw: bytes, where: str) -> Record:
    try:
        fields = loads(raw, unique=False)
    except InvalidJSON as error:
        decode_utf8(raw, where, "line")  # what is no text is told as everywhere
        raise DataError(f"{where}: not valid JSON ({error}); every line must be one JSON object") from None
    if not isinstance(fields, dict):
        raise DataError(f"{where}: a JSON {type(fields).__name__}, but every line must be one JSON object")
    return Record(fields, where)


class TabSeparated(Lines):
    """Each line is one document of cells between tabs; the first line of a file names the columns.

    Nothing is quoted or escaped: a cell holds neither tab nor line end (IANA, text/tab-separated-values).
    """

    _first = 1
    _delimiter = "\t"

    def __init__(self, name: str, paths: list[str], wanted: Wanted) -> None:
        super().__init__(name, paths)
        self.wanted = wanted

    def __getitem__(self, number: int) -> str:
        return text_of(self.record(number), self.wanted)

    def record(self, number: int) -> Record:
        row, where = self._line(number)
        path = where.rpartition(":")[0]
        if path not in self._columns:
            self._columns[path] = self._column_names(path)
        names, cells = self._columns[path], self._cells(row, where)
        if len(cells) != len(names):
            raise DataError(
                f"{where} has {len(cells)} cells, but the first line names {len(names)} columns "
                f"({', '.join(names)}); write one cell for each, with {self._delimiter!a} between"
            )
        return Record(dict(zip(names, cells, strict=True)), where)

    @cached_property
    def _columns(self) -> dict[str, list[str]]:
        return {}

    def _cells(self, row: Any, where: str) -> list[str]:
        return _decode_line(row, where).split(self._delimiter)

    def _column_names(self, path: str) -> list[str]:
        """The cells of the first line; several may be empty, as of the column of numbers that pandas writes."""
        with contextlib.closing(self._open_cursor(path)) as cursor:
            row = cursor.next()
            names = self._cells(row, f"{path}:{cursor.first_line}") if row else []
        named = [name for name in names if name]
        if len(set(named)) < len(named) or not named:
            shown = json.dumps(names, ensure_ascii=False)[:300]
            raise DataError(f"{path}: the first line must name the columns, each differently, but it is {shown}")
        for other in (",", ";", "\t"):
            if len(names) == 1 and other in names[0]:
                raise DataError(
                    f"{path}: its first line has {other!a} between the names of columns, where {self._delimiter!a} "
                    "must stand; convert it" + (", or use data.source=csv:GLOB" if other == "," else "")
                )
        return names


def _decode_line(raw: bytes, where: str) -> str:
    return decode_utf8(raw.removesuffix(b"\n").removesuffix(b"\r"), where, "line")
