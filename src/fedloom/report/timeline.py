"""Facts about time: how slots were used, how stale updates were, who took part; what an older log lacks is left out.

A slot is one of the tasks that a schedule lets be in flight at once. It waits while it is empty although a client is idle.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedloom.report.facts import clients_by_tier, elapsed_seconds, label, latest_value, nan_mean, was_merged
from fedloom.report.line_table import LineTable
from fedloom.report.numbers import percent, plural, short, to_float
from fedloom.report.run_log import RunLog


@dataclass(frozen=True, slots=True)
class Interval:
    """Mean numbers of slots between two moments of a run.

    Fields:
        begin, end: the moments (seconds).
        working: slots with a task in flight.
        waiting: slots that were empty although a client was idle.
        held: those of the waiting ones that a client who had answered was held for, until the next version.
    """

    begin: float
    end: float
    working: float
    waiting: float
    held: float


@dataclass(frozen=True, slots=True)
class ClientShare:
    """Shares of one client in a run.

    Fields:
        client: its name.
        tier: its tier.
        updates: share of all merged updates.
        examples: share of all examples.
        idle: share of the run's time in which it had no task.
    """

    client: str
    tier: str
    updates: float
    examples: float
    idle: float


def records_slot_use(log: RunLog) -> bool:
    """Whether the log records how slots were used."""
    return bool(log.versions) and "waiting_seconds" in log.versions[-1]


def waiting_share(log: RunLog) -> float:
    """Share of waiting in the time that slots could have worked."""
    lost, used = (
        (latest_value(log, f"{name}_seconds") for name in ("waiting", "working"))
        if records_slot_use(log)
        else (math.nan, math.nan)
    )
    return lost / (lost + used) if lost + used > 0 else math.nan


def intervals(log: RunLog, most: int) -> list[Interval]:
    """Cut the run at versions into about `most` intervals; the means over each are exact, since the log holds integrals over time."""
    step = max(1, -(-len(log.versions) // most))
    ends = log.versions[step - 1 :: step]
    cut, before = [], dict.fromkeys(("time", "working_seconds", "waiting_seconds", "held_seconds"), 0.0)
    for line in [*ends, *log.versions[-1:]]:
        now = {key: to_float(line.get(key)) for key in before}
        span = now["time"] - before["time"]
        if span > 0:
            means = ((now[key] - before[key]) / span for key in list(before)[1:])
            cut.append(Interval(before["time"], now["time"], *means))
            before = now
    return cut


def staleness_counts(log: RunLog) -> Counter[int]:
    """Number of merged updates by staleness: versions made since the one that an update was trained from."""
    recorded = log.tasks.numbers("staleness")
    found, counts = np.unique(recorded[~np.isnan(recorded)], return_counts=True)
    return Counter(dict(zip(found.astype(int).tolist(), counts.tolist(), strict=True)))


def mean_staleness(log: RunLog) -> float:
    """Mean staleness of the merged updates, in versions."""
    counts = staleness_counts(log)
    return sum(k * n for k, n in counts.items()) / counts.total() if counts else math.nan


def staleness_histogram(log: RunLog, most: int) -> tuple[list[int], list[float]]:
    """Edges of at most `most` + 1 bins of equal width, and the share of the merged updates in each."""
    counts = staleness_counts(log)
    width, bins = 1 + max(counts, default=0) // most, Counter[int]()
    for staleness, count in counts.items():
        bins[staleness // width] += count
    lows = range(0, max(counts, default=0) + 1, width)
    return [*lows, lows[-1] + width], [bins[k] / max(1, counts.total()) for k in range(len(lows))]


def client_shares(log: RunLog) -> list[ClientShare]:
    """Shares of every client, largest share of the updates first."""
    profiles, end = log.manifest["clients"], elapsed_seconds(log)
    updates = log.tasks.select(was_merged(log.tasks)).counts("client")
    spans = np.fmax(np.minimum(log.tasks.numbers("arrived"), end) - log.tasks.numbers("sent"), 0.0)
    places, names = log.tasks.words("client")
    busy = dict(zip(names, np.bincount(places, spans, len(names)).tolist(), strict=True))
    home = {client: tier for tier, members in clients_by_tier(log).items() for client in members}
    every, held = updates.total(), sum(to_float(profiles[client].get("examples", 0)) for client in home)
    rows = [
        ClientShare(
            client,
            tier,
            updates[client] / every if every else math.nan,
            to_float(profiles[client].get("examples", 0)) / held if held > 0 else math.nan,
            1 - busy.get(client, 0.0) / end if end > 0 else math.nan,
        )
        for client, tier in home.items()
    ]
    return sorted(rows, key=lambda row: (-row.updates, row.client))


def tier_shares(log: RunLog, what: str) -> dict[str, float]:
    """Share of each tier in the "clients", "examples" or "updates" of the run, slowest tier first."""
    rows = client_shares(log)
    members = {tier: [row for row in rows if row.tier == tier] for tier in clients_by_tier(log)}
    if what == "clients":
        return {tier: len(part) / (len(rows) or 1) for tier, part in members.items()}
    return {tier: sum(getattr(row, what) for row in part) for tier, part in members.items()}


def waiting_sentence(log: RunLog) -> str:
    """Sentence on waiting; empty where it was not recorded."""
    share, seconds, held = waiting_share(log), latest_value(log, "waiting_seconds"), latest_value(log, "held_seconds")
    if math.isnan(share):
        return ""
    if not seconds > 0:
        return "No slot waited: whenever one was free, a client started."
    why = percent(held / seconds)
    return (
        f"Slots waited for {percent(share)} of the time that they could have worked, {short(seconds)} seconds in all; {why} of it"
        " for clients who had answered and were held for the next version."
    )


def staleness_sentence(log: RunLog) -> str:
    """Sentence on staleness; empty where no update was merged."""
    counts = staleness_counts(log)
    if not counts:
        return ""
    if max(counts) == 0:
        return "Every update was merged into the version that followed the one it was trained from: nothing was stale."
    middle, high = short(mean_staleness(log)), plural(max(counts), "version")
    return f"An update was on average {middle} versions old when it was merged, the oldest {high}."


def participation_sentence(rows: Sequence[ClientShare], log: RunLog) -> str:
    """Sentence on participation: how many clients never had an update merged, and how far tiers are from an equal share."""
    absent, equal = sum(row.updates == 0 for row in rows), 1 / len(rows)
    text = f"{plural(absent, 'client')} of {len(rows):,} never had an update merged. " if absent else ""
    ratios = {tier: nan_mean(row.updates for row in rows if row.tier == tier) / equal for tier in clients_by_tier(log)}
    if len(rows) < 2:
        return "There is one client."
    if len(ratios) < 2:
        times = rows[0].updates / equal
        return f"{text}{label(rows[0].client)} has the most updates, {short(times)} times an equal share."
    listed = ", ".join(f"{label(tier, 18)} {short(ratio)}" for tier, ratio in ratios.items())
    return f"{text}Updates of a client as a multiple of an equal share, by tier: {listed}."


def last_version_at_each_time(log: RunLog) -> LineTable:
    """Version lines, one a moment: the last of the versions that were made at one time."""
    times = log.versions.numbers("time")
    return log.versions.select(np.append(times[1:], np.nan) != times)
