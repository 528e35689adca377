"""What a setting changes, from runs of a grid whose scores are made up of known effects."""

from __future__ import annotations

import math
import random
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.report.paired_differences import (
    CLASSIFIER,
    cells_grid,
    compared_figures,
    differences_grid,
    differing_settings,
    paired_differences,
)
from fedloom.report.run_log import RunLog
from tests.support.report_pages import page_text, section_text, visible_words

ACCURACY = CLASSIFIER[0]


def log(accuracy: float | None, seed: int = 0, **settings: Any) -> RunLog:
    """A run of these settings that ended with this accuracy (None: it was not scored)."""
    about = {"name": "run", "seed": seed, "run": {"seed": seed, **settings}, "status": "finished", "fedloom": "0"}
    empty = {name: {} for name in ("model", "clients", "baselines", "partition", "metrics", "versions", "machine")}
    score = {"version": 1, "time": 1.0, "accuracy": accuracy, "examples": 100}
    return RunLog(
        Path(f"{seed}"), {**empty, "status_reason": "", "notes": [], **about}, scores=(score,) if accuracy else ()
    )


def hlora(rank: int) -> dict[str, object]:
    return {"type": "HLoRA", "rank": rank, "balanced": False}


FEDIT = {"type": "FedIT"}


@given(
    effects=st.lists(st.integers(-20, 20), min_size=2, max_size=4),
    rates=st.integers(1, 3),
    seeds=st.integers(1, 4),
    order=st.randoms(use_true_random=False),
)
def test_an_effect_is_found_whatever_seeds_and_other_settings_do(
    effects: list[int], rates: int, seeds: int, order: random.Random
) -> None:
    runs = [
        log(0.5 + effect / 1000 + 0.03 * rate + 0.01 * seed, seed, aggregator=hlora(method), rate=rate)
        for method, effect in enumerate(effects)
        for rate, seed in product(range(rates), range(seeds))
    ]
    order.shuffle(runs)
    first = int(runs[0].manifest["run"]["aggregator"]["rank"])
    found = [one for one in paired_differences(runs, ACCURACY) if one.setting == "aggregator.rank"]
    assert len(found) == len(effects) - 1
    for one in found:
        assert one.baseline == str(first)
        assert len(one.differences) == rates * seeds
        assert one.differences == pytest.approx([(effects[int(one.value)] - effects[first]) / 10] * rates * seeds)


def test_a_setting_is_named_as_far_down_as_it_differs() -> None:
    one, other, third = log(0.5, aggregator=hlora(4)), log(0.5, aggregator=hlora(8)), log(0.5, aggregator=FEDIT)
    assert differing_settings([one, other]) == {"aggregator.rank": ("4", "8")}
    assert differing_settings([one, third]) == {"aggregator": ("HLoRA", "FedIT")}
    assert differing_settings([one, other, third]) == {"aggregator": ("HLoRA(rank=4)", "HLoRA(rank=8)", "FedIT")}
    assert differing_settings([one, log(0.5, seed=7, aggregator=hlora(4))]) == {}


def test_settings_that_never_differ_alone_are_taken_together() -> None:
    runs = [log(0.5 + 0.1 * k, seed, aggregator=hlora(k), rate=k) for k, seed in product((0, 1), (1, 2, 3))]
    (one,) = paired_differences(runs, ACCURACY)
    assert (one.setting, one.value, one.baseline) == ("aggregator.rank, rate", "1, 1", "0, 0")
    assert one.differences == pytest.approx([10.0] * 3)


def test_what_has_no_partner_or_no_score_makes_no_pair() -> None:
    assert paired_differences([log(0.5, seed=1, rate=1), log(0.6, seed=2, rate=2)], ACCURACY) == []
    assert paired_differences([log(0.5, rate=1), log(None, rate=2)], ACCURACY) == []
    assert paired_differences([], ACCURACY) == []
    assert compared_figures([log(None)]) == ()


def test_one_pair_has_no_interval_and_is_never_clear() -> None:
    (one,) = paired_differences([log(0.5, rate=1), log(0.6, rate=2)], ACCURACY)
    assert math.isinf(one.half_width)
    assert not one.clear
    assert "±" not in " ".join(differences_grid([log(0.5, rate=1), log(0.6, rate=2)]).rows[0])


def test_of_a_perplexity_less_is_better() -> None:
    runs = [log(0.5, seed, rate=rate) for rate, seed in product((1, 2), (1, 2, 3))]
    for run in runs:
        run.manifest["model"]["labels"] = None
        run.scores[0]["perplexity"] = 10.0 - run.manifest["run"]["rate"] - run.manifest["seed"]  # type: ignore[index]
    perplexity = compared_figures(runs)[0]
    (one,) = paired_differences(runs, perplexity)
    assert one.sentence().startswith(
        "With rate = 2 instead of 1, perplexity is 1 better (mean of 3 pairs; 95 % interval"
    )


def test_the_page_of_a_comparison_says_what_a_setting_changes() -> None:
    runs = [
        log(0.5 + 0.1 * k + 0.01 * seed * k, seed, aggregator=(hlora(8), FEDIT)[k])
        for k, seed in product((0, 1), (1, 2, 3))
    ]
    text = page_text(*runs)
    words = visible_words(section_text(text, "Paired differences"))
    assert (
        "With aggregator = FedIT instead of HLoRA, accuracy is 12 points better (mean of 3 pairs; 95 % interval"
        in words
    )
    assert "+12.0 ± 2.48" in words
    assert cells_grid(runs).rows[0][:3] == ("HLoRA", "3", "50.0\u00a0% (50.0\u00a0% to 50.0\u00a0%)")
    assert section_text(page_text(runs[0], runs[1]), "Paired differences") == ""
    best = (
        "Of 2 combinations, aggregator = FedIT is best: a mean accuracy of 62.0 % over 3 seeds. The worst has 50.0 %."
    )
    assert best in visible_words(text).replace("\u00a0", " ")
    assert "ends highest" in page_text(runs[0], runs[3])  # one run each: nothing to take a mean of
