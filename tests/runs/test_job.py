"""A run from its value to its folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom import (
    ACE,
    CA2FL,
    IID,
    ByClient,
    Clip,
    FedEx,
    FedPLoRA,
    FedSA,
    FixedRank,
    FLoRA,
    FoldedDelta,
    HetLoRA,
    HLoRA,
    Job,
    Limits,
    LoRAA2,
    Plan,
    RaFLoRA,
    Refused,
    Rounds,
    Rows,
    Scaffold,
    Training,
    prepare,
)
from fedloom.core.events import Command, Event
from fedloom.core.fingerprint import fingerprint
from fedloom.core.policies import Aggregator
from fedloom.core.schema import jsonable
from fedloom.data.examples import Split
from fedloom.data.partition import Shard
from fedloom.report.page import write_report
from fedloom.report.run_log import read_run_log
from fedloom.runs.manifest import settings_hash
from fedloom.schedule.fedfa import FedFa
from fedloom.train.export import open_run
from tests.support.folder_runs import stop_at
from tests.support.same_bytes import COMPARED, start_twins
from tests.support.storms import one_in
from tests.support.tiny_runs import tiny_run, toy_rows

FILES = {"manifest.json", "metrics.jsonl", "trace.jsonl", "report.html", "adapter"}


def manifest(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    return found


def test_a_finished_run_has_everything_in_its_folder(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == FILES
    log = read_run_log(finished)
    assert [line["version"] for line in log.versions] == [1, 2, 3]
    assert [line["version"] for line in log.scores] == [0, 1, 2, 3]
    assert len(log.clients) == 6
    assert len(log.tasks) == 3 * 4
    assert {line["status"] for line in log.tasks} == {"merged"}
    assert len({line["rank"] for line in log.tasks}) > 1
    assert all(0 < line["rounding"] <= line["rounding_change"] * 1.001 < 1e-3 for line in log.versions), "float16"
    assert "Numbers travel as float16" in (finished / "report.html").read_text(encoding="utf-8")


def test_the_manifest_says_what_the_run_was(finished: Path, encoder: Path) -> None:
    about = manifest(finished)
    assert (about["name"], about["seed"], about["status"], about["status_reason"]) == (
        "finished",
        5,
        "finished",
        "3 versions made",
    )
    settings = jsonable(
        tiny_run(encoder, name="finished", seed=5, training=Training(learning_rate=1e-2, max_length=14))
    )
    assert about["run"] == json.loads(json.dumps(settings))
    assert about["run_hash"] == settings_hash(settings)
    assert about["partition"]["label_names"] == ["colour", "pet"]
    assert about["model"]["dense_parameters"] == 66
    assert about["model"]["lora_parameters_by_rank"]["8"] == 8 * 4 * 64
    assert about["baselines"]["majority"] == pytest.approx(0.5)
    assert about["versions"].keys() >= {"torch", "transformers", "peft"}
    assert about["clients"].keys() == about["partition"]["clients"].keys()


def test_the_majority_stands_beside_every_score_and_labels_are_counted_at_the_end(finished: Path) -> None:
    about, log = manifest(finished), read_run_log(finished)
    assert about["metrics"] == {"f1": "F1 of 'pet'", "majority_label": "colour", "majority_of": "training examples"}
    assert {line["base_accuracy"] for line in log.scores} == {about["baselines"]["majority"]}
    assert [line["version"] for line in log.labels] == [0, 3]
    for line, score in zip(log.labels, (log.scores[0], log.scores[-1]), strict=True):
        assert {name: line[name] for name in ("accuracy", "f1", "examples")} == {
            name: score[name] for name in ("accuracy", "f1", "examples")
        }
        assert sum(map(sum, line["confusion"])) == score["examples"]
        assert 0 <= line["roc_auc"] <= 1
    events = [json.loads(line)["event"] for line in (finished / "trace.jsonl").read_text().splitlines()]
    traced = [event["metrics"].keys() for event in events if event["type"] == "ScoresReady"]
    assert traced == [{"accuracy", "f1", "loss", "examples"}] * 4, "a trace has what the server is given and no more"


def test_the_baseline_is_the_commonest_training_label_on_the_examples_that_are_scored(encoder: Path) -> None:
    job = prepare(tiny_run(encoder, test_limit=9))
    train, test = job.split.train, job.split.test
    tested = [test.labels[i] for i in job.tested]
    rare = min((0, 1), key=tested.count)  # of nine examples, so the other is the commonest there
    mostly = [i for i, label in enumerate(train.labels) if label == rare]
    job = replace(job, split=Split(train.take([*mostly, train.labels.index(1 - rare)]), test), shards=())
    assert job.baselines() == {"majority": tested.count(rare) / 9}
    assert job.describe()["metrics"]["majority_label"] == ("colour", "pet")[rare]  # type: ignore[index]
    elsewhere = replace(job, split=Split(train.take(()), test))
    assert elsewhere.baselines() == {"majority": tested.count(1 - rare) / 9}, "at a server without training examples"
    assert elsewhere.describe()["metrics"]["majority_of"] == "test examples"  # type: ignore[index]
    (note,) = replace(job, tested=tuple(i for i in job.tested if test.labels[i])).describe()["notes"]  # type: ignore[misc]
    assert note == "No test example has the label 'colour': its recall is not measured."


@pytest.mark.slow
def test_clients_that_hold_nothing_out_train_and_are_told_as_unscored(encoder: Path, tmp_path: Path) -> None:
    job = prepare(tiny_run(encoder, partition=IID(5)))
    few = tuple(Shard(s.client, s.train + s.held_out, ()) if k < 2 else s for k, s in enumerate(job.shards))
    log = read_run_log(replace(job, shards=few).execute(tmp_path / "few").folder)
    assert [line["client"] for line in log.unscored] == [shard.client for shard in few[:2]]
    assert [line["client"] for line in log.clients] == [shard.client for shard in few[2:]]
    assert {line["client"] for line in log.tasks} & {shard.client for shard in few[:2]}
    text = (tmp_path / "few" / "report.html").read_text(encoding="utf-8")
    assert "2 of 5 clients gave no score" in text
    nobody = tuple(Shard(s.client, s.train + s.held_out, ()) for s in job.shards)
    log = read_run_log(
        replace(prepare(tiny_run(encoder, partition=IID(5))), shards=nobody).execute(tmp_path / "no").folder
    )
    assert (len(log.unscored), log.clients) == (5, ())


def test_the_same_seed_writes_the_same_bytes(finished: Path, encoder: Path, tmp_path: Path) -> None:
    torch.rand(3)  # what others drew must not matter
    prepare(tiny_run(encoder, name="finished", seed=5)).execute(tmp_path / "again")
    for name in (*COMPARED, "manifest.json"):
        assert (finished / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_another_seed_divides_and_initialises_otherwise(encoder: Path) -> None:
    one, other = (prepare(tiny_run(encoder, seed=seed)) for seed in (5, 6))
    assert one.shards != other.shards
    assert fingerprint(one.server.state.model.adapter) != fingerprint(other.server.state.model.adapter)


@pytest.mark.slow
def test_the_same_bytes_come_from_processes_that_hash_differently(tmp_path: Path) -> None:
    assert start_twins(tmp_path).same_bytes()


def test_a_run_never_writes_over_another(finished: Path, encoder: Path) -> None:
    before = (finished / "manifest.json").read_bytes()
    with pytest.raises(Refused, match="exists already"):
        prepare(tiny_run(encoder)).execute(finished)
    assert (finished / "manifest.json").read_bytes() == before


def test_ctrl_c_leaves_a_folder_that_says_so_and_can_be_read(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare(tiny_run(encoder)).execute(tmp_path / "out", [stop_at(KeyboardInterrupt, 1)])
    assert manifest(tmp_path / "out")["status"] == "interrupted"
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert len(read_run_log(tmp_path / "out").versions) == 1
    assert "interrupted" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_failure_leaves_a_folder_that_says_why(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="enough"):
        prepare(tiny_run(encoder)).execute(tmp_path / "out", [stop_at(RuntimeError, 1)])
    about = manifest(tmp_path / "out")
    assert (about["status"], about["status_reason"]) == ("failed", "RuntimeError: enough")
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_run_cut_short_before_its_first_version_has_a_report_and_no_adapter(encoder: Path, tmp_path: Path) -> None:
    def observe(now: float, event: Event, commands: list[Command]) -> None:
        if now > 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(tiny_run(encoder)).execute(tmp_path / "out", [observe])
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES - {"adapter"}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model": "/nowhere/at/all"}, "model"),
        ({"plan": Plan(FixedRank(33))}, "plan.rank"),
        ({"data": Rows(toy_rows(20), text="txet")}, "data.text"),
        ({"partition": ByClient()}, "partition"),
        ({"held_out": 1.0}, "held_out"),
        ({"plan": Plan(FixedRank(10**9))}, "plan.rank"),
        ({"plan": Plan(FixedRank(2), 1.5)}, "plan.local_steps"),  # type: ignore[arg-type]
        ({"aggregator": RaFLoRA(rank=5000)}, "aggregator.rank"),
        ({"aggregator": Clip(HLoRA(rank=5000))}, "aggregator.rank"),
        ({"aggregator": Scaffold(clients=99)}, "aggregator.clients"),
        ({"aggregator": CA2FL(clients=99)}, "aggregator.clients"),
        ({"aggregator": ACE(clients=6), "schedule": FedFa()}, "schedule"),
        ({"schedule": Rounds(cohort_size=2.5)}, "schedule.cohort_size"),  # type: ignore[arg-type]
        ({"training": Training(learning_rate=float("inf"))}, "training.learning_rate"),
        (
            {
                "data": Rows([{"text": "red cat " * 200, "label": str(i % 2)} for i in range(60)]),
                "training": Training(max_length=128),
            },
            "training.max_length",
        ),
        ({"data": Rows(iter(toy_rows(60)))}, "data.rows"),
        ({"device": "gpu"}, "device"),
    ],
)
def test_nothing_is_written_when_preparing_fails(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], field: str
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"model": encoder} | change
    with pytest.raises(Refused) as caught:
        prepare(tiny_run(**given))
    assert caught.value.field == field
    assert list(tmp_path.iterdir()) == []


def expected_scores(job: Job) -> dict[str, float]:
    """Each client's accuracy, one example after the other, with the adapter it would be handed."""
    fleet, found = job.server.fleet(), {}
    for shard in job.shards:
        budget = job.run.plan(job.profiles[shard.client], fleet)
        start = job.run.aggregator.start(job.server.state.model, budget, 0)
        job.base.put(start.train)
        hits = 0
        for index in shard.held_out:
            inputs = job.train_texts.batch([index], job.base.device)
            label = int(inputs.pop("labels"))
            with torch.no_grad():
                hits += int(job.base.model.eval()(**inputs).logits.argmax()) == label
        found[shard.client] = hits / len(shard.held_out)
    return found


