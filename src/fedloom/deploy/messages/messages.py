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
from fedloom.core.types import Budget, ClientId, Profile, Pruning, Result, Rules, Side, Start, Task
from fedloom.deploy.messages import answer as wire
from fedloom.deploy.messages.checks import (
    LONGEST,
    MOST,
    check_all,
    check_name,
    check_profiles,
    check_start,
    in_range,
    of_task,
)
from fedloom.deploy.messages.container import header, opened, sealed
from fedloom.train.settings import Engine, LoRA, Training, constant, cosine, linear

ASK, WORD = "fedloom-ask", "fedloom-word"
DECAYS = (constant, linear, cosine)
CODECS = (Exact, Half, DeltaInt8)


@dataclass(frozen=True, slots=True)
class Terms:
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
    first: str = ""

    def __post_init__(self) -> None:
        if self.training.decay not in DECAYS:
            name = getattr(self.training.decay, "__name__", "?")
            remedy = f"no code travels to a site; choose {', '.join(one.__name__ for one in DECAYS)}"
            raise Refused("training.decay", name, remedy)
        if not re.fullmatch("[0-9a-f]{12}", self.run_hash):
            raise Refused("run_hash", self.run_hash, "twelve hex digits, as a manifest has them")
        if not re.fullmatch("([0-9a-f]{12})?", self.weights):
            raise Refused("weights", self.weights, "twelve hex digits, or none")
        if not re.fullmatch("([0-9a-f]{64})?", self.first):
            raise Refused("first", self.first, "64 hex digits, or none")
        for field, text in (("name", self.run), ("model", self.model), *(("labels", one) for one in self.labels or ())):
            if not 0 < len(text) <= 10 * LONGEST:
                raise Refused(field, text, f"1 to {10 * LONGEST} characters")
        for field, number, most in (("rank", self.rank, 2**20), ("threads", self.threads, 1024)):
            if not 1 <= number <= most:
                raise Refused(field, number, f"a whole number from 1 to {most}")
        if abs(self.seed) > MOST:
            raise Refused("seed", self.seed, "a whole number of 64 bits")
        if not 0 <= self.held_out < 1:
            raise Refused("held_out", self.held_out, "a share of at least 0 and below 1")


@dataclass(frozen=True, slots=True)
class Hello:
    """Who are you, and may you work for this run? `incarnation` counts the server's starts, the first one is 1."""

    terms: Terms
    incarnation: int


@dataclass(frozen=True, slots=True)
class Work:
    """A task.

    `settled` is the client's last task whose answer the server accepted (0: none): what a later one left behind at the site is void.
    `left_out` are sides of the start that the site has already (`seeded`).
    """

    terms: Terms
    incarnation: int
    task: Task
    settled: int
    left_out: tuple[Side, ...] = ()


@dataclass(frozen=True, slots=True)
class Exam:
    """How good is this model on what the site of `client` holds out? Nothing is trained.

    `start` is what a task that began from the run's last version would begin with, `settled` as in `Work`. An answer is waited for
    `seconds`; one of a region, which asks its sites and waits as long for each, twice that.
    """

    terms: Terms
    incarnation: int
    client: ClientId
    start: Start
    settled: int
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
class Marks:
    """What an exam came to, in counts and sums over the examples held out.

    `asked` are its predictions (one an example, or one a token of the reference answers), `right` those that were, `loss` the sum of
    their cross-entropies. `base_right` would be right without any training: by always answering the commonest label of the examples
    trained on, or, where text is written, by the base alone, whose `base_loss` is told too (else 0).
    """

    client: ClientId
    examples: int
    asked: int
    right: int
    loss: float
    base_right: int
    base_loss: float = 0.0


Ask: TypeAlias = Hello | Work
Word: TypeAlias = Welcome | Refusal

KNOWN: Mapping[str, Any] = {
    one.__name__: one
    for one in (
        *(Hello, Work, Exam, Terms, LoRA, Training, Engine, Task, Start, Budget, Rules, Pruning),
        *(Welcome, Refusal, Marks, Profile),
        *CODECS,
        *DECAYS,
    )
}
"""All that a message can be made of."""


