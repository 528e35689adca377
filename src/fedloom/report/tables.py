"""Tables of a report as plain rows of text, shown by the page and by the terminal alike."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedloom.report import facts, label_facts, timeline
from fedloom.report.facts import accuracy, label, nan_mean
from fedloom.report.line_table import PARTS, Line, LineTable
from fedloom.report.numbers import (
    NONE,
    evenly,
    format_bytes,
    format_count,
    format_seconds,
    percent,
    plural,
    short,
    to_float,
)
from fedloom.report.run_log import RunLog

QUOTED = 800
"""Characters of a sample that are shown."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A table as texts: the heads of its columns, and its rows."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def runs_table(logs: Sequence[RunLog]) -> Grid:
    """Compare runs, one row each: what it reached, what it cost, and what the accuracy that all of them reached cost.

    A column that says the same of all, as it should (finished, one seed, nothing stale) or nothing at all, is left out.
    """
    scored = [facts.best_accuracy(log) for log in logs if log.scores]
    target = min(scored) if len(scored) > 1 else float("nan")
    shared = (f"Time to {percent(target)}", f"Sent up to {percent(target)}") if len(scored) > 1 else ()
    rows = [
        (name, *_figures(log), *(_price(log, target) if shared else ()))
        for name, log in zip(facts.run_names(logs), logs, strict=True)
    ]
    head = (
        "Run",
        "Status",
        "Seed",
        f"{facts.version_noun(*logs).capitalize()}s",
        facts.score_name(*logs).capitalize(),
        "Majority",
        "Best",
    )
    heads = (*head, label_facts.f1_name(*logs), "Perplexity", "Worst client")
    heads += ("Time", "Uploads", "Waiting", "Staleness", "Up", "Not merged", *shared)
    usual = {"Status": "finished", "Seed": rows[0][2], "Staleness": "0", "Not merged": "0"}
    return _columns(
        Grid(heads, tuple(rows)),
        [k for k, name in enumerate(heads) if {row[k] for row in rows} - {usual.get(name, NONE), NONE}],
    )


def _columns(grid: Grid, chosen: Sequence[int]) -> Grid:
    """The grid with some of its columns."""
    return Grid(tuple(grid.head[k] for k in chosen), tuple(tuple(row[k] for k in chosen) for row in grid.rows))


def run_figures(log: RunLog) -> dict[str, Any]:
    """Return what is compared of runs, as numbers: shares from 0 to 1, seconds, bytes, counts; NaN for what was not measured."""
    score = facts.final_score(log)
    return {
        "status": str(log.manifest["status"]),
        "seed": log.manifest["seed"],
        "versions": facts.version_count(log),
        "score_name": facts.score_name(log),
        "score": accuracy(score),
        "majority": facts.majority_accuracy(log),
        "best": facts.best_accuracy(log),
        "f1": label_facts.f1(score),
        "perplexity": facts.perplexity(score),
        "worst_client": accuracy(facts.worst_client(log)),
        "seconds": facts.elapsed_seconds(log),
        "uploads": facts.latest_value(log, "uploads"),
        "waiting": timeline.waiting_share(log),
        "staleness": timeline.mean_staleness(log),
        "bytes_up": facts.latest_value(log, "bytes_up"),
        "not_merged": len(log.tasks) - facts.merged_count(log.tasks),
    }


_FORMATS: Mapping[str, Callable[[Any], str]] = {
    **dict.fromkeys(("status", "seed", "versions", "not_merged"), str),
    **dict.fromkeys(("score", "majority", "best", "f1", "worst_client", "waiting"), percent),
    **dict.fromkeys(("perplexity", "staleness"), short),
    "seconds": format_seconds,
    "uploads": format_count,
    "bytes_up": format_bytes,
}


def _figures(log: RunLog) -> tuple[str, ...]:
    return tuple(_FORMATS[name](value) for name, value in run_figures(log).items() if name in _FORMATS)


def _price(log: RunLog, target: float) -> tuple[str, str]:
    score = facts.first_reaching(log, target)
    if score is None:
        return NONE, NONE
    return format_seconds(to_float(score.get("time"))), format_bytes(
        facts.value_at_version(log, score.get("version"), "bytes_up")
    )


