"""The report of a run on real machines: seconds that passed, sites and no tiers, nothing of a simulated world."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedloom.report import tables
from fedloom.report.run_log import RunLog, read_run_log
from tests.support.report_pages import ALL, page_text, visible_words

Fake = Callable[..., Path]
UNSCORED = {"kind": "unscored", "client": "c01", "tier": "site", "rank": 4, "reason": "no answer within 900 s"}
RUN = {"schedule": {"type": "FedFa", "window": 4}, "partition": {"type": "IID", "clients": 4}, "faults": None,
       "world": {"type": "World", "jitter": 0.2}, "availability": None}  # fmt: skip


def deployed(folder: Path, **more: Any) -> RunLog:
    """The same run as if it had been carried out on real machines."""
    manifest = json.loads((folder / "manifest.json").read_text())
    known = {client: {**profile, "tier": "site", "memory": 8e9} for client, profile in manifest["clients"].items()}
    manifest["partition"] = {"clients": {}, "label_names": ["a", "b"]}
    manifest |= {"deployed": True, "clients": known, "run": RUN, "notes": [], **more}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [{**line, "tier": "site"} if line["kind"] == "client" else line for line in lines]
    lines = [line for line in lines if line["kind"] != "client" or line["client"] != "c01"] + [UNSCORED]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return read_run_log(folder)


def test_the_page_speaks_of_sites_and_of_seconds_that_passed(fake: Fake) -> None:
    simulated = visible_words(page_text(read_run_log(fake("run"))))
    log = deployed(fake("real"))
    told = visible_words(page_text(log, draw=("Accuracy", "Rank heterogeneity", "Activity", "Participation")))
    for word in (
        "virtual",
        "tier",
        "Tier",
        "phone",
        "laptop",
        "jitter",
        "partition.clients",
        "faults.",
        "Share by tier",
    ):
        assert word not in told.replace("(partition, world, availability, faults)", ""), word
    for word in ("virtual time", "slowest tier on top", "Slowest tier first"):
        assert word in simulated, word
    assert (
        f"on real machines ({told.split('on real machines (')[1].split(',')[0]}, {len(log.manifest['clients'])} sites"
        in told
    )
    assert "schedule.window" in told
    assert "Sites" in told
    for client in log.manifest["clients"]:
        assert client in told
    assert f"1 of {len(log.manifest['clients'])} clients gave no score (c01: no answer within 900 s)" in told
    assert f"; 1 of {len(log.manifest['clients'])} gave no score" in told


def test_a_deployment_that_was_ended_goes_on_with_serve(fake: Fake) -> None:
    told = visible_words(page_text(deployed(fake("real"), status="killed")))
    assert "fedloom serve FILE --folder FOLDER --resume" in told
    assert "fedloom run FILE" not in told


def test_where_nobody_gave_a_score_that_is_told(fake: Fake) -> None:
    folder = fake("real")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines if line["kind"] != "client")
    )
    told = visible_words(page_text(deployed(folder)))
    assert "1 of 1 client gave no score (c01: no answer within 900 s)" in told


@pytest.mark.parametrize("kinds", [(True, True), (True, False), (False, False)])
def test_a_comparison_names_its_time(fake: Fake, kinds: tuple[bool, bool]) -> None:
    folders = [fake(f"run{k}") for k in range(2)]
    logs = [deployed(folder) if real else read_run_log(folder) for folder, real in zip(folders, kinds, strict=True)]
    text = page_text(*logs, draw=ALL if kinds == (True, False) else ())
    assert ("virtual" in visible_words(text)) == (not any(kinds))


def test_of_very_many_sites_some_are_listed_and_the_page_says_so(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    log = deployed(fake("real"))
    every = tables.site_table(log).rows
    assert "Listed are" not in page_text(log)
    monkeypatch.setattr(tables, "MOST_SITES", 3)
    some = tables.site_table(log).rows
    assert len(some) == 3 < len(every)
    assert set(some) <= set(every), "a row says the same"
    assert f"Listed are 3 of {len(every)}, evenly by name." in page_text(log)
