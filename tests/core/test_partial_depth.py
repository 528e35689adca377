"""Depth from the server to the wire: what a shallow client is sent, what it may answer, and what it costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom import (
    FedEx,
    FixedDepth,
    FlexLoRA,
    FLoRA,
    LoRAA2,
    Momentum,
    Plan,
    ProductDelta,
    Scaffold,
)
from fedloom.aggregate.fedit import FedIT
from fedloom.core import message_size
from fedloom.core.codec import DeltaInt8, Exact, Half
from fedloom.core.events import ClientJoined, Dispatch, TimerFired, UpdateArrived
from fedloom.core.fingerprint import fingerprint
from fedloom.core.lora import Adapter, Factor, named_tensors
from fedloom.core.model_shape import Shape
from fedloom.core.partial_depth import fold_layers, merge_by_layer, start_at_depth
from fedloom.core.policies import Aggregator, Merge
from fedloom.core.transfer import encode_answer, encode_start
from fedloom.core.types import Budget, ClientState, Model, Task, TaskStart
from fedloom.core.validate_answer import why_invalid
from fedloom.deploy.messages.answer import decode_result, encode_result
from fedloom.plan.rank import FixedRank
from fedloom.runs import checkpoint
from fedloom.simulate.devices import World
from tests.support import toys

LAYERS = {"low": (6, 5), "middle": (5, 7), "top": (4, 6)}
SHAPE = Shape(100, 10, 3, 6, modules=tuple(LAYERS.values()), dense=3, depths={"low": 3, "middle": 2, "top": 1})


def adapter(rank: int = 2, seed: int = 0) -> Adapter:
    return toys.adapter(rank, seed, LAYERS)


def lower(start: Adapter, *names: str, **more: Any) -> TaskStart:
    return fold_layers(TaskStart(start, "0", **more), names)


# What is sent down --------------------------------------------------------------------------------------------------


def test_at_full_depth_a_start_is_itself() -> None:
    start = TaskStart(adapter(), "0")
    assert fold_layers(start, ()) is start


def test_lower_layers_are_stacked_beside_what_the_fold_holds() -> None:
    train, fold = adapter(2, 1), toys.adapter(3, 2, {name: LAYERS[name] for name in ("low", "top")})
    start = lower(train, "low", "middle", fold=Adapter(fold.factors))
    assert [*start.train.factors] == ["top"]
    assert start.fold is not None
    assert start.train.factors["top"] is train.factors["top"]
    assert start.fold.factors["top"] is fold.factors["top"]
    assert start.fold.factors["middle"] is train.factors["middle"]
    wanted = toys.product(train.factors["low"]) + toys.product(fold.factors["low"])
    assert torch.allclose(toys.product(start.fold.factors["low"]), wanted)


def test_directions_that_add_nothing_are_not_sent() -> None:
    """LoRA begins with up = 0, and a revived direction too: its `down` is drawn for each task and would be no cache's key."""
    zero = adapter(2)
    zero = Adapter({n: Factor(f.down, torch.zeros_like(f.up)) for n, f in zero.factors.items()}, zero.dense)
    fold = Adapter({"top": toys.factor(1, *LAYERS["top"])})
    assert lower(zero, "low", "middle").fold is None
    assert lower(zero, "low", "middle", fold=fold).fold is fold
    half = {n: Factor(f.down, f.up * torch.tensor([1.0, 0.0])) for n, f in adapter(2).factors.items()}
    start = lower(Adapter(half), "low")
    assert start.fold is not None
    assert start.fold.factors["low"].rank == 1


def test_fewer_directions_are_to_select_where_fewer_layers_are_trained() -> None:
    """LoRA-A2 selects r directions a layer on average (methods 5.1)."""
    method = LoRAA2()
    start = method.start(method.init(adapter(4)), Budget(2, 5), seed=1)
    assert start.rules.select == 2 * 3
    assert fold_layers(start, ("low", "middle")).rules.select == 2 * 1


def test_control_variates_are_those_of_the_trained_layers() -> None:
    method = Scaffold()
    start = fold_layers(method.start(method.init(adapter(4)), Budget(2, 5), seed=1), ("low",))
    assert start.control is not None
    assert [*start.control.factors] == [*start.train.factors] == ["middle", "top"]


@pytest.mark.parametrize("method", [ProductDelta(), FLoRA(), FedIT(), FedEx(), FlexLoRA()], ids=toys.called)
def test_layers_that_only_the_fold_holds_run_and_stay(method: Aggregator) -> None:
    """The model of an edge whose own task is shallow: its members run the layers below too, and no merge loses them."""
    outer = lower(adapter(2), "low")
    assert outer.fold is not None
    model = replace(method.init(outer.train), fold=outer.fold)
    for turn, names in enumerate([(), ("middle",), ()]):
        start = start_at_depth(method, model, Budget(2, 5), turn, names)
        assert [*start.train.factors] == [name for name in ("middle", "top") if name not in names]
        assert start.fold is not None
        assert start.fold.factors["low"] is outer.fold.factors["low"]
        task = Task(turn, "c", 0, start, Budget(2, 5), 0.0)
        after = merge_by_layer(method, model, Merge(((1.0, toys.returned(task, toys.changed(start, turn))),)))
        assert after.fold is not None
        assert after.fold.factors["low"] is outer.fold.factors["low"]
        assert [*after.adapter.factors] == ["middle", "top"]
        assert after.fold is model.fold or isinstance(method, FLoRA | FedEx | FlexLoRA)
        model = after


# What comes back ----------------------------------------------------------------------------------------------------


