"""The driver on real machines: the same pure core as in a simulation, over a link that carries messages. It decides nothing.

What can fail does fail: a message is lost, comes twice, comes late; a site is killed, cut off, restarted; so is the server. On the
wire a task is sent at least once, in the model its answer counts once:

- a task keeps its number through every resend and every restart, and a site that has answered it gives the same bytes again;
- before a task is sent, a checkpoint on the disk knows of it, so a server that comes back asks for what is outstanding and for
  nothing else;
- a site learns that its answer was accepted, and what it keeps of that task, only with its next task, which is sent later than the
  checkpoint that says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from logging import getLogger
from typing import ClassVar

from fedloom.core.events import (
    Cancel,
    ClientLost,
    Command,
    Dispatch,
    Evaluate,
    Event,
    Reject,
    ScoresReady,
    Stop,
    TaskFailed,
    TimerFired,
    UpdateArrived,
)
from fedloom.core.policies import Evaluator, Observer, do_nothing
from fedloom.core.schema import Malformed
from fedloom.core.server import Coordinator
from fedloom.core.types import ClientId, Profile, Task
from fedloom.deploy.link import Transport, RawReply
from fedloom.deploy.messages.container import NotOutstanding
from fedloom.deploy.messages.messages import JoinRequest, Refusal, RunTerms, Welcome, TaskRequest, encode_request
from fedloom.deploy.messages.seeded_sides import without_seeded_sides
from fedloom.deploy.server.config import Timeouts
from fedloom.deploy.server.nodes import Node, SentMessage, ReachableNodes, LinkTraffic
from fedloom.deploy.server.reply_events import parse_reply, join_event, no_scores, no_observer

LOG = getLogger("fedloom.core.server")
MAX_DELIVERIES = 8
"""After so many failed deliveries a task counts as failed."""


@dataclass(slots=True)
class Deployment:
    """One run on real machines.

    `profiles` are all clients that ever joined, `here` those that the server counts on, `led` whom each of them leads: with `over`
    clients are regions. `accepted` is the last task of each whose answer was accepted, `tasks` are those dispatched and not yet
    answered. The run begins when `least` clients are there (`opened`). Seconds of the run are those of `clock`; after a restart they
    go on from `elapsed`, so that the time a server was away does not count.
    """

    rebuilt: ClassVar[frozenset[str]] = frozenset(
        {"server", "link", "terms", "evaluate", "observe", "profiles", "least", "patience", "settled", "clock"}
        | {"traffic", "sites", "failed", "looked", "began", "changed", "over"}
    )
    server: Coordinator
    transport: Transport
    terms: RunTerms
    profiles: dict[ClientId, Profile]
    min_clients: int = 1
    timeouts: Timeouts = field(default_factory=Timeouts)
    clock: Callable[[], float] = time.monotonic
    evaluate: Evaluator = no_scores
    observe: Observer = no_observer
    save: Callable[[], None] = do_nothing
    over_regions: bool = False
    clients: dict[ClientId, Profile] = field(default_factory=dict)
    members: dict[ClientId, tuple[Profile, ...]] = field(default_factory=dict)
    accepted: dict[ClientId, int] = field(default_factory=dict)
    tasks: dict[int, Task] = field(default_factory=dict)
    opened: bool = False
    elapsed: float = 0.0
    incarnation: int = 0
    traffic: LinkTraffic = field(default_factory=LinkTraffic)
    nodes: ReachableNodes = field(default_factory=ReachableNodes)
    failed_deliveries: dict[int, int] = field(default_factory=dict)
    looked_at: float | None = None
    began_at: float | None = None
    changed: bool = True

    def run(self, pause: Callable[[float], None] = time.sleep) -> str:
        """Until the server stops; returns its reason."""
        while not (stop := self.turn()):
            pause(self.timeouts.poll)
        return stop.reason

    def turn(self) -> Stop | None:
        """All that has happened since the last turn; then a checkpoint, then what is to be sent."""
        if self.began_at is None:
            self.began_at, self.incarnation = self.clock() - self.elapsed, self.incarnation + 1
            self.profiles.update(self.clients)
        now = self.elapsed = max(self.elapsed, self.clock() - self.began_at)
        for step in (self._collect, self._look, self._overdue, self._timer):
            if stop := step(now):
                return stop
        if self.changed:
            self.save()
            self.changed = False
        self._send(now)
        return None

    def happens(self, event: Event) -> Stop | None:
        """Something that no link tells of."""
        return self._tell(self.elapsed, event)

    # What happened ------------------------------------------------------------------------------------------------------

    def _collect(self, now: float) -> Stop | None:
        return next((stop for reply in self.transport.collect() if (stop := self.arrived(now, reply))), None)

    def arrived(self, now: float, reply: RawReply) -> Stop | None:
        """What the link has brought: to a task, or to the question who is there."""
        sent = self.nodes.in_flight.pop(reply.message, SentMessage(reply.node, None, now))
        if reply.body is None:
            return self._undelivered(now, sent, reply.error)
        self.traffic.received += 1
        self.traffic.bytes_up += len(reply.body)
        try:
            told = parse_reply(reply.body, self.tasks, now, self.over_regions)
        except NotOutstanding:
            self.traffic.late += 1
            self.nodes.ask_again(sent.node, self.clients)
            return None
        except Malformed as error:
            return self._unusable(now, sent, str(error))
        if isinstance(told, Welcome):
            return self._welcome(now, sent.node, told)
        if isinstance(told, Refusal):
            return self._refused(now, sent, told)
        client, number = told.client, told.task
        if number != sent.task or client != self.tasks[number].client:
            return self._unusable(now, sent, f"{client!r} answers task {number} of {self.tasks[number].client!r}")
        return self._tell(now, told)

    def _undelivered(self, now: float, sent: SentMessage, error: str) -> Stop | None:
        """Sent again when the node has rested, unless that was so too often."""
        node, tries = self.nodes.nodes.get(sent.node), 1
        if sent.task in self.tasks and not sent.given_up:
            tries = self.failed_deliveries[sent.task] = self.failed_deliveries.get(sent.task, 0) + 1
        LOG.warning("a message to %s was not answered: %s", node.client if node else sent.node, error)
        if node:
            node.resting_until, node.why = now + min(self.timeouts.retry * 2 ** (tries - 1), self.timeouts.pause), error
        if tries < MAX_DELIVERIES or sent.task not in self.tasks:
            return None
        return self._failed(now, self.tasks[sent.task], error, gone=True)

    def _unusable(self, now: float, sent: SentMessage, reason: str) -> Stop | None:
        """A reply that is none: what was asked counts as failed."""
        LOG.error("a reply of node %s cannot be used: %s", sent.node, reason)
        if sent.task in self.tasks and not sent.given_up:
            return self._failed(now, self.tasks[sent.task], reason)
        self.nodes.rest(now + self.timeouts.pause, sent.node, reason)
        return None

    def _welcome(self, now: float, number: int, told: Welcome) -> Stop | None:
        node, profile, client = self.nodes.nodes.get(number), told.profile, told.profile.client
        until = now + self.timeouts.pause
        if node is None:
            return None
        if node.name not in (None, client):
            reason = f"it says that it is {client!r}, and its key is that of {node.name!r}"
            self.nodes.rest(until, number, reason)
            return None
        if self.nodes.of(client) not in (None, number):
            self.nodes.rest(until, number, f"there is another {client!r} already")
            return None
        node.client, node.why, node.seeded = client, "", told.seeded
        self.nodes.missing.pop(client, None)
        if self.clients.get(client) == profile and self.members.get(client) == told.members:
            return None
        LOG.info("%s is there: %d examples", client, profile.examples)
        self.clients[client], self.members[client] = profile, told.members
        self.profiles[client] = profile
        if not self.opened and len(self.clients) < self.min_clients:
            return None
        joining, self.opened = [client] if self.opened else sorted(self.clients), True
        return self._tell_all(now, [join_event(self.clients[one], self.members[one], self.over_regions) for one in joining])

    def _refused(self, now: float, sent: SentMessage, told: Refusal) -> Stop | None:
        """A task that a site will not do; if the reason lasts, the site is left alone for a while and its client is gone.

        Which task it is follows from the message that is replied to: nobody refuses what was sent to another.
        """
        self.traffic.refused, number = self.traffic.refused + 1, sent.task
        LOG.warning("node %s refuses: %s", sent.node, told.reason)
        if number is None or told.lasting:
            self.nodes.rest(now + self.timeouts.pause, sent.node, told.reason)
        if number not in self.tasks:
            self.nodes.ask_again(sent.node, self.clients)
            return None
        return self._failed(now, self.tasks[number], told.reason, gone=told.lasting)

    def _failed(self, now: float, task: Task, reason: str, gone: bool = False) -> Stop | None:
        stop = self._tell(now, TaskFailed(task.client, task.id, reason))
        return self._lost(now, task.client) if gone and not stop else stop

    def _look(self, now: float) -> Stop | None:
        """Nodes that came and went; who was away for too long is lost."""
        if self.looked_at is not None and now < self.looked_at + self.timeouts.look:
            return None
        self.looked_at = now
        self.nodes.seen(now, self.transport.nodes(), self.clients)
        lost = [client for client, since in self.nodes.missing.items() if now > since + self.timeouts.away]
        return next((stop for client in lost if (stop := self._lost(now, client))), None)

    def _overdue(self, now: float) -> Stop | None:
        """Tasks that nobody waits for any more. Their sites count again when they have answered.

        What was sent long ago may be lost without a word: it is sent again, ever more seldom, and a site that still works on it has
        the answer ready when it comes to the second.
        """
        self.nodes.doubt(now, self.timeouts.doubt)
        if self.timeouts.task is None:
            return None
        late = [task.client for task in self.tasks.values() if now > task.sent + self.timeouts.task]
        return next((stop for client in late if (stop := self._lost(now, client))), None)

    def _timer(self, now: float) -> Stop | None:
        wake = self.server.wake() if self.opened else None
        return self._tell(now, TimerFired()) if wake is not None and wake <= now else None

    def _lost(self, now: float, client: ClientId) -> Stop | None:
        LOG.warning("%s is lost", client)
        del self.clients[client]
        self.nodes.missing.pop(client, None)
        if (number := self.nodes.of(client)) is not None:
            self.nodes.nodes[number].client = None
        return self._tell(now, ClientLost(client)) if self.opened else None

    # What the server does about it --------------------------------------------------------------------------------------

    def _tell_all(self, now: float, events: Iterable[Event]) -> Stop | None:
        stop = None
        for event in events:
            stop = self._tell(now, event) or stop
        return stop

    def _tell(self, now: float, event: Event) -> Stop | None:
        commands = self.server.handle(now, event)
        self.changed = True
        rejected = any(isinstance(command, Reject) for command in commands)
        if isinstance(event, ClientLost):
            self.tasks = {number: task for number, task in self.tasks.items() if task.client != event.client}
        if isinstance(event, TaskFailed | UpdateArrived) and not rejected:
            self.tasks.pop(event.task, None)
            self.failed_deliveries.pop(event.task, None)
        if isinstance(event, UpdateArrived) and not rejected:
            self.accepted[event.client] = event.task
        self.observe(now, event, commands)
        stop = self._tell_all(now, self._carried_out(commands))
        return commands[-1] if commands and isinstance(commands[-1], Stop) else stop

    def _carried_out(self, commands: Iterable[Command]) -> list[Event]:
        """Do what can be done at once; the events that it makes."""
        events = list[Event]()
        for command in commands:
            match command:
                case Dispatch(task):
                    self.tasks[task.id] = task
                case Cancel(number):
                    self.tasks.pop(number, None)
                case Evaluate(version, model):
                    events.append(ScoresReady(version, self.evaluate(model)))
                case Reject(client, 0, reason):
                    self.nodes.turn_away(self.elapsed + self.timeouts.pause, client, reason)
                    events += [ClientLost(client)] if self.clients.pop(client, None) else []
                case Reject(client, number, reason) if number in self.tasks:
                    events.append(TaskFailed(client, number, reason))
        return events

    def _send(self, now: float) -> None:
        """Its task to every client that has one, the question who is there to every node that has not said so."""
        due = {task.client: task for task in self.tasks.values()}
        for number, node in self.nodes.free(now):
            if node.client is None:
                self._post(number, None, encode_request(JoinRequest(self.terms, self.incarnation)))
            elif task := due.get(node.client):
                self._post(number, task.id, encode_request(self._work(task, node)))

    def _work(self, task: Task, node: Node) -> TaskRequest:
        if any(sent.task == task.id for sent in self.nodes.in_flight.values()) or task.id in self.failed_deliveries:
            self.traffic.resent += 1
        work = TaskRequest(self.terms, self.incarnation, task, self.accepted.get(task.client, 0))
        return without_seeded_sides(work, self.server.state.first.adapter) if node.seeded else work

    def _post(self, number: int, task: int | None, body: bytes) -> None:
        self.nodes.in_flight[self.transport.send(number, body)] = SentMessage(number, task, self.elapsed)
        self.traffic.sent += 1
        self.traffic.bytes_down += len(body)
