"""The pages say what the committed results say, and a repeated run is compared with what was committed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tables
from claims import OPEN, Claim, judged

from bench import evidence
from experiments import grid
from fedloom.runs.run import Run
from tests.support.tiny_models import tiny_run

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_pages_say_what_the_results_say() -> None:
    command = [sys.executable, "-m", "bench.evidence"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True, cwd=ROOT)
    told = json.loads(ran.stdout.splitlines()[-1])
    assert told["tables_out_of_date"] == 0, ran.stdout
    assert told["decided"] <= told["claims"]


def test_every_archived_result_has_the_commit_that_made_it() -> None:
    commits = json.loads((grid.ARCHIVE / "made_by.json").read_text())
    assert {path.name for path in grid.ARCHIVE.glob("*.jsonl")} == set(commits)


@pytest.mark.slow
def test_every_paper_of_a_claim_has_its_table() -> None:
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    marks = [match[2] for match in tables.BLOCK.finditer(page)]
    assert len(marks) == len(set(marks))
    assert set(marks) >= {claim.paper for claim, _ in tables.judged_claims().values()}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Claim, dict[str, Any]]]:
    """Two claims of a paper, one of them decided, in the place of the committed ones."""
    sure = Claim("sure", "Paper", "it is faster", "a against b", tuple(map(math.log, (3.0, 3.1, 2.9))), "f", times=True)
    open_ = Claim("open", "Paper", "it ends higher", "a against b", (1.0, -1.0, 0.5), "f")
    found = {claim.name: (claim, line) for claim, line in zip((sure, open_), judged([sure, open_]), strict=True)}
    monkeypatch.setattr(tables, "judged_claims", lambda: found)
    return found


@pytest.mark.parametrize(("kind", "rows"), [("", 2), (", decided", 1), (", not decided", 1)])
def test_a_table_has_the_claims_that_it_is_to_have(told: object, kind: str, rows: int) -> None:
    text = tables.claims_table(f"Paper{kind}")
    assert text.count("\n") == rows + 1
    assert ("it is faster" in text) == (kind != ", not decided")
    assert ("| not decided |" in text) == (kind != ", decided")
    assert tables.claims_table(f"Another{kind}") == "None so far."


def test_a_sentence_has_a_claim_with_its_verdict_and_is_found_out_of_date(
    told: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "README.md"
    page.write_text("It is <!-- claim sure -->twice<!-- end --> as fast; see\n\n<!-- claims Paper -->\n<!-- end -->\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.out_of_date() == ["README.md"]
    assert "twice" in page.read_text(), "a check changes nothing"
    assert tables.out_of_date(write=True) == ["README.md"]
    assert tables.out_of_date() == []
    assert "It is <!-- claim sure -->3 times [" in page.read_text()
    assert "]: holds<!-- end --> as fast" in page.read_text()


def test_weak_evidence_is_counted(told: dict[str, tuple[Claim, dict[str, Any]]]) -> None:
    claim, _ = told["open"]
    lines = judged([claim, replace(claim, name="two", values=(1.0, 2.0)), replace(claim, name="none", values=())])
    counted = evidence.counts(lines)
    assert counted == {"claims": 3, "decided": 0, "claims_on_fewer_than_3_seeds": 2, "intervals_missing": 1}
    assert evidence.counts([{**lines[0], "verdict": "holds"}, {**lines[0], "verdict": OPEN}])["decided"] == 1


@pytest.mark.slow
def test_a_repeated_run_is_compared_with_what_was_committed(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cell(seed: int) -> Run:
        run: Run = tiny_run(encoder, seed=seed)
        return run

    def claims(found: Any) -> list[Claim]:
        return [Claim("one", "Paper", "says", "done", tuple(line["accuracy"] for line in found), "f")]

    toy = grid.Grid("toy", {"one": cell}, [1], 0.5, grid.start, len, claims=claims)  # type: ignore[arg-type]
    monkeypatch.setattr(grid, "RESULTS", tmp_path)
    line = {**grid.carry_out("one", 1, grid.start(cell(1))), "run_hash": grid.hashed(cell(1))}
    committed = tmp_path / "toy.jsonl"

    def repeated(**changed: Any) -> dict[str, Any]:
        committed.write_text(json.dumps({**line, **changed}) + "\n")
        return grid.reproduce(toy, None, "cpu")

    same = repeated()
    assert (same["reproduced"], same["largest_difference"]) == (True, 0.0)
    scores = [{**score, "loss": score["loss"] + 1e-6} for score in line["scores"]]
    assert not repeated(scores=scores)["reproduced"], "on the same kind of machine it is the same to the byte"
    assert repeated(scores=scores, machine="another")["reproduced"]
    losses = [loss + 1 for loss in line["losses"]]
    assert not repeated(losses=losses, machine="another")["reproduced"]
    assert not repeated(losses=[math.nan])["reproduced"]
    assert not repeated(run_hash="another")["reproduced"], "a result of other settings is none of this cell"
    assert grid.decided(toy, [line])["seeds"] == 1
    assert "another kind of machine" in capsys.readouterr().out


def test_a_cell_is_run_with_as_many_seeds_as_it_asks_for(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cell(seed: int) -> Run:
        run: Run = tiny_run(encoder, seed=seed)
        return run

    monkeypatch.setattr(grid, "RESULTS", tmp_path)
    cells = dict.fromkeys(("few", "many"), cell)
    toy = grid.Grid("toy", cells, (0, 1, 2), 0.5, grid.start, len, seeds_of={"few": 1, "many": 3}.__getitem__)  # type: ignore[arg-type]
    assert sorted(grid.missing(toy, ["few", "many"], None)) == [("few", 0), ("many", 0), ("many", 1), ("many", 2)]
    assert sorted(grid.missing(toy, ["few", "many"], 2)) == [("few", 0), ("many", 0), ("many", 1)]
    done = {"cell": "many", "seed": 1, "run_hash": grid.hashed(cell(1))}
    (tmp_path / "toy.jsonl").write_text(json.dumps(done) + "\n" + json.dumps({**done, "seed": 2}) + "\n")
    assert grid.missing(toy, ["many"], None) == [("many", 0), ("many", 2)], "one with another hash is not done"
