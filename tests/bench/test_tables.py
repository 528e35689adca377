"""The bench of tables keeps its bar: ten ugly files, the same literal rows, and no cell in anything that is said."""

from __future__ import annotations

import doctest
import json
from pathlib import Path

import pytest

from bench import tables

PAGE = Path(tables.__file__).parents[1] / "docs" / "data.md"


@pytest.mark.slow
def test_ten_ugly_files_give_the_same_rows(capsys: pytest.CaptureFixture[str]) -> None:
    tables.main(["--quick"])
    *_, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == {"files": 10, "equal": 10, "values_printed": 0}


def test_the_bench_would_see_a_cell_that_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "CANARY", "label")  # a word that messages are full of
    assert list(tables.values_printed(tables.write_index_column, tmp_path))


def test_the_page_on_data_shows_what_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = doctest.testfile(str(PAGE), module_relative=False, encoding="utf-8")
    assert outcome.attempted > 4
    assert not outcome.failed
