"""Delimited text as people have it: encoding, separator and quoting are found or given, then `csv` reads it in strict mode.

A way of reading counts only if every row of the file comes out in as many cells as the first. The separators that are tried are
those in the first line. Where two of them read the whole file it is refused, and the user says which. docs/decisions/0030-tables.md
has the reasons.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fedloom.core.errors import Refused
from fedloom.data.raw_table import RawTable, check_column_names, table_of_columns

SEPARATORS: Mapping[str, str] = {",": "','", ";": "';'", "\t": "tab", "|": "'|'"}
"""Separators that are looked for, and what notes call them."""
LONGEST_CELL = 2**31 - 1
MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
USUAL = "cp1252"
LIKELY = (USUAL, "cp1250", "cp1251", "cp1253", "cp1254")
"""Encodings of office programs, among which the detector chooses; others have to be given."""


@dataclass(frozen=True, kw_only=True)
class FileFormat:
    """How a file is to be read; what is None is found, and the notes of the run say what was found, unless it is the ordinary.

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
    """What a quotation mark means.

    Fields:
        encloses: whether it encloses a cell; else it is a character like others.
        backslash: whether a backslash stands before one inside a cell; else it is doubled.
        padded: whether blanks may stand before one that opens a cell.
    """

    encloses: bool = True
    backslash: bool = False
    padded: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of `csv.reader`."""
        if not self.encloses:
            return {"quoting": csv.QUOTE_NONE, "quotechar": None}
        escape = {"escapechar": "\\", "doublequote": False} if self.backslash else {}
        return {**escape, "skipinitialspace": self.padded}


PLAIN, ENCLOSED = Quoting(encloses=False), Quoting()
PADDED, BACKSLASH = Quoting(padded=True), Quoting(backslash=True)


class Unreadable(Exception):
    """Rows that cannot be cut into cells in one way; `row` is the number of the first of them, `columns` how many the header has."""

    def __init__(self, row: int, columns: int, reason: str) -> None:
        super().__init__(reason)
        self.row, self.columns = row, columns


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
    found = _found(reading, encoding, how, where)
    header = [name.strip() for name in reading.rows[0]]
    unnamed = [k for k, name in enumerate(header) if not name or name.startswith("Unnamed: ")]
    named = [k for k in range(len(header)) if k not in unnamed]
    check_column_names([header[k] for k in named], where)
    filled = [k for k in unnamed if k and any(row[k].strip() for row in reading.rows[1:])]
    notes = [f"{where}: {', '.join(found)}."] if found else []
    if filled:
        notes.append(f"{where}: {len(filled)} column(s) without a name are not read.")
    columns = {header[k]: [row[k] for row in reading.rows[1:]] for k in named}
    return table_of_columns(columns, where)._replace(notes=tuple(notes))


def _found(reading: Reading, encoding: str, how: FileFormat, where: str) -> list[str]:
    """Say what was found and is not the ordinary."""
    facts = []
    if how.separator is None and reading.separator != _usual_separator(where) and len(reading.rows[0]) > 1:
        facts.append(f"separator {SEPARATORS.get(reading.separator, repr(reading.separator))}")
    if how.encoding is None and encoding != "utf-8":
        facts.append(f"encoding {encoding}")
    if how.quoted is None and reading.quoting.encloses != (reading.separator != "\t"):
        facts.append("quotation marks " + ("enclose cells" if reading.quoting.encloses else "are part of the text"))
    if reading.quoting.backslash:
        facts.append("a backslash before quotation marks inside cells")
    return facts


def _usual_separator(where: str) -> str:
    """Return the separator that the name of a file promises."""
    return "\t" if where.lower().removesuffix(".gz").endswith((".tsv", ".tab")) else ","


# Encoding -------------------------------------------------------------------------------------------------------------------


def decode_text(content: bytes, where: str, encoding: str | None = None) -> tuple[str, str]:
    """Return the text of a file without its byte order mark, and the encoding: as given, by its mark, UTF-8, or as detected.

    Raises:
        Refused: bytes that the encoding does not have, or none that fits.
    """
    marked = next((name for mark, name in MARKS if content.startswith(mark)), None)
    encoding = encoding or marked or _unicode_form(content) or detect_encoding(content, where)
    try:
        return content.decode(encoding).removeprefix("\ufeff"), encoding
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        remedy = f"line {line} of {where} is not in it; save the file as UTF-8, or give its encoding with --set data.encoding=..."
        raise Refused("data.encoding", encoding, remedy) from None
    except (LookupError, ValueError):
        raise Refused("data.encoding", encoding, "Python knows no such encoding; cp1252 and utf-16 are some") from None


def _unicode_form(content: bytes) -> str | None:
    """Return which form of Unicode bytes without a mark are: in UTF-16 each second byte of most texts is zero. None: neither."""
    start = content[:4096]
    if start.count(0) > len(start) / 4:
        return "utf-16-be" if start[::2].count(0) > start[1::2].count(0) else "utf-16-le"
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return "utf-8"


def detect_encoding(content: bytes, where: str) -> str:
    """Find the encoding of text that is not UTF-8. Of encodings that give the same text, or fit equally, cp1252 is the usual one.

    Raises:
        Refused: UTF-8 with a few broken characters, no encoding that fits, or none in which a language is recognised.
    """
    from charset_normalizer import from_bytes

    lenient = content.decode("utf-8", "replace")
    broken = lenient.count("\ufffd")
    line = lenient[: lenient.find("\ufffd")].count("\n") + 1
    remedy = "save it as UTF-8, or give its encoding with --set data.encoding=cp1252 (or another)"
    if sum(character > "\x7f" for character in lenient) > 2 * broken:
        raise Refused(
            "data.encoding", "utf-8", f"{broken} characters of {where} are broken, the first in line {line}; {remedy}"
        )
    fitting = list(from_bytes(content, cp_isolation=list(LIKELY)))
    if not fitting:
        raise Refused("data.path", where, f"it is not UTF-8 (line {line}), and its encoding was not found; {remedy}")
    best = fitting[0]
    equal = [match for match in fitting if (match.chaos, match.coherence) == (best.chaos, best.coherence)]
    if USUAL in [match.encoding for match in equal] or content.decode(USUAL, "replace") == str(best):
        return USUAL
    if best.coherence == 0:  # no language is recognised
        names = " or ".join(match.encoding for match in equal)
        raise Refused("data.path", where, f"it is not UTF-8 (line {line}), and its encoding may be {names}; {remedy}")
    return best.encoding


# Separator and quoting --------------------------------------------------------------------------------------------------------


def _declared_separator(text: str, given: str | None) -> tuple[str, str | None]:
    """Take off a first line "sep=;", by which spreadsheets tell each other the separator."""
    first, newline, rest = text.partition("\n")
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
        worst = max(failures, key=lambda one: one.columns)
        remedy = "mend the row, or say how to read the file with --set data.separator=';' or --set data.quoted=False"
        raise Refused("data.path", where, f"{f'row {worst.row}' if worst.row else 'the first line'} {worst}; {remedy}")
    return (wide or readings)[0]


def _read(text: str, separator: str, quoted: bool | None) -> Reading:
    """Read a text with this separator, in the first way of quoting that gives rows of one length.

    Between tabs quotation marks are text, as data sets have them, unless all of them enclose cells, as spreadsheets write them.
    Elsewhere they enclose cells, unless no cell is enclosed and they would make the rows unequal.
    """
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
    """Return the rows, the header first, without those that are empty. Raises Unreadable where they are not of one length."""
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True, **quoting.settings)
    rows: list[list[str]] = []
    width = 0
    try:
        for row in reader:
            if not row or not (row[0].strip() or any(map(str.strip, row))):
                continue
            width = width or len(row)
            if len(row) != width:
                raise Unreadable(len(rows), width, f"has {_cells(len(row))}, the first line has {width}")
            rows.append(row)
        if not rows:
            raise Unreadable(0, 0, "has no names of columns")
    except csv.Error:
        raise Unreadable(len(rows), width, "has a quotation mark that is not closed, or text behind one") from None
    return rows


def _cells(count: int) -> str:
    return "1 cell" if count == 1 else f"{count} cells"
