"""Replies from the network as events of the core: the border between untrusted bytes and the server's `handle`."""

from __future__ import annotations

from collections.abc import Mapping

from fedloom.aggregate.shared.parts import is_summed
from fedloom.core.events import ClientJoined, EdgeJoined, EdgeReported, PartsReady, UpdateArrived
from fedloom.core.lora import named_tensors
from fedloom.core.message_size import download_size, upload_size
from fedloom.core.schema import Malformed
from fedloom.core.types import Profile, Result, Task
from fedloom.deploy.messages import answer
from fedloom.deploy.messages.checks import check_profiles
from fedloom.deploy.messages.messages import Ready, Refusal, Request, TaskRequest, Welcome, decode_reply
from fedloom.hierarchy.edge import trained_part
from fedloom.hierarchy.group_statistics import with_task_seconds

MAX_REPLY = 2**31
"""Bytes of a reply, at most."""
SITE_REPLY, REGION_REPLY = 2**20, 2**24
"""Bytes of a reply apart from its numbers, at most: of a site (names, figures), and of a region (which names its members)."""
ROW = 16
"""Bytes that a row of a matrix takes beside its numbers, at most: its place and its scale."""
REGION = "region"
"""The tier of a region's profile."""


def largest_reply(request: Request, over_regions: bool) -> int:
    """Return how many bytes the reply to a request has at most: for a task, all numbers that could have changed.

    Args:
        request: what is asked.
        over_regions: whether regions are asked.
    """
    size = REGION_REPLY if over_regions else SITE_REPLY
    if not isinstance(request, TaskRequest):
        return size
    start = request.task.start
    for adapter in (start.train, *([start.control] if start.control else [])):
        for tensor in named_tensors(adapter).values():
            size += tensor.element_size() * tensor.numel() + ROW * (1 + sum(tensor.shape))
    return size


def parse_reply(
    body: bytes, tasks: Mapping[int, Task], now: float, over_regions: bool
) -> Welcome | Refusal | UpdateArrived | PartsReady:
    """Decode a reply; the answer to one of these tasks becomes an event. Raises Malformed.

    Args:
        body: the bytes that came.
        tasks: the outstanding tasks.
        now: seconds of the run.
        over_regions: whether the clients are regions, whose answers may lack layers and carry a report.
    """
    reply = decode_reply(body, MAX_REPLY, tasks)
    if isinstance(reply, Ready):
        if not is_summed(tasks[reply.task]):
            raise Malformed("it holds back an answer that is not to be summed")
        return PartsReady(reply.client, reply.task)
    if not isinstance(reply, tuple):
        return reply
    client, number, result = reply
    if not over_regions:
        return UpdateArrived(client, number, with_seconds(tasks[number], result, now))
    result, report = with_seconds(trained_part(tasks[number], result), result, now), answer.decode_report(body)
    if report is None:
        return EdgeReported(client, number, result)
    check_profiles(report.members)
    return EdgeReported(client, number, result, with_task_seconds(report.statistics, result.metrics), report.members)


def join_event(profile: Profile, members: tuple[Profile, ...], over_regions: bool) -> ClientJoined:
    """Return the event of a client that has joined: over regions one with these members, or a site as a group of its own."""
    if not over_regions:
        return ClientJoined(profile)
    return EdgeJoined(profile, members if profile.tier == REGION else (profile,))


def with_seconds(task: Task, result: Result, now: float) -> Result:
    """Add the seconds from sending to here; what was not training was spent on the links, in proportion to the bytes."""
    total = now - task.sent
    train = min(max(0.0, result.metrics.get("seconds_train", 0.0)), total)
    sizes = download_size(task.start).total, upload_size(task, result).total
    share = sizes[0] / sum(sizes) if sum(sizes) else 0.5
    return result.with_seconds(total, share * (total - train), train, (1 - share) * (total - train))
