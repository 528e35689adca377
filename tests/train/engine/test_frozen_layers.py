"""Training the top layers alone: what lies below is computed once, and never an old one."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from fedloom.core.lora import Adapter
from fedloom.core.types import ClientState, Task
from fedloom.train import peft_weights
from fedloom.train.base_model import Base, initial_adapter
from fedloom.train.engine import frozen_layers
from fedloom.train.settings import PLAIN
from fedloom.train.trainer import PeftTrainer, enable_gradients
from tests.support.tiny_runs import base_of, lively, same, task_of, trainer_of
from tests.support.toys import factor

KINDS = pytest.mark.parametrize("kind", ["encoder", "decoder"])
ROOM = replace(PLAIN, cache=1_000_000)


def top(adapter: Adapter) -> Adapter:
    """The second of the two layers, and the head."""
    return Adapter({n: f for n, f in adapter.factors.items() if ".1." in n}, adapter.dense)


def fold_of(adapter: Adapter, seed: int) -> Adapter:
    return Adapter({n: factor(2, len(f.up), f.down.shape[1], seed) for n, f in adapter.factors.items()})


def shallow(base: Base, number: int = 1, fold: int | None = None, steps: int = 3) -> Task:
    """A task that trains the top layer, over a fold of all layers."""
    start = lively(initial_adapter(base, 4))
    task = task_of(top(start), number=number, steps=steps)
    return replace(task, start=replace(task.start, fold=None if fold is None else fold_of(start, fold)))


def trained(trainer: PeftTrainer, task: Task) -> Adapter:
    ((result, _),) = trainer.train([(task, ClientState())])
    return result.adapter


@KINDS
@pytest.mark.parametrize("fold", [None, 5])
def test_loss_and_gradients_are_those_of_the_whole_model(
    request: pytest.FixtureRequest, kind: str, fold: int | None
) -> None:
    base = base_of(request.getfixturevalue(kind))
    for module in base.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    task, texts = shallow(base, fold=fold), trainer_of(base).texts
    slot = base.put(task.start.train, fold=task.start.fold)
    weights = enable_gradients(peft_weights.slot_parameters(base.model, slot), task.start)
    place = frozen_layers.split_layers(base, [*task.start.train.factors])
    assert place is not None
    below = frozen_layers.frozen_features(
        base, texts, place, range(30), task.start.fold, frozen_layers.ActivationCache(), 0
    )
    found = []
    for begin in (place.starting_from(below.for_batch([7, 3, 20, 11])), nullcontext()):
        with begin:
            loss = base.model.train()(**texts.batch([7, 3, 20, 11], base.device)).loss
        slopes = torch.autograd.grad(loss, [*weights.values()])
        found.append([loss.detach(), *slopes])
    assert len(weights) == 2 * len(task.start.train.factors) + len(task.start.train.dense)
    for ours, theirs in zip(*found, strict=True):
        assert float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm())


def test_only_what_the_start_holds_is_trained_and_sent_back(encoder: Path) -> None:
    base = base_of(encoder)
    task = shallow(base)
    ours = trained(trainer_of(base), task)
    assert ours.factors.keys() == task.start.train.factors.keys()
    assert all(not torch.equal(f.up, task.start.train.factors[n].up) for n, f in ours.factors.items())


@KINDS
def test_a_hit_a_miss_and_no_cache_at_all_give_the_same_bytes(request: pytest.FixtureRequest, kind: str) -> None:
    base = base_of(request.getfixturevalue(kind), dropout=0.1)
    tasks = [shallow(base, number, fold) for number, fold in ((1, 3), (2, 3), (3, 4), (4, 3), (5, None))]
    warm, small = replace(trainer_of(base), engine=ROOM), replace(trainer_of(base), engine=replace(PLAIN, cache=9_000))
    for task in tasks:
        alone = trained(trainer_of(base), task)
        assert same(trained(warm, task), alone)
        assert same(trained(small, task), alone)
    assert len(warm.cache.entries) == 3  # two folds and none
    assert trainer_of(base).cache.entries == {}


def test_the_layers_below_are_not_computed_again(encoder: Path) -> None:
    base = base_of(encoder)
    trainer = replace(trainer_of(base), engine=ROOM)
    calls = []
    lowest = base.model.get_base_model().get_submodule("bert.encoder.layer.0")
    hook = lowest.register_forward_hook(lambda *_: calls.append(1))
    trained(trainer, shallow(base, 1, 3, steps=2))  # one pass over 30 examples in batches of 16
    first = len(calls)
    trained(trainer, shallow(base, 2, 3, steps=2))
    hook.remove()
    assert (first, len(calls)) == (4, 4)  # eight at a time


def test_the_blocks_are_all_there_again_and_dropout_is_on_above_only(encoder: Path) -> None:
    base = base_of(encoder, dropout=0.5)
    before = [name for name, _ in base.model.named_modules()]
    below = [
        module for name, module in base.model.named_modules() if ".layer.0." in name and isinstance(module, nn.Dropout)
    ]
    seen = []
    hooks = [module.register_forward_hook(lambda m, *_: seen.append(m.training)) for module in below]
    trained(trainer_of(base), shallow(base))
    for hook in hooks:
        hook.remove()
    assert [name for name, _ in base.model.named_modules()] == before
    assert seen
    assert not any(seen)


def test_an_error_on_the_way_leaves_the_model_whole(encoder: Path) -> None:
    base = base_of(encoder)
    place = frozen_layers.split_layers(base, [n for n in lively(initial_adapter(base, 4)).factors if ".1." in n])
    assert place is not None
    before = [name for name, _ in base.model.named_modules()]
    with pytest.raises(RuntimeError), place.starting_from(torch.zeros(3, 3, 3)):
        base.model(input_ids=torch.zeros(1, 2, dtype=torch.long))
    assert [name for name, _ in base.model.named_modules()] == before
    base.model.eval()
    assert len(place.frozen_output(base.model, {"input_ids": torch.zeros(1, 2, dtype=torch.long)})) == 1


def test_the_cache_throws_away_what_was_not_used_for_longest() -> None:
    cache = frozen_layers.ActivationCache()
    for key in "abc":
        cache.entry(key)[0] = torch.zeros(10)
    cache.entry("a")
    cache.trim(80)
    assert [*cache.entries] == ["c", "a"]
    cache.trim(0)
    assert not cache.entries


def test_all_layers_trained_or_a_layer_outside_of_the_blocks_means_the_plain_way(encoder: Path) -> None:
    base = base_of(encoder)
    names = [*initial_adapter(base, 4).factors]
    assert frozen_layers.split_layers(base, names) is None
    assert frozen_layers.split_layers(base, ["classifier.dense"]) is None
    firsts = [frozen_layers.split_layers(base, names[i:]) for i in range(len(names) // 2, len(names))]
    assert [place and place.first for place in firsts] == [1] * len(firsts)
    assert all(a == b for a, b in pairwise(firsts))
