"""The driver of a deployment: the pure core on real machines, over a transport that carries messages. It decides nothing.

Who calls it. `deploy.start` builds a `Deployment` around a `Coordinator` (a server, a root over regions, or the edge of a region) and
calls `run`, or `turn` again and again. One turn collects the replies that have come, updates the nodes, gives up what is
overdue, lets the coordinator's timer fire, saves a checkpoint if anything happened, and only then sends what is due. There is one
thread; a transport that needs more keeps them to itself.

What its state is. The coordinator has the state of the method. The driver has the state of the network: the clients that it
counts on, their outstanding tasks, the last accepted task of each (all saved in a checkpoint), and nodes and messages in
flight (`nodes`, not saved).

The way of a message. A node that can be reached gets a `JoinRequest`; its `Welcome` becomes a `ClientJoined` event. `Dispatch`
commands become `TaskRequest`s to free nodes. A reply is parsed (`reply_events.parse_reply`), becomes an event, and goes to
`Coordinator.handle`, whose commands are carried out here. `EvaluateRequest`s travel the same way, but the coordinator never sees
them or their replies.

What may fail. A message is lost, comes twice, comes late; bytes are garbage; a site is killed, cut off, restarted; the server too.

What is promised. A task is sent at least once, and its answer counts once in the model:

- a task keeps its number through every resend and every restart, and a site that has answered it gives the same bytes again
  (as long as its journal holds it);
- before a task is sent, a checkpoint on the disk knows of it, so a server that comes back asks for what is outstanding and for
  nothing else;
- a site learns that its answer was accepted, and which state it keeps, only with its next task, which is sent later than the
  checkpoint that says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from logging import getLogger
from typing import ClassVar

from fedloom.core.coordinator import Coordinator
from fedloom.core.events import (
    CanaryScored,
    Cancel,
    CheckCanary,
    ClientLost,
    Command,
    Dispatch,
    Evaluate,
    Event,
    OpenSum,
    PartsReady,
    Reject,
    ScoresReady,
    Stop,
    SumFailed,
    SumOpened,
    TaskFailed,
    TimerFired,
    UpdateArrived,
)
from fedloom.core.policies import (
    Evaluator,
    ExampleScorer,
    Observer,
    do_nothing,
    no_example_scores,
    no_scores,
)
from fedloom.core.schema import Malformed
from fedloom.core.types import ClientId, Profile, Task, TaskStart
from fedloom.deploy.link import RawReply, Transport
from fedloom.deploy.messages.container import NotOutstanding
from fedloom.deploy.messages.messages import (
    EvaluateRequest,
    JoinRequest,
    Refusal,
    Request,
    RunTerms,
    TaskRequest,
    Welcome,
    encode_request,
)
from fedloom.deploy.messages.seeded_sides import without_seeded_sides
from fedloom.deploy.server.config import Timeouts
from fedloom.deploy.server.evaluation import Evaluation
from fedloom.deploy.server.key_facts import KeyFacts, no_facts
from fedloom.deploy.server.nodes import LinkTraffic, Node, NodeTable, SentMessage
from fedloom.deploy.server.reply_events import REGION, join_event, largest_reply, parse_reply
from fedloom.deploy.server.sum_exchange import SumExchange
from fedloom.privacy.private import without_measures

LOG = getLogger("fedloom.deploy.server")
MAX_DELIVERIES = 8
"""After so many failed deliveries a task counts as failed."""
DECIDING = 5.0
"""Seconds after which a site is asked again whose owner has yet to accept the terms."""


def no_observer(now: float, event: Event, commands: list[Command]) -> None:
    """Observe nothing."""


@dataclass(slots=True)
class Deployment:
    """Driver of one run on real machines.

    Fields:
        server: the coordinator, which decides.
        transport: carries the messages.
        terms: what sites must know of the run.
        profiles: all clients that ever joined.
        min_clients: the run begins when so many clients are there.
        timeouts: how long to wait for what.
        clock: seconds on this machine.
        evaluate: scores a model at the server.
        check: scores a model on the canary examples.
        observe: called with each event and its commands.
        save: writes a checkpoint; called after each turn in which something happened, before anything is sent.
        over_regions: whether clients are regions.
        measured: whether answers say what their clients measured on their data (losses, tokens).
        facts_of: what the operator says of the holder of a key, by the key's name.
        clients: the clients that the server counts on.
        members: the sites of each region.
        accepted: the last task of each client whose answer was accepted (a coordinator did not reject it).
        tasks: tasks that were dispatched and not yet answered, by number.
        ready: tasks among them that are done, and whose answers are only summed.
        summing: number of the sum that is being opened (0: none).
        exchange: its messages, since this process began it.
        opened: whether the run has begun.
        elapsed: seconds of the run. After a restart they go on from the last checkpoint, so the time without a server does not count.
        incarnation: how often the server was started.
        traffic: what went over the transport.
        nodes: nodes, and messages in flight.
        evaluation: held-out evaluation by the clients, since one was begun.
        ended: whether the run is over: the coordinator gets no more events, and nothing is saved.
        failed_deliveries: by task, or client with an evaluate request, how many deliveries have failed so far.
        looked_at: when the nodes were last compared with those of the transport (s of the run; None: not yet).
        began_at: time of `clock` at which the run began, the time without a server taken off (s; None: no turn yet).
        changed: whether anything has happened since the last checkpoint.

    `rebuilt` names the fields that no checkpoint holds: they are made anew at a restart.
    """

    rebuilt: ClassVar[frozenset[str]] = frozenset(
        {"server", "transport", "terms", "profiles", "min_clients", "timeouts", "clock", "evaluate", "observe", "save"}
        | {"over_regions", "traffic", "nodes", "evaluation", "ended", "failed_deliveries", "looked_at", "began_at"}
        | {"changed", "check", "facts_of", "measured", "exchange"}
    )
    server: Coordinator
    transport: Transport
    terms: RunTerms
    profiles: dict[ClientId, Profile]
    min_clients: int = 1
    timeouts: Timeouts = field(default_factory=Timeouts)
    clock: Callable[[], float] = time.monotonic
    evaluate: Evaluator = no_scores
    check: ExampleScorer = no_example_scores
    observe: Observer = no_observer
    save: Callable[[], None] = do_nothing
    over_regions: bool = False
    measured: bool = True
    facts_of: Callable[[str], KeyFacts] = no_facts
    clients: dict[ClientId, Profile] = field(default_factory=dict)
    members: dict[ClientId, tuple[Profile, ...]] = field(default_factory=dict)
    accepted: dict[ClientId, int] = field(default_factory=dict)
    tasks: dict[int, Task] = field(default_factory=dict)
    ready: list[int] = field(default_factory=list)
    summing: int = 0
    exchange: SumExchange | None = None
    opened: bool = False
    elapsed: float = 0.0
    incarnation: int = 0
    traffic: LinkTraffic = field(default_factory=LinkTraffic)
    nodes: NodeTable = field(default_factory=NodeTable)
    evaluation: Evaluation | None = None
    ended: bool = False
    failed_deliveries: dict[int | ClientId, int] = field(default_factory=dict)
    looked_at: float | None = None
    began_at: float | None = None
    changed: bool = True

    def run(self, pause: Callable[[float], None] = time.sleep) -> str:
        """Take turns until the coordinator stops; returns its reason."""
        while not (stop := self.turn()):
            pause(self.timeouts.poll)
        return stop.reason

    def turn(self) -> Stop | None:
        """Handle all that has happened since the last turn; then save a checkpoint, then send what is due."""
        if self.began_at is None:
            self.began_at, self.incarnation = self.clock() - self.elapsed, self.incarnation + 1
            self.profiles.update(self.clients)
        now = self.elapsed = max(self.elapsed, self.clock() - self.began_at)
        for step in (self._collect, self._update_nodes, self._lose_overdue, self._advance_sum, self._timer):
            if stop := step(now):
                return stop
        if self.evaluation:
            self.evaluation.expire(now, self.clients)
        if self.changed:
            self.save()
            self.changed = False
        self._send(now)
        return None

    def handle(self, event: Event) -> Stop | None:
        """Handle an event that does not come from the transport."""
        return self._handle(self.elapsed, event)

    # Evaluation by the clients ---------------------------------------------------------------------------------------------

    def begin_evaluation(
        self, ranks: Mapping[ClientId, int], start_at: Callable[[int], TaskStart], seconds: float
    ) -> Evaluation:
        """Ask the reachable clients in `ranks` to score the model on their held-out examples; later turns send the requests.

        Args:
            ranks: the rank of the model for each client that ever joined.
            start_at: the model as a client of this rank receives it.
            seconds: how long a site has for its reply.
        """
        asked = sorted(ranks.keys() & self.clients.keys())
        starts = {rank: start_at(rank) for rank in {ranks[client] for client in asked}}
        now = self.elapsed if self.began_at is None else max(self.elapsed, self.clock() - self.began_at)
        requests = {
            client: EvaluateRequest(
                terms=self.terms,
                incarnation=self.incarnation,
                client=client,
                start=starts[ranks[client]],
                last_accepted=self.accepted.get(client, 0),
                seconds=seconds,
            )
            for client in asked
        }
        tiers = {client: self.profiles[client].tier for client in asked}
        regions = frozenset(client for client in asked if self.over_regions and tiers[client] == REGION)
        unreached = {client: "it could not be reached" for client in asked if self.nodes.node_of(client) is None}
        self.evaluation = Evaluation(ranks, requests, regions, now, reasons=unreached)
        return self.evaluation

    # What happened ---------------------------------------------------------------------------------------------------------

    def _collect(self, now: float) -> Stop | None:
        return next((stop for reply in self.transport.collect() if (stop := self._receive(now, reply))), None)

    def _receive(self, now: float, raw: RawReply) -> Stop | None:
        """Handle the reply to a request. If the message is unknown, as after a restart, only its node is known."""
        sent = self.nodes.take(raw.message) or SentMessage(raw.node, sent=now)
        if raw.body is None:
            return self._handle_undelivered(now, sent, raw.error)
        self.traffic.received += 1
        self.traffic.bytes_up += len(raw.body)
        if sent.evaluate and (evaluation := self._evaluation_of(sent)):
            self.traffic.refused += evaluation.receive(sent.evaluate, raw.body)
        elif sent.summed and self.exchange:
            self.exchange.receive(sent.summed, raw.body)
        return None if sent.evaluate or sent.summed else self._receive_reply(now, sent, raw.body)

    def _receive_reply(self, now: float, sent: SentMessage, body: bytes) -> Stop | None:
        """Handle the reply to a join or task request."""
        try:
            reply = parse_reply(body, self.tasks, now, self.over_regions)
        except NotOutstanding:
            if sent.task in self.tasks and not sent.given_up:  # it would be sent again at once, without end
                return self._handle_unusable(now, sent, "it answers a task that it was not given")
            self.traffic.late += 1
            self.nodes.ask_again(sent.node, self.clients)
            return None
        except Malformed as error:
            return self._handle_unusable(now, sent, str(error))
        if isinstance(reply, Welcome):
            known = sent.task is not None  # to what was sent as a task there is an answer or a refusal
            unfit = "it replies to a task as to a request to join"
            return self._handle_unusable(now, sent, unfit) if known else self._welcome(now, sent.node, reply)
        if isinstance(reply, Refusal):
            return self._handle_refusal(now, sent, reply)
        client, number = reply.client, reply.task
        if number != sent.task or client != self.tasks[number].client:
            reason = f"{client!r} answers task {number} of {self.tasks[number].client!r}"
            return self._handle_unusable(now, sent, reason)
        if not self.measured and isinstance(reply, UpdateArrived):
            reply = replace(reply, result=without_measures(reply.result))
        return self._handle(now, reply)

    def _evaluation_of(self, sent: SentMessage) -> Evaluation | None:
        """Return the evaluation that waits for the reply to this message; None: it is of another kind, or none is awaited."""
        return self.evaluation if self.evaluation and self.evaluation.awaits(sent.evaluate) else None

    def _handle_undelivered(self, now: float, sent: SentMessage, error: str) -> Stop | None:
        """Let the node rest, so that the request is sent again; give up after too many deliveries that failed."""
        node, evaluation, tries = self.nodes.reachable.get(sent.node), self._evaluation_of(sent), 1
        client = sent.evaluate.client if sent.evaluate else ""
        if evaluation or (sent.task in self.tasks and not sent.given_up):
            key = sent.task or client
            tries = self.failed_deliveries[key] = self.failed_deliveries.get(key, 0) + 1
        LOG.warning("a message to %s was not answered: %s", node.client if node else sent.node, error)
        if node:
            wait = min(self.timeouts.retry * 2 ** (tries - 1), self.timeouts.pause)
            node.resting_until, node.why = now + wait, error
        if tries < MAX_DELIVERIES:
            return None
        if evaluation:
            evaluation.reasons[client] = f"it was not reached: {error}"
        return self._fail_task(now, self.tasks[sent.task], error, gone=True) if sent.task in self.tasks else None

    def _handle_unusable(self, now: float, sent: SentMessage, reason: str) -> Stop | None:
        """Fail the task; if the request was no task, let the node rest."""
        LOG.error("a reply of node %s cannot be used: %s", sent.node, reason)
        if sent.task in self.tasks and not sent.given_up:
            return self._fail_task(now, self.tasks[sent.task], reason)
        self.nodes.rest(now + self.timeouts.pause, sent.node, reason)
        return None

    def _welcome(self, now: float, number: int, welcome: Welcome) -> Stop | None:
        """Take in the client behind a node, if its name is that of the node's key and no other node has it."""
        node, client = self.nodes.reachable.get(number), welcome.profile.client
        if node is None:
            return None
        facts = KeyFacts() if node.name is None else self.facts_of(node.name)
        ended = "the run has ended" if self.ended and client not in self.clients else None
        if reason := self.nodes.why_not_let_in(number, node, welcome.profile, facts) or ended:
            self.nodes.rest(now + self.timeouts.pause, number, reason)
            return None
        examples = facts.examples or welcome.profile.examples
        profile = replace(welcome.profile, examples=examples, claimed=facts.examples is None)
        self.nodes.let_in(number, client, welcome.seeded)
        if self.clients.get(client) == profile and self.members.get(client) == welcome.members:
            return None
        LOG.info("%s is ready: %d training examples", client, profile.examples)
        self.clients[client], self.members[client] = profile, welcome.members
        self.profiles[client] = profile
        if not self.opened and len(self.clients) < self.min_clients:
            return None
        joining, self.opened = [client] if self.opened else sorted(self.clients), True
        events = [join_event(self.clients[name], self.members[name], self.over_regions) for name in joining]
        return self._handle_all(now, events)

    def _handle_refusal(self, now: float, sent: SentMessage, refusal: Refusal) -> Stop | None:
        """Fail the task that a site will not do; if the reason lasts, the site is left alone for a while and its client is lost.

        Which task it is follows from the message that is replied to: nobody refuses what was sent to another.
        """
        self.traffic.refused, number = self.traffic.refused + 1, sent.task
        LOG.warning("node %s refuses: %s", sent.node, refusal.reason)
        if number is None or refusal.lasting:
            pause = min(self.timeouts.pause, DECIDING) if refusal.deciding else self.timeouts.pause
            self.nodes.rest(now + pause, sent.node, refusal.reason)
        if number not in self.tasks:
            self.nodes.ask_again(sent.node, self.clients)
            return None
        return self._fail_task(now, self.tasks[number], refusal.reason, gone=refusal.lasting)

    def _fail_task(self, now: float, task: Task, reason: str, gone: bool = False) -> Stop | None:
        self.nodes.count_failure(now + self.timeouts.pause, task.client, reason)
        stop = self._handle(now, TaskFailed(task.client, task.id, reason))
        return self._lose_client(now, task.client) if gone and not stop else stop

    def _update_nodes(self, now: float) -> Stop | None:
        """Update the nodes, every `Timeouts.look` seconds; a client that was away for too long is lost."""
        if self.looked_at is not None and now < self.looked_at + self.timeouts.look:
            return None
        self.looked_at = now
        self.nodes.update(now, self.transport.nodes(), self.clients)
        lost = [client for client, since in self.nodes.missing.items() if now > since + self.timeouts.away]
        return next((stop for client in lost if (stop := self._lose_client(now, client))), None)

    def _lose_overdue(self, now: float) -> Stop | None:
        """Lose the clients whose tasks took too long; they count again when they have answered.

        A request sent long ago may be lost. It is sent again, at growing intervals; a site that is still working answers the copy
        from its journal.
        """
        self.nodes.give_up_old(now, self.timeouts.doubt)
        if self.timeouts.task is None:
            return None
        late = [task.client for task in self._unanswered() if now > task.sent + self.timeouts.task]
        return next((stop for client in late if (stop := self._lose_client(now, client))), None)

    def _timer(self, now: float) -> Stop | None:
        wake = self.server.wake() if self.opened else None
        return self._handle(now, TimerFired()) if wake is not None and wake <= now else None

    def _advance_sum(self, now: float) -> Stop | None:
        """Go on with the sum that is being opened; one that was begun before a restart has failed."""
        if not self.summing:
            return None
        if self.exchange is None:
            return self._handle(now, SumFailed(self.summing, "the server was started anew while the sum was opened"))
        ended = self.exchange.advance(now, self.timeouts.sum)
        return self._handle(now, ended) if ended else None

    def _follow_sum(self, event: Event, commands: Iterable[Command], rejected: bool) -> None:
        """Follow what an event means for tasks whose answers are only summed."""
        match event:
            case PartsReady(_, number) if not rejected:
                self.ready.append(number)
            case ClientLost(client) if self.exchange:
                self.exchange.drop(client)
            case SumFailed():
                self.summing, self.exchange = 0, None
            case SumOpened(_, blocks):
                self.summing, self.exchange = 0, None
                dropped = {command.task for command in commands if isinstance(command, Cancel)}
                for number in set(blocks[0].tasks) - dropped:
                    if task := self.tasks.pop(number, None):
                        self.accepted[task.client] = number
        self.ready = [number for number in self.ready if number in self.tasks]

    def _lose_client(self, now: float, client: ClientId) -> Stop | None:
        LOG.warning("%s counts as lost", client)
        del self.clients[client]
        self.nodes.let_go(client)
        return self._handle(now, ClientLost(client)) if self.opened else None

    # What the coordinator does about it ------------------------------------------------------------------------------------

    def _handle_all(self, now: float, events: Iterable[Event]) -> Stop | None:
        stop = None
        for event in events:
            stop = self._handle(now, event) or stop
        return stop

    def _handle(self, now: float, event: Event) -> Stop | None:
        """Give an event to the coordinator and carry out its commands; those may make events of their own."""
        if self.ended:
            return None
        commands = self.server.handle(now, event)
        self.changed = True
        rejected = any(isinstance(command, Reject) for command in commands)
        self._follow_sum(event, commands, rejected)
        if isinstance(event, ClientLost):
            self.tasks = {number: task for number, task in self.tasks.items() if task.client != event.client}
        if isinstance(event, UpdateArrived | TaskFailed) and not rejected:  # a rejected one fails in `_carry_out`
            self.tasks.pop(event.task, None)
            self.failed_deliveries.pop(event.task, None)
        if isinstance(event, UpdateArrived) and not rejected:
            self.accepted[event.client] = event.task
            self.nodes.failed.pop(event.client, None)
        elif isinstance(event, UpdateArrived) and (number := self.nodes.node_of(event.client)) is not None:
            # what it sends is refused at once: else one site could fail as many tasks in a row as end the run
            why = next((command.reason for command in commands if isinstance(command, Reject)), "")
            self.nodes.rest(now + self.timeouts.pause, number, f"an answer of it was refused: {why}")
        self.observe(now, event, commands)
        stop = self._handle_all(now, self._carry_out(commands))
        return commands[-1] if commands and isinstance(commands[-1], Stop) else stop

    def _carry_out(self, commands: Iterable[Command]) -> list[Event]:
        """Do what can be done at once; returns the events that it makes."""
        events = list[Event]()
        for command in commands:
            match command:
                case Dispatch(task):
                    self.tasks[task.id] = task
                case Cancel(number):
                    self.tasks.pop(number, None)
                case OpenSum(number):
                    self.summing = number
                    self.exchange = SumExchange.begin(self.elapsed, self.incarnation, command, self.tasks, self.terms)
                case Evaluate(version, model):
                    events.append(ScoresReady(version, self.evaluate(model)))
                case CheckCanary(number, _, model):
                    events.append(CanaryScored(number, self.check(model)))
                case Reject(client, 0, reason):  # task 0: a join was rejected
                    self.nodes.turn_away(self.elapsed + self.timeouts.pause, client, reason)
                    events += [ClientLost(client)] if self.clients.pop(client, None) else []
                case Reject(client, number, reason) if number in self.tasks:
                    events.append(TaskFailed(client, number, reason))
        return events

    def _send(self, now: float) -> None:
        """Send to each free node what is due: a join request, its client's evaluate request, or its client's task."""
        due = {task.client: task for task in self._unanswered()}
        awaited = self.evaluation.awaited() if self.evaluation else {}
        for number, node in self.nodes.free(now):
            if node.client is None:
                self._post(JoinRequest(self.terms, self.incarnation), SentMessage(number, sent=now))
            elif request := awaited.get(node.client):
                self._post(request, SentMessage(number, sent=now, evaluate=request))
            elif self.exchange and node.client in self.exchange.waiting:
                step = self.exchange.request(self.terms, self.incarnation, node.client)
                self._post(step, SentMessage(number, sent=now, summed=step))
            elif task := due.get(node.client):
                self._post(self._task_request(task, node), SentMessage(number, task.id, now))

    def _unanswered(self) -> list[Task]:
        """Return the tasks that clients have still to do."""
        ready = frozenset(self.ready)
        return [task for number, task in self.tasks.items() if number not in ready]

    def _task_request(self, task: Task, node: Node) -> TaskRequest:
        if self.nodes.copies[task.id] or task.id in self.failed_deliveries:
            self.traffic.resent += 1
        request = TaskRequest(self.terms, self.incarnation, task, self.accepted.get(task.client, 0))
        return without_seeded_sides(request, self.server.state.first.adapter) if node.seeded else request

    def _post(self, request: Request, sent: SentMessage) -> None:
        body = encode_request(request)
        summed = self.exchange if sent.summed else None
        largest = summed.largest_reply if summed else largest_reply(request, self.over_regions)
        self.nodes.add(self.transport.send(sent.node, body, largest), sent)
        self.traffic.sent += 1
        self.traffic.bytes_down += len(body)
