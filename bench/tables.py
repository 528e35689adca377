"""Whether ten ugly but ordinary files give the same rows, and whether anything that is said of broken ones repeats a cell.

    python -m bench.tables [--quick]

The rows are compared with a literal list. Each file is then broken in several ways, with cells that stand nowhere else, and
messages, notes, warnings and logs are searched for these. Without `--quick` it also reads ugly delimited files with the readers
that were judged (docs/decisions/0030-tables.md), and one of 300,000 rows with each.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import io
import json
import logging
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from fedloom import Instructions, Refused, Table
from fedloom.data.examples import Source, Split
from fedloom.data.file_formats import read_table_file

ROWS = [
    ("Grüße aus Köln; bis bald", "1", "7"),
    ('It said, "closed" today', "0", "7"),
    ("Two lines\nof text", "1", "12"),
    ("null", "0", "12"),
    ("Zufällig – 5 € mehr", "1", "7"),
    ("naïve café", "0", "12"),
]
"""Text, label and client of each row: what all ten files hold."""
NAMES = ("text", "label", "ward")
Cells = Sequence[Sequence[Any]]
Write = Callable[[Cells, Path], Path]


# The ten files ----------------------------------------------------------------------------------------------------------


def write_semicolons(rows: Cells, folder: Path) -> Path:
    """What a spreadsheet saves as CSV in Germany: semicolons and Windows-1252."""
    return _save(folder / "semicolons.csv", _delimited([NAMES, *rows], ";").encode("cp1252", "replace"))


def write_utf16(rows: Cells, folder: Path) -> Path:
    """What a spreadsheet saves as Unicode text: tabs, quotation marks and UTF-16."""
    return _save(folder / "unicode.txt", _delimited([NAMES, *rows], "\t").encode("utf-16"))


def write_index_column(rows: Cells, folder: Path) -> Path:
    """What a frame of pandas saves: an index without a name."""
    lines = [("", *NAMES), *((number, *row) for number, row in enumerate(rows))]
    return _save(folder / "index.csv", _delimited(lines, ",").encode())


def write_trailing_blanks(rows: Cells, folder: Path) -> Path:
    """Labels and clients with blanks behind, also ones that nobody sees."""
    blanks = ("", " ", "\u00a0", "\u200b", "  ", "\t")
    lines = [(text, f"{label}{blanks[k % 6]}", f"{ward}{blanks[k % 5]}") for k, (text, label, ward) in enumerate(rows)]
    return _save(folder / "blanks.csv", _delimited([[f" {name} " for name in NAMES], *lines], ",").encode("utf-8-sig"))


def write_floats(rows: Cells, folder: Path) -> Path:
    """Whole numbers of which some took a detour through a column of floating numbers."""
    lines = [
        (text, f"{label}.0" if k % 3 else label, f"{ward}.0" if k % 2 else ward)
        for k, (text, label, ward) in enumerate(rows)
    ]
    return _save(folder / "floats.csv", _delimited([NAMES, *lines], ",").encode())


def write_missing(rows: Cells, folder: Path) -> Path:
    """Rows without a label, a text or a client between the others."""
    gaps = [("no label", "", "7"), ("", "1", "7"), ("no ward", "1", " ")]
    return _save(folder / "gaps.csv", _delimited([NAMES, gaps[0], *rows[:2], *gaps[1:], *rows[2:]], ",").encode())


def write_array(rows: Cells, folder: Path) -> Path:
    """One array of JSON, with labels as whole numbers where they are."""
    lines = [{**dict(zip(NAMES, row, strict=True)), "label": _number(row[1])} for row in rows]
    return _save(folder / "array.json", json.dumps(lines, indent=1).encode())


def write_sharegpt(rows: Cells, folder: Path) -> Path:
    """Conversations between "human" and "gpt", the label as the answer."""
    talks = [
        {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": label}], "ward": ward}
        for text, label, ward in rows
    ]
    return _save(folder / "sharegpt.json", json.dumps(talks).encode())


def write_workbook(rows: Cells, folder: Path) -> Path:
    """A workbook, in which every number is a floating one."""

    def cell(value: Any) -> str:
        if isinstance(_number(value), int):
            return f"<c><v>{value}</v></c>"
        return f'<c t="inlineStr"><is><t xml:space="preserve">{escape(str(value))}</t></is></c>' if value else "<c/>"

    lines = "".join(f"<row>{''.join(map(cell, row))}</row>" for row in [NAMES, *rows])
    main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    package = "http://schemas.openxmlformats.org/package/2006"
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{package}/content-types"/>',
        "_rels/.rels": f'<Relationships xmlns="{package}/relationships">'
        f'<Relationship Id="r1" Type="{office}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
        "xl/workbook.xml": f'<workbook xmlns="{main}" xmlns:r="{office}"><sheets>'
        '<sheet name="Ward" sheetId="1" r:id="r1"/></sheets></workbook>',
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{package}/relationships">'
        f'<Relationship Id="r1" Type="{office}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>',
        "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{main}"><sheetData>{lines}</sheetData></worksheet>',
    }
    with zipfile.ZipFile(folder / "book.xlsx", "w") as book:
        for name, content in parts.items():
            book.writestr(name, f'<?xml version="1.0" encoding="UTF-8"?>{content}')
    return folder / "book.xlsx"


def write_saved_data_set(rows: Cells, folder: Path) -> Path:
    """A data set of the library `datasets` as it saves one, its labels numbered by their names."""
    import datasets

    columns = [*map(list, zip(*rows, strict=True))]
    data = datasets.Dataset.from_dict(dict(zip(NAMES, columns, strict=True)))
    if set(columns[1]) <= {"0", "1"}:
        data = data.cast_column("label", datasets.ClassLabel(names=["0", "1"]))
    data.save_to_disk(str(folder / "saved"))
    return folder / "saved"


FILES: Mapping[str, Write] = {
    "semicolons and cp1252": write_semicolons,
    "UTF-16": write_utf16,
    "index column": write_index_column,
    "trailing blanks": write_trailing_blanks,
    "1 and 1.0": write_floats,
    "missing cells": write_missing,
    "JSON array": write_array,
    "ShareGPT": write_sharegpt,
    "xlsx": write_workbook,
    "saved data set": write_saved_data_set,
}


def source_of(path: Path, **more: Any) -> Source:
    """The file as data of a run; nothing is set aside where it is its own test file."""
    if path.name == "sharegpt.json":
        more = {name: value for name, value in more.items() if name == "missing"}
        return Instructions(path, path, client="ward", messages="conversations", **more)
    missing = "drop" if path.name == "gaps.csv" else "refuse"
    return Table(path, path, client="ward", **{"missing": missing, **more})


def rows_of(split: Split) -> list[tuple[str, str, str]]:
    """Text, label (or answer) and client of each training example."""
    some = split.train
    values = some.answers or [some.names[label] for label in some.labels]
    return list(zip(some.texts, values, some.clients or (), strict=True))


def _save(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _delimited(lines: Cells, separator: str) -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=separator).writerows(lines)
    return out.getvalue()


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.isdecimal() else value


# Broken ones ------------------------------------------------------------------------------------------------------------


CANARY = "qzx"
"""A part of every cell of a broken file; it stands in nothing that is said of it."""


def broken_rows() -> Iterator[tuple[str, list[tuple[Any, ...]], dict[str, Any]]]:
    """Yield rows of canaries that are wrong in one way each, and settings to read them with."""
    good = [(f"{CANARY} text {k}", f"{CANARY} {'yes' if k % 2 else 'no'}", f"{CANARY} {k % 3}") for k in range(9)]
    yield "labels that nobody named", good, {"labels": ("yes", "no")}
    yield "no such column", good, {"label": "diagnosis"}
    yield "a missing label", [*good, (f"{CANARY} text", "", f"{CANARY} 1")], {"missing": "refuse"}
    yield "missing cells that are dropped", [*good, ("", "", "")], {"missing": "drop"}
    yield "numbers among words", [*good, (f"{CANARY} text", "1", f"{CANARY} 1")], {}
    yield "a text that is a label each time", [(row[0], row[0], row[2]) for row in good * 3], {"label": "text"}
    yield "values that never repeat", [(row[0], f"{CANARY}{k}", row[2]) for k, row in enumerate(good * 3)], {}
    yield "two spellings", [*good, (good[0][0], f" {good[0][1]} ", good[0][2].upper())], {}
    yield "one label", [(text, good[0][1], ward) for text, _, ward in good], {}
    yield "rounded clients", [(text, label, "1.2345E+15") for text, label, _ in good], {}


def damaged(path: Path) -> Iterator[tuple[str, Path]]:
    """Yield a file with its bytes damaged, in ways that happen: cut off, without its first line, a wrong byte, a ragged row."""
    if path.is_dir():
        file = next(path.glob("*.arrow"))
        file.write_bytes(file.read_bytes()[:-200])
        yield "cut off", path
        return
    content = path.read_bytes()
    lines = content.split(b"\n")
    half = len(content) // 2
    for name, bad in {
        "cut off": content[: 2 * half // 3 * 2],
        "without its first line": b"\n".join(lines[1:]),
        "a wrong byte": content[:half] + b"\x81\x8d" + content[half:],
        "a ragged row": b"\n".join([*lines[:2], lines[-2 % len(lines)] + b",;\t" + lines[0], *lines[2:]]),
        "a quotation mark that nobody closes": content.replace(CANARY.encode(), b'"' + CANARY.encode(), 1),
    }.items():
        path.write_bytes(bad)
        yield name, path


def said_of(source: Source) -> str:
    """Everything that is said while a source is read: refusals, notes, warnings, logs, prints."""
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    logging.getLogger().addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(out):
            warnings.simplefilter("always")
            with contextlib.redirect_stderr(out):
                try:
                    said = "\n".join(source.load(0).notes)
                except Refused as error:
                    said = f"{error}\n{error.value!r}"
        return "\n".join([said, out.getvalue(), *(str(one.message) for one in caught)])
    finally:
        logging.getLogger().removeHandler(handler)


def values_printed(write: Write, folder: Path) -> Iterator[str]:
    """Yield what is said of broken files where it repeats a cell."""
    good: list[tuple[Any, ...]] = []
    for what, rows, how in broken_rows():
        good = good or rows
        said = said_of(source_of(write(rows, folder), **how))
        if CANARY in said.lower():
            yield f"{what}: {said}"
    for what, path in damaged(write(good, folder)):
        said = said_of(source_of(path))
        if CANARY in said.lower():
            yield f"{what}: {said}"


# Readers ----------------------------------------------------------------------------------------------------------------


UGLY: Mapping[str, tuple[str, list[list[str]] | None]] = {
    "comma": ("text,label\nx,0\n", [["text", "label"], ["x", "0"]]),
    "quoted separators": ('a,b\n"x, y; z",0\n', [["a", "b"], ["x, y; z", "0"]]),
    "newline in a cell": ('a,b\n"x\ny",0\n', [["a", "b"], ["x\ny", "0"]]),
    "mixed line ends": ("a,b\r\nx,0\ny,1\r\n", [["a", "b"], ["x", "0"], ["y", "1"]]),
    "a short row": ("a,b\nx,0\ny\nz,1\n", None),
    "a long row": ("a,b\nx,0\ny,1,2\nz,1\n", None),
    "a mark never closed": ('a,b\n"x,0\ny,1\n', [["a", "b"], ['"x', "0"], ["y", "1"]]),
    "text behind a mark": ('a,b\n"x" y,0\nz,1\n', [["a", "b"], ['"x" y', "0"], ["z", "1"]]),
    "backslash before a mark": ('a,b\n"x \\"y\\" z",0\nw,1\n', [["a", "b"], ['x "y" z', "0"], ["w", "1"]]),
    "apostrophes": ("a,b\n'x, y',0\nz,1\n", None),
    "the word null": ("a,b\nnull,NA\n", [["a", "b"], ["null", "NA"]]),
    "an empty last column": ("a,b,\nx,0,\n", [["a", "b", ""], ["x", "0", ""]]),
    "a cell of 3 MB": (f"a,b\n{'x' * 3_000_000},0\n", [["a", "b"], ["x" * 3_000_000, "0"]]),
}
"""Text of a file with commas, and its rows (None: there are none); a refusal is never wrong where a mark is odd."""


def read_with_fedloom(path: Path) -> list[list[str]]:
    """What runs read with: `csv`, in each way that the file may be meant. A column without a name and cells is left out."""
    columns = read_table_file(path).columns
    rows = [list(columns), *(list(map(str, row)) for row in zip(*columns.values(), strict=True))]
    return [[*row, ""] for row in rows] if path.read_text().startswith("a,b,\n") else rows


def read_with_csv(path: Path) -> list[list[str]]:
    """Python's own reader, in strict mode; rows of another length are refused here."""
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, strict=True))
    if len({len(row) for row in rows}) > 1:
        raise ValueError("ragged")
    return rows


