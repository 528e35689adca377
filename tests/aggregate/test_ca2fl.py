"""CA2FL (ICLR 2024, Alg. 1): v = h + sum_k p_k (Delta_k - h_k), h = (1/N) sum_i h_i, w <- w + eta v, h_k <- Delta_k."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedloom.aggregate.ace import ACE
from fedloom.aggregate.ca2fl import CA2FL
from fedloom.aggregate.clip import Clip
from fedloom.aggregate.fedit import FedIT
from fedloom.aggregate.fedplora import FedPLoRA
from fedloom.aggregate.fedsa import FedSA
from fedloom.aggregate.ffa import FFA
from fedloom.aggregate.hlora import HLoRA
from fedloom.aggregate.lora_a2 import LoRAA2
from fedloom.aggregate.momentum import Momentum
from fedloom.aggregate.product_delta import ProductDelta
from fedloom.aggregate.rolora import RoLoRA
from fedloom.aggregate.shared.client_changes import CHANGE, COUNT, SUM, TRAINED
from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter, Factor, map_tensors
from fedloom.core.policies import Aggregator
from fedloom.core.types import Model, Update
from tests.support import toys
from tests.support.equations import (
    Round,
    Values,
    delta,
    last_change,
    mean_of_last,
    memory_values,
    now_last,
    redirected,
    values,
)
from tests.support.oracles import dead, oracle_of
from tests.support.toys import adapter, answers, changed, mean_of, returned, sent

BOTH: Any = [CA2FL, ACE]


def oracle(m: CA2FL, r: Round) -> Values:
    """The wrapped method's equation, of corrected answers: sum_k p_k (Delta_k - h_k + h)."""
    h = mean_of_last(r.own, memory_values(r, CHANGE), memory_values(r, TRAINED), m.clients)
    corrected = redirected(r, lambda c, key: delta(c, key, r.own[key]) - last_change(r, c.name, key) + h[key])
    after = oracle_of(m.inner)(m.inner, corrected)
    known = {} if dead(r, after) else now_last(r)
    return after | {f"{CHANGE}{name}:{key}": x for name, one in known.items() for key, x in one.items()}


def answer(method: Aggregator, model: Model, client: str, rank: int, number: int, by: float = 0.3) -> Update:
    """What this client gives back to `model` after some training."""
    task = replace(sent(method, model, rank, number), client=client)
    return replace(returned(task, changed(task.start, number, by)), base=model)


def moved(of: Update) -> Values:
    """Delta_k, in its own directions."""
    gave, got = values(of.result.adapter), values(of.task.start.train)
    return {key: gave[key] - got[key] for key in gave}


def close(model: Model, wanted: Values, atol: float = 3e-5) -> None:
    for key, x in values(model.adapter).items():
        torch.testing.assert_close(x, wanted[key], rtol=0, atol=atol)


def test_equal_ranks_are_the_papers_algorithm() -> None:
    """Literally, from a state of our own: mean over all N, clients not heard of with 0; late answers, one client twice."""
    method, draw, n = CA2FL(clients=6), random.Random(1), 6
    models = [method.init(adapter(4))]
    w = values(models[0].adapter)
    h = {i: {key: torch.zeros_like(x) for key, x in w.items()} for i in range(n)}
    for turn in range(12):
        who, eta = [draw.randrange(4) for _ in range(3)], draw.choice((1.0, 0.3))
        given = [answer(method, draw.choice(models[-3:]), f"c{i}", 4, 10 * turn + k) for k, i in enumerate(who)]
        p = (0.5, 0.3, 0.2)
        for key in w:
            mean = torch.stack([h[i][key] for i in range(n)]).sum(0) / n
            v = mean + torch.stack(
                [p[k] * (moved(u)[key] - h[i][key]) for k, (i, u) in enumerate(zip(who, given, strict=True))]
            ).sum(0)
            w[key] = w[key] + eta * v
        for i, update in zip(who, given, strict=True):
            h[i] = moved(update)
        models.append(method.merge(models[-1], mean_of(given, p, step=eta, as_delta=True)))
        close(models[-1], w)


