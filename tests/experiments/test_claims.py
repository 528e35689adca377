"""Verdicts: against scipy's t test and a Holm of its own, and that chance decides as seldom as is said."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random
from statistics import mean

import pytest
from claims import FAILS, HOLDS, LEVEL, OPEN, Claim, judged, levels, paired
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from tests.support.storms import tries

figures = st.lists(st.floats(-3.0, 3.0).map(lambda value: round(value, 3)), min_size=0, max_size=6).map(tuple)


def claim(
    values: tuple[float, ...], name: str = "one", family: str = "f", margin: float = 0.0, below: bool = False
) -> Claim:
    """A claim with these figures."""
    return Claim(name, "paper", "says", "done", values, family, margin, below)


families = st.lists(st.tuples(figures, st.sampled_from([-0.5, 0.0, 0.5]), st.booleans()), min_size=1, max_size=6).map(
    lambda rows: [claim(values, f"{k}", margin=margin, below=below) for k, (values, margin, below) in enumerate(rows)]
)


def by_holm(claims: list[Claim]) -> set[str]:
    """The claims that Holm's step-down procedure rejects the margin of, from its definition."""
    found = {one.name: one.probability() for one in claims}
    ordered = sorted(found, key=lambda name: found[name])
    for place, name in enumerate(ordered):
        if found[name] > LEVEL / (len(ordered) - place):
            return set(ordered[:place])
    return set(ordered)


@pytest.mark.parametrize("values", [(1.0, 1.2, 0.7), (0.3, -0.2, 0.5, 0.4, 0.1), (-2.0, -2.5)])
@pytest.mark.parametrize("margin", [0.0, 0.6, -1.0])
def test_one_claim_is_judged_by_students_t(values: tuple[float, ...], margin: float) -> None:
    one = claim(values, margin=margin)
    known = ttest_1samp(values, margin)
    assert one.probability() == pytest.approx(known.pvalue, rel=1e-9)
    ends = known.confidence_interval(0.95)
    assert one.interval() == pytest.approx((ends.low, ends.high), rel=1e-9)


@given(families)
@tries(200)
def test_the_corrected_interval_leaves_the_margin_out_just_where_holm_decides(claims: list[Claim]) -> None:
    tested, lines, decided = levels(claims), judged(claims), by_holm(claims)
    for one, line in zip(claims, lines, strict=True):
        if abs(one.probability() - tested[one.name]) < 1e-9:
            continue  # rounding decides
        assert (line["verdict"] != OPEN) == (one.name in decided)
        if line["verdict"] != OPEN:
            right = mean(one.values) < one.margin if one.below else mean(one.values) > one.margin
            assert line["verdict"] == (HOLDS if right else FAILS)
        if line["corrected"]:
            low, high = line["corrected"]
            assert low <= line["low"] + 1e-9
            assert line["high"] <= high + 1e-9


@given(families)
@tries(100)
def test_neither_order_nor_other_families_change_a_verdict(claims: list[Claim]) -> None:
    others = [replace(one, name=f"other {one.name}", family="g") for one in claims]
    known = {line["name"]: line for line in judged(claims)}
    for line in judged([*others, *reversed(claims)]):
        assert line["name"].startswith("other") or line == known[line["name"]]


@given(figures, st.sampled_from([-0.5, 0.0, 0.5]))
@tries(100)
def test_a_claim_and_its_opposite_do_not_both_hold(values: tuple[float, ...], margin: float) -> None:
    verdicts = {claim(values, margin=margin, below=below).verdict(LEVEL) for below in (False, True)}
    assert verdicts in ({OPEN}, {HOLDS, FAILS})


def test_without_two_seeds_nothing_is_decided() -> None:
    for values in ((), (5.0,)):
        (line,) = judged([claim(values)])
        assert (line["low"], line["high"], line["corrected"], line["verdict"]) == (None, None, None, OPEN)


def test_a_ratio_is_told_as_a_factor() -> None:
    values = (math.log(2.0), math.log(8.0), math.log(4.0))
    (line,) = judged([replace(claim(values, margin=math.log(1.1)), times=True)])
    assert line["estimate"] == pytest.approx(4.0)
    assert line["low"] * line["high"] == pytest.approx(16.0, rel=1e-3), "symmetric as a factor"


def test_of_claims_with_nothing_in_them_a_family_is_seldom_decided() -> None:
    """Four claims, four seeds, no effect: one family in twenty has a verdict, where one in five would have one without Holm."""
    draw, wrong, plain = Random(5), 0, 0
    for _ in range(120):
        family = [claim(tuple(draw.gauss(0.0, 1.0) for _ in range(4)), f"{k}") for k in range(4)]
        wrong += any(line["verdict"] != OPEN for line in judged(family))
        plain += any(one.verdict(LEVEL) != OPEN for one in family)
    assert wrong <= 15, "6 are expected, with a standard deviation of 2.4"
    assert plain > 15


def test_pairs_have_both_cells_of_a_seed() -> None:
    lines = [{"cell": "a", "seed": 1, "x": 3.0}, {"cell": "b", "seed": 1, "x": 1.0}, {"cell": "a", "seed": 2, "x": 9.0}]
    assert paired(lines, lambda line: float(line["x"]), "a", "b") == (2.0,)
