"""ACE (arXiv 2511.19066): on each arrival u <- u + (g_new - g_i) / N, g_i <- g_new, w <- w + eta u. Its memory: `test_ca2fl.py`."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from fedloom.aggregate.ace import ACE
from fedloom.aggregate.fedit import FedIT
from fedloom.aggregate.ffa import FFA
from fedloom.aggregate.hetlora import HetLoRA
from fedloom.aggregate.shared.client_changes import CHANGE, TRAINED
from fedloom.core.lora import Adapter, Factor
from fedloom.core.types import Model, Update
from tests.support.equations import Round, Values, mean_of_last, memory_values, now_last, redirected, values, where
from tests.support.oracles import oracle_of
from tests.support.toys import adapter, changed, mean_of, returned, sent


def oracle(m: ACE, r: Round) -> Values:
    """The wrapped method's equation as delta, had every client changed by the mean of all last changes."""
    now, before = now_last(r), memory_values(r, TRAINED)
    ever = dict(before)
    for c in r.clients:
        on = {key: where(c, key, own) for key, own in r.own.items()}
        old = before.get(c.name)
        ever[c.name] = {key: torch.maximum(x, old[key].expand_as(x)) if old else x for key, x in on.items()}
    u = mean_of_last(r.own, memory_values(r, CHANGE) | now, ever, m.clients)
    after = oracle_of(m.inner)(m.inner, replace(redirected(r, lambda c, key: u[key]), delta=True))
    return after | {f"{CHANGE}{name}:{key}": x for name, one in now.items() for key, x in one.items()}


def answer(method: ACE, model: Model, client: int, rank: int, number: int) -> Update:
    task = replace(sent(method, model, rank, number), client=f"c{client}")
    return replace(returned(task, changed(task.start, number)), base=model)


@pytest.mark.parametrize("as_delta", [False, True])
def test_every_arrival_is_the_papers_recursion(as_delta: bool) -> None:
    """Literally, from a state of our own, with late answers; merges of models are merges of changes."""
    n, draw = 5, random.Random(1)
    method = ACE(clients=n)
    models = [method.init(adapter(4))]
    w = values(models[0].adapter)
    u, g = {key: torch.zeros_like(x) for key, x in w.items()}, dict[int, Values]()
    for turn in range(20):
        client, eta = min(draw.randrange(n), draw.randrange(n)), draw.choice((0.2, 0.5))
        update = answer(method, draw.choice(models[-4:]), client, 4, turn)
        gave, got = values(update.result.adapter), values(update.task.start.train)
        for key in w:
            new = gave[key] - got[key]
            u[key] = u[key] + (new - g.get(client, {}).get(key, 0.0)) / n
            w[key] = w[key] + eta * u[key]
        g[client] = {key: gave[key] - got[key] for key in w}
        models.append(method.merge(models[-1], mean_of([update], step=eta, as_delta=as_delta)))
        for key, x in values(models[-1].adapter).items():
            torch.testing.assert_close(x, w[key], rtol=0, atol=3e-5)


def test_a_client_that_answers_often_counts_no_more_than_one_that_does_not() -> None:
    """c0 always changes by +3 and answers nine times out of ten, c1 by -3: together they want to stay."""
    method = ACE(FFA(), clients=2)
    model = method.init(adapter(2))
    start = model
    for turn in range(40):
        client = int(turn % 10 == 0)
        task = replace(sent(method, model, 2, turn), client=f"c{client}")
        grown = {n: Factor(f.down, f.up + (3.0, -3.0)[client]) for n, f in task.start.train.factors.items()}
        model = method.merge(model, mean_of([returned(task, Adapter(grown, task.start.train.dense))], as_delta=True))
        start = model if turn == 1 else start
    for name, f in model.adapter.factors.items():
        torch.testing.assert_close(f.up, start.adapter.factors[name].up, rtol=0, atol=1e-4)


def test_the_weights_of_a_merge_do_not_matter_where_all_train_the_same() -> None:
    method = ACE(clients=4)
    model = method.init(adapter(8))
    given = [answer(method, model, k, 8, k) for k in range(3)]
    one, other = (method.merge(model, mean_of(given, p, as_delta=True)) for p in ((0.8, 0.1, 0.1), (0.2, 0.3, 0.5)))
    for key, x in values(one.adapter).items():
        torch.testing.assert_close(x, values(other.adapter)[key], rtol=0, atol=1e-6)


def test_with_everybody_there_it_is_the_mean_change() -> None:
    method = ACE(clients=3)
    model = method.init(adapter(8))
    given = [answer(method, model, k, 8, k) for k in range(3)]
    wanted = FedIT().merge(model, mean_of(given))
    for key, x in values(method.merge(model, mean_of(given)).adapter).items():
        torch.testing.assert_close(x, values(wanted.adapter)[key], rtol=0, atol=1e-6)


def test_law_5_holds_because_changes_are_added() -> None:
    assert 5 in FedIT().exempt.keys() & HetLoRA().exempt.keys()
    assert 5 not in ACE().exempt.keys() | ACE(HetLoRA()).exempt.keys()
