"""What server and site say to each other, as bytes (`form`): a question, a task, an exam, an answer, marks, a refusal.

An answer to a task is `wire.encode`'s: it needs no names and shapes, for the server has the task.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, TypeAlias

from fedloom.core.codec import Codec, DeltaInt8, Exact, Half
from fedloom.core.errors import Refused
from fedloom.core.schema import Malformed
from fedloom.core.types import ClientId, Profile, Result, Side, TaskStart, Task
from fedloom.deploy.messages import answer as wire
from fedloom.deploy.messages.checks import (
    MAX_NAME,
    MAX_INTEGER,
    check_ranges,
    check_name,
    check_profiles,
    check_start,
    check_range,
    task_ranges,
)
from fedloom.deploy.messages.container import read_header, unpack_message, pack_message
from fedloom.train.settings import Engine, LoRA, Training, constant, cosine, linear

ASK, WORD = "fedloom-ask", "fedloom-word"
DECAYS = (constant, linear, cosine)
CODECS = (Exact, Half, DeltaInt8)


@dataclass(frozen=True, slots=True)
class RunTerms:
    """What a site must know of a run beside its tasks: who asks, and everything of local training that the numbers depend on.

    `run` is its name, `run_hash` names its settings (`manifest.digest`), `model` is what the server calls the base, of which the site
    has a copy of its own, and `rank` the largest rank of the run. `labels` are the names that the model chooses from, None where it
    writes text. `threads` is for torch, `seed` the run's. `weights` tells copies of the base from another model
    (`Base.fingerprint`; "" is not compared). `held_out` is the share of its examples that a site does not train on (`Exam`),
    `first` the sha256 of the adapter that the run began with ("": not told).
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

    def __post_init__(self) -> None:
        if self.training.decay not in DECAYS:
            name = getattr(self.training.decay, "__name__", "?")
            remedy = f"no code travels to a site; choose {', '.join(one.__name__ for one in DECAYS)}"
            raise Refused("training.decay", name, remedy)
        if not re.fullmatch("[0-9a-f]{12}", self.run_hash):
            raise Refused("run_hash", self.run_hash, "twelve hex digits, as a manifest has them")
        if not re.fullmatch("([0-9a-f]{12})?", self.weights):
            raise Refused("weights", self.weights, "twelve hex digits, or none")
        if not re.fullmatch("([0-9a-f]{64})?", self.first_adapter):
            raise Refused("first", self.first_adapter, "64 hex digits, or none")
        for field, text in (("name", self.run), ("model", self.model), *(("labels", one) for one in self.labels or ())):
            if not 0 < len(text) <= 10 * MAX_NAME:
                raise Refused(field, text, f"1 to {10 * MAX_NAME} characters")
        for field, number, most in (("rank", self.rank, 2**20), ("threads", self.threads, 1024)):
            if not 1 <= number <= most:
                raise Refused(field, number, f"a whole number from 1 to {most}")
        if abs(self.seed) > MAX_INTEGER:
            raise Refused("seed", self.seed, "a whole number of 64 bits")
        if not 0 <= self.held_out < 1:
            raise Refused("held_out", self.held_out, "a share of at least 0 and below 1")


@dataclass(frozen=True, slots=True)
class JoinRequest:
    """Who are you, and may you work for this run? `incarnation` counts the server's starts, the first one is 1."""

    terms: RunTerms
    incarnation: int


@dataclass(frozen=True, slots=True)
class TaskRequest:
    """A task.

    `settled` is the client's last task whose answer the server accepted (0: none): what a later one left behind at the site is void.
    `left_out` are sides of the start that the site has already (`seeded`).
    """

    terms: RunTerms
    incarnation: int
    task: Task
    last_accepted: int
    left_out: tuple[Side, ...] = ()


@dataclass(frozen=True, slots=True)
class EvaluateRequest:
    """How good is this model on what the site of `client` holds out? Nothing is trained.

    `start` is what a task that began from the run's last version would begin with, `settled` as in `Work`. An answer is waited for
    `seconds`; one of a region, which asks its sites and waits as long for each, twice that.
    """

    terms: RunTerms
    incarnation: int
    client: ClientId
    start: TaskStart
    last_accepted: int
    seconds: float = 900.0


@dataclass(frozen=True, slots=True)
class Welcome:
    """The site will work for this run. `incarnation` is that of the `Hello` which it answers; `seeded`: it drew `Terms.first` too.

    A region says who its `members` are where the plan learns of them.
    """

    profile: Profile
    incarnation: int
    seeded: bool = False
    members: tuple[Profile, ...] = ()


@dataclass(frozen=True, slots=True)
class Refusal:
    """The site will not, or could not, and why; `task` None: it is about the run. `lasting`: it holds for other tasks too."""

    client: ClientId
    task: int | None
    reason: str
    lasting: bool


