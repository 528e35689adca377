"""The share of the model's energy that a task carries, as metrics write it: exact whatever the method, and cheap."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from fedloom.aggregate.fedex import FedEx
from fedloom.aggregate.fedit import FedIT
from fedloom.aggregate.fedplora import FedPLoRA
from fedloom.aggregate.fedsa import FedSA
from fedloom.aggregate.flexlora import FlexLoRA
from fedloom.aggregate.flora import FLoRA
from fedloom.aggregate.hlora import HLoRA
from fedloom.aggregate.lora_a2 import LoRAA2
from fedloom.aggregate.raflora import RaFLoRA
from fedloom.aggregate.shared.product_space import energy_shares
from fedloom.core.events import ClientJoined, Dispatch, Publish, TimerFired, UpdateArrived
from fedloom.core.lora import Adapter, Factor, compact_with_fold
from fedloom.core.policies import Aggregator
from fedloom.core.types import Budget, Model, TaskStart
from fedloom.plan.budget import Plan
from fedloom.plan.rank import RandomRank
from fedloom.runs.metrics import Metrics, energy_share, model_energy
from fedloom.runs.slot_usage import SlotUsage
from fedloom.schedule.rounds import Rounds
from tests.support import toys

RANK = 6


def grown(method: Aggregator, rounds: int = 4, **layers: tuple[int, int]) -> Model:
    """A model after some rounds of clients of three ranks; its folds are then as wide as the small layers."""
    model = method.init(toys.adapter(RANK, 1, layers or toys.LAYERS))
    for turn in range(rounds):
        tasks = [toys.sent(method, model, rank, 3 * turn + rank) for rank in (2, 4, RANK)]
        model = method.merge(model, toys.mean_of([toys.returned(t, toys.changed(t.start, t.id)) for t in tasks]))
    return model


def by_definition(model: Model, start: TaskStart) -> float:
    """1 - |model - start|^2 / |model|^2 from whole matrices."""
    ours, theirs = (
        toys.products(compact_with_fold(*pair)) for pair in ((model.adapter, model.fold), (start.train, start.fold))
    )
    missing = sum(float((ours[name] - theirs[name]).square().sum()) for name in ours)
    return 1 - missing / sum(float(product.square().sum()) for product in ours.values())


@pytest.mark.parametrize("method", toys.aggregators(), ids=toys.called)
@pytest.mark.parametrize("rank", [1, 3, RANK])
def test_it_is_one_minus_the_energy_of_what_is_missing(method: Aggregator, rank: int) -> None:
    model = grown(method)
    start = method.start(model, Budget(rank, 1), seed=7)
    assert energy_share(model, start, model_energy(model)) == pytest.approx(by_definition(model, start), abs=1e-6)


@pytest.mark.parametrize("method", [RaFLoRA(), RaFLoRA(balanced=True), HLoRA(), FlexLoRA()], ids=toys.called)
def test_a_method_that_cuts_gives_the_energy_of_the_leading_directions(method: Aggregator) -> None:
    model = grown(method)
    shares = energy_shares(model)
    for rank in range(1, RANK + 1):
        given = energy_share(model, method.start(model, Budget(rank, 1), seed=7), model_energy(model))
        assert given == pytest.approx(sum(shares[:rank]), abs=1e-5)


@pytest.mark.parametrize("method", [FLoRA(), FedEx(), FedPLoRA(), LoRAA2()], ids=toys.called)
@pytest.mark.parametrize("rounds", [1, 9])
def test_a_method_with_a_fold_hands_out_the_whole_model_at_any_rank(method: Aggregator, rounds: int) -> None:
    model = grown(method, rounds)
    for rank in (1, 3, RANK):
        start = method.start(model, Budget(rank, 1), seed=7)
        assert energy_share(model, start, model_energy(model)) == pytest.approx(1, abs=1e-6)


def test_a_start_that_is_twice_the_model_holds_nothing_of_it_and_the_opposite_less() -> None:
    model = Model(toys.adapter(RANK, 1))
    for by, share in ((2.0, 0.0), (-1.0, -3.0), (0.5, 0.75)):
        factors = {name: Factor(f.down, by * f.up) for name, f in model.adapter.factors.items()}
        start = TaskStart(Adapter(factors), "0")
        assert energy_share(model, start, model_energy(model)) == pytest.approx(share, abs=1e-6)


def test_a_model_without_energy_has_no_shares() -> None:
    model = FedSA().init(toys.fresh(RANK))
    assert model_energy(model) == 0.0
    assert energy_share(model, FedSA().start(model, Budget(2, 1), 0), 0.0) is None


def test_a_fold_costs_nothing_where_it_is_sent_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr("fedloom.runs.metrics._squares", lambda factor: float(seen.append(factor.rank) or 0.0))
    for method in (FLoRA(), FedEx()):
        model = grown(method, 1, wide=(64, 64))
        assert model.fold is not None
        assert model.fold.factors["wide"].rank > 2 * RANK
        energy_share(model, method.start(model, Budget(2, 1), 0), 1.0)
    assert max(seen) <= 2 * RANK


def lines(method: Aggregator, kind: str, rounds: int = 3) -> list[dict[str, Any]]:
    """What the metrics of a small run say."""
    file = io.StringIO()
    metrics = Metrics(file, SlotUsage(3))
    start = toys.fresh(4)
    server = toys.server(Rounds(3), method, start=start, assign=Plan(RandomRank(1, 4), 2))
    for profile in toys.profiles(3).values():
        metrics(0.0, ClientJoined(profile), server.handle(0.0, ClientJoined(profile)))
    commands = server.handle(0.0, TimerFired())
    metrics(0.0, TimerFired(), commands)
    for turn in range(1, rounds + 1):
        for task in [command.task for command in commands if isinstance(command, Dispatch)]:
            event = UpdateArrived(task.client, task.id, toys.make_result(toys.changed(task.start, task.id)))
            commands = server.handle(float(turn), event)
            metrics(float(turn), event, commands)
        assert any(isinstance(command, Publish) for command in commands)
    return [line for line in map(json.loads, file.getvalue().splitlines()) if line["kind"] == kind]


def test_a_task_line_says_what_its_start_held() -> None:
    tasks, versions = lines(HLoRA(), "task"), {line["version"]: line for line in lines(HLoRA(), "version")}
    assert {task["kept"] for task in tasks if task["version"] == 0} == {None}
    later = [task for task in tasks if task["version"]]
    assert len({task["rank"] for task in later}) > 1
    for task in later:
        assert task["kept"] == pytest.approx(sum(versions[task["version"]]["energy"][: task["rank"]]), abs=1e-5)


def test_the_bytes_of_folds_are_told_apart_for_each_task_and_in_all() -> None:
    for method, folds in ((FLoRA(), True), (FedIT(), False)):
        tasks, versions = lines(method, "task"), lines(method, "version")
        assert all((task["bytes_down_fold"] > 0) == (folds and task["version"] > 0) for task in tasks)
        assert all(task["bytes_down_fold"] + task["bytes_down_dense"] <= task["bytes_down"] for task in tasks)
        assert versions[-1]["bytes_down_fold"] == sum(task["bytes_down_fold"] for task in tasks)
