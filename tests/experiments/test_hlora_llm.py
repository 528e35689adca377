"""What the HLoRA study says of constructed runs, and that nothing in it is chosen by the rows that it is judged on."""

from __future__ import annotations

import math
from typing import Any

import pytest
from claims import judged
from hlora_llm import (
    CELLS,
    JUDGED,
    METHODS,
    RATES,
    STEADY,
    STUDIES,
    TARGETS,
    TUNED,
    claims,
    curve,
    end,
    rounds_or_all,
    rounds_to,
    start,
)
from hlora_llm_rates import EVERY, FIRST, best, beyond, summary
from hypothesis import given
from hypothesis import strategies as st
from text_pools import DATA, Pool, paraphrases, questions, topics

from fedloom import Averaged
from tests.support.storms import tries

losses = st.lists(st.floats(0.01, 3.0), min_size=STEADY, max_size=12)


def line(cell: str, found: list[float], seed: int = 0, every: int = 1) -> dict[str, Any]:
    """A run with these test losses after its base's."""
    scores = [{"loss": loss, "accuracy": math.exp(-loss)} for loss in (9.0, *found)]
    curve = [[every * place, 0.0, score["accuracy"]] for place, score in enumerate(scores)]
    up = 2000 if "fedit-r8" in cell else 1000 + seed
    return {"cell": cell, "seed": seed, "scores": scores, "curve": curve, "bytes_up": up}


def test_the_base_is_no_part_of_the_curve() -> None:
    one = line("hlora/topics", [1.0, 0.5, 0.3])
    assert curve(one) == pytest.approx(0.6)
    assert end(one) == pytest.approx(100 * (math.exp(-1.0) + math.exp(-0.5) + math.exp(-0.3)) / 3)


def test_an_answer_of_a_writer_counts_among_the_words_that_are_allowed() -> None:
    one = line("hlora/told", [1.0, 0.5, 0.3])
    for score in one["scores"]:
        score["label_accuracy"] = 0.25
    assert end(one) == 25.0


@given(losses, st.floats(0.01, 3.0), st.floats(0.0, 1.0), st.sampled_from([1, 2, 4]))
@tries(100)
def test_a_lower_target_is_never_reached_earlier(found: list[float], target: float, lower: float, every: int) -> None:
    one = line("hlora/topics", found, every=every)
    assert rounds_or_all(one, target - lower) >= rounds_or_all(one, target)
    hit = rounds_to(one, target)
    if hit is None:
        assert rounds_or_all(one, target) == every * len(found)
    else:
        middle = round(hit / every)
        assert sum(found[middle - 2 : middle + 1]) / STEADY <= target, "of the three scores around it"


def test_one_low_score_is_no_target_reached() -> None:
    assert rounds_to(line("hlora/topics", [1.0, 0.1, 1.0, 1.0]), 0.4) is None
    assert rounds_to(line("hlora/topics", [1.0, 0.4, 0.4, 0.4]), 0.4) == 3.0


def results(losses: dict[str, float], seeds: int = 6) -> list[dict[str, Any]]:
    """Runs on all data whose losses differ by method, and a little by seed and method."""
    return [
        line(f"{name}/{data}", [loss + 0.01 * seed + 0.002 * (seed % 2) * (name == "hlora")] * 5, seed)
        for data in STUDIES
        for name, loss in losses.items()
        for seed in range(seeds)
    ]


@pytest.mark.parametrize(
    ("padded", "whole", "small", "expected"),
    [
        (
            1.0,
            0.3,
            1.0,
            {
                "bytes": "holds",
                "resources": "holds",
                "speed": "holds",
                "accuracy": "holds",
                "small-rank": "does not hold",
            },
        ),
        (0.2, 0.1, 0.32, {"resources": "does not hold", "speed": "does not hold", "small-rank": "holds"}),
        (0.3, 0.25, 0.3, {"speed": "not decided"}),
    ],
)
def test_the_claims_say_who_is_ahead(padded: float, whole: float, small: float, expected: dict[str, str]) -> None:
    found = results({"hlora": 0.3, "fedit-padded": padded, "fedit-r8": whole, "fedit-r2": small})
    verdicts = {one["name"]: one["verdict"] for one in judged(claims(found))}
    for data in STUDIES:
        assert {name: verdicts[f"hlora-{name}-{data}"] for name in expected} == expected


