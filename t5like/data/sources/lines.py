"""Sources that are files of lines: plain lines, JSON lines, tab-separated values; see `files`.

Files may be compressed with gzip or Zstandard, which is detected by content, not by name; decompression bombs are
refused. Sequential reading takes
constant memory, because files are streamed; a line, or a run of blank lines, may have at most `LARGEST_DOCUMENT` bytes.
Random access works, but may read up to 1024 lines, or a compressed file from its start.
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
from t5like.data.sources.files import LARGEST_DOCUMENT, FileSource, Record, refuse_bomb
from t5like.errors import DataError
from t5like.io.paths import expand
from t5like.io.regular_files import open_regular
from t5like.io.strict_json import InvalidJSON, loads

_SEEK_STRIDE = 1024  # documents between two seek points of a file
_SKIPPED = 64  # blank lines that are read individually before the following ones are skipped in blocks


class Cursor:
    """A read position in a file of lines.

    Attributes:
        path: the file.
        document: number of documents (lines that are not blank) before this position.
        line: number of lines before this position, including blank lines.
        first_line: line number, from 1, where the document that `next` returned begins.
        offset: bytes before this position, decompressed.
        compressed: whether the file is compressed.
    """

    def __init__(self, path: str) -> None:
        self.path, self.document, self.line, self.first_line, self.offset = path, 0, 0, 0, 0
        self._file = self._stored = open_regular(path)
        try:
            with self._data_errors():
                head = self._file.peek(4)
                method = "gzip" if begins_with(GZIP, head) else "zstd" if begins_with(ZSTANDARD, head) else None
                self.compressed = method is not None
                if method:
                    import pyarrow  # detects truncated and damaged files, for both methods

                    unpacked = pyarrow.CompressedInputStream(pyarrow.PythonFile(self._file), method)
                    self._file = io.BufferedReader(unpacked, 2**20)
                    head = self._file.peek(HEAD)
            self._check_format(head[:HEAD])
            if head.startswith(MARK):
                self.offset = len(self._file.read(len(MARK)))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._file.close()

    def seek(self, document: int, offset: int, line: int) -> None:
        """Go to a seek point; a compressed file stays at its start, and is read from there."""
        if not self.compressed and document:
            with self._data_errors():
                self._file.seek(offset)
            self.document, self.offset, self.line = document, offset, line

    def next(self) -> bytes | None:
        """The next line that is not blank; None at the end.

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
        """The next line, blank or not; empty at the end."""
        try:
            raw = self._file.readline(LARGEST_DOCUMENT + 1)
        except OSError as error:
            raise self._failure(error) from None
        self.line += bool(raw)
        self.offset += len(raw)
        if self.compressed:
            refuse_bomb(self.path, self.offset, self._stored.tell)
        if len(raw) > LARGEST_DOCUMENT:
            raise DataError(f"{self.path}:{self.line}: more than the 64 MiB of one document; split the line")
        return raw

    def _skip_blank_lines(self) -> None:
        """Skip all blank lines in the buffer at once: a compressed file may contain gigabytes of them."""
        with self._data_errors():
            buffered = self._file.peek()
            blank = len(buffered) - len(buffered.lstrip())
            if size := buffered.rfind(b"\n", 0, blank) + 1:
                self._file.read(size)
        self.line += buffered.count(b"\n", 0, size)
        self.offset += size

    def _check_format(self, head: bytes) -> None:
        refuse_other_formats(head, self.path, self.compressed)
        if head.count(b"\r") > 1 + len(head) // 1024 and b"\n" not in head:
            raise DataError(f"{self.path}: its lines end with CR alone; convert it, as in tr '\\r' '\\n' < FILE > NEW")

    @contextlib.contextmanager
    def _data_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._failure(error) from None

    def _failure(self, error: OSError) -> DataError:
        after = f" after line {self.line}" if self.line else ""
        return DataError(f"{self.path} can't be read{after}: {error.strerror or error}")


