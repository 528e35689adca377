"""Tables in memory: rows, columns, frames, Arrow tables and data sets give the same columns, and what is no table is refused."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime
from decimal import Decimal
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pyarrow as pa
import pytest
import torch

from fedloom.core.errors import Refused
from fedloom.core.schema import jsonable
from fedloom.data.instructions import Instructions
from fedloom.data.raw_table import RawTable, gather_rows, gather_tables, plain_value, table_of_columns
from fedloom.data.table import Rows, Table

ROWS: list[dict[str, Any]] = [{"text": "a", "label": 1}, {"text": None, "label": 0}, {"text": "c", "label": 1}]
COLUMNS = {"text": ["a", None, "c"], "label": [1, 0, 1]}


class Colour(StrEnum):
    RED = "red"


class Grade(IntEnum):
    GOOD = 1


def _pandas() -> Any:
    return pytest.importorskip("pandas").DataFrame(COLUMNS)


def _pandas_extension() -> Any:
    pandas = pytest.importorskip("pandas")
    types = {"text": "string", "label": "Int64"}
    return pandas.DataFrame({name: pandas.array(cells, dtype=types[name]) for name, cells in COLUMNS.items()})


def _polars() -> Any:
    return pytest.importorskip("polars").DataFrame(COLUMNS)


def _data_set() -> Any:
    return pytest.importorskip("datasets").Dataset.from_dict(COLUMNS)


MAKERS: list[Callable[[], Any]] = [
    lambda: ROWS,
    lambda: tuple(ROWS),
    lambda: lambda: iter(ROWS),
    lambda: COLUMNS,
    lambda: {"text": np.array(["a", None, "c"], dtype=object), "label": np.array([1, 0, 1])},
    lambda: [{name: np.array(value)[()] for name, value in row.items()} for row in ROWS],
    lambda: pa.table(COLUMNS),
    lambda: pa.RecordBatch.from_pydict(COLUMNS),
    lambda: RawTable(COLUMNS, "the rows"),
    _pandas,
    _pandas_extension,
    _polars,
    _data_set,
]


@pytest.mark.parametrize("make", MAKERS)
def test_everything_that_holds_rows_gives_the_same_columns(make: Callable[[], Any]) -> None:
    table = gather_rows(make(), "the rows")
    assert dict(table.columns) == COLUMNS
    assert [type(cell) for cell in table.columns["label"]] == [int, int, int]


@pytest.mark.parametrize("make", [MAKERS[3], *MAKERS[6:]])
def test_a_manifest_tells_the_number_and_the_hash_of_rows_and_never_a_cell(make: Callable[[], Any]) -> None:
    told = jsonable(Rows(ROWS))["rows"]
    assert set(told) == {"rows", "sha256"}
    assert jsonable(Rows(make(), test=make()))["test"] == jsonable(Rows(make()))["rows"] == told
    assert jsonable(Instructions(make()))["path"] == told
    assert jsonable(Rows({"train": make(), "test": ROWS}))["rows"] == {"train": told, "test": told}


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.int64(3), 3),
        (np.float64("nan"), None),
        (np.str_("a"), "a"),
        (np.bool_(True), True),
        (float("nan"), None),
        (torch.tensor(3), 3),
        (pa.scalar(5), 5),
        (np.array([{"role": "user"}], dtype=object), [{"role": "user"}]),
        (date(2020, 1, 2), "2020-01-02"),
        (datetime(2020, 1, 2, 3, 4), "2020-01-02T03:04:00"),
        (np.datetime64("NaT"), None),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (Decimal("NaN"), None),
        (b"caf\xc3\xa9", "café"),
        (np.bytes_(b"a"), "a"),
        (b"\xff", b"\xff"),
        (Colour.RED, "red"),
        (Grade.GOOD, 1),
        ([1], [1]),
    ],
)
def test_scalars_of_libraries_become_those_of_python(value: object, plain: object) -> None:
    found = plain_value(value)
    assert (found, type(found)) == (plain, type(plain))


def test_missing_values_of_pandas_are_missing() -> None:
    pandas = pytest.importorskip("pandas")
    assert [plain_value(value) for value in (pandas.NA, pandas.NaT, pandas.Timestamp("2020-01-02"))] == [
        None,
        None,
        "2020-01-02T00:00:00",
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (iter(ROWS), "an iterator can be read once only"),
        ([{"text": "a"}, ["SECRET"]], "row 2 is of type list; give one object of columns per row"),
        ({"text": ["SECRET"], "label": [1, 2]}, "its columns are of different lengths"),
        ({"text": "SECRET"}, "the column 'text' is no list"),
        ({"text": {"0": "SECRET"}, "label": {"0": 1}}, "the column 'text' is no list"),
        (5, "a value of type int is no table"),
        ("SECRET", "a value of type str is no table"),
    ],
)
def test_what_is_no_table_is_refused_without_its_values(given: Any, said: str) -> None:
    with pytest.raises(Refused, match=said) as refused:
        gather_tables(given, "the rows")
    assert "SECRET" not in str(refused.value)


def test_repeated_columns_are_refused_without_their_name() -> None:
    pandas = pytest.importorskip("pandas")
    with pytest.raises(Refused, match="columns 1 and 2 have the same name") as refused:
        gather_tables(pandas.DataFrame([["a", "b"]], columns=["SECRET", "SECRET"]), "the rows")
    assert "SECRET" not in str(refused.value)


def test_splits_are_taken_by_name_and_others_noted() -> None:
    rows = {"train": ROWS, "validation": ROWS[:2], "test": ROWS[:1]}
    train, test = gather_tables(rows, "the rows")
    assert test is not None
    assert (len(train.columns["text"]), len(test.columns["text"])) == (3, 1)
    assert train.notes == ("The 2 rows of the split 'validation' are not read.",)
    assert gather_tables({"train": ROWS}, "the rows").test is None
    assert dict(gather_rows(rows, "the test rows").columns) == {"text": ["a"], "label": [1]}


def test_class_labels_of_a_data_set_are_their_names_and_no_label_is_missing() -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"y": datasets.ClassLabel(names=["neg", "pos"])})
    data = datasets.Dataset.from_dict({"y": [1, 0, -1]}, features=features)
    splits = datasets.DatasetDict({"train": data, "test": data})
    sources = (data, splits, data.data.table, data.to_iterable_dataset(), data.with_format("numpy"))
    for table in (gather_rows(source, "here") for source in sources):
        assert table.columns["y"] == ["pos", "neg", None]
        assert table.classes == {"y": ("neg", "pos")}
    with pytest.raises(Refused, match="it has the splits a, b and none named 'train'"):
        gather_tables(datasets.DatasetDict({"a": data, "b": data}), "here")
    with pytest.raises(Refused, match="it has the splits a, b and none named 'train'"):
        Rows(datasets.DatasetDict({"a": data, "b": data})).load(0)


def test_rows_keep_the_numbers_that_they_had() -> None:
    table = table_of_columns({"a": list("wxyz")}, "here").select([1, 3]).select([1])
    assert (table.columns["a"], table.rows([0])) == (["z"], "row 4")
    assert table_of_columns({"a": list("wxyz")}, "here").rows([0, 1, 3]) == "rows 1, 2 and 4"


def test_an_index_with_a_name_is_a_column_as_in_a_file() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"text": ["a", "b"], "label": [1, 0]})
    assert dict(gather_rows(frame.set_index("label"), "here").columns) == {"text": ["a", "b"], "label": [1, 0]}
    assert dict(gather_rows(frame.iloc[::-1], "here").columns) == {"text": ["b", "a"], "label": [0, 1]}


def test_ordered_categories_are_classes_in_their_order_from_a_frame_and_from_a_file(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    order = ["low", "mid", "high", "never"]
    frame = pandas.DataFrame(
        {"text": list("abcdefghijkl"), "label": pandas.Categorical(["mid", "high", "low"] * 4, order, True)}
    )
    frame.to_parquet(tmp_path / "rows.parquet")
    for source in (Rows(frame), Table(tmp_path / "rows.parquet")):
        assert source.load(0).train.names == ("low", "mid", "high")
    unordered = frame.assign(label=frame["label"].cat.as_unordered())
    numbers = frame.assign(label=pandas.Categorical([10, 2, 1] * 4, [2, 1, 10], True))
    assert Rows(unordered).load(0).train.names == ("high", "low", "mid")
    assert Rows(numbers).load(0).train.names == ("1", "2", "10")
