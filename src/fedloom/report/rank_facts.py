"""Facts about rank heterogeneity: what clients of each rank receive of the model, what it costs in bytes, how accurate they are.

First the numbers, then the sentences on them, which claim no more than the log allows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import variance

import numpy as np

from fedloom.report.facts import (
    accuracy,
    baseline_name,
    clients_by_tier,
    is_deployed,
    label,
    nan_mean,
    ranks_of,
    total_of,
    version_noun,
)
from fedloom.report.line_table import Line, LineTable, Places
from fedloom.report.numbers import format_bytes, percent, plural, short, to_float
from fedloom.report.run_log import RunLog

MOST = 8
"""Groups that a reader can distinguish; with more, a tier is one group whatever its ranks."""
FEW = 5
"""Clients below which a difference of means is a hint at most."""
WAYS = ("down", "up")
CODECS = {
    "Exact": "float32, four bytes each",
    "Half": "float16, two bytes each",
    "HalfChange": "float16, two bytes each, and as differences up",
    "DeltaInt8": "float16 down, two bytes each, and as differences in int8 up, one byte each",
}
WHOLE = 0.9995
"""Shares from here on are shown as 100.0 %."""


@dataclass(frozen=True, slots=True)
class RankGroup:
    """Clients that are shown together: those of a tier at one rank, or a whole tier.

    Fields:
        name: tier and ranks in words.
        ranks: ranks of the group, sorted.
        tasks: task lines of its clients.
        clients: final score lines of its clients, lowest accuracy first.
    """

    name: str
    ranks: tuple[int, ...]
    tasks: LineTable
    clients: tuple[Line, ...]


def rank_groups(log: RunLog) -> list[RankGroup]:
    """Group the clients of a run, lowest rank first, then slowest tier first."""
    order, scores, (places, tiers, ranks) = list(clients_by_tier(log)), _scores_at_home(log), _tasks_at_home(log)
    used = _home_ranks(log)
    parts: set[tuple[str, tuple[int, ...]]] = {(tier, (rank,)) for tier, ranks_ in used.items() for rank in ranks_}
    if len(parts) > MOST:
        parts = {(tier, tuple(sorted(ranks_))) for tier, ranks_ in used.items()}

    def position(part: tuple[str, tuple[int, ...]]) -> tuple[int, int, str]:
        return part[1][0], order.index(part[0]) if part[0] in order else -1, part[0]

    groups = []
    for tier, own in sorted(parts, key=position):
        tasks = log.tasks.select((places == tiers.index(tier)) & np.isin(ranks, own) if tier in tiers else places < 0)
        clients = [line for home, line in scores if home == tier and line["rank"] in own]
        clients.sort(key=lambda line: (math.isnan(accuracy(line)), accuracy(line), str(line.get("client"))))
        name = rank_range(own) if is_deployed(log) else f"{label(tier, 18)}, {rank_range(own)}"
        groups.append(RankGroup(name, own, tasks, tuple(clients)))
    return groups


def _homes(log: RunLog) -> dict[str, str]:
    """Return the tier of each client."""
    return {client: tier for tier, members in clients_by_tier(log).items() for client in members}


def _scores_at_home(log: RunLog) -> list[tuple[str, Line]]:
    """Pair every client's final score with the tier that it belongs to."""
    home = _homes(log)
    scores = [line for line in log.clients if isinstance(line.get("rank"), int)]
    return [(home.get(str(line.get("client")), str(line.get("tier", "default"))), line) for line in scores]


def _tasks_at_home(log: RunLog) -> tuple[Places, list[str], Places]:
    """Return for each task the place of its client's tier among the tiers, these tiers, and its rank (-1: it has none)."""
    (places, clients), home = log.tasks.words("client"), _homes(log)
    tiers = [*dict.fromkeys([*home.values(), "default"])]
    place = {tier: k for k, tier in enumerate(tiers)}
    of_client = np.array([place[home.get(str(client), "default")] for client in clients], np.int64)
    return of_client[places], tiers, np.nan_to_num(log.tasks.numbers("rank"), nan=-1).astype(np.int64)


def _home_ranks(log: RunLog) -> dict[str, set[int]]:
    """Return by tier the ranks at which its clients trained or were scored."""
    places, tiers, ranks = _tasks_at_home(log)
    used = defaultdict[str, set[int]](set)
    for place, rank in _distinct_pairs(places, ranks)[0]:
        if rank >= 0:
            used[tiers[place]].add(rank)
    for tier, line in _scores_at_home(log):
        used[tier].add(int(line["rank"]))
    return used


def ranks_used(log: RunLog) -> list[int]:
    """Ranks at which a client trained or was scored, sorted."""
    return sorted(set[int]().union(*_home_ranks(log).values()))


def rank_range(ranks: Sequence[int]) -> str:
    """Name a range of ranks.

    >>> rank_range([2]), rank_range([2, 4, 8])
    ('rank 2', 'ranks 2 to 8')
    """
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"