def test_nothing_is_claimed_of_data_that_were_not_run() -> None:
    found = [one for one in results({"hlora": 0.3}) if one["cell"] == "hlora/told"]
    assert {claim.family for claim in claims(found)} == {"hlora-told"}


def test_one_seed_decides_nothing() -> None:
    found = results({"hlora": 0.3, "fedit-padded": 1.0, "fedit-r8": 0.3, "fedit-r2": 1.0}, seeds=1)
    assert {one["verdict"] for one in judged(claims(found))} == {"not decided"}


def tried(rates: dict[float, float]) -> dict[float, dict[str, Any]]:
    """Lines whose curve is at this loss, by rate."""
    return {rate: line(f"hlora/topics@{rate:g}", [loss] * 3, 100) for rate, loss in rates.items()}


@pytest.mark.parametrize(
    ("losses", "rate", "more"),
    [
        ({4e-3: 0.5, 8e-3: 0.4, 1.6e-2: 0.6}, 8e-3, None),
        ({4e-3: 0.3, 8e-3: 0.4, 1.6e-2: 0.6}, 4e-3, 2e-3),
        ({4e-3: 0.5, 8e-3: 0.4, 1.6e-2: 0.3}, 1.6e-2, 3.2e-2),
        ({8e-3: 0.5, 1.6e-2: 0.4, 3.2e-2: 0.3}, 3.2e-2, 6.4e-2),
        ({1.6e-2: 0.5, 3.2e-2: 0.4, 6.4e-2: 0.3}, 6.4e-2, None),
        ({4e-3: math.nan, 8e-3: 0.4, 1.6e-2: math.nan}, 8e-3, None),
    ],
)
def test_a_rate_is_the_best_and_has_worse_ones_on_both_sides(
    losses: dict[float, float], rate: float, more: float | None
) -> None:
    assert (best(tried(losses)), beyond(tried(losses))) == (rate, more)


def test_the_rules_ask_for_a_cell_there_is_and_fix_the_target_by_padding() -> None:
    found = [line(f"fedit-padded/told@{rate:g}", [rate, 0.5, 0.5, 0.5], 100) for rate in FIRST["told"]]
    told = summary(found)
    assert told["rates"] == {"told": {"fedit-padded": FIRST["told"][0]}}
    assert told["targets"] == {"told": 0.55}
    assert told["to_run"] == [f"fedit-padded/told@{EVERY[0]:g}"]


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the shared data")
@pytest.mark.parametrize("pool", [topics, paraphrases, questions])
def test_nothing_is_tuned_on_what_is_scored_or_trained_on(pool: Any) -> None:
    rows: Pool = pool()
    train, test, tuning = ({tuple(sorted(row.items())) for row in part} for part in rows)
    assert not test & tuning
    assert not train & tuning
    assert not train & test


def test_baselines_get_what_hlora_gets() -> None:
    """A cell differs from another of its data in the method, the ranks and the rate alone; nobody publishes an average."""
    judged_methods = {name for asked in JUDGED for name in (asked.one, asked.other)}
    for data, rates in RATES.items():
        study = STUDIES[data]
        assert judged_methods <= set(rates) <= set(TUNED)
        runs = [CELLS[f"{name}/{data}"](0) for name in METHODS if name in {*rates, "hlora-random"}]
        assert not any(isinstance(run.aggregator, Averaged) for run in runs)
        for name in ("partition", "schedule", "limits", "data", "held_out", "lora", "model"):
            assert len({repr(getattr(run, name)) for run in runs}) == 1
        assert {run.plan.local_steps for run in runs} == {study.steps}
        assert study.tuning != study.data
    assert set(TUNED) == set(METHODS) - {"hlora-random"}
    assert set(RATES) == set(TARGETS) <= set(STUDIES)


def test_the_start_of_a_run_shows_what_a_method_merges() -> None:
    """In the first round every method starts from the same: a check that ends there would compare nothing of it."""
    assert {start(cell(0)).limits.versions for cell in CELLS.values()} == {2}