def read_with_pyarrow(path: Path) -> list[list[str]]:
    """pyarrow, told to leave cells as they are, and with a block as large as the file."""
    import pyarrow as pa
    import pyarrow.csv

    table = pa.csv.read_csv(
        path,
        read_options=pa.csv.ReadOptions(autogenerate_column_names=True, block_size=path.stat().st_size + 1),
        parse_options=pa.csv.ParseOptions(newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(column_types={f"f{k}": pa.string() for k in range(9)}),
    )
    return [list(row) for row in zip(*(column.to_pylist() for column in table.columns), strict=True)]


def read_with_polars(path: Path) -> list[list[str]]:
    """polars, told to leave cells as they are."""
    polars = importlib.import_module("polars")
    rows = polars.read_csv(path, has_header=False, infer_schema=False).rows()
    return [["" if cell is None else cell for cell in row] for row in rows]


def read_with_duckdb(path: Path, dialect: str = ", delim=',', quote='\"', escape='\"'") -> list[list[str]]:
    """DuckDB, told the separator and the quotation mark, and to leave cells as they are."""
    import duckdb

    with duckdb.connect(":memory:", config={"threads": 1, "autoload_known_extensions": "false"}) as connection:
        settings = f"header=false, all_varchar=true, max_line_size=100000000{dialect}"
        rows = connection.execute(f"select * from read_csv(?, {settings})", [str(path)]).fetchall()
    return [["" if cell is None else cell for cell in row] for row in rows]


def read_with_sniffer(path: Path) -> list[list[str]]:
    """DuckDB's sniffer, told nothing."""
    return read_with_duckdb(path, "")


READERS = (read_with_fedloom, read_with_csv, read_with_pyarrow, read_with_polars, read_with_duckdb, read_with_sniffer)


def judge(read: Callable[[Path], list[list[str]]], path: Path, rows: list[list[str]] | None) -> str:
    """Say whether a reader gives these rows, refuses, or gives others in silence."""
    try:
        found = read(path)
    except ImportError:
        return "not installed"
    except Exception:
        return "refused"
    return "right" if found == rows else f"WRONG: {len(found)} rows"


def print_readers(folder: Path) -> None:
    """Print what each reader makes of the ugly files, and its seconds for 300,000 rows."""
    names = [read.__name__.removeprefix("read_with_") for read in READERS]
    print(f"\n{'':26s}" + "".join(f"{name:16s}" for name in names))
    for what, (text, rows) in UGLY.items():
        path = _save(folder / "ugly.csv", text.encode())
        print(f"{what:26s}" + "".join(f"{judge(read, path, rows):16s}" for read in READERS))
    rows = [[f'row {k} with some, words and "marks" ' * 3, str(k % 5)] for k in range(300_000)]
    lines = [["a", "b"], *rows]
    path = _save(folder / "long.csv", _delimited(lines, ",").encode())
    seconds = []
    for read in READERS:
        start = time.perf_counter()
        verdict = judge(read, path, lines)
        seconds.append(f"{time.perf_counter() - start:.2f} s" if verdict == "right" else verdict)
    print(f"{'300,000 rows':26s}" + "".join(f"{took:16s}" for took in seconds))


def main(arguments: list[str] | None = None) -> None:
    """Print a line for each file, and as the last line one JSON object."""
    parser = argparse.ArgumentParser(prog="bench.tables", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="leave out the other readers")
    quick = parser.parse_args(arguments).quick
    equal = printed = 0
    with tempfile.TemporaryDirectory() as place:
        for number, (name, write) in enumerate(FILES.items()):
            folder = Path(place) / str(number)
            folder.mkdir()
            with contextlib.redirect_stderr(io.StringIO()):  # progress bars of `datasets`
                split = source_of(write(ROWS, folder)).load(0)
                repeats = list(values_printed(write, folder))
            same = rows_of(split) == ROWS
            equal, printed = equal + same, printed + len(repeats)
            print(f"{name:24s} {'equal' if same else 'DIFFERENT'}  {' '.join(split.notes)}")
            for line in repeats:
                print(f"    repeats a cell: {line}")
        if not quick:
            print_readers(Path(place))
    print(json.dumps({"files": len(FILES), "equal": equal, "values_printed": printed}))


if __name__ == "__main__":
    main()
