"""A run with a canary: its rows, its folder, its replay, its end; and one that is killed in the middle."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fedloom import Canary, FixedRank, Limits, Plan, Rounds, prepare
from fedloom.core import canary
from fedloom.core.errors import Refused
from fedloom.report.run_log import read_run_log
from fedloom.runs.manifest import settings_hash
from fedloom.runs.prepare import draw_canaries, draw_test_examples
from fedloom.runs.replay import replay
from fedloom.runs.run import Run
from tests.support.same_bytes import COMPARED
from tests.support.tiny_models import tiny_run

SETTINGS: dict[str, Any] = {
    "schedule": Rounds(cohort_size=6),
    "plan": Plan(FixedRank(2), 2),
    "limits": Limits(versions=2),
}


def test_canary_rows_are_no_test_rows() -> None:
    run: Run = tiny_run(Path("model"), canary=Canary(20), test_limit=30)
    canaries = draw_canaries(run, 60)
    tested = draw_test_examples(60, 30, run.seed, canaries)
    assert len(canaries) == len(set(canaries)) == 20
    assert len(tested) == 30
    assert not {*canaries} & {*tested}
    assert {*draw_test_examples(60, None, run.seed, canaries)} | {*canaries} == {*range(60)}
    with pytest.raises(Refused, match=r"canary.examples = 20: there are 20 test examples"):
        draw_canaries(run, 20)


def test_a_run_without_one_is_called_as_before() -> None:
    settings = {"model": "m", "seed": 3}
    assert settings_hash(settings) == settings_hash(settings | {"canary": None})


@pytest.mark.slow
def test_one_that_never_fails_leaves_the_same_adapter_and_one_that_goes_on_the_same_bytes(
    encoder: Path, tmp_path: Path
) -> None:
    """The model of a run without one, whatever is scored beside it; replayed, and killed after its first version."""
    plain = prepare(tiny_run(encoder, **SETTINGS)).execute(tmp_path / "plain", report=False)
    run: Run = tiny_run(encoder, canary=Canary(20, margin=1.0), **SETTINGS)
    whole = prepare(run).execute(tmp_path / "whole", report=False, keep_updates=True)
    name = "adapter/adapter_model.safetensors"
    assert (plain.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert not replay(whole.folder).difference
    lines = [json.loads(line) for line in (whole.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["version"] for line in lines if line["kind"] == "canary" and not line["without"]] == [0, 1, 2]
    assert "20 of the 48 test examples are canaries" in " ".join(
        json.loads((whole.folder / "manifest.json").read_text())["notes"]
    )

    class Killed(Exception):
        pass

    def kill(now: float, event: object, commands: list[Any]) -> None:
        if any(type(command).__name__ == "CheckCanary" and command.version == 2 for command in commands):
            raise Killed

    with pytest.raises(Killed):
        prepare(run).execute(tmp_path / "killed", [kill], report=False, checkpoint_seconds=0.0)
    prepare(run, resume=tmp_path / "killed").execute(report=False)
    for name in COMPARED:
        assert (tmp_path / "killed" / name).read_bytes() == (whole.folder / name).read_bytes(), name


@pytest.mark.slow
def test_answers_that_are_set_aside_are_told_in_folder_and_report(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A canary that takes chance for harm: hardly a version passes, and the run ends with the reason."""
    monkeypatch.setattr(canary, "STANDARD_ERRORS", 0.0)
    run: Run = tiny_run(
        encoder, canary=Canary(30, margin=0.0), **(SETTINGS | {"limits": Limits(versions=9, failures=6)})
    )
    with suppress(Refused):  # or it makes its versions after all
        prepare(run).execute(tmp_path / "out", report=True)
    log = read_run_log(tmp_path / "out")
    assert log.set_aside
    told = {line["id"]: line for line in log.tasks}
    assert all(told[line["id"]]["reason"] == line["reason"] for line in log.set_aside)
    assert all(told[line["id"]]["status"] == "unused" for line in log.set_aside)
    assert "the canary score of a version with it is" in (tmp_path / "out" / "report.html").read_text()
