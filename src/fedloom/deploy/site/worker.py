"""The worker of a site: it keeps model, data and caches loaded, trains what a server asks for, and gives back bytes.

What comes back is, to the bit and apart from measured seconds, what a simulation's client would have given; a task is trained once,
however often it is sent.
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
from fedloom.core.types import Budget, ClientState, Profile, Task, TaskStart
from fedloom.data.partition import Shard
from fedloom.deploy.messages.answer import encode_result
from fedloom.deploy.messages.checks import model_mismatch
from fedloom.deploy.messages.messages import (
    EvaluateRequest,
    EvaluateResult,
    JoinRequest,
    Refusal,
    RunTerms,
    TaskRequest,
    Welcome,
    decode_request,
    encode_reply,
    encode_request,
)
from fedloom.deploy.messages.seeded_sides import with_seeded_sides
from fedloom.deploy.site.answer_journal import AnswerJournal, CompletedTask
from fedloom.deploy.site.settings import Site, site_shard, why_refused
from fedloom.deploy.site.worker_socket import Listener
from fedloom.train.base_model import Base, initial_adapter, load_base
from fedloom.train.chat_template import fit_notes
from fedloom.train.evaluate import evaluate_held_out, evaluate_untrained
from fedloom.train.objective import personal_adapter
from fedloom.train.text_checks import check_texts
from fedloom.train.tokenised import encode_texts
from fedloom.train.trainer import PeftTrainer

LOG = getLogger("fedloom.worker")
TIMED_STEPS = 2
"""Steps timed to measure speed, after one warm-up step."""


def time_of_day() -> float:
    """Return the time of this machine's clock, in hours from 0 to 24."""
    now = datetime.now()
    return now.hour + now.minute / 60


@dataclass(frozen=True, slots=True)
class PreparedSite:
    """Model and data of a run, kept loaded from task to task while the terms stay the same.

    Fields:
        terms: terms of the run.
        base: the base model.
        shard: which examples are trained on, and which are held out.
        trainer: trains tasks; it has no held-out example.
        first: the adapter with which the run begins, drawn here from the run's seed.
    """

    terms: RunTerms
    base: Base
    shard: Shard
    trainer: PeftTrainer
    first: Adapter


