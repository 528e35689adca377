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
from logging import INFO, WARNING, getLogger

import torch

from fedloom.core.errors import Refused
from fedloom.core.files import lock, open_regular, private_folder, private_tree
from fedloom.core.fingerprint import fingerprint
from fedloom.core.lora import Adapter
from fedloom.core.schema import Malformed
from fedloom.core.seeds import derive
from fedloom.core.transfer import encode_answer, residual_of
from fedloom.core.types import ClientState, Profile, Result, Task, TaskStart
from fedloom.data.partition import Shard
from fedloom.deploy.json_log import event
from fedloom.deploy.messages.answer import encode_result
from fedloom.deploy.messages.checks import model_mismatch
from fedloom.deploy.messages.messages import (
    Acknowledged,
    EvaluateRequest,
    EvaluateResult,
    JoinRequest,
    Refusal,
    Request,
    RunEnded,
    RunTerms,
    SumRequest,
    TaskRequest,
    Welcome,
    decode_request,
    encode_reply,
)
from fedloom.deploy.messages.seeded_sides import with_seeded_sides
from fedloom.deploy.site.answer_journal import AnswerJournal, CompletedTask
from fedloom.deploy.site.consent import Consents, terms_hash
from fedloom.deploy.site.deadline import Deadline
from fedloom.deploy.site.limits import MEGABYTE, Asked, layers_asked, needed_rows, require_allowed, task_epochs, used
from fedloom.deploy.site.machine_speed import device_memory, training_flops
from fedloom.deploy.site.request_record import MOST_LINES, RecordEntry, RequestRecord
from fedloom.deploy.site.settings import Site, site_shard, time_of_day, why_refused
from fedloom.deploy.site.site_key import key_fingerprint, read_private_key
from fedloom.deploy.site.site_noise import NoiseSource, protect_answer, why_unprotected
from fedloom.deploy.site.site_privacy import TaskSpending, noise_in_training, stored_run
from fedloom.deploy.site.site_secret import read_secret
from fedloom.deploy.site.sum_member import SumMember
from fedloom.deploy.site.worker_socket import Listener
from fedloom.privacy.private import without_measures
from fedloom.report.numbers import format_bytes, plural
from fedloom.train.base_model import Base, initial_adapter, load_base
from fedloom.train.chat_template import fit_notes
from fedloom.train.evaluate import evaluate_held_out, evaluate_untrained
from fedloom.train.objective import personal_adapter
from fedloom.train.text_checks import check_texts
from fedloom.train.tokenised import encode_texts
from fedloom.train.trainer import PeftTrainer

