"""The tables in the pages are those that the committed results give."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import grid
from fedloom.runs.run import Run
from tests.support.tiny_models import tiny_run

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_tables_in_the_pages_are_made_of_the_results() -> None:
    command = [sys.executable, str(ROOT / "experiments" / "tables.py"), "--check"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    pages = [*ROOT.glob("experiments/*.md"), *ROOT.glob("docs/results/*.md")]
    assert any("<!-- table" in page.read_text(encoding="utf-8") for page in pages)


def test_results_of_an_earlier_version_are_there() -> None:
    assert all((grid.RESULTS / name).is_file() for name in json.loads(grid.MADE_BY.read_text()))


@pytest.mark.slow
def test_results_that_do_not_reproduce_are_told_from_those_of_an_earlier_version(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cell(seed: int) -> Run:
        run: Run = tiny_run(encoder, seed=seed)
        return run

    toy = grid.Grid("toy", {"one": cell}, [1], 0.5, grid.start, len)  # type: ignore[arg-type]
    monkeypatch.setattr(grid, "RESULTS", tmp_path)
    monkeypatch.setattr(grid, "MADE_BY", tmp_path / "made_by.json")
    (tmp_path / "made_by.json").write_text("{}")
    line = grid.carry_out("one", 1, grid.start(cell(1)))
    (tmp_path / "toy.jsonl").write_text(json.dumps({**line, "run_hash": grid.hashed(cell(1))}) + "\n")
    same = grid.reproduce(toy, None, "cpu")
    assert same["reproduces"]
    assert "made_by" not in same
    other = {**line, "run_hash": grid.hashed(cell(1)), "losses": [loss + 1 for loss in line["losses"]]}
    (tmp_path / "toy.jsonl").write_text(json.dumps(other) + "\n")
    assert not grid.reproduce(toy, None, "cpu")["reproduces"], "nothing excuses it"
    assert "earlier version" not in capsys.readouterr().out
    (tmp_path / "made_by.json").write_text(json.dumps({"toy.jsonl": "abc1234"}))
    told = grid.reproduce(toy, None, "cpu")
    assert (told["reproduces"], told["made_by"]) == (False, "abc1234")
    assert "made by an earlier version, abc1234" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="was made by an earlier version"):
        grid.run_missing(grid.Grid("toy", {"one": cell}, [1, 2], 0.5, grid.start, len), 1, None, None, "cpu")  # type: ignore[arg-type]
