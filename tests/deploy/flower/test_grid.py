"""The link over Flower's Grid, where the SuperLink is slow."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.proto.message_pb2 import ObjectTree, PullObjectRequest, PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError

from fedloom.deploy.flower import grid
from fedloom.deploy.flower.grid import MOST_POLL, POLL, GridTransport
from fedloom.deploy.flower.site_calls import TooLarge, most_objects


def test_a_push_that_took_too_long_is_a_reply_that_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def push(messages: list[Any]) -> list[str]:
        raise ObjectPushError("piece", 3, "session")

    monkeypatch.setattr(grid, "Message", lambda *content, **more: SimpleNamespace(object_id="a"))
    flower: Any = SimpleNamespace(push_messages=push, run=SimpleNamespace(run_id=3))
    link = GridTransport(flower, tmp_path / "awaited.json")
    number = link.send(7, b"x", 100)
    [reply] = link.collect()
    assert (reply.message, reply.node, reply.body) == (number, 7, None)
    assert "piece" in reply.error


def test_a_busy_superlink_is_asked_less_and_an_outage_delays_nothing_after_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now, took, slept = 0.0, [0.01, 0.3, 60.0], list[float]()

    def pull(asked: object) -> Any:
        nonlocal now
        now += took[len(slept)]
        return SimpleNamespace(messages_list=[], message_object_trees=[])

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == len(took):
            raise InterruptedError

    monkeypatch.setattr(grid, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    flower: Any = SimpleNamespace(_runtime_client=SimpleNamespace(PullMessages=pull), run=SimpleNamespace(run_id=3))
    link = GridTransport(flower, tmp_path / "awaited.json")
    link._sent["1"] = grid.SentTo(7, 100)
    link._ask()
    assert slept == pytest.approx([POLL, 4 * 0.3, MOST_POLL])


def tree_of(*numbers: str) -> ObjectTree:
    return ObjectTree(object_id=numbers[0], children=[ObjectTree(object_id=number) for number in numbers[1:]])


def test_of_a_reply_that_is_too_large_no_more_is_fetched_than_the_task_can_have() -> None:
    """By its tree nothing at all; by its bytes as much as it may have and one piece more for each thread."""
    asked = list[str]()

    def pull(request: PullObjectRequest) -> PullObjectResponse:
        asked.append(request.object_id)
        return PullObjectResponse(object_found=True, object_available=True, object_content=bytes(2**19))

    client: Any = SimpleNamespace(PullObject=pull, ConfirmMessageReceived=lambda request: None)
    size = 2**20
    with pytest.raises(TooLarge):
        grid.fetch_message(client, tree_of(*map(str, range(most_objects(size) + 1))), Node(node_id=1), 3, size)
    assert asked == []
    with pytest.raises(TooLarge):
        grid.fetch_message(client, tree_of(*map(str, range(most_objects(size)))), Node(node_id=1), 3, size)
    assert 2 < len(asked) <= most_objects(size)


def test_a_reply_that_never_comes_holds_no_thread_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "UPLOAD", 0.1)
    away = PullObjectResponse(object_found=True, object_available=False)
    client: Any = SimpleNamespace(PullObject=lambda request: away, ConfirmMessageReceived=None)
    with pytest.raises(ObjectPullError, match="timeout"):
        grid.fetch_message(client, tree_of("a"), Node(node_id=1), 3, 100)


def test_the_gate_hears_of_a_reply_before_the_message_is_sent_and_until_it_is_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, seen = tmp_path / "awaited.json", list[Any]()

    def push(messages: list[Any]) -> list[str]:
        seen.append(json.loads(path.read_bytes())["nodes"])
        return ["a"]

    monkeypatch.setattr(grid, "Message", lambda *content, **more: SimpleNamespace(object_id="a"))
    monkeypatch.setattr(GridTransport, "_ask", lambda self: None)
    run: Any = SimpleNamespace(run_id=3)
    link = GridTransport(SimpleNamespace(push_messages=push, run=run, node=None, _runtime_client=None), path)  # type: ignore[arg-type]
    assert link.send(7, b"x", 100) == "a"
    link._fetch("a", grid.SentTo(7, 100), tree_of("a"))
    assert seen == [{"7": {"a": 100}}]
    assert json.loads(path.read_bytes()) == {"run": 3, "nodes": {}}
    assert len(link.collect()) == 1
