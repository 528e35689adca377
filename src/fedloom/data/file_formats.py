"""Tables in files: delimited text, JSON, workbooks, Parquet and Arrow, and folders of the last two, by their content.

Libraries read each format and `delimited` finds what a delimited file does not say of itself. Every value comes out as Python has it.
"""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from fedloom.core.errors import Refused
from fedloom.data.cells import identity
from fedloom.data.database import is_postgres, query_database
from fedloom.data.delimited import FOUND, FileFormat, read_delimited
from fedloom.data.encodings import decode_text
from fedloom.data.raw_table import (
    TRAINING,
    RawTable,
    RowSource,
    Tables,
    arrow_table,
    choose_splits,
    gather_tables,
    row_count,
    strip_blanks,
    table_below_header,
    table_of_rows,
)

TEXT, JSON = (".csv", ".tsv", ".txt", ".tab"), (".json", ".jsonl", ".ndjson")
WORKBOOK = (".xlsx", ".xls", ".xlsm", ".xlsb", ".ods")
PARQUET, ARROW = (".parquet", ".pq"), (".arrow", ".feather", ".ipc")
WORKBOOK_MARKS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0", b"\x09\x08", b"\x09\x04", b"\x09\x02", b"\x09\x00")
SUFFIXES = (*TEXT, *JSON, *WORKBOOK, *PARQUET, *ARROW)
KINDS = "a CSV, TSV, JSON, Excel, Parquet or Arrow file, or a folder of one of the last two"
"""What can be read, for messages."""
MARKUP = re.compile(rb"<(?:[?!]|html|head|body|table|workbook)", re.IGNORECASE)
"""What HTML and XML begin with, which some programs write under the name of a workbook."""
GAP = re.compile(r"[\s,\x1e]*")
"""What may stand between the values of a JSON file."""
SPLIT_NAME = re.compile(r"(?<![a-z])(train|test|validation|valid|val|dev|eval)(?:ing|set|uation)?(?![a-z])")


def read_tables(given: str | Path | RowSource | RawTable, how: FileFormat, where: str = "the rows") -> Tables:
    """Return the tables of a file, of a folder, of a query, or of anything in Python that `gather_tables` knows (`where` names it).

    Raises:
        Refused: what cannot be read, with the reason; never with a value of a cell.
    """
    if not isinstance(given, str | Path):
        return gather_tables(given, where)
    if how.query is not None:
        return Tables(query_database(str(given), how.query))
    if is_postgres(str(given)):
        raise Refused("data.query", None, "a database needs a query: select text, label from notes")
    if ":/" in str(given):
        raise Refused(
            "data.path", str(given), "addresses on the web are not read; download the file, or use data=Hub(...)"
        )
    return _file_tables(Path(given).expanduser(), how)


def read_table_file(path: Path, how: FileFormat = FOUND) -> RawTable:
    """Read one table: that of a file, or the training rows of a folder with splits. Raises Refused."""
    return read_tables(path, how).train


def _file_tables(path: Path, how: FileFormat) -> Tables:
    try:
        if path.is_dir():
            return _folder_tables(path)
        if path.exists() and not path.is_file():  # it may have no end
            raise Refused("data.path", str(path), f"it is a pipe or a device; give {KINDS}")
        content, zipped = path.read_bytes(), path.suffix.lower() == ".gz"
        if zipped or content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except FileNotFoundError:
        raise Refused("data.path", str(path), f"there is no such file; give {KINDS}") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "the compressed file is damaged"
        raise Refused("data.path", str(path), f"cannot be read ({reason})") from None
    suffix = (path.with_suffix("") if zipped else path).suffix.lower()
    if suffix not in SUFFIXES:
        raise Refused("data.path", str(path), f"give {KINDS}; text and JSON may be gzipped (.gz)")
    if not content.strip():
        raise Refused("data.path", path.name, "the file is empty")
    return _content_tables(content, path.name, suffix, how)


