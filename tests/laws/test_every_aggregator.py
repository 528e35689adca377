"""The laws of `aggregate/`, for every method in the folder: a new file is tested by existing.

Each law is a function that returns the largest violation it finds. A method must keep the law, or name it in `exempt`
and then really break it. Law numbers are those of the architecture page.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import fedloom.aggregate
from fedloom.aggregate.ace import ACE
from fedloom.aggregate.adam import Adam
from fedloom.aggregate.clip import Clip
from fedloom.aggregate.fadas import FADAS
from fedloom.aggregate.shared.product_space import energy_shares
from fedloom.core.lora import Adapter, Factor, cut_factor
from fedloom.core.policies import Aggregator, Merge
from fedloom.core.types import Model
from tests.support import toys
from tests.support.toys import adapter, changed, distance, function, mean_of, products, returned, sent, weighted

TOP = 8
RANKS = (2, 4, 8)
KEPT, BROKEN = 1e-4, 1e-2
METHODS = toys.aggregators()
every_method = pytest.mark.parametrize("method", METHODS, ids=toys.called)


def cut_to(of: Adapter, rank: int) -> dict[str, torch.Tensor]:
    return products(Adapter({n: cut_factor(f, rank) for n, f in of.factors.items()}))


def merged(method: Aggregator, model: Model, merge: Merge) -> dict[str, torch.Tensor]:
    return function(method.merge(model, merge))


def combination(method: Aggregator, terms: list[tuple[float, Adapter]], exact: bool) -> dict[str, torch.Tensor]:
    """Dense oracle of a linear combination of adapters of the server's rank, in the method's own space."""
    if method.space == "product":
        sums = weighted([(w, products(a)) for w, a in terms])
        return sums if exact else {n: toys.best(p, TOP) for n, p in sums.items()}
    sums = {n: [torch.stack([w * getattr(a.factors[n], s).double() for w, a in terms]).sum(0) for s in ("up", "down")]
            for n in terms[0][1].factors}  # fmt: skip
    return {n: up @ down for n, (up, down) in sums.items()}


def one_client_is_reproduced(method: Aggregator) -> float:
    """Law 1, first sentence."""
    errors = []
    model = method.init(adapter(TOP))
    task = sent(method, model, TOP)
    trained = changed(task.start, 1)
    for as_delta, step in itertools.product((False, True), (1.0, 0.3)):
        origin = model.adapter if not as_delta else task.start.train
        after = method.merge(model, mean_of([returned(task, trained)], step=step, as_delta=as_delta))
        wanted = combination(method, [(1.0, model.adapter), (-step, origin), (step, trained)], after.fold is not None)
        if model.fold is not None:
            wanted = weighted([(1.0, wanted), (1.0, products(model.fold))])
        errors.append(distance(function(after), wanted))
        if step == 1.0:
            errors.append(distance(function(after), function(replace(task.start, train=trained))))
    empty = method.init(toys.fresh(TOP))
    for rank in RANKS:
        task = sent(method, empty, rank)
        given = merged(method, empty, mean_of([returned(task, changed(task.start, 2))]))
        errors.append(distance(given, products(changed(task.start, 2))))
    return max(errors)


def agreement_is_a_fixed_point(method: Aggregator) -> float:
    """Law 1, second sentence: clients that hold the model whole and changed nothing leave it as it is."""
    model = method.init(adapter(TOP))
    task = sent(method, model, TOP)
    model = method.merge(model, mean_of([returned(task, changed(task.start, 1))]))
    updates = [returned(sent(method, model, TOP, number)) for number in (1, 2, 3)]
    forms = itertools.product((False, True), (1.0, 0.3))
    merges = [mean_of(updates, [0.5, 0.3, 0.2], step=step, as_delta=as_delta) for as_delta, step in forms]
    return max(distance(merged(method, model, merge), function(model)) for merge in merges)


def order_does_not_matter(method: Aggregator) -> float:
    """Law 1, third sentence."""
    model = method.init(adapter(TOP))
    tasks = [sent(method, model, rank, number) for number, rank in enumerate(RANKS, 1)]
    parts = [(w, returned(t, changed(t.start, t.id))) for w, t in zip((0.5, 0.3, 0.2), tasks, strict=True)]
    errors = []
    for as_delta, step in itertools.product((False, True), (1.0, 0.4)):
        given = [merged(method, model, Merge(p, step, as_delta)) for p in map(tuple, itertools.permutations(parts))]
        errors += [distance(one, given[0]) for one in given]
    return max(errors)


def law_1(method: Aggregator) -> float:
    return max(one_client_is_reproduced(method), agreement_is_a_fixed_point(method), order_does_not_matter(method))


def law_2(method: Aggregator) -> float:
    """Equal ranks and a shared `down`: the plain mean of products."""
    errors = []
    for rank in RANKS:
        model = method.init(toys.fresh(TOP))
        task = sent(method, model, rank)
        down = {n: f.down for n, f in task.start.train.factors.items()}
        answers = [adapter(next(iter(down.values())).shape[0], seed) for seed in (1, 2, 3)]
        answers = [Adapter({n: Factor(down[n], f.up) for n, f in a.factors.items()}, a.dense) for a in answers]
        updates = [returned(replace(task, id=k, client=f"c{k}"), a) for k, a in enumerate(answers, 1)]
        wanted = weighted([(w, products(a)) for w, a in zip((0.5, 0.3, 0.2), answers, strict=True)])
        errors.append(distance(merged(method, model, mean_of(updates, [0.5, 0.3, 0.2])), wanted))
    return max(errors)


def models(method: Aggregator) -> dict[str, Model]:
    """A model in every condition in which a client may meet it."""
    start, empty = method.init(adapter(TOP)), method.init(toys.fresh(TOP))
    low = [returned(t, changed(t.start, t.id)) for t in (sent(method, start, 2, number) for number in (1, 2))]
    task = sent(method, start, TOP)
    whole = changed(task.start, 5)
    sides = {n: (f.down[[0, 1] * 4], f.up[:, [0, 1] * 4]) for n, f in whole.factors.items()}
    if "down" in task.start.rules.frozen:  # the same product, deficient through `up`
        sides = {n: (f.down, f.up * (torch.arange(TOP) < 2)) for n, f in whole.factors.items()}
    deficient = Adapter({n: Factor(*both) for n, both in sides.items()}, whole.dense)
    after_low = method.merge(start, mean_of(low))
    mixed = [returned(sent(method, start, rank, rank)) for rank in RANKS]
    return {
        "at first": start,
        "zero": empty,
        "zero, merged": method.merge(empty, mean_of([returned(sent(method, empty, r, r)) for r in RANKS])),
        "mixed ranks": method.merge(start, mean_of(mixed)),
        "rank-deficient": method.merge(start, mean_of([returned(task, deficient)])),
        "low ranks only": after_low,
        "low ranks only, twice": method.merge(after_low, mean_of([returned(sent(method, after_low, 2, 9))])),
    }


def deadest(of: Factor) -> float:
    """Gradient of a generic linear loss <G, up @ down> with respect to the worst direction, relative to the best."""
    up, down = of.up.clone().requires_grad_(), of.down.clone().requires_grad_()
    generic = toys.factor(10, *(up.shape[0], down.shape[1]), seed=77)
    (generic.up @ generic.down * (up @ down)).sum().backward()
    assert up.grad is not None
    assert down.grad is not None
    slopes = up.grad.norm(dim=0) + down.grad.norm(dim=1)
    return float(slopes.min() / slopes.max()) if bool(slopes.isfinite().all()) else 0.0


def law_3(method: Aggregator) -> float:
    """A handed-out adapter has the asked rank, is finite, and every direction of it can learn."""
    worst = 0.0
    for model, rank in itertools.product(models(method).values(), (1, *RANKS)):
        for factor in sent(method, model, rank).start.train.factors.values():
            fits = factor.rank == rank and bool(factor.up.isfinite().all() and factor.down.isfinite().all())
            worst = max(worst, 0.0 if fits and deadest(factor) > 1e-3 else 1.0)
    return worst


def law_4(method: Aggregator) -> float:
    """The same function on every client, whole or cut to its first directions: scaling is constant across ranks."""
    errors = []
    for model, rank in itertools.product(models(method).values(), (1, *RANKS)):
        full, given = sent(method, model, TOP, 1).start, function(sent(method, model, rank, 2).start)
        truncated = weighted([(1.0, cut_to(full.train, rank)), (1.0, products(full.fold))]) if full.fold else None
        references = [function(full), truncated or cut_to(full.train, rank)]
        errors.append(min(distance(given, reference) for reference in references))
    return max(errors)


def zero_learning(method: Aggregator, rounds: int = 10) -> list[float]:
    """Share of energy in the first two directions, round by round; ranks 2/4/8 at 10/6/4 of 20 clients, 6 a round."""
    ranks = [2] * 10 + [4] * 6 + [8] * 4
    model = method.init(toys.graded([0.91**i for i in range(TOP)]))
    shares = [sum(energy_shares(model)[:2])]
    for turn in range(rounds):
        cohort = random.Random(turn).sample(range(20), 6)
        updates = [returned(sent(method, model, ranks[k], 100 * turn + k + 1)) for k in cohort]
        model = method.merge(model, mean_of(updates))
        shares.append(sum(energy_shares(model)[:2]))
    return shares


def law_5(method: Aggregator) -> float:
    """With zero learning, energy per direction stays what it was: no rank collapse."""
    shares = zero_learning(method)
    return max(abs(share / shares[0] - 1.0) for share in shares)


def law_8(method: Aggregator) -> float:
    """What a client did not train is not counted: a client of rank 2 has no say in directions 3 to 8."""
    model = method.init(toys.graded([0.9**i for i in range(TOP)]))
    low, high = sent(method, model, 2, 1), sent(method, model, TOP, 2)
    kept = distance(merged(method, model, mean_of([returned(low), returned(high)])), function(model))
    alone = distance(merged(method, model, mean_of([returned(low)])), function(model))
    free = [i for i in range(TOP) if i not in (low.start.directions or range(2))]
    trained = {}
    for name, f in high.start.train.factors.items():
        up, down = f.up.clone(), f.down.clone()
        if "up" in high.start.rules.unchanged:
            down[free] *= 1.5
        else:
            up[:, free] += 0.5
        trained[name] = Factor(down, up)
    tail = Adapter(trained, high.start.train.dense)
    follows = distance(
        merged(method, model, mean_of([returned(low), returned(high, tail)])), function(replace(high.start, train=tail))
    )
    return max(kept, alone, follows)


LAWS: dict[int, Callable[[Aggregator], float]] = {1: law_1, 2: law_2, 3: law_3, 4: law_4, 5: law_5, 8: law_8}


@pytest.mark.parametrize("number", LAWS)
@every_method
def test_a_method_keeps_the_law_or_says_so_and_really_breaks_it(method: Aggregator, number: int) -> None:
    violation = LAWS[number](method)
    if number in method.exempt:
        assert violation > BROKEN, f"law {number} holds: take it out of `exempt`"
    else:
        assert violation < (BROKEN if number == 5 else KEPT)


@every_method
def test_exemptions_name_known_laws_with_a_reason(method: Aggregator) -> None:
    assert method.exempt.keys() <= LAWS.keys()
    assert all(len(reason) > 20 for reason in method.exempt.values())


def test_every_class_that_merges_is_a_whole_aggregator_and_constructs_with_no_arguments() -> None:
    found = toys.classes(fedloom.aggregate, ("merge",))
    assert found == toys.classes(fedloom.aggregate, toys.AGGREGATOR)
    assert len(found) >= 3
    assert all(cls() == cls() for cls in found)


def truncates(method: Aggregator) -> bool:
    """Does it hand out a part of the model, the leading directions, and nothing else?"""
    return method.space == "product" and sent(method, method.init(adapter(TOP)), 2).start.fold is None


@pytest.mark.parametrize("method", [m for m in METHODS if truncates(m)], ids=toys.called)
def test_in_product_space_a_client_gets_the_leading_directions(method: Aggregator) -> None:
    """After a merge, every rank is handed its best approximation, up to the scaling that law 4 is about."""
    answers = [toys.make_update(adapter(TOP, seed), TOP, seed) for seed in (1, 2)]
    model = method.merge(method.init(adapter(TOP)), mean_of(answers))
    for rank in (1, *RANKS):
        for name, given in products(sent(method, model, rank).start.train).items():
            wanted = toys.best(products(model.adapter)[name], rank)
            torch.testing.assert_close(given / given.norm(), wanted / wanted.norm(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("as_delta", [False, True])
@every_method
def test_dense_parts_are_averaged_by_weight(method: Aggregator, as_delta: bool) -> None:
    model = method.init(adapter(TOP))
    if isinstance(method, ACE | Clip | FADAS | Adam):
        pytest.skip("changes the head by a rule of its own")
    tasks = [sent(method, model, rank, rank) for rank in RANKS]
    updates = [returned(t, changed(t.start, t.id)) for t in tasks]
    weights = (0.5, 0.3, 0.2)
    mean = sum(w * u.result.adapter.dense["head"] for w, u in zip(weights, updates, strict=True))
    given = method.merge(model, mean_of(updates, weights, step=0.4, as_delta=as_delta)).adapter.dense["head"]
    torch.testing.assert_close(given, 0.6 * model.adapter.dense["head"] + 0.4 * mean)


@every_method
def test_float32_goes_in_and_out_and_the_rank_stays(method: Aggregator) -> None:
    for name, model in models(method).items():
        for given in (model.adapter, sent(method, model, 4).start.train):
            tensors = [t for f in given.factors.values() for t in (f.down, f.up)] + list(given.dense.values())
            assert {t.dtype for t in tensors} == {torch.float32}, name
        assert {f.rank for f in model.adapter.factors.values()} == {TOP}, name


def contents(of: Any) -> list[torch.Tensor]:
    return [t for f in of.factors.values() for t in (f.down, f.up)] + list(of.dense.values())


@every_method
def test_nothing_is_modified_in_place(method: Aggregator) -> None:
    model = models(method)["low ranks only"]
    updates = [returned(t, changed(t.start, t.id)) for t in (sent(method, model, r, r) for r in RANKS)]
    given = [t for u in updates for t in contents(u.result.adapter) + contents(u.task.start.train)]
    given += contents(model.adapter)
    before = [t.clone() for t in given]
    for as_delta, step in itertools.product((False, True), (1.0, 0.4)):
        method.merge(model, mean_of(updates, step=step, as_delta=as_delta))
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@every_method
def test_the_same_merge_gives_the_same_bytes(method: Aggregator) -> None:
    model = method.init(adapter(TOP))
    updates = [returned(t, changed(t.start, t.id)) for t in (sent(method, model, r, r) for r in RANKS)]
    once, again = (method.merge(model, mean_of(updates)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(contents(once.adapter), contents(again.adapter), strict=True))
    for rank in RANKS:
        starts = [contents(sent(method, once, rank).start.train) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*starts, strict=True))


@every_method
def test_the_basis_changes_when_the_directions_were_rotated(method: Aggregator) -> None:
    """Moments of an earlier task are kept while `basis` stays: a method that rotates the factors must change it."""
    model = method.init(adapter(TOP))
    task = sent(method, model, TOP)
    after = method.merge(model, mean_of([returned(task)]))
    same = distance(cut_to(after.adapter, 1), cut_to(model.adapter, 1)) < KEPT
    assert same or sent(method, after, TOP).start.basis != task.start.basis
    assert sent(method, model, 2).start.basis != sent(method, model, 4).start.basis
