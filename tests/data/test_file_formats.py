"""Files of every kind give the same rows, and a sentence says what cannot be read."""

from __future__ import annotations

import gzip
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.tables import write_workbook
from fedloom.core.errors import Refused
from fedloom.data.cells import check_columns
from fedloom.data.delimited import FileFormat
from fedloom.data.file_formats import _content_tables, read_table_file, read_tables
from fedloom.data.raw_table import row_count
from tests.support.storms import tries

ROWS = [{"text": f"text {i}, with a comma", "label": i % 2, "ward": f"w{i % 3}"} for i in range(6)]
COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}
TABLE = pa.Table.from_pylist(ROWS)


def _parquet(path: Path) -> None:
    pa.parquet.write_table(TABLE, path)


def _stream(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, TABLE.schema) as writer:
        writer.write_table(TABLE)


def _text(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(text, encoding="utf-8") and None


LINES = "\n".join(map(json.dumps, ROWS))
WRITERS: dict[str, Callable[[Path], Any]] = {
    "lines.jsonl": _text(LINES),
    "lines.json": _text(f"\ufeff{LINES}\n\n"),
    "array.json": _text(json.dumps(ROWS, indent=2)),
    "array.jsonl": _text(json.dumps(ROWS)),
    "data.json": _text(json.dumps({"version": 2, "data": ROWS})),
    "rows.json": _text(json.dumps({"rows": ROWS})),
    "columns.json": _text(json.dumps(COLUMNS)),
    "one-name.json": _text(json.dumps({"about": {"of": 1}, "examples": ROWS})),
    "train.json": _text(json.dumps({"version": 2, "train": ROWS})),
    "split.json": _text(json.dumps({"columns": list(COLUMNS), "data": [list(row.values()) for row in ROWS]})),
    "pretty.jsonl": _text("\n".join(json.dumps(row, indent=2) for row in ROWS)),
    "commas.jsonl": _text("\r\n".join(f"{json.dumps(row)}," for row in ROWS)),
    "sequence.json": _text("".join(f"\x1e{json.dumps(row)}\n" for row in ROWS)),
    "array.csv": _text(f"\ufeff{json.dumps(ROWS)}"),
    "lines.txt": _text(LINES),
    "splits.json": _text(json.dumps({"train": ROWS, "test": ROWS[:1]})),
    "utf16.json": lambda path: path.write_bytes(json.dumps(ROWS).encode("utf-16")),
    "rows.parquet": _parquet,
    "rows.feather": lambda path: pa.feather.write_feather(TABLE, str(path)),
    "rows.arrow": _stream,
    "parquet.arrow": _parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert dict(read_table_file(tmp_path / name).columns) == COLUMNS
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    assert dict(read_table_file(tmp_path / f"{name}.gz").columns) == COLUMNS


def test_a_workbook_gives_its_first_sheet_or_the_one_that_is_named(tmp_path: Path) -> None:
    path = write_workbook([("a", "1", "7"), ("b", "0", "8"), ("", "", "")], tmp_path)
    table = read_table_file(path, FileFormat(sheet_name="Ward"))
    assert dict(table.columns) == {"text": ["a", "b"], "label": [1.0, 0.0], "ward": [7.0, 8.0]}
    assert read_table_file(path) == table
    with pytest.raises(Refused, match=r"data\.sheet_name = 'Other': no such sheet in book\.xlsx; it has Ward"):
        read_table_file(path, FileFormat(sheet_name="Other"))


def test_folders_may_name_columns_as_spark_divides_a_table(tmp_path: Path) -> None:
    for ward in ("7", "8%20b"):
        folder = tmp_path / f"ward={ward}"
        folder.mkdir()
        pa.parquet.write_table(TABLE.drop_columns(["ward"]).slice(0, 1), folder / "part-0.parquet")
    assert dict(read_table_file(tmp_path).columns) == {
        "text": [ROWS[0]["text"]] * 2,
        "label": [0, 0],
        "ward": ["7", "8 b"],
    }


def test_a_sheet_with_rows_is_read_and_its_name_is_noted(tmp_path: Path) -> None:
    book = write_workbook([("a", "1", "7"), ("b", "0", "8")], tmp_path)
    parts = dict[str, bytes]()
    with zipfile.ZipFile(book) as held:
        parts.update({name: held.read(name) for name in held.namelist()})
    parts["xl/workbook.xml"] = parts["xl/workbook.xml"].replace(
        b"<sheets>",
        b'<sheets><sheet name="Empty" sheetId="2" r:id="r2"/><sheet name="Old" sheetId="3" state="hidden" r:id="r1"/>',
    )
    parts["xl/_rels/workbook.xml.rels"] = parts["xl/_rels/workbook.xml.rels"].replace(
        b"</Relationships>",
        b'<Relationship Id="r2" Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/worksheet" '
        b'Target="worksheets/sheet2.xml"/></Relationships>',
    )
    sheet = parts["xl/worksheets/sheet1.xml"]
    start, end = sheet.index(b"<sheetData>"), sheet.index(b"</sheetData>")
    parts["xl/worksheets/sheet2.xml"] = sheet[:start] + b"<sheetData>" + sheet[end:]
    with zipfile.ZipFile(tmp_path / "more.xlsx", "w") as made:
        for name, content in parts.items():
            made.writestr(name, content)
    table = read_table_file(tmp_path / "more.xlsx")
    assert table.columns["text"] == ["a", "b"]
    assert table.notes == ("more.xlsx: the sheet 'Ward' is read, one of 3; data.sheet_name chooses another.",)
    with pytest.raises(Refused, match=r"its sheets are Empty, Old, Ward: choose one with --set data\.sheet_name=NAME"):
        check_columns(table, {"text": ["words"]})


def test_texts_may_begin_like_another_kind_of_file(tmp_path: Path) -> None:
    for first in ("<text>", "[text]", "{text}", "[1]", '["a"]'):
        (tmp_path / "a.csv").write_text(f"{first};label\n{first};0\nb;1\n")
        assert list(read_table_file(tmp_path / "a.csv").columns)[1:] == ["label"]


def test_delimited_text_under_the_name_of_a_workbook_is_read(tmp_path: Path) -> None:
    for encoding in ("utf-8", "utf-16"):
        (tmp_path / "export.xls").write_bytes("text\tlabel\na\t1\n".encode(encoding))
        assert read_table_file(tmp_path / "export.xls").columns == {"text": ["a"], "label": ["1"]}


@tries(100)
@given(
    st.lists(st.dictionaries(st.text("ab", min_size=1), st.text(max_size=5), max_size=3), min_size=2, max_size=5),
    st.data(),
)
def test_json_values_may_stand_one_after_the_other(rows: list[dict[str, str]], data: st.DataObject) -> None:
    gaps = st.sampled_from(["\n", " ", "\r\n\r\n", ",", "\x1e", " ,\n"])
    text = "".join(json.dumps(row, indent=data.draw(st.sampled_from([None, 1]))) + data.draw(gaps) for row in rows)
    table = _content_tables(text.encode(), "a.json", ".json", FileFormat()).train
    names = {name for row in rows for name in row}
    assert (set(table.columns), row_count(table)) == (names, len(rows) if names else 0)


def test_folders_of_files_are_joined_in_order_and_divided_by_the_names_of_splits(tmp_path: Path) -> None:
    for name in ("train-00001-of-00002", "train-00000-of-00002", "test-00000-of-00001"):
        pa.parquet.write_table(TABLE.slice(0, 2 if "test" in name else 3), tmp_path / f"{name}.parquet")
    train, test = read_tables(tmp_path, FileFormat())
    assert test is not None
    assert (len(train.columns["text"]), len(test.columns["text"])) == (6, 2)
    (tmp_path / "trained").mkdir()
    pa.feather.write_feather(TABLE, str(tmp_path / "trained" / "part.feather"))
    assert read_tables(tmp_path / "trained", FileFormat()).test is None
    pa.parquet.write_table(TABLE.drop_columns(["ward"]), tmp_path / "train-00002.parquet")
    with pytest.raises(Refused, match="has other columns than"):
        read_tables(tmp_path, FileFormat())


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("imdb_test.parquet", "test"),
        ("testset.parquet", "test"),
        ("validation/0.parquet", "validation"),
        ("test/train.arrow", "train"),
        ("part-0.parquet", "train"),
        ("latest-contest.parquet", "train"),
        ("trained.parquet", "train"),
    ],
)
def test_files_belong_to_the_split_that_their_name_or_folder_says(tmp_path: Path, name: str, split: str) -> None:
    for path in (tmp_path / name, tmp_path / "train.parquet"):
        path.parent.mkdir(exist_ok=True)
        _parquet(path)
    train, test = read_tables(tmp_path, FileFormat())
    assert (len(train.columns["text"]), test is not None) == (12 if split == "train" else 6, split == "test")
    assert bool(train.notes) == (split == "validation")


