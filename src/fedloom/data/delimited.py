"""Delimited text as people have it: encoding, separator and quoting are found or given, then `csv` reads it in strict mode.

A way of reading counts only if every row of the file comes out in as many cells as the first. The separators that are tried are
those in the first line. Where two of them read the whole file it is refused, and the user says which. docs/decisions/0030-tables.md
has the reasons.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from fedloom.core.errors import Refused
from fedloom.data.encodings import decode_text
from fedloom.data.raw_table import RawTable, strip_blanks, table_below_header

SEPARATORS: Mapping[str, str] = {",": "','", ";": "';'", "\t": "tab", "|": "'|'"}
"""Separators that are looked for, and what notes call them."""
LONGEST_CELL = 2**31 - 1
FEWEST_NUMBERED = 5
"""Rows that a first column without a name has to number, to be taken for the index that R writes."""


@dataclass(frozen=True, kw_only=True)
class FileFormat:
    """Settings for reading a file. What is None is detected; the notes of the run say what was detected, unless it is usual.

    Fields:
        separator: character between the cells of a CSV file, or "tab".
        encoding: encoding of a CSV or JSON file, as Python calls it, such as "cp1252".
        quoted: whether quotation marks enclose cells of a CSV file.
        sheet_name: sheet of a workbook (default: the first).
        query: statement that returns the rows, where the path is `postgresql://user@host/name` or a DuckDB file.
    """

    separator: str | None = None
    encoding: str | None = None
    quoted: bool | None = None
    sheet_name: str | None = None
    query: str | None = None

    def __post_init__(self) -> None:
        if self.separator in ("tab", "\\t"):
            object.__setattr__(self, "separator", "\t")
        if self.separator is not None and (len(self.separator) != 1 or self.separator in '"\r\n'):
            raise Refused("data.separator", self.separator, "give one character, such as ';', or tab")


FOUND = FileFormat()


@dataclass(frozen=True, slots=True)
class Quoting:
    """Meaning of a quotation mark in a file.

    Fields:
        encloses: whether it encloses a cell; else it is a character like others.
        backslash: whether a backslash stands before one inside a cell; else it is doubled. Where none encloses: before a separator.
        padded: whether blanks may stand before one that opens a cell.
    """

    encloses: bool = True
    backslash: bool = False
    padded: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of `csv.reader`."""
        if not self.encloses:
            return {"quoting": csv.QUOTE_NONE, "quotechar": None, "escapechar": "\\" if self.backslash else None}
        escape = {"escapechar": "\\", "doublequote": False} if self.backslash else {}
        return {**escape, "skipinitialspace": self.padded}


PLAIN, ENCLOSED = Quoting(encloses=False), Quoting()
PADDED, BACKSLASH, ESCAPED = Quoting(padded=True), Quoting(backslash=True), Quoting(encloses=False, backslash=True)


class Unreadable(Exception):
    """Rows that cannot be cut into cells in one way.

    `row` numbers the first of them, `cells` counts its cells, `columns` those of the first line.
    """

    def __init__(self, row: int, cells: int, columns: int, reason: str) -> None:
        super().__init__(reason)
        self.row, self.cells, self.columns = row, cells, columns


class Reading(NamedTuple):
    """All rows of a file, read in one way."""

    rows: list[list[str]]
    separator: str
    quoting: Quoting


def read_delimited(content: bytes, where: str, how: FileFormat = FOUND) -> RawTable:
    """Read a table of text cells; notes say what was found, unless it is the ordinary: commas, UTF-8, quotation marks that enclose.

    Raises:
        Refused: no encoding or several separators fit, or rows are not of one length.
    """
    text, encoding = decode_text(content, where, how.encoding)
    if not text.strip():
        raise Refused("data.path", where, "the file is empty")
    text, separator = _declared_separator(text.replace("\r\n", "\n"), how.separator)
    reading = _find_reading(text, where, separator, how.quoted)
    found = _unusual_settings(reading, encoding, how, where)
    header, *rows = reading.rows
    table = table_below_header([strip_blanks(name) for name in header], rows, where)
    notes = [f"{where}: {', '.join(found)}."] if found else []
    advice = (
        "cells that end at another sign than , ; | or tab need --set data.separator=SIGN" if len(header) < 2 else ""
    )
    return table._replace(notes=(*notes, *table.notes), advice=advice)


