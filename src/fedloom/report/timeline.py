"""How the federation's time was used and who took part, from the lines of the log; what an older log lacks is left out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fedloom.report.facts import elapsed, label, last, mean, tiers
from fedloom.report.numbers import number, percent, plural, short
from fedloom.report.run_log import Line, RunLog


@dataclass(frozen=True, slots=True)
class Stretch:
    """Mean numbers of places in a stretch of virtual time: where a client worked, and empty although a client was idle.

    `held` of those that waited were kept for the client who had answered, until the next version.
    """

    begin: float
    end: float
    working: float
    waiting: float
    held: float


@dataclass(frozen=True, slots=True)
class Part:
    """A client's part in the run: its shares of the merged updates and of all examples, and of its time without a task."""

    client: str
    tier: str
    updates: float
    examples: float
    idle: float


def timed(log: RunLog) -> bool:
    """Whether the log tells how places were used."""
    return bool(log.versions) and "waiting_seconds" in log.versions[-1]


def waiting(log: RunLog) -> float:
    """The share of the time that places could have worked in which they waited."""
    lost, used = (
        (last(log, f"{name}_seconds") for name in ("waiting", "working")) if timed(log) else (math.nan, math.nan)
    )
    return lost / (lost + used) if lost + used > 0 else math.nan


def stretches(log: RunLog, most: int) -> list[Stretch]:
    """The run cut at versions into at most `most` stretches: means over each are exact, since the log's integrals are."""
    ends = [line for k, line in enumerate(log.versions) if (k + 1) % -(-len(log.versions) // most) == 0]
    found, before = [], dict.fromkeys(("time", "working_seconds", "waiting_seconds", "held_seconds"), 0.0)
    for line in [*ends, *log.versions[-1:]]:
        now = {key: number(line.get(key)) for key in before}
        span = now["time"] - before["time"]
        if span > 0:
            means = ((now[key] - before[key]) / span for key in list(before)[1:])
            found.append(Stretch(before["time"], now["time"], *means))
            before = now
    return found


def staleness(log: RunLog) -> Counter[int]:
    """The merged updates by the versions made since the one that they were trained from."""
    return Counter(int(task["staleness"]) for task in log.tasks if "staleness" in task)


def mean_staleness(log: RunLog) -> float:
    """Versions, over the merged updates."""
    counts = staleness(log)
    return sum(k * n for k, n in counts.items()) / counts.total() if counts else math.nan


def parts(log: RunLog) -> list[Part]:
    """Every client's part, largest share of the updates first."""
    known, end = log.manifest["clients"], elapsed(log)
    merged = Counter(str(task["client"]) for task in log.tasks if task.get("status") == "merged")
    busy: Counter[str] = Counter()
    for task in log.tasks:
        span = min(number(task.get("arrived")), end) - number(task.get("sent"))
        busy[str(task["client"])] += span if span > 0 else 0.0  # type: ignore[assignment]
    home = {client: tier for tier, members in tiers(log).items() for client in members}
    every, held = sum(merged.values()), sum(number(known[client].get("examples", 0)) for client in home)
    rows = [
        Part(
            client,
            tier,
            merged[client] / every if every else math.nan,
            number(known[client].get("examples", 0)) / held if held > 0 else math.nan,
            1 - busy[client] / end if end > 0 else math.nan,
        )
        for client, tier in home.items()
    ]
    return sorted(rows, key=lambda row: (-row.updates, row.client))


def waited(log: RunLog) -> str:
    """Waiting in words."""
    share, seconds, held = waiting(log), last(log, "waiting_seconds"), last(log, "held_seconds")
    if math.isnan(share):
        return ""
    if not seconds > 0:
        return "No place waited: whenever one was free, a client started."
    why = percent(held / seconds)
    return (
        f"Places waited for {percent(share)} of the time that they could have worked, {short(seconds)} seconds in all; {why} of it"
        " for clients who had answered and were held for the next version."
    )


def stale(log: RunLog) -> str:
    """Staleness in words."""
    counts = staleness(log)
    if not counts:
        return ""
    if max(counts) == 0:
        return "Every update was merged into the version that followed the one it was trained from: nothing was stale."
    middle, high = short(mean_staleness(log)), plural(max(counts), "version")
    return f"An update was on average {middle} versions old when it was merged, the oldest {high}."


def took_part(rows: Sequence[Part], log: RunLog) -> str:
    """Participation in words: who never came, and how far tiers are from their part of the clients."""
    absent, equal = sum(row.updates == 0 for row in rows), 1 / len(rows)
    text = f"{plural(absent, 'client')} of {len(rows):,} never had an update merged. " if absent else ""
    ratios = {tier: mean(row.updates for row in rows if row.tier == tier) / equal for tier in tiers(log)}
    if len(rows) < 2:
        return "There is one client."
    if len(ratios) < 2:
        times = rows[0].updates / equal
        return f"{text}{label(rows[0].client)} has the most updates, {short(times)} times an equal share."
    told = ", ".join(f"{label(tier, 18)} {short(ratio)}" for tier, ratio in ratios.items())
    return f"{text}Updates of a client as a multiple of an equal share, by tier: {told}."


def ends(log: RunLog) -> tuple[Line, ...]:
    """Version lines, one a moment: the last of those that were made at one time."""
    later = (*log.versions[1:], {"time": None})
    return tuple(line for line, after in zip(log.versions, later, strict=True) if line.get("time") != after.get("time"))
