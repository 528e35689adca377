"""How time was used, in figures and words, for runs of every sort: rounds, asynchronous, faulty, and of a single client."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench import report
from fedloom.aggregate.averaged import Averaged
from fedloom.aggregate.fedit import FedIT
from fedloom.core.events import ClientLost as Lost
from fedloom.core.events import Event
from fedloom.core.limits import Limits
from fedloom.core.policies import Aggregator, Schedule
from fedloom.core.schema import jsonable
from fedloom.core.types import ClientState, Result, Task
from fedloom.report import facts, figures_clients, tables, timeline
from fedloom.report.run_log import RunLog, read_run_log
from fedloom.runs.metrics import Metrics
from fedloom.runs.slot_usage import SlotUsage
from fedloom.schedule.fedbuff import FedBuff
from fedloom.schedule.fedfa import FedFa
from fedloom.schedule.immediate import Immediate
from fedloom.schedule.rounds import Rounds
from fedloom.simulate.devices import World
from fedloom.simulate.simulation import Simulation
from tests.support import toys
from tests.support.report_pages import ALL, page_text
from tests.support.report_pages import section_text as section


class Learns:
    """A trainer: a loss that falls; one answer in `refused` is spoilt."""

    def __init__(self, refused: int) -> None:
        self.refused = refused

    def train(self, work: Sequence[tuple[Task, ClientState]]) -> list[tuple[Result, ClientState]]:
        """What was sent, moved a little."""
        return [
            (
                toys.make_result(
                    toys.changed(task.start, task.id, 0.1),
                    examples=0 if task.id % self.refused == 0 else 10,
                    metrics={"loss": 1 / task.id},
                ),
                local,
            )
            for task, local in work
        ]


def run(
    folder: Path, schedule: Schedule, clients: int = 9, versions: int = 30, how: Aggregator | None = None, **faults: Any
) -> RunLog:
    """A folder as a simulated run of a toy leaves it; `lost` are (time, client), `refused` every how manieth answer."""
    folder.mkdir(parents=True)
    limits = Limits(versions=versions, evaluate_every=5)
    server = toys.server(schedule, how or FedIT(), limits=limits)
    profiles = {p.client: p for p in World().profiles({f"c{k}": 10 + k for k in range(clients)}, 0)}
    heap: list[tuple[float, int, Event]] = [(t, k - 99, Lost(c)) for k, (t, c) in enumerate(faults.get("lost", ()))]
    trainer = Learns(faults.get("refused", 10**6))
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        metrics = Metrics(file, SlotUsage(schedule.max_in_flight))
        scores = {"accuracy": 0.5, "f1": 0.5, "loss": 0.5, "examples": 99}
        Simulation(server, trainer, World(), profiles, lambda _: scores, metrics, heap=heap).run()
    about = {"status": "finished", "clients": {c: jsonable(p) for c, p in profiles.items()}}
    (folder / "manifest.json").write_text(json.dumps(about))
    return read_run_log(folder)


def test_rounds_wait_are_not_stale_and_are_called_rounds(tmp_path: Path) -> None:
    log = run(tmp_path / "rounds", Rounds(cohort_size=4))
    text = page_text(log, draw=("Accuracy",))
    assert facts.version_noun(log) == "round"
    assert "After 30 rounds" in text
    assert "by round" in section(text, "Accuracy")
    assert "by version" not in text
    assert 0 < timeline.waiting_share(log) < 1
    assert "100.0 % of it for clients who had answered" in section(text, "Waiting")
    assert "nothing was stale" in section(text, "Staleness")
    assert "<svg" not in section(text, "Staleness")
    assert all(
        "<svg" in section(text, title) for title in ("Activity", "Waiting", "Participation", "Uploads and bytes")
    )
    assert all(line["energy"] for line in log.versions)


@pytest.mark.parametrize("how", [FedIT(), pytest.param(Averaged(), marks=pytest.mark.slow)], ids=toys.called)
def test_an_asynchronous_run_waits_for_nothing_and_tells_energies_where_it_is_scored(
    tmp_path: Path, how: Aggregator
) -> None:
    log = run(tmp_path / "fedfa", FedFa(window=3, max_in_flight=4), how=how)
    text = page_text(log, draw=("Accuracy", "Waiting", "Staleness", "Participation", "Uploads and bytes"))
    assert "After 30 versions" in text
    assert timeline.waiting_share(log) == 0.0
    assert "No slot waited" in section(text, "Waiting")
    assert "versions old when it was merged" in section(text, "Staleness")
    assert "<svg" in section(text, "Staleness")
    assert "by upload" in section(text, "Accuracy")
    assert [line["version"] for line in log.versions if line["energy"]] == [5, 10, 15, 20, 25, 30]
    told = [task for task in log.tasks if task["kept"] is not None]
    assert {task["version"] for task in told} <= {0, 5, 10, 15, 20, 25}
    assert all(task["kept"] == pytest.approx(1, abs=1e-6) for task in told)
    assert len({task["id"] for task in log.tasks}) == len(log.tasks)


@pytest.mark.slow
def test_work_that_was_thrown_away_is_told_by_what_became_of_it(tmp_path: Path) -> None:
    schedule = Immediate(max_in_flight=6, max_staleness=6)
    log = run(tmp_path / "faulty", schedule, refused=5, lost=((0.05, "c1"), (0.1, "c4"), (0.1, "c5"), (0.2, "c6")))
    became = Counter(task["status"] for task in log.tasks)
    assert became["failed"] > 0 < became["cancelled"]
    assert all(task["arrived"] is not None for task in log.tasks)
    reasons = {task["reason"] for task in log.tasks if task["status"] == "cancelled"}
    assert all("versions old" in reason or reason == "the run ended before it was answered" for reason in reasons)
    activity = section(page_text(log, draw=("Activity",)), "Activity")
    assert "lost, failed or refused" in activity
    assert "cancelled" in activity
    assert timeline.waiting_share(log) == 0.0


@pytest.mark.slow
def test_one_client_has_all_of_it(tmp_path: Path) -> None:
    log = run(tmp_path / "one", FedFa(window=2, max_in_flight=5), clients=1, versions=6)
    (part,) = timeline.client_shares(log)
    assert (part.updates, part.examples, part.idle) == (1.0, 1.0, pytest.approx(0.0, abs=1e-9))
    assert timeline.waiting_share(log) == 0.0
    assert "1 client" in page_text(log, draw=ALL)


def test_shares_and_idle_times_are_those_of_the_tasks(tmp_path: Path) -> None:
    log = run(tmp_path / "shares", FedBuff(buffer_size=3, max_in_flight=4, waiting=True))
    merged = Counter(task["client"] for task in log.tasks if task["status"] == "merged")
    end = facts.elapsed_seconds(log)
    for part in timeline.client_shares(log):
        assert part.updates == pytest.approx(merged[part.client] / merged.total())
        busy = sum(task["arrived"] - task["sent"] for task in log.tasks if task["client"] == part.client)
        assert part.idle == pytest.approx(1 - busy / end)
        assert part.examples == pytest.approx((10 + int(part.client[1:])) / sum(range(10, 19)))
    for most in (3, 7, 1000):
        parts = timeline.intervals(log, most)
        assert len(parts) <= most + 1
        for name in ("working", "waiting", "held"):
            whole = sum((part.end - part.begin) * getattr(part, name) for part in parts)
            assert whole == pytest.approx(log.versions[-1][f"{name}_seconds"])
    counts = timeline.staleness_counts(log)
    assert counts.total() == merged.total()
    assert sum(k * n for k, n in counts.items()) == sum(task.get("staleness", 0) for task in log.tasks)


def test_the_bench_makes_lines_in_the_shape_of_a_run(tmp_path: Path) -> None:
    log = run(tmp_path / "real", FedBuff(buffer_size=3, max_in_flight=4), versions=5)
    made = list(report.lines({"c0": 4}, 60))
    for kind, real in (("task", log.tasks), ("version", log.versions)):
        shapes = {(line.get("status"), *sorted(line)) for line in made if line["kind"] == kind}
        assert {(line.get("status"), *sorted(line)) for line in real if line.get("status") != "cancelled"} <= shapes
    assert {frozenset(line) for line in made if line["kind"] == "score"} == {
        frozenset({*log.scores[0], "base_accuracy"})
    }


def test_rounds_beside_an_asynchronous_run_are_compared_by_uploads_waiting_and_tiers(tmp_path: Path) -> None:
    logs = [
        run(tmp_path / "a", Rounds(cohort_size=4), versions=8),
        run(tmp_path / "b", FedFa(window=3, max_in_flight=4)),
    ]
    text = page_text(*logs, draw=("Accuracy", "Waiting and staleness", "Participation"))
    assert "by upload" in section(text, "Accuracy")
    assert "<svg" in section(text, "Waiting and staleness")
    assert "<svg" in section(text, "Participation")
    head = tables.runs_table(logs).head
    assert {"Versions", "Uploads", "Waiting", "Staleness"} < set(head)
    assert "Seed" not in head
    row = dict(zip(head, tables.runs_table(logs).rows[1], strict=True))
    assert (row["Uploads"], row["Waiting"]) == ("30", "0.0\u00a0%")
    assert list(tables.summary_table(logs).head) == ["Run", "Versions", "Accuracy", "Time", "Uploads", "Waiting", "Up"]


@pytest.mark.slow
def test_many_clients_and_tasks_are_shown_in_part_and_the_page_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures_clients, "SHOWN_TASKS", 100)
    log = run(tmp_path / "many", FedFa(window=3, max_in_flight=30), clients=120, versions=900)
    text = page_text(log, draw=ALL)
    assert re.search(
        r"40 of 120 clients, evenly from slow to fast, the first \S+ % of the run", section(text, "Activity")
    )
    assert len(text) < 600_000


@pytest.mark.slow
def test_a_log_of_an_older_release_has_a_report_without_them(tmp_path: Path) -> None:
    log = run(tmp_path / "old", Rounds(cohort_size=4), versions=5)
    new = {"uploads", "outstanding", "staleness", "staleness_max", "working_seconds", "waiting_seconds", "held_seconds"}
    lines = [json.loads(line) for line in (log.folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in line.items() if key not in new} for line in lines]
    (log.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    text = page_text(read_run_log(log.folder), draw=ALL)
    assert "After 5 rounds" in text
    assert section(text, "Waiting") == section(text, "Staleness") == ""
    assert "Uploads" not in tables.runs_table([read_run_log(log.folder)]).head