def _unusual_settings(reading: Reading, encoding: str, how: FileFormat, where: str) -> list[str]:
    """Say which settings were found that are not the usual ones."""
    facts = []
    if how.separator is None and reading.separator != _usual_separator(where) and len(reading.rows[0]) > 1:
        facts.append(f"separator {SEPARATORS.get(reading.separator, repr(reading.separator))}")
    if how.encoding is None and encoding != "utf-8":
        facts.append(f"encoding {encoding}")
    if how.quoted is None and reading.quoting.encloses != (reading.separator != "\t"):
        facts.append("quotation marks " + ("enclose cells" if reading.quoting.encloses else "are part of the text"))
    if reading.quoting.backslash:
        facts.append(
            f"a backslash before {'quotation marks' if reading.quoting.encloses else 'separators'} inside cells"
        )
    return facts


def _usual_separator(where: str) -> str:
    """Return the separator that the name of a file promises."""
    return "\t" if where.lower().removesuffix(".gz").endswith((".tsv", ".tab")) else ","


# Separator and quoting --------------------------------------------------------------------------------------------------------


def _declared_separator(text: str, given: str | None) -> tuple[str, str | None]:
    """Take off a first line "sep=;", by which spreadsheets tell each other the separator."""
    first, newline, rest = text.partition("\n")
    first = first.strip('"')
    if first.lower().startswith("sep=") and len(first) == 5 and newline:
        return rest, given or first[4]
    return text, given


def _find_reading(text: str, where: str, separator: str | None, quoted: bool | None) -> Reading:
    """Read a text in the one way that gives rows of one length. Raises Refused where there is none or more than one."""
    lines = text if "\n" in text else text.replace("\r", "\n")
    first = lines.lstrip("\n").partition("\n")[0]
    candidates = [separator] if separator else [sign for sign in SEPARATORS if sign in first] or list(SEPARATORS)
    readings, failures = list[Reading](), list[Unreadable]()
    for sign in candidates:
        try:
            readings.append(_read(lines, sign, quoted))
        except Unreadable as failure:
            failures.append(failure)
    wide = [reading for reading in readings if len(reading.rows[0]) > 1]
    if len(wide) > 1 and _usual_separator(where) == "\t":
        wide.sort(key=lambda reading: reading.separator != "\t")
    elif len(wide) > 1:
        signs = [SEPARATORS[reading.separator] for reading in wide]
        remedy = f"{' and '.join(signs)} both read all rows of {where}; say which with --set data.separator={signs[0]} (or the other)"
        raise Refused("data.separator", None, remedy)
    if not readings:
        at, worst = max(zip(candidates, failures, strict=True), key=lambda one: one[1].columns)
        mark = SEPARATORS.get(at, repr(at))
        long = f"mend it (a cell with {mark} in it belongs in quotation marks)"
        remedy = long if worst.cells > worst.columns else "mend it, or take it out if it is no row of the table"
        if quoted is None and '"' in lines and isinstance(_attempt(lines, at, PLAIN), Reading):
            remedy += ", or take these marks for text with --set data.quoted=False"
        raise Refused("data.path", where, f"{f'row {worst.row}' if worst.row else 'the first line'} {worst}; {remedy}")
    return (wide or readings)[0]