def key_figures(log: RunLog) -> tuple[tuple[str, str, str], ...]:
    """Key figures of a run, each as its name, its value, and what to compare it with."""
    score, worst = facts.final_score(log), facts.worst_client(log)
    unmerged = {status: count for status, count in log.tasks.counts("status").items() if status != "merged"}
    spectra = facts.versions_with_energy(log)
    chance = f"± {100 * facts.sampling_error(score):.1f} points (95 %)" if score else "not measured"
    who = facts.worst_client_text(log, worst) if worst else "not measured"
    energy = spectra[-1]["energy"] if spectra else []
    recorded = (log.versions.words("energy")[0] >= 0).any()
    none = "the server's product is zero" if recorded else "not measured" if log.versions else "no merge yet"
    rank = (f"{facts.effective_rank(energy):.1f}", f"of {len(energy)} directions") if energy else (NONE, none)
    losses = ", ".join(f"{count} {status}" for status, count in sorted(unmerged.items()))
    return (
        (f"Test {facts.score_name(log)}", percent(accuracy(score)), chance),
        ("Before training", percent(accuracy(facts.initial_score(log))), f"test {facts.score_name(log)}, version 0"),
        *(_generation(log) if facts.generates_text(log) else _classification(log)),
        ("Worst client", percent(accuracy(worst)), who),
        (
            f"{facts.version_noun(log).capitalize()}s",
            f"{facts.version_count(log):,}",
            facts.duration_text(log, facts.elapsed_seconds(log)),
        ),
        ("Sent up", *_traffic(log, "bytes_up")),
        ("Sent down", *_traffic(log, "bytes_down")),
        ("Tasks merged", f"{facts.merged_count(log.tasks):,} of {len(log.tasks):,}", losses or "none lost"),
        ("Effective rank", *rank),
        *(_pace(log) if timeline.records_slot_use(log) else ()),
    )


def _classification(log: RunLog) -> Iterator[tuple[str, str, str]]:
    """Key figures of a model that chooses labels."""
    base, score, line = facts.majority_accuracy(log), facts.final_score(log), label_facts.labels_after(log)
    if not math.isnan(base):
        yield "Majority", percent(base), f"test accuracy of {facts.majority_answer(log)}"
    if score and not math.isnan(label_facts.f1(score)):
        area, balanced = (to_float((line or {}).get(key)) for key in ("roc_auc", "balanced_accuracy"))
        beside = [] if math.isnan(area) else [f"AUC {short(area)}"]
        if not math.isnan(balanced):
            beside.append(f"balanced accuracy {percent(balanced)}")
        yield label_facts.f1_name(log), percent(label_facts.f1(score)), ", ".join(beside)


def _generation(log: RunLog) -> tuple[tuple[str, str, str], ...]:
    """Key figures of a model that writes text."""
    first, last, scores = facts.initial_score(log) or {}, facts.final_score(log) or {}, log.generation or {}
    before = facts.perplexity(first)
    rows = [("Test perplexity", short(facts.perplexity(last)), f"{short(before)} before training")]
    count = plural(int(to_float(last.get("examples", 0))), "test answer")
    for name, key in (("Label accuracy", "label_accuracy"), ("Word for word", "exact_match")):
        if key in last:
            old = percent(to_float(first.get(key)))
            rows.append((name, percent(to_float(last[key])), f"{old} before training; {count}"))
    for name, key in (("Exact samples", "exact_match"), ("ROUGE-L", "rouge_l")) if scores else ():
        share, base = (percent(to_float(scores.get(f"{when}{key}"))) for when in ("", "base_"))
        rows.append((name, share, f"{base} before training; {plural(int(scores.get('examples', 0)), 'answer')}"))
    return tuple(rows)


def samples_table(log: RunLog) -> Grid:
    """List requests with the reference answer and what the model wrote before and after training."""
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
    uploads, lost = facts.latest_value(log, "uploads"), facts.latest_value(log, "waiting_seconds")
    oldest = max(timeline.staleness_counts(log), default=0)
    rows = timeline.client_shares(log)
    most, absent = (len(rows) * rows[0].updates, sum(row.updates == 0 for row in rows)) if rows else (math.nan, 0)
    hour = 3600 * uploads / facts.elapsed_seconds(log) if facts.elapsed_seconds(log) > 0 else math.nan
    return (
        ("Uploads", format_count(uploads), f"{short(hour)} in {'an' if facts.is_deployed(log) else 'a virtual'} hour"),
        ("Waiting", percent(timeline.waiting_share(log)), f"of the slots' time, {short(lost)} seconds"),
        ("Staleness", short(timeline.mean_staleness(log)), f"versions on average, at most {oldest:,}"),
        ("Busiest client", f"{short(most)} ×", f"an equal share of the updates; clients without any: {absent:,}"),
    )


