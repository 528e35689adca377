"""Delimited text: what is found is what was written, or the file is refused with the setting that answers it."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.errors import Refused
from fedloom.data.cells import check_columns
from fedloom.data.delimited import FileFormat, read_delimited
from tests.support.storms import tries

WORDS = st.text(st.sampled_from("ab 0,;|\t\"'\n\\é"), max_size=8)
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16")
SENTENCE = "Der Befund ist unauffällig, größere Veränderungen fehlen"
OTHER = "Übelkeit; seit gestern müde"


def _written(rows: list[list[str]], separator: str, **how: object) -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=separator, **how).writerows(rows)  # type: ignore[arg-type]
    return out.getvalue()


def _rows(content: bytes | str, name: str = "a.csv", **how: object) -> list[tuple[object, ...]]:
    raw = content.encode() if isinstance(content, str) else content
    table = read_delimited(raw, name, FileFormat(**how))  # type: ignore[arg-type]
    return [tuple(table.columns), *zip(*table.columns.values(), strict=True)]


@tries(400)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6), st.sampled_from(",;|"), st.sampled_from(ENCODINGS))
def test_what_csv_writes_is_read_back_or_refused(rows: list[tuple[str, str]], separator: str, encoding: str) -> None:
    table = [["text", "other one"], *map(list, rows)]
    content = _written(table, separator).encode(encoding)
    wanted = [tuple(row) for row in table if any(map(str.strip, row))]
    assert _rows_or_field(content) in (wanted, "data.separator")
    assert _rows(content, separator=separator) == wanted


def _rows_or_field(content: bytes) -> list[tuple[object, ...]] | str:
    try:
        return _rows(content)
    except Refused as error:
        return error.field


@tries(200)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6))
def test_what_is_said_to_be_enclosed_is_read_back_between_tabs_too(rows: list[tuple[str, str]]) -> None:
    table = [["text", "other"], *map(list, rows)]
    content = _written(table, "\t", quoting=csv.QUOTE_ALL)
    wanted = [tuple(row) for row in table if any(map(str.strip, row))]
    assert _rows(content, separator="\t", quoted=True) == wanted


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ('text,label\n"a; b; c",0\n', "a; b; c"),
        ("text,label\na; b; c,0\nd; e; f,1\n", "a; b; c"),
        ("text;label\na, b;0\nc;1\n", "a, b"),
        ("text|label\na, b; c|0\n", "a, b; c"),
        ("text\tlabel\na, b; c\t0\n", "a, b; c"),
        ("sep=;\ntext;label\na,b;0\n", "a,b"),
        ('"text","label"\n"a","0"\n', "a"),
        ('text, label\n"a, b", 0\n', "a, b"),
        ("text,label\r\na,0\nb,1\r\n", "a"),
        ("text,label\ra,0\rb,1\r", "a"),
        ("\n\ntext,label\n\na,0\n\n", "a"),
        ('text,label\n"a \\"b\\", c",0\n', 'a "b", c'),
        ('text,label\n"a ""b"", c",0\n', 'a "b", c'),
        ('text,label\nhe said "a",0\n6" nails,1\n', 'he said "a"'),
        ('text,label\n"a" he said,0\nb,1\n', '"a" he said'),
        ("text,label\n'tis,0\nit's,1\n", "'tis"),
        ('text\tlabel\n"a, he said\t0\nb"\t1\n', '"a, he said'),
        ('text\tlabel\n"a ""b"""\t0\nc\t1\n', 'a "b"'),
        ('text\tlabel\n"a\nb"\t0\nc\t1\n', "a\nb"),
        ("text,label\n# a,0\n", "# a"),
        ("text,label\na\\, b\\\\,0\nc,1\n", "a, b\\"),
        ('text,label\na \\"q\\"\\, b\\\nc,0\n', 'a "q", b\nc'),
        ("text,label\na\\,0\nb,1\n", "a\\"),
        ('text,label\n"a\\, b",0\nc,1\n', "a\\, b"),
        ("text\tlabel\na\\\tb\t0\nc\t1\n", "a\tb"),
        ("text,label\nnull,0\n", "null"),
    ],
)
def test_dialects_that_people_have(text: str, first: str) -> None:
    rows = _rows(text)
    assert rows[0] == ("text", "label")
    assert (rows[1][0], str(rows[1][1]).strip()) == (first, "0")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("text,label\na,0\nb\nc,1\n", "row 2 has 1 cell, the first line has 2"),
        ("text,label\na,0\nb,c,1\n", "row 2 has 3 cells, the first line has 2"),
        ('text,label\n"a, b",0\n"c,0\nd,1\n', "row 2 has a quotation mark that is not closed"),
        ("id,text;label\n1,a;0\n2,b;1\n", r"',' and ';' both read all rows"),
        ("text,text,label\na,b,0\n", "columns 1 and 2 have the same name"),
        ("text,label,label \na,0,1\n", "columns 2 and 3 have the same name"),
        (",,\n,,\n", "the first line has no names of columns"),
        ("text,label\na, b,0\nc,1\n", r"row 1 has 3 cells.*a cell with ',' in it belongs in quotation marks"),
        ("text;label;more\na;0;1\nTotal 2\n", "row 2 has 1 cell.*take it out if it is no row"),
        ('text,label\n"a, b,0\nc,1\n', "row 1 has a quotation mark that is not closed"),
        ("\ufeff", "the file is empty"),
    ],
)
def test_what_cannot_be_told_is_refused_with_the_row_and_without_its_cells(text: str, said: str) -> None:
    with pytest.raises(Refused, match=said):
        _rows(text)


