"""A key acts for its own node, and pushes what is awaited of it: replies of its own, each within the size that its task can have."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from flwr.proto.message_pb2 import ObjectTree
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fedloom.deploy.flower.roster import RosterEntry
from fedloom.deploy.flower.site_calls import (
    AWAITED,
    KEYLESS_CALLS,
    OF_A_KEY,
    PIECE,
    SITE_CALLS,
    AwaitedReplies,
    CallRules,
    RequestRefused,
    most_bytes,
    most_objects,
)
from tests.attacks.network import AWAITS, LARGEST, NODES, RUN, piece, reply

ONE = RosterEntry("KEY", "one", NODES["one"])


@pytest.fixture
def rules(tmp_path: Path) -> CallRules:
    awaited = AwaitedReplies(tmp_path / AWAITED, RUN)
    for name, node in NODES.items():
        awaited.add(node, AWAITS[name], LARGEST)
    return CallRules(tmp_path, replies_only=True, quota=2**30)


def status(rules: CallRules, call: str, body: bytes, caller: RosterEntry | None = ONE) -> int:
    """The status with which a call is refused, 200 if it is not."""
    try:
        rules.check(call, body, caller)
    except RequestRefused as error:
        return int(str(error)[:3])
    return 200


@pytest.mark.parametrize("call", SITE_CALLS)
def test_each_call_passes_for_the_own_node_and_for_no_other(rules: CallRules, call: str) -> None:
    kind: Any = SITE_CALLS[call]
    if kind in OF_A_KEY:
        assert status(rules, call, kind(public_key=b"KEY").SerializeToString()) == 200
        assert status(rules, call, kind(public_key=b"OTHER").SerializeToString()) == 401
        return
    bodies: Mapping[str, bytes] = {}
    if call == "push-messages":
        bodies = {name: reply(name) for name in NODES}
    elif call == "push-object":
        bodies = {name: piece(name, "c" * 64, 100) for name in NODES}
    else:
        field = "node" if "node" in kind.DESCRIPTOR.fields_by_name else ""
        for name, node in NODES.items():
            bodies = {
                **bodies,
                name: kind(**({"node": {"node_id": node}} if field else {"node_id": node})).SerializeToString(),
            }
    assert {name: status(rules, call, body) for name, body in bodies.items()} == {"one": 200, "two": 401}
    twice = bodies["one"] + bodies["two"]  # protobuf reads the last of two values
    assert status(rules, call, twice) in (400, 401)


def test_the_calls_are_those_that_the_supernode_makes() -> None:
    """And no field of a node stands in them by another name."""
    from flwr.supernode import fleet_http_client

    source = Path(fleet_http_client.__file__).read_text(encoding="utf-8")
    assert {*SITE_CALLS, *KEYLESS_CALLS} == {
        line.split("/")[-1].strip('",') for line in source.splitlines() if '"/v1/fleet/' in line
    }
    for kind in SITE_CALLS.values():
        assert {"node", "node_id", "public_key"} & set(kind.DESCRIPTOR.fields_by_name)


@pytest.mark.parametrize(
    "fields",
    [
        {"reply_to_message_id": ""},
        {"reply_to_message_id": "", "src_node_id": 1, "dst_node_id": NODES["two"]},
        {"dst_node_id": NODES["two"]},
        {"src_node_id": NODES["two"]},
        {"src_node_id": 1},
        {"reply_to_message_id": AWAITS["two"]},
        {"reply_to_message_id": "d" * 64},
        {"run_id": RUN + 1},
        {"message_id": "d" * 64},
    ],
    ids=repr,
)
def test_what_is_no_awaited_reply_of_the_caller_is_refused(rules: CallRules, fields: Mapping[str, Any]) -> None:
    """With keys and without."""
    for caller in (ONE, None):
        assert status(rules, "push-messages", reply("one", **fields), caller) in (400, 403)
        assert status(rules, "push-messages", reply("one"), caller) == 200


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0, 1e300])
def test_a_time_that_is_none_is_refused(rules: CallRules, seconds: float) -> None:
    request = SITE_CALLS["push-messages"].FromString(reply("one"))
    request.clientapp_runtime_list.append(seconds)
    assert status(rules, "push-messages", request.SerializeToString()) == 400
    request.clientapp_runtime_list[0] = 3.5
    assert status(rules, "push-messages", request.SerializeToString()) == 200


def test_two_replies_in_a_call_are_refused(rules: CallRules) -> None:
    """Flower looks at the first alone."""
    assert status(rules, "push-messages", reply("one") + reply("one")) == 400
    assert status(rules, "push-messages", b"") == 401


@given(
    st.lists(
        st.tuples(st.sampled_from(["announce", "push"]), st.integers(0, 9), st.integers(1, 2 * LARGEST), st.booleans()),
        max_size=20,
    )
)
@example(
    [("announce", 0, 1, False), ("push", 0, LARGEST, False), ("announce", 1, 1, False), ("push", 1, LARGEST, False)]
)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_announced_and_pushed_keeps_within_the_reply(
    tmp_path: Path, steps: list[tuple[str, int, int, bool]]
) -> None:
    """In any order, again and again, and across restarts of the gate except for what went before."""
    AwaitedReplies(tmp_path / AWAITED, RUN).add(NODES["one"], AWAITS["one"], LARGEST)
    rules, sizes = CallRules(tmp_path, replies_only=True, quota=2**40), dict[str, int]()
    for what, which, size, again in steps:
        number = f"{which:064x}"
        if again:
            rules, sizes = CallRules(tmp_path, replies_only=True, quota=2**40), {}
        if what == "announce":
            status(rules, "push-messages", reply("one", [number, "e" * 64]))
        elif status(rules, "push-object", piece("one", number, size)) == 200:
            sizes[number] = max(size, sizes.get(number, 0))
        assert sum(sizes.values()) <= most_bytes(LARGEST)
        assert len(sizes) <= most_objects(LARGEST)


def test_the_largest_reply_passes_sent_again_or_after_a_restart_of_the_gate(tmp_path: Path) -> None:
    size = 2 * PIECE + 3
    awaited = AwaitedReplies(tmp_path / AWAITED, RUN)
    awaited.add(NODES["one"], AWAITS["one"], size)
    rules = CallRules(tmp_path, replies_only=True, quota=2**40)
    numbers = [f"{number:064x}" for number in range(most_objects(size) - 1)]
    sizes = [100, 100, 100, PIECE, PIECE, 3]
    assert len(numbers) >= len(sizes)
    for _ in range(2):
        for again in (False, True):
            if again:
                rules = CallRules(tmp_path, replies_only=True, quota=2**40)
            else:
                assert status(rules, "push-messages", reply("one", numbers)) == 200
            for number, length in zip(numbers, sizes, strict=False):
                assert status(rules, "push-object", piece("one", number, length)) == 200
    awaited.remove(NODES["one"], AWAITS["one"])
    assert status(rules, "push-messages", reply("one", numbers)) == 403
    assert status(rules, "push-object", piece("one", numbers[0], 100)) == 403


def test_a_reply_of_more_objects_is_refused_when_it_is_announced(rules: CallRules) -> None:
    numbers = [f"{number:064x}" for number in range(most_objects(LARGEST) + 1)]
    assert status(rules, "push-messages", reply("one", numbers)) == 413
    assert status(rules, "push-messages", reply("one", numbers[1:])) == 200
    assert status(rules, "push-messages", reply("one", numbers[:-1])) == 413, "others for the same reply"


def test_above_the_quota_nothing_is_taken_until_the_next_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    AwaitedReplies(tmp_path / AWAITED, RUN).add(NODES["one"], AWAITS["one"], LARGEST)
    now, rules = 86400.0 * 20_000, CallRules(tmp_path, replies_only=True, quota=2500)
    monkeypatch.setattr("fedloom.deploy.flower.site_calls.time.time", lambda: now)
    found = [status(rules, "push-object", piece("one", "c" * 64, 1000)) for _ in range(3)]
    assert found == [200, 200, 429]
    now += 86400
    assert status(rules, "push-object", piece("one", "c" * 64, 1000)) == 200


@given(
    call=st.sampled_from([*SITE_CALLS]),
    body=st.binary(max_size=200) | st.binary(max_size=40).map(lambda tail: reply("one") + tail),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_upset_it(rules: CallRules, call: str, body: bytes) -> None:
    with suppress(RequestRefused):
        rules.check(call, body, ONE)


def test_a_deep_tree_is_refused(rules: CallRules) -> None:
    tree = ObjectTree(object_id="0")
    for number in range(60):
        tree = ObjectTree(object_id=str(number), children=[tree])
    kind: Any = SITE_CALLS["push-messages"]
    request = kind.FromString(reply("one"))
    request.message_object_trees[0].CopyFrom(tree)
    request.messages_list[0].metadata.message_id = tree.object_id
    assert status(rules, "push-messages", request.SerializeToString()) == 413