def _traffic(log: RunLog, way: str) -> tuple[str, str]:
    total, dense = facts.latest_value(log, way), facts.latest_value(log, f"{way}_dense")
    fold = to_float(log.versions[-1].get(f"{way}_fold", 0)) if log.versions else 0.0
    folds = f"folds {format_bytes(fold)}, " if fold > 0 else ""
    split = (
        f"adapters {format_bytes(total - dense - fold)}, {folds}heads {format_bytes(dense)}"
        if log.versions
        else "before the first merge"
    )
    return format_bytes(total), split


def settings_table(log: RunLog) -> Grid:
    """List the settings of a run under their dotted keys."""
    return Grid(("Key", "Value"), tuple(_flat("", facts.relevant_settings(log))))


def differences_table(logs: Sequence[RunLog]) -> Grid:
    """List the settings in which runs differ, and only those."""
    flat = [{"seed": str(log.manifest["seed"])} | dict(_flat("", log.manifest["run"])) for log in logs]
    keys = dict.fromkeys(key for run in flat for key in run)
    differing = [key for key in keys if len({run.get(key, NONE) for run in flat}) > 1]
    return Grid(
        ("Key", *facts.run_names(logs)), tuple((key, *(run.get(key, NONE) for run in flat)) for key in differing)
    )


def _flat(prefix: str, value: object) -> Iterator[tuple[str, str]]:
    """Dotted keys with values as Python writes them; a nested one is also named whole: `schedule`, `FedBuff()`."""
    if isinstance(value, dict) and value:
        if prefix and "type" in value:
            yield prefix, f"{value['type']}()"
        for key, inner in value.items():
            if key != "type":
                yield from _flat(f"{prefix}.{key}" if prefix else str(key), inner)
    elif prefix:
        yield prefix, value if isinstance(value, str) else python_text(value)


