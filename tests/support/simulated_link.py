"""A federation in one process: sites that keep their word, behind a net that does not. Time passes when the driver pauses."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from fedloom.core.fingerprint import fingerprint
from fedloom.core.transfer import encode_answer, residual_of
from fedloom.core.types import ClientState, Profile
from fedloom.deploy.link import RawReply
from fedloom.deploy.messages import answer as wire
from fedloom.deploy.messages.messages import (
    Acknowledged,
    JoinRequest,
    RunEnded,
    TaskRequest,
    Welcome,
    decode_request,
    encode_reply,
)
from fedloom.deploy.server.key_facts import KeyFacts
from fedloom.deploy.server.reply_events import REGION
from tests.support.toys import Quadratic

VALUES: dict[str, Any] = {}
"""Run values that a run file of a test has from here, by name."""


@dataclass
class Site:
    """A worker with a journal of its last answer. It keeps count of what it trained, and of whose `Local` it went on from.

    Every `unusable`-th task has an answer that the server must refuse.
    """

    profile: Profile
    seconds: float = 1.0
    unusable: int = 9
    trainer: Quadratic = field(default_factory=Quadratic)
    local: ClientState = field(default_factory=ClientState)
    last: tuple[int, str, bytes, ClientState] | None = None
    trained: Counter[tuple[int, str]] = field(default_factory=Counter)
    kept: list[int] = field(default_factory=list)
    ended: str = ""

    def answer(self, body: bytes) -> bytes:
        """As `Worker.answer`."""
        ask = decode_request(body, 2**30)
        if isinstance(ask, JoinRequest):
            return encode_reply(Welcome(self.profile, ask.incarnation))
        if isinstance(ask, RunEnded):
            self.ended = ask.reason
            return encode_reply(Acknowledged(self.profile.client))
        assert isinstance(ask, TaskRequest)
        task = ask.task
        key = (task.id, fingerprint(task.start.train))
        if self.last and self.last[:2] == key:
            return self.last[2]
        if self.last and ask.last_accepted == self.last[0]:
            self.local = self.last[3]
            self.kept.append(ask.last_accepted)
        ((result, local),) = self.trainer.train([(task, self.local)])
        if task.id % self.unusable == 0:
            result = replace(result, examples=0)
        told, left = encode_answer(task, self.local, result, local)
        answer = wire.encode_result(task, replace(result, metrics=told.metrics), residual_of(task.start, self.local))
        self.trained[key] += 1
        self.last = (*key, answer, left)
        return answer


@dataclass
class Trouble:
    """How often, a message, and what goes wrong: the way there, the way back, both ways twice, a site away for a while."""

    lost: float = 0.0
    unanswered: float = 0.0
    twice: float = 0.0
    away: float = 0.0


@dataclass
class Net:
    """A link to sites by node number, with trouble drawn from a seed. `clock` and `pause` are the driver's."""

    sites: Mapping[int, Site]
    trouble: Trouble = field(default_factory=Trouble)
    seed: int = 0
    named: bool = True
    time: float = 0.0
    heap: list[tuple[float, int, RawReply]] = field(default_factory=list)
    made: int = 0
    back: dict[int, float] = field(default_factory=dict)
    free: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = Random(self.seed)

    def clock(self) -> float:
        return self.time

    def pause(self, seconds: float) -> None:
        self.time += seconds

    def nodes(self) -> Mapping[int, str | None]:
        here = [number for number in self.sites if self.back.get(number, 0.0) <= self.time]
        return {number: self.sites[number].profile.client if self.named else None for number in here}

    def facts_of(self, name: str) -> KeyFacts:
        """Who is a region there has the key of one."""
        return KeyFacts(
            region=any(one.profile.client == name and one.profile.tier == REGION for one in self.sites.values())
        )

    def send(self, node: int, body: bytes, largest_reply: int) -> str:
        self.made += 1
        message, site, draw = f"m{self.made}", self.sites[node], self.random.random
        if self.trouble.away and draw() < self.trouble.away:
            self.back[node] = self.time + 20 * draw()
        if draw() < self.trouble.lost:
            self._put(self.time + 5 * draw(), RawReply(message, node, error="it did not get there"))
            return message
        begin = max(self.time, self.free.get(node, 0.0), self.back.get(node, 0.0))
        takes = site.seconds if isinstance(decode_request(body, 2**30), TaskRequest) else 0.2
        self.free[node] = begin + takes * (0.5 + draw())
        answer = site.answer(body)
        assert len(answer) <= largest_reply
        lost = draw() < self.trouble.unanswered
        self._put(
            self.free[node],
            RawReply(message, node, None, "the answer was lost") if lost else RawReply(message, node, answer),
        )
        if draw() < self.trouble.twice:
            self._put(self.free[node] + 3 * draw(), RawReply(message, node, site.answer(body) if not lost else answer))
        return message

    def collect(self) -> Sequence[RawReply]:
        found = []
        while self.heap and self.heap[0][0] <= self.time:
            found.append(heapq.heappop(self.heap)[2])
        return found

    def forget(self) -> None:
        """The server is another process now: nobody hands it the replies to the old one."""
        self.heap.clear()

    def _put(self, at: float, reply: RawReply) -> None:
        heapq.heappush(self.heap, (at, self.made * 2 + len(self.heap), reply))