@pytest.mark.slow
def test_what_datasets_saved_is_read_with_the_names_of_its_classes(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "two"))
    data.to_parquet(str(tmp_path / "rows.parquet"))
    for path in (tmp_path / "one", tmp_path / "two", tmp_path / "rows.parquet"):
        train, test = read_tables(path, FileFormat())
        assert train.columns["label"] == ["pos", "neg"]
        assert train.classes["label"] == ("neg", "pos")
        assert (test is not None) == (path.name == "two")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"", "the file is empty"),
        ("a.jsonl", b"\n\n", "the file is empty"),
        ("a.docx", b"x", "give a CSV, TSV, JSON, Excel, Parquet or Arrow file, or a folder"),
        ("a", b"x", "give a CSV"),
        ("a.xlsx", b"SECRET", "it is no workbook that can be read"),
        ("a.xlsx", b"PK\x03\x04SECRET", "it is no workbook that can be read"),
        ("a.parquet", b"PAR1 SECRET", "it is no whole Parquet or Arrow file"),
        ("a.arrow", b"SECRET", "it is no whole Parquet or Arrow file"),
        ("a.jsonl", b'{"a": 1}\n{"a": SECRET', r"line 2 is not JSON \(Expecting value\)"),
        ("a.json", b'[{"a": 1},\n{"a": SECRET', r"line 2 is not JSON \(Expecting value\)"),
        (
            "a.xls",
            b"<html><table>\n<tr><td>SECRET</td></tr></table>",
            "it holds HTML or XML; open it in an office program",
        ),
        ("a.csv", b"\xef\xbb\xbf<?xml?>\n<SECRET/>", "it holds HTML or XML"),
        ("a.jsonl", b'"SECRET"\n["SECRET"]\n', "row 1 is of type str"),
        ("a.json", b'["SECRET"]', "row 1 is of type str; give one object of columns per row"),
        ("a.json", b"5", "it holds a single value"),
        ("a.json", b'{"text": {"0": "SECRET"}}', "it is one object of objects"),
        ("a.json", b"[" * 100_000, "it is nested too deeply|is not JSON"),
        ("a.json", b'{"a": ' + b"1" * 5000 + b"}", "a number is too long"),
        ("a.csv.gz", b"no gzip", "cannot be read"),
        ("a.csv.gz", gzip.compress(b"text,label\n" * 99, mtime=0)[:-9], "the compressed file is damaged"),
    ],
)
def test_what_is_no_table_is_refused_in_one_sentence_without_its_content(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Refused, match=said) as refused:
        read_table_file(tmp_path / name)
    assert "SECRET" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_missing_files_and_folders_without_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="there is no such file"):
        read_table_file(tmp_path / "none.csv")
    with pytest.raises(Refused, match="addresses on the web are not read"):
        read_tables("https://example.org/a.csv", FileFormat())
    os.mkfifo(tmp_path / "pipe.csv")
    for endless in (tmp_path / "pipe.csv", Path("/dev/zero")):
        with pytest.raises(Refused, match="a pipe or a device"):
            read_table_file(endless)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(Refused, match="no Parquet or Arrow file is in the folder"):
        read_table_file(tmp_path / "folder.csv")
    (tmp_path / "folder.csv" / "dataset_info.json").write_text("{}")
    with pytest.raises(Refused, match="`datasets` cannot load it"):
        read_table_file(tmp_path / "folder.csv")
