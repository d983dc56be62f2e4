"""Csv files that are safe to open in spreadsheets and can be read back without loss.

Spreadsheets evaluate cells that begin with `=`, `+`, `-` or `@` as formulas, which can start programs. File and class
names are untrusted, so such text is written with a leading `'`, which the reader removes. Numbers are unchanged.
Imports no TensorFlow.
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from x3d_tf.errors import UserError

# Excel also skips spaces, tabs and line breaks before a formula, and accepts full-width signs. The pattern includes
# apostrophes so that text which already looks escaped is escaped again.
_FORMULA = re.compile(r"'*(?:[\t\r\n]|\s*[=+\-@＝＋－＠])")


class Verbatim(str):
    """Text that is written unchanged: a formatted number, or a name that another program must find unchanged."""

    __slots__ = ()


def number(value: float, form: str) -> Verbatim:
    """Returns a formatted number that is written unchanged."""
    return Verbatim(format(value, form))


def escape_formula(cell: Any) -> Any:
    """Returns the cell with a leading `'` if a spreadsheet would evaluate it as a formula."""
    if isinstance(cell, str) and not isinstance(cell, Verbatim) and _FORMULA.match(cell):
        return f"'{cell}"
    return cell


def unescape_formula(cell: str) -> str:
    """Reverses `escape_formula`."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


class Writer:
    """Writes rows of cells with formulas escaped.

    Args:
        file: text file, opened with `newline=""`.
        line_end: line terminator.
    """

    def __init__(self, file: Any, line_end: str = "\r\n") -> None:
        self._plain = csv.writer(file, lineterminator=line_end)
        self._quoting = csv.writer(file, lineterminator=line_end, quoting=csv.QUOTE_ALL)

    def row(self, cells: Iterable[Any]) -> None:
        """Writes one row."""
        cells = [escape_formula(cell) for cell in cells]
        has_carriage_return = any(isinstance(cell, str) and "\r" in cell for cell in cells)  # csv only quotes "\r\n"
        (self._quoting if has_carriage_return else self._plain).writerow(cells)


class Reader:
    """Iterates over the rows of a csv file with formula escapes removed.

    Args:
        lines: text file opened with `newline=""`, or lines with their terminators.
        strict: raise an error for misplaced quotes.
        delimiter: character between cells.

    Raises:
        csv.Error: a row is not valid csv.
    """

    def __init__(self, lines: Iterable[str], *, strict: bool = False, delimiter: str = ",") -> None:
        self._reader = csv.reader(lines, strict=strict, delimiter=delimiter)

    @property
    def line_num(self) -> int:
        """Number of lines read so far."""
        return self._reader.line_num

    def __iter__(self) -> Iterator[list[str]]:
        return self

    def __next__(self) -> list[str]:
        return [unescape_formula(cell) for cell in next(self._reader)]


def numbered_rows(table: Path, text: str, delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    """Yields the non-empty rows of a csv file, each with the number of its first line.

    Args:
        table: path of the file, for messages.
        text: content of the file.
        delimiter: character between cells.

    Raises:
        UserError: a row is not valid csv.
    """
    reader = Reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{table}, line {line} is not valid csv: {error}") from error
        if cells:
            yield line, cells


def dicts(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """Yields the rows as dictionaries by column name; a truncated row lacks the last columns."""
    reader = Reader(lines)
    header = next(reader, [])
    for cells in reader:
        if cells:
            yield dict(zip(header, cells))


def encoded(rows: Iterable[Sequence[Any]]) -> bytes:
    """Returns the content of a csv file; non-UTF-8 bytes of names are written as escapes."""
    table = io.StringIO(newline="")
    writer = Writer(table)
    for row in rows:
        writer.row(row)
    return table.getvalue().encode("utf-8", "backslashreplace")
