"""What a report says of labels: the majority beside every accuracy, of which label F1 speaks, recall and confusion by label."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedloom.report import facts, label_facts, tables
from fedloom.report.run_log import RunLog, read_run_log
from fedloom.train.confusion import Confusion, constant_answer
from tests.support.report_pages import page_text, section_text, visible_words

Fake = Callable[..., Path]
SPAM = ["ham", "spam"]


def with_manifest(log: RunLog, **more: Any) -> RunLog:
    return replace(log, manifest={**log.manifest, **more})


def with_labels(log: RunLog, counted: Confusion) -> RunLog:
    return replace(log, labels=({"kind": "labels", "version": 12, **counted.metrics()},))


def rows_of(grid: tables.Grid) -> Mapping[str, tuple[str, ...]]:
    return {row[0]: tuple(cell.replace("\u00a0", " ") for cell in row[1:]) for row in grid.rows}


def test_the_page_has_recall_precision_and_confusion_of_each_label(fake: Fake) -> None:
    text = section_text(page_text(read_run_log(fake(labels=SPAM))), "Labels")
    log = read_run_log(fake(labels=SPAM))
    (line,) = [line for line in log.labels if line["version"] == 12]
    assert rows_of(tables.recall_table(log, line)) == {
        "ham": ("10", "50.0 %", "33.3 %", "40.0 %"),
        "spam": ("20", "50.0 %", "66.7 %", "57.1 %"),
    }
    assert rows_of(tables.confusion_table(log, line)) == {"ham": ("5", "5"), "spam": ("10", "10")}
    assert rows_of(tables.measures_table(log, line)) == {
        "Accuracy": ("33.3 %", "10.0 %", "50.0 %"),
        "Balanced accuracy": ("50.0 %", "10.0 %", "50.0 %"),
        "F1 of 'spam'": ("0.0 %", "12.9 %", "57.1 %"),
        "Macro F1": ("25.0 %", "9.9 %", "48.6 %"),
        "AUC": ("0.500", "0.100", "0.500"),
    }
    for word in ("F1 of &#39;spam&#39;", "Always answering &#39;ham&#39;", "→ spam", "The label recognised least is"):
        assert word in text


def test_an_accuracy_that_only_knows_the_commonest_label_is_called_so(fake: Fake) -> None:
    log = with_manifest(read_run_log(fake(labels=SPAM)), baselines={"majority": 0.833})
    score = {"version": 12, "accuracy": 0.833, "examples": 600, "time": 1.0}
    for accuracy, verdict in (
        (0.833, ", no different within the sampling error"),
        (0.95, ""),
        (0.7, ", which is more"),
    ):
        told = facts.majority_clause(log, {**score, "accuracy": accuracy}).replace("\u00a0", " ")
        assert told == f"; always answering 'ham' would give 83.3 %{verdict}"
    assert "always answering 'ham' would give" in facts.result_sentence(log)


def test_the_majority_stands_beside_the_accuracy_in_tables_tiles_and_the_picture(
    fake: Fake, finished_page: Path
) -> None:
    log = read_run_log(fake(labels=SPAM))
    for grid in (tables.runs_table([log]), tables.summary_table([log])):
        row = dict(zip(grid.head, grid.rows[0], strict=True))
        assert grid.head.index("Majority") == grid.head.index("Accuracy") + 1
        assert row["Majority"] == "23.0\u00a0%"
    tiles = {name: (value, beside) for name, value, beside in tables.key_figures(log)}
    assert tiles["Majority"] == ("23.0\u00a0%", "test accuracy of always answering 'ham'")
    assert "by its commonest label" in tiles["Worst client"][1]
    assert "AUC 0.500" in tiles["F1 of 'spam'"][1]
    assert "Baseline" in tables.tier_table(log).head
    assert "majority" in section_text(finished_page.read_text(encoding="utf-8"), "Accuracy")


def test_f1_is_named_for_what_it_is(fake: Fake) -> None:
    two, six = read_run_log(fake("two", labels=SPAM)), read_run_log(fake("six"))
    assert label_facts.f1_name(two) == label_facts.f1_name(two, two) == "F1 of 'spam'"
    assert label_facts.f1_name(six) == "Macro F1"
    assert label_facts.f1_name(two, six) == "F1"
    assert "F1 of 'spam'" in tables.runs_table([two]).head
    assert label_facts.f1({"f1": 0.5}) == label_facts.f1({"f1_macro": 0.5}) == 0.5


def test_the_report_of_an_earlier_run_has_no_labels_and_says_no_more_than_it_knows(fake: Fake) -> None:
    log = read_run_log(fake(labels=SPAM))
    earlier = replace(with_manifest(log, metrics={}), labels=())
    text = visible_words(page_text(earlier))
    assert "always answering the commonest label would give" in text
    assert "F1 of 'spam'" in text.replace("&#39;", "'")
    assert section_text(page_text(earlier), "Labels") == ""


def test_a_label_without_test_examples_is_told(fake: Fake) -> None:
    log = with_labels(read_run_log(fake(labels=SPAM)), Confusion(((7, 2), (0, 0))))
    text = section_text(page_text(log), "Labels").replace("&#39;", "'")
    assert "No test example has the label 'spam': its recall is not measured." in text
    assert "Without examples of both labels there is no AUC." in text
    assert rows_of(tables.recall_table(log, log.labels[0]))["spam"] == ("0", "–", "0.0 %", "0.0 %")
    assert "recognised least" not in text


@pytest.mark.parametrize("count", [tables.MOST_LABELS, tables.MOST_RECALLS + 9])
def test_of_many_labels_the_worst_are_listed(fake: Fake, count: int) -> None:
    names = [f"intent {k}" for k in range(count)]
    log = read_run_log(fake(labels=names))
    counts = [[0] * count for _ in range(count)]
    for k, row in enumerate(counts):
        row[k], row[0] = k, row[0] + 2 * count - 2 * k
    log = with_labels(log, Confusion(tuple(map(tuple, counts))))
    recalls = tables.recall_table(log, log.labels[0])
    assert len(recalls.rows) == min(count, tables.MOST_RECALLS)
    confusion = tables.confusion_table(log, log.labels[0])
    if count > tables.MOST_LABELS:
        assert [row[0] for row in recalls.rows[:2]] == ["intent 1", "intent 2"], "lowest recall first"
        assert confusion.head == ("Label", "Taken for", "Times")
        assert confusion.rows[0] == ("intent 1", "intent 0", f"{2 * count - 2}")
    else:
        assert [row[0] for row in recalls.rows] == names
        assert len(confusion.rows) == len(confusion.head) - 1 == count


def test_clients_without_a_score_are_counted(fake: Fake) -> None:
    log = read_run_log(fake())
    *scored, last = log.clients
    reason = "none of its examples (1) is held out"
    log = replace(log, clients=tuple(scored), unscored=({**last, "kind": "unscored", "reason": reason},))
    text = visible_words(page_text(log))
    assert f"1 of {len(scored) + 1} clients gave no score ({last['client']}: {reason})" in text
    assert f"; 1 of {len(scored) + 1} gave no score" in text
    assert sum(int(row[1]) for row in tables.tier_table(log).rows) == len(scored) + 1


def test_labels_of_the_manifest_and_the_measures_of_the_baseline_agree(fake: Fake) -> None:
    log = read_run_log(fake())
    line = label_facts.labels_after(log)
    assert line is not None
    assert label_facts.majority_counts(log, line) == constant_answer([10, 20, 30, 40, 50, 60], 0)
    gone = with_manifest(log, metrics={"majority_label": "no such label"})
    assert label_facts.majority_counts(gone, line) is None
    assert [row[1] for row in tables.measures_table(gone, line).rows] == ["–"] * 3


def test_only_the_untrained_model_was_scored(fake: Fake) -> None:
    log = read_run_log(fake(labels=SPAM))
    log = replace(log, labels=log.labels[:1], scores=log.scores[:1])
    assert log.labels[0]["version"] == 0
    assert section_text(page_text(log), "Labels") == ""
    assert "The untrained model classifies" in facts.result_sentence(log)
    assert "always answering 'ham'" in facts.result_sentence(log)


def test_a_line_is_read_from_the_folder_as_it_was_written(fake: Fake) -> None:
    folder = fake(labels=SPAM)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert list(read_run_log(folder).labels) == [line for line in lines if line["kind"] == "labels"]
