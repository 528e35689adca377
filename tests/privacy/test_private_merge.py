"""Noise on sums of clipped changes: how much one client can move them, how much noise, and that nothing else reaches the method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedloom.aggregate.averaged import Averaged
from fedloom.aggregate.fedit import FedIT
from fedloom.aggregate.ffa import FFA
from fedloom.aggregate.hlora import HLoRA
from fedloom.aggregate.momentum import Momentum
from fedloom.aggregate.product_delta import ProductDelta
from fedloom.aggregate.rolora import RoLoRA
from fedloom.core.answer_change import sent_part
from fedloom.core.fingerprint import fingerprint
from fedloom.core.lora import Adapter, Factor
from fedloom.core.partial_depth import fold_layers, merge_by_layer
from fedloom.core.policies import Aggregator, Merge
from fedloom.core.server_state import State
from fedloom.core.types import Model, Update
from fedloom.privacy.private import Private
from fedloom.privacy.private_merge import PrivateMerge, added_in, shares_of, sum_clipped_changes, trained_sides
from fedloom.privacy.secret_noise import SecretNoise
from tests.support import toys
from tests.support.storms import tries
from tests.support.toys import adapter, answers, changed, mean_of, returned, sent

NOISE = SecretNoise(b"s" * 32, ("test",))
METHODS: list[Aggregator] = [FedIT(), FFA(), RoLoRA(), ProductDelta(), HLoRA(), Momentum(FFA()), Averaged(FFA())]
every_method = pytest.mark.parametrize("method", METHODS, ids=toys.called)
WIDE = {"wide": (400, 300), "tall": (500, 200)}


def released(
    method: Aggregator, model: Model, merge: Merge, noise: SecretNoise = NOISE, **more: Any
) -> tuple[Model, Any]:
    private = Private(**({"clip": 0.5, "multiplier": 1.0, "most_answers": 9} | more))
    return PrivateMerge(private, noise).release(method, State(model, model), merge)


def exact(method: Aggregator, model: Model, merge: Merge, clip: float) -> dict[str, Tensor]:
    return sum_clipped_changes(added_in(method), model, merge, clip, trained_sides(merge))


def silent(update: Update) -> Update:
    """The answer of a client that changed nothing."""
    kept = sent_part(update.task.start, update.result.adapter)
    return replace(update, result=replace(update.result, adapter=kept))


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return math.sqrt(sum(float((one[name] - other[name]).square().sum()) for name in one))


def merge_of(method: Aggregator, model: Model, rows: Sequence[tuple[int, int, float, int]]) -> Merge:
    """Answers of (rank, client, length of the change, layers left out), weighted alike."""
    updates = []
    for number, (rank, client, by, below) in enumerate(rows, 1):
        task = sent(method, model, rank, number)
        start = fold_layers(task.start, [*toys.LAYERS][:below])
        task = replace(task, client=f"c{client}", start=start)
        updates.append(returned(task, changed(start, number, by)))
    return mean_of(updates, step=0.5)


ROWS = st.lists(
    st.tuples(st.integers(1, 8), st.integers(0, 2), st.sampled_from((0.0, 1e-3, 1.0, 1e4)), st.integers(0, 1)),
    min_size=1, max_size=5,
)  # fmt: skip


@every_method
@given(rows=ROWS)
@tries(60)
def test_one_client_moves_the_sum_by_its_weight_times_the_clip(method: Aggregator, rows: list[Any]) -> None:
    """Of any ranks and depths, with any number of answers in one merge: that is what the noise and the ledger are made for."""
    model = method.init(adapter(8))
    merge = merge_of(method, model, rows)
    shares = shares_of(merge)
    for client, share in shares.items():
        without = merge.map_updates(lambda update, c=client: silent(update) if update.task.client == c else update)
        moved = distance(exact(method, model, merge, 0.5), exact(method, model, without, 0.5))
        assert moved <= 0.5 * share * (1 + 1e-9)
    _, release = released(method, model, merge, multiplier=4.0)
    largest = max(shares.values())
    assert release.spent == pytest.approx({client: share / largest / 4.0 for client, share in shares.items()})


def test_the_bound_holds_where_large_terms_cancel() -> None:
    """The norm of what is added, and not of its factors: their decomposition rounds otherwise, and finds 0 where 2e-3 is left."""
    method, clip, longest = ProductDelta(), 1e-5, 0.0
    for seed in range(300):
        model = method.init(adapter(1, seed, layers={"x": (2, 2)}))
        task = sent(method, model, 1)
        factors = {name: Factor(1e13 * one.down, one.up / 1e13) for name, one in task.start.train.factors.items()}
        odd = returned(task, replace(task.start.train, factors=factors))
        moved = exact(method, model, mean_of([odd]), clip)
        longest = max(longest, math.hypot(*(float(tensor.norm()) for tensor in moved.values())))
    assert clip / 2 < longest <= clip * (1 + 1e-9)


@pytest.mark.parametrize("method", METHODS, ids=toys.called)
def test_a_change_at_the_clip_is_reached(method: Aggregator) -> None:
    """The bound is not loose by a mistake in the norm: a long change moves the sum by just the clip."""
    model = method.init(adapter(8))
    merge = merge_of(method, model, [(8, 0, 10.0, 0)])
    assert distance(
        exact(method, model, merge, 0.5), exact(method, model, merge.map_updates(silent), 0.5)
    ) == pytest.approx(0.5)


@every_method
@pytest.mark.parametrize("as_delta", [False, True])
def test_without_noise_and_below_the_clip_it_is_the_methods_own_merge(method: Aggregator, as_delta: bool) -> None:
    model = method.init(adapter(8))
    merge = mean_of(answers(method, model, (2, 8, 5)), (0.2, 0.5, 0.3), step=0.7, as_delta=as_delta)
    after, _ = released(method, model, merge, clip=100.0, multiplier=1e-12)
    assert toys.distance(toys.function(after), toys.function(method.merge(model, merge))) < 1e-4


@every_method
@pytest.mark.parametrize("step", [1.0, 0.4])
def test_layers_of_mixed_depth_merge_as_ever(method: Aggregator, step: float) -> None:
    """A layer is averaged over those who trained it, and their noise grows as their number falls."""
    model = method.init(adapter(8))
    merge = replace(merge_of(method, model, [(8, 0, 0.1, 1), (3, 1, 0.1, 0), (8, 2, 0.1, 1)]), step=step)
    after, _ = released(method, model, merge, clip=100.0, multiplier=1e-12)
    plain = merge_by_layer(method, model, merge)
    assert toys.distance(toys.function(after), toys.function(plain)) < 1e-4
    nobody = replace(merge, weighted_updates=tuple((1.0, update) for _, update in merge.weighted_updates[:1]))
    alone, _ = released(method, model, nobody)
    below = next(iter(toys.LAYERS))
    assert alone.adapter.factors[below].up.equal(merge_by_layer(method, model, nobody).adapter.factors[below].up)


@every_method
def test_a_method_sees_nothing_of_an_answer_but_the_sum(method: Aggregator) -> None:
    """Two clients of equal weight exchange their changes and what they say: the sum is the same, and so is every byte after it."""
    model = method.init(adapter(8))
    one, other = (sent(method, model, 8, number) for number in (1, 2))
    first, second = changed(one.start, 1, 0.01), changed(one.start, 2, 0.01)
    told, silent_ = {"loss": 3.0}, dict[str, float]()
    there = [returned(one, first), returned(other, second)]
    back = [returned(one, second), returned(other, first)]
    there = [replace(u, result=replace(u.result, metrics=told, tokens=77)) for u in there]
    back = [replace(u, result=replace(u.result, metrics=silent_, tokens=1)) for u in back]
    (after, said), (again, said_again) = (released(method, model, mean_of(updates)) for updates in (there, back))
    assert fingerprint(after.adapter) == fingerprint(again.adapter)
    assert after.memory.keys() == again.memory.keys()
    assert all(fingerprint(after.memory[name]) == fingerprint(again.memory[name]) for name in after.memory)
    assert said == said_again


@pytest.mark.parametrize(("weights", "step"), [((1.0,), 1.0), ((0.5, 0.5), 1.0), ((0.2, 0.7, 0.1), 0.25)])
def test_the_deviation_is_z_times_norm_times_step_times_the_largest_weight(
    weights: tuple[float, ...], step: float
) -> None:
    method = FedIT()
    model = method.init(adapter(8, layers=WIDE))
    merge = mean_of([returned(sent(method, model, 8, k)) for k in range(len(weights))], weights, step=step)
    after, _ = released(method, model, merge, clip=2.0, multiplier=3.0)
    wanted = 3.0 * 2.0 * step * max(weights)
    for side in ("down", "up"):  # 4000 and 7200 entries: 4 standard errors
        pairs = [(getattr(after.adapter.factors[n], side), getattr(f, side)) for n, f in model.adapter.factors.items()]
        entries = torch.cat([(a.double() - b.double()).flatten() for a, b in pairs])
        assert float(entries.std()) == pytest.approx(wanted, rel=4 / (2 * len(entries)) ** 0.5)
        assert float(entries.pow(4).mean()) / wanted**4 == pytest.approx(3.0, abs=0.5)  # a Gaussian
    assert bool((after.adapter.dense["head"] != model.adapter.dense["head"]).all())


def test_products_get_noise_in_every_entry_of_the_matrix_before_they_are_cut() -> None:
    """What is cut away is post-processing: the model moves by the best part of a full Gaussian matrix."""
    method, size = ProductDelta(rank=40), {"only": (40, 60)}
    model = method.init(adapter(2, layers=size))
    after, _ = released(method, model, mean_of([returned(sent(method, model, 2))]), clip=10.0)
    plain = method.merge(model, mean_of([returned(sent(method, model, 2))]))
    entries = (toys.products(after.adapter)["only"] - toys.products(plain.adapter)["only"]).flatten()
    assert float(entries.std()) == pytest.approx(10.0, rel=0.06)


def test_the_cut_leaves_no_more_noise_than_the_best_directions_of_a_gaussian_matrix() -> None:
    """sqrt(rank) (sqrt(d_out) + sqrt(d_in)) deviations, of sqrt(d_out d_in) in the whole matrix: as much as noise on both factors."""
    method, rank, d_out, d_in = ProductDelta(), 4, 90, 160
    model = method.init(adapter(rank, layers={"only": (d_out, d_in)}))
    merge = mean_of([returned(sent(method, model, rank))])
    after, _ = released(method, model, merge, clip=0.1)
    entries = toys.products(after.adapter)["only"] - toys.products(method.merge(model, merge).adapter)["only"]
    most = 0.1 * rank**0.5 * (d_out**0.5 + d_in**0.5)
    assert most / 2 < float(entries.norm()) < most


def test_a_side_that_nobody_trained_gets_none() -> None:
    for method in (FFA(), RoLoRA()):
        model = method.init(adapter(8))
        after, _ = released(method, model, mean_of(answers(method, model, (2, 8))))
        assert all(f.down.equal(model.adapter.factors[n].down) for n, f in after.adapter.factors.items())


def test_the_same_release_has_the_same_bytes_and_any_other_one_other_noise() -> None:
    """Two noises for one value would be averaged away, one noise for two values subtracted."""
    method = FedIT()
    model = method.init(adapter(8))
    merge = mean_of(answers(method, model, (8, 8)))
    after, release = released(method, model, merge)
    again, same = released(method, model, merge)
    assert (fingerprint(after.adapter), release) == (fingerprint(again.adapter), same)
    heavier = replace(merge, weighted_updates=tuple((2 * w, u) for w, u in merge.weighted_updates))
    later = PrivateMerge(Private(clip=0.5, multiplier=1.0, most_answers=9), NOISE)
    others = [
        released(method, model, mean_of(answers(method, model, (8, 8), first=3)))[1],
        released(method, model, merge, multiplier=2.0)[1],
        released(method, model, merge, clip=0.4)[1],
        released(method, model, merge, SecretNoise(b"t" * 32, ("test",)))[1],
        later.release(method, State(model, model, version=1), merge)[1],
        released(method, model, heavier)[1],
    ]
    assert len({release.value, *(one.value for one in others)}) == 7


def test_a_change_that_is_not_finite_counts_as_none() -> None:
    method = FedIT()
    model = method.init(adapter(8))
    task = sent(method, model, 8)
    lost = Adapter(
        {n: Factor(f.down * float("nan"), f.up) for n, f in task.start.train.factors.items()}, task.start.train.dense
    )
    for how in (method, ProductDelta()):
        sums = exact(how, model, mean_of([returned(task, lost)]), 1.0)
        assert not any(bool(tensor.any()) for tensor in sums.values())


def test_a_long_change_hidden_in_two_terms_that_cancel_is_clipped_by_its_true_length() -> None:
    """Factors of 1e8 whose product moves by 1e-3 and by 1: Gram matrices in float64 would lose both."""
    method = ProductDelta()
    model = method.init(adapter(2, layers={"only": (12, 10)}))
    task = sent(method, model, 2)
    start = task.start.train.factors["only"]
    grown = Factor(start.down * 2.0**20, start.up / 2.0**20 + 2.0**-20 * toys.factor(2, 12, 10, seed=5).up)
    answer = Adapter({"only": grown}, task.start.train.dense)
    merge = mean_of([returned(task, answer)])
    moved = exact(method, model, merge, 0.5)
    assert math.sqrt(sum(float(tensor.square().sum()) for tensor in moved.values())) == pytest.approx(0.5, rel=1e-9)
