"""A region: the server of its own sites, and a site of the server above it. An edge (`fedloom.edge`) between two engines.

What comes from above is answered through a Unix socket, as a worker answers; what the region has its sites do goes over a link of
its own, by the driver of every deployment. It trains nothing and sees no text: it adds what its sites made of a task, as often as the
task says, and reports; an exam it passes on to them, and tells what each said. Terms come from above and are passed on as they are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from logging import getLogger
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import NoReturn, TextIO

import torch

from fedloom.core.codec import Codec
from fedloom.core.errors import Refused
from fedloom.core.events import Command, Event, Report, Stop, TaskReceived
from fedloom.core.files import atomic_write
from fedloom.core.lora import Adapter
from fedloom.core.schema import Malformed
from fedloom.core.seeds import derive
from fedloom.core.server import Server
from fedloom.core.types import ClientId, ClientState, Profile, Task
from fedloom.deploy.link import Transport
from fedloom.deploy.messages import answer as wire
from fedloom.deploy.messages.answer import RegionReport
from fedloom.deploy.messages.checks import model_mismatch
from fedloom.deploy.messages.messages import (
    Request,
    EvaluateRequest,
    JoinRequest,
    Refusal,
    RunTerms,
    Welcome,
    TaskRequest,
    decode_request,
    decode_any,
    encode_request,
    encode_reply,
)
from fedloom.deploy.messages.region_scores import encode_sheet
from fedloom.deploy.region.evaluation import sat_below
from fedloom.deploy.region.region_edge import RegionServer
from fedloom.deploy.server.config import RUN_FOLDER, DeploymentConfig
from fedloom.deploy.server.driver import Deployment
from fedloom.deploy.server.reply_events import REGION
from fedloom.deploy.server.status import Status
from fedloom.deploy.site.answer_journal import CompletedTask, AnswerJournal
from fedloom.deploy.site.settings import Site, read_site, why_refused
from fedloom.deploy.site.worker import request_digest, time_of_day
from fedloom.deploy.site.worker_socket import Listener
from fedloom.hierarchy.hierarchy import Hierarchy
from fedloom.runs import checkpoint
from fedloom.runs.resume import LOGS, CHECKPOINT, CheckpointWriter, locked, given, saved_fields, open_log, restore
from fedloom.runs.run import Run
from fedloom.runs.trace import Trace
from fedloom.train.base_model import initial_adapter, load_base

LOG = getLogger("fedloom.core.server")
ABOVE = "above.bin"
"""The last question from above: its terms are what a region that was restarted begins with."""


@dataclass(slots=True)
class Region:
    """What is asked from above, between the thread that listens and the one that drives.

    `terms` are those of the run, once somebody has asked; `running` works for them. `tells`: the plan above learns. `codec` is
    that of the run, `first` the adapter with which it begins, by the model here. A task, or an exam, waits in `asked` with the
    place for its answer until the driver's thread takes it.
    """

    site: Site
    folder: Path
    least: int
    terms: RunTerms | None = None
    running: Deployment | None = None
    tells: bool = False
    codec: Codec | None = None
    first: Adapter | None = None
    asked: SimpleQueue[tuple[TaskRequest | EvaluateRequest, SimpleQueue[bytes]]] = field(default_factory=SimpleQueue)
    waiting: tuple[int, SimpleQueue[bytes]] | None = None

    def __post_init__(self) -> None:
        if (self.folder / ABOVE).exists():
            self.terms = decode_request((self.folder / ABOVE).read_bytes(), self.site.limits.bytes).terms

    @property
    def journal(self) -> AnswerJournal:
        """Of reports."""
        return AnswerJournal(self.folder / "reports")

    @property
    def members(self) -> tuple[Profile, ...]:
        """Its sites, as far as a plan of groups reckons with them."""
        assert self.running is not None
        return tuple(replace(one, most=None) for _, one in sorted(self.running.clients.items()))

    def answer(self, body: bytes) -> bytes:
        """The reply to a message from above, whatever it is: never raises."""
        try:
            ask = decode_any(body, self.site.limits.bytes)
        except Malformed as error:
            return self._refuse(None, f"the message is none: {error}", True)
        task = ask.task.id if isinstance(ask, TaskRequest) else None
        if reason := self._unwilling(ask):
            return self._refuse(task, reason, True)
        if isinstance(ask, JoinRequest):
            return self._welcome(ask)
        reply: SimpleQueue[bytes] = SimpleQueue()
        self.asked.put((ask, reply))
        return reply.get()

    def turn(self, led: RegionServer, pause: Callable[[float], None]) -> None:
        """A turn of the driver, with what was asked before it, and what came out of it."""
        assert self.running is not None
        with suppress(Empty):
            ask, reply = self.asked.get_nowait()
            if isinstance(ask, EvaluateRequest):
                reply.put(encode_sheet(sat_below(ask, led, self.running, pause)))
            else:
                self._take(led, ask, reply)
        self.running.turn()
        if led.ended is not None and self.waiting is not None and self.waiting[0] == led.ended[0].id:
            self.waiting[1].put(self._reply(led.digest, *led.ended))
            led.ended, self.waiting = None, None

    def reported(self, led: RegionServer) -> None:
        """Write a report down: before a checkpoint says that the task is over."""
        if led.ended is None or self.terms is None or self.running is None or not isinstance(led.ended[1], Report):
            return
        task, (result, told) = led.ended[0], (led.ended[1].result, led.ended[1].statistics)
        known = self.journal.done(self.terms.run_hash, task.id)
        if known is not None and known.mark == led.digest:  # maybe it was given out
            return
        metrics = {**result.metrics, "seconds_train": self.running.elapsed - led.started}
        telling = None if told is None else RegionReport(told, self.members)
        data = wire.encode_result(task, replace(result, metrics=metrics), report=telling)
        kept = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self.journal.keep(self.terms.run_hash, task.id, CompletedTask(led.digest, kept, ClientState()), 0)

    def _take(self, led: RegionServer, work: TaskRequest, reply: SimpleQueue[bytes]) -> None:
        """Begin with a task, go on with the one that was begun before a restart, or give the same answer again."""
        assert self.running is not None
        self.waiting, mark = (work.task.id, reply), request_digest(work)
        known = self.journal.done(work.terms.run_hash, work.task.id)
        if known is not None and known.mark == mark:
            led.ended, self.waiting = None, None
            reply.put(known.answer.numpy().tobytes())
        elif led.state.outer is None or led.digest != mark:
            led.digest, led.started, led.ended = mark, self.running.elapsed, None
            start = replace(work.task.start, codec=self.codec)  # the one that a checkpoint names
            self.running.happens(TaskReceived(replace(work.task, start=start)))

    def _reply(self, mark: str, task: Task, ended: Report | Stop) -> bytes:
        """What goes up about a task that has ended."""
        known = self.journal.done(self.terms.run_hash, task.id) if self.terms else None
        if isinstance(ended, Report) and known is not None and known.mark == mark:
            return known.answer.numpy().tobytes()
        reason = ended.reason if isinstance(ended, Stop) else "its report was lost"
        return self._refuse(task.id, f"the region gave the task up: {reason}", False)

    def _unwilling(self, ask: Request | EvaluateRequest) -> str | None:
        """Why nothing is done about it."""
        if reason := why_refused(self.site, ask, time_of_day()):
            return reason
        if self.terms is None:
            self.terms = ask.terms
            with atomic_write(self.folder / ABOVE) as draft:
                draft.write_bytes(encode_request(JoinRequest(ask.terms, 0)))
        if ask.terms != self.terms:
            return "the region works for another run, or for other settings of it: start it anew in another folder"
        if self.running is None:
            return "the region is getting ready"
        start = None if isinstance(ask, JoinRequest) else ask.task.start if isinstance(ask, TaskRequest) else ask.start
        if start and start.codec != self.codec:
            return f"the task travels by {start.codec}, the run file here says {self.codec}: it is another one"
        if start and self.first and (reason := model_mismatch(self.first, start)):
            return str(Refused("model", ask.terms.model, reason))
        if not self.running.opened:
            return f"the region waits for {self.least - len(self.running.clients)} more of {self.least} sites"
        return None if self.running.clients else "none of the region's sites can be reached"

    def _welcome(self, ask: JoinRequest) -> bytes:
        """All its sites as one client: the examples of all, the speed and the memory of the least."""
        assert self.running is not None
        own, speed = self.members, self.site.speed
        flops, memory = min(one.flops for one in own), min(one.memory for one in own)
        examples = sum(one.examples for one in own)
        links, most = (speed.up_bps, speed.down_bps), self.site.limits.most
        profile = Profile(self.site.name, examples, flops, *links, memory, REGION, most)
        return encode_reply(Welcome(profile, ask.incarnation, members=own if self.tells else ()))

    def _refuse(self, task: int | None, reason: str, lasting: bool) -> bytes:
        LOG.warning("refused: %s", reason)
        return encode_reply(Refusal(self.site.name, task, " ".join(reason.split())[:1000], lasting))


def run_region(link: Transport, folder: Path, order: DeploymentConfig, pause: Callable[[float], None], clock: Callable[[], float]) -> NoReturn:
    """Be the region of `order.above`, until stopped. Raises Refused."""
    value, place = order.run(), folder / RUN_FOLDER
    if value.hierarchy is None:
        raise Refused(
            "hierarchy", None, "a region leads a group; give the Run a Hierarchy, the same as at the server above"
        )
    place.mkdir(exist_ok=True)
    region = Region(read_site(Path(str(order.above))), place, order.min_clients)
    with locked(place), listening(region), ExitStack() as opened:
        while region.terms is None:
            pause(order.timeouts.poll)
        led, profiles = region_server(value, value.hierarchy, region), dict[ClientId, Profile]()
        region.tells, region.codec, region.first = led.edge.reports_statistics, value.transfer, led.state.first.adapter
        running = Deployment(led, link, region.terms, profiles, order.min_clients, order.timeouts, clock)
        trace = opened.enter_context(restore_region(place, value, led, running))
        keeper = CheckpointWriter(place, given(value), 0.0, (led, running), [trace])
        status, writes = Status(folder, running, led.edge.server.limits), Trace(trace)

        def observe(now: float, event: Event, commands: list[Command]) -> None:
            writes(now, event, commands)
            status(now, event, commands)

        def settled() -> None:
            region.reported(led)
            keeper()

        running.observe, running.save, region.running = observe, settled, running
        between = status.between(pause)
        opened.enter_context(status.exported(order.metrics_port))
        while True:
            region.turn(led, between)
            between(order.timeouts.poll)


def region_server(value: Run, hierarchy: Hierarchy, region: Region) -> RegionServer:
    """The edge of this region. The base model is loaded for its shape alone."""
    terms = region.terms
    assert terms is not None
    labels, seed = None if terms.labels is None else len(terms.labels), derive(terms.seed, "model")
    base = load_base(str(region.site.model.path), labels, terms.lora, terms.rank, seed, engine=terms.engine)
    model = value.aggregator.init(initial_adapter(base, terms.rank))
    flat = Server(
        model,
        value.aggregator,
        value.schedule,
        value.plan,
        shape=base.shape(),
        limits=value.limits,
        seed=derive(value.seed, "region", region.site.name),
        transfer=value.transfer,
    )
    edge = hierarchy.edge(flat, region.least, 1)
    return RegionServer(edge, edge.state, hierarchy.plan if edge.reports_statistics else None)


def restore_region(place: Path, value: Run, led: RegionServer, running: Deployment) -> TextIO:
    """The trace, after what the last checkpoint knows of it; that is put back into edge and driver."""
    if not (place / CHECKPOINT).exists():
        return open_log(place / LOGS[0], 0)
    stored = checkpoint.read_checkpoint(place / CHECKPOINT)
    hints = {name: hint for kind in (RegionServer, Deployment) for name, hint in saved_fields(kind).items()}
    restore(stored.read(hints, **given(value)), (led, running))
    return open_log(place / LOGS[0], stored.about[LOGS[0]])


@contextmanager
def listening(region: Region) -> Iterator[None]:
    """Inside, what comes from above is answered, by a thread of its own."""
    region.site.folder.mkdir(parents=True, exist_ok=True)
    with closing(Listener(region.site.socket, region.site.limits.bytes)) as listener:
        status, excess = (lambda: b"{}"), (lambda size: region.answer(b""))
        threading.Thread(target=listener.serve, args=(region.answer, status, excess), daemon=True).start()
        yield
