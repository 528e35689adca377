"""Training by DP-SGD: what a task makes of its examples, what is told of them, and what goes on to work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedloom.core.errors import Refused
from fedloom.core.lora import named_tensors
from fedloom.core.partial_depth import fold_layers
from fedloom.core.types import Budget, ClientState, Pruning, Rules, Task
from fedloom.core.validate_answer import why_invalid
from fedloom.privacy.private import Private
from fedloom.privacy.record_draws import RecordDraws
from fedloom.train.base_model import Base, initial_adapter, load_base
from fedloom.train.settings import Engine, LoRA, trial_steps
from fedloom.train.trainer import PeftTrainer, require_private_records
from tests.support.tiny_runs import base_of, lively, same, still, task_of, trainer_of
from tests.support.toys import aggregators

pytestmark = pytest.mark.slow

PRIVATE = Private(clip=1.0, multiplier=1.0, most_answers=10, unit="record")


def private(base: Base, multiplier: float = 1.0, clip: float = 1.0, **training: Any) -> PeftTrainer:
    records = replace(PRIVATE, clip=clip, multiplier=multiplier)
    return replace(trainer_of(base, max_length=32, **training), records=records)


def asked(base: Base, steps: int = 4, number: int = 1, **rules: Any) -> Task:
    task = task_of(lively(initial_adapter(base, 4)), "a", steps, number)
    return replace(task, start=replace(task.start, rules=Rules(**rules)))


def test_nothing_exact_is_told_and_the_same_task_gives_the_same_bytes(encoder: Path) -> None:
    base = base_of(encoder, dropout=0.1)
    trainer, work = private(base, batch_size=8), [(asked(base), ClientState())]
    ((one, _),), ((other, _),) = trainer.train(work), trainer.train(work)
    assert same(one.adapter, other.adapter)
    assert one.metrics == {}
    assert one.tokens == trainer.unchanged_result(work[0][0]).tokens == 4 * 8 * 32, "as many as there may be"
    assert len({len(batch) for batch in trainer.batches(work[0][0])}) > 1


def test_masks_are_drawn_from_all_bits_of_the_secret_and_anew_in_each_part_of_a_task(encoder: Path) -> None:
    """LoRA-A2 trains in two parts, a trial and the rest; the reference generator is numpy's."""
    base = base_of(encoder, dropout=0.1)
    trainer, task, states = private(base), asked(base, select=6), list[torch.Tensor]()
    base.model.register_forward_pre_hook(lambda *_: states.append(torch.get_rng_state()))
    trainer.train([(task, ClientState())])
    expected, draws = list[torch.Tensor](), RecordDraws(trainer.secret_of("a"), trainer.run, task.id)
    for step in (0, trial_steps(4)):
        reference = np.random.MT19937()
        words = draws.dropout_words(step).numpy().astype(np.uint32)
        reference.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": len(words)}}
        expected.append(torch.from_numpy((reference.random_raw(2000) % 2**24 / 2**24).astype(np.float32)))
    drawn = []
    with torch.random.fork_rng():
        for state in states:
            torch.set_rng_state(state)
            drawn.append(torch.rand(2000))
    assert torch.equal(drawn[0], expected[0])
    assert any(torch.equal(one, expected[1]) for one in drawn[1:])


def test_without_noise_and_clipping_it_is_the_mean_over_the_expected_batch(encoder: Path) -> None:
    base = still(base_of(encoder))
    task = asked(base, steps=1)
    trainer = private(base, multiplier=1e-9, clip=1e3, batch_size=8)
    ((_, state),) = trainer.train([(task, ClientState())])
    (batch,) = trainer.batches(task)
    plain = replace(trainer_of(base, batch_size=len(batch), clip=1e9), shards={"a": tuple(batch)})
    ((_, expected),) = plain.train([(task, ClientState())])
    for name, moments in expected.moments.items():  # after one step exp_avg is a tenth of the gradient
        slope = moments["exp_avg"] * len(batch) / 8
        error = float((state.moments[name]["exp_avg"] - slope).abs().max())
        assert error <= 1e-3 * float(slope.abs().max()), "but for the grid"


def test_steps_without_examples_are_steps(encoder: Path) -> None:
    base = base_of(encoder)
    trainer = replace(private(base, batch_size=1), shards={"a": tuple(range(50))})
    task = asked(base, steps=30)
    assert sum(not batch for batch in trainer.batches(task)) > 1
    ((result, _),) = trainer.train([(task, ClientState())])
    assert all(tensor.isfinite().all() for tensor in named_tensors(result.adapter).values())


