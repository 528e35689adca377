"""What server and site say to each other, as bytes (`form`): a question, a task, an answer, a refusal.

An answer to a task is `wire.encode`'s: it needs no names and shapes, for the server has the task.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, TypeAlias

import torch

from fedloom import wire
from fedloom.check import MAX_MEMBERS
from fedloom.codec import Codec, DeltaInt8, Exact, Half
from fedloom.errors import Refused
from fedloom.flower.form import opened, sealed
from fedloom.lora import Adapter, tensors
from fedloom.train.settings import Engine, LoRA, Training, constant, cosine, linear
from fedloom.types import Budget, ClientId, Profile, Pruning, Result, Rules, Start, Task
from fedloom.wire import Malformed

ASK, WORD = "fedloom-ask", "fedloom-word"
DECAYS = (constant, linear, cosine)
CODECS = (Exact, Half, DeltaInt8)
LONGEST = 200
"""Characters of a name."""
MOST = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Terms:
    """What a site must know of a run beside its tasks: who asks, and everything of local training that the numbers depend on.

    `run` is its name, `run_hash` names its settings (`manifest.digest`), `model` is what the server calls the base, of which the site
    has a copy of its own, and `rank` the largest rank of the run. `labels` are the names that the model chooses from, None where it
    writes text. `threads` is for torch, `seed` the run's. `weights` tells copies of the base from another model
    (`Base.fingerprint`; "" is not compared).
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

    def __post_init__(self) -> None:
        if self.training.decay not in DECAYS:
            name = getattr(self.training.decay, "__name__", "?")
            remedy = f"no code travels to a site; choose {', '.join(one.__name__ for one in DECAYS)}"
            raise Refused("training.decay", name, remedy)
        if not re.fullmatch("[0-9a-f]{12}", self.run_hash):
            raise Refused("run_hash", self.run_hash, "twelve hex digits, as a manifest has them")
        if not re.fullmatch("([0-9a-f]{12})?", self.weights):
            raise Refused("weights", self.weights, "twelve hex digits, or none")
        for field, text in (("name", self.run), ("model", self.model), *(("labels", one) for one in self.labels or ())):
            if not 0 < len(text) <= 10 * LONGEST:
                raise Refused(field, text, f"1 to {10 * LONGEST} characters")
        for field, number, most in (("rank", self.rank, 2**20), ("threads", self.threads, 1024)):
            if not 1 <= number <= most:
                raise Refused(field, number, f"a whole number from 1 to {most}")
        if abs(self.seed) > MOST:
            raise Refused("seed", self.seed, "a whole number of 64 bits")


@dataclass(frozen=True, slots=True)
class Hello:
    """Who are you, and may you work for this run? `incarnation` counts the server's starts, the first one is 1."""

    terms: Terms
    incarnation: int


@dataclass(frozen=True, slots=True)
class Work:
    """A task, which nobody waits for after `seconds` (0: somebody always does).

    `settled` is the client's last task whose answer the server accepted (0: none): what a later one left behind at the site is void.
    """

    terms: Terms
    incarnation: int
    task: Task
    seconds: float
    settled: int


@dataclass(frozen=True, slots=True)
class Welcome:
    """The site will work for this run. `incarnation` is that of the `Hello` which it answers.

    A region says who its `members` are where the plan learns of them.
    """

    profile: Profile
    incarnation: int
    members: tuple[Profile, ...] = ()


@dataclass(frozen=True, slots=True)
class Refusal:
    """The site will not, or could not, and why; `task` None: it is about the run. `lasting`: it holds for other tasks too."""

    client: ClientId
    task: int | None
    reason: str
    lasting: bool


Ask: TypeAlias = Hello | Work
Word: TypeAlias = Welcome | Refusal

KNOWN: Mapping[str, Any] = {
    one.__name__: one
    for one in (
        *(Hello, Work, Terms, LoRA, Training, Engine, Task, Start, Budget, Rules, Pruning),
        *(Welcome, Refusal, Profile),
        *CODECS,
        *DECAYS,
    )
}
"""All that a message can be made of."""


# Asks ----------------------------------------------------------------------------------------------------------------


def encode(ask: Ask) -> bytes:
    """The ask as bytes; the same ask gives the same bytes. Raises Refused for a codec that sites do not know."""
    if isinstance(ask, Work):
        check_codec(ask.task.start.codec)
    return sealed(ASK, ask)


def check_codec(codec: Codec | None) -> None:
    """Raise Refused for one that sites do not know."""
    if type(codec) not in (NoneType, *CODECS):
        raise Refused("transfer", codec, "no code travels to a site; choose Exact(), Half() or DeltaInt8()")


def decode(data: bytes, limit: int) -> Ask:
    """The ask that such bytes are. Raises Malformed with the reason, whatever the bytes are; memory: a few times `limit`."""
    ask: Ask = opened(data, limit, ASK, Hello | Work, KNOWN)
    _in_range("incarnation", ask.incarnation, 0, MOST)
    if isinstance(ask, Work):
        _in_range("settled", ask.settled, 0, MOST)
        _in_range("seconds", ask.seconds, 0.0, 1e9)
        _check(ask.task)
    return ask


