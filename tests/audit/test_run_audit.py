"""The audit of whole runs: who is attacked with what, what is said where too little was kept, and that no value of a row gets out."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedloom import FedIT, Limits, Private, Rounds, Rows, Table, uniform
from fedloom.audit.audit_page import write_audit
from fedloom.audit.findings import AuditReport, Finding, Unmeasured
from fedloom.audit.run_audit import audit_folder, audit_plan, recorded_run, small_run, with_coins
from fedloom.core.errors import Refused
from fedloom.core.schema import jsonable
from fedloom.data.partition import Shard
from fedloom.report.run_log import read_run_log
from fedloom.runs.prepare import prepare
from tests.support.fake_runs import write_run
from tests.support.tiny_models import tiny_encoder, tiny_run, toy_rows

WORD = "kingfisher"
"""A word that stands in the rows and nowhere else."""


def rows_table(folder: Path) -> Table:
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows({**row, "text": f"{row['text']} {WORD}"} for row in toy_rows(120))
    return Table(str(folder / "rows.csv"), text="text")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("audit")
    return tiny_run(tiny_encoder(folder / "model"), data=rows_table(folder), limits=Limits(versions=2))


def by_attack(report: AuditReport, kind: type) -> set[tuple[str, str]]:
    return {(one.adversary, one.attack) for one in report.outcomes if isinstance(one, kind)}


@pytest.mark.slow
def test_a_run_without_kept_answers_is_audited_by_its_published_model_and_says_so(run: Any, tmp_path: Path) -> None:
    prepare(run).execute(tmp_path / "run", report=False)
    assert recorded_run(read_run_log(tmp_path / "run")) == prepare(run).run
    report = audit_folder(tmp_path / "run")
    assert {("reader", "membership"), ("member", "membership")} == by_attack(report, Finding)
    assert ("server", "membership") in by_attack(report, Unmeasured)
    assert any("--keep-updates" in note for note in report.notes)
    page, data = write_audit(report, tmp_path / "audit.html")
    text, figures = page.read_text(encoding="utf-8"), json.loads(data.read_text(encoding="utf-8"))
    assert "No bound holds for stronger attacks" in text
    assert {one["verdict"] for one in figures["outcomes"]} >= {"not measured"}
    assert WORD not in text + data.read_text(encoding="utf-8")
    with pytest.raises(Refused, match="other settings"):
        audit_folder(tmp_path / "run", replace(run, seed=5))


@pytest.mark.slow
def test_answers_that_were_kept_are_attacked_one_by_one(run: Any, tmp_path: Path) -> None:
    prepare(run).execute(tmp_path / "run", report=False, keep_updates=True)
    found = by_attack(audit_folder(tmp_path / "run"), Finding)
    assert {("server", attack) for attack in ("labels", "membership", "shadow adapters", "words")} <= found
    assert ("member", "words") in found


@pytest.mark.slow
def test_a_planned_run_of_private_clients_is_made_small_and_its_noise_checked(run: Any) -> None:
    private = Private(0.5, 1.0, 3, budget=(20.0, 1e-4))
    report = audit_plan(replace(run, privacy=private, schedule=Rounds(4, weigh=uniform), aggregator=FedIT()))
    assert report.planned
    assert report.delta == 1e-4
    assert report.noise is not None
    assert report.noise.sound
    assert report.epsilon == report.noise.accounted
    assert any("Simulated noise: no privacy" in note for note in report.notes)
    assert ("server", "shadow adapters") in by_attack(report, Finding)


@pytest.mark.slow
def test_rows_of_a_planned_run_of_private_records_are_guessed(run: Any) -> None:
    pytest.importorskip("dp_accounting")
    report = audit_plan(replace(run, privacy=Private(1.0, 2.0, 2, unit="record"), held_out=0.0))
    assert report.unit == "record"
    assert report.guesses is not None
    assert 0 <= report.guesses.right <= report.guesses.guesses < report.guesses.rows
    assert report.epsilon is not None
    assert report.guesses.certified < report.epsilon
    assert report.noise is not None
    assert report.noise.sound


@pytest.mark.slow
def test_a_run_whose_rows_stand_in_its_file_is_refused_by_name(run: Any, tmp_path: Path) -> None:
    inline = replace(run, data=Rows(toy_rows(60)), limits=Limits(versions=1))
    prepare(inline).execute(tmp_path / "run", report=False)
    with pytest.raises(Refused, match="--file FILE"):
        audit_folder(tmp_path / "run")
    assert audit_folder(tmp_path / "run", inline).outcomes


def test_a_coin_decides_on_each_row_of_a_client() -> None:
    shard = Shard("a", tuple(range(100)), ())
    halves = with_coins(shard, 0)
    assert sorted(halves.train + halves.held_out) == list(range(100))
    assert 30 < len(halves.train) < 70
    assert with_coins(shard, 0) == halves != with_coins(shard, 1)
    assert with_coins(Shard("b", (7,), ()), 0).train == (7,)


def test_a_small_run_has_few_versions_and_all_rows_to_draw_from(tmp_path: Path) -> None:
    small = small_run(tiny_run(tmp_path, limits=Limits(versions=50), held_out=0.3))
    assert (small.limits.versions, small.held_out, small.test_limit) == (3, 0.0, 64)
    assert small_run(tiny_run(tmp_path, limits=Limits(versions=2), test_limit=8)).test_limit == 8


@pytest.mark.slow
def test_of_a_run_at_real_sites_only_the_noise_is_audited(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    manifest = json.loads((folder / "manifest.json").read_text())
    privacy = jsonable(Private(0.5, 1.0, 1))
    manifest |= {"deployed": True, "seed": 1, "run": {**manifest["run"], "privacy": privacy}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    report = audit_folder(folder)
    assert by_attack(report, Finding) == set()
    assert all("audit the run file" in one.reason for one in report.outcomes if isinstance(one, Unmeasured))
    assert report.noise is not None
    assert report.noise.sound
    assert report.unit == "client"
