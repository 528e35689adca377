"""Starts and answers on the other side of the wire, for every way to add adapters and every codec."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom.aggregate.fedit import FedIT
from fedloom.aggregate.fedsa import FedSA
from fedloom.aggregate.ffa import FFA
from fedloom.aggregate.flora import FLoRA
from fedloom.aggregate.scaffold import Scaffold
from fedloom.core import message_size
from fedloom.core.codec import Codec, DeltaInt8, Exact, Half, HalfChange, round_to_half
from fedloom.core.events import Command, Dispatch, Event, Publish, Reject, UpdateArrived
from fedloom.core.fingerprint import fingerprint
from fedloom.core.limits import Limits
from fedloom.core.lora import Adapter, Factor, compact_with_fold, from_tensors, map_tensors, named_tensors, take_sides
from fedloom.core.transfer import encode_answer, encode_start, pack_answer, residual_of, unpack_answer
from fedloom.core.types import Budget, ClientState, Result, Task, TaskStart
from fedloom.core.validate_answer import why_invalid
from fedloom.plan.budget import Plan
from fedloom.plan.rank import FixedRank, RandomRank
from fedloom.runs.trace import Trace
from fedloom.schedule.rounds import Rounds
from fedloom.simulate.devices import World
from fedloom.simulate.simulation import Simulation
from tests.support import toys
from tests.support.pairs import goes_together
from tests.support.storms import one_in, tries
from tests.support.toys import (
    Quadratic,
    adapter,
    answers,
    changed,
    distance,
    function,
    make_result,
    mean_of,
    product,
    sent,
)

CODECS: tuple[Codec, ...] = (Exact(), Half(), HalfChange(), DeltaInt8())
every_codec = pytest.mark.parametrize("codec", CODECS, ids=str)
every_method = pytest.mark.parametrize("method", toys.aggregators(), ids=toys.called)


def task_of(method: Any, codec: Codec | None, rank: int = 4, rounds: int = 1) -> Task:
    """What a client gets after some rounds."""
    model = method.init(adapter(8))
    for turn in range(rounds):
        model = method.merge(model, mean_of(answers(method, model, (4, 8, 2), 10 * turn + 1)))
    task = sent(method, model, rank)
    return replace(task, start=encode_start(task.start, codec))


# Down ----------------------------------------------------------------------------------------------------------------


@every_codec
@every_method
def test_what_is_handed_out_is_what_was_sent_and_the_same_when_sent_again(method: Any, codec: Codec) -> None:
    plain, start = task_of(method, None).start, task_of(method, codec).start
    again = encode_start(start, codec)
    for one, other in ((start.train, again.train), (start.control, again.control)):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert fingerprint(one) == fingerprint(other)
    assert distance(function(start), function(plain)) < (1e-12 if codec == Exact() else 1.5e-3)
    for name, tensor in named_tensors(start.train).items():
        side = "dense" if name.startswith("dense:") else name.rpartition(".")[2]
        if side in start.seeded:
            assert tensor.equal(named_tensors(plain.train)[name]), "nobody sends it, so nobody rounds it"
        elif codec.halved:
            assert tensor.equal(round_to_half(tensor))


def test_none_is_the_same_object_s_numbers_as_before() -> None:
    start = sent(FedIT(), FedIT().init(adapter(8)), 4).start
    for codec in (None, Exact()):
        for name, tensor in named_tensors(encode_start(start, codec).train).items():
            assert tensor is named_tensors(start.train)[name]


def test_a_fold_that_is_smaller_as_a_matrix_is_rounded_as_one() -> None:
    method = FLoRA()
    model = method.init(toys.fresh(8))
    for turn in range(3):
        model = method.merge(model, mean_of(answers(method, model, (8,), 10 * turn + 1)))
    assert model.fold is not None
    plain = sent(method, model, 2).start
    start = encode_start(plain, Half())
    assert start.fold is not None
    for name, factor in start.fold.factors.items():
        dense = model.fold.factors[name].up @ model.fold.factors[name].down
        assert (factor.up @ factor.down).equal(round_to_half(dense))
    assert message_size.download_size(start).total * 2 == message_size.download_size(plain).total


@pytest.mark.parametrize(("method", "number"), [(FFA(), 10), (FedSA(), 10), (FedIT(), 10)])
def test_a_way_down_costs_half(method: Any, number: int) -> None:
    assert (
        message_size.download_size(task_of(method, Half()).start).total * 2
        == message_size.download_size(task_of(method, None).start).total
    )


# Up ------------------------------------------------------------------------------------------------------------------


@every_codec
@every_method
def test_an_answer_that_changed_nothing_arrives_as_it_was_sent(method: Any, codec: Codec) -> None:
    task = task_of(method, codec)
    control = task.start.control and map_tensors(torch.zeros_like, task.start.control)
    result, _ = encode_answer(task, ClientState(), make_result(task.start.train, control=control), ClientState())
    assert fingerprint(result.adapter) == fingerprint(task.start.train)
    assert why_invalid(task, result) is None
    if control is None:
        assert message_size.upload_size(task, result).total == 0
    assert (result.metrics["rounding"], result.metrics["rounding_change"]) == (0.0, 0.0)


@every_codec
@every_method
def test_an_answer_is_accepted_and_near_what_was_trained(method: Any, codec: Codec) -> None:
    task = task_of(method, codec)
    control = task.start.control and map_tensors(torch.ones_like, task.start.control)
    given = replace(toys.returned(task, changed(task.start, 1)).result, control=control)
    result, local = encode_answer(task, ClientState(), given, ClientState(task.start.basis))
    assert why_invalid(task, result) is None
    assert result.metrics["rounding"] < {4: 1e-12, 2: 6e-4, 1: 2e-2}[codec.number]
    moved = {n: product(f) - product(task.start.train.factors[n]) for n, f in given.adapter.factors.items()}
    got = {n: product(f) - product(task.start.train.factors[n]) for n, f in result.adapter.factors.items()}
    assert distance(got, moved) < {4: 1e-12, 2: 1e-2, 1: 2e-2}[codec.number]
    assert (local.residual is not None) == codec.feedback


@pytest.mark.parametrize("spoilt", range(7))
@every_codec
def test_what_will_be_refused_is_left_as_it_is(codec: Codec, spoilt: int) -> None:
    task = task_of(FedIT(), codec)
    good = changed(task.start, 1)
    bad: Sequence[Any] = (
        None,
        make_result(None),  # type: ignore[arg-type]
        make_result(good, examples=0),
        make_result(Adapter({}, {})),
        make_result(adapter(3)),
        make_result(Adapter({n: Factor(f.down * float("nan"), f.up) for n, f in good.factors.items()}, good.dense)),
        make_result(good, control=good),
    )
    result, local = encode_answer(task, ClientState(), bad[spoilt], ClientState("mine"))
    assert result is bad[spoilt]
    assert local == ClientState("mine")


@given(st.integers(0, 10**6), st.integers(-6, 2), st.integers(3, 40))
@tries(40)
def test_with_error_feedback_the_mean_of_what_arrives_converges_to_what_was_trained(
    seed: int, magnitude: int, rounds: int
) -> None:
    """Seide et al. 2014: what is missing in the sum of all rounds is one residual, however many rounds there were."""
    task = task_of(FedIT(), DeltaInt8())
    true = changed(task.start, seed % 1000, 10.0**magnitude)
    flat = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in named_tensors(true).items()}
    local = ClientState(task.start.basis)
    for _ in range(rounds):
        result, local = encode_answer(task, local, make_result(true), local)
        for name, tensor in named_tensors(result.adapter).items():
            flat[name] += tensor.double()
    assert local.residual is not None
    for name, total in flat.items():
        exact, left = named_tensors(true)[name].double(), named_tensors(local.residual)[name].double()
        assert torch.allclose(total + left, rounds * exact, rtol=1e-5, atol=3e-7 * rounds * 10.0 ** max(0, magnitude))
        start = named_tensors(task.start.train)[name].double()
        step = (exact - start).abs().max() / 127
        assert float((total / rounds - exact).abs().max()) <= 1.2 * float(step) / rounds + 2e-6 * 10.0 ** max(
            0, magnitude
        )


def test_without_feedback_the_error_would_stay() -> None:
    task = task_of(FedIT(), DeltaInt8())
    true = changed(task.start, 5)
    alone, _ = unpack_answer(task.start, pack_answer(task.start, make_result(true)))
    local, total = ClientState(task.start.basis), {n: torch.zeros_like(t) for n, t in named_tensors(true).items()}
    for _ in range(30):
        result, local = encode_answer(task, local, make_result(true), local)
        total = {name: total[name] + tensor for name, tensor in named_tensors(result.adapter).items()}
    mean = from_tensors(true, {name: tensor / 30 for name, tensor in total.items()})
    biased, unbiased = (
        max(float((named_tensors(a)[n] - t).norm()) for n, t in named_tensors(true).items()) for a in (alone, mean)
    )  # fmt: skip
    assert unbiased < 0.1 * biased


@pytest.mark.parametrize("codec", CODECS[1:], ids=str)
@pytest.mark.parametrize("method", [FedIT(), FFA(), Scaffold()], ids=lambda method: type(method).__name__)
def test_a_simulated_answer_is_what_would_have_arrived_packed(method: Any, codec: Codec) -> None:
    """Also rows that did not move, or move too little to be seen on the other side, and what earlier answers lost."""
    task = task_of(method, codec)
    start = task.start.train
    tensors = named_tensors(toys.changed(start, 1, 0.05))
    tensors["query.down"][1] = start.factors["query"].down[1]
    tensors["value.up"][:, 0] = start.factors["value"].up[:, 0] * (1 + 1e-7)
    moved = from_tensors(start, tensors)
    if method == FFA():
        moved = take_sides(("up", "dense"), moved, start)
    result = Result(moved, 10, 100, 1, {}, task.start.control and map_tensors(torch.sign, task.start.control))
    owed = ClientState(basis=task.start.basis, residual=map_tensors(lambda one: 1e-3 * torch.cos(one), start))
    got, _ = encode_answer(task, owed, result, ClientState(basis=task.start.basis))
    packed = pack_answer(task.start, result, residual_of(task.start, owed))
    adapter, control = unpack_answer(task.start, packed)
    assert fingerprint(got.adapter) == fingerprint(adapter)
    assert (got.control and fingerprint(got.control)) == (control and fingerprint(control))


def test_what_is_told_of_rounding_does_not_depend_on_the_order_in_memory() -> None:
    """A side that is not sent is a part of the model here, and has memory of its own at a site."""
    model, told = FedSA().init(adapter(8, layers={str(k): (50, 65) for k in range(6)})), list[dict[str, float]]()
    start = encode_start(FedSA().start(model, Budget(4, 1), 1), Half())
    assert not start.train.factors["0"].up.is_contiguous()
    for train in (start.train, map_tensors(lambda one: one.clone(memory_format=torch.contiguous_format), start.train)):
        downs = {name: factor.down for name, factor in changed(start, 3).factors.items()}
        answer = Adapter({name: Factor(down, train.factors[name].up) for name, down in downs.items()}, train.dense)
        task = Task(1, "c", 0, replace(start, train=train), Budget(4, 1), 0.0)
        told.append(dict(encode_answer(task, ClientState(), make_result(answer), ClientState())[0].metrics))
    assert told[0] == told[1]


def test_what_was_lost_is_forgotten_with_its_basis_and_its_shape() -> None:
    task = task_of(FedIT(), DeltaInt8())
    _, local = encode_answer(task, ClientState(), make_result(changed(task.start, 1)), ClientState(task.start.basis))
    assert residual_of(task.start, local) is local.residual
    assert residual_of(replace(task.start, basis="rotated"), local) is None
    assert residual_of(replace(task.start, train=adapter(3)), local) is None
    assert residual_of(encode_start(task.start, Half()), local) is None
    assert residual_of(task.start, ClientState(task.start.basis)) is None


def test_a_frozen_side_owes_nothing_and_a_row_that_was_not_sent_keeps_what_it_owes() -> None:
    task = task_of(FFA(), DeltaInt8())
    _, local = encode_answer(task, ClientState(), make_result(changed(task.start, 1)), ClientState(task.start.basis))
    assert local.residual is not None
    assert not any(bool(factor.down.any()) for factor in local.residual.factors.values())
    assert all(bool(factor.up.any()) for factor in local.residual.factors.values())
    same, after = encode_answer(task, local, make_result(task.start.train), replace(local, residual=None))
    assert fingerprint(same.adapter) == fingerprint(task.start.train)
    assert after.residual is not None
    assert fingerprint(after.residual) == fingerprint(local.residual)


# In a simulation -----------------------------------------------------------------------------------------------------


@dataclass
class Log:
    """What happened."""

    file: io.StringIO
    steps: list[tuple[Event, list[Command]]]

    def __call__(self, now: float, event: Event, commands: list[Command]) -> None:
        self.steps.append((event, commands))
        Trace(self.file)(now, event, commands)

    def all(self, kind: type) -> list[Any]:
        return [command for _, commands in self.steps for command in commands if isinstance(command, kind)]


def run(method: Any, codec: Codec | None, versions: int = 6, trainer: Any = None, **more: Any) -> Log:
    log = Log(io.StringIO(), [])
    # without Adam, changes differ as gradients do
    limits, assign = Limits(versions=versions, norm_ratio=20.0), more.pop("assign", Plan(RandomRank(2, 4), 12))
    server = toys.server(Rounds(4), method, start=toys.fresh(4), assign=assign, limits=limits, transfer=codec)
    loss = QUADRATIC.loss

    def evaluate(model: Any) -> dict[str, float]:
        return {"loss": loss(compact_with_fold(model.adapter, model.fold))}

    Simulation(server, trainer or QUADRATIC, World(jitter=0.3), toys.profiles(6), evaluate, log).run()
    return log


QUADRATIC = Quadratic()


COMPARED = [method for method in toys.aggregators() if goes_together(method, Rounds(4))]


@pytest.mark.parametrize(("method", "codec"), one_in(7, itertools.product(COMPARED, CODECS[1:])), ids=str)
def test_two_runs_write_the_same_trace_and_what_is_merged_came_through_the_codec(method: Any, codec: Codec) -> None:
    log, again = run(method, codec, 3), run(method, codec, 3)
    assert log.file.getvalue() == again.file.getvalue()
    assert not log.all(Reject)
    for command in log.all(Dispatch):
        assert command.task.start.codec == codec
    for publish in log.all(Publish):
        for update in publish.updates:
            assert 0.0 <= update.result.metrics["rounding_change"] < 0.05


def test_float32_is_what_a_run_without_a_codec_does() -> None:
    models = [[fingerprint(p.model.adapter) for p in run(FedIT(), codec).all(Publish)] for codec in (None, Exact())]
    assert models[0] == models[1]


@every_codec
def test_a_run_learns_as_much_in_any_codec(codec: Codec) -> None:
    plan = Plan(FixedRank(4), 12)
    losses = [
        [QUADRATIC.loss(publish.model.adapter) for publish in run(FedIT(), one, 8, assign=plan).all(Publish)]
        for one in (None, codec)
    ]
    assert losses[1][-1] < 0.3
    assert losses[1][-1] == pytest.approx(losses[0][-1], rel=0.05, abs=0.005)


def test_error_feedback_goes_from_task_to_task_and_only_with_answers_that_arrived() -> None:
    seen: list[tuple[int, str, bool]] = []

    class Watched(Quadratic):
        def train(self, work: Sequence[tuple[Task, ClientState]]) -> list[tuple[Result, ClientState]]:
            seen.extend((task.id, task.client, local.residual is not None) for task, local in work)
            return [(result, replace(local, residual=None)) for result, local in super().train(work)]

    log = run(FedIT(), DeltaInt8(), trainer=Watched(), assign=Plan(FixedRank(4), 12))
    arrived = {event.task: event.client for event, _ in log.steps if isinstance(event, UpdateArrived)}
    for number, client, had in seen:
        assert had == any(task < number and who == client for task, who in arrived.items())
    assert any(had for _, _, had in seen)


@every_codec
def test_a_client_that_diverged_is_rejected_and_the_others_go_on(codec: Codec) -> None:
    class Diverged(Quadratic):
        def train(self, work: Sequence[tuple[Task, ClientState]]) -> list[tuple[Result, ClientState]]:
            return [
                (self.spoilt(r) if t.client == "c0" else r, local)
                for (t, _), (r, local) in zip(work, super().train(work), strict=True)
            ]

        def spoilt(self, result: Result) -> Result:
            return replace(result, adapter=map_tensors(lambda tensor: tensor * float("nan"), result.adapter))

    log = run(FedIT(), codec, trainer=Diverged())
    assert {command.client for command in log.all(Reject)} == {"c0"}
    assert "not finite" in log.all(Reject)[0].reason
    assert len(log.all(Publish)) == 6


def test_scaffold_s_control_variates_come_through_too() -> None:
    task = task_of(Scaffold(), Half())
    assert task.start.control is not None
    given = replace(make_result(changed(task.start, 1)), control=changed(task.start.control, 2))
    result, _ = encode_answer(task, ClientState(), given, ClientState())
    assert result.control is not None
    for name, tensor in named_tensors(result.control).items():
        assert tensor.equal(round_to_half(tensor))
        assert torch.allclose(tensor, named_tensors(changed(task.start.control, 2))[name], rtol=1e-3, atol=1e-5)


def test_a_start_of_a_server_is_what_its_client_would_receive() -> None:
    server = toys.server(start=adapter(4), transfer=Half())
    start: TaskStart = server.start(Plan(FixedRank(2), 2)(toys.profiles(1)["c0"], server.fleet()), 1)
    assert start.codec == Half()
    assert fingerprint(start.train) == fingerprint(map_tensors(round_to_half, start.train))
    assert fingerprint(start.train) != fingerprint(FedIT().start(server.state.model, Plan(FixedRank(2), 2)(
        toys.profiles(1)["c0"], server.fleet()), 1).train)  # fmt: skip
