"""The sites of a run on real machines, one row each: what they are, what they did, how the model does there."""

from __future__ import annotations

from fedloom.report import facts
from fedloom.report.facts import accuracy, label, mean
from fedloom.report.read import Line, RunLog
from fedloom.report.tables import Grid
from fedloom.report.words import NONE, count, number, percent, short, size


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