def server(method: Aggregator | None = None, depth: int | None = 2, **more: Any) -> Any:
    plan = Plan(FixedRank(2), 5) if depth is None else Plan(FixedRank(2), 5, FixedDepth(depth))
    return toys.server(method=method, assign=plan, shape=SHAPE, start=adapter(2), **more)


def first_task(server: Any) -> Task:
    for profile in toys.profiles(2).values():
        server.handle(0.0, ClientJoined(profile))
    return next(c.task for c in server.handle(0.0, TimerFired()) if isinstance(c, Dispatch))


def test_the_server_sends_the_depth_that_the_plan_says() -> None:
    for depth in (1, 2, 3, None):
        task = first_task(server(depth=depth))
        assert task.budget == Budget(2, 5, depth)
        assert [*task.start.train.factors] == [*LAYERS][3 - (depth or 3) :]


def test_an_answer_holds_the_trained_layers_and_no_others() -> None:
    own = server(depth=2)
    task = first_task(own)
    whole = toys.changed(adapter(2), 1)
    right = Adapter({n: f for n, f in whole.factors.items() if n != "low"}, whole.dense)
    for wrong in (whole, Adapter({"top": whole.factors["top"]}, whole.dense)):
        (reject,) = own.handle(1.0, UpdateArrived(task.client, task.id, toys.make_result(wrong)))
        assert "was not asked for" in reject.reason
    assert not own.handle(2.0, UpdateArrived(task.client, task.id, toys.make_result(right)))
    assert len(own.state.arrived) == 1


@pytest.mark.parametrize("codec", [None, Exact(), Half(), DeltaInt8()], ids=str)
@pytest.mark.parametrize("method", [ProductDelta(), FLoRA(), Scaffold()], ids=toys.called)
def test_an_answer_of_any_depth_goes_through_the_wire(method: Aggregator, codec: Any) -> None:
    own = server(method, depth=1, transfer=codec)
    task = first_task(own)
    trained = toys.changed(task.start, 1)
    control = task.start.control and toys.changed(task.start.control, 2)
    result, _ = encode_answer(task, ClientState(), toys.make_result(trained, control=control), ClientState())
    _, _, back = decode_result(encode_result(task, toys.make_result(trained, control=control)), 10**6, {task.id: task})
    assert why_invalid(task, back) is None
    assert fingerprint(back.adapter) == fingerprint(result.adapter)


def test_bytes_are_those_of_what_is_sent(tmp_path: Path) -> None:
    """Up: the trained layers and the head, r (d_out + d_in) numbers each. Down: besides, the lower layers in the smaller form."""
    for depth, codec, number in ((1, Exact(), 4), (2, Exact(), 4), (2, Half(), 2), (3, Half(), 2)):
        task = first_task(server(depth=depth, transfer=codec))
        up = message_size.upload_size(task, toys.make_result(toys.changed(task.start, 1)))
        assert up.total == number * SHAPE.payload(2, depth) // 4
        assert (
            message_size.download_size(task.start).total == number * SHAPE.payload(2) // 4
        )  # rank 2 is the smaller form here
        assert World(jitter=0.0).seconds(
            task, toys.make_result(task.start.train), toys.profiles(1)["c0"], SHAPE, 0
        ).train == pytest.approx(SHAPE.train_flops(100, 2, depth) / 1e4)


def test_what_was_owed_at_another_depth_is_not_added() -> None:
    """Error feedback is of one shape; a residual of other layers is dropped and not misread."""
    codec, local, deep = DeltaInt8(), ClientState(), TaskStart(adapter(2), "0")
    for turn, names in enumerate([(), ("low",), ()]):
        start = encode_start(fold_layers(deep, names), codec)
        task = Task(turn + 1, "c", 0, start, Budget(2, 5), 0.0)
        _, local = encode_answer(task, local, toys.make_result(toys.changed(start, turn)), ClientState(start.basis))
        assert local.residual is not None
        assert local.residual.factors.keys() == start.train.factors.keys()


def test_partial_folds_are_kept_by_a_checkpoint(tmp_path: Path) -> None:
    start = lower(adapter(2), "low", fold=Adapter({"top": toys.factor(1, *LAYERS["top"])}))
    method = FLoRA()
    model = method.init(toys.fresh(2))
    task = Task(1, "c", 0, fold_layers(method.start(model, Budget(2, 5), 1), ("query",)), Budget(2, 5, 1), 0.0)
    model = merge_by_layer(method, model, Merge(((1.0, toys.returned(task, toys.changed(task.start, 1))),)))
    assert model.fold is not None
    assert [*model.fold.factors] == ["value"]
    checkpoint.write_checkpoint(tmp_path / "file", {"start": start, "model": model})
    read = checkpoint.read_checkpoint(tmp_path / "file").read({"start": TaskStart, "model": Model})
    for one, other in ((start.fold, read["start"].fold), (model.fold, read["model"].fold)):
        assert one is not None
        assert named_tensors(one).keys() == named_tensors(other).keys()
        assert fingerprint(one) == fingerprint(other)


def test_a_memory_of_some_layers_is_completed_when_the_others_are_trained() -> None:
    """The velocity of a layer begins when it is first trained."""
    method = Momentum(FedIT())
    model = method.init(adapter(2))
    for depth in (1, 3):
        names = [*LAYERS][: 3 - depth]
        task = Task(depth, "c", 0, fold_layers(method.start(model, Budget(2, 5), 1), names), Budget(2, 5, depth), 0.0)
        model = merge_by_layer(method, model, Merge(((1.0, toys.returned(task, toys.changed(task.start, depth))),)))
        assert [*model.memory["momentum"].factors] == [*LAYERS][3 - depth :]
        assert model.memory["momentum"].dense.keys() == {"head"}
