"""What trackers write for real, read back by the programs that show it: the figures of `metrics.jsonl`, each version once."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from fedloom import Limits, Refused, prepare
from fedloom.runs.trackers.tracker import open_trackers
from tests.support.folder_runs import stop_at
from tests.support.tiny_models import tiny_run

EXPECTED = {
    "test/accuracy": ("score", "accuracy"),
    "train/loss": ("version", "loss"),
    "traffic/bytes_up": ("version", "bytes_up"),
}


def logged(folder: Path) -> dict[str, dict[int, float]]:
    """By figure, its value at each version, as `metrics.jsonl` has it."""
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        figure: {line["version"]: line[field] for line in lines if line["kind"] == kind}
        for figure, (kind, field) in EXPECTED.items()
    }


def event_points(folder: Path) -> dict[str, dict[int, float]]:
    """The curves that TensorBoard shows of a folder of event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    points = {name: [(one.step, one.value) for one in events.Scalars(name)] for name in EXPECTED}
    assert all(len(dict(found)) == len(found) for found in points.values())
    assert "clients/worst_accuracy" in events.Tags()["scalars"]
    (settings,) = events.Tensors("settings/text_summary")[-1:]
    assert "aggregator" in str(settings.tensor_proto.string_val)
    return {name: dict(found) for name, found in points.items()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_run_that_is_interrupted_and_goes_on_is_one_curve(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database takes ten seconds to be made
    store, out = f"mlflow:{(tmp_path / 'store').as_uri()}", tmp_path / "run"
    run = tiny_run(encoder, limits=Limits(versions=4))
    observers: list[Any] = [stop_at(KeyboardInterrupt, 3), *open_trackers(["tensorboard", store])]
    with pytest.raises(KeyboardInterrupt):
        prepare(run).execute(out, observers, report=False, checkpoint_seconds=0)
    prepare(run, resume=out).execute(out, open_trackers(["tensorboard", store]), report=False)

    wanted = logged(out)
    assert set(wanted["train/loss"]) == {1, 2, 3, 4}
    assert event_points(out / "tensorboard") == {name: pytest.approx(points) for name, points in wanted.items()}

    (client,) = (one.client for one in open_trackers(store))  # type: ignore[attr-defined]
    (experiment,) = client.search_experiments(filter_string="name = 'fedloom'")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.status, found.info.run_name) == ("FINISHED", "run")
    assert found.data.params["schedule.cohort_size"] == str(run.schedule.cohort_size)
    history = defaultdict[str, dict[int, float]](dict)
    for name in EXPECTED:
        history[name] = {one.step: one.value for one in client.get_metric_history(found.info.run_id, name)}
    assert history == {name: pytest.approx(points) for name, points in wanted.items()}


@pytest.mark.slow
def test_a_tracking_server_that_does_not_answer_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(Refused, match="MLflow cannot write there"):
        open_trackers("mlflow:http://127.0.0.1:9")
