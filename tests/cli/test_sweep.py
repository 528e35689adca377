"""`fedloom sweep`: what it prints and leaves behind, and one sentence for every mistake."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedloom.cli import console, main

Sweep = Callable[..., tuple[int | str | None, str, str]]
FILE = """
from fedloom import Limits
from tests.support.tiny_models import tiny_run
run = tiny_run({model!r}, limits=Limits(versions=1))
"""


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], encoder: Path) -> Sweep:
    """The command in a folder with a run file, on a terminal of 80 columns."""
    monkeypatch.chdir(tmp_path)
    Path("run.py").write_text(FILE.format(model=str(encoder)))
    for one in (console.out, console.notes, console.err):
        monkeypatch.setattr(one, "width", 80)

    def call(*arguments: str) -> tuple[int | str | None, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedloom", "sweep", "run.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            main.main()
        return stop.value.code, *capsys.readouterr()

    return call


@pytest.mark.slow
def test_it_prints_what_each_value_changes_and_goes_on_in_its_folder(sweep: Sweep) -> None:
    grid = ("--grid", "aggregator=HLoRA,FedIT", "--out", "methods", "--no-report")
    code, said, _ = sweep(*grid, "--grid", "seed=0", "--to", "tensorboard")
    assert code == 0
    assert all(len(line) <= 80 for line in said.splitlines())
    assert "FedIT" in said
    assert "Report   methods/report.html" in said
    assert len(list(Path("methods").glob("*/tensorboard/events*"))) == 2
    code, said, _ = sweep(*grid, "--grid", "seed=range(2)", "--json")
    answer = json.loads(said)
    assert (code, len(answer["runs"])) == (0, 4)
    assert {(row["value"], row["instead_of"], row["pairs"]) for row in answer["paired"]} == {("FedIT", "HLoRA", 2)}
    assert len(list(Path("methods").glob("*/adapter"))) == 4
    assert not list(Path("methods").glob("*/report.html"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--grid", "seed"], "write field=value,value"),
        (["--grid", "agregator=HLoRA"], "did you mean aggregator"),
        (["--grid", "aggregator=HLora"], "did you mean HLoRA"),
        (["--grid", "seed=zero,one"], "seed"),
        (["--grid", "seed=0", "--to", "tensorbord"], "did you mean tensorboard"),
        (["--grid", "seed=0", "--jobs", "0"], "jobs"),
        ([], "--grid"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(arguments: list[str], words: str, sweep: Sweep) -> None:
    code, _, said = sweep(*arguments)
    assert code == 2
    assert words in said
    assert said.startswith("fedloom:")
    assert "Traceback" not in said
    assert [path.name for path in Path().iterdir()] == ["run.py"]
