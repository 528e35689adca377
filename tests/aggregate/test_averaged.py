"""A published running average (Polyak; the weights of Shamir and Zhang 2013): what it is, and that clients never see it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedloom.aggregate.averaged import COUNT, FOLD, LAST, Averaged, last_version, published_average
from fedloom.aggregate.clip import Clip
from fedloom.aggregate.fedex import FedEx
from fedloom.aggregate.fedit import FedIT
from fedloom.aggregate.fedsa import FedSA
from fedloom.aggregate.flexlora import FlexLoRA
from fedloom.aggregate.flora import FLoRA
from fedloom.aggregate.product_delta import ProductDelta
from fedloom.core.errors import Refused
from fedloom.core.lora import server_rank
from fedloom.core.policies import Aggregator
from fedloom.core.types import Budget, Model
from tests.support import toys
from tests.support.equations import Round, Values, best, product
from tests.support.oracles import oracle_of
from tests.support.toys import adapter, answers, distance, function, mean_of, products, weighted


def oracle(m: Averaged, r: Round) -> Values:
    """average <- (1 - a) average + a version, a = (focus + 1) / (t + focus); the version is the inner rule's.

    It is cut to the rank, but for a method that keeps what is beyond it in a fold.
    """
    own = r.memory.get(LAST, r.own)
    folded = r.memory.get(FOLD, {})
    fold = (
        {layer: product(folded, layer) for layer in r.layers if f"{layer}.A" in folded} if LAST in r.memory else r.fold
    )
    version = oracle_of(m.inner)(m.inner, replace(r, own=own, fold=fold))
    t = float(r.memory[COUNT][COUNT]) + 1 if COUNT in r.memory else 1.0
    a = (m.focus + 1) / (t + m.focus)
    wanted = {}
    for layer in r.layers:
        after = version[layer] if layer in version else product(version, layer)
        mean = (1 - a) * (product(r.own, layer) + r.fold.get(layer, 0.0)) + a * after
        wanted[layer] = mean if getattr(m.inner, "has_fold", False) else best(mean, r.rank)
    heads = [key for key in r.own if "." not in key]
    return wanted | {key: (1 - a) * r.own[key] + a * version[key] for key in heads}


def gone_on(method: Aggregator, model: Model, turns: int) -> list[Model]:
    """Models after merges of three clients' changes."""
    models = [model]
    for turn in range(turns):
        models.append(method.merge(models[-1], mean_of(answers(method, models[-1], (4, 4, 2), 10 * turn + 1))))
    return models


FOLDED = [FLoRA(), FedEx(), FlexLoRA()]


@pytest.mark.parametrize("inner", [FedIT(), ProductDelta(), *FOLDED], ids=toys.called)
def test_clients_train_what_they_would_have_trained_without_it(inner: Aggregator) -> None:
    plain, averaged = gone_on(inner, inner.init(adapter(4)), 4), gone_on(Averaged(inner), inner.init(adapter(4)), 4)
    for one, other in zip(plain, averaged, strict=True):
        theirs, ours = (m.start(o, Budget(3, 5), 7) for m, o in ((inner, one), (Averaged(inner), other)))
        assert distance(function(ours), function(theirs)) == 0
        assert ours.basis == theirs.basis
        assert distance(products(last_version(other).adapter), products(one.adapter)) == 0


@pytest.mark.parametrize("inner", [FedIT(), FLoRA()], ids=toys.called)
def test_with_no_focus_it_is_the_plain_mean_of_all_versions(inner: Aggregator) -> None:
    """As many directions as the layers have, so that nothing is cut."""
    method = Averaged(inner, focus=0.0)
    models = gone_on(method, method.init(adapter(10)), 5)
    versions = [function(last_version(model)) for model in models[1:]]
    assert distance(function(models[-1]), weighted([(0.2, version) for version in versions])) < 1e-5
    head = torch.stack([last_version(model).adapter.dense["head"] for model in models[1:]]).mean(0)
    assert torch.allclose(models[-1].adapter.dense["head"], head, atol=1e-6)


@pytest.mark.parametrize("inner", FOLDED, ids=toys.called)
def test_nothing_that_a_method_keeps_in_a_fold_is_cut_and_who_starts_from_the_average_has_it(inner: Aggregator) -> None:
    """Five versions of rank 2, whose mean has more than two directions; a client of the highest rank runs all of it."""
    method = Averaged(inner, focus=0.0)
    models = gone_on(method, method.init(adapter(2)), 5)
    mean = weighted([(0.2, function(last_version(model))) for model in models[1:]])
    assert distance(function(models[-1]), mean) < 1e-5
    assert distance(products(models[-1].adapter), mean) > 0.01
    start = method.start(published_average(models[-1]), Budget(2, 1), 7)
    wanted = {name: toys.best(one, 2) for name, one in mean.items()} if isinstance(inner, FlexLoRA) else mean
    received = products(start.train) if start.fold is None else function(Model(start.train, fold=start.fold))
    assert distance(received, wanted) < 1e-5


def test_the_latest_versions_count_by_their_focus() -> None:
    """At focus 8 the last ninth of a thousand versions has more than half of the weight, the first half less than 1 %."""
    weights = [0.0] * 1000
    for t in range(1, 1001):
        a = 9 / (t + 8)
        weights = [(1 - a) * w for w in weights]
        weights[t - 1] = a
    assert sum(weights) == pytest.approx(1)
    assert sum(weights[-111:]) > 0.5
    assert sum(weights[:500]) < 0.01


def test_the_average_keeps_its_rank_and_forgets_nothing_of_an_inner_memory() -> None:
    method = Averaged(ProductDelta())
    model = gone_on(method, method.init(adapter(4)), 3)[-1]
    assert server_rank(model.adapter) == 4
    assert model.fold is None
    assert float(model.memory[COUNT].dense[COUNT]) == 3


@pytest.mark.parametrize("focus", [-1.0, float("nan")])
def test_bad_settings_are_refused(focus: float) -> None:
    with pytest.raises(Refused, match=r"aggregator\.focus"):
        Averaged(FedIT(), focus=focus)
    with pytest.raises(Refused, match="once is enough"):
        Averaged(Averaged(FedIT()))


def test_models_that_only_clients_have_whole_are_not_averaged() -> None:
    for inner in (FedSA(), Clip(FedSA())):
        with pytest.raises(Refused, match=r"inner = 'FedSA': its clients keep .* nobody's model"):
            Averaged(inner)
