"""What the driver of a deployment drives, how patient it is, what it counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from fedloom import told, wire
from fedloom.edgemodel import narrowed
from fedloom.errors import Refused
from fedloom.flower.message import Word, decode_reply
from fedloom.flower.ranges import check_profiles
from fedloom.payload import down, up
from fedloom.server import State
from fedloom.types import (
    ClientJoined,
    Command,
    EdgeJoined,
    EdgeReported,
    Event,
    Model,
    Profile,
    Result,
    Task,
    UpdateArrived,
)

LARGEST = 2**31
"""Bytes of an answer, at most."""
REGION = "region"
"""The tier of a region's profile."""


class Driven(Protocol):
    """What is driven: a server, or an edge in the place of one."""

    @property
    def state(self) -> State:
        """Of the server."""
        ...

    def handle(self, now: float, event: Event) -> list[Command]:
        """As `Server.handle`."""
        ...

    def wake(self) -> float | None:
        """As `Server.wake`."""
        ...


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a deployment waits, in seconds.

    A task whose answer is not there after `task` is given to somebody else (None: never). A client that cannot be reached is waited
    for `away` seconds, in which its task is kept, before it counts as lost. A site that refused to work is asked again after `pause`,
    one that a message did not get to after `again`, and twice that the next time. What was sent `doubt` ago is sent again. The
    link is looked at every `poll`, for new sites every `look`.
    """

    task: float | None = None
    away: float = 180.0
    pause: float = 60.0
    again: float = 2.0
    doubt: float = 900.0
    poll: float = 0.2
    look: float = 2.0

    def __post_init__(self) -> None:
        for name in ("task", "away", "pause", "again", "doubt", "poll", "look"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise Refused(f"patience.{name}", value, "give positive seconds")


def unscored(model: Model) -> Mapping[str, float]:
    """No figures."""
    return {}


def unseen(now: float, event: Event, commands: list[Command]) -> None:
    """Nobody looks on."""


@dataclass(slots=True)
class Traffic:
    """What went over the link since the server started: messages and their bytes, each resend counted."""

    sent: int = 0
    resent: int = 0
    received: int = 0
    late: int = 0
    refused: int = 0
    bytes_down: int = 0
    bytes_up: int = 0


def heard(body: bytes, tasks: Mapping[int, Task], now: float, over: bool) -> Word | UpdateArrived:
    """What a site said, its answer to one of these tasks as an event; `over`: sites are regions. Raises Malformed."""
    said = decode_reply(body, LARGEST, tasks)
    if not isinstance(said, tuple):
        return said
    client, number, result = said
    if not over:
        return UpdateArrived(client, number, timed(tasks[number], result, now))
    result, telling = timed(narrowed(tasks[number], result), result, now), wire.beside(body)
    if telling is None:
        return EdgeReported(client, number, result)
    check_profiles(telling.members)
    return EdgeReported(client, number, result, told.timed(telling.told, result.metrics), telling.members)


def joined(profile: Profile, members: tuple[Profile, ...], over: bool) -> ClientJoined:
    """The event of a client that is there; `over`: it is a region with these members, or a site that stands for a group of one."""
    if not over:
        return ClientJoined(profile)
    return EdgeJoined(profile, members if profile.tier == REGION else (profile,))


def timed(task: Task, result: Result, now: float) -> Result:
    """With the seconds from sending to here; what was not training was spent on the links, in proportion to the bytes."""
    total = now - task.sent
    train = min(result.metrics.get("seconds_train", 0.0), total)
    sizes = down(task.start).total, up(task, result).total
    share = sizes[0] / sum(sizes) if sum(sizes) else 0.5
    parts = {"seconds_down": share * (total - train), "seconds_up": (1 - share) * (total - train)}
    return replace(result, metrics={**result.metrics, "seconds": total, "seconds_train": train, **parts})
