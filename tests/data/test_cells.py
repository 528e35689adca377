"""What a cell means: one identity of labels and clients, whatever format a value came from, and no cell in any message."""

from __future__ import annotations

import unicodedata
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.errors import Refused
from fedloom.data.cells import (
    by_number,
    check_classes,
    check_columns,
    class_notes,
    column_identities,
    column_texts,
    drop_missing,
    identity,
    is_missing,
    refuse_unknown,
)
from fedloom.data.raw_table import RawTable, table_of_columns
from tests.support.storms import tries

BLANKS = st.text(" \t\n\u00a0\u2003\u200b\ufeff\u2060", max_size=3)


def _labels(*cells: object) -> RawTable:
    return table_of_columns({"label": cells}, "here")


@tries(300)
@given(st.integers(-(2**53) + 1, 2**53 - 1), BLANKS, BLANKS)
def test_a_whole_number_is_the_same_however_it_is_written(number: int, before: str, after: str) -> None:
    written = [number, float(number), Decimal(number), np.int64(number), np.float64(number)]
    texts = [str(number), f"{number}.0", f"{number}.", f"{number},0", f"{before}{number}{after}", f"{number:.17e}"]
    texts += [f"{number:+}", str(number).replace("-", "\u2212")]
    assert {identity(value) for value in written + texts} == {str(number)}


@tries(300)
@given(st.text(max_size=12), BLANKS, BLANKS)
def test_words_are_stripped_and_composed_once_and_for_all(word: str, before: str, after: str) -> None:
    one = identity(word)
    assert identity(one) == one == unicodedata.normalize("NFC", one)
    assert identity(before + unicodedata.normalize("NFD", word) + after) == identity(unicodedata.normalize("NFD", word))
    assert is_missing(word) == (one == "")


def test_codes_and_words_stay_what_they_are() -> None:
    for word in ("007", "01", "1,000", "1e3", "1.5", "null", "NA", "nan", "None", "inf", "-", "\u0661"):
        assert identity(word) == word
    assert {identity(value) for value in (-0.0, "-0", "-0.0", 0)} == {"0"}
    assert {identity(value) for value in (True, "true", "True", "TRUE", np.bool_(True))} == {"true"}
    assert identity("caf\u0065\u0301 ") == "caf\u00e9"
    assert identity("tRuE") == "tRuE"


def test_labels_are_ordered_by_number() -> None:
    assert sorted(["10", "2", "-1", "b", "1.5", "a"], key=by_number) == ["-1", "1.5", "2", "10", "a", "b"]


@pytest.mark.parametrize(
    ("cells", "rows", "why"),
    [
        ((1, 0, "yes", "no", "yes"), "rows 1 and 2", "numbers among words"),
        (("1", "0", "1", "yes"), "row 4", "words among numbers"),
        ((True, 1, 0), "row 1", "words among numbers"),
        ((0.5, 1.0, 2.0), "row 1", "a score, not a class"),
        (("0,5", "1", "2"), "row 1", "a score, not a class"),
        (tuple(f"word {k}" for k in range(60)), "60 different values in 60 rows", "are no classes"),
    ],
)
def test_a_column_that_holds_no_classes_is_refused_with_a_remedy(
    cells: tuple[object, ...], rows: str, why: str
) -> None:
    raw = _labels(*cells)
    with pytest.raises(Refused, match=r"--set data\.label=COLUMN|write all labels in one way") as refused:
        check_classes(raw, "label", "label", column_identities(raw, "label", "label").values)
    assert rows in str(refused.value)
    assert why in str(refused.value)
    assert "--set \"data.labels=('low', 'high')\"" in str(refused.value)


def test_words_numbers_codes_and_booleans_are_classes() -> None:
    for cells in (("a", "b"), (1, 2.0), ("01", "02", "10"), (True, False), ("true", "half-true"), ("NA", "nan")):
        raw = _labels(*cells)
        check_classes(raw, "label", "label", column_identities(raw, "label", "label").values)


@pytest.mark.parametrize(
    "cell", ["1.23457E+12", "1e+16", float(2**53), 1e300, float("inf"), "9007199254740993.0", [1], {"a": 1}, b"\xff"]
)
def test_what_lost_its_digits_or_is_no_word_is_refused(cell: object) -> None:
    raw = _labels("a", cell)
    with pytest.raises(Refused, match=r"row 2 of here"):
        column_identities(raw, "client", "label")


def test_lone_surrogates_name_nobody() -> None:
    with pytest.raises(Refused, match="half of a character"):
        column_identities(_labels("a", "\ud83d"), "client", "label")


