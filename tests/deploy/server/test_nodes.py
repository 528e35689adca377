"""The table of nodes: what it looks up is what a search through all messages would find."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from fedloom.deploy.server.nodes import Node, NodeTable, SentMessage
from tests.support.storms import tries

AFTER = 10.0
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers(0, 3), st.integers(1, 4)),
        st.tuples(st.just("reply"), st.integers(0, 30), st.just(0)),
        st.tuples(st.just("gone"), st.integers(0, 3), st.just(0)),
        st.tuples(st.just("wait"), st.integers(1, 45), st.just(0)),
    ),
    max_size=40,
)


def give_up_by_search(in_flight: dict[str, SentMessage], now: float) -> None:
    """The rule as it is told: a message is old after `AFTER` seconds, doubled for each one to its node that was given up before."""
    for message, sent in in_flight.items():
        before = sum(other.node == sent.node and other.given_up for other in in_flight.values())
        if not sent.given_up and now > sent.sent + AFTER * 2**before:
            in_flight[message] = replace(sent, given_up=True)


AGAIN = [("send", 0, 1), ("wait", 11, 0), ("send", 0, 1), ("wait", 15, 0), ("reply", 1, 0), ("wait", 1, 0)]
"""A second message has twice as long, until the reply to the first one comes after all."""


@given(steps=STEPS)
@example(steps=AGAIN)
@tries(100)
def test_messages_are_given_up_as_a_search_through_all_would(steps: list[tuple[str, int, int]]) -> None:
    table, searched, now, sent = NodeTable(), dict[str, SentMessage](), 0.0, 0
    table.update(now, dict.fromkeys(range(4)), ())
    for kind, number, task in steps:
        match kind:
            case "send" if number in dict(table.free(now)):
                sent += 1
                table.add(f"m{sent}", SentMessage(number, task, now))
                searched[f"m{sent}"] = SentMessage(number, task, now)
            case "reply":
                assert table.take(f"m{number}") == searched.pop(f"m{number}", None)
            case "gone":
                table.update(now, dict.fromkeys({0, 1, 2, 3} - {number}), ())
                table.update(now, dict.fromkeys(range(4)), ())
                given_up = {m: replace(one, given_up=True) for m, one in searched.items() if one.node == number}
                searched |= given_up
            case "wait":
                now += number
        table.give_up_old(now, AFTER)
        give_up_by_search(searched, now)
        assert table.in_flight == searched
        tasks = [one.task for one in searched.values()]
        assert table.copies == {task: tasks.count(task) for task in tasks}


def test_a_client_is_found_where_it_was_let_in_until_it_is_let_go() -> None:
    table = NodeTable()
    table.update(0.0, {7: None, 8: None}, ())
    assert table.node_of("a") is None
    table.let_in(7, "a", seeded=True)
    assert (table.node_of("a"), table.reachable[7]) == (7, Node(None, "a", seeded=True))
    table.let_go("a")
    assert table.node_of("a") is None
    table.let_in(8, "a", seeded=False)
    table.let_in(7, "b", seeded=False)
    table.update(1.0, {7: None}, ("a", "b"))
    assert (table.node_of("a"), table.node_of("b"), table.missing) == (None, 7, {"a": 1.0})
    table.update(2.0, {7: None, 8: None}, ("a", "b"))
    assert table.node_of("a") is None, "a node that came back is asked who it is"


def test_turns_in_which_nothing_gets_old_look_at_no_message() -> None:
    class Looked(dict[str, SentMessage]):
        times = 0

        def items(self) -> Any:
            Looked.times += 1
            return super().items()

    table = NodeTable(in_flight=Looked())
    table.update(0.0, dict.fromkeys(range(50)), ())
    for number in range(50):
        table.add(f"m{number}", SentMessage(number, number, sent=0.1 * number))
    for turn in range(100):
        table.give_up_old(5.0 + 0.05 * turn, AFTER)
    assert Looked.times <= 2
    table.give_up_old(AFTER + 2.5, AFTER)
    assert sum(sent.given_up for sent in table.in_flight.values()) == 25