def _content_tables(content: bytes, where: str, suffix: str, how: FileFormat) -> Tables:
    """Read the content of a file by what it begins with, else by the suffix of its name."""
    if content.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")) or suffix in (*PARQUET, *ARROW):
        return Tables(_arrow_file(content, where))
    start = content.removeprefix(codecs.BOM_UTF8).lstrip()[:16]
    markup = MARKUP.match(start) is not None
    if content.startswith(WORKBOOK_MARKS) or (suffix in WORKBOOK and not markup and not _is_text(content)):
        return Tables(_workbook(content, where, how.sheet_name))
    if markup:
        raise Refused(
            "data.path", where, "it holds HTML or XML; open it in an office program and save it as a workbook or CSV"
        )
    if suffix in JSON or (start.startswith((b"[", b"{")) and _is_json(content, where, how)):
        return _json_tables(decode_text(content, where, how.encoding)[0], where)
    return Tables(read_delimited(content, where, how))


def _is_text(content: bytes) -> bool:
    """Whether a file of whatever name may be delimited text, as programs save it under the name of a workbook."""
    return b"\n" in content and (b"\0" not in content or content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)))


# JSON -----------------------------------------------------------------------------------------------------------------------


def _is_json(content: bytes, where: str, how: FileFormat) -> bool:
    """Whether a file begins with a row or with rows of JSON, whatever its name says."""
    try:
        first = json.JSONDecoder().raw_decode(decode_text(content, where, how.encoding)[0].lstrip())[0]
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) or _are_rows(first)


def _json_tables(text: str, where: str) -> Tables:
    """Read an array of rows, an object that holds one, or rows one after the other."""
    values = list(_json_values(text, where))
    if len(values) != 1:
        return Tables(table_of_rows(values, where))
    (whole,) = values
    if isinstance(whole, list):
        return Tables(table_of_rows(whole, where))
    if not isinstance(whole, dict):
        raise Refused("data.path", where, "it holds a single value; give an array of rows, or one row a line")
    return _tables_of_object(whole, where)


def _tables_of_object(whole: dict[str, Any], where: str) -> Tables:
    """Read the rows that an object holds: for each split, under any one name, as cells below `columns`, or a list for each column."""
    tables = {name: part for name, part in whole.items() if _are_rows(part)}
    if TRAINING in tables:
        return gather_tables(tables, where)
    if len(tables) == 1:
        return Tables(table_of_rows(next(iter(tables.values())), where))
    names, cells = whole.get("columns"), whole.get("data")
    if isinstance(names, list) and isinstance(cells, list) and all(isinstance(row, list) for row in cells):
        return Tables(table_of_rows([dict(zip(map(str, names), row, strict=False)) for row in cells], where))
    if whole and all(isinstance(part, list) for part in whole.values()):
        return gather_tables(whole, where)
    if any(isinstance(part, dict) for part in whole.values()):
        remedy = 'give an array of rows (in pandas: orient="records"), or one row a line'
        raise Refused("data.path", where, f"it is one object of objects; {remedy}")
    return Tables(table_of_rows([whole], where))


def _are_rows(part: object) -> bool:
    """Whether this is a list of rows, and not the messages of one conversation."""
    rows = isinstance(part, list) and bool(part) and all(isinstance(row, dict) for row in part)
    return rows and not {"role", "from"} & part[0].keys()  # type: ignore[index]


def _json_values(text: str, where: str) -> Iterator[Any]:
    """Yield the values of a text that stand one after the other, on lines of their own or not; a comma may stand between them."""
    decoder, place = json.JSONDecoder(), GAP.match(text).end()  # type: ignore[union-attr]
    while place < len(text):
        try:
            value, place = decoder.raw_decode(text, place)
        except RecursionError:
            raise Refused("data.path", where, "it is nested too deeply") from None
        except ValueError as error:
            position, reason = place, "a number is too long"
            if isinstance(error, json.JSONDecodeError):
                position, reason = error.pos, error.msg
            line = text.count("\n", 0, position) + 1
            remedy = "give an array of rows, or one row a line"
            raise Refused("data.path", where, f"line {line} is not JSON ({reason}); {remedy}") from None
        yield value
        place = GAP.match(text, place).end()  # type: ignore[union-attr]


# Workbooks --------------------------------------------------------------------------------------------------------------------