def test_a_client_is_scored_on_its_own_held_out_part_at_its_own_rank(encoder: Path, tmp_path: Path) -> None:
    job = prepare(tiny_run(encoder, partition=IID(5), held_out=0.3, limits=Limits(versions=2)))
    outcome = job.execute(tmp_path / "out")
    lines = read_run_log(outcome.folder).clients
    assert [score["accuracy"] for score in outcome.scores] == [
        line["accuracy"] for line in read_run_log(outcome.folder).scores
    ]
    assert {line["client"]: line["accuracy"] for line in lines} == pytest.approx(expected_scores(job))
    for shard, line in zip(job.shards, lines, strict=True):
        held = [job.split.train.labels[i] for i in shard.held_out]
        own = [job.split.train.labels[i] for i in shard.train]
        commonest = max(sorted(set(own)), key=own.count)
        assert (line["client"], line["held_out"]) == (shard.client, len(held))
        assert line["base_accuracy"] == held.count(commonest) / len(held)


def test_no_client_trains_on_what_it_is_scored_on(encoder: Path) -> None:
    job = prepare(tiny_run(encoder))
    for shard in job.shards:
        assert not set(shard.train) & set(shard.held_out)


def test_the_test_limit_is_kept_and_drawn_from_the_seed(encoder: Path) -> None:
    one, two, other = (prepare(tiny_run(encoder, test_limit=7, seed=seed)) for seed in (1, 1, 2))
    assert len(one.tested) == 7
    assert one.tested == two.tested != other.tested
    assert one.score(one.server.state.model).counts()[0] == 7


