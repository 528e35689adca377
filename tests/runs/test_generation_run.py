"""Runs of a model that writes, from the data to the folder: every axis of the package at once."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedloom import (
    IID,
    ByClient,
    Engine,
    FedFa,
    FedIT,
    FedSA,
    FixedDepth,
    FixedRank,
    FLoRA,
    Generation,
    Hierarchy,
    Instructions,
    LabelDirichlet,
    Limits,
    LoRA,
    LoRAA2,
    Plan,
    ProductDelta,
    RandomGroups,
    RankByCapability,
    Refused,
    Rounds,
    Run,
    Scaffold,
    Training,
    prepare,
)
from fedloom.core.events import Command, Event, Publish
from fedloom.report.page import write_report
from fedloom.report.run_log import read_run_log
from tests.support.same_bytes import COMPARED
from tests.support.storms import one_in
from tests.support.tiny_models import toy_answers
from tests.support.tiny_runs import tiny_run


def small(model: Path, **more: Any) -> Run:
    """Three clients of ranks 2, 4 and 8 that train the top layer, each answer merged as it arrives."""
    given: dict[str, Any] = {
        "data": Instructions(toy_answers(120), kind="kind", test_share=0.25),
        "partition": LabelDirichlet(clients=3, alpha=5.0),
        "aggregator": ProductDelta(),
        "schedule": FedFa(window=3, max_in_flight=2),
        "plan": Plan(RankByCapability(ranks=(2, 4, 8), upload_seconds=0.02), local_steps=4, depth=FixedDepth(1)),
        "lora": LoRA(target_modules=("q_proj", "v_proj", "up_proj")),
        "training": Training(learning_rate=2e-2),
        "limits": Limits(versions=6, evaluate_every=3),
        "generation": Generation(examples=4, max_new_tokens=6),
    }
    return tiny_run(model, **(given | more))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def written(generator: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "written"
    prepare(small(generator)).execute(out)
    return out


def test_a_run_learns_to_answer_and_says_how_well(written: Path) -> None:
    log = read_run_log(written)
    first, last = log.scores[0], log.scores[-1]
    assert last["perplexity"] < 0.8 * first["perplexity"]
    assert last["perplexity"] == pytest.approx(math.exp(last["loss"]))
    assert last["tokens"] > last["examples"] == 30
    assert 0 <= last["exact_match"] <= last["accuracy"]
    assert last["exact_match"] <= last["label_accuracy"] <= 1  # there are few different answers
    assert first["label_accuracy"] < last["label_accuracy"]
    assert log.manifest["metrics"] == {"label_accuracy": "among the 12 different answers of the examples"}
    page = (written / "report.html").read_text(encoding="utf-8")
    assert "Word for word" in page
    assert "Label accuracy" in page
    assert {line["depth"] for line in log.tasks} == {1}
    assert len({line["rank"] for line in log.tasks}) > 1
    assert log.manifest["model"]["labels"] is None
    assert log.manifest["model"]["dense_parameters"] == 0
    assert log.manifest["baselines"] == {}


def test_the_base_of_a_client_is_the_model_before_training(written: Path) -> None:
    log = read_run_log(written)
    assert len(log.clients) == 3
    assert all(0 <= line["base_accuracy"] <= 1 for line in log.clients)
    assert all(line["perplexity"] < line["base_perplexity"] for line in log.clients)


def test_samples_before_and_after_are_kept_with_their_figures(written: Path) -> None:
    log, rows = read_run_log(written), {row["instruction"]: row["answer"] for row in toy_answers(120)}
    assert len(log.samples) == 4
    assert all(rows[line["request"]] == line["reference"] for line in log.samples)
    assert any(line["before"] != line["after"] for line in log.samples)
    assert log.generation is not None
    assert log.generation["examples"] == 4
    assert log.generation["rouge_l"] > log.generation["base_rouge_l"]


def test_the_report_says_token_accuracy_and_perplexity_and_shows_the_answers(written: Path) -> None:
    page = (written / "report.html").read_text(encoding="utf-8")
    for words in ("Test token accuracy", "at a perplexity of", "<h2>Perplexity</h2>", "<h2>Answers</h2>", "ROUGE-L"):
        assert words in page
    for words in ("classifies", "commonest label", "SequenceClassification", "majority"):
        assert words not in page
    assert read_run_log(written).samples[0]["reference"] in page


def test_several_such_runs_are_compared(written: Path, tmp_path: Path) -> None:
    page = write_report([written, written], tmp_path / "both.html").read_text(encoding="utf-8")
    assert "<h2>Perplexity</h2>" in page
    assert "<h2>Token accuracy</h2>" in page


def test_a_run_with_labels_beside_one_with_answers_is_compared_by_accuracy(
    written: Path, finished: Path, tmp_path: Path
) -> None:
    page = write_report([written, finished], tmp_path / "both.html").read_text(encoding="utf-8")
    assert "<h2>Accuracy</h2>" in page
    assert "<h2>Perplexity</h2>" not in page


@pytest.mark.slow
def test_the_same_seed_and_two_workers_write_the_same_bytes(written: Path, generator: Path, tmp_path: Path) -> None:
    # law 9; also where activations come from a folder that another run filled, which divided the texts in another way
    engine = Engine(kernel="torch", cache_dir=str(tmp_path / "kept"))
    others = small(generator, engine=engine, partition=LabelDirichlet(clients=2, alpha=1.0), limits=Limits(versions=3))
    prepare(others).execute(tmp_path / "others", report=False)
    prepare(small(generator, engine=engine)).execute(tmp_path / "two", workers=2)
    for name in COMPARED:
        assert (written / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert read_run_log(tmp_path / "two").manifest["run_hash"] == read_run_log(written).manifest["run_hash"]


@pytest.mark.slow
def test_a_run_cut_short_goes_on_to_the_same_bytes(written: Path, generator: Path, tmp_path: Path) -> None:
    # law 10
    def stop(now: float, event: Event, commands: list[Command]) -> None:
        if any(isinstance(command, Publish) and command.version == 4 for command in commands):
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prepare(small(generator)).execute(out, [stop], checkpoint_seconds=0)
    prepare(small(generator), resume=out).execute(checkpoint_seconds=0)
    for name in COMPARED:
        assert (written / name).read_bytes() == (out / name).read_bytes(), name


def test_how_much_to_write_may_be_left_out_and_be_nothing(generator: Path, tmp_path: Path) -> None:
    run = small(generator, generation=Generation(examples=0), limits=Limits(versions=1), held_out=0.0)
    assert read_run_log(prepare(run).execute(tmp_path / "none", report=False).folder).samples == ()
    run = replace(run, generation=None)
    assert len(read_run_log(prepare(run).execute(tmp_path / "some", report=False).folder).samples) == 8


def test_a_run_with_labels_has_nothing_to_write(encoder: Path) -> None:
    with pytest.raises(Refused, match="generation"):
        prepare(tiny_run(encoder, generation=Generation()))


def test_an_encoder_is_refused_where_text_is_to_be_written(encoder: Path) -> None:
    with pytest.raises(Refused, match=r"model .* give a decoder such as"):
        prepare(small(encoder, lora=LoRA()))


def test_texts_of_data_and_model_stay_texts(written: Path, tmp_path: Path) -> None:
    evil, copy = "<script>alert(1)</script>\x1b[31m", tmp_path / "copy"
    copy.mkdir()
    for name in ("manifest.json", "metrics.jsonl"):
        (copy / name).write_bytes((written / name).read_bytes())
    line = {"kind": "sample", "request": evil, "context": evil, "reference": evil, "before": evil, "after": "a\nb"}
    with (copy / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    page = write_report([copy], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "\x1b" not in page
    assert "a\nb" in page


@pytest.mark.slow
def test_rows_as_they_are_become_a_report(generator: Path, tmp_path: Path) -> None:
    rows: list[dict[str, str | None]] = [
        {**row, "client": "ab"[number % 2], "split": "test" if number % 5 == 0 else "train"}
        for number, row in enumerate(toy_answers(100))
    ]
    for row in rows:
        row["answer"] = f"{row['answer']} <b>&</b>"
    for number in (1, 2, 3, 5):  # 5 is a row to test on
        rows[number]["answer"] = ("", None, "  ")[number % 3]
    run = Run(
        model=str(generator),
        data=Instructions(rows, client="client", kind="kind", split="split"),
        partition=ByClient(),
        aggregator=FedIT(),
        schedule=Rounds(cohort_size=2),
        plan=Plan(FixedRank(4), local_steps=6),
        training=Training(learning_rate=1e-2),
        limits=Limits(versions=2),
        generation=Generation(examples=3, max_new_tokens=8),
    )
    log = read_run_log(prepare(run).execute(tmp_path / "run").folder)
    assert [line["version"] for line in log.scores] == [0, 1, 2]
    first, *_, last = (line["perplexity"] for line in log.scores)
    assert last < 0.9 * first
    assert log.scores[-1]["examples"] == 19
    assert {line["client"] for line in log.tasks} == {"a", "b"}
    assert "3 of 80 training rows have no answer and are left out." in log.manifest["notes"]
    assert "1 of 20 test rows have no answer and are left out." in log.manifest["notes"]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "left out" in page
    assert len(log.samples) == 3
    for line in log.samples:
        assert line["reference"].endswith("<b>&</b>")
        assert html.escape(line["reference"]) in page
        assert html.escape(line["after"]) in page
        assert line["reference"] not in page


@pytest.mark.parametrize(
    "more",
    one_in(
        3,
        [
            {"aggregator": FLoRA(), "lora": LoRA(target_modules="all-linear")},
            {"aggregator": LoRAA2()},
            {"aggregator": Scaffold(clients=3), "schedule": Rounds(cohort_size=3)},
            {"hierarchy": Hierarchy(RandomGroups(2)), "schedule": Rounds(cohort_size=2)},
            {"engine": Engine(checkpointing=True, bfloat16=True, together=4)},
        ],
    ),
    ids=["folds", "chosen directions", "control variates", "groups", "engine"],
)
def test_other_methods_and_ways_to_compute_learn_too(generator: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    run = small(generator, limits=Limits(versions=3), generation=Generation(2, 4), **more)
    scores = read_run_log(prepare(run).execute(tmp_path / "run", report=False).folder).scores
    assert scores[-1]["perplexity"] < 0.9 * scores[0]["perplexity"]


def test_a_client_with_a_private_side_is_scored_with_its_own(generator: Path, tmp_path: Path) -> None:
    plan = Plan(FixedRank(4), local_steps=8)
    run = small(generator, aggregator=FedSA(), plan=plan, schedule=Rounds(cohort_size=3), limits=Limits(versions=3))
    log = read_run_log(prepare(run).execute(tmp_path / "run", report=False).folder)
    assert all(line["perplexity"] < 0.9 * line["base_perplexity"] for line in log.clients)


@pytest.mark.parametrize("wrong", [lambda: Generation(examples=-1), lambda: Generation(max_new_tokens=0)])
def test_how_much_to_write_is_checked(wrong: Callable[[], Generation]) -> None:
    with pytest.raises(Refused, match="generation"):
        wrong()


@pytest.mark.slow
def test_conversations_are_learnt_whole(generator: Path, tmp_path: Path) -> None:
    """All answers of a talk are predicted, in training and in the scores."""
    rows = toy_answers(240)
    talks = [
        {
            "conversations": [
                {"from": speaker, "value": text}
                for row in rows[start : start + 2]
                for speaker, text in (("human", row["instruction"]), ("gpt", row["answer"]))
            ]
        }
        for start in range(0, 240, 2)
    ]
    more: dict[str, Any] = {"partition": IID(3)}
    job = prepare(small(generator, data=Instructions(talks), **more))
    assert job.train_texts.earlier_answers is not None
    assert {len(spans) for spans in job.train_texts.earlier_answers} == {1}
    job.execute(tmp_path / "talks")
    log = read_run_log(tmp_path / "talks")
    assert log.scores[-1]["perplexity"] < 0.8 * log.scores[0]["perplexity"]
    alone = prepare(small(generator, data=Instructions(rows), **more))
    assert log.scores[-1]["tokens"] == 2 * alone.test_texts.target_count(0) * log.scores[-1]["examples"]
    assert any("`conversations` as the messages" in note for note in log.manifest["notes"])