class LineFiles(FileSource):
    """Base of sources whose documents are the lines of files that are not blank.

    One scan records a seek point every 1024 documents; reading starts at the last seek point before a document.
    """

    _header_lines = 0  # lines at the start of each file that are not documents
    _open_cursor = Cursor

    @property
    def size_hint(self) -> int:
        return self._index[2]

    def _line(self, index: int) -> tuple[Any, str]:
        """What `Cursor.next` returns for a document, and its location: file and line."""
        firsts, seek_points, _ = self._index
        file = int(np.searchsorted(firsts, index, "right")) - 1
        document = index - int(firsts[file]) + self._header_lines
        seek_point, cursor = document // _SEEK_STRIDE, self._cursor
        nearest = 0 if cursor is None or cursor.compressed else seek_point * _SEEK_STRIDE
        if cursor is None or cursor.path != self.paths[file] or not nearest <= cursor.document <= document:
            if cursor:
                cursor.close()
            self._cursor = None
            cursor = self._cursor = self._open_cursor(self.paths[file])
            cursor.seek(seek_point * _SEEK_STRIDE, *seek_points[file][seek_point].tolist())
        while cursor.document <= document:
            if (raw := cursor.next()) is None:
                raise DataError(f"{cursor.path} has become shorter while it was read; prepare again")
        return raw, f"{cursor.path}:{cursor.first_line}"

    @cached_property
    def _index(self) -> tuple[np.ndarray, list[np.ndarray], int]:
        """First document of each file and the number of documents; seek points of each file; bytes of text."""
        counts, seek_points, size = [0], [], 0
        for path in self.paths:
            count, points, length = self._scan(path)
            counts.append(max(count - self._header_lines, 0))
            seek_points.append(points)
            size += length
        if not sum(counts):
            below = " below the first" * self._header_lines
            raise DataError(f"data.source={self.name}: there are only blank lines{below}")
        return np.cumsum(counts), seek_points, size

    def _scan(self, path: str) -> tuple[int, np.ndarray, int]:
        """Count a file's documents and header lines.

        Returns:
            The count; seek points, int64 [count / 1024, 2] of offset and line; bytes of text.
        """
        seek_points = []
        with contextlib.closing(self._open_cursor(path)) as cursor:
            while True:
                if cursor.document % _SEEK_STRIDE == 0:
                    seek_points.append((cursor.offset, cursor.line))
                if cursor.next() is None:
                    return cursor.document, np.array(seek_points, np.int64), cursor.offset


class Lines(LineFiles):
    """Each line that is not blank is one document."""

    def __getitem__(self, index: int) -> str:
        return _decode_line(*self._line(index))


class JsonLines(LineFiles):
    """Each line that is not blank is one document, a JSON object."""

    def record(self, index: int) -> Record:
        return parse_json_line(*self._line(index))


def read_json_lines(path: Path, flag: str) -> Iterator[Record]:
    """The records of a file of JSON lines that a command-line flag names, in order.

    Raises:
        DataError: the file can't be read, or a line is not one JSON object; names the line.
    """
    try:
        with contextlib.closing(Cursor(str(expand(path)))) as cursor:
            while (raw := cursor.next()) is not None:
                yield parse_json_line(raw, f"{cursor.path}:{cursor.first_line}", finite=True)
    except DataError as error:
        raise DataError(f"{flag}={error}") from None


def parse_json_line(raw: bytes, where: str, *, finite: bool = False) -> Record:
    """Parse one line as a JSON object; `where`, as in ``FILE:LINE``, starts the message of a `DataError`.

    `finite` refuses NaN and infinity, which are not JSON, in any field; a source refuses them in the fields that it
    uses.
    """
    try:
        fields = loads(raw, unique=False, finite=finite)
    except InvalidJSON as error:
        decode_utf8(raw, where, "line")  # raises the same message as for other files if it is not UTF-8
        raise DataError(f"{where}: not valid JSON ({error}); every line must be one JSON object") from None
    if not isinstance(fields, dict):
        raise DataError(f"{where}: a JSON {type(fields).__name__}, but every line must be one JSON object")
    return Record(fields, where)


class TabSeparated(LineFiles):
    """Each line is one document, with tabs between its cells; the first line of a file names the columns.

    There is no quoting or escaping: a cell can't contain a tab or a line end (IANA, text/tab-separated-values).
    """

    _header_lines = 1
    _delimiter = "\t"

    def record(self, index: int) -> Record:
        row, where = self._line(index)
        path = where.rpartition(":")[0]
        if path not in self._columns:
            self._columns[path] = self._column_names(path)
        names, cells = self._columns[path], self._cells(row, where)
        if len(cells) != len(names):
            raise DataError(
                f"{where} has {len(cells)} cells, but the first line names {len(names)} columns "
                f"({', '.join(names)}); write one cell for each column, with {self._delimiter!a} between them"
            )
        return Record(dict(zip(names, cells, strict=True)), where)

    @cached_property
    def _columns(self) -> dict[str, list[str]]:
        return {}

    def _cells(self, row: Any, where: str) -> list[str]:
        return _decode_line(row, where).split(self._delimiter)

    def _column_names(self, path: str) -> list[str]:
        """The cells of the first line; several may be empty, such as the header of the index that pandas writes."""
        with contextlib.closing(self._open_cursor(path)) as cursor:
            row = cursor.next()
            names = self._cells(row, f"{path}:{cursor.first_line}") if row else []
        named = [name for name in names if name]
        if len(set(named)) < len(named) or not named:
            header = json.dumps(names, ensure_ascii=False)[:300]
            raise DataError(f"{path}: the first line must name the columns, each differently, but it is {header}")
        for other in (",", ";", "\t"):
            if len(names) == 1 and other in names[0]:
                raise DataError(
                    f"{path}: its first line has {other!a} between the names of columns, where {self._delimiter!a} "
                    "must stand; convert it" + (", or use data.source=csv:GLOB" if other == "," else "")
                )
        return names


def _decode_line(raw: bytes, where: str) -> str:
    return decode_utf8(raw.removesuffix(b"\n").removesuffix(b"\r"), where, "line")