@dataclass(slots=True)
class SiteWorker:
    """Answers the server's requests for one site, one at a time.

    Fields:
        site: settings of the site.
        hour: the time of day there.
        prepared: model and data, loaded for the terms of the last request.
        doing: what it does now, in words.
        trained: answers that were trained since the start.
        repeated: answers that were given again from the journal.
        refused: refusals.
        journal: completed tasks, on the disk.
    """

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
        """Return the reply to a message, whatever it is; never raises."""
        task = None
        try:
            request = decode_request(body, self.site.limits.bytes)
            task = request.task.id if isinstance(request, TaskRequest) else None
            if reason := why_refused(self.site, request, self.hour()):
                return self._refuse(task, reason, True)
            self.doing = f"getting ready for {request.terms.run}"
            if isinstance(request, EvaluateRequest):
                return self._evaluate(request)
            return self._train(request) if isinstance(request, TaskRequest) else self._welcome(request)
        except Malformed as error:
            return self._refuse(None, f"not a valid message: {error}", True)
        except Refused as error:
            return self._refuse(task, str(error), True)
        except Exception as error:  # any other error is reported to the server
            LOG.exception("task %s failed", task)
            self.prepared = None
            return self._refuse(task, f"{type(error).__name__}: {error}", False)
        finally:
            self.doing = "nothing"

    def status(self) -> bytes:
        """Return what the worker is and does, as JSON."""
        terms = self.prepared.terms if self.prepared else None
        facts = {"name": self.site.name, "pid": os.getpid(), "doing": self.doing, "run": terms and terms.run}
        counts = {"trained": self.trained, "repeated": self.repeated, "refused": self.refused}
        return json.dumps({**facts, **counts}).encode()

    def refuse_oversized(self, size: int) -> bytes:
        """Return the refusal of a message of so many bytes, which is above the limit and was not read."""
        return self._refuse(None, f"a message of {size} bytes: this site allows {self.site.limits.bytes}", True)

    def _refuse(self, task: int | None, reason: str, lasting: bool) -> bytes:
        LOG.warning("refused: %s", reason)
        self.refused += 1
        return encode_reply(Refusal(self.site.name, task, " ".join(reason.split())[:1000], lasting))

    def _welcome(self, request: JoinRequest) -> bytes:
        ready, speed = self._ready(request.terms), self.site.speed
        profile = Profile(
            client=self.site.name,
            examples=len(ready.shard.train),
            flops=speed.flops or self._flops(ready),
            up_bps=speed.up_bps,
            down_bps=speed.down_bps,
            memory=speed.memory or _memory(ready.base.device),
            tier="site",
            most=self.site.limits.most,
        )
        LOG.info("takes part in %s with %d examples at %.3g FLOP/s", request.terms.run, profile.examples, profile.flops)
        return encode_reply(
            Welcome(profile, request.incarnation, request.terms.first_adapter == fingerprint(ready.first))
        )

    def _train(self, request: TaskRequest) -> bytes:
        """Return the answer: from the journal if the task was done, else trained now and written down before it is given out."""
        run, number, digest = request.terms.run_hash, request.task.id, request_digest(request)
        entry = self.journal.find(run, number)
        if entry is not None and entry.request_digest == digest:
            LOG.info("task %d was done before: the same answer again", number)
            self.repeated += 1
            return entry.answer.numpy().tobytes()
        ready, before = self._ready(request.terms), self._last_client_state(request)
        _check_fits(ready, request.task.start)
        task = with_seeded_sides(request, ready.first).task
        self.doing = f"task {number} of {request.terms.run}"
        began = time.perf_counter()
        ((result, state),) = ready.trainer.train([(task, before)])
        seconds = time.perf_counter() - began
        received, state = encode_answer(task, before, result, state)
        result = replace(result, metrics={**received.metrics, "seconds_train": seconds})
        data = encode_result(task, result, residual_of(task.start, before))
        stored = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self.journal.record(run, number, CompletedTask(digest, stored, state), request.last_accepted)
        self.trained += 1
        summary = (number, result.steps, task.budget.rank, seconds, len(data))
        LOG.info("task %d: %d steps at rank %d in %.1f s, an answer of %d bytes", *summary)
        return data

    def _evaluate(self, request: EvaluateRequest) -> bytes:
        """Score the last model on the held-out examples, by the functions that score a simulation's clients; only counts leave."""
        ready = self._ready(request.terms)
        _check_fits(ready, request.start)
        self.doing = f"evaluating for {request.terms.run}"
        if not ready.shard.held_out:
            raise Refused("held_out", 0, "this site holds no example out, so there is nothing to evaluate on")
        adapter = personal_adapter(request.start, self._last_client_state(request))
        client, shards, texts = ready.shard.client, [ready.shard], ready.trainer.texts
        scores = evaluate_held_out(ready.base, adapter, texts, shards, request.start.fold)[client]
        baseline = evaluate_untrained(ready.base, texts, shards)[client]
        predictions, correct, loss = scores.counts()
        _, base_correct, base_loss = baseline.counts()
        LOG.info("evaluated: %d of %d right on %d held-out examples", correct, predictions, len(ready.shard.held_out))
        held_out = len(ready.shard.held_out)
        return encode_reply(EvaluateResult(client, held_out, predictions, correct, loss, base_correct, base_loss))

    def _last_client_state(self, request: TaskRequest | EvaluateRequest) -> ClientState:
        """Return the client state that the last accepted task left here; an empty one if there is none."""
        last = self.journal.find(request.terms.run_hash, request.last_accepted) if request.last_accepted else None
        if request.last_accepted and last is None:
            LOG.warning(
                "no state of accepted task %d is stored: the client starts with an empty one", request.last_accepted
            )
        return last.client_state if last else ClientState()

    def _ready(self, terms: RunTerms) -> PreparedSite:
        """Return model and data for these terms; those of others are let go first."""
        torch.set_num_threads(terms.threads)
        if self.prepared is None or self.prepared.terms != terms:
            self.prepared = None
            self.prepared = prepare_site(self.site, terms)
        return self.prepared

    def _flops(self, ready: PreparedSite) -> float:
        """Return the training speed (FLOP/s, as `Shape.train_flops` counts them), measured once for a model and its settings."""
        path = self.site.folder / "speed.json"
        terms, site = ready.terms, self.site.model
        facts = [str(site.path), site.device, terms.threads, ready.base.computation, terms.training.batch_size]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        try:
            entry = json.loads(path.read_bytes())
            if entry["of"] == digest:
                return float(entry["flops"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        flops = _measured(ready, self.site.name, min(terms.rank, self.site.limits.rank))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"of": digest, "flops": flops})
        return flops