@pytest.mark.parametrize("inner", [FedIT(), FFA(), RoLoRA()], ids=toys.called)
def test_mixed_ranks_and_stale_bases(inner: Aggregator) -> None:
    """Direction by direction, over several merges, from a state of our own: only who trains a direction is corrected there."""
    n, draw = 5, random.Random(2)
    method, ranks = CA2FL(inner, clients=n), {"c0": 2, "c1": 8, "c2": 4, "c3": 8}
    models = [method.init(adapter(8))]
    w, h, on = values(models[0].adapter), dict[str, Values](), dict[str, Values]()
    for turn in range(12):
        who, p, eta = draw.sample(sorted(ranks), 3), (0.5, 0.3, 0.2), draw.choice((1.0, 0.4))
        given = [answer(method, draw.choice(models[-3:]), c, ranks[c], 10 * turn + k) for k, c in enumerate(who)]
        common = mean_of_last(w, h, on, n)
        new = dict(w)
        for share, client, update in zip(p, who, given, strict=True):
            rank, kept = ranks[client], update.task.start.rules.unchanged
            for key in w:
                rows = slice(rank) if w[key].dim() == 2 else slice(None)
                if {"A": "down", "B": "up"}.get(key[-1]) in kept:
                    continue
                old = h.get(client, {}).get(key, torch.zeros_like(w[key]))
                new[key] = new[key].clone()
                new[key][rows] += eta * share * (moved(update)[key] - old[rows] + common[key][rows])
        for client, update in zip(who, given, strict=True):
            h[client], on[client] = remember_answer(w, h.get(client), on.get(client), update, ranks[client])
        w = new
        models.append(method.merge(models[-1], mean_of(given, p, step=eta, as_delta=True)))
        close(models[-1], w)


def remember_answer(w: Values, h: Values | None, on: Values | None, update: Update, rank: int) -> tuple[Values, Values]:
    """h_k and what k has ever trained, after this answer."""
    h = {key: x.clone() for key, x in (h or {key: torch.zeros_like(x) for key, x in w.items()}).items()}
    on = {key: x.clone() for key, x in (on or {key: torch.zeros_like(x) for key, x in w.items()}).items()}
    for key in w:
        if {"A": "down", "B": "up"}.get(key[-1]) not in update.task.start.rules.unchanged:
            rows = slice(rank) if w[key].dim() == 2 else slice(None)
            h[key][rows], on[key][rows] = moved(update)[key], 1.0
    return h, on


def test_a_merge_of_models_is_one_of_changes_where_all_started_from_the_servers() -> None:
    """(1 - eta) w + eta sum_k p_k (w_k - h_k + h)."""
    method = CA2FL(clients=4)
    model = method.merge(method.init(adapter(8)), mean_of(answers(method, method.init(adapter(8)), (8, 8))))
    given = answers(method, model, (8, 8), first=2)
    both = [method.merge(model, mean_of(given, (0.7, 0.3), step=0.6, as_delta=form)) for form in (False, True)]
    close(both[0], values(both[1].adapter), 1e-6)


@pytest.mark.parametrize("wrapper", BOTH)
def test_the_sum_does_not_drift(wrapper: Any) -> None:
    """After 1000 merges the running sum is, to the bit, what adding everything up anew gives."""
    method, draw = wrapper(FFA(), clients=7), random.Random(3)
    model = method.init(adapter(2, layers={"only": (4, 3)}))
    for turn in range(1000):
        client, size = draw.randrange(7), 10.0 ** draw.uniform(-3, 0)
        model = method.merge(
            model, mean_of([answer(method, model, f"c{client}", 1 + client % 2, turn, size)], step=1e-3)
        )
    anew = [kept for name, kept in model.memory.items() if name.startswith(CHANGE)]
    assert len(anew) == 7
    wanted = map_tensors(lambda *all_: torch.stack([x.double() for x in all_]).sum(0), *anew)
    for key, x in values(model.memory[SUM]).items():
        assert torch.equal(x, values(wanted)[key])
    (count,) = model.memory[COUNT].factors.values()
    assert count.up.tolist() == [[7.0, 3.0]]  # four of seven have rank 1


