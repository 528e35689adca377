"""Law 8 where answers are stale and counted in several versions: what a client means is the model that it was sent a part of,
with its change, and a fold is in no sum twice.

The books are kept in dense float64, from the tasks and answers alone: none of the server's models but the first is looked at.
Clients are of mixed ranks, answer in random order, and the server's rank is full, so that nothing is cut off.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedloom.aggregate.averaged import Averaged, last_version
from fedloom.aggregate.fedex import FedEx
from fedloom.aggregate.fedsvd import FedSVD
from fedloom.aggregate.ffa import FFA
from fedloom.aggregate.flora import FLoRA
from fedloom.aggregate.folded_delta import FoldedDelta
from fedloom.aggregate.hlora import HLoRA
from fedloom.aggregate.lora_a2 import LoRAA2
from fedloom.aggregate.product_delta import ProductDelta
from fedloom.aggregate.raflora import RaFLoRA
from fedloom.aggregate.rolora import RoLoRA
from fedloom.core.events import ClientJoined, Dispatch, TimerFired, UpdateArrived
from fedloom.core.limits import Limits
from fedloom.core.policies import Aggregator, Merge, Schedule
from fedloom.core.server import Server
from fedloom.core.types import Model, Task
from fedloom.plan.budget import Plan
from fedloom.plan.rank import RandomRank
from fedloom.schedule.fedasync import FedAsync
from fedloom.schedule.fedbuff import FedBuff
from fedloom.schedule.fedfa import FedFa
from fedloom.schedule.shared.staleness import SQUARE_ROOT
from fedloom.schedule.shared.weights import by_examples
from tests.support import toys
from tests.support.equations import round_of, values
from tests.support.oracles import oracle_of
from tests.support.server_storm import RecordingSchedule
from tests.support.storms import tries

FULL, UPLOADS, KEPT = 10, 24, 2e-5
Matrices = Mapping[str, Tensor]
SCHEDULES: list[Schedule] = [
    FedFa(window=5, max_in_flight=4),
    FedFa(window=3, max_in_flight=4, fill="wait", weigh=by_examples, discount=SQUARE_ROOT),
    FedFa(window=4, max_in_flight=4, dedup=True, max_staleness=3),
    FedAsync(mixing=0.6, max_in_flight=4),
    FedBuff(buffer_size=2, max_in_flight=4),
]
PRODUCTS: list[Any] = [ProductDelta(), FoldedDelta(), FLoRA(), FedEx(), FedSVD(), Averaged()]
SIDES: list[Any] = [FFA(), RoLoRA(), LoRAA2()]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=toys.called)


def versions(method: Aggregator, schedule: Schedule, seed: int = 0) -> Iterator[tuple[Server, Model, Merge]]:
    """Every merge of a run in which tasks are answered in random order: the server, its model before, what was decided."""
    draw, recording = random.Random(seed), RecordingSchedule(schedule)
    more: dict[str, Any] = {"assign": Plan(RandomRank(1, FULL), 5), "limits": Limits(versions=10**6, evaluate_every=0)}
    server = toys.server(recording, method, start=toys.adapter(FULL), seed=seed, **more)
    for profile in toys.profiles(6).values():
        server.handle(0.0, ClientJoined(profile))
    commands = server.handle(0.0, TimerFired())
    tasks: dict[int, Task] = {}
    for now in range(1, UPLOADS + 1):
        tasks |= {c.task.id: c.task for c in commands if isinstance(c, Dispatch)}
        one = tasks.pop(draw.choice(sorted(tasks.keys() & server.state.busy.keys())))
        result = toys.make_result(toys.changed(one.start, one.id), examples=10 + one.id % 7)
        before = server.state.model
        recording.merges.clear()
        commands = server.handle(float(now), UpdateArrived(one.client, one.id, result))
        for merge in recording.merges:
            yield server, before, merge


def combined(merge: Merge, made: list[Matrices], change: Callable[[Any], Matrices]) -> Matrices:
    """The formulas of `Merge`, where a client's model is the version that its task was cut from, with its change."""
    parts = [(merge.step * w, update.task.version, change(update)) for w, update in merge.weighted_updates]
    changes = [(w, one) for w, _, one in parts]
    if merge.as_delta:
        return toys.weighted([(1.0, made[-1]), *changes])
    stands = made[0] if merge.anchor else made[-1]
    return toys.weighted([(1.0 - merge.step, stands), *((w, made[v]) for w, v, _ in parts), *changes])


def in_products(update: Any) -> Matrices:
    """B A - what was sent, and the head's change."""
    given, sent = update.result.adapter, update.task.start.train
    factors = toys.weighted([(1.0, toys.products(given)), (-1.0, toys.products(sent))])
    return {**factors, "head": given.dense["head"].double() - sent.dense["head"].double()}


def in_sides(update: Any) -> Matrices:
    """The change of each side, at the server's directions."""
    given, sent = values(update.result.adapter), values(update.task.start.train)
    changed = {key: given[key] - sent[key] for key in given}
    grown = {}
    for key, x in changed.items():
        grown[key] = x if x.dim() == 1 else x.new_zeros(FULL, x.shape[1])
        if x.dim() == 2:
            grown[key][: len(x)] = x
    return grown


def whole(model: Model) -> Matrices:
    return {**toys.function(model), "head": model.adapter.dense["head"].double()}


@every_schedule
@pytest.mark.parametrize("method", PRODUCTS, ids=toys.called)
def test_products_are_those_of_whole_models(method: Aggregator, schedule: Schedule) -> None:
    made, bases = list[Matrices](), set[int]()
    for server, before, merge in versions(method, schedule):
        made = made or [whole(last_version(before))]
        made.append(combined(merge, made, in_products))
        bases |= {server.state.version - 1 - update.task.version for _, update in merge.weighted_updates}
        assert toys.distance(whole(last_version(server.state.model)), made[-1]) < KEPT
    assert len(made) > UPLOADS // 3
    assert len(bases) > 3, "answers of many ages were counted"


@every_schedule
@pytest.mark.parametrize("method", SIDES, ids=toys.called)
def test_sides_that_are_trained_in_turn_or_alone_are_those_of_whole_models(
    method: Aggregator, schedule: Schedule
) -> None:
    """Entry by entry: on a side or direction that it did not train, a client says what it was sent."""
    made = list[Matrices]()
    for server, before, merge in versions(method, schedule):
        made = made or [values(before.adapter)]
        made.append(combined(merge, made, in_sides))
        assert toys.distance(values(server.state.model.adapter), made[-1]) < KEPT
    assert len(made) > UPLOADS // 3


@pytest.mark.parametrize("method", [HLoRA(), RaFLoRA()], ids=toys.called)
@given(seed=st.integers(0, 99))
@tries(10)
def test_published_means_of_products_stay_as_published(method: Aggregator, seed: int) -> None:
    """Over the window what came back, and nothing else; while it fills, the first model in the place of the server's."""
    seen = 0
    for server, before, merge in versions(method, FedFa(window=5, max_in_flight=4), seed):
        wanted = oracle_of(method)(method, round_of(merge.anchor or before, merge))
        given = toys.products(server.state.model.adapter)
        assert toys.distance(given, {name: wanted[name] for name in given}) < KEPT
        seen += merge.anchor is not None
    assert seen == 4