def low_and_high_ranks(ranks: list[int]) -> tuple[list[int], list[int]]:
    """Split sorted ranks into low and high ones: the lowest and the highest, or the two halves where there are more than four."""
    count = 1 if len(ranks) <= 4 else len(ranks) // 2
    return ranks[:count], ranks[-count:]


def received_energy(log: RunLog) -> dict[int, list[tuple[int, float]]]:
    """Return, by rank, the versions that its tasks started from, with the mean share of the version's energy that they received."""
    tasks = log.tasks.select(~np.isnan(log.tasks.numbers("kept")))
    pairs, places = _distinct_pairs(*(tasks.numbers(name).astype(np.int64) for name in ("rank", "version")))
    means = np.bincount(places, tasks.numbers("kept")) / np.bincount(places)
    shares: dict[int, list[tuple[int, float]]] = {}
    for (rank, version), share in zip(pairs, means.tolist(), strict=True):
        shares.setdefault(rank, []).append((version, share))
    return shares


def _distinct_pairs(first: Places, second: Places) -> tuple[list[tuple[int, int]], Places]:
    """Return the pairs of numbers that stand at one place, each once and in order, and for each place that of its pair."""
    (one, ones), (other, others) = (np.unique(values, return_inverse=True) for values in (first, second))
    found, places = np.unique(ones * len(other) + others, return_inverse=True)
    pairs = (
        zip(one[found // len(other)].tolist(), other[found % len(other)].tolist(), strict=True) if len(found) else ()
    )
    return list(pairs), places


def tiers_at_rank(log: RunLog, rank: int) -> str:
    """Tiers in which this rank is used, in words; empty on real machines, which have none."""
    if is_deployed(log):
        return ""
    using = _home_ranks(log)
    return ", ".join(label(tier, 18) for tier in clients_by_tier(log) if rank in using[tier])


def mean_task_bytes(tasks: LineTable, way: str) -> dict[str, float]:
    """Mean bytes of a task in one direction ("down", "up") by kind: adapter, fold, head; `all` where that was not recorded."""
    sent = tasks if way == "down" else tasks.select(tasks.numbers("bytes_up") > 0)
    total, head = (nan_mean(sent.numbers(f"bytes_{way}{part}")) for part in ("", "_dense"))
    if math.isnan(total) or math.isnan(head):
        return {} if math.isnan(total) else {"all": total}
    fold = float(np.nan_to_num(sent.numbers("bytes_down_fold")).mean()) if way == "down" else 0.0
    return {"adapter": max(0.0, total - fold - head), "fold": fold, "head": head}


def received_sentence(log: RunLog) -> str:
    """Sentence on how much of the global model's energy each rank received last."""
    shares = received_energy(log)
    if not shares:
        later = (log.tasks.numbers("version") > 0).any() and log.tasks.has("kept")
        return "The server's own product is zero all the time: there was no energy to send." if later else ""
    if min(row[-1][1] for row in shares.values()) >= WHOLE:
        who = "A client of any rank" if len(shares) > 1 else f"A client of rank {next(iter(shares))}"
        folds = (log.tasks.numbers("bytes_down_fold") > 0).any()
        how = ", in part as a fold that is added to the frozen base" if folds else ""
        return f"{who} receives the whole of the global model{how}: nothing was cut off in the last tasks."
    ranks = list(shares) if len(shares) <= 4 else [min(shares), max(shares)]
    late = len({row[-1][0] for row in shares.values()}) > 1
    parts: list[str] = []
    for rank in ranks:
        version, share = shares[rank][-1]
        beside = ", ".join(
            text for text in (tiers_at_rank(log, rank), f"{version_noun(log)} {version}" if late else "") if text
        )
        got = percent(share) if parts else f"received {percent(share)} of the energy of the global model"
        parts.append(f"one of rank {rank}{f' ({beside})' if beside else ''} {got}")
    listed = f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]
    return f"In its last task a client{listed.removeprefix('one')}."


def traffic_sentence(log: RunLog) -> str:
    """Sentence on what a low rank saves in bytes, and how much of the traffic is head and fold."""
    total = sum(float(np.nan_to_num(log.tasks.numbers(f"bytes_{way}")).sum()) for way in WAYS)
    if not total > 0:
        return ""
    low, high = low_and_high_ranks(ranks_of(log.tasks))
    parts = [log.tasks.select(np.isin(log.tasks.numbers("rank"), ranks)) for ranks in (low, high)]
    loads = [[sum(mean_task_bytes(tasks, way).values()) for way in WAYS] for tasks in parts]
    both = all(up > 0 for _, up in loads)
    cheap, dear = (sum(costs) if both else costs[0] for costs in loads)
    text = f"A task at {rank_range(low)} moves {format_bytes(cheap)} {'down and up together' if both else 'down'}"
    if low != high and dear > 0:
        saved = 1 - cheap / dear
        text += f", {percent(abs(saved))} {'more' if saved < 0 else 'less'} than the {format_bytes(dear)} at {rank_range(high)}"
    head = sum(total_of(log.tasks, f"bytes_{way}_dense") for way in WAYS)
    if math.isnan(head):
        return f"{text}. How much of it is the head was not recorded."
    fold = float(np.nan_to_num(log.tasks.numbers("bytes_down_fold")).sum())
    folds = f", and {percent(fold / total)} is folds" if fold > 0 else ""
    return f"{text}. Of all traffic {percent(head / total)} is the head, the same at every rank{folds}."


def rounding_sentence(log: RunLog) -> str:
    """Sentence on how numbers were encoded, and what rounding took from answers: means over the versions."""
    run = log.manifest["run"]
    if "transfer" not in run:
        return ""
    codec = (run["transfer"] or {}).get("type", "Exact")
    if codec not in CODECS:
        return ""
    lost, of_change = (nan_mean(log.versions.numbers(name)) for name in ("rounding", "rounding_change"))
    text = f"Numbers travel as {CODECS[codec]}"
    if math.isnan(lost) or math.isnan(of_change):
        return f"{text}."
    shares = f"{short(100 * lost)}\u00a0% of its products, {short(100 * of_change)}\u00a0% of what the client changed in them"
    return f"{text}; rounding took from an answer {shares}."


def _of(lines: Sequence[Line], ranks: Sequence[int]) -> list[Line]:
    return [line for line in lines if line.get("rank") in ranks]


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of these values; NaN for fewer than two.

    >>> standard_error([0.5, 0.7])
    0.1
    """
    return round(math.sqrt(variance(values) / len(values)), 12) if len(values) > 1 else math.nan


def accuracy_by_rank_sentence(log: RunLog) -> str:
    """Sentence on whether clients of low rank are served worse than those of high rank, with the standard error of few clients."""
    scored = [line for line in log.clients if not math.isnan(accuracy(line))]
    if not scored:
        return ""
    low, high = low_and_high_ranks(sorted({int(line["rank"]) for line in scored}))
    if low == high:
        base, of = nan_mean(to_float(line.get("base_accuracy")) for line in scored), plural(len(scored), "client")
        beside = "" if math.isnan(base) else f"; {baseline_name(log)} would give {percent(base)}"
        return f"On held-out examples {of} of {rank_range(low)} reach {percent(nan_mean(map(accuracy, scored)))} on average{beside}."
    ours, theirs = ([accuracy(line) for line in _of(scored, ranks)] for ranks in (low, high))
    verb, how = ("reaches", "") if len(ours) == 1 else ("reach", " on average")
    gap, doubt = nan_mean(ours) - nan_mean(theirs), math.hypot(standard_error(ours), standard_error(theirs))
    return (
        f"On their held-out examples {plural(len(ours), 'client')} of {rank_range(low)} {verb} {percent(nan_mean(ours))}{how}"
        f", {plural(len(theirs), 'client')} of {rank_range(high)} {percent(nan_mean(theirs))}:"
        f" {_judged(gap, doubt, min(len(ours), len(theirs)))}{_gains(scored, low, high, baseline_name(log))}"
    )


def unscored_sentence(log: RunLog) -> str:
    """Sentence on the clients that gave no score, and why; of many clients some are named."""
    if not log.unscored:
        return ""
    listed = "; ".join(f"{label(line['client'])}: {label(line['reason'], 160)}" for line in log.unscored[:MOST])
    more = f"; and {len(log.unscored) - MOST} more" if len(log.unscored) > MOST else ""
    whole = plural(len(log.clients) + len(log.unscored), "client")
    return f"{len(log.unscored)} of {whole} gave no score ({listed}{more})."


def _judged(gap: float, doubt: float, fewest: int) -> str:
    points, way = f"{100 * abs(gap):.1f}", "apart" if abs(gap) < 5e-4 else "lower" if gap < 0 else "higher"
    verdict = "worse" if gap < 0 else "better"
    if math.isnan(doubt):
        return f"{points} points {way}. A single client tells nothing about its rank."
    text = f"{points} ± {100 * doubt:.1f} points {way} (standard error)."
    if abs(gap) <= 2 * doubt:
        return f"{text} That is less than two standard errors and may be chance."
    if fewest < FEW:
        return f"{text} With so few clients that is no more than a hint that low ranks are served {verdict}."
    return f"{text} That is more than two standard errors: clients of low rank are served {verdict}."


def _gains(scored: Sequence[Line], low: Sequence[int], high: Sequence[int], base: str) -> str:
    """Sentence on how far both are above the baseline, which differs between clients."""
    gains = [
        nan_mean(accuracy(line) - to_float(line.get("base_accuracy")) for line in _of(scored, ranks))
        for ranks in (low, high)
    ]
    if any(map(math.isnan, gains)):
        return ""
    ours, theirs = (f"{100 * abs(gain):.1f} points {'below' if gain < 0 else 'above'}" for gain in gains)
    return f" The first are {ours} what {base} would give, the second {theirs} it."
