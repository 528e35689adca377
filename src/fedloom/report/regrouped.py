"""Groups that were made again in the course of a run: when, how many clients moved, why."""

from __future__ import annotations

import math

from fedloom.report.facts import label
from fedloom.report.read import Line, RunLog
from fedloom.report.tables import Grid
from fedloom.report.words import number, percent, seconds

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
