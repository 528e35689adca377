"""Messages between a server and its sites or regions: the dataclasses, their bytes, and the checks of what arrives.

A server sends five requests: `JoinRequest` (may I count on you?), `TaskRequest` (train), `EvaluateRequest` (score the last
model on what you hold out), `SumRequest` (a step of a masked sum) and `RunEnded` (nothing more will come). The replies are `Welcome`;
the answer to a task, which `answer` encodes, since the server has the task and needs no names and shapes, or `Ready`, where answers
are only summed; `EvaluateResult`, or a `RegionEvaluateResult` from a region; `sum_messages.SumReply`; and `Acknowledged`. Instead of
any of them, a `Refusal` may come.

Encoding is the container's (`container`). Decoding checks types, ranges and names, and raises `Malformed` for all else, whatever the
bytes are. What a site is willing to do is not judged here (`site.settings.why_refused`), nor whether an answer fits its task
(`core.validate_answer`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, TypeAlias

from fedloom.core.codec import Codec, DeltaInt8, Exact, Half, HalfChange, Summed
from fedloom.core.errors import Refused
from fedloom.core.lora import server_rank
from fedloom.core.rate_by_rank import RateByRank
from fedloom.core.schema import Malformed
from fedloom.core.types import ClientId, Profile, Result, Side, Task, TaskStart
from fedloom.core.validate_answer import MAX_MEMBERS
from fedloom.deploy.messages import answer
from fedloom.deploy.messages.checks import (
    MAX_INTEGER,
    MAX_NAME,
    MAX_STEPS,
    check_name,
    check_profiles,
    check_range,
    check_ranges,
    check_start,
    task_ranges,
)
from fedloom.deploy.messages.container import NotOutstanding, pack_message, read_header, unpack_message
from fedloom.deploy.messages.sum_messages import MOST_BLOCKS, BlockStep
from fedloom.privacy.private import Private
from fedloom.privacy.record_draws import for_records
from fedloom.runs.run import check_date
from fedloom.train.settings import ALL_LINEAR, Engine, LoRA, Training, constant, cosine, linear

REQUEST, REPLY = "fedloom-request", "fedloom-reply"
"""Names under which the text of a message stands in its container."""
DECAYS = (constant, linear, cosine)
CODECS = (Exact, Half, HalfChange, DeltaInt8, Summed)
LAYER_NAME = r"[A-Za-z0-9_.-]{1,200}"
"""A name of a layer that is a name and no pattern: a dot stands for itself where layers are looked for by the ends of names."""


@dataclass(frozen=True, slots=True)
class RunTerms:
    """Terms of a run, which a site must know besides its tasks: whose run it is, and all settings that training depends on.

    Fields:
        run: name of the run.
        run_hash: names its settings (`manifest.digest`).
        model: the server's name of the base model, of which the site has a copy of its own.
        rank: largest rank of the run.
        lora: shape of the adapters.
        training: settings of local training.
        engine: how training is computed.
        threads: threads of torch.
        seed: seed of the run.
        labels: names that the model chooses from (None: it writes text).
        weights: tells copies of the base model from another model (`Base.fingerprint`; "": not compared).
        held_out: share of its examples that a site does not train on, for `EvaluateRequest`.
        first_adapter: sha256 of the adapter with which the run began ("": not sent).
        date: the date that prompts have (None: they have none).
        depth: largest number of trained layers of a task, from the top (None: all that have an adapter).
        steps: largest number of local steps of a task.
        versions: versions after which the run ends (0: not said).
        evaluations: how often a site is asked to score the model on what it holds out.
        folds: whether tasks change the base model too (`TaskStart.fold`).
        controls: whether tasks bring numbers that are added to gradients (`TaskStart.control`).
        privacy: what the server says that it does to answers for privacy, in words ("": nothing).
        records: how sites add noise in training, so that an answer tells little of any one row (None: the run does not ask for it).
        least_sum: sites over which answers are summed, at least, before anybody sees one (0: the server sees each answer).
        sum_threshold: share of the sites in a sum that must agree to opening it, where answers are summed.
        rates: how the learning rate of adapters follows their rank (None: every rank has that of `training`).
    """

    run: str
    run_hash: str
    model: str
    rank: int
    lora: LoRA
    training: Training
    engine: Engine
    threads: int
    seed: int
    labels: tuple[str, ...] | None
    weights: str = ""
    held_out: float = 0.0
    first_adapter: str = ""
    date: str | None = None
    depth: int | None = None
    steps: int = MAX_STEPS
    versions: int = 0
    evaluations: int = 1
    folds: bool = False
    controls: bool = False
    privacy: str = ""
    records: Private | None = None
    least_sum: int = 0
    sum_threshold: float = 0.6
    rates: RateByRank | None = None

    def __post_init__(self) -> None:
        check_layer_names(self.lora.target_modules)
        if self.records != for_records(self.records):
            raise Refused("records.unit", "client", '"record": what a server adds to sums is not done at a site')
        _check_decay(self.training)
        for field, text, form, words in (
            ("run_hash", self.run_hash, "[0-9a-f]{12}", "twelve hex digits, as a manifest has them"),
            ("weights", self.weights, "([0-9a-f]{12})?", "twelve hex digits, or none"),
            ("first_adapter", self.first_adapter, "([0-9a-f]{64})?", "64 hex digits, or none"),
            ("engine.cache_dir", self.engine.cache_dir or "", "", "no server names a folder of a site; leave it out"),
        ):
            if not re.fullmatch(form, text):
                raise Refused(field, text, words)
        for field, text in (("name", self.run), ("model", self.model), *(("labels", one) for one in self.labels or ())):
            if not 0 < len(text) <= 10 * MAX_NAME:
                raise Refused(field, text, f"1 to {10 * MAX_NAME} characters")
        if len(self.privacy) > 10 * MAX_NAME:
            raise Refused("privacy", self.privacy, f"at most {10 * MAX_NAME} characters")
        for field, number, least, most in (
            ("rank", self.rank, 1, 2**20),
            ("threads", self.threads, 1, 1024),
            ("depth", self.depth or 1, 1, 2**20),
            ("steps", self.steps, 1, MAX_STEPS),
            ("versions", self.versions, 0, MAX_INTEGER),
            ("evaluations", self.evaluations, 0, 10**6),
            ("least_sum", self.least_sum, 0, MAX_MEMBERS),
        ):
            if not least <= number <= most:
                raise Refused(field, number, f"a whole number from {least} to {most}")
        if abs(self.seed) > MAX_INTEGER:
            raise Refused("seed", self.seed, "a whole number of 64 bits")
        _check_shares(self)
        if self.date is not None:
            check_date(self.date)


def _check_shares(terms: RunTerms) -> None:
    if not 0 <= terms.held_out < 1:
        raise Refused("held_out", terms.held_out, "a share of at least 0 and below 1")
    if not 0.5 < terms.sum_threshold <= 1:
        raise Refused("sum_threshold", terms.sum_threshold, "a share above 0.5, and at most 1")
    if terms.rates is not None and terms.rates.reference is None:
        raise Refused("rates.reference", None, "the rank that has the learning rate of the run")


def _check_decay(training: Training) -> None:
    if training.decay not in DECAYS:
        name = getattr(training.decay, "__name__", "?")
        remedy = f"no code travels to a site; choose {', '.join(decay.__name__ for decay in DECAYS)}"
        raise Refused("training.decay", name, remedy)


def check_layer_names(names: tuple[str, ...] | str | None) -> None:
    """Raise Refused for anything but plain names of layers, or the word for all: no regular expression travels to a site."""
    if names is None or (isinstance(names, str) and names.lower() == ALL_LINEAR):
        return
    if isinstance(names, str) or not all(re.fullmatch(LAYER_NAME, name) for name in names):
        remedy = f"a list of plain names, or {ALL_LINEAR!r}; no regular expression travels to a site"
        raise Refused("lora.target_modules", str(names)[:MAX_NAME], remedy)


@dataclass(frozen=True, slots=True)
class JoinRequest:
    """Ask a node who it is and whether it works for this run.

    Fields:
        terms: terms of the run.
        incarnation: number of the server's start, the first one is 1.
    """

    terms: RunTerms
    incarnation: int


@dataclass(frozen=True, slots=True)
class TaskRequest:
    """Ask a client to train.

    Fields:
        terms: terms of the run.
        incarnation: number of the server's start.
        task: the task.
        last_accepted: the client's last task whose answer the server accepted (0: none). The state that a later task left at the
            site is void.
        left_out: sides of the start that the site can compute itself (`seeded_sides`).
    """

    terms: RunTerms
    incarnation: int
    task: Task
    last_accepted: int
    left_out: tuple[Side, ...] = ()


@dataclass(frozen=True, slots=True)
class EvaluateRequest:
    """Ask a client how good the run's last model is on the examples that it holds out. Nothing is trained.

    Fields:
        terms: terms of the run.
        incarnation: number of the server's start.
        client: who is asked.
        start: what a task that began from the last version would begin with.
        last_accepted: as in `TaskRequest`.
        seconds: how long the server waits for the reply. A region gives each of its sites as long, and is waited for twice as long.
    """

    terms: RunTerms
    incarnation: int
    client: ClientId
    start: TaskStart
    last_accepted: int
    seconds: float = 900.0


@dataclass(frozen=True, slots=True)
class SumRequest:
    """Ask a client that has done a task whose answer is only summed for its part in the sum (`privacy.secure_sum`).

    Fields:
        terms: terms of the run.
        incarnation: number of the server's start.
        client: who is asked.
        task: its task.
        steps: one for each block of directions that it holds, all of the same step.
    """

    terms: RunTerms
    incarnation: int
    client: ClientId
    task: int
    steps: tuple[BlockStep, ...]


@dataclass(frozen=True, slots=True)
class RunEnded:
    """Say that the run has ended and that no request will follow, so that a site need not wait for one.

    Fields:
        terms: terms of the run.
        incarnation: number of the server's start.
        reason: why it has ended, in words.
    """

    terms: RunTerms
    incarnation: int
    reason: str


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """Reply to `RunEnded`, of which the server reads nothing."""

    client: ClientId


@dataclass(frozen=True, slots=True)
class Welcome:
    """Reply to a `JoinRequest`: the site works for this run.

    Fields:
        profile: what the site is.
        incarnation: that of the request.
        seeded: whether the site drew the run's first adapter itself (`RunTerms.first_adapter`).
        members: profiles of a region's sites, where the plan learns from them.
    """

    profile: Profile
    incarnation: int
    seeded: bool = False
    members: tuple[Profile, ...] = ()


@dataclass(frozen=True, slots=True)
class Refusal:
    """Reply to any request: the site does not do it, or could not.

    Fields:
        client: who refuses.
        task: the refused task (None: the run as a whole).
        reason: why, in a sentence.
        lasting: whether the reason holds for other tasks too.
        deciding: whether the site's owner has yet to accept the terms, so that it can soon be asked again.
    """

    client: ClientId
    task: int | None
    reason: str
    lasting: bool
    deciding: bool = False


@dataclass(frozen=True, slots=True)
class Ready:
    """Reply to a `TaskRequest` whose answer is only summed: the site has trained, and holds what is to be summed."""

    client: ClientId
    task: int


@dataclass(frozen=True, slots=True)
class EvaluateResult:
    """Reply to an `EvaluateRequest`: counts and sums over the held-out examples. No text leaves a site, and no single example.

    Fields:
        client: who was asked.
        examples: examples held out.
        predictions: one per example, or one per token of the reference answers.
        correct: predictions that are right.
        loss: sum of their cross-entropies (None: the site does not tell).
        base_correct: predictions that are right without training: of the commonest label among the examples trained on, or,
            where text is written, of the base model alone.
        base_loss: sum of the base's cross-entropies, where text is written (else 0; None: the site does not tell).
    """

    client: ClientId
    examples: int
    predictions: int
    correct: int
    loss: float | None
    base_correct: int
    base_loss: float | None = 0.0


@dataclass(frozen=True, slots=True)
class SiteResult:
    """Evaluation of one client as its server or region knows it.

    Fields:
        client: who was asked.
        rank: rank of the model that was sent.
        result: what it replied (None: nothing that can be used).
        reason: why there is no result ("" if there is one).
    """

    client: ClientId
    rank: int
    result: EvaluateResult | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class RegionEvaluateResult:
    """Reply of the region `client` to an `EvaluateRequest`: the results of all `sites` that ever joined it."""

    client: ClientId
    sites: tuple[SiteResult, ...]


Request: TypeAlias = JoinRequest | TaskRequest | EvaluateRequest | SumRequest | RunEnded
Reply: TypeAlias = Welcome | Ready | Refusal
EvaluateReply: TypeAlias = EvaluateResult | RegionEvaluateResult


# Requests -------------------------------------------------------------------------------------------------------------


def encode_request(request: Request) -> bytes:
    """Encode a request; the same request gives the same bytes. Raises Refused for a codec that sites do not know."""
    if isinstance(request, TaskRequest | EvaluateRequest):
        check_codec(start_of(request).codec)
    return pack_message(REQUEST, request)


def start_of(request: TaskRequest | EvaluateRequest) -> TaskStart:
    """Return the start that a request carries."""
    return request.task.start if isinstance(request, TaskRequest) else request.start


def check_codec(codec: Codec | None) -> None:
    """Raise Refused for a codec that sites do not know."""
    if type(codec) not in (NoneType, *CODECS):
        raise Refused(
            "transfer", codec, "no code travels to a site; choose Exact(), Half(), HalfChange() or DeltaInt8()"
        )


def decode_request(data: bytes, limit: int) -> Request:
    """Decode a request of at most `limit` bytes. Raises Malformed with the reason; needs a few times `limit` of memory."""
    request: Request = unpack_message(data, limit, REQUEST, Request, DECAYS)
    check_range("incarnation", request.incarnation, 0, MAX_INTEGER)
    if isinstance(request, JoinRequest):
        return request
    if isinstance(request, RunEnded):
        check_range("reason", len(request.reason), 0, 10 * MAX_NAME)
        return request
    if isinstance(request, SumRequest):
        check_name("client", request.client)
        check_range("task", request.task, 1, MAX_INTEGER)
        check_range("blocks", len(request.steps), 1, MOST_BLOCKS)
        return request
    check_range("last_accepted", request.last_accepted, 0, MAX_INTEGER)
    if isinstance(request, TaskRequest):
        check_name("client", request.task.client)
        check_ranges(task_ranges(request.task))
        check_start(request.task.start, request.left_out)
    else:
        check_name("client", request.client)
        check_range("seconds", request.seconds, 1e-9, 1e9)
        check_start(request.start)
    return request


# Replies --------------------------------------------------------------------------------------------------------------


def encode_reply(reply: Reply | EvaluateReply | Acknowledged) -> bytes:
    """Encode a reply, other than the answer to a task (`answer.encode_result`)."""
    return pack_message(REPLY, reply)


def decode_reply(data: bytes, limit: int, tasks: Mapping[int, Task]) -> Reply | tuple[ClientId, int, Result]:
    """Decode the reply to a join or task request; an answer is (client, task, result). Raises Malformed.

    `tasks` are the outstanding ones: an answer to another task raises NotOutstanding.
    """
    if len(data) > limit:
        raise Malformed(f"{len(data)} bytes, above the limit of {limit}")
    if REPLY not in read_header(data):
        return answer.decode_result(data, limit, tasks)
    reply: Reply = unpack_message(data, limit, REPLY, Reply)
    if isinstance(reply, Refusal):
        _check_refusal(reply)
        return reply
    if isinstance(reply, Ready):
        check_name("client", reply.client)
        if reply.task not in tasks:
            raise NotOutstanding(f"task {reply.task} is not outstanding")
        return reply
    check_profiles((reply.profile, *reply.members))
    check_range("incarnation", reply.incarnation, 0, MAX_INTEGER)
    return reply


def decode_evaluation(
    data: bytes, limit: int, request: EvaluateRequest, region: bool = False
) -> EvaluateReply | Refusal:
    """Decode the reply of a site, or of a region, to this evaluate request. Raises Malformed."""
    kind: Any = RegionEvaluateResult if region else EvaluateResult
    reply: EvaluateReply | Refusal = unpack_message(data, limit, REPLY, kind | Refusal)
    if reply.client != request.client:
        raise Malformed(f"{reply.client!r:.60} replies to the evaluate request of {request.client!r}")
    if isinstance(reply, Refusal):
        _check_refusal(reply)
    elif isinstance(reply, EvaluateResult):
        _check_result(reply, request)
    else:
        check_range("sites", len(reply.sites), 1, MAX_MEMBERS)
        if len({site.client for site in reply.sites}) < len(reply.sites):
            raise Malformed("a site is listed twice")
        for site in reply.sites:
            _check_site(site, request)
    return reply


def _check_result(result: EvaluateResult, request: EvaluateRequest) -> None:
    """Raise Malformed for figures that no evaluation of this request can have."""
    labelled = request.terms.labels is not None
    fewest, most = (result.examples, result.examples) if labelled else (1, MAX_INTEGER)
    check_range("examples", result.examples, 1, 10**12)
    check_range("predictions", result.predictions, fewest, most)
    check_range("correct", result.correct, 0, result.predictions)
    check_range("base_correct", result.base_correct, 0, result.predictions)
    if (result.loss is None) != (result.base_loss is None):
        raise Malformed("a site tells both sums of losses, or none")
    check_range("loss", result.loss or 0.0, 0.0, 1e30)
    check_range("base_loss", result.base_loss or 0.0, 0.0, 0.0 if labelled else 1e30)


def _check_site(site: SiteResult, request: EvaluateRequest) -> None:
    """Raise Malformed for a site of a region that cannot have been asked so, or cannot have replied so."""
    check_name("client", site.client)
    check_range("rank", site.rank, 1, server_rank(request.start.train))
    check_range("reason", len(site.reason), *((1, 10 * MAX_NAME) if site.result is None else (0, 0)))
    if site.result is None:
        return
    if site.result.client != site.client:
        raise Malformed(f"{site.client!r:.60} has the result of {site.result.client!r:.60}")
    _check_result(site.result, request)


def _check_refusal(refusal: Refusal) -> None:
    """Raise Malformed for a refusal that no site sends."""
    check_name("client", refusal.client)
    check_range("task", 1 if refusal.task is None else refusal.task, 1, MAX_INTEGER)
    if len(refusal.reason) > 10 * MAX_NAME:
        raise Malformed(f"a reason of {len(refusal.reason)} characters")