def _read(text: str, separator: str, quoted: bool | None) -> Reading:
    """Read a text with this separator, in the first way of quoting that gives rows of one length.

    Between tabs quotation marks are text, as data sets have them, unless all of them enclose cells, as spreadsheets write them.
    Elsewhere they enclose cells, unless no cell is enclosed and they would make the rows unequal. Where no cell begins with one, a
    backslash may stand before separators inside cells.
    """
    if quoted is None and _has_escaped(text, separator):
        escaped = _attempt(text, separator, ESCAPED)
        if isinstance(escaped, Reading):
            return escaped
    if '"' not in text:
        return Reading(_rows(text, separator, PLAIN), separator, PLAIN if separator == "\t" else ENCLOSED)
    if quoted is False:
        return Reading(_rows(text, separator, PLAIN), separator, PLAIN)
    enclosed = _enclosed(text, separator)
    if quoted or (separator != "\t" and isinstance(enclosed, Reading)):
        return _successful(enclosed)
    plain = _attempt(text, separator, PLAIN)
    if not isinstance(plain, Reading):
        return _successful(enclosed)
    if isinstance(enclosed, Reading):
        return enclosed if len(plain.rows) == len(enclosed.rows) else plain
    if separator != "\t" and any(len(cell) > 1 and cell[0] == cell[-1] == '"' for row in plain.rows for cell in row):
        return _successful(enclosed)
    return plain


def _has_escaped(text: str, separator: str) -> bool:
    """Whether a backslash stands before a separator, which is no second one, and no cell begins with a quotation mark."""
    sign = re.escape(separator)
    opened = re.search(rf'(?:^|{sign})\s*"', text, re.MULTILINE)
    return opened is None and re.search(rf"(?<!\\)(?:\\\\)*\\{sign}", text) is not None


def _enclosed(text: str, separator: str) -> Reading | Unreadable:
    """Read a text in the first way in which quotation marks enclose cells; where there is none, say why the usual one is not."""
    first = _attempt(text, separator, ENCLOSED)
    if isinstance(first, Reading):
        return first
    others = (_attempt(text, separator, how) for how in (PADDED, BACKSLASH) if how is PADDED or '\\"' in text)
    return next((one for one in others if isinstance(one, Reading)), first)


def _attempt(text: str, separator: str, quoting: Quoting) -> Reading | Unreadable:
    try:
        return Reading(_rows(text, separator, quoting), separator, quoting)
    except Unreadable as failure:
        return failure


def _successful(attempt: Reading | Unreadable) -> Reading:
    if isinstance(attempt, Unreadable):
        raise attempt
    return attempt


def _rows(text: str, separator: str, quoting: Quoting) -> list[list[str]]:
    """Return the rows, the header first; as R writes them, it may lack a cell above a column that numbers the rows."""
    try:
        return _equal_rows(text, separator, quoting)
    except Unreadable as failure:
        numbered = []
        if failure.row == 1:
            with suppress(Unreadable):
                numbered = _equal_rows(separator + text.lstrip("\n"), separator, quoting)
        index = [row[0] for row in numbered[1:]]
        if len(set(index)) < max(len(index), FEWEST_NUMBERED) or not all(map(str.isdecimal, index)):
            raise
        return numbered


def _equal_rows(text: str, separator: str, quoting: Quoting) -> list[list[str]]:
    """Return the rows, the header first, without those that are empty. Raises Unreadable where they are not of one length, apart from
    empty cells at their ends that have no name.
    """
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True, **quoting.settings)
    rows: list[list[str]] = []
    width = named = 0
    try:
        for row in reader:
            if not row or not (row[0].strip() or any(map(str.strip, row))):
                continue
            if not rows:
                width, named = len(row), max(k for k, cell in enumerate(row, 1) if cell.strip())
            if len(row) != width:
                row = _without_end(row, named, width, len(rows))
            rows.append(row)
        if not rows:
            raise Unreadable(0, 0, 0, "has no names of columns")
    except csv.Error:
        raise Unreadable(len(rows), 0, width, "has a quotation mark that is not closed, or text behind one") from None
    return rows


def _without_end(row: list[str], named: int, width: int, number: int) -> list[str]:
    """Return a row with as many cells as the first line, if it lacks or has more of those that are empty and without a name only."""
    if len(row) < named or any(map(str.strip, row[width:])):
        raise Unreadable(number, len(row), width, f"has {_cells(len(row))}, the first line has {width}")
    return [*row[:width], *[""] * (width - len(row))]


def _cells(count: int) -> str:
    return "1 cell" if count == 1 else f"{count} cells"