def test_spellings_that_met_and_names_that_nearly_do_are_noted_with_rows_and_without_values() -> None:
    found = column_identities(_labels("yes", "no", "yes ", 1, "1.0", "Yes", "007", "7"), "label", "label")
    assert found.values == ["yes", "no", "yes", "1", "1", "Yes", "007", "7"]
    same, different = found.notes
    assert "2 names are written in more than one way in the column 'label' of here" in same
    assert "rows 1 and 3" in same
    assert "4 names are told apart by case, inner blanks or leading zeros only" in different
    assert column_identities(_labels("0", ""), "label", "label").notes == []  # where empty cells are left in
    assert "rows 1 and 6" in different
    assert not any(word in note for note in found.notes for word in ("yes", "Yes", "no ", "007"))
    assert column_identities(_labels("a", "b", "a"), "label", "label").notes == []


def test_texts_are_taken_as_they_stand_and_numbers_as_they_are_written() -> None:
    raw = table_of_columns({"a": ["x ", 5, 2.0, True, None], "b": ["", "y", None, "z", " "]}, "here")
    assert column_texts(raw, "text", ["a", "b"]) == ("x ", "5. y", "2", "true. z", "")
    with pytest.raises(Refused, match="row 1 of here: a value of type list, not text"):
        column_texts(table_of_columns({"a": [[1], "x"]}, "here"), "text", ["a"])


def test_missing_cells_are_all_counted_or_dropped_and_rows_keep_their_numbers() -> None:
    raw = table_of_columns({"t": ["", "b", None, "d", "e"], "l": ["1", "\u00a0", "1", "0", "1"]}, "here")
    names = {"text": ["t"], "label": ["l"]}
    with pytest.raises(
        Refused, match=r"3 of the 5 rows of here lack a value \(t is empty in rows 1 and 3; l is .* row 2"
    ):
        drop_missing(raw, names, "refuse")
    left = drop_missing(raw, names, "drop")
    assert left.columns == {"t": ["d", "e"], "l": ["0", "1"]}
    assert left.notes == (
        "3 of 5 rows of here lack a value and are left out (t is empty in rows 1 and 3; l is empty in row 2).",
    )
    with pytest.raises(Refused, match="row 5 of here: none of the 1 known labels"):
        refuse_unknown(left, "label", "l", column_identities(left, "label", "l").values, ["0"])
    many = table_of_columns({"t": [None] * 30 + ["x"]}, "here")
    with pytest.raises(Refused, match=r"rows 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 20 more"):
        drop_missing(many, {"text": ["t"]}, "refuse")
    with pytest.raises(Refused, match="none of its 2 rows has all values"):
        drop_missing(table_of_columns({"t": [None, ""]}, "here"), {"text": ["t"]}, "drop")


def test_columns_are_listed_unless_they_look_like_cells() -> None:
    named = table_of_columns({"title": ["x"], "class of 2024": ["y"]}, "here")
    with pytest.raises(Refused, match="the columns are title, class of 2024"):
        check_columns(named, {"text": ["text"]})
    for first in (("5", "fine"), ("it went well, thank you all", "pos"), ("alpha", "beta"), ("only",)):
        headless = table_of_columns({name: ["x", "beta"] for name in first}, "here")._replace(advice="")
        with pytest.raises(Refused, match="first row") as refused:
            check_columns(headless, {"text": ["text"]})
        assert not any(name in str(refused.value).replace("such as text,label", "") for name in first if name != "5")


def test_columns_of_no_file_have_names_of_their_own() -> None:
    for columns, said in (
        ({"0": [1], "chat": [2]}, "the columns are 0, chat"),
        ({"('a', 'b')": [1]}, "1 columns have names that"),
    ):
        with pytest.raises(Refused, match=said):
            check_columns(table_of_columns(columns, "the rows"), {"text": ["text"]})


def test_few_of_many_columns_are_listed() -> None:
    many = table_of_columns({f"word {k}": ["x"] for k in range(500)}, "here")
    for table in (many, many._replace(advice="")):
        with pytest.raises(Refused) as refused:
            check_columns(table, {"text": ["text"]})
        assert len(str(refused.value)) < 500


def test_labels_that_may_be_none_are_noted_without_their_names() -> None:
    def said(*values: str) -> str:
        return " ".join(class_notes(_labels(*values), "label", values))

    assert said("yes", "no", "and, or") == said("1", "2") == ""
    assert "21 numbers in the column 'label' of here" in said(*map(str, range(21)))
    assert "2 names have ';' between other names" in said("cough", "fever", "cough;fever", "fever; cough")
    assert "1 of 3 labels in the column 'label' of here have a single row (row 3)" in said("a", "b", "unit", *"ab" * 9)
    assert "cough" not in said("cough", "fever", "cough;fever")
