"""What the driver of a deployment drives, how patient it is, what it counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fedloom.core.events import ClientJoined, Command, EdgeJoined, EdgeReported, Event, UpdateArrived
from fedloom.core.message_size import download_size, upload_size
from fedloom.core.types import Model, Profile, Result, Task
from fedloom.deploy.messages import answer as wire
from fedloom.deploy.messages.checks import check_profiles
from fedloom.deploy.messages.messages import Reply, decode_reply
from fedloom.hierarchy import group_statistics
from fedloom.hierarchy.edge import trained_part

LARGEST = 2**31
"""Bytes of an answer, at most."""
REGION = "region"
"""The tier of a region's profile."""


def no_scores(model: Model) -> Mapping[str, float]:
    """No figures."""
    return {}


def no_observer(now: float, event: Event, commands: list[Command]) -> None:
    """Nobody looks on."""


def parse_reply(body: bytes, tasks: Mapping[int, Task], now: float, over: bool) -> Reply | UpdateArrived:
    """What a site said, its answer to one of these tasks as an event; `over`: sites are regions. Raises Malformed."""
    said = decode_reply(body, LARGEST, tasks)
    if not isinstance(said, tuple):
        return said
    client, number, result = said
    if not over:
        return UpdateArrived(client, number, with_seconds(tasks[number], result, now))
    result, telling = with_seconds(trained_part(tasks[number], result), result, now), wire.decode_report(body)
    if telling is None:
        return EdgeReported(client, number, result)
    check_profiles(telling.members)
    return EdgeReported(client, number, result, group_statistics.with_task_seconds(telling.statistics, result.metrics), telling.members)


def join_event(profile: Profile, members: tuple[Profile, ...], over: bool) -> ClientJoined:
    """The event of a client that is there; `over`: it is a region with these members, or a site that stands for a group of one."""
    if not over:
        return ClientJoined(profile)
    return EdgeJoined(profile, members if profile.tier == REGION else (profile,))


def with_seconds(task: Task, result: Result, now: float) -> Result:
    """With the seconds from sending to here; what was not training was spent on the links, in proportion to the bytes."""
    total = now - task.sent
    train = min(result.metrics.get("seconds_train", 0.0), total)
    sizes = download_size(task.start).total, upload_size(task, result).total
    share = sizes[0] / sum(sizes) if sum(sizes) else 0.5
    parts = {"seconds_down": share * (total - train), "seconds_up": (1 - share) * (total - train)}
    return replace(result, metrics={**result.metrics, "seconds": total, "seconds_train": train, **parts})
