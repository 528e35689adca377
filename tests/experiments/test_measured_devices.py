"""Devices with measured steps: what a task takes at each depth, below a change and not, on faster devices."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from measured_devices import MeasuredDevices

from fedloom import World
from fedloom.core.lora import Adapter
from fedloom.core.model_shape import Shape
from fedloom.core.partial_depth import fold_layers
from fedloom.core.types import Budget, Profile, Result, Task, TaskStart
from fedloom.simulate.devices import Devices, Seconds
from tests.support.toys import adapter, fresh, make_result

BLOCKS = 4
LAYERS = {f"block{depth}": (12, 10) for depth in range(BLOCKS, 0, -1)}
SHAPE = Shape(1000, 100, BLOCKS, 10, tuple(LAYERS.values()), 3, {name: int(name[-1]) for name in LAYERS})
STEPS, BETWEEN, FLOPS, TOKENS = (0.1, 0.25, 0.3, 0.5), 0.02, 1e6, 50
INNER = World(jitter=0.0)
MEASURED = MeasuredDevices(INNER, FLOPS, TOKENS, STEPS, BETWEEN)
CLIENT = Profile("a", 10, flops=FLOPS, up_bps=1e3, down_bps=4e3)
depths = st.integers(1, BLOCKS)


def task(depth: int, changed: int = 0) -> Task:
    """Of a client of this depth; the top `changed` blocks have learnt something."""
    learnt, born = adapter(2, layers=LAYERS), fresh(2)
    whole = Adapter(
        {
            name: factor if SHAPE.depths[name] <= changed else replace(factor, up=0 * factor.up)
            for name, factor in learnt.factors.items()
        },
        born.dense,
    )
    start = fold_layers(TaskStart(whole, "0"), SHAPE.untrained_modules(whole.factors, depth))
    return Task(1, "a", 0, start, Budget(2, 1, depth), 0.0)


def answer(of: Task, tokens: int = TOKENS) -> Result:
    return make_result(of.start.train, tokens=tokens)


def seconds(devices: Devices, of: Task, tokens: int = TOKENS, profile: Profile = CLIENT) -> Seconds:
    return devices.seconds(of, answer(of, tokens), profile, SHAPE, 0)


@given(depths)
def test_a_step_takes_what_was_measured(depth: int) -> None:
    assert seconds(MEASURED, task(depth)).train == pytest.approx(STEPS[depth - 1])
    assert MEASURED.train_seconds(CLIENT, 3, depth) == pytest.approx(3 * STEPS[depth - 1])


@given(depths, depths)
def test_blocks_between_a_change_and_the_trained_ones_are_computed_again(depth: int, changed: int) -> None:
    more = seconds(MEASURED, task(depth, changed)).train - seconds(MEASURED, task(depth)).train
    assert more == pytest.approx(BETWEEN * max(0, changed - depth), abs=1e-9)


@given(depths, st.floats(0.5, 8.0), st.integers(1, 1000))
def test_time_is_in_proportion_to_tokens_and_to_a_devices_speed(depth: int, faster: float, tokens: int) -> None:
    one, quick = task(depth), replace(CLIENT, flops=faster * FLOPS)
    expected = STEPS[depth - 1] * tokens / TOKENS / faster
    assert seconds(MEASURED, one, tokens, quick).train == pytest.approx(expected)


@given(depths, depths)
def test_links_are_those_of_the_devices(depth: int, changed: int) -> None:
    one = task(depth, changed)
    ours, theirs = seconds(MEASURED, one), seconds(INNER, one)
    assert (ours.down, ours.up) == (theirs.down, theirs.up)
    assert MEASURED.profiles({"a": 3, "b": 4}, 1) == INNER.profiles({"a": 3, "b": 4}, 1)
