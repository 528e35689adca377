"""What rounding takes of a start is given back when the answer comes: for every way to add adapters, and every codec."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedloom.aggregate.product_delta import ProductDelta
from fedloom.core.answer_change import product_change
from fedloom.core.codec import Codec, DeltaInt8, Exact, Half, HalfChange
from fedloom.core.events import ClientJoined, Command, Dispatch, EdgeReported, TimerFired, UpdateArrived
from fedloom.core.fingerprint import fingerprint
from fedloom.core.limits import Limits
from fedloom.core.lora import Adapter, Factor, map_tensors, product_norm, truncate
from fedloom.core.partial_depth import exact_start
from fedloom.core.seeds import derive
from fedloom.core.server import Server
from fedloom.core.transfer import encode_answer, encode_start, lift_answer
from fedloom.core.types import Budget, ClientState, Result, Task, Update
from fedloom.plan.budget import Plan
from fedloom.plan.rank import RandomRank
from fedloom.schedule.rounds import Rounds
from tests.support import toys
from tests.support.toys import adapter, changed, distance, make_result, product

HALVED: tuple[Codec, ...] = (Half(), HalfChange(), DeltaInt8())
CODECS = [Half(), *(pytest.param(codec, marks=pytest.mark.slow) for codec in (Exact(), HalfChange(), DeltaInt8()))]
every_method = pytest.mark.parametrize("method", toys.aggregators(), ids=toys.called)


def answer(task: Task, trained: Adapter) -> Result:
    """An answer as the server receives it."""
    control = task.start.control and map_tensors(torch.zeros_like, task.start.control)
    result = make_result(toys.returned(task, trained).result.adapter, control=control)
    return encode_answer(task, ClientState(), result, ClientState())[0]


def started(server: Server) -> list[Task]:
    """A server's first tasks, all of its clients'."""
    for profile in toys.profiles(5).values():
        server.handle(0.0, ClientJoined(profile))
    return dispatched(server.handle(0.0, TimerFired()))


def dispatched(commands: list[Command]) -> list[Task]:
    return [command.task for command in commands if isinstance(command, Dispatch)]


@every_method
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_an_answer_that_changed_nothing_becomes_the_exact_start_to_the_bit(method: Any, codec: Codec) -> None:
    """In every round, of starts at any rank: the first of five answers waits for the others."""
    plan, limits = Plan(RandomRank(1, 8), 5), Limits(versions=9, norm_ratio=None)
    more: dict[str, Any] = {"assign": plan, "limits": limits, "start": adapter(8), "transfer": codec, "seed": 4}
    server = toys.server(Rounds(5), method, **more)
    tasks = started(server)
    for now in range(1, 3):
        first, *others = tasks
        base, seed = server.state.bases[first.id], derive(server.seed, "start", first.id)
        exact = exact_start(server.aggregator, base, first.budget, seed, server.shape, None)
        server.handle(now, UpdateArrived(first.client, first.id, answer(first, first.start.train)))
        (update,) = server.state.arrived
        assert fingerprint(update.result.adapter) == fingerprint(exact.train) == fingerprint(update.task.start.train)
        commands = list[Command]()
        for task in others:
            event = UpdateArrived(task.client, task.id, answer(task, changed(task.start, task.id)))
            commands += server.handle(now, event)
        tasks = dispatched(commands)
        assert server.state.version == now


@pytest.mark.parametrize("codec", HALVED, ids=str)
def test_one_client_alone_gives_the_exact_start_and_its_change(codec: Codec) -> None:
    """Law 1 through the wire: what was meant, and not what arrived."""
    method = ProductDelta()
    model = method.init(adapter(4))
    exact = method.start(model, Budget(4, 1), 1)
    task = Task(1, "c", 0, encode_start(exact, codec), Budget(4, 1), 0.0)
    got = answer(task, changed(task.start, 3))
    after = method.merge(model, toys.mean_of([lift_answer(Update(task, got, model), exact.train)]))
    wanted = {}
    for name, own in exact.train.factors.items():
        sent, back = task.start.train.factors[name], got.adapter.factors[name]
        down = own.down.double() + (back.down.double() - sent.down.double())
        wanted[name] = product(Factor(down, own.up.double() + (back.up.double() - sent.up.double())))
    assert distance(toys.products(after.adapter), wanted) < 2e-6
    assert distance(toys.products(got.adapter), wanted) > 5e-5, "what arrived is another model"


def test_zeros_keep_their_sign() -> None:
    """`-0.0` and `0.0` are equal and have other bytes."""
    zeros = torch.tensor([[0.0, -0.0, 1.0]])
    exact = Adapter({"one": Factor(zeros, torch.ones(2, 1))})
    start = encode_start(toys.make_task(exact, 1).start, Half())
    moved = Adapter({"one": Factor(start.train.factors["one"].down.clone(), torch.full((2, 1), 2.0))})
    moved.factors["one"].down[0, 2] += 1.0
    task = Task(1, "c", 0, start, Budget(1, 1), 0.0)
    lifted = lift_answer(Update(task, make_result(moved)), exact).result.adapter
    assert lifted.factors["one"].down[0, :2].signbit().tolist() == zeros[0, :2].signbit().tolist()


def test_an_edge_that_only_turned_its_factors_changed_nothing() -> None:
    """What rounding took is not added to its directions, which are others than were sent."""
    server = toys.server(Rounds(5), ProductDelta(), start=adapter(8), transfer=Half(), limits=Limits(norm_ratio=None))
    task = started(server)[0]
    sent = task.start.train
    turned = Adapter({name: truncate(factor, factor.rank) for name, factor in sent.factors.items()}, sent.dense)
    server.handle(1.0, EdgeReported(task.client, task.id, make_result(turned)))
    (update,) = server.state.arrived
    change = product_change(update.task.start, update.result.adapter)
    for name, moved in change.products.items():
        assert product_norm(moved) < 3e-6 * product_norm(sent.factors[name])