LOG = getLogger("fedloom.worker")
RUN_ENDED = "run ended"
"""Event of the log, and kind of line of the record, by which a site knows that no request will follow."""
RECORDED_REASON = 300
"""Characters of a reason in the record; the server gets up to 1000."""
LOSSES = ("loss", "first_loss")
"""Metrics of an answer that `limits.losses` holds back: a server could choose a model whose loss tells of one row."""


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
        secret: what its draws follow from (None: its own, from its state folder). Only tests give one, the simulation's.
        prepared: model and data, loaded for the terms of the last request.
        doing: what it does now, in words.
        trained: answers that were trained since the start.
        repeated: answers that were given again from the journal.
        refused: refusals.
        journal: completed tasks, on the disk.
        evaluations: completed evaluations, on the disk, numbered as in the record.
        record: what was asked and sent, on the disk.
        sums: its part in sums of answers.
        consents: terms that were offered and accepted, on the disk.
        deadline: ends the process where a request takes too long.
    """

    site: Site
    hour: Callable[[], float] = time_of_day
    secret: bytes | None = None
    prepared: PreparedSite | None = None
    doing: str = "nothing"
    trained: int = 0
    repeated: int = 0
    refused: int = 0
    journal: AnswerJournal = field(init=False)
    evaluations: AnswerJournal = field(init=False)
    sums: SumMember = field(init=False)
    consents: Consents = field(init=False)
    record: RequestRecord = field(init=False)
    deadline: Deadline = field(init=False)

    def __post_init__(self) -> None:
        folder = private_folder(self.site.folder)  # what lies there was learnt from the data
        self.secret = self.secret or read_secret(folder)
        self.journal, self.evaluations = AnswerJournal(folder / "journal"), AnswerJournal(folder / "evaluations")
        self.consents = Consents(folder, self.site.terms.accepted)
        self.deadline = Deadline(folder, self.site.limits.seconds)
        key = read_private_key(self.site.key) if self.site.key and self.site.key.exists() else None
        self.sums = SumMember(self.site.name, key, self.site.peers, self.site.limits.least_sum)
        self.record = RequestRecord(folder / "record.jsonl", key)
        self.record.append(RecordEntry("started", key=key_fingerprint(key.public_key()) if key else ""))
        self._end_overdue()

    def answer(self, body: bytes) -> bytes:
        """Return the reply to a message, whatever it is; never raises. What is asked and what is sent stand in the record then."""
        entry = RecordEntry("refused", bytes_in=len(body), asked=hashlib.sha256(body).hexdigest())
        try:
            request = decode_request(body, self.site.limits.bytes)
            entry = replace(entry.asked_by(request), terms=terms_hash(request.terms))
            with self.deadline.watch(replace(entry, seconds=self.deadline.seconds).written()):
                return self._reply(request, entry)
        except Malformed as error:
            return self._refuse(entry, f"not a valid message: {error}", True)
        except Refused as error:
            LOG.warning("%s", error)
            return self._refuse(entry, _without_data(error), True)
        except Exception as error:  # its kind is reported to the server; its words may quote a row
            LOG.exception("task %s failed", entry.task)
            self.prepared = None
            return self._refuse(entry, f"{type(error).__name__}; its owner finds the reason in the worker's log", False)
        finally:
            self.doing = "nothing"

    def _reply(self, request: Request, entry: RecordEntry) -> bytes:
        """Return the reply to a valid message."""
        seconds = self.record.counts.too_long.get(entry.request, 0.0)
        if self.site.limits.seconds <= seconds:
            return self._refuse(entry, _too_long(seconds), entry.task is None)
        if self.record.is_full():
            return self._refuse(entry, f"more than {MOST_LINES:,} lines in this site's record today", True)
        if isinstance(request, RunEnded):
            return self._end(request, entry)
        if reason := why_refused(self.site, request, self.hour()):
            return self._refuse(entry, reason, True)
        if reason := self.consents.why_not(request.terms):
            return self._refuse(entry, reason, True, deciding=True)
        self._record_acceptance(entry)
        self.doing = f"getting ready for {request.terms.run}"
        if isinstance(request, SumRequest):
            return self._send(replace(entry, kind="sum answered"), self.sums.answer(request, self.record, entry))
        if isinstance(request, EvaluateRequest):
            return self._evaluate(request, entry)
        return self._train(request, entry) if isinstance(request, TaskRequest) else self._welcome(request, entry)

    def _end(self, request: RunEnded, entry: RecordEntry) -> bytes:
        """Take note that the run has ended, and let go what was loaded for it; `fedloom join` reads it from the log."""
        reason = " ".join(request.reason.split())[:RECORDED_REASON]
        data = encode_reply(Acknowledged(self.site.name))
        self._note_sent(replace(entry, kind="run ended", reason=reason), data)
        self.prepared = None
        done = f"{plural(self.trained, 'task')} trained, {format_bytes(self.record.counts.sent)} sent today"
        LOG.info("run %s has ended: %s; %s", request.terms.run, reason, done, extra=event(RUN_ENDED))
        return data

    def status(self) -> bytes:
        """Return what the worker is and does, as JSON."""
        terms = self.prepared.terms if self.prepared else None
        facts = {"name": self.site.name, "pid": os.getpid(), "doing": self.doing, "run": terms and terms.run}
        counts = {"trained": self.trained, "repeated": self.repeated, "refused": self.refused}
        return json.dumps({**facts, **counts}).encode()

    def refuse_oversized(self, size: int) -> bytes:
        """Return the refusal of a message of so many bytes, which is above the limit and was not read."""
        reason = f"a message of {size} bytes: this site allows {self.site.limits.bytes}"
        return self._refuse(RecordEntry("refused", bytes_in=size), reason, True)

    def _refuse(self, entry: RecordEntry, reason: str, lasting: bool, deciding: bool = False) -> bytes:
        LOG.log(INFO if deciding else WARNING, "refused: %s", reason)  # who decides is shown the terms
        self.refused += 1
        reason = " ".join(reason.split())[:1000]
        data = encode_reply(Refusal(self.site.name, entry.task, reason, lasting, deciding))
        try:
            self._note_sent(replace(entry, kind="refused", reason=reason[:RECORDED_REASON]), data)
        except (OSError, Refused):
            LOG.exception("a refusal could not be recorded")
        return data

    def _record_acceptance(self, entry: RecordEntry) -> None:
        """Write down, once, that the terms of a request were accepted."""
        if entry.terms not in self.record.counts.accepted:
            self.record.append(replace(entry, kind="accepted", bytes_in=0))

    def _send(self, entry: RecordEntry, data: bytes) -> bytes:
        """Return the reply when the record says that it is sent.

        Raises OSError, and Refused where it would be too much for one day; then nothing is sent.
        """
        size = (self.record.usage(entry).bytes_today + len(data)) / MEGABYTE
        words = f"with this answer {size:.1f} MB would be sent today"
        require_allowed(self.site.limits, [Asked("megabytes_a_day", size, words)])
        self._note_sent(entry, data)
        return data

    def _note_sent(self, entry: RecordEntry, data: bytes) -> None:
        self.record.append(replace(entry, bytes_out=len(data), sent=hashlib.sha256(data).hexdigest()))

    def _end_overdue(self) -> None:
        """Note the request that ended the last worker by taking too long: it is never begun again."""
        if facts := self.deadline.overdue():
            try:
                entry = RecordEntry(**facts)
            except TypeError:
                LOG.error("the note of the request that took too long cannot be read")
            else:
                self.record.append(replace(entry, kind="refused", reason=_too_long(entry.seconds or 0.0)))
        self.deadline.forget()

    def _welcome(self, request: JoinRequest, entry: RecordEntry) -> bytes:
        self.record.append(replace(entry, kind="terms seen"))
        ready, speed = self._ready(request, entry), self.site.speed
        rows = len(ready.shard.train)
        profile = Profile(
            client=self.site.name,
            examples=1 if request.terms.privacy else rows,
            flops=speed.flops or training_flops(self.site, ready.terms, ready.base, ready.trainer),
            up_bps=speed.up_bps,
            down_bps=speed.down_bps,
            memory=speed.memory or device_memory(ready.base.device),
            tier="site",
            most=self.site.limits.most(rows, request.terms.training.batch_size),
        )
        said = (request.terms.run, rows, profile.flops)
        LOG.info("joined run %s with %d training examples, at %.3g FLOP/s", *said, extra=event("joined"))
        seeded = request.terms.first_adapter == fingerprint(ready.first)
        data = encode_reply(Welcome(profile, request.incarnation, seeded))
        return self._send(replace(entry, kind="profile sent", rows=rows), data)

    def _train(self, request: TaskRequest, entry: RecordEntry) -> bytes:
        """Return the answer: from the journal if the task was done, else trained now and written down before it is given out."""
        run, number, digest = self._stored(request), request.task.id, entry.request
        completed = self.journal.find(run, number)
        if completed is not None and completed.request_digest == digest and not self.sums.lacks(request):
            LOG.info("task %d was done before: the same answer again", number)
            self.repeated += 1
            self.journal.note_repeated(run, number, request.incarnation)
            return self._send(replace(entry, kind="task answered", again=True), completed.data)
        ready, before = self._ready(request, entry), self._last_client_state(request)
        _check_fits(ready, request.task.start)
        if reason := why_unprotected(self.site.privacy, request.task.start):
            return self._refuse(entry, reason, True)
        rows = len(ready.shard.train)
        entry = replace(entry, rows=rows, epochs=task_epochs(request, rows), again=self.record.was_asked(digest))
        spending = TaskSpending(self.site.folder, self.site.privacy, request, digest, rows, self.record.counts.noised)
        if reason := spending.why_refused():
            return self._refuse(entry, reason, True)
        self.record.append(replace(entry, kind="task asked"))
        task = with_seeded_sides(request, ready.first).task
        self.doing = f"task {number} of {request.terms.run}"
        _log_begin(task, entry.bytes_in)
        began = time.perf_counter()
        ((result, state),) = self._trainer(ready, entry, spending).train([(task, before)])
        seconds = time.perf_counter() - began
        whole = self.site.privacy is not None and self.site.privacy.unit == "answer"
        if whole:
            result = self._protect(entry, task, result)
        spending.note(fingerprint(result.adapter))
        for unit, clip, multiplier in spending.noises():
            noted = replace(entry, kind="noise spent", bytes_in=0, unit=unit, clip=clip, multiplier=multiplier)
            self.record.append(noted)
        received, state = encode_answer(task, before, result, state)
        if whole:  # nothing of an answer's exact numbers may follow in a later one
            state = replace(state, residual=None)
        reported = {name: v for name, v in received.metrics.items() if self.site.limits.losses or name not in LOSSES}
        result = replace(result, metrics={**reported, "seconds_train": seconds})
        result = without_measures(result) if request.terms.privacy else result  # its server promises privacy to clients
        data = self.sums.hold(request, task, result) or encode_result(task, result, residual_of(task.start, before))
        self.journal.record(
            run, number, CompletedTask.of_bytes(digest, data, state), request.last_accepted, request.incarnation
        )
        self.trained += 1
        reply = self._send(replace(entry, kind="task answered"), data)
        _log_answer(task, received, seconds, len(data))
        return reply

    def _trainer(self, ready: PreparedSite, entry: RecordEntry, spending: TaskSpending) -> PeftTrainer:
        """Return the trainer of a task that stands in the record.

        Where its number was given before, to another task, or a higher one was, its draws follow from all that is asked: no two
        requests ever share batches and dropout, for from such answers the rows of one batch could be told apart.
        """
        if self.record.is_first(entry.run_hash, entry.task or 0, entry.request) and spending.is_first():
            return ready.trainer
        return replace(ready.trainer, run=f"{entry.run_hash} {entry.request}")

    def _protect(self, entry: RecordEntry, task: Task, result: Result) -> Result:
        """Return the answer clipped and with noise."""
        assert self.site.privacy is not None
        assert self.secret is not None
        source = NoiseSource(self.secret, entry.run_hash, entry.request)
        return protect_answer(self.site.privacy, source, task, result)

    def _evaluate(self, request: EvaluateRequest, entry: RecordEntry) -> bytes:
        """Score the last model on the held-out examples, by the functions that score a simulation's clients; only counts leave.

        The same request gets the same bytes; how many others of a run are answered, the limits say.
        """
        run, digest = request.terms.run_hash, entry.request
        if number := self.record.evaluation_number(run, digest):
            completed = self.evaluations.find(self._stored(request), number)
            if completed is not None and completed.request_digest == digest:
                self.repeated += 1
                return self._send(replace(entry, kind="evaluation answered", again=True), completed.data)
            if self.record.was_evaluated(run, digest):
                raise Refused("evaluation", number, "it was answered before, and the answer is no longer stored")
        ready = self._ready(request, entry)
        _check_fits(ready, request.start)
        self.doing = f"evaluating for {request.terms.run}"
        held_out = len(ready.shard.held_out)
        if not held_out:
            raise Refused("held_out", 0, "this site holds no example out, so there is nothing to evaluate on")
        entry = replace(entry, rows=held_out, again=number is not None)
        self.record.append(replace(entry, kind="evaluation asked"))
        adapter = personal_adapter(request.start, self._last_client_state(request))
        client, shards, texts = ready.shard.client, [ready.shard], ready.trainer.texts
        scores = evaluate_held_out(ready.base, adapter, texts, shards, request.start.fold)[client]
        baseline = evaluate_untrained(ready.base, texts, shards)[client]
        predictions, correct, loss = scores.counts()
        _, base_correct, base_loss = baseline.counts()
        said = (correct, predictions, held_out)
        LOG.info("evaluated: %d of %d right on %d held-out examples", *said, extra=event("evaluated"))
        losses = (loss, base_loss) if self.site.limits.losses and self.site.privacy is None else (None, None)
        data = encode_reply(EvaluateResult(client, held_out, predictions, correct, losses[0], base_correct, losses[1]))
        number = self.record.evaluation_number(run, digest) or 1
        done = CompletedTask.of_bytes(digest, data, ClientState())
        self.evaluations.record(self._stored(request), number, done, number)
        return self._send(replace(entry, kind="evaluation answered"), data)

    def _stored(self, request: TaskRequest | EvaluateRequest) -> str:
        """Return the name under which answers to such a request are stored."""
        return stored_run(request.terms.run_hash, self.site.privacy, request.terms.records)

    def _last_client_state(self, request: TaskRequest | EvaluateRequest) -> ClientState:
        """Return the client state that the last accepted task left here; an empty one if there is none."""
        last = self.journal.find(self._stored(request), request.last_accepted) if request.last_accepted else None
        if request.last_accepted and last is None:
            LOG.warning(
                "no state of accepted task %d is stored: the client starts with an empty one", request.last_accepted
            )
        return last.client_state if last else ClientState()

    def _ready(self, request: Request, entry: RecordEntry) -> PreparedSite:
        """Return model and data for a request, once its limits are kept; those of other terms are let go first. Raises Refused."""
        terms = request.terms
        torch.set_num_threads(terms.threads)
        if self.prepared is None or self.prepared.terms != terms:
            self.prepared = None
            assert self.secret is not None  # since `__post_init__`
            self.prepared = prepare_site(self.site, terms, self.secret)
        ready, limits = self.prepared, self.site.limits
        rows, held_out = len(ready.shard.train), len(ready.shard.held_out)
        require_allowed(limits, layers_asked(ready.first.factors))
        require_allowed(limits, needed_rows(request, rows, held_out))
        require_allowed(limits, used(request, self.record.usage(entry), rows, held_out))
        return ready


def prepare_site(site: Site, terms: RunTerms, secret: bytes) -> PreparedSite:
    """Load model and data, and divide these by the site's secret. Raises Refused where they are not fit for the run."""
    examples = site.examples(terms.labels)
    labels, seed = None if terms.labels is None else len(terms.labels), derive(terms.seed, "model")
    path, device = str(site.model.path), site.model.device
    base = load_base(path, labels, terms.lora, terms.rank, seed, device, terms.engine, terms.labels or ())
    if base.label_names != (terms.labels or ()):
        remedy = f"it numbers the labels as {', '.join(base.label_names)}, the run as {', '.join(terms.labels or ())}"
        raise Refused("model.path", site.model.path, f"{remedy}: get a copy of the same model")
    here = base.fingerprint()  # "" in 4 bits, which a server may ask for: the check is not its to switch off
    if here != terms.weights and not (site.model.any_weights and "" in (here, terms.weights)):
        lacks = "its weights cannot be compared in 4 bits: its owner can allow it, [model] any_weights = true"
        wrong = f"its weights are not those of the run's {terms.model!r}: get a copy of the same model"
        remedy = wrong if here else lacks
        raise Refused("model.path", site.model.path, remedy)
    limit = terms.training.token_limit
    texts = encode_texts(examples, base.tokenizer, limit, terms.date)
    tried = check_texts(base, [texts], limit)
    for note in (*base.notes, *fit_notes(limit, {"local": texts.fit_counts}), *tried):
        LOG.warning("%s", note)
    shard = site_shard(site, examples, terms, secret)
    records, shards = noise_in_training(site.privacy, terms.records), {site.name: shard.train}
    trainer = PeftTrainer(
        base, texts, shards, terms.training, lambda _: secret, terms.engine, run=terms.run_hash, records=records
    )
    return PreparedSite(terms, base, shard, trainer, initial_adapter(base, terms.rank))


