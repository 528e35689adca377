"""`fedloom predict`: a file or a text, as a table, CSV or JSON, and what cannot be read."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from fedloom import RunResult, open_result
from fedloom.cli import main
from fedloom.cli.predict import read_texts
from fedloom.core.errors import Refused
from tests.support.tiny_models import toy_rows

ROWS = toy_rows(30, seed=9)


class Said(NamedTuple):
    code: int | str | None
    out: str
    err: str


Predict = Callable[..., Said]


@pytest.fixture(scope="module")
def result(finished: Path) -> RunResult:
    return open_result(finished)


@pytest.fixture
def predict(
    result: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Predict:
    """The command in a folder with a table, on a model that is loaded once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fedloom.runs.run_result.open_result", lambda folder: result)
    Path("new.csv").write_text("".join(f"{line}\n" for line in ["id,text", *(f"7,{row['text']}" for row in ROWS)]))

    def call(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["fedloom", "predict", str(result.folder), *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main.main()
        return Said(stop.value.code, *capsys.readouterr())

    return call


def test_a_table_is_predicted_row_by_row_and_no_text_is_repeated(predict: Predict, result: RunResult) -> None:
    labels = result.predict([row["text"] for row in ROWS])
    said = predict("new.csv")
    assert (said.code, said.err) == (0, "")
    rows = list(csv.DictReader(io.StringIO(said.out)))
    assert [(int(row["row"]), row["label"]) for row in rows] == list(enumerate(labels, 1))
    assert not any(row["text"] in said.out for row in ROWS)
    said = predict("new.csv", "--out", "labels.csv")
    assert said.code == 0
    assert list(csv.DictReader(io.StringIO(Path("labels.csv").read_text(encoding="utf-8")))) == rows
    found = json.loads(predict("new.csv", "--json").out)["predictions"]
    assert [{**row, "row": str(row["row"]), "probability": f"{row['probability']}"} for row in found] == rows
    again = predict("new.csv", "--out", "labels.csv")
    assert again.code == 2
    assert "exists already" in again.err


def test_one_text_is_answered_with_its_likeliest_labels(predict: Predict, result: RunResult) -> None:
    text = ROWS[0]["text"]
    said = predict(text)
    assert said.code == 0
    shares = sorted(result.predict_proba(text).iloc[0].items(), key=lambda item: -item[1])
    assert [line.split()[0] for line in said.out.splitlines()] == [label for label, _ in shares]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("old.csv",), "there is no such file"),
        (("new.csv", "--column", "text=nix"), "no such column"),
        (("new.csv", "--column", "who=text"), "write text=NAME or pair=NAME"),
        (("new.csv", "--column", "pair=id"), "trained on single texts"),
    ],
)
def test_what_cannot_be_predicted_is_one_sentence(predict: Predict, arguments: tuple[str, ...], said: str) -> None:
    found = predict(*arguments)
    assert (found.code, found.out) == (2, "")
    assert said in found.err
    assert found.err.count("\n") == 1


def test_columns_are_those_of_the_run_then_those_that_are_named_then_the_usual_ones(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("title,body,text,pair\na,b,c,d\n")
    for source, columns, texts in (
        ({"text": "title+body"}, [], ["a. b"]),
        ({"text": ["title", "body"]}, ["text=body"], ["b"]),
        ({"text": "gone"}, [], ["c"]),
        ({"text": "title", "pair": "pair"}, [], [("a", "d")]),
        ({"instruction": "title", "context": "body"}, [], [("a", "b")]),
        ({"instruction": "title", "context": "gone"}, [], ["a"]),
        ({}, ["pair=body"], [("c", "b")]),
    ):
        assert read_texts(path, source, columns) == ([1], texts)
    with pytest.raises(Refused, match="trained on pairs"):
        read_texts(path, {"text": "title", "pair": "gone"}, [])
