"""Csv files that spreadsheets open without running what a cell says, and that are read back as they were.

A spreadsheet takes a cell that begins with `=`, `+`, `-` or `@` for a formula, which may start programs. File names and
class names come from other people. Such text gets a leading `'`, which readers remove; numbers stay as they are.
Imports no TensorFlow.
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

# Excel also passes over spaces, tabs and line breaks before a formula, and takes full-width signs for their twins.
# Apostrophes belong to the pattern so that text which already begins like a guarded cell is guarded once more.
_FORMULA = re.compile(r"'*(?:[\t\r\n]|\s*[=+\-@＝＋－＠])")


class Verbatim(str):
    """Text that is written as it is: a formatted number, or a name that another program has to find unchanged."""

    __slots__ = ()


def number(value: float, form: str) -> Verbatim:
    """A number as `format` gives it, to be written as a number."""
    return Verbatim(format(value, form))


def guarded(cell: Any) -> Any:
    """The cell as it is written: text that a spreadsheet would take for a formula gets a leading `'`."""
    if isinstance(cell, str) and not isinstance(cell, Verbatim) and _FORMULA.match(cell):
        return f"'{cell}"
    return cell


def bare(cell: str) -> str:
    """The cell as it was before `guarded`."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


class Writer:
    """Writes rows of guarded cells.

    Args:
        file: text file, opened with `newline=""`.
        line_end: ends each row.
    """

    def __init__(self, file: Any, line_end: str = "\r\n") -> None:
        self._plain = csv.writer(file, lineterminator=line_end)
        self._quoting = csv.writer(file, lineterminator=line_end, quoting=csv.QUOTE_ALL)

    def row(self, cells: Iterable[Any]) -> None:
        """Writes one row."""
        cells = [guarded(cell) for cell in cells]
        broken = any(isinstance(cell, str) and "\r" in cell for cell in cells)  # csv quotes it beside "\r\n" only
        (self._quoting if broken else self._plain).writerow(cells)


class Reader:
    """Iterates over the rows of a csv file, without the guards.

    Args:
        lines: text file opened with `newline=""`, or lines with their ends.
        strict: whether misplaced quotes are an error.
        delimiter: separates the cells.

    Raises:
        csv.Error: a row that is not csv.
    """

    def __init__(self, lines: Iterable[str], *, strict: bool = False, delimiter: str = ",") -> None:
        self._reader = csv.reader(lines, strict=strict, delimiter=delimiter)

    @property
    def line_num(self) -> int:
        """Lines read so far."""
        return self._reader.line_num

    def __iter__(self) -> Iterator[list[str]]:
        return self

    def __next__(self) -> list[str]:
        return [bare(cell) for cell in next(self._reader)]


def dicts(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """The rows below the first, by its column names; a row that breaks off lacks the last columns."""
    reader = Reader(lines)
    header = next(reader, [])
    for cells in reader:
        if cells:
            yield dict(zip(header, cells))


def encoded(rows: Iterable[Sequence[Any]]) -> bytes:
    """The content of a csv file; names that are no UTF-8 are written as escapes."""
    table = io.StringIO(newline="")
    writer = Writer(table)
    for row in rows:
        writer.row(row)
    return table.getvalue().encode("utf-8", "backslashreplace")
