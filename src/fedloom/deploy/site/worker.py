"""The worker of a site: it keeps model, data and caches warm, trains what a server asks for, and gives back bytes.

What comes back is, to the bit, what a simulation's client would have given; a task is trained once, however often it is sent.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import datetime
from logging import getLogger

import torch

from fedloom.core.errors import Refused
from fedloom.core.files import lock, write_json
from fedloom.core.fingerprint import fingerprint
from fedloom.core.lora import Adapter
from fedloom.core.schema import Malformed
from fedloom.core.seeds import derive
from fedloom.core.transfer import encode_answer, residual_of
from fedloom.core.types import Budget, ClientState, Profile, TaskStart, Task
from fedloom.data.partition import Shard
from fedloom.deploy.messages import answer as wire
from fedloom.deploy.messages.checks import model_mismatch
from fedloom.deploy.messages.messages import (
    EvaluateRequest,
    JoinRequest,
    Refusal,
    RunTerms,
    Welcome,
    TaskRequest,
    decode_any,
    encode_request,
    encode_reply,
)
from fedloom.deploy.messages.seeded_sides import with_seeded_sides
from fedloom.deploy.site.answer_journal import CompletedTask, AnswerJournal
from fedloom.deploy.site.evaluation import sat
from fedloom.deploy.site.settings import Site, site_shard, why_refused
from fedloom.deploy.site.worker_socket import Listener
from fedloom.train.base_model import Base, check_length, initial_adapter, load_base
from fedloom.train.tokenised import encode_texts as tokenise
from fedloom.train.trainer import PeftTrainer

LOG = getLogger("fedloom.worker")
TIMED = 2
"""Steps that the speed of a machine is measured on, after one that is not counted."""


def time_of_day() -> float:
    """Of this machine's clock, in hours."""
    now = datetime.now()
    return now.hour + now.minute / 60


@dataclass(frozen=True, slots=True)
class PreparedSite:
    """What is kept from task to task while the terms stay the same. The trainer knows of nothing that is held out."""

    terms: RunTerms
    base: Base
    shard: Shard
    trainer: PeftTrainer
    first: Adapter


@dataclass(slots=True)
class SiteWorker:
    """Answers the server's messages for one site, one at a time. `trained` and `repeated` count answers since the start."""

    site: Site
    hour: Callable[[], float] = time_of_day
    prepared: PreparedSite | None = None
    doing: str = "nothing"
    trained: int = 0
    repeated: int = 0
    refused: int = 0
    journal: AnswerJournal = field(init=False)

    def __post_init__(self) -> None:
        self.journal = AnswerJournal(self.site.folder / "journal")

    def answer(self, body: bytes) -> bytes:
        """The reply to a message, whatever it is: never raises."""
        task = None
        try:
            ask = decode_any(body, self.site.limits.bytes)
            task = ask.task.id if isinstance(ask, TaskRequest) else None
            if reason := why_refused(self.site, ask, self.hour()):
                return self._refuse(task, reason, True)
            self.doing = f"getting ready for {ask.terms.run}"
            if isinstance(ask, EvaluateRequest):
                return self._exam(ask)
            return self._work(ask) if isinstance(ask, TaskRequest) else self._welcome(ask)
        except Malformed as error:
            return self._refuse(None, f"the message is none: {error}", True)
        except Refused as error:
            return self._refuse(task, str(error), True)
        except Exception as error:  # whatever torch or the disk comes up with is the server's to know
            LOG.exception("task %s failed", task)
            self.prepared = None
            return self._refuse(task, f"{type(error).__name__}: {error}", False)
        finally:
            self.doing = "nothing"

    def status(self) -> bytes:
        """What the worker is and does, as JSON."""
        terms = self.prepared.terms if self.prepared else None
        told = {"name": self.site.name, "pid": os.getpid(), "doing": self.doing, "run": terms and terms.run}
        counts = {"trained": self.trained, "repeated": self.repeated, "refused": self.refused}
        return json.dumps({**told, **counts}).encode()

    def excess(self, size: int) -> bytes:
        """What is said to a message of so many bytes, which is above the limit and was not read."""
        return self._refuse(None, f"a message of {size} bytes: this site allows {self.site.limits.bytes}", True)

    def _refuse(self, task: int | None, reason: str, lasting: bool) -> bytes:
        LOG.warning("refused: %s", reason)
        self.refused += 1
        return encode_reply(Refusal(self.site.name, task, " ".join(reason.split())[:1000], lasting))

    def _welcome(self, ask: JoinRequest) -> bytes:
        warm, speed = self._ready(ask.terms), self.site.speed
        profile = Profile(
            client=self.site.name,
            examples=len(warm.shard.train),
            flops=speed.flops or self._flops(warm),
            up_bps=speed.up_bps,
            down_bps=speed.down_bps,
            memory=speed.memory or _memory(warm.base.device),
            tier="site",
            most=self.site.limits.most,
        )
        LOG.info("takes part in %s with %d examples at %.3g FLOP/s", ask.terms.run, profile.examples, profile.flops)
        return encode_reply(Welcome(profile, ask.incarnation, ask.terms.first_adapter == fingerprint(warm.first)))

    def _work(self, ask: TaskRequest) -> bytes:
        """The answer: from the journal if the task was done, else trained now and written down before it is given out."""
        run, number, mark = ask.terms.run_hash, ask.task.id, request_digest(ask)
        known = self.journal.done(run, number)
        if known is not None and known.mark == mark:
            LOG.info("task %d was done before: the same answer again", number)
            self.repeated += 1
            return known.answer.numpy().tobytes()
        warm, before = self._ready(ask.terms), self._before(ask)
        _check_fits(warm, ask.task.start)
        task = with_seeded_sides(ask, warm.first).task
        self.doing = f"task {number} of {ask.terms.run}"
        began = time.perf_counter()
        ((result, local),) = warm.trainer.train([(task, before)])
        seconds = time.perf_counter() - began
        received, local = encode_answer(task, before, result, local)
        result = replace(result, metrics={**received.metrics, "seconds_train": seconds})
        data = wire.encode_result(task, result, residual_of(task.start, before))
        kept = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self.journal.keep(run, number, CompletedTask(mark, kept, local), ask.last_accepted)
        self.trained += 1
        told = (number, result.steps, task.budget.rank, seconds, len(data))
        LOG.info("task %d: %d steps at rank %d in %.1f s, an answer of %d bytes", *told)
        return data

    def _exam(self, ask: EvaluateRequest) -> bytes:
        """What the last model reaches on what is held out here."""
        warm = self._ready(ask.terms)
        _check_fits(warm, ask.start)
        self.doing = f"the exam of {ask.terms.run}"
        marks = sat(warm.base, warm.trainer.texts, warm.shard, ask, self._before(ask))
        LOG.info("exam: %d of %d right on %d examples held out", marks.correct, marks.predictions, marks.examples)
        return encode_reply(marks)

    def _before(self, ask: TaskRequest | EvaluateRequest) -> ClientState:
        """What stayed here of the last task whose answer was accepted."""
        last = self.journal.done(ask.terms.run_hash, ask.last_accepted) if ask.last_accepted else None
        if ask.last_accepted and last is None:
            LOG.warning("nothing is left here of task %d, which was accepted: its state begins anew", ask.last_accepted)
        return last.local if last else ClientState()

    def _ready(self, terms: RunTerms) -> PreparedSite:
        """Model and data for these terms; those of others are let go first."""
        torch.set_num_threads(terms.threads)
        if self.prepared is None or self.prepared.terms != terms:
            self.prepared = None
            self.prepared = _warm(self.site, terms)
        return self.prepared

    def _flops(self, warm: PreparedSite) -> float:
        """FLOP a second in training, as `Shape.train_flops` counts them: measured once for a model and its settings."""
        path = self.site.folder / "speed.json"
        terms, site = warm.terms, self.site.model
        told = [str(site.path), site.device, terms.threads, warm.base.computation, terms.training.batch_size]
        mark = hashlib.sha256(json.dumps(told).encode()).hexdigest()
        try:
            known = json.loads(path.read_bytes())
            if known["of"] == mark:
                return float(known["flops"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        flops = _measured(warm, self.site.name, min(terms.rank, self.site.limits.rank))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"of": mark, "flops": flops})
        return flops


