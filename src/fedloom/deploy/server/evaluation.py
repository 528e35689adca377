"""The last question of a run on real machines: how good is its model on what each site holds out? Nobody is waited for for ever."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from logging import getLogger

from fedloom.core.schema import Malformed
from fedloom.core.types import Budget, ClientId
from fedloom.deploy.link import RawReply
from fedloom.deploy.messages.messages import EvaluateRequest, EvaluateResult, Refusal, decode_marks, encode_request
from fedloom.deploy.messages.region_scores import SiteResult, RegionEvaluateResult, decode_sheet
from fedloom.deploy.server.driver import MAX_DELIVERIES, Deployment
from fedloom.deploy.server.reply_events import LARGEST, REGION
from fedloom.runs.final_scores import last_ranks, last_start
from fedloom.runs.job import Job
from fedloom.train.evaluate import LARGEST_LOSS as HOPELESS

LOG = getLogger("fedloom.core.server")


def useless(reply: RawReply) -> None:
    """The run has ended: what is said to a task is of no use any more."""


@dataclass(slots=True)
class Examiner:
    """Asks each client of `exams` once, again where the message got lost; `marks` are the answers, `without` why there is none.

    Replies to what else was asked go to `others`. `rests` says until when a client is not asked again, `away` since when its node
    cannot be reached.
    """

    running: Deployment
    exams: Mapping[ClientId, EvaluateRequest]
    others: Callable[[RawReply], object] = useless
    marks: dict[ClientId, EvaluateResult | RegionEvaluateResult] = field(default_factory=dict)
    without: dict[ClientId, str] = field(default_factory=dict)
    under_way: dict[str, ClientId] = field(default_factory=dict)
    tries: dict[ClientId, int] = field(default_factory=dict)
    rests: dict[ClientId, float] = field(default_factory=dict)
    away: dict[ClientId, float] = field(default_factory=dict)
    looked: float = -math.inf

    def ask(self, pause: Callable[[float], None]) -> None:
        """Until each has answered, declined, gone, or said nothing in the seconds that it is waited for."""
        running, clock = self.running, self.running.clock
        node_of = {client: number for client in self.exams if (number := running.nodes.of(client)) is not None}
        self.without |= dict.fromkeys(self.exams.keys() - node_of, "it could not be reached")
        began = clock()
        while waits := sorted(self.exams.keys() - self.marks.keys() - self.without.keys()):
            running.nodes.scoring = tuple(waits)
            now = clock()
            for reply in running.transport.collect():
                self._hear(now, reply)
            self._look(now, node_of)
            for client in waits:
                if client not in self.marks and now > began + self._seconds(client):
                    self.without.setdefault(client, f"no answer within {self._seconds(client):g} s")
                if self._due(now, client):
                    self._post(client, node_of[client])
            pause(running.timeouts.poll)
        running.nodes.scoring = ()

    def _leads(self, client: ClientId) -> bool:
        """Whether it is a region, and has others sit the exam."""
        return self.running.over_regions and self.running.profiles[client].tier == REGION

    def _seconds(self, client: ClientId) -> float:
        return self.exams[client].seconds * (2 if self._leads(client) else 1)

    def _due(self, now: float, client: ClientId) -> bool:
        ended = client in self.marks or client in self.without or client in self.away
        return not ended and client not in self.under_way.values() and now >= self.rests.get(client, now)

    def _post(self, client: ClientId, node: int) -> None:
        body = encode_request(self.exams[client])
        self.under_way[self.running.transport.send(node, body)] = client
        self.running.traffic.sent += 1
        self.running.traffic.bytes_down += len(body)

    def _look(self, now: float, node_of: Mapping[ClientId, int]) -> None:
        """Who is away for too long is left out; a message to who comes back is sent again, since it may be lost."""
        patience = self.running.timeouts
        if now < self.looked + patience.look:
            return
        self.looked, present = now, self.running.transport.nodes()
        gone = {client for client, number in node_of.items() if number not in present}
        self.away = {client: self.away.get(client, now) for client in gone}
        self.under_way = {message: client for message, client in self.under_way.items() if client not in gone}
        for client, since in self.away.items():
            if now > since + patience.away and client not in self.marks:
                self.without.setdefault(client, "it went away")

    def _hear(self, now: float, reply: RawReply) -> None:
        client = self.under_way.pop(reply.message, None)
        if client is None:
            self.others(reply)
            return
        if reply.body is None:
            self._undelivered(now, client, reply.error)
            return
        self.running.traffic.received += 1
        self.running.traffic.bytes_up += len(reply.body)
        try:
            heard = decode_sheet if self._leads(client) else decode_marks
            told = heard(reply.body, LARGEST, self.exams[client])
        except Malformed as error:
            LOG.error("what %s says to the exam cannot be used: %s", client, error)
            self.without[client] = f"its answer could not be used: {error}"
            return
        if not isinstance(told, Refusal):
            self.marks[client] = told
        else:
            LOG.warning("%s declines the exam: %s", client, told.reason)
            self.running.traffic.refused += 1
            self.without[client] = f"it declined: {told.reason}"

    def _undelivered(self, now: float, client: ClientId, error: str) -> None:
        LOG.warning("the exam of %s was not answered: %s", client, error)
        tries = self.tries[client] = self.tries.get(client, 0) + 1
        self.rests[client] = now + min(self.running.timeouts.retry * 2 ** (tries - 1), self.running.timeouts.pause)
        if tries >= MAX_DELIVERIES:
            self.without[client] = f"it was not reached: {error}"


def held_out_lines(job: Job, running: Deployment, pause: Callable[[float], None]) -> Iterator[dict[str, object]]:
    """For each client that ever was there its line, as after a simulation (`clientscores`), or why it has none.

    A region has no examples: in its place there are its sites, each with the region as its `edge`.
    """
    ranks = _ranks(job) if job.run.held_out else {}
    seconds = running.timeouts.task or running.timeouts.doubt
    exams = {
        client: EvaluateRequest(
            running.terms,
            running.incarnation,
            client,
            last_start(job, ranks[client]),
            running.accepted.get(client, 0),
            seconds,
        )
        for client in sorted(ranks.keys() & running.clients.keys())
    }
    examiner, writes = Examiner(running, exams), job.base.labels is None
    examiner.ask(pause)
    for client in sorted(ranks):
        told, tier = examiner.marks.get(client), job.profiles[client].tier
        if isinstance(told, RegionEvaluateResult):
            yield from (_line(seat, "site", writes, {"edge": client}) for seat in told.sites)
        else:
            reason = examiner.without.get(client, "it was gone before the end")
            yield _line(SiteResult(client, ranks[client], told, reason), tier, writes, {})


def _ranks(job: Job) -> dict[ClientId, int]:
    """The rank at which each client is asked: a region at the largest, which it cuts to that of each site."""
    led = {client for client, one in job.profiles.items() if job.run.hierarchy and one.tier == REGION}
    most = Budget(job.run.plan.rank.largest, 1)
    whole = {client: most.at_most(job.profiles[client].most).rank for client in led}
    alone = {client: one for client, one in job.profiles.items() if client not in led}
    return last_ranks(replace(job, profiles=alone)) | whole


def _line(seat: SiteResult, tier: str, writes: bool, more: Mapping[str, object]) -> dict[str, object]:
    """Of `metrics.jsonl`."""
    line = {"client": seat.client, "tier": tier, "rank": seat.rank, **more}
    if seat.result is None:
        return {"kind": "unscored", **line, "reason": seat.reason}
    return {"kind": "client", **line, **figures(seat.result, writes)}


def figures(marks: EvaluateResult, writes: bool) -> dict[str, float]:
    """As `Scores.figures` names them, as far as sums tell; the baseline is what needs no training."""
    told = {"held_out": marks.examples, "accuracy": marks.correct / marks.predictions, "loss": marks.loss / marks.predictions}
    base = {"base_accuracy": marks.base_correct / marks.predictions}
    if not writes:
        return {**told, **base}
    before = marks.base_loss / marks.predictions
    perplexity, old = (math.exp(min(loss, HOPELESS)) for loss in (told["loss"], before))
    return {**told, "perplexity": perplexity, "tokens": marks.predictions, **base, "base_perplexity": old}