def test_the_name_of_the_file_answers_for_tabs() -> None:
    text = "text\tlabel, coded\na, b\t0\nc, d\t1\n"
    assert _rows(text, name="a.tsv")[0] == ("text", "label, coded")
    with pytest.raises(Refused, match="',' and tab both read"):
        _rows(text, name="a.txt")


def test_a_given_separator_answers_an_unclear_one() -> None:
    text = "id,text;label\n1,a;0\n2,b;1\n"
    assert _rows(text, separator=";")[1] == ("1,a", "0")
    assert _rows(text, separator=",")[1] == ("1", "a;0")
    assert FileFormat(separator="tab") == FileFormat(separator="\t")
    for wrong in (", ", "", '"', "\n"):
        with pytest.raises(Refused, match=r"data\.separator = .*give one character"):
            FileFormat(separator=wrong)


def test_marks_can_be_said_to_be_text() -> None:
    assert _rows('text,label\n"a",0\n', quoted=False)[1] == ('"a"', "0")
    assert _rows('text\tlabel\n"a"\t0\n', name="a.tsv", quoted=False)[1] == ('"a"', "0")


def test_an_index_column_and_columns_of_nothing_are_not_read() -> None:
    assert _rows(",text,label\n0,a,x\n1,b,y\n")[0] == ("text", "label")
    assert _rows("Unnamed: 0,text,label\n0,a,x\n")[0] == ("text", "label")
    assert _rows("text,label,,\na,x,,\n")[0] == ("text", "label")
    table = read_delimited(b"text,,label\na,z,x\n", "a.csv")
    assert (list(table.columns), table.notes) == (
        ["text", "label"],
        ("a.csv: 1 column(s) without a name are not read.",),
    )


@tries(200)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6), st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_empty_cells_at_the_end_of_a_line_count_for_nothing(rows: list[tuple[str, str]], ends: list[int]) -> None:
    table = [["text", "other"], *map(list, rows)]
    lines = [
        f"{_written([row], ';').strip(chr(13) + chr(10))}{';' * end}"
        for row, end in zip(table, [*ends, 0], strict=False)
    ]
    assert _rows("\n".join(lines), separator=";", quoted=True) == _rows(
        _written(table, ";"), separator=";", quoted=True
    )


def test_an_index_without_a_name_is_not_read_if_it_numbers_the_rows() -> None:
    """As R's `write.table` does by default."""
    rows = [(f"text {i}", "ab"[i % 2]) for i in range(6)]
    numbered = "text\tlabel\n" + "".join(f"{i + 1}\t{text}\t{label}\n" for i, (text, label) in enumerate(rows))
    assert _rows(numbered)[1:] == rows
    spaced = _written([["text", "label"], *[[str(i), *row] for i, row in enumerate(rows)]], " ", quoting=csv.QUOTE_ALL)
    assert _rows(spaced, separator=" ")[1:] == rows
    for text in (
        numbered.replace("\n6\t", "\n5\t"),
        numbered.replace("\n6\t", "\nsix\t"),
        "text,label\n1,a,b\n2,c,d\n",
    ):
        with pytest.raises(Refused, match="row 1 has 3 cells, the first line has 2"):
            _rows(text)


def test_a_single_column_is_told_how_separators_are_given() -> None:
    table = read_delimited(b"text^label\na^0\n", "a.csv")
    with pytest.raises(Refused, match=r"--set data\.separator=SIGN"):
        check_columns(table, {"text": ["text"]})
    assert _rows("text^label\na^0\n", separator="^")[1] == ("a", "0")


def test_names_of_columns_have_no_blanks_that_nobody_sees() -> None:
    assert _rows("\u200btext ;\u00a0label\ufeff\na;0\n")[0] == ("text", "label")
    assert _rows('"sep=;"\ntext;label\na,b;0\n')[0] == ("text", "label")


def test_a_cell_may_be_long() -> None:
    long = "word " * 800_000
    assert _rows(f"text,label\n{long},0\n")[1] == (long, "0")


@pytest.mark.parametrize(
    ("encoding", "found"),
    [
        ("utf-8", None),
        ("utf-8-sig", None),
        ("cp1252", "cp1252"),
        ("latin-1", "cp1252"),  # the same text
        ("utf-16", "utf-16-le"),
        ("utf-16-le", "utf-16-le"),
        ("utf-16-be", "utf-16-be"),
    ],
)
def test_the_encoding_is_found_and_noted(encoding: str, found: str | None) -> None:
    content = f"text,label\n{SENTENCE.replace(',', '')},0\n{OTHER},1\n".encode(encoding)
    table = read_delimited(content, "befunde.csv")
    assert table.columns["text"] == [SENTENCE.replace(",", ""), OTHER]
    assert table.notes == (() if found is None else (f"befunde.csv: encoding {found}.",))


def test_found_facts_stand_in_one_note_and_given_ones_in_none() -> None:
    content = f"text;label\n{SENTENCE};0\n".encode("cp1252")
    assert read_delimited(content, "befunde.csv").notes == ("befunde.csv: separator ';', encoding cp1252.",)
    assert read_delimited(content, "befunde.csv", FileFormat(separator=";", encoding="cp1252")).notes == ()
    assert read_delimited(b"text\tlabel\nx\t0\n", "a.tsv").notes == ()
    assert read_delimited(b"text\tlabel\nx\t0\n", "a.txt").notes == ("a.txt: separator tab.",)


def test_files_that_were_put_one_after_the_other_are_one() -> None:
    table = read_delimited(b"text,label\na,0\ntext,label\nb,1\n", "a.csv")
    assert (table.columns["text"], table.rows([1])) == (["a", "b"], "row 3")
    assert table.notes == ("a.csv: rows that repeat the names of the columns are left out (row 2).",)
    assert read_delimited(b"text\na\ntext\n", "a.csv").columns == {"text": ["a", "text"]}
