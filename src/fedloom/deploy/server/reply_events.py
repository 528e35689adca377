"""What the driver of a deployment drives, how patient it is, what it counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fedloom.core.events import ClientJoined, Command, EdgeJoined, EdgeReported, Event, UpdateArrived
from fedloom.core.message_size import down, up
from fedloom.core.types import Model, Profile, Result, Task
from fedloom.deploy.messages import answer as wire
from fedloom.deploy.messages.checks import check_profiles
from fedloom.deploy.messages.messages import Word, decode_reply
from fedloom.hierarchy import group_statistics
from fedloom.hierarchy.edge_model import narrowed

LARGEST = 2**31
"""Bytes of an answer, at most."""
REGION = "region"
"""The tier of a region's profile."""


def unscored(model: Model) -> Mapping[str, float]:
    """No figures."""
    return {}


def unseen(now: float, event: Event, commands: list[Command]) -> None:
    """Nobody looks on."""


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
    return EdgeReported(client, number, result, group_statistics.timed(telling.told, result.metrics), telling.members)


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
