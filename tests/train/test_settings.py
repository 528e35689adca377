"""The learning rate over a task, and settings that make no sense."""

from __future__ import annotations

from typing import Any

import pytest

from fedloom.core.errors import Refused
from fedloom.train.settings import LoRA, Training, constant, cosine, linear


def rates(steps: int = 8, **more: Any) -> list[float]:
    return [Training(learning_rate=1.0, **more).rate(step, steps) for step in range(steps)]


def test_a_constant_rate_stays() -> None:
    assert rates(decay=constant) == [1.0] * 8


def test_a_linear_rate_starts_whole_and_falls_evenly() -> None:
    assert rates(4, decay=linear) == [1.0, 0.75, 0.5, 0.25]


def test_a_cosine_rate_starts_whole_and_is_half_way_at_half_time() -> None:
    found = rates(decay=cosine)
    assert found[0] == 1.0
    assert found[4] == pytest.approx(0.5)
    assert found == sorted(found, reverse=True)


def test_warmup_rises_evenly_and_never_starts_at_zero() -> None:
    assert rates(warmup=0.25) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1])
    assert rates(6, warmup=0.5, decay=linear) == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 2 / 3, 1 / 3])


@pytest.mark.parametrize("decay", [constant, linear, cosine])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_every_step_learns_something(decay: Any, steps: int) -> None:
    assert all(0 < rate <= 1 for rate in rates(steps, decay=decay, warmup=0.3))


@pytest.mark.parametrize(
    ("made", "field"),
    [
        (lambda: Training(learning_rate=0), "training.learning_rate"),
        (lambda: Training(batch_size=0), "training.batch_size"),
        (lambda: Training(max_length=3), "training.max_length"),
        (lambda: Training(warmup=1.0), "training.warmup"),
        (lambda: Training(weight_decay=-1), "training.weight_decay"),
        (lambda: Training(clip=0), "training.clip"),
        (lambda: LoRA(scaling=0), "lora.scaling"),
        (lambda: LoRA(dropout=1.0), "lora.dropout"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_by_name(made: Any, field: str) -> None:
    with pytest.raises(Refused) as refusal:
        made()
    assert refusal.value.field == field