def python_text(value: object) -> str:
    """A value as one would write it in a run file."""
    if isinstance(value, list):
        inner = ", ".join(map(python_text, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, dict) and "type" in value:
        return f"{value['type']}({', '.join(f'{k}={python_text(v)}' for k, v in value.items() if k != 'type')})"
    return repr(value)


def environment_table(log: RunLog) -> Grid:
    """List versions, hash, seed and machine of a run."""
    manifest = log.manifest
    identity: Line = {"fedloom": manifest["fedloom"], "run hash": manifest["run_hash"], "seed": manifest["seed"]}
    rows = [*identity.items(), *manifest["versions"].items(), *manifest["machine"].items()]
    return Grid(("What", "Which"), tuple((str(key), str(value)) for key, value in rows))


def model_table(log: RunLog) -> Grid:
    """List the model's size, and what of it is trained and sent."""
    shape = log.manifest["model"]
    by_rank = shape.get("lora_parameters_by_rank", {})
    rows = [
        ("name", str(shape.get("name", NONE))),
        ("parameters", short(to_float(shape.get("parameters")))),
        ("adapted modules", ", ".join(map(str, shape.get("adapted_modules", []))) or NONE),
        *((f"adapter parameters at rank {rank}", short(to_float(n))) for rank, n in by_rank.items()),
        ("head parameters (dense)", short(to_float(shape.get("dense_parameters")))),
    ]
    return Grid(("What", "Which"), tuple(rows))


MOST_LABELS = 12
"""Labels whose confusion matrix is shown whole; of more, the commonest confusions are listed."""
MOST_RECALLS = 40
"""Labels whose recall is listed; of more, those with the lowest."""
MEASURES = (
    ("Accuracy", "accuracy", percent),
    ("Balanced accuracy", "balanced_accuracy", percent),
    ("", "f1", percent),  # is named by its label
    ("Macro F1", "f1_macro", percent),
    ("AUC", "roc_auc", short),
)


def measures_table(log: RunLog, after: Line) -> Grid:
    """Compare the last model with the untrained one and with what needs no training, by each measure on the test examples."""
    before, constant = label_facts.labels_before(log) or {}, label_facts.majority_counts(log, after)
    columns = (constant.metrics() if constant else {}, before, after)
    rows = (
        (what or label_facts.f1_name(log), *(shown(to_float(column.get(key))) for column in columns))
        for what, key, shown in MEASURES
        if key in after
    )
    answer = facts.majority_answer(log, 16)
    return Grid(("Measure", answer[0].upper() + answer[1:], "Before training", "Last model"), tuple(rows))


def recall_table(log: RunLog, line: Line) -> Grid:
    """Tabulate how well each label is recognised; of many labels those with the lowest recall."""
    counted = label_facts.counts_of(line)
    shares = (counted.recall(), counted.precision(), counted.f1())
    labels = [*zip(label_facts.label_names(log), counted.true, *(map(to_float, row) for row in shares), strict=False)]
    if len(labels) > MOST_RECALLS:
        labels = sorted(labels, key=lambda row: (math.isnan(row[2]), row[2]))[:MOST_RECALLS]
    rows = ((name, f"{examples:,}", *map(percent, own)) for name, examples, *own in labels)
    return Grid(("Label", "Test examples", "Recall", "Precision", "F1"), tuple(rows))


def confusion_table(log: RunLog, line: Line) -> Grid:
    """Tabulate the confusion matrix; of many labels the pairs that are confused most often."""
    names = label_facts.label_names(log)
    if len(names) > MOST_LABELS:
        pairs = label_facts.confused_labels(log, line)[: 2 * MOST_LABELS]
        return Grid(("Label", "Taken for", "Times"), tuple((true, given, f"{count:,}") for true, given, count in pairs))
    rows = zip(names, line["confusion"], strict=False)
    return Grid(
        ("Label", *(f"→ {name}" for name in names)), tuple((name, *map(format_count, row)) for name, row in rows)
    )


def summary_table(logs: Sequence[RunLog]) -> Grid:
    """Compare runs in the columns that fit into eighty characters of a terminal."""
    grid = runs_table(logs)
    wide = {"Seed", "Best", "Staleness", "Not merged", label_facts.f1_name(*logs)}
    wide |= {"Worst client"} if {"Status", "Versions"} & set(grid.head) else set()
    wide |= {"Uploads", "Waiting"} if "Status" in grid.head or "Versions" not in grid.head else set()
    shown = [k for k, head in enumerate(grid.head) if head not in wide and " to " not in head]
    return _columns(grid, shown)


def tier_table(log: RunLog) -> Grid:
    """Tabulate tiers: their clients, how well these are served and what they pay; folds only where there are any."""
    head = ("Tier", "Clients", "Rank", f"Mean {facts.score_name(log)}", "Baseline", "Worst client")
    folds = (log.tasks.numbers("bytes_down_fold") > 0).any()
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
    rows = (_tier(log, tier, set(members), ways) for tier, members in facts.clients_by_tier(log).items())
    return Grid(head + traffic, tuple(rows))


def _tier(log: RunLog, tier: str, members: set[str], ways: Sequence[str]) -> tuple[str, ...]:
    tasks = log.tasks.select(log.tasks.matches("client", members))
    ends = [line for line in log.clients if line.get("client") in members]
    worst = facts.lowest_accuracy(ends)
    return (
        label(tier),
        str(len(members)),
        ", ".join(map(str, facts.ranks_of(tasks, ends))) or NONE,
        percent(nan_mean(map(accuracy, ends))),
        percent(nan_mean(to_float(line.get("base_accuracy")) for line in ends)),
        f"{percent(accuracy(worst))} ({label(worst['client'], 16)})" if worst else NONE,
        f"{len(tasks):,}",
        f"{facts.merged_count(tasks):,}",
        short(facts.mean_task_seconds(tasks)),
        *(format_bytes(facts.total_of(tasks, way)) for way in ways),
    )


def group_table(log: RunLog) -> Grid:
    """Tabulate groups: their clients, the tasks of their edges, and their share of the weight of all reports."""
    head = ("Group", "Clients", "Examples", "Tasks", "Merged", "Inner rounds", "Steps", "Rank", "Depth")
    tasks_of, whole = log.edges.by_text("edge"), facts.total_of(log.edges.select(facts.was_merged(log.edges)), "work")
    rows = []
    for edge, members in log.manifest.get("groups", {}).items():
        tasks = tasks_of.get(edge, LineTable())
        reports = tasks.select(facts.was_merged(tasks))
        means = [nan_mean(reports.numbers(key)) for key in ("examples", "rounds", "steps", "rank")]
        seconds = {part: reports.numbers("seconds", part) for part in PARTS}
        inside, link = nan_mean(seconds["train"]), nan_mean(seconds["down"] + seconds["up"])
        weight = facts.total_of(reports, "work") / whole if whole else math.nan
        blocks = np.unique(np.nan_to_num(reports.numbers("depth"))).astype(int).tolist()
        depths = sorted(str(depth or "all") for depth in blocks)
        figures = (*map(short, means[1:]), ", ".join(depths) or NONE, short(inside), short(link), percent(weight))
        clients = len(members) or int(np.nan_to_num(reports.numbers("members")).max(initial=0))
        counts = (str(clients), format_count(means[0]), f"{len(tasks):,}", f"{len(reports):,}")
        rows.append((label(edge), *counts, *figures))
    return Grid((*head, "Seconds inside", "on the link", "Weight"), tuple(rows))


def reasons_table(log: RunLog) -> Grid:
    """Tabulate why each group got its last task as it was, where a rule gave a reason."""
    why = {str(line["edge"]): str(line["why"]) for line in log.edges if line.get("why")}
    return Grid(("Group", "Why its last task was as it was"), tuple((label(edge), why[edge]) for edge in sorted(why)))


def set_aside_table(log: RunLog) -> Grid:
    """Tabulate the answers that a canary set aside, the latest first."""
    rows = [
        (
            label(line["client"]),
            str(line["id"]),
            str(line["version"]),
            format_seconds(to_float(line["time"])),
            str(line["reason"]),
        )
        for line in reversed(log.set_aside)
    ]
    return Grid(("Client", "Task", "For version", "When", "Why"), tuple(rows[:MOST_SET_ASIDE]))


MOST_SET_ASIDE = 50
"""Answers that a table lists."""
NAMED = 6
"""Moves that a row lists by name."""


def regrouping_table(log: RunLog) -> Grid:
    """Tabulate regroupings; of the moves of each those count that were done before the next one."""
    rows = []
    for k, line in enumerate(log.regroups):
        wanted, done = line["moves"], _done(log, k)
        moves = [tuple(label(name, 16) for name in _move(move)) for move in wanted[:NAMED]]
        listed = [f"{client}: {edge} → {to}" for client, edge, to in moves]
        more = f", {len(wanted) - NAMED} more" if len(wanted) > NAMED else ""
        limit = percent(to_float(line["threshold"]))
        why = f"times had drifted by {percent(to_float(line['drift']))}, more than {limit}"
        who = ", ".join(listed) + more if wanted else "the present groups are still the best"
        when = f"{format_seconds(to_float(line['time']))}, version {line['version']}"
        rows.append((when, f"{done} of {len(wanted)}", why, who))
    return Grid(("When", "Moved", "Why", "Who"), tuple(rows))


def _done(log: RunLog, k: int) -> int:
    """Moves between this regrouping and the next."""
    since, wanted = to_float(log.regroups[k]["time"]), [_move(line) for line in log.regroups[k]["moves"]]
    until = to_float(log.regroups[k + 1]["time"]) if k + 1 < len(log.regroups) else math.inf
    return sum(since <= to_float(line["time"]) <= until and _move(line) in wanted for line in log.moves)


def _move(line: Line) -> tuple[str, str, str]:
    return line["client"], line["edge"], line["to"]


MOST_SITES = 500
"""Sites that are listed or drawn; of more, some of them."""


def site_table(log: RunLog) -> Grid:
    """Tabulate the sites of a deployment by name, of very many some; a region's score is the mean of its sites'."""
    head = ("Site", "Examples", "GFLOP/s", "Memory", "Rank", f"{facts.score_name(log).capitalize()}", "Baseline")
    profiles = log.manifest["clients"]
    tasks, ends = log.tasks.by_text("client"), defaultdict[object, list[Line]](list)
    for line in log.clients:
        ends[line.get("edge", line.get("client"))].append(line)
    shown = evenly(sorted(profiles), MOST_SITES)
    rows = tuple(_row(client, profiles[client], tasks.get(client, LineTable()), ends[client]) for client in shown)
    return Grid((*head, "Tasks", "Merged", "Seconds a task", "Up", "Down"), rows)


def _row(client: str, profile: Line, tasks: LineTable, ends: Sequence[Line]) -> tuple[str, ...]:
    return (
        label(client),
        format_count(to_float(profile.get("examples"))),
        short(to_float(profile.get("flops")) / 1e9),
        format_bytes(to_float(profile.get("memory"))),
        ", ".join(map(str, facts.ranks_of(tasks, ends))) or NONE,
        percent(nan_mean(map(accuracy, ends))),
        percent(nan_mean(to_float(line.get("base_accuracy")) for line in ends)),
        format_count(float(len(tasks))),
        format_count(float(facts.merged_count(tasks))),
        short(facts.mean_task_seconds(tasks)),
        *(format_bytes(facts.total_of(tasks, way)) for way in ("bytes_up", "bytes_down")),
    )
