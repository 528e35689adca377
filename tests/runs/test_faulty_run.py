"""A run of a real (tiny) model whose clients come and go and fail, from its value to its folder and report."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fedloom import (
    IID,
    Availability,
    AvailabilityFile,
    DeviceFile,
    Faults,
    FedScaleDevices,
    Limits,
    Refused,
    Rounds,
    prepare,
)
from fedloom.core.schema import jsonable
from fedloom.runs.manifest import settings_hash
from fedloom.runs.run_file import override
from tests.support.tiny_runs import tiny_run

OFF_AND_ON = {"active": [0], "inactive": [40], "finish_time": 60}


def unsteady(encoder: Path, folder: Path) -> Any:
    """Three clients on devices of a file, in windows of another, with every fault."""
    (folder / "devices.csv").write_text("flops,up_bps,down_bps\n1e7,1e5,1e5\n2e7,1e5,1e5\n4e7,1e5,1e5\n")
    (folder / "traces.json").write_text(json.dumps({str(k): OFF_AND_ON for k in range(3)}))
    return tiny_run(
        encoder,
        partition=IID(clients=3),
        schedule=Rounds(cohort_size=2, over_selection=1.5),
        limits=Limits(versions=5, evaluate_every=0),
        world=DeviceFile(str(folder / "devices.csv"), jitter=0.5),
        availability=AvailabilityFile(str(folder / "traces.json")),
        faults=Faults(dropout=0.3, fail=0.2, back_after=2.0, notice=1.0, late=1.0),
    )


def test_a_run_whose_clients_fail_ends_with_a_report_and_the_same_bytes_twice(encoder: Path, tmp_path: Path) -> None:
    run = unsteady(encoder, tmp_path)
    one, two = (prepare(run).execute(tmp_path / name, report=name == "one") for name in ("one", "two"))
    for name in ("trace.jsonl", "metrics.jsonl"):
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()
    assert json.loads((one.folder / "manifest.json").read_text())["status"] == "finished"
    lines = [json.loads(line) for line in (one.folder / "metrics.jsonl").read_text().splitlines()]
    ends = Counter(line["status"] for line in lines if line["kind"] == "task")
    assert ends["merged"] >= 5
    assert ends["failed"] + ends["lost"] >= 2
    assert [line["version"] for line in lines if line["kind"] == "version"] == list(range(1, 6))
    assert (one.folder / "report.html").stat().st_size > 10_000


def test_what_is_off_does_not_rename_a_run(encoder: Path) -> None:
    run = tiny_run(encoder)
    assert settings_hash(jsonable(override(run, ["availability=None", "faults=None"]))) == settings_hash(jsonable(run))
    others = [
        override(run, [one]) for one in ("availability=Availability()", "faults=Faults()", "faults=Faults(fail=0.5)")
    ]
    assert len({settings_hash(jsonable(one)) for one in (run, *others)}) == 4
    assert others[0].availability == Availability()
    assert override(others[1], ["faults.dropout=0.5"]).faults == Faults(dropout=0.5)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"world": DeviceFile("none.csv")}, "world.path"),
        ({"world": FedScaleDevices("none.json")}, "world.path"),
        ({"availability": AvailabilityFile("none.json")}, "availability.path"),
        ({"availability": DeviceFile("none.csv")}, "availability"),
        ({"faults": Availability()}, "faults"),
        ({"faults": Faults(fail=True)}, "faults.fail"),
    ],
)
def test_nothing_is_written_when_it_cannot_be(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], field: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused) as caught:
        prepare(tiny_run(encoder, **change))
    assert caught.value.field == field
    assert list(tmp_path.iterdir()) == []