@pytest.mark.parametrize(
    "rules",
    [{"frozen": ("down",)}, {"private": ("up",)}, {"select": 6}, {"pruning": Pruning(keep=0.5)}, {"up_rate": 4.0}],
)
def test_what_follows_from_noisy_gradients_goes_on_to_work(encoder: Path, rules: dict[str, Any]) -> None:
    base = base_of(encoder)
    task = asked(base, **rules)
    ((result, _),) = private(base, proximal=0.1).train([(task, ClientState())])
    for side in task.start.rules.unchanged:
        for name, factor in result.adapter.factors.items():
            assert torch.equal(getattr(factor, side), getattr(task.start.train.factors[name], side))
    assert not same(result.adapter, task.start.train)


def test_a_task_of_every_method_is_answered(encoder: Path) -> None:
    base = base_of(encoder)
    trainer = private(base)
    for number, method in enumerate(aggregators(), 1):
        model = method.init(lively(initial_adapter(base, 4)))
        task = replace(task_of(model.adapter, "a", 2, number), start=method.start(model, Budget(4, 2), number))
        ((result, _),) = trainer.train([(task, ClientState())])
        assert why_invalid(task, result) is None, type(method).__name__


@pytest.mark.parametrize("cache", [0, 10**9])
def test_a_task_of_less_depth_trains_its_own_layers_as_it_would_without_noise(encoder: Path, cache: int) -> None:
    base = still(base_of(encoder))
    task = asked(base, steps=1)
    top = fold_layers(task.start, base.shape().untrained_modules(task.start.train.factors, 1))
    task = replace(task, start=top, budget=replace(task.budget, depth=1))
    everybody = {"a": tuple(range(8))}
    trainer = replace(private(base, multiplier=1e-9, clip=1e3, batch_size=8), shards=everybody)
    trainer = replace(trainer, engine=replace(trainer.engine, cache=cache))
    ((result, state),) = trainer.train([(task, ClientState())])
    assert result.adapter.factors.keys() == top.train.factors.keys() != initial_adapter(base, 4).factors.keys()
    plain = replace(trainer_of(base, batch_size=8, clip=1e9), shards=everybody)
    ((_, expected),) = plain.train([(task, ClientState())])
    assert expected.moments.keys() == state.moments.keys()
    for name, moments in expected.moments.items():
        slope = moments["exp_avg"]
        error = float((state.moments[name]["exp_avg"] - slope).abs().max())
        assert error <= 1e-3 * float(slope.abs().max()), "but for the grid"


def test_moments_go_on_from_task_to_task(encoder: Path) -> None:
    base = base_of(encoder)
    trainer = private(base)
    ((_, state),) = trainer.train([(asked(base), ClientState())])
    ((_, after),) = trainer.train([(asked(base, number=2), state)])
    assert {float(moments["step"]) for moments in after.moments.values()} == {8.0}


def test_tasks_of_private_records_share_no_pass(encoder: Path) -> None:
    base = base_of(encoder)
    trainer = private(base)
    trainer = replace(trainer, engine=replace(trainer.engine, together=4))
    assert len(trainer.groups([(asked(base, number=k), ClientState()) for k in (1, 2)])) == 2


def test_what_cannot_be_private_is_refused_by_name(encoder: Path) -> None:
    base = base_of(encoder)
    with pytest.raises(Refused, match=r"training\.stratified"):
        private(base, stratified=True)
    coarse = load_base(str(encoder), 2, LoRA(), 4, seed=3, engine=Engine("torch", bfloat16=True))
    with pytest.raises(Refused, match="bfloat16"):
        require_private_records(coarse, trainer_of(base).training)
    base.trials["examples"] = False
    with pytest.raises(Refused, match=r"privacy\.unit .*BertForSequenceClassification"):
        require_private_records(base, trainer_of(base).training)


def test_one_example_moves_a_step_by_no_more_than_the_clip(encoder: Path) -> None:
    """Neighbours, on the trainer itself: the same coins, one text another; their sums differ by two clips at most."""
    base = still(base_of(encoder))
    task, clip = asked(base, steps=1), 0.01
    trainer = private(base, multiplier=1e-7, clip=clip, batch_size=30)  # everybody takes part
    ids = list(trainer.texts.ids)
    ids[3] = ids[3][::-1]
    other = replace(trainer, texts=replace(trainer.texts, ids=tuple(ids)))
    moved = []
    for one in (trainer, other):
        ((_, state),) = one.train([(task, ClientState())])
        moved.append(torch.cat([m["exp_avg"].flatten() for m in state.moments.values()]).double() * 10 * 30)
    gap = float((moved[0] - moved[1]).norm())
    assert 0.1 * clip < gap <= 2 * clip * (1 + 1e-3), "exchanged: taken away and added"
    assert float(moved[0].norm()) <= 30 * clip * (1 + 1e-3)