@pytest.mark.parametrize("wrapper", BOTH)
@pytest.mark.parametrize("inner", [FFA(), RoLoRA(), FedSA(), LoRAA2(freeze_head=True)], ids=toys.called)
def test_a_side_that_a_client_did_not_train_is_not_its_contribution(wrapper: Any, inner: Aggregator) -> None:
    """What rests keeps what is remembered of it; what nobody of a merge trained does not move."""
    method = wrapper(inner, clients=3)
    model = method.init(adapter(8))
    for turn in range(6):
        update = answer(method, model, f"c{turn % 2}", 8, turn)
        after = method.merge(model, mean_of([update], step=0.5, as_delta=True))
        kept, name = update.task.start.rules.unchanged, CHANGE + update.task.client
        assert kept
        for side in ("down", "up"):
            for layer in model.adapter.factors:
                pair = [getattr(one.adapter.factors[layer], side) for one in (model, after)]
                assert torch.equal(*pair) == (side in kept)
                if name in model.memory and side in kept:
                    pair = [getattr(one.memory[name].factors[layer], side) for one in (model, after)]
                    assert torch.equal(*pair)
        assert torch.equal(model.adapter.dense["head"], after.adapter.dense["head"]) == ("dense" in kept)
        model = after


@pytest.mark.parametrize("wrapper", BOTH)
def test_a_direction_that_a_client_did_not_select_is_left_alone(wrapper: Any) -> None:
    """LoRA-A2 clients choose their directions themselves: who left one alone has not trained it."""
    method = wrapper(LoRAA2(), clients=2)
    model = method.init(adapter(8))
    model = replace(method.merge(model, mean_of([answer(method, model, "c0", 8, 1)])), phase=0)
    task = replace(sent(method, model, 8, 2), client="c1")
    chosen = {n: Factor(f.down, f.up + (torch.arange(8) < 3)) for n, f in task.start.train.factors.items()}
    after = method.merge(model, mean_of([returned(task, Adapter(chosen, task.start.train.dense))]))
    for name, f in after.adapter.factors.items():
        assert torch.equal(f.up[:, 3:], model.adapter.factors[name].up[:, 3:])
        assert not torch.equal(f.up[:, :3], model.adapter.factors[name].up[:, :3])
        assert after.memory[TRAINED + "c1"].factors[name].up.tolist() == [[1.0] * 3 + [0.0] * 5]
        assert after.memory[COUNT].factors[name].up.tolist() == [[2.0] * 3 + [1.0] * 5]


@pytest.mark.parametrize("wrapper", BOTH)
def test_low_ranks_have_no_say_in_the_directions_above_theirs(wrapper: Any) -> None:
    """Law 8 with a memory: c1 alone holds 3 to 8, so the mean of the last changes there is its own."""
    method = wrapper(FedPLoRA(), clients=2)
    model = method.init(adapter(8))
    low, high = answer(method, model, "c0", 2, 1), answer(method, model, "c1", 8, 2)
    model = method.merge(model, mean_of([low, high], as_delta=True))
    slots = torch.tensor(low.task.start.directions)
    alone = torch.ones(8, dtype=torch.bool).index_fill(0, slots, False)
    for name, count in model.memory[COUNT].factors.items():
        assert count.up[0, alone].unique().tolist() == [1.0]
        assert count.up[0, slots].unique().tolist() == [2.0]
        own = high.result.adapter.factors[name].up - high.task.start.train.factors[name].up
        sum_ = model.memory[SUM].factors[name].up
        torch.testing.assert_close(sum_[:, alone].float(), own[:, alone])


def low_only(method: Aggregator) -> tuple[Model, Model, Model]:
    """Version 1 after full ranks, 2 after a round of rank 2 in which FedIT draws the directions above anew, and 0."""
    first = method.init(adapter(8))
    second = method.merge(first, mean_of([answer(method, first, f"c{k}", 8, k) for k in (1, 2)]))
    third = method.merge(second, mean_of([answer(method, second, f"c{k}", 2, 10 + k) for k in (1, 2)]))
    assert third.basis == second.basis + 1
    return third, second, first