def _warm(site: Site, terms: RunTerms) -> PreparedSite:
    """Load everything. Raises Refused where model or data are not fit for the run."""
    examples = site.examples(terms.labels)
    labels, seed = None if terms.labels is None else len(terms.labels), derive(terms.seed, "model")
    base = load_base(str(site.model.path), labels, terms.lora, terms.rank, seed, site.model.device, terms.engine)
    if terms.weights and base.fingerprint() not in ("", terms.weights):
        remedy = f"its weights are not those of the run's {terms.model!r}: get a copy of the same model"
        raise Refused("model.path", site.model.path, remedy)
    texts = tokenise(examples, base.tokenizer, terms.training.max_length)
    check_length(base, terms.training.max_length, max(map(len, texts.ids)))
    shard = site_shard(site, examples, terms)
    trainer = PeftTrainer(base, texts, {site.name: shard.train}, terms.training, terms.engine)
    return PreparedSite(terms, base, shard, trainer, initial_adapter(base, terms.rank))


def request_digest(ask: TaskRequest) -> str:
    """Names what was asked, whenever and by whichever start of the server."""
    return hashlib.sha256(encode_request(replace(ask, incarnation=0))).hexdigest()


def _check_fits(warm: PreparedSite, start: TaskStart) -> None:
    """Raise Refused for a task of another base model."""
    if reason := model_mismatch(warm.first, start):
        raise Refused("model", warm.terms.model, reason)


def _measured(warm: PreparedSite, client: str, rank: int) -> float:
    """FLOP a second in training, as `Shape.train_flops` counts them."""
    tokens, seconds = 0, 0.0
    for steps in (1, TIMED):  # the first is for what is made at first use
        start = TaskStart(initial_adapter(warm.base, rank), "")
        began = time.perf_counter()
        ((result, _),) = warm.trainer.train([(Task(1, client, 0, start, Budget(rank, steps), 0, 0.0), ClientState())])
        tokens, seconds = result.tokens, time.perf_counter() - began
    return warm.base.shape().train_flops(tokens, rank) / seconds


def _memory(device: torch.device) -> float:
    """Bytes that the device has."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def serve_worker(site: Site) -> None:
    """Answer at the site's socket until the process is stopped. Raises Refused where another worker does that, or nobody can."""
    site.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # what lies there was learnt from the data
    with (site.folder / "worker.lock").open("w") as held:
        if not lock(held):
            raise Refused("folder", str(site.folder), "another worker of this site is running; stop it first")
        try:
            listener = Listener(site.socket, site.limits.bytes)
        except OSError as error:
            raise Refused("folder", str(site.folder), f"no socket can be made there: {error}") from error
        worker = SiteWorker(site)
        with closing(listener):
            LOG.info("%s listens at %s", site.name, site.socket)
            listener.serve(worker.answer, worker.status, worker.excess)