def prepare_site(site: Site, terms: RunTerms) -> PreparedSite:
    """Load model and data. Raises Refused where they are not fit for the run."""
    examples = site.examples(terms.labels)
    labels, seed = None if terms.labels is None else len(terms.labels), derive(terms.seed, "model")
    path, device = str(site.model.path), site.model.device
    base = load_base(path, labels, terms.lora, terms.rank, seed, device, terms.engine, terms.labels or ())
    if base.label_names != (terms.labels or ()):
        remedy = f"it numbers the labels as {', '.join(base.label_names)}, the run as {', '.join(terms.labels or ())}"
        raise Refused("model.path", site.model.path, f"{remedy}: get a copy of the same model")
    if terms.weights and base.fingerprint() not in ("", terms.weights):
        remedy = f"its weights are not those of the run's {terms.model!r}: get a copy of the same model"
        raise Refused("model.path", site.model.path, remedy)
    limit = terms.training.token_limit
    texts = encode_texts(examples, base.tokenizer, limit, terms.date)
    tried = check_texts(base, [texts], limit)
    for note in (*base.notes, *fit_notes(limit, {"local": texts.fit_counts}), *tried):
        LOG.warning("%s", note)
    shard = site_shard(site, examples, terms)
    trainer = PeftTrainer(base, texts, {site.name: shard.train}, terms.training, terms.engine)
    return PreparedSite(terms, base, shard, trainer, initial_adapter(base, terms.rank))


def request_digest(request: TaskRequest) -> str:
    """Return a digest of what is asked, the same whenever and by whichever start of the server it is asked."""
    return hashlib.sha256(encode_request(replace(request, incarnation=0))).hexdigest()


def _check_fits(ready: PreparedSite, start: TaskStart) -> None:
    """Raise Refused for a task of another base model."""
    if reason := model_mismatch(ready.first, start):
        raise Refused("model", ready.terms.model, reason)


def _measured(ready: PreparedSite, client: str, rank: int) -> float:
    """Measure the training speed (FLOP/s, as `Shape.train_flops` counts them)."""
    tokens, seconds = 0, 0.0
    for steps in (1, TIMED_STEPS):  # the first is a warm-up
        start = TaskStart(initial_adapter(ready.base, rank), "")
        began = time.perf_counter()
        ((result, _),) = ready.trainer.train([(Task(1, client, 0, start, Budget(rank, steps), 0, 0.0), ClientState())])
        tokens, seconds = result.tokens, time.perf_counter() - began
    return ready.base.shape().train_flops(tokens, rank) / seconds


def _memory(device: torch.device) -> float:
    """Bytes that the device has."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def serve_worker(site: Site) -> None:
    """Answer at the site's socket until the process is stopped. Raises Refused where another worker is running, or no
    socket can be made.
    """
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
            listener.serve(worker.answer, worker.status, worker.refuse_oversized)