@dataclass(frozen=True, slots=True)
class EvaluateResult:
    """What an exam came to, in counts and sums over the examples held out.

    `asked` are its predictions (one an example, or one a token of the reference answers), `right` those that were, `loss` the sum of
    their cross-entropies. `base_right` would be right without any training: by always answering the commonest label of the examples
    trained on, or, where text is written, by the base alone, whose `base_loss` is told too (else 0).
    """

    client: ClientId
    examples: int
    predictions: int
    correct: int
    loss: float
    base_correct: int
    base_loss: float = 0.0


Request: TypeAlias = JoinRequest | TaskRequest
Reply: TypeAlias = Welcome | Refusal



# Asks ----------------------------------------------------------------------------------------------------------------


def encode_request(ask: Request | EvaluateRequest) -> bytes:
    """The ask as bytes; the same ask gives the same bytes. Raises Refused for a codec that sites do not know."""
    if isinstance(ask, TaskRequest | EvaluateRequest):
        check_codec(ask.task.start.codec if isinstance(ask, TaskRequest) else ask.start.codec)
    return pack_message(ASK, ask)


def check_codec(codec: Codec | None) -> None:
    """Raise Refused for one that sites do not know."""
    if type(codec) not in (NoneType, *CODECS):
        raise Refused("transfer", codec, "no code travels to a site; choose Exact(), Half() or DeltaInt8()")


def decode_request(data: bytes, limit: int) -> Request:
    """The ask that such bytes are. Raises Malformed with the reason, whatever the bytes are; memory: a few times `limit`."""
    ask: Request = _decoded(data, limit, JoinRequest | TaskRequest)
    return ask


def decode_any(data: bytes, limit: int) -> Request | EvaluateRequest:
    """The same, or an exam on what is held out."""
    ask: Request | EvaluateRequest = _decoded(data, limit, JoinRequest | TaskRequest | EvaluateRequest)
    return ask


def _decoded(data: bytes, limit: int, kinds: Any) -> Any:
    ask = unpack_message(data, limit, ASK, kinds, DECAYS)
    check_range("incarnation", ask.incarnation, 0, MAX_INTEGER)
    if isinstance(ask, JoinRequest):
        return ask
    check_range("settled", ask.settled, 0, MAX_INTEGER)
    check_name("client", ask.task.client if isinstance(ask, TaskRequest) else ask.client)
    if isinstance(ask, TaskRequest):
        check_ranges(task_ranges(ask.task))
        check_start(ask.task.start, ask.left_out)
    else:
        check_range("seconds", ask.seconds, 1e-9, 1e9)
        check_start(ask.start)
    return ask


# Replies -------------------------------------------------------------------------------------------------------------


def encode_reply(word: Reply | EvaluateResult) -> bytes:
    """The reply as bytes; an answer to a task is made by `wire.encode`."""
    return pack_message(WORD, word)


def decode_reply(data: bytes, limit: int, tasks: Mapping[int, Task]) -> Reply | tuple[ClientId, int, Result]:
    """What a site said, or (client, task, result); `tasks` may be answered. Raises Malformed, whatever the bytes are."""
    if len(data) > limit:
        raise Malformed(f"{len(data)} bytes, above the limit of {limit}")
    if WORD not in read_header(data):
        return wire.decode_result(data, limit, tasks)
    word: Reply = unpack_message(data, limit, WORD, Welcome | Refusal)
    if isinstance(word, Refusal):
        check_refusal(word)
        return word
    check_profiles((word.profile, *word.members))
    check_range("incarnation", word.incarnation, 0, MAX_INTEGER)
    return word


def decode_marks(data: bytes, limit: int, exam: EvaluateRequest) -> EvaluateResult | Refusal:
    """What the site said to this exam. Raises Malformed, whatever the bytes are."""
    word: EvaluateResult | Refusal = unpack_message(data, limit, WORD, EvaluateResult | Refusal)
    if word.client != exam.client:
        raise Malformed(f"{word.client!r:.60} answers the exam of {exam.client!r}")
    if isinstance(word, Refusal):
        check_refusal(word)
        return word
    check_marks(word, exam)
    return word


def check_marks(word: EvaluateResult, exam: EvaluateRequest) -> None:
    """Raise Malformed for what no site can come to in this exam."""
    labelled = exam.terms.labels is not None
    check_range("examples", word.examples, 1, 10**12)
    check_range("asked", word.predictions, word.examples if labelled else 1, word.examples if labelled else MAX_INTEGER)
    check_range("right", word.correct, 0, word.predictions)
    check_range("base_right", word.base_correct, 0, word.predictions)
    check_range("loss", word.loss, 0.0, 1e30)
    check_range("base_loss", word.base_loss, 0.0, 0.0 if labelled else 1e30)


def check_refusal(word: Refusal) -> None:
    """Raise Malformed for one that no site says."""
    check_name("client", word.client)
    check_range("task", 1 if word.task is None else word.task, 1, MAX_INTEGER)
    if len(word.reason) > 10 * MAX_NAME:
        raise Malformed(f"a reason of {len(word.reason)} characters")
