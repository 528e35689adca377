"""The cost model follows what a client reports, and says of depths that were not seen what the others tell (methods 4b.2)."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.model_shape import Shape
from fedloom.core.types import Profile
from fedloom.plan.client_cost import CostModel

SHAPE = Shape(600, 0, 6, 10, modules=((10, 10),) * 6, dense=5, depths={f"layer{k}": 6 - k for k in range(6)})
PROFILE = Profile("c", 10, flops=1e3, up_bps=80.0, down_bps=160.0)
FRESH = CostModel.from_profile(PROFILE, SHAPE, rank=2, batch_tokens=7)
DEPTHS = range(1, 7)


def fed(model: CostModel, *pairs: tuple[int, float]) -> CostModel:
    for depth, seconds in pairs:
        model = model.after_training(depth, 5, 5 * seconds)
    return model


def test_before_anything_was_seen_it_says_what_flop_and_links_say() -> None:
    """t = FLOP / speed at every depth: the modules are one a block, so FLOP are a line."""
    for depth in DEPTHS:
        assert FRESH.step_seconds(depth) == pytest.approx(SHAPE.train_flops(7, 2, depth) / 1e3)
    assert FRESH.upload_seconds(20) == 2.0
    assert FRESH.download_seconds(20) == 1.0


def test_one_depth_scales_the_guess() -> None:
    """mu alone is learnt: a client three times as slow as its profile says is so at every depth."""
    model = fed(FRESH, (2, 3 * FRESH.step_seconds(2)))
    for depth in DEPTHS:
        assert model.step_seconds(depth) == pytest.approx(3 * FRESH.step_seconds(depth))


@pytest.mark.parametrize(
    ("a", "b"),
    [(1.0, 0.2), (0.0, 0.5), (-0.3, 0.5), (0.3, 0.0)],
    ids=["plain", "kept activations", "cheap top", "flat"],
)
def test_two_depths_tell_the_others(a: float, b: float) -> None:
    """t(d) = a + b d, whatever FLOP say; the guess weighs 2 % where depths 2 and 4 were seen."""
    model = fed(FRESH, *[(depth, a + b * depth) for depth in (2, 4) * 5])
    for depth in DEPTHS:
        assert model.step_seconds(depth) == pytest.approx(a + b * depth, rel=0.1)


def test_a_client_that_becomes_slower_is_followed_at_every_depth() -> None:
    """x <- 0.8 x + 0.2 x_obs: after 30 more observations 0.8^30, a thousandth, of the old is left."""
    before = [(depth, 1.0 + 0.2 * depth) for depth in (1, 3, 5) * 10]
    model = fed(FRESH, *before, *[(depth, 4 * seconds) for depth, seconds in before])
    for depth in DEPTHS:
        assert model.step_seconds(depth) == pytest.approx(4 * (1.0 + 0.2 * depth), rel=0.05)


def test_the_mean_follows_by_a_fifth() -> None:
    model = fed(FRESH, *[(3, 1.0)] * 10)
    assert fed(model, (3, 2.0)).seconds == pytest.approx(0.8 * 1.0 + 0.2 * 2.0)


def test_noise_is_averaged_out() -> None:
    """With a fifth of noise on each step time, no depth is off by more than a fifth."""
    draw = Random(0)
    seen = [(d, (1.0 + 0.2 * d) * draw.lognormvariate(0.0, 0.2)) for d in (1, 6, 3) * 20]
    model = fed(FRESH, *seen)
    for depth in DEPTHS:
        assert model.step_seconds(depth) == pytest.approx(1.0 + 0.2 * depth, rel=0.2)


def test_links_are_averaged_as_time() -> None:
    """A link that is 1 and 9 byte/s by turns takes 5/9 s a byte on average, not 1/5."""
    model = FRESH
    for seconds in (1.0, 1 / 9) * 2:
        model = model.after_upload(10, 10 * seconds).after_download(10, 5 * seconds)
    assert model.upload_seconds(9) == pytest.approx(5.0)
    assert model.download_seconds(9) == pytest.approx(2.5)


def test_a_task_is_both_ways_and_its_steps() -> None:
    """Everything goes down, the trained layers come up: 4 (40 l + 5) bytes for l layers at rank 2."""
    whole, up = 4 * (40 * 6 + 5), 4 * (40 * 2 + 5)
    expected = whole / 20.0 + 3 * FRESH.step_seconds(2) + up / 10.0
    assert FRESH.task_seconds(SHAPE, rank=2, depth=2, steps=3) == pytest.approx(expected)


@given(st.lists(st.tuples(st.integers(0, 6), st.floats(0.0, 1e6)), max_size=30))
def test_no_report_makes_a_time_negative_or_more_depth_cheaper(reports: list[tuple[int, float]]) -> None:
    model = fed(FRESH, *reports)
    times = [model.step_seconds(depth) for depth in range(7)]
    assert all(math.isfinite(time) and time >= 0.0 for time in times)
    assert times == sorted(times)