def _without_data(error: Refused) -> str:
    """Return what a server is told of an error; not the words on data, which may quote a label or a cell, nor the site's folders."""
    if error.field.partition(".")[0] in ("data", "table", "instructions", "labels"):
        return (
            f"{error.field}: the data of this site do not fit the run; its owner finds the reason in the worker's log"
        )
    if isinstance(error.value, str) and os.path.isabs(error.value):
        return str(Refused(error.field, os.path.basename(error.value), error.remedy))
    return str(error)


def _log_begin(task: Task, size: int) -> None:
    """Log the begin of a task, whose request had `size` bytes."""
    budget = task.budget
    asked = (task.id, task.version, format_bytes(size), plural(budget.steps, "step"), budget.rank)
    LOG.info("task %d, from version %d (%s received): training %s at rank %d", *asked, extra=event("task begun"))


def _log_answer(task: Task, result: Result, seconds: float, size: int) -> None:
    """Log an answer of `size` bytes, with what was measured here, whether or not it leaves the site."""
    loss = f"loss {result.metrics['loss']:.3f}, " if "loss" in result.metrics else ""
    done = f"{loss}{plural(result.steps, 'step')} in {seconds:.1f} s, {format_bytes(size)} sent"
    LOG.info("task %d answered: %s", task.id, done, extra=event("task answered"))


def _too_long(seconds: float) -> str:
    return f"it took longer than the {seconds:g} s that this site allows (limits.seconds)"


def _check_fits(ready: PreparedSite, start: TaskStart) -> None:
    """Raise Refused for a task of another base model."""
    if reason := model_mismatch(ready.first, start):
        raise Refused("model", ready.terms.model, reason)


def serve_worker(site: Site) -> None:
    """Answer at the site's socket until the process is stopped. Raises Refused where another worker is running, or no
    socket can be made.
    """
    if wide := private_tree(site.folder):
        LOG.warning(
            "other users could read %d of the files and folders in %s; now only this user can", wide, site.folder
        )
    with open_regular(site.folder / "worker.lock", "ab") as held:
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
