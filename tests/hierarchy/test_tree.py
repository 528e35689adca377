"""A tree of servers: what it is in the simplest cases, what an edge reports, what survives what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedloom import FedFa, FedIT, HLoRA, Limits, Plan, RandomRank, Refused, Rounds, World
from fedloom.aggregate.fedex import FedEx
from fedloom.aggregate.fedsvd import FedSVD
from fedloom.aggregate.ffa import FFA
from fedloom.aggregate.flora import FLoRA
from fedloom.aggregate.folded_delta import FoldedDelta
from fedloom.aggregate.momentum import Momentum
from fedloom.aggregate.rolora import RoLoRA
from fedloom.aggregate.scaffold import Scaffold
from fedloom.core.events import (
    ClientJoined,
    ClientLost,
    Command,
    Discarded,
    Dispatch,
    EdgeLost,
    EdgeReturned,
    Event,
    InsideEdge,
    Publish,
    Reject,
    Report,
    Stop,
    TaskReceived,
    TimerFired,
    UpdateArrived,
)
from fedloom.core.fingerprint import fingerprint
from fedloom.core.lora import Adapter, stack_with_fold
from fedloom.core.model_shape import Shape
from fedloom.core.policies import Aggregator, Fleet
from fedloom.core.types import Budget, Profile, Task, Update
from fedloom.core.validate_answer import why_invalid
from fedloom.hierarchy.edge import Edge, MemberBudget, model_as_answer
from fedloom.hierarchy.grouping import Given, Member
from fedloom.hierarchy.hierarchy import Hierarchy
from fedloom.hierarchy.tree import Tree
from fedloom.hierarchy.tree_state import BLOCK, Link
from fedloom.schedule.shared.weights import by_work
from fedloom.simulate.simulation import Simulation
from tests.support import toys
from tests.support.simulated_runs import JITTER, QUADRATIC, Log

GIVEN: dict[str, Any] = {"start": toys.fresh(4), "assign": Plan(RandomRank(2, 4), 12)}


def carried_out(groups: Sequence[int], hierarchy: Hierarchy | None, log: Log | None = None, **more: Any) -> Log:
    """A run of the toy world, flat without a hierarchy."""
    log, given = log or Log(), GIVEN | {"limits": Limits(versions=4)} | more
    server = toys.tree(groups, hierarchy, **given) if hierarchy else toys.server(**given)
    Simulation(server, QUADRATIC, World(jitter=JITTER), toys.profiles(sum(groups)), log.score, log).run()
    return log


def published(log: Log, inner: bool = False) -> list[str]:
    """The models of all versions, by their fingerprint."""
    if inner:
        return [fingerprint(w.command.model.adapter) for w in log.all(InsideEdge) if isinstance(w.command, Publish)]
    return [fingerprint(command.model.adapter) for command in log.all(Publish)]


def answered(log: Log) -> list[tuple[float, int, str, float]]:
    """When which task of whom was answered, after how many seconds."""
    return [
        (now, event.task, event.client, event.result.metrics["seconds"])
        for now, event, _ in log.steps
        if isinstance(event, UpdateArrived)
    ]


def test_one_group_of_all_with_one_round_and_no_link_is_the_flat_run_to_the_byte() -> None:
    """Answers, times, numbers and models are the same; only names differ: the basis, the inner version of a task."""
    flat, tree = carried_out((6,), None), carried_out((6,), Hierarchy(rounds=1))
    assert published(tree) == published(tree, inner=True) == published(flat)
    assert answered(tree) == answered(flat)
    assert tree.losses == flat.losses
    for one, other in zip(flat.all(Dispatch), tree.all(Dispatch), strict=True):
        assert replace(one.task, start=None, version=0) == replace(other.task, start=None)  # type: ignore[arg-type]
        assert fingerprint(one.task.start.train) == fingerprint(other.task.start.train)


def test_inner_rounds_of_one_group_are_flat_rounds_to_the_byte() -> None:
    """f rounds of H / f steps in one global round are f flat rounds of H / f steps, also where cohorts are drawn."""
    below = Rounds(cohort_size=3)
    flat = carried_out((6,), None, schedule=below, assign=Plan(RandomRank(2, 4), 3), limits=Limits(versions=4))
    tree = carried_out((6,), Hierarchy(rounds=4, schedule=below), limits=Limits(versions=1))
    assert published(tree, inner=True) == published(flat)
    assert published(tree) == published(flat)[-1:]
    assert answered(tree) == answered(flat)


def test_a_method_of_products_turns_its_factors_once_more_and_is_the_flat_run_but_for_rounding() -> None:
    flat, tree = (carried_out((6,), how, method=HLoRA()) for how in (None, Hierarchy(rounds=1)))
    assert tree.losses[-1] == pytest.approx(flat.losses[-1], rel=1e-3)
    models = [log.all(Publish)[0].model for log in (flat, tree)]
    assert toys.distance(toys.function(models[1]), toys.function(models[0])) < 1e-5


# What an edge reports ----------------------------------------------------------------------------------------------------


def within(log_or_commands: Any, kind: type) -> list[Any]:
    """What happened inside of this kind."""
    commands = log_or_commands.all(InsideEdge) if isinstance(log_or_commands, Log) else log_or_commands
    return [command for command in commands if isinstance(command, InsideEdge) and isinstance(command.command, kind)]


def test_groups_weigh_by_their_examples_times_their_steps() -> None:
    """Eq. 18 of ParallelSFL with rho_g = n_g H: groups of 10 + 11 + 12 and 13 + 14 examples, the second one at half the steps."""

    def budget(profile: Profile, fleet: Fleet) -> Budget:
        return Budget(4, 12 if profile.client == "edge0" else 6, rounds=3)

    log = carried_out(
        (3, 2), Hierarchy(plan=budget), schedule=Rounds(cohort_size=2, weigh=by_work), limits=Limits(versions=1)
    )
    reports = {command.edge: command.command.result for command in within(log, Report)}
    assert {edge: (one.examples, one.steps) for edge, one in reports.items()} == {"edge0": (33, 12), "edge1": (27, 6)}
    assert {edge: by_work(Update(None, one)) for edge, one in reports.items()} == {"edge0": 396.0, "edge1": 162.0}  # type: ignore[arg-type]
    w0, w1 = 396 / 558, 162 / 558
    (merged,) = (command.model.adapter for command in log.all(Publish))
    for name, factor in merged.factors.items():
        both = [reports[edge].adapter.factors[name] for edge in ("edge0", "edge1")]
        assert torch.allclose(factor.down, w0 * both[0].down + w1 * both[1].down, atol=1e-6)
        assert torch.allclose(factor.up, w0 * both[0].up + w1 * both[1].up, atol=1e-6)


def test_an_answer_counts_once_however_often_it_is_merged() -> None:
    """Below FedFa a window merges answers again; n_g counts clients, and the steps are those that an example was trained for."""
    hierarchy = Hierarchy(rounds=6, schedule=FedFa(window=3, max_in_flight=3))
    log = carried_out((3,), hierarchy, schedule=Rounds(cohort_size=1), limits=Limits(versions=1))
    (report,) = (command.command.result for command in within(log, Report))
    merged = {update.task.id: update for command in within(log, Publish) for update in command.command.updates}
    assert len(merged) == 6
    clients = {update.task.client for update in merged.values()}
    held = {client: profile.examples for client, profile in toys.profiles(3).items()}
    assert report.examples == sum(held[client] for client in clients)
    assert report.steps == round(
        sum(held[one.task.client] * one.result.steps for one in merged.values()) / report.examples
    )
    assert report.tokens == sum(update.result.tokens for update in merged.values())


@pytest.mark.parametrize(
    "method", [FFA(), FedSVD(), RoLoRA(), FLoRA(), HLoRA(rank=6), HLoRA(), FedIT()], ids=toys.called
)
def test_a_report_is_an_answer_to_the_task_of_the_edge(method: Aggregator) -> None:
    """Of its rank and layers, with the sides that are frozen as they were sent, whatever the method did inside."""
    log = carried_out((3, 2), Hierarchy(rounds=3), method=method, schedule=FedFa(window=2, max_in_flight=2))
    tasks = {command.task: command.command.task for command in within(log, Dispatch)}
    reports = within(log, Report)
    assert len(reports) >= 4
    assert [why_invalid(tasks[command.task], command.command.result) for command in reports] == [None] * len(reports)
    assert log.losses[-1] < 0.9 * log.losses[0]


def test_what_an_edge_folded_is_in_its_report_as_far_as_the_rank_reaches() -> None:
    start, fold = toys.adapter(4, 1), toys.adapter(2, 2)
    task = toys.make_task(start, 4)
    sent = replace(task.start, fold=fold)
    grown = stack_with_fold(Adapter(fold.factors), Adapter(toys.graded([1e-3], 3).factors))
    model = replace(FedIT().init(toys.graded([2.0, 1.0, 0.5], 4)), fold=grown)
    adapter, cut = model_as_answer(sent, model)
    wanted = toys.weighted(
        [(1.0, toys.products(model.adapter)), (1.0, toys.products(grown)), (-1.0, toys.products(fold))]
    )
    assert toys.distance(toys.products(adapter), wanted) < 1e-4
    assert cut < 1e-6
    assert all(factor.rank == 4 for factor in adapter.factors.values())
    few, lost = model_as_answer(replace(sent, train=toys.adapter(2, 1)), model)
    assert toys.distance(toys.products(few), {name: toys.best(p, 2) for name, p in wanted.items()}) < 1e-4
    assert lost == pytest.approx(0.5 / 3.5, rel=0.01)


def test_members_have_ranks_of_their_own_below_that_of_the_edge() -> None:
    log = carried_out((3, 3), Hierarchy(rounds=2), method=HLoRA())
    assert {command.task.budget.rank for command in log.all(Dispatch)} == {2, 3, 4}
    assert {command.command.task.budget.rank for command in within(log, Dispatch)} == {4}
    assert {command.task.budget.steps for command in log.all(Dispatch)} == {6}
    low = Hierarchy(rounds=2, plan=lambda profile, fleet: Budget(2, 12, rounds=2))
    assert {c.task.budget.rank for c in carried_out((3, 3), low, method=HLoRA()).all(Dispatch)} == {2}


@pytest.mark.parametrize("method", [FedIT(), FedEx(), FoldedDelta(), FLoRA(), HLoRA(), RoLoRA()], ids=toys.called)
def test_layers_that_nobody_trains_are_in_the_fold_of_every_member(method: Aggregator) -> None:
    """A task of the upper layer alone: the lower one travels on in the fold, comes back in no answer, and nothing of it is lost."""
    whole, fold = toys.adapter(4, 1), toys.adapter(3, 2)
    sent = method.start(method.init(Adapter({"value": whole.factors["value"]}, whole.dense)), Budget(4, 6), 0)
    both = {**(sent.fold.factors if sent.fold else {}), "query": fold.factors["query"]}
    task = Task(9, "edge0", 0, replace(sent, fold=Adapter(both)), Budget(4, 6, rounds=2), 0.0)
    model = method.init(sent.train)
    policies = toys.server(
        Rounds(cohort_size=2), method, start=model.adapter, assign=MemberBudget(Plan(RandomRank(2, 4), 9))
    )
    edge = Edge(policies)
    for profile in toys.profiles(2).values():
        edge.handle(0.0, ClientJoined(profile))
    commands = edge.handle(0.0, TaskReceived(task))
    for _ in range(2):
        for one in tasks_of(commands):
            assert one.start.train.factors.keys() == {"value"}
            assert one.start.fold is not None
            assert one.start.fold.factors["query"] is fold.factors["query"]
            commands = edge.handle(
                0.0, UpdateArrived(one.client, one.id, toys.make_result(toys.changed(one.start, one.id)))
            )
    (result,) = (command.result for command in commands if isinstance(command, Report))
    assert why_invalid(task, result) is None
    assert result.adapter.factors.keys() == {"value"}


@pytest.mark.parametrize("method", [FedIT(), HLoRA(), FoldedDelta(), FLoRA()], ids=toys.called)
def test_the_depth_of_an_edge_is_the_most_that_its_members_train(method: Aggregator) -> None:
    """Two blocks of three at the edge, one at a member that can no more: what nobody trained keeps its value at the root."""
    blocks = {"low": (6, 5), "middle": (5, 6), "top": (4, 5)}
    shape = Shape(100, 10, 3, 6, tuple(blocks.values()), 3, depths={"low": 3, "middle": 2, "top": 1})

    def member(profile: Profile, fleet: Fleet) -> Budget:
        return Budget(3, 4, depth=1 if profile.client == "c0" else 3)

    hierarchy = Hierarchy(plan=lambda profile, fleet: Budget(4, 4, rounds=2, depth=2))
    more: dict[str, Any] = {"method": method, "assign": member, "shape": shape, "schedule": Rounds(cohort_size=1)}
    tree = toys.tree((2,), hierarchy, start=toys.adapter(4, 1, blocks), limits=Limits(versions=1), **more)
    for profile in toys.profiles(2).values():
        tree.handle(0.0, ClientJoined(profile))
    before, trained = tree.state.model, {}
    commands = tree.handle(0.0, TimerFired())
    for _ in range(2):
        for one in tasks_of(commands):
            trained[one.client] = set(one.start.train.factors)
            commands = answer(tree, 1.0, one)
    assert trained == {"c0": {"top"}, "c1": {"middle", "top"}}
    (report,) = within(commands, Report)
    assert report.command.result.adapter.factors.keys() == {"middle", "top"}
    after = next(command.model for command in commands if isinstance(command, Publish))
    moved = {name: float((toys.function(after)[name] - toys.function(before)[name]).norm()) for name in blocks}
    assert moved["low"] < 1e-5
    assert min(moved["middle"], moved["top"]) > 0.1


def test_a_layer_that_no_member_of_an_edge_trained_is_none_of_its_contribution() -> None:
    """Law 8: of two edges with the whole model, one whose members train the top alone has no part in the mean of the lower layer."""
    shape = Shape(100, 10, 2, 6, ((6, 5), (4, 5)), 3, depths={"low": 2, "top": 1})

    def member(profile: Profile, fleet: Fleet) -> Budget:
        return Budget(4, 4, depth=1 if profile.client == "c0" else None)

    start = toys.adapter(4, 1, {"low": (6, 5), "top": (4, 5)})
    more: dict[str, Any] = {"assign": member, "shape": shape, "schedule": Rounds(2), "limits": Limits(versions=1)}
    tree = toys.tree((1, 1), Hierarchy(rounds=1, link=Link(1e3, 1e3)), start=start, **more)
    for profile in toys.profiles(2).values():
        tree.handle(0.0, ClientJoined(profile))
    tree.handle(0.0, TimerFired())
    commands, answers = tree.handle(tree.wake(), TimerFired()), {}
    for one in tasks_of(commands):
        answers[one.client] = toys.changed(one.start, one.id)
        arrived = UpdateArrived(one.client, one.id, toys.make_result(answers[one.client], steps=4))
        (report,) = within(tree.handle(tree.below.now, arrived), Report)
        assert report.command.result.adapter.factors.keys() == answers[one.client].factors.keys()
    while not tree.state.stopped:
        commands = tree.handle(tree.wake(), TimerFired())
    after = tree.state.model.adapter.factors
    assert torch.allclose(after["low"].up, answers["c1"].factors["low"].up), "not averaged with what c0 was sent"
    assert torch.allclose(
        after["top"].up, sum(w * answers[c].factors["top"].up for c, w in (("c0", 10 / 21), ("c1", 11 / 21)))
    )


# What survives what --------------------------------------------------------------------------------------------------------


def begun(**more: Any) -> tuple[Tree, list[Command]]:
    """Two edges of three and two members, on links that cost no time, and the first commands."""
    hierarchy = Hierarchy(**({"rounds": 2} | more))
    tree: Tree = toys.tree((3, 2), hierarchy, schedule=Rounds(cohort_size=2, weigh=by_work), **GIVEN)
    for profile in toys.profiles(5).values():
        assert tree.handle(0.0, ClientJoined(profile)) == []
    return tree, tree.handle(0.0, TimerFired())


def answer(tree: Tree, now: float, task: Task) -> list[Command]:
    return tree.handle(
        now,
        UpdateArrived(
            task.client, task.id, toys.make_result(toys.changed(task.start, task.id), steps=task.budget.steps)
        ),
    )


def tasks_of(commands: Sequence[Command]) -> list[Task]:
    return [command.task for command in commands if isinstance(command, Dispatch)]


def test_numbers_of_tasks_are_apart() -> None:
    tree, commands = begun()
    assert [task.id // BLOCK for task in tasks_of(commands)] == [0, 0, 0, 1, 1]
    assert {command.task // BLOCK for command in within(commands, Dispatch)} == {2}
    assert tree.state.busy.keys() == {task.id for task in tasks_of(commands)}
    assert list(tree.state.working) == [f"c{k}" for k in range(5)]
    assert len(tree.state.idle) == 0
    assert -1 not in tree.state.busy
    assert "c9" not in tree.state.working


def test_an_answer_to_an_earlier_task_of_the_edge_never_counts() -> None:
    """An asynchronous group reports while members are at work; what they answer later is refused."""
    tree, commands = begun(schedule=FedFa(window=2, max_in_flight=3), rounds=1)
    first, second, *_ = tasks_of(commands)
    commands = answer(tree, 1.0, first)
    assert [type(command.command) for command in within(commands, object)] == [Publish, Report]
    commands = answer(tree, 2.0, second)
    assert [type(command) for command in commands] == [Reject]


@pytest.mark.parametrize("kept", [True, False])
def test_an_edge_that_dies_says_what_it_lost_and_goes_on_where_it_was(kept: bool) -> None:
    tree, commands = begun()
    mine = [task for task in tasks_of(commands) if task.client in ("c0", "c1", "c2")]
    for task in mine:
        commands = answer(tree, 1.0, task)
    version_1 = within(commands, Publish)[0].command.model
    mine = tasks_of(commands)
    answer(tree, 2.0, mine[0])
    commands = tree.handle(3.0, EdgeLost("edge0", kept))
    assert {command.task for command in commands if not isinstance(command, InsideEdge)} == {mine[1].id, mine[2].id}
    assert [command.command.task for command in within(commands, Discarded)] == [mine[0].id]
    assert [command.edge for command in within(commands, Stop)] == [] if kept else ["edge0"]
    assert isinstance(
        tree.handle(4.0, UpdateArrived("c1", mine[1].id, toys.make_result(mine[1].start.train)))[0], Reject
    )
    commands = tree.handle(5.0, EdgeReturned("edge0"))
    if kept:
        again = tasks_of(commands)
        assert [task.version for task in again] == [1, 1, 1]
        assert not {task.id for task in again} & {task.id for task in mine}
        edge = tree.below.edges["edge0"]
        assert edge.server.model is version_1
        assert len(edge.contributions) == 3
    else:
        assert tasks_of(commands) == []
        assert tree.wake() == 5.0, "the root has it as a client again"
        assert "edge0" in tree.root.state.idle


def test_a_task_that_reaches_a_dead_edge_waits_for_it() -> None:
    tree: Tree = toys.tree((2,), Hierarchy(link=Link(1e4, 1e4)), schedule=Rounds(cohort_size=1), **GIVEN)
    for profile in toys.profiles(2).values():
        tree.handle(0.0, ClientJoined(profile))
    assert tasks_of(tree.handle(0.0, TimerFired())) == [], "it is on its way"
    tree.handle(0.1, EdgeLost("edge0", resumes=True))
    arrives = tree.wake()
    assert arrives is not None
    assert tree.handle(arrives, TimerFired()) == []
    assert tree.wake() is None
    assert len(tasks_of(tree.handle(50.0, EdgeReturned("edge0")))) == 2


def test_a_report_of_a_task_that_was_dropped_never_arrives() -> None:
    tree: Tree = toys.tree((2,), Hierarchy(rounds=1, link=Link(1e4, 1e4)), schedule=Rounds(cohort_size=1), **GIVEN)
    for profile in toys.profiles(2).values():
        tree.handle(0.0, ClientJoined(profile))
    tree.handle(0.0, TimerFired())
    commands = tree.handle(tree.wake() or 0.0, TimerFired())
    for task in tasks_of(commands):
        commands = answer(tree, 100.0, task)
    assert within(commands, Report)
    arrives = tree.wake() or 0.0
    assert arrives > 100.0, "it is on its way"
    tree.handle(100.0, EdgeLost("edge0", resumes=False))
    assert tree.wake() is None
    assert tree.handle(arrives, TimerFired()) == []


def test_a_group_whose_members_are_gone_reports_what_it_has_or_gives_its_task_up() -> None:
    tree, commands = begun()
    for task in tasks_of(commands)[:3]:
        commands = answer(tree, 1.0, task)
    for client in ("c0", "c1", "c2"):
        commands = tree.handle(2.0, ClientLost(client))
    (report,) = within(commands, Report)
    assert report.command.result.metrics["rounds"] == 1.0
    assert report.command.result.steps == 6
    for client in ("c3", "c4"):
        commands = tree.handle(3.0, ClientLost(client))
    assert tree.state.version == 1, "the root goes on with what it got"
    assert [command.edge for command in within(commands, Stop)] == ["edge1", "edge0"], (
        "the next task finds nobody either"
    )
    assert not tree.root.state.idle
    tree.handle(4.0, ClientJoined(toys.profiles(5)["c0"]))
    assert {task.client for task in tasks_of(tree.handle(4.0, TimerFired()))} == {"c0"}


def test_failures_of_members_end_the_run_as_they_do_without_edges() -> None:
    """Training that diverges is refused everywhere: the run ends after about as many failures as it may have."""
    log = Log()
    tree = toys.tree((3, 3), Hierarchy(), **(GIVEN | {"limits": Limits(versions=4, failures=20)}))
    spoilt = toys.Null(lambda result: replace(result, examples=0))
    reason = Simulation(tree, spoilt, World(), toys.profiles(6), log.score, log).run()
    assert "failed in a row" in reason
    assert 20 <= len(log.all(Reject)) <= 40


# What does not go together ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "inner", "said"),
    [
        (Scaffold(FedIT(), clients=2), None, "an edge has no control variate"),
        (Scaffold(FedIT(), clients=5), None, "give clients=2"),
        (FedIT(), Scaffold(FedIT(), clients=3), "belongs above the edges"),
        (FFA(), FedIT(), "down must stay as sent"),
        (FedIT(), HLoRA(), "averaged entry by entry"),
    ],
)
def test_methods_that_do_not_go_together_are_refused(method: Aggregator, inner: Aggregator | None, said: str) -> None:
    with pytest.raises(Refused, match=said):
        toys.tree((3, 2), Hierarchy(aggregator=inner), method=method)


def test_what_is_wrapped_around_the_method_stays_above() -> None:
    tree = toys.tree((3, 2), method=Momentum(FedIT()))
    assert isinstance(tree.root.server.aggregator, Momentum)
    assert {type(edge.server.aggregator.inner) for edge in tree._edges.values()} == {FedIT}


def test_a_client_is_in_one_group() -> None:
    members = [Member(f"c{k}", 10, 1.0, ()) for k in range(3)]
    assert Hierarchy().grouped(members, 0) == {"edge0": ("c0", "c1", "c2")}
    many = Hierarchy(Given(tuple((f"c{k}",) for k in range(3)))).grouped(members, 0)
    assert list(many) == ["edge0", "edge1", "edge2"]

    def by(*groups: tuple[str, ...]) -> Hierarchy:
        return Hierarchy(lambda members, seed: groups)

    for groups, said in (
        ((("c0", "c1"),), "is in no group"),
        ((("c0", "c1"), ("c1", "c2")), "in two groups"),
        ((("c0", "c1", "c2", "c7"),), "is no client"),
    ):
        with pytest.raises(Refused, match=said):
            by(*groups).grouped(members, 0)


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"inner_speedup": 0.0}])
def test_a_hierarchy_checks_its_fields(wrong: dict[str, Any]) -> None:
    with pytest.raises(Refused, match=f"hierarchy.{next(iter(wrong))}"):
        Hierarchy(**wrong)
    with pytest.raises(Refused, match=r"hierarchy.link.up_bps"):
        Link(up_bps=0.0)


# A thousand clients ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_thousand_clients_in_thirty_edges() -> None:
    sizes = [34] * 10 + [33] * 20
    tree = toys.tree(
        sizes, Hierarchy(link=Link()), schedule=FedFa(window=10, max_in_flight=30), limits=Limits(versions=60)
    )
    events = 0

    def observe(now: float, event: Event, commands: list[Command]) -> None:
        nonlocal events
        events += 1

    reason = Simulation(tree, toys.Null(), World(), toys.profiles(1000), lambda model: {"loss": 0.0}, observe).run()
    assert reason == "60 versions made"
    assert events > 4000
