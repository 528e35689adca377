"""`fedloom run --dry-run`: what a run will cost, as a table and as JSON; nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedloom.cli.main import app
from fedloom.core.errors import Refused
from tests.support.tiny_models import tiny_encoder


def test_of_a_run_that_goes_on_nothing_is_said(tmp_path: Path) -> None:
    said = CliRunner().invoke(app, ["run", "mine.py", "--dry-run", "--resume", str(tmp_path)])
    assert isinstance(said.exception, Refused)
    assert "leave --resume and --more out" in str(said.exception)


@pytest.mark.slow
def test_it_answers_in_json_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_encoder(tmp_path / "model")
    Path("mine.py").write_text(
        f"from tests.support.tiny_models import tiny_run\nrun = tiny_run({str(model)!r})\n", encoding="utf-8"
    )
    before = sorted(tmp_path.rglob("*.*"))
    said = CliRunner().invoke(app, ["run", "mine.py", "--dry-run", "--json"])
    assert said.exit_code == 0, said.exception
    figures = json.loads(said.stdout)
    assert figures["exact"] is True
    assert figures["clients"] == sum(figures["ranks"].values()) == 6
    assert figures["real_seconds"] > 0
    assert sorted(tmp_path.rglob("*.*")) == before
