"""Documents in Parquet files; see `files`."""

import contextlib
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from t5like.data.sources.encoding import decode_utf8
from t5like.data.sources.files import Record, Wanted, fingerprint_files, one_line, require_fields, text_of
from t5like.errors import DataError
from t5like.io.regular_files import open_regular

_ROWS = 128  # rows in memory at a time: a row group of some kilobytes may unpack to gigabytes


class ParquetFiles:
    """Each row is one document; only the columns `wanted` are read. Bytes are text in UTF-8.

    Reading in order is cheap; jumping about is allowed but costs a read from the start of a row group.
    """

    def __init__(self, name: str, paths: list[str], wanted: Wanted) -> None:
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
        return text_of(self.record(number), self.wanted)

    def record(self, number: int) -> Record:
        firsts, places, _ = self._index
        group = int(np.searchsorted(firsts, number, "right")) - 1
        path, inner = places[group]
        row = number - int(firsts[group])
        cursor = self._cursor
        if cursor is None or (cursor.path, cursor.group) != (path, inner) or row < cursor.first:
            if cursor:
                cursor.close()
            self._cursor = None
            cursor = self._cursor = _Cursor(path, inner, self.wanted.names)
        where = f"{path}: row {row} of row group {inner}"
        return Record({name: _plain(value, f"{where}: {name!r}") for name, value in cursor.values(row, where)}, where)

    @cached_property
    def _index(self) -> tuple[np.ndarray, list[tuple[str, int]], int]:
        """First row of each row group (and the number of rows), file and number in it of each, bytes of text."""
        counts, places, size = [0], [], 0
        for path in self.paths:
            with _failures(path), _opened(path) as file:
                _require_columns(path, file.schema_arrow.names, self.wanted)
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


class _Cursor:
    """A place in a row group; `first` is the number of the first row in memory."""

    def __init__(self, path: str, group: int, names: tuple[str, ...]) -> None:
        self.path, self.group, self.first = path, group, 0
        self._names, self._columns, self._length = names, {}, 0
        self._open = contextlib.ExitStack()
        with _failures(path):
            file = self._open.enter_context(_opened(path))
            self._batches = file.iter_batches(_ROWS, row_groups=[group], columns=list(names))

    def close(self) -> None:
        self._open.close()

    def values(self, row: int, where: str) -> Iterator[tuple[str, Any]]:
        """The names and values of a row that is not before `first`."""
        import pyarrow as pa

        with _failures(self.path):
            while row >= self.first + self._length:
                self.first += self._length
                self._columns, self._length = {}, 0  # before the next ones are read
                batch = next(self._batches, None)
                if batch is None:
                    raise DataError(f"{where} can't be read: the file has changed; prepare again")
                self._columns, self._length = {name: batch.column(name) for name in self._names}, len(batch)
        for name, column in self._columns.items():
            try:
                if pa.types.is_temporal(column.type):  # what as_py makes of it depends on whether pandas is installed
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
def _failures(path: str) -> Iterator[None]:
    """Failures of the library within become a DataError that names the file."""
    import pyarrow

    try:
        yield
    except (OSError, ValueError, LookupError, pyarrow.ArrowException) as error:  # ArrowException: out of memory, too
        raise DataError(f"{path} is not a Parquet file that can be read: {one_line(error)}") from None


def _require_columns(path: str, names: list[str], wanted: Wanted) -> None:
    require_fields(path, names, wanted)
    for name in wanted.names:
        if names.count(name) > 1:
            raise DataError(f"{path}: {names.count(name)} columns have the name {name!r}; rename all but one")


def _plain(value: Any, where: str) -> Any:
    """A value with texts in place of bytes, as columns have that were written without the mark for text."""
    if isinstance(value, bytes):
        return decode_utf8(value, where, "text")
    if isinstance(value, dict):
        return {name: _plain(part, where) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain(part, where) for part in value]
    return value
