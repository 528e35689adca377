"""(to be written)"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedloom.report import facts
from fedloom.report.facts import accuracy, label, mean
from fedloom.report.numbers import NONE, count, number, percent, seconds, short, size
from fedloom.report.run_log import Line, RunLog
from fedloom.report.tables import Grid

if TYPE_CHECKING:
    pass


def tiers(log: RunLog) -> Grid:
    """One row a tier: who is in it, how well it is served and what it pays; folds only where there are any."""
    who = ("Tier", "Clients", "Rank", f"Mean {facts.measure(log)}", "Worst client")
    folds = any(number(task.get("bytes_down_fold")) > 0 for task in log.tasks)
    traffic = (
        "Tasks",
        "Merged",
        "Seconds a task",
        "Up",
        "of it head",
        "Down",
        "of it head",
        *(["of it fold"] if folds else []),
    )
    ways = ("bytes_up", "bytes_up_dense", "bytes_down", "bytes_down_dense", *(["bytes_down_fold"] if folds else []))
    rows = (_tier(log, tier, set(who), ways) for tier, who in facts.tiers(log).items())
    return Grid(who + traffic, tuple(rows))


def _tier(log: RunLog, tier: str, members: set[str], ways: Sequence[str]) -> tuple[str, ...]:
    tasks = [task for task in log.tasks if task.get("client") in members]
    ends = [line for line in log.clients if line.get("client") in members]
    worst = min(ends, key=accuracy, default=None)
    ranks = sorted({int(line["rank"]) for line in (*tasks, *ends)})
    spent = [sum(map(number, task["seconds"].values())) for task in tasks if task.get("seconds")]
    return (
        label(tier),
        str(len(members)),
        ", ".join(map(str, ranks)) or NONE,
        percent(mean(map(accuracy, ends))),
        f"{percent(accuracy(worst))} ({label(worst['client'], 16)})" if worst else NONE,
        f"{len(tasks):,}",
        f"{sum(task.get('status') == 'merged' for task in tasks):,}",
        short(mean(spent)),
        *(size(sum(number(task.get(way)) for task in tasks)) for way in ways),
    )


def groups(log: RunLog) -> Grid:
    """One row a group: who is in it, how its edge worked, and its share of the weight that all reports had."""
    head = ("Group", "Clients", "Examples", "Tasks", "Merged", "Inner rounds", "Steps", "Rank", "Depth")
    head += ("Seconds inside", "on the link")  # type: ignore[assignment]
    merged = [line for line in log.edges if line.get("status") == "merged"]
    whole = sum(number(line.get("work")) for line in merged)
    rows = []
    for edge, members in log.manifest.get("groups", {}).items():
        asked, own = ([line for line in lines if line.get("edge") == edge] for lines in (log.edges, merged))
        means = [mean(number(line.get(key)) for line in own) for key in ("examples", "rounds", "steps", "rank")]
        inside, link = (mean(_seconds(line, parts) for line in own) for parts in (("train",), ("down", "up")))
        weight = sum(number(line["work"]) for line in own) / whole if whole else math.nan
        depths = sorted({str(line.get("depth") or "all") for line in own})
        figures = (*map(short, means[1:]), ", ".join(depths) or NONE, short(inside), short(link), percent(weight))
        clients = len(members) or max((int(number(line.get("members"))) for line in own), default=0)
        rows.append((label(edge), str(clients), count(means[0]), f"{len(asked):,}", f"{len(own):,}", *figures))
    return Grid((*head, "Weight"), tuple(rows))


def reasons(log: RunLog) -> Grid:
    """Why each group got its last task as it was, where a rule said so."""
    why = {str(line["edge"]): str(line["why"]) for line in log.edges if line.get("why")}
    return Grid(("Group", "Why its last task was as it was"), tuple((label(edge), why[edge]) for edge in sorted(why)))


def _seconds(line: Line, parts: Sequence[str]) -> float:
    return sum(number(line.get("seconds", {}).get(part)) for part in parts)


NAMED = 6
"""Moves that a row tells by name."""


def regroupings(log: RunLog) -> Grid:
    """One row a regrouping; of its moves those count that were done before the next one."""
    rows = []
    for k, line in enumerate(log.regroups):
        wanted, done = line["moves"], _done(log, k)
        moves = [tuple(label(name, 16) for name in _move(one)) for one in wanted[:NAMED]]
        told = [f"{client}: {edge} → {to}" for client, edge, to in moves]
        more = f", {len(wanted) - NAMED} more" if len(wanted) > NAMED else ""
        limit = percent(number(line["threshold"]))
        why = f"times had drifted by {percent(number(line['drift']))}, more than {limit}"
        who = ", ".join(told) + more if wanted else "the present groups are still the best"
        when = f"{seconds(number(line['time']))}, version {line['version']}"
        rows.append((when, f"{done} of {len(wanted)}", why, who))
    return Grid(("When", "Moved", "Why", "Who"), tuple(rows))


def _done(log: RunLog, k: int) -> int:
    """Moves between this regrouping and the next."""
    since, wanted = number(log.regroups[k]["time"]), [_move(line) for line in log.regroups[k]["moves"]]
    until = number(log.regroups[k + 1]["time"]) if k + 1 < len(log.regroups) else math.inf
    return sum(since <= number(line["time"]) <= until and _move(line) in wanted for line in log.moves)


def _move(line: Line) -> tuple[str, str, str]:
    return line["client"], line["edge"], line["to"]


def table(log: RunLog) -> Grid:
    """Every client that ever was there, by name; a region's score is the mean of its sites'."""
    head = ("Site", "Examples", "GFLOP/s", "Memory", "Rank", f"{facts.measure(log).capitalize()}", "Tasks", "Merged")
    known = log.manifest["clients"]
    rows = tuple(_row(log, client, known[client]) for client in sorted(known))
    return Grid((*head, "Seconds a task", "Up", "Down"), rows)


def _row(log: RunLog, client: str, known: Line) -> tuple[str, ...]:
    tasks = [task for task in log.tasks if task.get("client") == client]
    ends = [line for line in log.clients if line.get("edge", line.get("client")) == client]
    ranks = sorted({int(line["rank"]) for line in (*tasks, *ends)})
    spent = [sum(map(number, task["seconds"].values())) for task in tasks if task.get("seconds")]
    return (
        label(client),
        count(number(known.get("examples"))),
        short(number(known.get("flops")) / 1e9),
        size(number(known.get("memory"))),
        ", ".join(map(str, ranks)) or NONE,
        percent(mean(map(accuracy, ends))),
        count(float(len(tasks))),
        count(float(sum(task.get("status") == "merged" for task in tasks))),
        short(mean(spent)),
        *(size(sum(number(task.get(way)) for task in tasks)) for way in ("bytes_up", "bytes_down")),
    )
