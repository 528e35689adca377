"""What a tracker gets of a run: figures of the whole run, and nothing else; and that a run does not depend on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fedloom import FedIT, Given, Hierarchy, Instructions, Refused, Robust, Run, Table, Tracker, Trust
from fedloom.core.schema import jsonable
from fedloom.runs.trackers.tracker import Tracking, open_trackers, settings_texts, split_observers, tracker_names


class Kept(Tracker):
    """Keeps what it gets; fails from a version on."""

    def __init__(self, fails_at: int = 10**6) -> None:
        self.fails_at = fails_at
        self.got: list[tuple[int, Mapping[str, float]]] = []
        self.ends: list[str] = []

    def begin(self, folder: Path, manifest: Mapping[str, Any], version: int) -> None:
        pass

    def write(self, version: int, figures: Mapping[str, float]) -> None:
        if version >= self.fails_at:
            raise ConnectionError("the line is down")
        self.got.append((version, figures))

    def end(self, status: str) -> None:
        self.ends.append(status)


LINES: list[dict[str, Any]] = [
    {"kind": "score", "version": 0, "time": 0.0, "accuracy": 0.5, "base_accuracy": 0.4, "examples": 10},
    {"kind": "task", "client": "ward-7", "version": 0, "loss": 1.0, "bytes_up": 7},
    {
        "kind": "version",
        "version": 1,
        "time": 5.0,
        "loss": 0.9,
        "bytes_up": 7,
        "uploads": 1,
        "ranks": {"2": 1},
        "energy": None,
    },
    {"kind": "score", "version": 1, "time": 5.0, "accuracy": 0.75, "base_accuracy": 0.4, "examples": 10},
    {"kind": "client", "client": "ward-7", "accuracy": 0.5},
    {"kind": "client", "client": "ward-8", "accuracy": 1.0},
    {"kind": "sample", "request": "who?", "after": "nobody"},
]


def follow(tracker: Tracker) -> None:
    tracking = Tracking([tracker])
    for line in LINES:
        tracking.take(line)
    tracking.end("finished")


def test_it_gets_the_figures_of_the_whole_run_and_no_client_and_no_text() -> None:
    kept = Kept()
    follow(kept)
    assert kept.got == [
        (0, {"test/accuracy": 0.5, "test/majority": 0.4, "test/examples": 10.0}),
        (1, {"train/loss": 0.9, "traffic/bytes_up": 7.0, "server/uploads": 1.0}),
        (1, {"test/accuracy": 0.75, "test/majority": 0.4, "test/examples": 10.0}),
        (1, {"clients/mean_accuracy": 0.75, "clients/worst_accuracy": 0.5}),
    ]
    assert kept.ends == ["finished"]
    assert not any(word in str(kept.got) for word in ("ward", "who", "nobody"))


def test_settings_name_no_label_no_client_and_no_query() -> None:
    runs = (
        Run(
            "m",
            Table("a.csv", labels={"ward-7": "who"}, client="column"),
            hierarchy=Hierarchy(Given((("ward-8",), ("ward-9",)))),
        ),
        Run(
            "m",
            Table("postgresql://u@h/d", query="select * from ward"),
            aggregator=Robust(FedIT(), rule=Trust("ward-7")),
        ),
        Run("m", Instructions("a.json", roles={"ward-7": "user"})),
    )
    for run in runs:
        texts = settings_texts({"run": json.loads(json.dumps(run, default=jsonable))})
        assert {"data.path", "aggregator", "schedule.cohort_size"} <= {*texts}
        assert not any(word in str(texts) for word in ("ward", "who"))


def test_one_that_fails_is_left_out_with_a_warning_and_the_others_go_on() -> None:
    broken, kept = Kept(fails_at=1), Kept()
    tracking = Tracking([broken, kept])
    tracking.take(LINES[0])
    with pytest.warns(RuntimeWarning, match="Kept gets no more figures of this run, which goes on: .* line is down"):
        tracking.take(LINES[2])
    tracking.end("failed")
    assert (broken.ends, kept.ends, len(kept.got)) == ([], ["failed"], 2)


def test_observers_and_trackers_are_told_apart() -> None:
    kept = Kept()
    watching, tracking = split_observers([print, kept])
    assert (watching, tracking.trackers) == ([print], [kept])


@pytest.mark.parametrize("name", ["tensorbord", "MLflow:x", "", "wandb"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(Refused, match="choose mlflow or tensorboard"):
        open_trackers(["tensorboard", name] if name == "wandb" else name)
    assert open_trackers(None) == open_trackers(()) == []
    assert tracker_names() == ["mlflow", "tensorboard"]