# Asks ----------------------------------------------------------------------------------------------------------------


def encode(ask: Ask | Exam) -> bytes:
    """The ask as bytes; the same ask gives the same bytes. Raises Refused for a codec that sites do not know."""
    if isinstance(ask, Work | Exam):
        check_codec(ask.task.start.codec if isinstance(ask, Work) else ask.start.codec)
    return sealed(ASK, ask)


def check_codec(codec: Codec | None) -> None:
    """Raise Refused for one that sites do not know."""
    if type(codec) not in (NoneType, *CODECS):
        raise Refused("transfer", codec, "no code travels to a site; choose Exact(), Half() or DeltaInt8()")


def decode(data: bytes, limit: int) -> Ask:
    """The ask that such bytes are. Raises Malformed with the reason, whatever the bytes are; memory: a few times `limit`."""
    ask: Ask = _decoded(data, limit, Hello | Work)
    return ask


def decode_any(data: bytes, limit: int) -> Ask | Exam:
    """The same, or an exam on what is held out."""
    ask: Ask | Exam = _decoded(data, limit, Hello | Work | Exam)
    return ask


def _decoded(data: bytes, limit: int, kinds: Any) -> Any:
    ask = opened(data, limit, ASK, kinds, KNOWN)
    in_range("incarnation", ask.incarnation, 0, MOST)
    if isinstance(ask, Hello):
        return ask
    in_range("settled", ask.settled, 0, MOST)
    check_name("client", ask.task.client if isinstance(ask, Work) else ask.client)
    if isinstance(ask, Work):
        check_all(of_task(ask.task))
        check_start(ask.task.start, ask.left_out)
    else:
        in_range("seconds", ask.seconds, 1e-9, 1e9)
        check_start(ask.start)
    return ask


# Replies -------------------------------------------------------------------------------------------------------------


def encode_reply(word: Word | Marks) -> bytes:
    """The reply as bytes; an answer to a task is made by `wire.encode`."""
    return sealed(WORD, word)


def decode_reply(data: bytes, limit: int, tasks: Mapping[int, Task]) -> Word | tuple[ClientId, int, Result]:
    """What a site said, or (client, task, result); `tasks` may be answered. Raises Malformed, whatever the bytes are."""
    if len(data) > limit:
        raise Malformed(f"{len(data)} bytes, above the limit of {limit}")
    if WORD not in header(data):
        return wire.decode(data, limit, tasks)
    word: Word = opened(data, limit, WORD, Welcome | Refusal, KNOWN)
    if isinstance(word, Refusal):
        check_refusal(word)
        return word
    check_profiles((word.profile, *word.members))
    in_range("incarnation", word.incarnation, 0, MOST)
    return word


def decode_marks(data: bytes, limit: int, exam: Exam) -> Marks | Refusal:
    """What the site said to this exam. Raises Malformed, whatever the bytes are."""
    word: Marks | Refusal = opened(data, limit, WORD, Marks | Refusal, KNOWN)
    if word.client != exam.client:
        raise Malformed(f"{word.client!r:.60} answers the exam of {exam.client!r}")
    if isinstance(word, Refusal):
        check_refusal(word)
        return word
    check_marks(word, exam)
    return word


def check_marks(word: Marks, exam: Exam) -> None:
    """Raise Malformed for what no site can come to in this exam."""
    labelled = exam.terms.labels is not None
    in_range("examples", word.examples, 1, 10**12)
    in_range("asked", word.asked, word.examples if labelled else 1, word.examples if labelled else MOST)
    in_range("right", word.right, 0, word.asked)
    in_range("base_right", word.base_right, 0, word.asked)
    in_range("loss", word.loss, 0.0, 1e30)
    in_range("base_loss", word.base_loss, 0.0, 0.0 if labelled else 1e30)


def check_refusal(word: Refusal) -> None:
    """Raise Malformed for one that no site says."""
    check_name("client", word.client)
    in_range("task", 1 if word.task is None else word.task, 1, MOST)
    if len(word.reason) > 10 * LONGEST:
        raise Malformed(f"a reason of {len(word.reason)} characters")
