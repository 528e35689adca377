"""The tables of a report as plain rows of text, shown by the page and by the terminal alike."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedloom.report import facts, timeline
from fedloom.report.facts import accuracy, label
from fedloom.report.numbers import NONE, count, number, percent, plural, seconds, short, size
from fedloom.report.run_log import Line, RunLog

if TYPE_CHECKING:
    import rich.table


QUOTED = 800
"""Characters of a sample that are shown."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A table: its heads and its rows, as texts."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def runs(logs: Sequence[RunLog]) -> Grid:
    """One row a run: what it reached, what it cost, and what the accuracy that all of them reached cost each.

    A column that says the same of all, as it should (finished, one seed, nothing stale) or nothing at all, is left out.
    """
    scored = [facts.best(log) for log in logs if log.scores]
    target = min(scored) if len(scored) > 1 else float("nan")
    shared = (f"Time to {percent(target)}", f"Sent up to {percent(target)}") if len(scored) > 1 else ()
    rows = [
        (name, *_figures(log), *(_price(log, target) if shared else ()))
        for name, log in zip(facts.names(logs), logs, strict=True)
    ]
    head = ("Run", "Status", "Seed", f"{facts.noun(*logs).capitalize()}s", facts.measure(*logs).capitalize(), "Best")
    head += ("Perplexity", "Worst client")  # type: ignore[assignment]
    head += ("Time", "Uploads", "Waiting", "Staleness", "Up", "Not merged", *shared)  # type: ignore[assignment]
    same = {"Status": "finished", "Seed": rows[0][2], "Staleness": "0"}
    kept = [k for k, name in enumerate(head) if {row[k] for row in rows} - {same.get(name, NONE), NONE}]
    return Grid(tuple(head[k] for k in kept), tuple(tuple(row[k] for k in kept) for row in rows))


def _figures(log: RunLog) -> tuple[str, ...]:
    return (
        str(log.manifest["status"]),
        str(log.manifest["seed"]),
        str(facts.rounds(log)),
        percent(accuracy(facts.final(log))),
        percent(facts.best(log)),
        short(facts.perplexity(facts.final(log))),
        percent(accuracy(facts.worst(log))),
        seconds(facts.elapsed(log)),
        count(facts.last(log, "uploads")),
        percent(timeline.waiting(log)),
        short(timeline.mean_staleness(log)),
        size(facts.last(log, "bytes_up")),
        str(sum(task.get("status") != "merged" for task in log.tasks)),
    )


def _price(log: RunLog, target: float) -> tuple[str, str]:
    score = facts.first_reaching(log, target)
    if score is None:
        return NONE, NONE
    return seconds(number(score.get("time"))), size(facts.at_version(log, score.get("version"), "bytes_up"))


def key_figures(log: RunLog) -> tuple[tuple[str, str, str], ...]:
    """What, how much, and what to hold it against."""
    score, worst = facts.final(log), facts.worst(log)
    merged = sum(task.get("status") == "merged" for task in log.tasks)
    unmerged = Counter(str(task.get("status")) for task in log.tasks if task.get("status") != "merged")
    spectra = facts.spectra(log)
    bases = [f"{label(name)} {percent(number(value))}" for name, value in log.manifest["baselines"].items()]
    chance = f"± {100 * facts.margin(score):.1f} points (95 %)" if score else "not measured"
    who = facts.whose(log, worst) if worst else "not measured"
    energy = spectra[-1]["energy"] if spectra else []
    told = any(line.get("energy") is not None for line in log.versions)
    none = "the server's product is zero" if told else "not measured" if log.versions else "no merge yet"
    rank = (f"{facts.effective_rank(energy):.1f}", f"of {len(energy)} directions") if energy else (NONE, none)
    losses = ", ".join(f"{count} {status}" for status, count in sorted(unmerged.items()))
    return (
        (f"Test {facts.measure(log)}", percent(accuracy(score)), chance),
        ("Before training", percent(accuracy(facts.first(log))), "; ".join(bases)),
        *(_written(log) if facts.writes(log) else ()),
        ("Worst client", percent(accuracy(worst)), who),
        (f"{facts.noun(log).capitalize()}s", f"{facts.rounds(log):,}", facts.took(log, facts.elapsed(log))),
        ("Sent up", *_traffic(log, "bytes_up")),
        ("Sent down", *_traffic(log, "bytes_down")),
        ("Tasks merged", f"{merged:,} of {len(log.tasks):,}", losses or "none lost"),
        ("Effective rank", *rank),
        *(_pace(log) if timeline.timed(log) else ()),
    )


def _written(log: RunLog) -> tuple[tuple[str, str, str], ...]:
    """Of a model that writes."""
    before, told = facts.perplexity(facts.first(log)), log.written or {}
    rows = [("Test perplexity", short(facts.perplexity(facts.final(log))), f"{short(before)} before training")]
    for name, key in (("Exact answers", "exact_match"), ("ROUGE-L", "rouge_l")) if told else ():
        share, base = (percent(number(told.get(f"{when}{key}"))) for when in ("", "base_"))
        rows.append((name, share, f"{base} before training; {plural(int(told.get('examples', 0)), 'answer')}"))
    return tuple(rows)


