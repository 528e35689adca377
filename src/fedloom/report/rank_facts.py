"""What a client of each rank is given, what it pays for it and how it is served: the numbers and what they say in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import variance

from fedloom.report.facts import accuracy, baseline, deployed, label, mean, noun, tiers
from fedloom.report.numbers import number, percent, plural, short, size
from fedloom.report.run_log import Line, RunLog

MOST = 8
"""Groups that can still be told apart; with more, a tier is one group whatever its ranks."""
FEW = 5
"""Clients below which a difference of means is a hint at most."""
WAYS = ("down", "up")
CODECS = {
    "Exact": "float32, four bytes each",
    "Half": "float16, two bytes each",
    "DeltaInt8": "float16 down, two bytes each, and as differences in int8 up, one byte each",
}
WHOLE = 0.9995
"""Shares from here on are shown as 100.0 %."""


@dataclass(frozen=True, slots=True)
class Group:
    """Clients shown together: those of a tier at one rank, or a whole tier."""

    name: str
    ranks: tuple[int, ...]
    tasks: tuple[Line, ...]
    clients: tuple[Line, ...]


def groups(log: RunLog) -> list[Group]:
    """Who is shown together, lowest rank first, then slowest tier first."""
    order, rows = list(tiers(log)), _at_home(log)
    parts: set[tuple[str, tuple[int, ...]]] = {(tier, (int(line["rank"]),)) for tier, line in rows}
    if len(parts) > MOST:
        held = {tier: sorted({int(line["rank"]) for home, line in rows if home == tier}) for tier, _ in parts}
        parts = {(tier, tuple(ranks)) for tier, ranks in held.items()}

    def place(part: tuple[str, tuple[int, ...]]) -> tuple[int, int, str]:
        return part[1][0], order.index(part[0]) if part[0] in order else -1, part[0]

    found = []
    for tier, ranks in sorted(parts, key=place):
        own = [line for home, line in rows if home == tier and line["rank"] in ranks]
        tasks, clients = ([line for line in own if line["kind"] == kind] for kind in ("task", "client"))
        clients.sort(key=lambda line: (math.isnan(accuracy(line)), accuracy(line), str(line.get("client"))))
        name = span(ranks) if deployed(log) else f"{label(tier, 18)}, {span(ranks)}"
        found.append(Group(name, ranks, tuple(tasks), tuple(clients)))
    return found


def _at_home(log: RunLog) -> list[tuple[str, Line]]:
    """Every task and every client's final score, with the tier that it belongs to."""
    home = {client: tier for tier, members in tiers(log).items() for client in members}
    lines = [line for line in (*log.tasks, *log.clients) if isinstance(line.get("rank"), int)]
    return [(home.get(str(line.get("client")), str(line.get("tier", "default"))), line) for line in lines]


def used(log: RunLog) -> list[int]:
    """The ranks at which somebody trained or was scored."""
    return sorted({int(line["rank"]) for _, line in _at_home(log)})


def span(ranks: Sequence[int]) -> str:
    """
    >>> span([2]), span([2, 4, 8])
    ('rank 2', 'ranks 2 to 8')
    """
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"


def ends(lines: Sequence[Line]) -> tuple[list[int], list[int]]:
    """The low ranks and the high ones: the lowest and the highest, or the two halves where there are more than four."""
    ranks = sorted({int(line["rank"]) for line in lines})
    count = 1 if len(ranks) <= 4 else len(ranks) // 2
    return ranks[:count], ranks[-count:]


def kept(log: RunLog) -> dict[int, list[tuple[int, float]]]:
    """For each rank the versions handed out to it, with the share of their energy in what was handed out."""
    found: dict[int, dict[int, list[float]]] = {}
    for task in log.tasks:
        if not math.isnan(number(task.get("kept"))):
            found.setdefault(int(task["rank"]), {}).setdefault(int(task["version"]), []).append(number(task["kept"]))
    return {rank: [(v, mean(shares)) for v, shares in sorted(found[rank].items())] for rank in sorted(found)}


def at_rank(log: RunLog, rank: int) -> str:
    """The tiers in which this rank is used; real machines have none."""
    if deployed(log):
        return ""
    found = {tier for tier, line in _at_home(log) if line["rank"] == rank}
    return ", ".join(label(tier, 18) for tier in tiers(log) if tier in found)


def load(tasks: Sequence[Line], way: str) -> dict[str, float]:
    """Mean bytes of a task in one direction by what they are: adapter, fold, head; `all` where that was not recorded."""
    sent = [task for task in tasks if way == "down" or number(task.get("bytes_up")) > 0]
    total, head = (mean(number(task.get(f"bytes_{way}{part}")) for task in sent) for part in ("", "_dense"))
    if math.isnan(total) or math.isnan(head):
        return {} if math.isnan(total) else {"all": total}
    fold = mean(number(task.get("bytes_down_fold", 0)) for task in sent) if way == "down" else 0.0
    return {"adapter": max(0.0, total - fold - head), "fold": fold, "head": head}