def _workbook(content: bytes, where: str, name: str | None) -> RawTable:
    """Read a sheet of a workbook; its first row that is not empty has the names of the columns."""
    import io

    import python_calamine as calamine

    try:
        book = calamine.CalamineWorkbook.from_filelike(io.BytesIO(content))
        names = [sheet.name for sheet in book.sheets_metadata]
        if name is not None and name not in names:
            raise Refused("data.sheet_name", name, f"no such sheet in {where}; it has {', '.join(names)}")
        shown = [sheet.name for sheet in book.sheets_metadata if sheet.visible == calamine.SheetVisibleEnum.Visible]
        for chosen in [name] if name is not None else shown or names:
            rows = [row for row in book.get_sheet_by_name(chosen).to_python() if any(cell != "" for cell in row)]
            if len(rows) > 1:
                break
    except (calamine.CalamineError, OSError, IndexError, ValueError) as error:
        if isinstance(error, Refused):
            raise
        remedy = "save it again as .xlsx without a password, or as CSV"
        raise Refused(
            "data.path", where, f"it is no workbook that can be read ({type(error).__name__}); {remedy}"
        ) from None
    if not rows:
        raise Refused("data.path", where, f"the sheet {chosen!r} is empty")
    header = [strip_blanks(identity(cell)) for cell in rows[0]]
    table = table_below_header(header, rows[1:], where)
    if name is not None or len(names) == 1:
        return table._replace(advice="")
    note = f"{where}: the sheet {chosen!r} is read, one of {len(names)}; data.sheet_name chooses another."
    return table._replace(
        notes=(note, *table.notes),
        advice=f"its sheets are {', '.join(names)}: choose one with --set data.sheet_name=NAME",
    )


# Parquet and Arrow ------------------------------------------------------------------------------------------------------------


def _arrow_file(content: bytes, where: str) -> RawTable:
    """Read a Parquet file, or one of Arrow in either of its forms (file, also called feather, and stream)."""
    import pyarrow as pa
    import pyarrow.feather
    import pyarrow.parquet

    try:
        if content.startswith(b"PAR1"):
            return arrow_table(pa.parquet.read_table(pa.BufferReader(content)), where)
        if content.startswith((b"ARROW1", b"FEA1")):
            return arrow_table(pa.feather.read_table(pa.BufferReader(content)), where)
        return arrow_table(pa.ipc.open_stream(pa.BufferReader(content)).read_all(), where)
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused("data.path", where, "it cannot be read: it is no whole Parquet or Arrow file") from None


def _folder_tables(path: Path) -> Tables:
    """Read a folder that `datasets` saved, or one of Parquet or Arrow files; files named after a split belong to it."""
    where = path.name
    if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
        return _saved_data_set(path)
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in (*PARQUET, *ARROW) and file.is_file())
    if not files:
        raise Refused(
            "data.path", str(path), f"cannot be read: no Parquet or Arrow file is in the folder; give {KINDS}"
        )
    parts = defaultdict[str, list[RawTable]](list)
    for file in files:
        inside = file.relative_to(path)
        parts[_split_of(inside)].append(_with_folders(_arrow_file(file.read_bytes(), file.name), inside))
    return choose_splits({name: _joined(tables, where) for name, tables in parts.items()}, where)


def _with_folders(table: RawTable, file: Path) -> RawTable:
    """Add the columns that folders name, such as ward=7, as Spark and pandas divide a table."""
    named = dict(part.split("=", 1) for part in file.parts[:-1] if "=" in part)
    size = row_count(table)
    added = {name: list[object]([unquote(value)]) * size for name, value in named.items()}
    return table._replace(columns={**table.columns, **added})


def _split_of(file: Path) -> str:
    """Return the split that a file of a data set belongs to, by its name or its folder, as the Hugging Face hub names them."""
    for part in reversed(file.parts):
        if found := SPLIT_NAME.search(part.lower()):
            return found[1]
    return "train"


def _joined(tables: Iterable[RawTable], where: str) -> RawTable:
    """Return the rows of several tables with the same columns, one after the other. Raises Refused where columns differ."""
    first, *others = tables
    columns = {name: list(cells) for name, cells in first.columns.items()}
    for table in others:
        if table.columns.keys() != columns.keys() or table.classes != first.classes:
            raise Refused("data.path", where, f"{table.where} has other columns than {first.where}")
        for name, cells in table.columns.items():
            columns[name] += cells
    return RawTable(columns, where, classes=first.classes)


def _saved_data_set(path: Path) -> Tables:
    """Read what `save_to_disk` wrote, with the names of its classes."""
    import datasets  # slow to import, and needed here only

    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises errors of several others
        raise Refused("data.path", str(path), f"`datasets` cannot load it ({type(error).__name__})") from None
    return gather_tables(data, path.name)
