"""Sources that are files of comma-separated values; see `files` and `lines`."""

import csv
from collections.abc import Iterator

from t5like.data.sources.encoding import decode_utf8
from t5like.data.sources.files import LARGEST_DOCUMENT
from t5like.data.sources.lines import Cursor, TabSeparated
from t5like.errors import DataError

_LONGEST_ROW = 1_000_000  # lines
csv.field_size_limit(LARGEST_DOCUMENT)  # for the whole process; Python's default is 128 KiB


class RowCursor(Cursor):
    """A read position in a file of comma-separated values; documents are rows, which may span several lines."""

    def next(self) -> list[str] | None:
        """The cells of the next row; None at the end.

        Raises:
            DataError: see `Cursor.next`; or a quote is not closed, or is not followed by a comma.
        """
        if (first := super().next()) is None:
            return None
        where = f"{self.path}:{self.first_line}"
        try:
            return next(csv.reader(self._lines_of_row(first, where), strict=True))
        except csv.Error as error:
            end = f", up to line {self.line}" if self.line > self.first_line else ""
            raise DataError(
                f"{where}: not a row of comma-separated values{end} ({error}); write a cell with quotes, commas or "
                'line ends in quotes, and a quote in it twice, as in "a ""word"", quoted"'
            ) from None

    def _lines_of_row(self, first: bytes, where: str) -> Iterator[str]:
        """The lines of one row: as many as the `csv` module consumes."""
        size, raw = 0, first
        while raw:
            size += len(raw)
            if size > LARGEST_DOCUMENT or self.line - self.first_line > _LONGEST_ROW:
                raise DataError(f"{where}: a row of more than 64 MiB or {_LONGEST_ROW:,} lines; is a quote missing?")
            yield decode_utf8(raw, f"{self.path}:{self.line}", "line")
            raw = self.next_line()


class CommaSeparated(TabSeparated):
    """Each row is one document, with commas between its cells; the first row of a file names the columns.

    A cell in double quotes may contain commas, line ends, and quotes, which are doubled (RFC 4180).
    """

    _delimiter = ","
    _open_cursor = RowCursor

    def _cells(self, row: list[str], where: str) -> list[str]:
        return row
