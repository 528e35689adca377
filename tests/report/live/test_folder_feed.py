"""What a page gets of a folder: what is new since its last revision, whatever happens to the logs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.files import lock
from fedloom.report import facts
from fedloom.report.live import folder_feed
from fedloom.report.live.folder_feed import FolderFeed
from fedloom.report.live.live_state import MOST_POINTS, MOST_ROWS, Curve
from fedloom.report.run_log import read_run_log
from tests.support.fake_runs import write_run

Fake = Callable[..., Path]


@pytest.fixture(autouse=True)
def unsparing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every change is a revision at once."""
    monkeypatch.setattr(folder_feed, "SPARING", 0)


def settle(feed: FolderFeed) -> dict[str, Any]:
    """All that there is to read is read; the whole page."""
    while feed.refresh():
        pass
    found: dict[str, Any] = json.loads(feed.message(0))
    return found


def news(feed: FolderFeed, after: int) -> dict[str, Any]:
    settle(feed)
    found: dict[str, Any] = json.loads(feed.message(after))
    return found


def append(path: Path, *lines: Mapping[str, Any]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def joined(*names: str) -> list[dict[str, Any]]:
    return [{"time": 1.0, "event": {"type": "ClientJoined", "profile": {"client": n}}, "commands": []} for n in names]


def version(number: int, **more: Any) -> dict[str, Any]:
    return {"kind": "version", "version": number, "time": 9.0 * number, "bytes_up": 10**6 * number, "updates": 1} | more


@given(count=st.integers(1, 3000))
def test_a_curve_keeps_few_points_the_first_and_the_last_among_them(count: int) -> None:
    curve = Curve()
    for k in range(count):
        curve.add(float(k), 2.0 * k)
    line = curve.line("twice", str)
    assert line is not None
    points = line["points"]
    assert len(points) <= MOST_POINTS + 1
    assert points[0] == [0.0, 0.0]
    assert points[-1] == [count - 1.0, 2.0 * count - 2.0]
    steps = {b[0] - a[0] for a, b in pairwise(points[:-1])}
    assert len(steps) <= 1  # evenly spaced


def test_the_page_says_what_the_report_says(fake: Fake) -> None:
    folder = fake(rounds=12)
    parts, log = settle(FolderFeed(folder))["parts"], read_run_log(folder)
    assert parts["run"]["sentence"] == facts.result_sentence(log)
    assert parts["run"]["status"] == "finished"
    tiles = {name: value for name, value, _ in parts["figures"]["tiles"]}
    assert tiles["Tasks merged"] == f"{facts.merged_count(log.tasks):,}"
    score = next(chart for chart in parts["charts"]["charts"] if chart["title"] == "Test accuracy")
    assert [value for _, value in score["lines"][0]["points"]] == pytest.approx(
        list(map(facts.accuracy, log.scores)), rel=1e-6
    )
    assert [level["name"] for level in score["baselines"]] == [facts.majority_answer(log), "before training"]


def test_a_browser_gets_what_is_new_since_its_revision_and_no_more(fake: Fake) -> None:
    folder = fake(status="running")
    append(folder / "trace.jsonl", *joined("c00", "c01"))
    feed = FolderFeed(folder)
    first = settle(feed)
    assert first["full"]
    assert [event[3] for event in first["events"]] == ["c00 joined", "c01 joined"]
    seen = feed.revision
    assert news(feed, seen) == {"full": False, "parts": {}, "events": []}

    append(folder / "trace.jsonl", *joined("c02"))
    new = news(feed, seen)
    assert [event[3] for event in new["events"]] == ["c02 joined"]
    assert not new["full"]
    assert "charts" not in new["parts"]
    append(folder / "metrics.jsonl", version(99))
    new = news(feed, feed.revision - 1)
    assert new["parts"]["run"]["progress_text"].startswith("round 99")


def test_who_was_away_for_long_gets_the_last_events_and_every_part_that_changed(fake: Fake) -> None:
    feed = FolderFeed(folder := fake(status="running"))
    settle(feed)
    seen = feed.revision
    for k in range(5):
        append(folder / "trace.jsonl", *joined(*(f"c{k}{i:03d}" for i in range(100))))
        settle(feed)
    events = json.loads(feed.message(seen))["events"]
    assert [event[3] for event in events] == [f"c{k}{i:03d} joined" for k in (3, 4) for i in range(100)]
    assert [event[0] for event in events] == list(range(301, 501))


def test_a_run_that_goes_on_and_cuts_its_logs_is_shown_anew(fake: Fake) -> None:
    folder = fake(status="running")
    append(folder / "trace.jsonl", *joined(*(f"n{k}" for k in range(40))))
    feed = FolderFeed(folder)
    settle(feed)
    seen = feed.revision
    append(shorter := folder / "shorter", *joined("again"))
    shutil.move(shorter, folder / "trace.jsonl")
    new = news(feed, seen)
    assert new["full"]
    assert [event[3] for event in new["events"]] == ["again joined"]
    assert new["parts"]["run"]["name"] == "demo"
    assert not any(row[0] == "n1" for row in new["parts"]["clients"]["rows"])


def test_a_page_may_be_opened_before_the_run_begins(tmp_path: Path) -> None:
    feed = FolderFeed(tmp_path / "run")
    first = settle(feed)["parts"]
    assert first["run"]["status"] == "waiting"
    write_run(tmp_path / "run", status="running")
    after = settle(feed)["parts"]
    assert after["run"]["status"] == "killed"  # no process holds its lock
    assert after["figures"]["tiles"]


def test_the_end_of_the_process_is_noticed(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_feed, "LOCK_SECONDS", 0.0)
    folder = fake(status="running")
    with (folder / "trace.jsonl").open("w") as trace:
        assert lock(trace)
        feed = FolderFeed(folder)
        assert settle(feed)["parts"]["run"]["status"] == "running"
    assert settle(feed)["parts"]["run"]["status"] == "killed"


@pytest.mark.parametrize("given_folder", ["", "server", "server/run"])
def test_a_deployment_is_shown_whichever_of_its_folders_is_named(tmp_path: Path, given_folder: str) -> None:
    server = tmp_path / "server"
    server.mkdir()
    (server / "deployment.json").write_text("{}")
    feed = FolderFeed(tmp_path / given_folder)
    assert settle(feed)["parts"]["run"]["status"] == "waiting"
    status = {"waits": "for 1 more of 2 clients", "ended": "", "clients": {}, "calls_refused": {"c09": 3}}
    (server / "status.json").write_text(json.dumps(status))
    assert settle(feed)["parts"]["run"]["waits"] == "Waiting for 1 more of 2 clients."
    write_run(server / "run", status="running")
    status |= {"waits": "for answers of c00", "clients": {"c00": {"reached": True}, "c01": {"reached": False}}}
    (server / "status.json").write_text(json.dumps(status))
    parts = settle(feed)["parts"]
    rows = {row[0]: row[1] for row in parts["clients"]["rows"]}
    assert (rows["c00"], rows["c01"]) == ("idle", "offline")
    assert parts["refusals"]["rows"][0][1:] == ["c09", "3 calls refused", "by the gate"]


def test_what_others_wrote_cannot_break_the_page(fake: Fake) -> None:
    """Lines of other kinds, numbers that are none, and characters that turn the direction of text."""
    folder = fake(status="running")
    lines = (
        {},
        {"kind": "version"},
        {"kind": "task", "client": [], "status": {}},
        version(1, version="x"),
        {"kind": "score", "version": {}},
    )
    append(folder / "metrics.jsonl", *lines)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{torn\n[1, 2]\n{"kind":"score","version":1,"accuracy":NaN}\n')
    append(
        folder / "trace.jsonl",
        *joined("evil\u202e\x1b[2J"),
        {"time": "nan", "event": 5, "commands": None},
        *joined("c01"),
    )
    feed = FolderFeed(folder)
    text = json.dumps(settle(feed), ensure_ascii=False)
    assert feed.damaged >= 6
    assert "left out" in text
    assert "c01 joined" in text
    assert "\u202e" not in text
    assert "\x1b" not in text


def test_what_others_wrote_cannot_make_the_page_large(fake: Fake) -> None:
    folder, long = fake(status="running"), "x\u202e" * 2000
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest |= {"name": long, "status_reason": long, "notes": [long] * 400}
    manifest["run"]["aggregator"], manifest["model"]["name"] = {"type": long}, long
    (folder / "manifest.json").write_text(json.dumps(manifest))
    ends = (
        {"kind": "task", "client": long, "id": 1, "rank": 4, "version": 1, "status": f"{k}{long}"} for k in range(20)
    )
    append(folder / "metrics.jsonl", *ends)
    budget = {"rank": long, "steps": long, "depth": long, "why": long}
    task = {"id": long, "client": "c00", "version": 1, "budget": budget}
    sent = {"time": 1.0, "event": {"type": long}, "commands": [{"type": "Dispatch", "task": task}]}
    answered = {"time": 1.0, "event": {"type": "UpdateArrived", "client": "c00", "task": long}, "commands": []}
    append(folder / "trace.jsonl", *[sent, answered] * 5)
    page = settle(FolderFeed(folder))
    assert page["parts"]["plan"]["rows"]
    assert page["events"]
    assert len(json.dumps(page)) < 700_000
    assert "\u202e" not in json.dumps(page, ensure_ascii=False)


def test_a_page_is_as_large_with_many_clients_and_lines_as_with_some(fake: Fake) -> None:
    folder, sizes = fake(clients=1200, rounds=3, status="running"), []
    feed = FolderFeed(folder)
    for k in range(2):
        append(
            folder / "metrics.jsonl", *(version(1500 * k + i, staleness_max=i, staleness=i / 2) for i in range(1500))
        )
        append(folder / "trace.jsonl", *joined(*(f"new{k}{i}" for i in range(100))))
        page = settle(feed)
        sizes.append(len(json.dumps(page)))
        assert len(page["parts"]["clients"]["rows"]) == MOST_ROWS
        assert page["parts"]["clients"]["hidden"] == 1200 + 100 * (k + 1) - MOST_ROWS
    assert sizes[1] < 1.2 * sizes[0] < 150_000


def test_the_last_state_is_never_spared(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fake(status="running")
    feed = FolderFeed(folder)
    settle(feed)
    monkeypatch.setattr(folder_feed, "SPARING", 1e9)
    append(folder / "metrics.jsonl", version(50))
    settle(feed)
    append(folder / "metrics.jsonl", version(51))
    assert settle(feed)["parts"]["run"]["progress_text"].startswith("round 50")
    while feed.refresh(last=True):
        pass
    assert json.loads(feed.message(0))["parts"]["run"]["progress_text"].startswith("round 51")


@pytest.mark.parametrize(("deployed", "expected"), [(False, "28\xa0s"), (True, "63\xa0s")])
def test_the_time_left_is_that_of_the_versions_to_come(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, deployed: bool, expected: str
) -> None:
    """In a simulation by the clock on the wall (4 s a version here), in a deployment by its own time (9 s a version)."""
    folder, clock = fake(status="running", rounds=1), [100.0]
    monkeypatch.setattr(folder_feed.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(folder_feed, "LOCK_SECONDS", 1e9)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["run"]["limits"] = {"versions": 10, "seconds": None}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"deployed": deployed}))
    with (folder / "trace.jsonl").open("w") as trace:
        assert lock(trace)
        feed = FolderFeed(folder)
        settle(feed)
        for number in (2, 3):
            clock[0] += 4.0
            append(folder / "metrics.jsonl", version(number))
            settle(feed)
    assert settle(feed)["parts"]["run"]["left"] == expected
