"""The server over edges that are elsewhere: what they tell is learnt as in a tree, and whatever else they tell is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom import (
    BestRoundTime,
    FedSA,
    FixedRank,
    GradientScore,
    Hierarchy,
    JointPlan,
    Limits,
    LossRate,
    Plan,
    Refused,
    Rounds,
)
from fedloom.core.events import (
    ClientJoined,
    Dispatch,
    EdgeJoined,
    EdgeReported,
    Publish,
    Reject,
    TimerFired,
    UpdateArrived,
)
from fedloom.core.lora import Adapter
from fedloom.core.schema import Malformed
from fedloom.core.types import GroupStatistics, MemberWork, Profile, Result, Task
from fedloom.deploy.messages import answer as messages
from fedloom.deploy.messages.answer import RegionReport
from fedloom.hierarchy.joint_plan.shared import JointRule
from fedloom.hierarchy.root_server import RootServer
from tests.support import toys
from tests.support.storms import tries

SHAPE = replace(toys.SHAPE, layers=2, depths={"query": 2, "value": 1})
RULES: tuple[JointRule, ...] = (
    GradientScore(8, 4, rank=4),
    BestRoundTime(GradientScore(8, 4, rank=4)),
    LossRate(8, 4, rank=4, patience=1),
)
every_rule = pytest.mark.parametrize("rule", RULES, ids=toys.called)
MEMBERS = (Profile("c0", 10, 1e4, 1e4, 1e4), Profile("c1", 10, 2e4, 1e4, 1e4))
OTHERS = tuple(replace(member, client=f"{member.client}b") for member in MEMBERS)
NORTH, SOUTH = Profile("north", 20, 1e4, 1e5, 1e5, tier="region"), Profile("south", 20, 1e4, 1e5, 1e5, tier="region")


def over(rule: JointRule | None = None, **more: Any) -> RootServer:
    """A server over two regions."""
    given: dict[str, Any] = {"start": toys.fresh(4), "shape": SHAPE, "assign": Plan(FixedRank(4), 8)} | more
    flat = toys.server(Rounds(2), limits=Limits(versions=20, evaluate_every=0), **given)
    return Hierarchy(plan=JointPlan(rule, batch_tokens=50) if rule else None).over_regions(flat, 2)


def begun(server: RootServer) -> list[Task]:
    """Both regions are there, and asked."""
    for edge, members in ((NORTH, MEMBERS), (SOUTH, OTHERS)):
        assert server.handle(0.0, EdgeJoined(edge, members)) == []
    return [one.task for one in server.handle(0.0, TimerFired()) if isinstance(one, Dispatch)]


def members_of(task: Task) -> tuple[Profile, ...]:
    """The sites of the region that has this task."""
    return OTHERS if task.client == SOUTH.client else MEMBERS


def told(task: Task, **more: Any) -> GroupStatistics:
    """Of c0, whose loss falls by a half; c1 took no part."""
    rounds, steps = task.budget.rounds, task.budget.steps
    name = members_of(task)[0].client
    spent = MemberWork(name, task.budget.rank, task.budget.depth, rounds, steps, 3.0, 2.0 * steps, 6.0, 1.0, 0.5)
    mass = dict.fromkeys(task.start.train.factors, 0.25)
    return replace(GroupStatistics(task.budget, (spent,), mass, 0.5, (0.75, 0.25), 0.7, 40.0, 1.0, 2.0), **more)


def answer(task: Task, *layers: str) -> Result:
    """With these layers alone, all by default."""
    trained = toys.changed(task.start, task.id)
    held = {name: factor for name, factor in trained.factors.items() if not layers or name in layers}
    return toys.make_result(Adapter(held, trained.dense))


def report(task: Task, what: GroupStatistics | None = None, *layers: str) -> EdgeReported:
    return EdgeReported(task.client, task.id, answer(task, *layers), what or told(task), members_of(task))


# What is learnt ------------------------------------------------------------------------------------------------------


@every_rule
def test_what_is_told_is_known_of_the_group_and_plans_the_next_task(rule: JointRule) -> None:
    server = over(rule)
    tasks, whys = begun(server), set[str]()
    for turn in range(4):
        assert len(tasks) == 2
        for task in tasks:
            whys.add(task.budget.why)
            commands = server.handle(float(turn), report(task))
            assert server.state.groups[task.client].statistics[-1] == told(task)
        assert any(isinstance(one, Publish) for one in commands)
        tasks = [one.task for one in commands if isinstance(one, Dispatch)]
    assert len(server.state.groups["north"].statistics) == 4
    assert len(whys) > 1


@pytest.mark.parametrize(
    ("edge", "members", "why"),
    [
        (SOUTH, MEMBERS, "'c0' is a site of 'north'"),
        (SOUTH, (Profile("north", 1),), "'north' is a client here"),
        (SOUTH, (OTHERS[0], OTHERS[0]), "names a site twice"),
        (replace(SOUTH, client="c0"), (), "'c0' is a site of 'north'"),
    ],
)
def test_a_site_works_for_one_region(edge: Profile, members: tuple[Profile, ...], why: str) -> None:
    server = over(GradientScore(8, 4, rank=4))
    assert server.handle(0.0, EdgeJoined(NORTH, MEMBERS)) == []
    (reject,) = server.handle(0.0, EdgeJoined(edge, members))
    assert isinstance(reject, Reject)
    assert why in reject.reason
    assert server.state.groups.keys() == {"north"}
    server = over(GradientScore(8, 4, rank=4))
    task = begun(server)[0]
    (reject,) = server.handle(1.0, replace(report(task), members=OTHERS))
    assert isinstance(reject, Reject)
    assert "is a site of 'south'" in reject.reason


def test_who_is_led_follows_what_the_edge_says() -> None:
    server = over(GradientScore(8, 4, rank=4))
    task = begun(server)[0]
    more = (*MEMBERS, Profile("c2", 5, 1e4, 1e4, 1e4))
    server.handle(1.0, replace(report(task), members=more))
    assert server.state.groups[task.client].members == more
    assert server.state.groups[task.client].statistics
    assert server.handle(2.0, EdgeJoined(NORTH, MEMBERS)) == []  # it was away, and leads others now
    assert server.state.groups["north"].members == MEMBERS
    assert server.state.groups["north"].statistics, "what it told before is still known"


def test_a_layer_that_nobody_trained_keeps_its_value() -> None:
    server = over()
    first, second = begun(server)
    before = server.state.model.adapter
    server.handle(1.0, report(first, None, "value"))
    commands = server.handle(1.0, report(second, None, "value"))
    (published,) = [one for one in commands if isinstance(one, Publish)]
    after = published.model.adapter
    assert after.factors["query"].up.equal(before.factors["query"].up)
    assert not after.factors["value"].up.equal(before.factors["value"].up)
    assert [list(one.task.start.train.factors) for one in published.updates] == [["value"], ["value"]]


# What is refused -----------------------------------------------------------------------------------------------------


def test_a_refused_report_changes_nothing() -> None:
    server = over(GradientScore(8, 4, rank=4))
    task = begun(server)[0]
    spoilt = replace(answer(task, "value"), examples=0)
    for event in (report(task, told(task, spread=2.0), "value"), replace(report(task), result=spoilt)):
        (reject,) = server.handle(1.0, event)
        assert isinstance(reject, Reject)
        assert reject.task == task.id
        assert server.state.busy[task.id] is task
        assert server.state.groups[task.client].statistics == ()
    assert not any(isinstance(one, Reject) for one in server.handle(1.0, report(task)))
    (late,) = server.handle(1.0, report(task))
    assert isinstance(late, Reject), "it counts once"
    assert len(server.state.groups[task.client].statistics) == 1


def test_who_is_no_edge_answers_with_all_that_was_asked() -> None:
    server = over()
    task = begun(server)[0]
    (reject,) = server.handle(1.0, UpdateArrived(task.client, task.id, answer(task, "value")))
    assert isinstance(reject, Reject)
    assert "query" in reject.reason


@every_rule
def test_an_edge_that_cannot_be_planned_for_does_not_join(rule: JointRule) -> None:
    server = over(rule)
    poor = replace(MEMBERS[1], client="c2", memory=10.0)
    for members, why in (((), "at least one"), ((*MEMBERS, poor), "c2")):
        (reject,) = server.handle(0.0, EdgeJoined(NORTH, members))
        assert isinstance(reject, Reject)
        assert (reject.client, reject.task) == ("north", 0)
        assert why in reject.reason
        assert not server.state.groups
        assert not len(server.state.idle)
    tasks = begun(server)
    (reject,) = server.handle(1.0, replace(report(tasks[0]), members=(*MEMBERS, poor)))
    assert isinstance(reject, Reject)


def test_a_plan_that_learns_needs_a_method_and_a_model_that_can_have_it() -> None:
    with pytest.raises(Refused, match="the server's rank is 4"):
        over(GradientScore(rank=8))
    with pytest.raises(Refused, match="no list of blocks"):
        over(GradientScore(rank=4), shape=toys.SHAPE)
    with pytest.raises(Refused, match="keep a side"):
        over(GradientScore(rank=4), method=FedSA())


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"spread": -0.1}, "spread"), ({"loss": 1e13}, "loss"), ({"mass": {"query": float("nan")}}, "mass"),
        ({"mass": {"key": 1.0}}, "no layer"), ({"energy": (1.5,)}, "energy"), ({"energy": (0.0,) * 5000}, "directions"),
        ({"seconds": float("inf")}, "seconds"), ({"budget": None}, "another budget"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_not_learnt(more: dict[str, Any], why: str) -> None:
    server = over(GradientScore(8, 4, rank=4))
    task = begun(server)[0]
    (reject,) = server.handle(1.0, report(task, told(task, **more)))
    assert isinstance(reject, Reject)
    assert why in reject.reason


@pytest.mark.parametrize(
    "more",
    [
        {"client": ""}, {"client": "x" * 201}, {"rank": 0}, {"rank": 5}, {"depth": 0}, {"depth": 2**21}, {"answers": 0},
        {"answers": 10**400}, {"steps": 0}, {"steps": 10**6}, {"train": 1e-300}, {"train": -1.0}, {"up": float("nan")},
        {"down": 1e10}, {"first_loss": float("-inf")}, {"last_loss": 1e300},
    ],
)  # fmt: skip
def test_what_no_member_did_is_not_learnt(more: dict[str, Any]) -> None:
    server = over(GradientScore(8, 4, rank=4))
    task = begun(server)[0]
    spent = told(task).work[0]
    for wrong in ((replace(spent, **more),), (replace(spent, client="c1"), replace(spent, **more)), (spent, spent)):
        (reject,) = server.handle(1.0, report(task, told(task, work=wrong)))
        assert isinstance(reject, Reject)


# Whatever arrives ----------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, 2, 10**6, 10**400, -0.0, 1e-320, 1e-9, 1e9, 1e12, 1e30, 1e308, float("nan"), float("inf")]),
    st.floats(), st.integers(),
)  # fmt: skip
ANY = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5) | st.sampled_from(["GroupStatistics", "nan", "c0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "statistics", "x"]), inner),
    max_leaves=5,
)


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of all values in a JSON document."""
    yield path
    for key, inner in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield from places(inner, (*path, key))