def received(log: RunLog) -> str:
    """How much of the global model's energy each rank was given last."""
    shares = kept(log)
    if not shares:
        later = [task for task in log.tasks if number(task.get("version")) > 0 and "kept" in task]
        told = "The server's own product is zero all the time: there was no energy to hand out."
        return told if later else ""
    if min(row[-1][1] for row in shares.values()) >= WHOLE:
        who = "A client of any rank" if len(shares) > 1 else f"A client of rank {next(iter(shares))}"
        folds = any(number(task.get("bytes_down_fold")) > 0 for task in log.tasks)
        how = ", in part as a fold that is added to the frozen base" if folds else ""
        return f"{who} receives the whole of the global model{how}: nothing was cut off in the last tasks."
    ranks = list(shares) if len(shares) <= 4 else [min(shares), max(shares)]
    late = len({row[-1][0] for row in shares.values()}) > 1
    parts: list[str] = []
    for rank in ranks:
        version, share = shares[rank][-1]
        beside = ", ".join(text for text in (at_rank(log, rank), f"{noun(log)} {version}" if late else "") if text)
        got = percent(share) if parts else f"received {percent(share)} of the energy of the global model"
        parts.append(f"one of rank {rank}{f' ({beside})' if beside else ''} {got}")
    listed = f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]
    return f"In its last task a client{listed.removeprefix('one')}."


def paid(log: RunLog) -> str:
    """What a low rank saves in bytes, and how much of the traffic is head and fold."""
    total = sum(number(task.get(f"bytes_{way}", 0)) for task in log.tasks for way in WAYS)
    if not total > 0:
        return ""
    low, high = ends(log.tasks)
    loads = [[sum(load(_of(log.tasks, ranks), way).values()) for way in WAYS] for ranks in (low, high)]
    both = all(up > 0 for _, up in loads)
    cheap, dear = (sum(costs) if both else costs[0] for costs in loads)
    text = f"A task at {span(low)} moves {size(cheap)} {'down and up together' if both else 'down'}"
    if low != high and dear > 0:
        saved = 1 - cheap / dear
        text += f", {percent(abs(saved))} {'more' if saved < 0 else 'less'} than the {size(dear)} at {span(high)}"
    head = sum(number(task.get(f"bytes_{way}_dense")) for task in log.tasks for way in WAYS)
    if math.isnan(head):
        return f"{text}. How much of it is the head was not recorded."
    fold = sum(number(task.get("bytes_down_fold", 0)) for task in log.tasks)
    folds = f", and {percent(fold / total)} is folds" if fold > 0 else ""
    return f"{text}. Of all traffic {percent(head / total)} is the head, the same at every rank{folds}."


def rounded(log: RunLog) -> str:
    """How numbers travelled, and what that cost the answers: means over the rounds."""
    run = log.manifest["run"]
    if "transfer" not in run:
        return ""
    codec = (run["transfer"] or {}).get("type", "Exact")
    if codec not in CODECS:
        return ""
    lost, of_change = (
        mean(number(line.get(name)) for line in log.versions) for name in ("rounding", "rounding_change")
    )
    text = f"Numbers travel as {CODECS[codec]}"
    if math.isnan(lost) or math.isnan(of_change):
        return f"{text}."
    shares = f"{short(100 * lost)}\u00a0% of its products, {short(100 * of_change)}\u00a0% of what the client changed in them"
    return f"{text}; rounding took from an answer {shares}."


def _of(lines: Sequence[Line], ranks: Sequence[int]) -> list[Line]:
    return [line for line in lines if line.get("rank") in ranks]


def error(values: Sequence[float]) -> float:
    """Standard error of the mean of these clients; unknown for fewer than two.

    >>> error([0.5, 0.7])
    0.1
    """
    return round(math.sqrt(variance(values) / len(values)), 12) if len(values) > 1 else math.nan


def served(log: RunLog) -> str:
    """Whether clients of low rank are served worse than those of high rank, with the doubt that few clients leave."""
    known = [line for line in log.clients if not math.isnan(accuracy(line))]
    if not known:
        return ""
    low, high = ends(known)
    if low == high:
        base, of = mean(number(line.get("base_accuracy")) for line in known), plural(len(known), "client")
        beside = "" if math.isnan(base) else f"; {baseline(log)} would give {percent(base)}"
        return (
            f"On held-out examples {of} of {span(low)} reach {percent(mean(map(accuracy, known)))} on average{beside}."
        )
    ours, theirs = ([accuracy(line) for line in _of(known, ranks)] for ranks in (low, high))
    verb, how = ("reaches", "") if len(ours) == 1 else ("reach", " on average")
    gap, doubt = mean(ours) - mean(theirs), math.hypot(error(ours), error(theirs))
    return (
        f"On their held-out examples {plural(len(ours), 'client')} of {span(low)} {verb} {percent(mean(ours))}{how}"
        f", {plural(len(theirs), 'client')} of {span(high)} {percent(mean(theirs))}:"
        f" {_judged(gap, doubt, min(len(ours), len(theirs)))}{_gains(known, low, high, baseline(log))}"
    )


def missing(log: RunLog) -> str:
    """Who gave no score, and why; of many clients some."""
    if not log.unscored:
        return ""
    told = "; ".join(f"{label(line['client'])}: {label(line['reason'], 160)}" for line in log.unscored[:MOST])
    more = f"; and {len(log.unscored) - MOST} more" if len(log.unscored) > MOST else ""
    whole = plural(len(log.clients) + len(log.unscored), "client")
    return f"{len(log.unscored)} of {whole} gave no score ({told}{more})."


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


def _gains(known: Sequence[Line], low: Sequence[int], high: Sequence[int], base: str) -> str:
    """How far both are above what needs no training, which clients differ in."""
    gains = [
        mean(accuracy(line) - number(line.get("base_accuracy")) for line in _of(known, ranks)) for ranks in (low, high)
    ]
    if any(map(math.isnan, gains)):
        return ""
    ours, theirs = (f"{100 * abs(gain):.1f} points {'below' if gain < 0 else 'above'}" for gain in gains)
    return f" The first are {ours} what {base} would give, the second {theirs} it."
