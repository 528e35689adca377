"""Tables in files: delimited text, JSON, workbooks, Parquet and Arrow, and folders of the last two, by their content.

Libraries read each format and `delimited` finds what a delimited file does not say of itself. Every value comes out as Python has it.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedloom.core.errors import Refused
from fedloom.data.database import is_postgres, query_database
from fedloom.data.delimited import FileFormat, decode_text, read_delimited
from fedloom.data.raw_table import (
    RawTable,
    RowSource,
    Tables,
    arrow_table,
    check_column_names,
    choose_splits,
    gather_tables,
    table_of_columns,
    table_of_rows,
)

TEXT, JSON, WORKBOOK = (
    (".csv", ".tsv", ".txt", ".tab"),
    (".json", ".jsonl", ".ndjson"),
    (".xlsx", ".xls", ".xlsm", ".xlsb", ".ods"),
)
PARQUET, ARROW = (".parquet", ".pq"), (".arrow", ".feather", ".ipc")
SUFFIXES = (*TEXT, *JSON, *WORKBOOK, *PARQUET, *ARROW)
KINDS = "a CSV, TSV, JSON, Excel, Parquet or Arrow file, or a folder of one of the last two"
"""What can be read, for messages."""
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
    return _file_tables(Path(given), how)


def read_table_file(path: Path, how: FileFormat | None = None) -> RawTable:
    """Read one table: that of a file, or the training rows of a folder with splits. Raises Refused."""
    return read_tables(path, how or FileFormat()).train


def _file_tables(path: Path, how: FileFormat) -> Tables:
    try:
        if path.is_dir():
            return _folder_tables(path)
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
    if content.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")) or suffix in WORKBOOK:
        return Tables(_workbook(content, where, how.sheet_name))
    if suffix in JSON:
        return _json_tables(decode_text(content, where, how.encoding)[0], where)
    return Tables(read_delimited(content, where, how))


# JSON -----------------------------------------------------------------------------------------------------------------------


def _json_tables(text: str, where: str) -> Tables:
    """Read an array of rows, an object that holds one, or a row a line."""
    if text.lstrip().startswith("["):
        return Tables(table_of_rows(_parsed(text, where, "it"), where))
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    try:
        whole = json.loads(text)
    except ValueError:
        return Tables(table_of_rows((_parsed(line, where, f"line {number}") for number, line in lines), where))
    if not isinstance(whole, dict):
        raise Refused("data.path", where, "it holds a single value; give an array of rows, or one row a line")
    for name in ("data", "rows"):
        if isinstance(whole.get(name), list) and all(isinstance(row, dict) for row in whole[name]):
            return Tables(table_of_rows(whole[name], where))
    if whole and all(isinstance(part, list) for part in whole.values()):
        return gather_tables(whole, where)
    if any(isinstance(part, dict) for part in whole.values()):
        raise Refused("data.path", where, "it is one object of objects; give an array of rows, or one row a line")
    return Tables(table_of_rows([whole], where))


def _parsed(text: str, where: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "a number is too long"
        line = f", in line {error.lineno}" if isinstance(error, json.JSONDecodeError) and what == "it" else ""
        raise Refused("data.path", where, f"{what} is not JSON ({reason}{line})") from None
    except RecursionError:
        raise Refused("data.path", where, f"{what} is nested too deeply") from None


# Workbooks --------------------------------------------------------------------------------------------------------------------


def _workbook(content: bytes, where: str, name: str | None) -> RawTable:
    """Read a sheet of a workbook; its first row that is not empty has the names of the columns."""
    import io

    import python_calamine as calamine

    try:
        book = calamine.CalamineWorkbook.from_filelike(io.BytesIO(content))
        names = list(book.sheet_names)
        if name is not None and name not in names:
            raise Refused("data.sheet_name", name, f"no such sheet in {where}; it has {', '.join(names)}")
        rows = book.get_sheet_by_name(name or names[0]).to_python()
    except (calamine.CalamineError, OSError, IndexError, ValueError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused("data.path", where, f"it is no workbook that can be read ({type(error).__name__})") from None
    rows = [row for row in rows if any(cell != "" for cell in row)]
    if not rows:
        raise Refused("data.path", where, f"the sheet {name or names[0]!r} is empty")
    header = [str(cell).strip() for cell in rows[0]]
    named = [k for k, cell in enumerate(header) if cell and not cell.startswith("Unnamed: ")]
    check_column_names([header[k] for k in named], where)
    table = table_of_columns({header[k]: [row[k] for row in rows[1:]] for k in named}, where)
    note = f"{where}: the first of {len(names)} sheets is read ({names[0]!r}); data.sheet_name chooses another."
    return table._replace(notes=(note,) if name is None and len(names) > 1 else ())


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
        parts[_split_of(file.relative_to(path))].append(_arrow_file(file.read_bytes(), file.name))
    return choose_splits({name: _joined(tables, where) for name, tables in parts.items()}, where)


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
