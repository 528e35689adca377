"""The link over Flower's Grid, where the SuperLink is slow."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from fedloom.deploy.flower import grid
from fedloom.deploy.flower.grid import MOST_POLL, POLL, GridTransport


def test_a_push_that_took_too_long_is_a_reply_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def push(messages: list[Any]) -> list[str]:
        raise ObjectPushError("piece", 3, "session")

    monkeypatch.setattr(grid, "Message", lambda *content, **more: None)
    flower: Any = SimpleNamespace(push_messages=push)
    link = GridTransport(flower)
    number = link.send(7, b"x")
    [reply] = link.collect()
    assert (reply.message, reply.node, reply.body) == (number, 7, None)
    assert "piece" in reply.error


def test_a_busy_superlink_is_asked_less_and_an_outage_delays_nothing_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
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
    flower: Any = SimpleNamespace(_runtime_client=SimpleNamespace(PullMessages=pull))
    link = GridTransport(flower)
    link._sent["1"] = 7
    link._ask()
    assert slept == pytest.approx([POLL, 4 * 0.3, MOST_POLL])
