"""`fedloom init`: a file that runs as it is, or nothing at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.tables import ROWS, write_missing, write_sharegpt
from fedloom.core.errors import Refused
from fedloom.runs.run_file import load_run_file
from tests.support.command_line import Fedloom


@pytest.mark.slow
def test_an_ugly_table_becomes_a_run_that_is_carried_out(fedloom: Fedloom, encoder: Path) -> None:
    write_missing(ROWS, Path())
    code, said = fedloom("init", "gaps.csv", "--model", encoder)
    assert code == 0
    assert "6 examples; guessed: client from “ward”, text from “text”, label from “label”." in said
    assert "3 of 9 rows of gaps.csv lack a value and are left out" in said
    assert "Next fedloom run gaps.toml --dry-run" in said
    code, said = fedloom("run", "gaps.toml", "--set", "limits.versions=2", "--out", "done")
    assert code == 0, said
    assert "; CPU, " in said or "(cuda)" in said
    assert Path("done/report.html").is_file()


def test_what_is_there_already_or_cannot_be_used_is_refused_and_nothing_is_written(
    fedloom: Fedloom, encoder: Path
) -> None:
    write_sharegpt(ROWS, Path())
    Path("sharegpt.toml").write_text("mine")
    before = {*Path().iterdir()}
    for arguments, told in {
        ("sharegpt.json",): "it exists already",
        ("classify", "sharegpt.json"): "use `fedloom init instruct`",
        ("clasify", "sharegpt.json"): "did you mean classify?",
        ("instruct", "nothing.csv"): "there is no such file",
        ("sharegpt.json", "--out", "run.py"): "name it with .toml",
        ("sharegpt.json", "--read", "separater=;"): "say how to read it: one of separator",
        ("deploy", "sharegpt.json", "--out", "sharegpt.json"): "it exists already",
    }.items():
        code, said = fedloom("init", *arguments, "--model", encoder)
        assert (code, told in said) == (2, True), said
    assert {*Path().iterdir()} == before
    assert Path("sharegpt.toml").read_text() == "mine"


def test_a_deployment_is_a_run_file_and_the_settings_of_a_site(fedloom: Fedloom, encoder: Path) -> None:
    write_sharegpt(ROWS, Path())
    code, said = fedloom("init", "deploy", "sharegpt.json", "--model", encoder, "--out", "ours")
    assert (code, "fedloom up ours/run.toml --sites 2" in said) == (0, True)
    assert {path.name for path in Path("ours").iterdir()} == {"run.toml", "site.toml"}
    assert load_run_file(Path("ours/run.toml")).model == str(encoder)


def test_a_run_file_that_is_not_there_is_told_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="fedloom init DATA"):
        load_run_file(tmp_path / "mine.toml")