def test_a_redrawn_basis_clears_the_memory() -> None:
    model, before, _ = low_only(CA2FL(clients=3))
    assert {name for name in before.memory if name.startswith(CHANGE)} == {CHANGE + "c1", CHANGE + "c2"}
    assert model.memory.keys() == {SUM, COUNT}
    assert not any(bool(x.any()) for x in values(model.memory[SUM]).values())
    assert all(bool((x == 3).all()) for x in values(model.memory[COUNT]).values())


def test_an_answer_from_before_the_basis_was_redrawn_is_merged_as_it_is_and_not_remembered() -> None:
    method = CA2FL(clients=3)
    model, before, _ = low_only(method)
    model = method.merge(model, mean_of([answer(method, model, "c1", 8, 20)], as_delta=True))
    old, new = answer(method, before, "c2", 8, 21), answer(method, model, "c1", 8, 22)
    plain = FedIT().merge(model, mean_of([old], step=0.5, as_delta=True))
    after = method.merge(model, mean_of([old], step=0.5, as_delta=True))
    close(after, values(plain.adapter), 1e-7)
    assert {key for key in after.memory if key.startswith(CHANGE)} == {CHANGE + "c1"}
    mixed = method.merge(model, mean_of([old, new], as_delta=True))
    assert not torch.allclose(
        mixed.adapter.dense["head"], FedIT().merge(model, mean_of([old, new], as_delta=True)).adapter.dense["head"]
    )


def test_of_two_answers_of_one_client_the_later_task_is_its_last() -> None:
    method = CA2FL(clients=3)
    model = method.init(adapter(8))
    early, late = answer(method, model, "c1", 8, 1), answer(method, model, "c1", 8, 2)
    for given in ([early, late], [late, early]):
        kept = method.merge(model, mean_of(given, as_delta=True)).memory[CHANGE + "c1"]
        for key, x in values(kept).items():
            torch.testing.assert_close(x, moved(late)[key], rtol=0, atol=1e-6)


def test_the_variance_of_partial_participation_is_gone() -> None:
    """Clients who always change by the same: whoever answers, the step is the mean of all of them."""
    method, by = CA2FL(FFA(), clients=3), {"c0": 1.0, "c1": 2.0, "c2": 6.0}
    model = method.init(adapter(2))

    def same(model: Model, client: str, number: int) -> Update:
        task = replace(sent(method, model, 2, number), client=client)
        grown = {n: Factor(f.down, f.up + by[client]) for n, f in task.start.train.factors.items()}
        return returned(task, Adapter(grown, task.start.train.dense))

    model = method.merge(model, mean_of([same(model, client, k) for k, client in enumerate(by)], as_delta=True))
    for k, client in enumerate(("c2", "c0", "c2", "c1")):
        after = method.merge(model, mean_of([same(model, client, 10 + k)], step=0.5, as_delta=True))
        step: Tensor = after.adapter.factors["query"].up - model.adapter.factors["query"].up
        torch.testing.assert_close(step, torch.full_like(step, 1.5), rtol=0, atol=1e-5)
        model = after


@pytest.mark.parametrize("wrapper", BOTH)
@pytest.mark.parametrize("inner", [HLoRA(), ProductDelta(), Clip(HLoRA())], ids=toys.called)
def test_products_are_refused(wrapper: Any, inner: Aggregator) -> None:
    with pytest.raises(Refused, match="kept entry by entry"):
        wrapper(inner)


@pytest.mark.parametrize("wrapper", BOTH)
@pytest.mark.parametrize(
    ("inner", "why"),
    [(Momentum(ACE()), "enough"), (CA2FL(), "enough")],
    ids=lambda x: toys.called(x),
)
def test_what_would_count_a_change_again_is_refused(wrapper: Any, inner: Aggregator, why: str) -> None:
    with pytest.raises(Refused, match=why):
        wrapper(inner)


@pytest.mark.parametrize("wrapper", BOTH)
def test_a_federation_of_nobody_is_refused(wrapper: Any) -> None:
    with pytest.raises(Refused, match=r"aggregator\.clients"):
        wrapper(clients=0)
