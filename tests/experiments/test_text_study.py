"""What a study says of constructed cases, and that nobody notices it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from text_study import GlobalScore, LocalScore, Study, binned, global_score, rounds

from fedloom import IID, FedBuff, FedSA, FlexLoRA, Limits, RunResult, Skew, prepare, words
from fedloom.core.fingerprint import fingerprint
from fedloom.runs.run import Run
from fedloom.schedule.rounds import Rounds
from fedloom.train.evaluate import AnswerScores, Scores
from tests.support.storms import one_in
from tests.support.tiny_runs import tiny_run

RUNS = {
    "rounds": {},
    "folds": {"aggregator": FlexLoRA(), "schedule": Rounds(cohort_size=3)},
    "overlapping": {"schedule": FedBuff(2)},
    "private": {"aggregator": FedSA()},
}


def scores(right: list[bool]) -> Scores:
    """Of two classes; the true one is always 1."""
    return Scores(torch.tensor(right).long(), torch.ones(len(right), dtype=torch.long), torch.zeros(len(right)), 2)


@given(st.lists(st.integers(-3, 3), min_size=1))
def test_bins_hold_each_position_once_in_the_order_of_their_numbers(numbers: list[int]) -> None:
    made = binned(numbers)
    assert sorted(i for one in made for i in one) == list(range(len(numbers)))
    values = [{numbers[i] for i in one} for one in made]
    assert values == [{value} for value in sorted(set(numbers))]


def test_a_version_is_scored_whole_by_bins_and_on_the_common_examples() -> None:
    found = global_score(7, scores([True, True, False, True, False, False]), ((0, 1), (2, 3), (4, 5)), (0, 2, 4))
    assert found == GlobalScore(7, 0.5, 0.0, (1.0, 0.5, 0.0), pytest.approx(1 / 3), (0.0, 0.0, 0.0), 0.0)


def test_an_answer_counts_by_its_tokens() -> None:
    found = AnswerScores(torch.tensor([3, 0]), torch.tensor([3, 1]), torch.tensor([0.5, 1.5]))
    scored = GlobalScore(1, 0.75, 0.5, (1.0, 0.0), 1.0, (pytest.approx(0.5 / 3), 1.5), pytest.approx(0.5 / 3))
    assert global_score(1, found, ((0,), (1,)), (0,)) == scored


def test_a_round_is_a_version_with_the_means_of_what_began_from_it() -> None:
    """(i) and (ii) of the measurement: a client's own model on its own and on the common examples, and the global one."""
    versions = [
        GlobalScore(0, 0.4, 1.0, (0.2, 0.6), 0.5, (1.2, 0.8), 0.9),
        GlobalScore(2, 0.6, 0.8, (0.5, 0.7), 0.6, (1.0, 0.6), 0.7),
    ]
    found = [LocalScore(0, "a", 0.6, 0.9, 1.0), LocalScore(0, "b", 0.7, None, 1.2), LocalScore(1, "c", 0.0, 0.0, 9.0)]
    first, last = rounds(versions, found)
    assert (first.version, first.accuracy, first.worst) == (0, 0.4, 0.2)
    assert (first.local, first.own, first.gain) == (pytest.approx(0.65), 0.9, pytest.approx(0.15))
    assert (first.local_loss, first.loss_rise) == (pytest.approx(1.1), pytest.approx(0.2))
    assert (last.local, last.own, last.gain) == (None, None, None), "a task of another version is not its own"
    assert (last.local_loss, last.loss_rise) == (None, None)


@pytest.mark.slow
@pytest.mark.parametrize("how", one_in(4, RUNS))
def test_measuring_changes_nothing(how: str, encoder: Path, tmp_path: Path) -> None:
    run = tiny_run(encoder, **RUNS[how], limits=Limits(versions=3, evaluate_every=1))
    outcomes = []
    for watched in (False, True):
        job = prepare(run)
        observers = [Study.of(job, common=10)] if watched else []
        outcomes.append(job.execute(tmp_path / str(watched), observers, report=False))
    plain, seen = outcomes
    assert written(plain) == written(seen)
    assert fingerprint(plain.adapter) == fingerprint(seen.adapter)
    assert plain.scores == seen.scores


def written(outcome: RunResult) -> list[bytes]:
    return [(outcome.folder / name).read_bytes() for name in ("trace.jsonl", "metrics.jsonl")]


def watched(run: Run, folder: Path, since: int = 0) -> tuple[Study, RunResult]:
    job = prepare(run)
    study = Study.of(job, Skew(words, bins=3), common=10, since=since)
    return study, job.execute(folder, [study], report=False)


def test_versions_are_scored_as_the_run_scores_them_and_tasks_with_them(encoder: Path, tmp_path: Path) -> None:
    run = tiny_run(
        encoder, partition=IID(6), schedule=Rounds(cohort_size=3), limits=Limits(versions=4, evaluate_every=2)
    )
    study, outcome = watched(run, tmp_path / "out")
    found = study.rounds()
    assert [one.version for one in found] == [0, 2, 4]
    assert [one.accuracy for one in found] == [score["accuracy"] for score in outcome.scores]
    assert [sum(task.version == one.version for task in study.locals) for one in found] == [3, 3, 0]
    sizes = [len(one) for one in study.bins]
    for one in found:
        pooled = sum(size * share for size, share in zip(sizes, one.bins, strict=True)) / sum(sizes)
        assert pooled == pytest.approx(one.accuracy), "the bins are all of the test examples"


def test_a_client_that_is_alone_is_the_next_version(encoder: Path, tmp_path: Path) -> None:
    """Law 1: with one client a round, its model after training is what is published, to within how numbers travel."""
    run = tiny_run(
        encoder,
        schedule=Rounds(cohort_size=1),
        limits=Limits(versions=3, evaluate_every=1),
        transfer=None,
        held_out=0.0,
    )
    study, _ = watched(run, tmp_path / "out", since=1)
    found = study.rounds()
    common, losses = ([getattr(one, name) for one in study.versions] for name in ("common", "common_loss"))
    assert [one.local for one in found] == [None, *common[2:], None], "a task of the version before is not looked at"
    assert [one.local_loss for one in found[1:-1]] == pytest.approx(losses[2:])
    assert {one.own for one in found} == {None}