# Replies -------------------------------------------------------------------------------------------------------------


def encode_reply(word: Word) -> bytes:
    """The reply as bytes; an answer to a task is made by `wire.encode`."""
    return sealed(WORD, word)


def decode_reply(data: bytes, limit: int, tasks: Mapping[int, Task]) -> Word | tuple[ClientId, int, Result]:
    """What a site said, or (client, task, result); `tasks` may be answered. Raises Malformed, whatever the bytes are."""
    if len(data) > limit:
        raise Malformed(f"{len(data)} bytes, above the limit of {limit}")
    if WORD not in wire.header(data):
        return wire.decode(data, limit, tasks)
    word: Word = opened(data, limit, WORD, Welcome | Refusal, KNOWN)
    if isinstance(word, Refusal):
        _name("client", word.client)
        _in_range("task", 1 if word.task is None else word.task, 1, MOST)
        if len(word.reason) > 10 * LONGEST:
            raise Malformed(f"a reason of {len(word.reason)} characters")
        return word
    check_profiles((word.profile, *word.members))
    _in_range("incarnation", word.incarnation, 0, MOST)
    return word


def check_profiles(told: Sequence[Profile]) -> None:
    """Raise Malformed for what no site is, or more of them than a region has."""
    _in_range("members", len(told), 0, MAX_MEMBERS + 1)
    for profile in told:
        _name("profile.client", profile.client)
        _in_range("profile.examples", profile.examples, 1, 10**12)
        for name in ("flops", "up_bps", "down_bps", "memory"):
            _in_range(f"profile.{name}", getattr(profile, name), 1.0, 1e30)
        _in_range("profile.tier", len(profile.tier), 0, LONGEST)
        for name, value, least, most in _sizes(profile.most) if profile.most else ():
            _in_range(f"profile.most.{name}", value, least, most)


# Checks --------------------------------------------------------------------------------------------------------------


def _check(task: Task) -> None:
    """Raise Malformed for a task that no server gives."""
    start = task.start
    _name("client", task.client)
    for name, value, least, most in _ranges(task):
        _in_range(name, value, least, most)
    if not start.train.factors:
        raise Malformed("there is nothing to train")
    for where, adapter in (("train", start.train), ("fold", start.fold), ("control", start.control)):
        for name, factor in adapter.factors.items() if adapter else ():
            if factor.down.ndim != 2 or factor.up.ndim != 2 or factor.up.shape[1] != len(factor.down):
                raise Malformed(f"{where}: {name!r:.60} is no product of two matrices")
    rank = max(factor.rank for factor in start.train.factors.values())
    if start.slots is not None and (not _ascending(start.slots) or len(start.slots) != rank):
        raise Malformed("slots are not as many numbers in order as there are directions")
    if start.control and _shapes(start.control) != _shapes(start.train):
        raise Malformed("the control variate has other shapes than what is trained")


def _sizes(budget: Budget) -> Iterator[tuple[str, float, float, float]]:
    """The numbers of a budget, with the least and the most that they can be."""
    yield "rank", budget.rank, 1, 2**20
    yield "steps", budget.steps, 1, 10**9
    yield "depth", 1 if budget.depth is None else budget.depth, 1, 2**20
    yield "rounds", budget.rounds, 1, 10**9
    yield "why", len(budget.why), 0, 100 * LONGEST


def _ranges(task: Task) -> Iterator[tuple[str, float, float, float]]:
    """The numbers of a task."""
    start, pruning = task.start, task.start.rules.pruning
    yield from _sizes(task.budget)
    yield "task", task.id, 1, MOST
    yield "version", task.version, 0, MOST
    yield "seed", task.seed, 0, MOST
    yield "sent", task.sent, -1e18, 1e18
    yield "basis", len(start.basis), 0, LONGEST
    yield "scaling", 1.0 if start.scaling is None else start.scaling, 1e-9, 1e9
    yield "select", 1 if start.rules.select is None else start.rules.select, 1, MOST
    yield "up_rate", start.rules.up_rate, 1e-9, 1e9
    if pruning is not None:
        yield "strength", pruning.strength, 0.0, 1e9
        yield "keep", pruning.keep, 0.0, 1.0
        yield "least", pruning.least, 1, 2**20


def _in_range(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise Malformed(f"{name} is {str(value)[:40]}, expected {least} to {most}")


def _name(field: str, text: str) -> None:
    if not 0 < len(text) <= LONGEST:
        raise Malformed(f"{field} has {len(text)} characters, expected 1 to {LONGEST}")


def _ascending(numbers: Sequence[int]) -> bool:
    return all(one < other for one, other in zip((-1, *numbers), (*numbers, MOST), strict=True))


def _shapes(adapter: Adapter) -> Mapping[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors(adapter).items()}
