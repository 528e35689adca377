"""A table holds the lines that it was made of, and its columns are theirs."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.report import line_table
from fedloom.report.line_table import LineTable
from tests.support.storms import tries

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=3)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["down", "train", "up", "x"]), inner, max_size=3)
    ),
    max_leaves=4,
)
NAMES = st.sampled_from(["client", "loss", "seconds", "", "text", "rest", "down"])
LINES = st.lists(st.dictionaries(NAMES, VALUES, max_size=5), max_size=10)


@given(lines=LINES, block=st.integers(1, 4), most=st.integers(1, 8), step=st.sampled_from([1, 2, -1, -3]))
@tries(200)
def test_lines_come_back_as_they_were(lines: list[dict[str, Any]], block: int, most: int, step: int) -> None:
    """Whatever JSON holds, in blocks of any size, and with more fields than get a column."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(line_table, "BLOCK", block)
        patched.setattr(line_table, "MOST_FIELDS", most)
        table = LineTable.of(lines)
        assert list(table) == lines
        assert [table[k] for k in range(-len(lines), len(lines))] == lines * 2
        assert list(table[::step]) == lines[::step]
        odd = np.arange(len(lines)) % 2 == 1
        assert list(table.select(odd)) == lines[1::2]
        assert list(table.select(odd)[1:]) == lines[1::2][1:]
        assert list(table[1:].select(odd[1:])) == lines[1::2]


@given(lines=LINES, block=st.integers(1, 4))
@tries(200)
def test_columns_are_those_of_the_lines(lines: list[dict[str, Any]], block: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(line_table, "BLOCK", block)
        table = LineTable.of(lines)
    for name in ("client", "loss"):
        for found, line in zip(table.numbers(name).tolist(), lines, strict=True):
            wanted = line.get(name)
            number = type(wanted) in (int, float) and not (type(wanted) is int and abs(wanted) > 2**53)
            assert found == wanted if number else math.isnan(found)
        texts = [line[name] for line in lines if isinstance(line.get(name), str)]
        assert [line[name] for line in table.select(table.matches(name, texts))] == texts
        assert table.counts(name) == Counter(texts) == {text: len(part) for text, part in table.by_text(name).items()}
        assert table.has(name) == any(name in line for line in lines)


def test_a_table_is_divided_by_a_text_in_the_order_of_its_lines() -> None:
    lines = [{"client": name, "seconds": {"down": k, "train": 0.5}} for k, name in enumerate("abcab")]
    parts = LineTable.of([*lines, {"client": None}]).by_text("client")
    assert {name: list(part) for name, part in parts.items()} == {
        name: [line for line in lines if line["client"] == name] for name in "abc"
    }
    assert parts["b"].numbers("seconds", "down").tolist() == [1, 4]
    assert np.isnan(parts["b"].numbers("seconds", "up")).all()


def test_a_million_numbers_take_the_bytes_of_numbers() -> None:
    """Not those of a million dictionaries: a small whole number has one byte, a text a place among the texts."""
    table = LineTable.of({"id": k % 100, "status": "merged", "loss": k / 7} for k in range(9000))
    sizes = {key.name: column.values.itemsize for key, column in table.columns.items()}
    assert sizes == {"id": 1, "status": 1, "loss": 8}
    assert all(column.holes is None for column in table.columns.values())
