"""Runs of a tiny model whose groups are only summed: what the folder holds and what it does not, replay, and beside other privacy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedloom import (
    FFA,
    IID,
    FedFa,
    Hierarchy,
    Limits,
    Plan,
    Private,
    RandomGroups,
    RankByCapability,
    Refused,
    Rounds,
    Secure,
    prepare,
    uniform,
)
from fedloom.core.codec import Summed
from fedloom.report.page import write_report
from fedloom.report.run_log import read_run_log
from fedloom.runs.manifest import protection
from fedloom.runs.replay import replay
from tests.support.tiny_models import tiny_run

PLAN = Plan(RankByCapability(ranks=(2, 4)), local_steps=20)


def summed_run(encoder: Path, **more: Any) -> Any:
    """FedFa over two groups of four members, who are summed."""
    given: dict[str, Any] = {"aggregator": FFA(), "partition": IID(8), "schedule": FedFa(2, 2)}
    given |= {"hierarchy": Hierarchy(RandomGroups(2), secure=Secure(least=3)), "limits": Limits(versions=2)}
    return tiny_run(encoder, **(given | more))


@pytest.fixture(scope="module")
def recorded(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, its sums kept; tests must not write into it."""
    out = tmp_path_factory.mktemp("summed") / "out"
    prepare(summed_run(encoder)).execute(out, keep_updates=True, report=False)
    return out


@pytest.mark.slow
def test_a_run_replays_from_its_sums_and_keeps_nothing_else(recorded: Path) -> None:
    replayed = replay(recorded)
    assert not replayed.difference
    events = [json.loads(line)["event"] for line in (recorded / "trace.jsonl").read_text().splitlines()]
    kinds = [event["type"] for event in events]
    assert "UpdateArrived" not in kinds
    assert kinds.count("PartsReady") == sum(len(e["blocks"][0]["tasks"]) for e in events if e["type"] == "SumOpened")
    kept = {path.stem for path in (recorded / "updates").iterdir()}
    assert kept == {"start", *(str(event["task"]) for event in events if event["type"] == "SumOpened")}


@pytest.mark.slow
def test_the_manifest_and_the_report_say_what_was_chosen(recorded: Path, tmp_path: Path) -> None:
    log = read_run_log(recorded)
    assert log.manifest["protection"] == "secrecy"
    assert any(
        note.startswith("Secure aggregation: answers are summed over at least") for note in log.manifest["notes"]
    )
    assert any("protect nobody here" in note for note in log.manifest["notes"])
    merged = [line for line in log.tasks if line["status"] == "merged"]
    assert len(merged) >= 8
    assert all(line["loss"] is None and line["tokens"] == 0 and line["bytes_up"] > 0 for line in merged)
    page = write_report([recorded], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Secure aggregation: answers are summed over at least" in page


@pytest.mark.slow
def test_noise_at_the_sites_goes_with_sums_and_noise_of_the_server_is_refused(encoder: Path, tmp_path: Path) -> None:
    noise = Private(clip=1.0, multiplier=0.5, most_answers=20, unit="record")
    out = tmp_path / "out"
    prepare(summed_run(encoder, privacy=noise, held_out=0.0)).execute(out, report=False)
    assert read_run_log(out).manifest["status"] == "finished"
    alike, clients = Rounds(cohort_size=2, weigh=uniform), replace(noise, unit="client")
    with pytest.raises(Refused, match=r"hierarchy\.secure"):
        prepare(summed_run(encoder, held_out=0.0, schedule=alike, privacy=clients))


@pytest.mark.slow
def test_numbers_too_coarse_for_a_step_of_the_optimiser_are_refused(encoder: Path) -> None:
    for secure in (Secure(least=3, bits=4), Secure(least=3, bound=1e4)):
        with pytest.raises(Refused, match=r"hierarchy\.secure\.bits"):
            prepare(summed_run(encoder, hierarchy=Hierarchy(RandomGroups(2), secure=secure), plan=PLAN))


def test_that_answers_are_summed_is_said_of_groups_and_not_by_a_codec(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="transfer"):
        tiny_run(tmp_path, transfer=Summed(16, 1.0, 5))


def test_either_secrecy_or_robustness_or_neither() -> None:
    from fedloom.aggregate.robust import Robust

    assert protection(FFA(), None) == protection(FFA(), Hierarchy()) == {}
    assert protection(FFA(), Hierarchy(secure=Secure())) == {"protection": "secrecy"}
    assert protection(Robust(FFA()), None) == {"protection": "robustness"}