def test_the_manifest_holds_no_text_of_the_clients(encoder: Path) -> None:
    rows = [{"text": f"secret {i}", "label": str(i % 2)} for i in range(60)]
    settings = json.dumps(jsonable(tiny_run(encoder, data=Rows(rows))))
    assert "secret" not in settings
    assert jsonable(Rows(rows)) != jsonable(Rows(rows[1:]))


def test_the_hash_of_a_run_does_not_depend_on_where_files_lie() -> None:
    assert settings_hash({"model": "/home/a/models/tiny"}) == settings_hash({"model": "/srv/models/tiny"})
    assert settings_hash({"model": "/home/a/models/tiny"}) != settings_hash({"model": "/home/a/models/large"})


def test_a_reader_is_told_where_the_test_accuracy_says_nothing(encoder: Path) -> None:
    assert prepare(tiny_run(encoder)).describe()["notes"] == []
    (note,) = prepare(tiny_run(encoder, aggregator=FedSA())).describe()["notes"]  # type: ignore[misc]
    assert "a personal model" in note
    (note,) = prepare(tiny_run(encoder, aggregator=LoRAA2(freeze_head=True))).describe()["notes"]  # type: ignore[misc]
    assert "head is frozen" in note


@pytest.mark.parametrize(
    "method", one_in(7, [FLoRA(), FedEx(), FedSA(), FedPLoRA(), HetLoRA(), LoRAA2(), FoldedDelta()]), ids=repr
)
def test_every_kind_of_method_runs_to_a_folder_that_can_be_exported(
    encoder: Path, tmp_path: Path, method: Aggregator
) -> None:
    """Folds, private sides, drawn modules, pruning, selection: through training, metrics, report and export."""
    outcome = prepare(tiny_run(encoder, aggregator=method)).execute(tmp_path / "out")
    assert {path.name for path in outcome.folder.iterdir()} == FILES
    base, adapter, _ = open_run(outcome.folder)
    assert adapter.factors.keys() == outcome.adapter.factors.keys()
    for name, factor in outcome.adapter.factors.items():
        torch.testing.assert_close(adapter.factors[name].up @ adapter.factors[name].down, factor.up @ factor.down)
    assert base.labels == 2


def test_scores_and_pictures_can_be_left_out(encoder: Path, tmp_path: Path) -> None:
    run = tiny_run(encoder, held_out=0.0, limits=Limits(versions=2, evaluate_every=0))
    outcome = prepare(run).execute(tmp_path / "run", report=False)
    assert len(outcome.scores) == 1
    log = read_run_log(outcome.folder)
    assert ([line["version"] for line in log.scores], log.clients) == ([2], ())
    assert not (outcome.folder / "report.html").exists()
    assert write_report([outcome.folder], tmp_path / "page.html").stat().st_size > 10_000
