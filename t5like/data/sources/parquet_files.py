"""Sources that are Parquet files; see `files`."""

import contextlib
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from t5like.data.sources.encoding import decode_utf8
from t5like.data.sources.files import FileSource, Record, RequiredFields, check_fields, refuse_bomb
from t5like.errors import DataError, one_line
from t5like.io.regular_files import open_regular

_ROWS = 128  # rows in memory at a time: a row group of a few kilobytes may decompress to gigabytes


class ParquetFiles(FileSource):
    """Each row is one document; only the required columns are read. Columns of bytes are text in UTF-8.

    Sequential reading is fast; random access reads a row group from its start.
    """

    @property
    def size_hint(self) -> int:
        return self._index[2]

    def record(self, index: int) -> Record:
        firsts, row_groups, _ = self._index
        row_group = int(np.searchsorted(firsts, index, "right")) - 1
        path, group = row_groups[row_group]
        row = index - int(firsts[row_group])
        cursor = self._cursor
        if cursor is None or (cursor.path, cursor.group) != (path, group) or row < cursor.first:
            if cursor:
                cursor.close()
            self._cursor = None
            cursor = self._cursor = _Cursor(path, group, self.required.names)
        where = f"{path}: row {row} of row group {group}"
        return Record({name: _plain(value, f"{where}: {name!r}") for name, value in cursor.values(row, where)}, where)

    @cached_property
    def _index(self) -> tuple[np.ndarray, list[tuple[str, int]], int]:
        """First row of each row group and the number of rows; file and row group in it; bytes of text."""
        counts, row_groups, size = [0], [], 0
        for path in self.paths:
            with _data_errors(path), _opened(path) as file:
                _check_columns(path, file.schema_arrow.names, self.required)
                for group in range(file.num_row_groups):
                    if rows := file.metadata.row_group(group).num_rows:
                        counts.append(rows)
                        row_groups.append((path, group))
                        size += _sizes(file, group, self.required.names)[0]
        if not row_groups:
            raise DataError(f"data.source={self.name}: there are no rows")
        return np.cumsum(counts), row_groups, size


class _Cursor:
    """A read position in a row group; `first` is the index of the first row in memory."""

    def __init__(self, path: str, group: int, names: tuple[str, ...]) -> None:
        self.path, self.group, self.first = path, group, 0
        self._names, self._columns, self._length = names, {}, 0
        self._open = contextlib.ExitStack()
        with _data_errors(path):
            file = self._open.enter_context(_opened(path))
            _, self._stored = _sizes(file, group, names)
            self._unpacked = 0
            self._batches = file.iter_batches(_ROWS, row_groups=[group], columns=list(names))

    def close(self) -> None:
        self._open.close()

    def values(self, row: int, where: str) -> Iterator[tuple[str, Any]]:
        """The column names and values of a row at or after `first`."""
        import pyarrow as pa

        with _data_errors(self.path):
            while row >= self.first + self._length:
                self.first += self._length
                self._columns, self._length = {}, 0  # frees memory before the next rows are read
                batch = next(self._batches, None)
                if batch is None:
                    raise DataError(f"{where} can't be read: the file has changed; prepare again")
                self._unpacked += batch.nbytes  # more than the metadata say, if values are repeated
                refuse_bomb(self.path, self._unpacked, lambda: self._stored)
                self._columns, self._length = {name: batch.column(name) for name in self._names}, len(batch)
        for name, column in self._columns.items():
            try:
                if pa.types.is_temporal(column.type):  # the result of as_py depends on whether pandas is installed
                    raise TypeError("times are not texts")
                yield name, column[row - self.first].as_py()
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: invalid UTF-8 at byte {error.start} of the text") from None
            except (ValueError, ArithmeticError, LookupError, TypeError, ImportError, NotImplementedError) as error:
                raise DataError(
                    f"{where}: {name!r} is of type {column.type}, which can't be read ({one_line(error)}); "
                    "convert the column to strings"
                ) from None


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    import pyarrow.parquet

    with open_regular(path) as raw, pyarrow.parquet.ParquetFile(raw) as file:
        yield file


@contextlib.contextmanager
def _data_errors(path: str) -> Iterator[None]:
    """Convert the library's exceptions to a DataError that names the file."""
    import pyarrow

    try:
        yield
    except (OSError, ValueError, LookupError, pyarrow.ArrowException) as error:  # ArrowException includes out of memory
        raise DataError(f"{path} is not a Parquet file that can be read: {one_line(error)}") from None


def _sizes(file: Any, group: int, names: tuple[str, ...]) -> tuple[int, int]:
    """The bytes of these columns in a row group, according to the metadata: decompressed, and stored."""
    columns = file.metadata.row_group(group)
    wanted = [
        column
        for column in map(columns.column, range(columns.num_columns))
        if f"{column.path_in_schema}.".startswith(tuple(f"{name}." for name in names))
    ]
    return sum(column.total_uncompressed_size for column in wanted), sum(c.total_compressed_size for c in wanted)


def _check_columns(path: str, names: list[str], required: RequiredFields) -> None:
    check_fields(path, names, required)
    for name in required.names:
        if names.count(name) > 1:
            raise DataError(f"{path}: {names.count(name)} columns have the name {name!r}; rename all but one")


def _plain(value: Any, where: str) -> Any:
    """Decode bytes inside a value: columns that were written without the string type contain text as bytes."""
    if isinstance(value, bytes):
        return decode_utf8(value, where, "text")
    if isinstance(value, dict):
        return {name: _plain(part, where) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain(part, where) for part in value]
    return value