def changed(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = dict(data) if isinstance(data, dict) else list(data)
    copy[path[0]] = changed(copy[path[0]], path[1:], value)
    return copy


@every_rule
@tries(60)
@given(data=st.data())
def test_nothing_that_is_told_stops_the_server(rule: JointRule, data: st.DataObject) -> None:
    """Read, and refused; or learnt, and every rule still plans a task that can be."""
    server = over(rule)
    tasks = begun(server)
    for turn in range(3):
        task = tasks[turn % 2] if turn < 2 else next(iter(server.state.busy.values()))
        document = json.loads(messages.encode_report(RegionReport(told(task), MEMBERS)))
        for _ in range(data.draw(st.integers(0, 2))):
            path = data.draw(st.sampled_from(list(places(document))))
            document = changed(document, path, data.draw(NUMBERS if path and path[0] == "statistics" else ANY))
        try:
            read = messages.parse_report(json.dumps(document))
        except Malformed:
            read = RegionReport(told(task), MEMBERS)
        commands = server.handle(
            float(turn), EdgeReported(task.client, task.id, answer(task), read.statistics, MEMBERS)
        )
        if task.id in server.state.busy:
            assert isinstance(commands[0], Reject)
            server.handle(float(turn), report(task))
    for task in server.state.busy.values():
        budget = task.budget
        assert 1 <= budget.rank <= 4
        assert 1 <= budget.rounds <= budget.steps <= 10**9
        assert budget.depth in (None, 1)


@tries(400)
@given(st.text() | ANY.map(json.dumps))
def test_whatever_text_it_is_it_is_malformed(text: str) -> None:
    with pytest.raises(Malformed):
        messages.parse_report(text)


def test_what_is_told_arrives() -> None:
    task = begun(over(GradientScore(8, 4, rank=4)))[0]
    whole = RegionReport(told(task), MEMBERS)
    assert messages.parse_report(messages.encode_report(whole)) == whole
    with pytest.raises(Malformed, match="above the limit"):
        messages.parse_report(" " * messages.MAX_REPORT + messages.encode_report(whole))
    with pytest.raises(Malformed):
        messages.parse_report("[" * 10**5)
    odd = json.loads(messages.encode_report(whole))
    odd["statistics"]["more"] = 1
    with pytest.raises(Malformed, match="other fields"):
        messages.parse_report(json.dumps(odd))


def test_a_plain_client_of_a_server_over_regions_is_as_any() -> None:
    server = over()
    assert server.handle(0.0, ClientJoined(NORTH)) == []
    assert not server.state.groups
