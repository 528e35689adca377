"""The last question of a run on real machines: how good is its model on what each site holds out? Nobody is waited for for ever."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from logging import getLogger

from fedloom.clientscores import last_ranks, last_start
from fedloom.flower.driven import LARGEST
from fedloom.flower.driver import TRIES, Deployment
from fedloom.flower.link import Reply
from fedloom.flower.message import Exam, Marks, decode_marks, encode
from fedloom.job import Job
from fedloom.train.evaluate import LARGEST as HOPELESS
from fedloom.types import ClientId
from fedloom.wire import Malformed

LOG = getLogger("fedloom.server")


@dataclass(slots=True)
class Examiner:
    """Asks each client of `exams` once, again where the message got lost; `marks` are the answers, `without` why there is none.

    `rests` says until when a client is not asked again, `away` since when its node cannot be reached.
    """

    running: Deployment
    exams: Mapping[ClientId, Exam]
    marks: dict[ClientId, Marks] = field(default_factory=dict)
    without: dict[ClientId, str] = field(default_factory=dict)
    under_way: dict[str, ClientId] = field(default_factory=dict)
    tries: dict[ClientId, int] = field(default_factory=dict)
    rests: dict[ClientId, float] = field(default_factory=dict)
    away: dict[ClientId, float] = field(default_factory=dict)
    looked: float = -math.inf

    def ask(self, pause: Callable[[float], None]) -> None:
        """Until each has answered, declined, gone, or said nothing in the seconds that a task may take (`Patience.doubt`, if there
        is no such limit).
        """
        running = self.running
        seconds, clock = running.patience.task or running.patience.doubt, running.clock
        node_of = {client: number for client in self.exams if (number := running.sites.of(client)) is not None}
        self.without |= dict.fromkeys(self.exams.keys() - node_of, "it could not be reached")
        until = clock() + seconds
        while waits := sorted(self.exams.keys() - self.marks.keys() - self.without.keys()):
            running.sites.scoring = tuple(waits)
            now = clock()
            for reply in running.link.collect():
                self._hear(now, reply)
            self._look(now, node_of)
            if now > until:
                self.without |= dict.fromkeys(set(waits) - self.marks.keys(), f"no answer within {seconds:g} s")
            for client in waits:
                if self._due(now, client):
                    self._post(client, node_of[client])
            pause(running.patience.poll)
        running.sites.scoring = ()

    def _due(self, now: float, client: ClientId) -> bool:
        ended = client in self.marks or client in self.without or client in self.away
        return not ended and client not in self.under_way.values() and now >= self.rests.get(client, now)

    def _post(self, client: ClientId, node: int) -> None:
        body = encode(self.exams[client])
        self.under_way[self.running.link.send(node, body)] = client
        self.running.traffic.sent += 1
        self.running.traffic.bytes_down += len(body)

    def _look(self, now: float, node_of: Mapping[ClientId, int]) -> None:
        """Who is away for too long is left out; a message to who comes back is sent again, since it may be lost."""
        patience = self.running.patience
        if now < self.looked + patience.look:
            return
        self.looked, present = now, self.running.link.nodes()
        gone = {client for client, number in node_of.items() if number not in present}
        self.away = {client: self.away.get(client, now) for client in gone}
        self.under_way = {message: client for message, client in self.under_way.items() if client not in gone}
        for client, since in self.away.items():
            if now > since + patience.away and client not in self.marks:
                self.without.setdefault(client, "it went away")

    def _hear(self, now: float, reply: Reply) -> None:
        client = self.under_way.pop(reply.message, None)
        if client is None:  # the answer to a task that has become useless
            return
        if reply.body is None:
            self._undelivered(now, client, reply.error)
            return
        self.running.traffic.received += 1
        self.running.traffic.bytes_up += len(reply.body)
        try:
            told = decode_marks(reply.body, LARGEST, self.exams[client])
        except Malformed as error:
            LOG.error("what %s says to the exam cannot be used: %s", client, error)
            self.without[client] = f"its answer could not be used: {error}"
            return
        if isinstance(told, Marks):
            self.marks[client] = told
        else:
            LOG.warning("%s declines the exam: %s", client, told.reason)
            self.running.traffic.refused += 1
            self.without[client] = f"it declined: {told.reason}"

    def _undelivered(self, now: float, client: ClientId, error: str) -> None:
        LOG.warning("the exam of %s was not answered: %s", client, error)
        tries = self.tries[client] = self.tries.get(client, 0) + 1
        self.rests[client] = now + min(self.running.patience.again * 2 ** (tries - 1), self.running.patience.pause)
        if tries >= TRIES:
            self.without[client] = f"it was not reached: {error}"


def held_out_lines(job: Job, running: Deployment, pause: Callable[[float], None]) -> Iterator[dict[str, object]]:
    """For each client that ever was there its line, as after a simulation (`clientscores`), or why it has none.

    Regions are not asked: they have no examples.
    """
    ranks = last_ranks(job) if job.run.held_out and not job.run.hierarchy else {}
    exams = {
        client: Exam(
            running.terms,
            running.incarnation,
            client,
            last_start(job, ranks[client]),
            running.accepted.get(client, 0),
        )
        for client in sorted(ranks.keys() & running.here.keys())
    }
    examiner = Examiner(running, exams)
    examiner.ask(pause)
    for client in sorted(ranks):
        line = {"client": client, "tier": job.profiles[client].tier, "rank": ranks[client]}
        if client in examiner.marks:
            yield {"kind": "client", **line, **figures(examiner.marks[client], job.base.labels is None)}
        else:
            yield {"kind": "unscored", **line, "reason": examiner.without.get(client, "it was gone before the end")}


def figures(marks: Marks, writes: bool) -> dict[str, float]:
    """As `Scores.figures` names them, as far as sums tell; the baseline is what needs no training."""
    told = {"held_out": marks.examples, "accuracy": marks.right / marks.asked, "loss": marks.loss / marks.asked}
    base = {"base_accuracy": marks.base_right / marks.asked}
    if not writes:
        return {**told, **base}
    before = marks.base_loss / marks.asked
    perplexity, old = (math.exp(min(loss, HOPELESS)) for loss in (told["loss"], before))
    return {**told, "perplexity": perplexity, "tokens": marks.asked, **base, "base_perplexity": old}