def samples(log: RunLog) -> Grid:
    """Requests, with the reference answer and what the model wrote before and after training."""
    rows = (
        (
            _quoted("\n\n".join(filter(None, (line.get("request"), line.get("context"))))),
            *(_quoted(line.get(key)) for key in ("reference", "before", "after")),
        )
        for line in log.samples
    )
    return Grid(("Request", "Reference", "Before", "After"), tuple(rows))


def _quoted(text: object) -> str:
    """A text of the data or the model, of several lines, cut to a length that a table can hold."""
    return "\n".join(label(line, QUOTED) for line in str(text or "").splitlines())[:QUOTED] or NONE


def _pace(log: RunLog) -> tuple[tuple[str, str, str], ...]:
    uploads, lost = facts.last(log, "uploads"), facts.last(log, "waiting_seconds")
    oldest = max(timeline.staleness(log), default=0)
    rows = timeline.parts(log)
    most, absent = (len(rows) * rows[0].updates, sum(row.updates == 0 for row in rows)) if rows else (math.nan, 0)
    hour = 3600 * uploads / facts.elapsed(log) if facts.elapsed(log) > 0 else math.nan
    return (
        ("Uploads", count(uploads), f"{short(hour)} in {'an' if facts.deployed(log) else 'a virtual'} hour"),
        ("Waiting", percent(timeline.waiting(log)), f"of the places' time, {short(lost)} seconds"),
        ("Staleness", short(timeline.mean_staleness(log)), f"versions on average, at most {oldest:,}"),
        ("Busiest client", f"{short(most)} ×", f"an equal share of the updates; {absent:,} clients had none"),
    )


def _traffic(log: RunLog, way: str) -> tuple[str, str]:
    total, dense = facts.last(log, way), facts.last(log, f"{way}_dense")
    fold = number(log.versions[-1].get(f"{way}_fold", 0)) if log.versions else 0.0
    folds = f"folds {size(fold)}, " if fold > 0 else ""
    split = (
        f"adapters {size(total - dense - fold)}, {folds}heads {size(dense)}"
        if log.versions
        else "before the first merge"
    )
    return size(total), split


def settings(log: RunLog) -> Grid:
    """Every setting of the run under its dotted key."""
    return Grid(("Key", "Value"), tuple(_flat("", facts.chosen(log))))


def differences(logs: Sequence[RunLog]) -> Grid:
    """The settings in which the runs differ, and only those."""
    flat = [{"seed": str(log.manifest["seed"])} | dict(_flat("", log.manifest["run"])) for log in logs]
    keys = dict.fromkeys(key for run in flat for key in run)
    differing = [key for key in keys if len({run.get(key, NONE) for run in flat}) > 1]
    return Grid(("Key", *facts.names(logs)), tuple((key, *(run.get(key, NONE) for run in flat)) for key in differing))


def _flat(prefix: str, value: object) -> Iterator[tuple[str, str]]:
    """Dotted keys with values as Python writes them; a nested one is also named whole: `schedule`, `FedBuff()`."""
    if isinstance(value, dict) and value:
        if prefix and "type" in value:
            yield prefix, f"{value['type']}()"
        for key, inner in value.items():
            if key != "type":
                yield from _flat(f"{prefix}.{key}" if prefix else str(key), inner)
    elif prefix:
        yield prefix, value if isinstance(value, str) else _python(value)


def _python(value: object) -> str:
    """A value as one would write it in a run file."""
    if isinstance(value, list):
        inner = ", ".join(map(_python, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, dict) and "type" in value:
        return f"{value['type']}({', '.join(f'{k}={_python(v)}' for k, v in value.items() if k != 'type')})"
    return repr(value)


def environment(log: RunLog) -> Grid:
    """What the run ran on, and what it trained."""
    manifest = log.manifest
    told: Line = {"fedloom": manifest["fedloom"], "run hash": manifest["run_hash"], "seed": manifest["seed"]}
    rows = [*told.items(), *manifest["versions"].items(), *manifest["machine"].items()]
    return Grid(("What", "Which"), tuple((str(key), str(value)) for key, value in rows))


def model(log: RunLog) -> Grid:
    """The model and what of it is trained and sent."""
    told = log.manifest["model"]
    by_rank = told.get("lora_parameters_by_rank", {})
    rows = [
        ("name", str(told.get("name", NONE))),
        ("parameters", short(number(told.get("parameters")))),
        ("adapted modules", ", ".join(map(str, told.get("adapted_modules", []))) or NONE),
        *((f"adapter parameters at rank {rank}", short(number(n))) for rank, n in by_rank.items()),
        ("head parameters (dense)", short(number(told.get("dense_parameters")))),
    ]
    return Grid(("What", "Which"), tuple(rows))


def summary(logs: Sequence[RunLog]) -> rich.table.Table:
    """The runs as a table for the terminal: the columns that fit into eighty characters."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = runs(logs)
    wide = {"Seed", "Best", "Staleness", "Not merged"}
    wide |= {"Worst client"} if {"Status", "Versions"} & set(grid.head) else set()
    shown = [k for k, head in enumerate(grid.head) if head not in wide and " to " not in head]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for index in shown:
        table.add_column(
            Text(grid.head[index]), justify="left" if grid.head[index] in ("Run", "Status") else "right", no_wrap=True
        )
    for row in grid.rows:
        table.add_row(*(Text(row[index]) for index in shown))
    return table
