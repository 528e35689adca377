"""What a live page shows of a run, put together line by line from its logs, in memory that does not grow with them.

Curves keep evenly spaced points. Sentences and numbers are those of the report: the same functions make them.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedloom.core.files import read_json
from fedloom.core.text import printable
from fedloom.report import facts
from fedloom.report.line_table import Line, LineTable
from fedloom.report.live.fleet import LiveClient, LiveFleet
from fedloom.report.numbers import (
    NONE,
    format_bytes,
    format_count,
    format_duration,
    format_seconds,
    percent,
    plural,
    short,
    to_float,
)
from fedloom.report.run_log import RunLog
from fedloom.report.tables import QUOTED

MOST_POINTS = 160
"""Points of a curve."""
MOST_ROWS = 300
"""Clients that are listed, those at work first."""
LAST_VERSIONS = 256
"""Version lines in which that of a score is looked for."""
LAST_SAMPLES = 3
MOST_NOTES = 100
MOST_STATUSES = 8
"""Ways for a task to end that are told, the most frequent ones."""
BARS = 12
"""Bars of the histogram of staleness."""
ORDER = {"training": 0, "answered": 1, "offline": 2, "idle": 3}
Part = Mapping[str, Any]


@dataclass(slots=True)
class Curve:
    """Evenly spaced points of a long row, the first and the last among them.

    Fields:
        points: at most `MOST_POINTS`, every so many of those that were added.
        last: the last one that was added (None: there was none).
    """

    points: list[tuple[float, ...]] = field(default_factory=list)
    last: tuple[float, ...] | None = None
    _step: int = 1
    _count: int = 0

    def add(self, *values: float) -> None:
        """Add a point: a number on the x axis and those above it."""
        self.last = values
        if self._count % self._step == 0:
            self.points.append(values)
            if len(self.points) > MOST_POINTS:
                del self.points[1::2]
                self._step *= 2
        self._count += 1

    def line(self, name: str, show: Callable[[float], str], value: int = 1) -> dict[str, Any] | None:
        """Return one of the numbers above the axis as a line of a chart, `show` its last one as text; None where no point has it."""
        every = [*self.points, *([self.last] if self.last and self.last != self.points[-1] else [])]
        points = [
            [rounded(point[0]), rounded(point[value])] for point in every if math.isfinite(point[0] + point[value])
        ]
        return {"name": name, "text": _plain(show(points[-1][1])), "points": points} if points else None


def rounded(value: float) -> float:
    """Return a finite number with at most six digits after the first ones that count."""
    return float(f"{value:.7g}")


@dataclass(slots=True)
class LiveState:
    """A run as its folder has described it so far.

    Fields:
        folder: the run folder.
        manifest: of the run, as `read_manifest` gives it (empty: there is none yet).
        status: `status.json` of a deployment (empty: this is none).
        fleet: its clients and events.
        version: the last line of a version.
        score: the last line of a score; `initial` that of version 0.
        scores, versions: curves, see `_take_score` and `_take_version`.
        staleness: merged tasks by their staleness; `statuses` all that ended by how they ended.
        samples: texts that the model wrote.
    """

    folder: Path
    manifest: Line = field(default_factory=dict)
    status: Line = field(default_factory=dict)
    fleet: LiveFleet = field(default_factory=LiveFleet)
    version: Line = field(default_factory=dict)
    score: Line | None = None
    initial: Line | None = None
    scores: Curve = field(default_factory=Curve)
    versions: Curve = field(default_factory=Curve)
    staleness: Counter[int] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    samples: deque[Line] = field(default_factory=lambda: deque(maxlen=LAST_SAMPLES))
    _recent: deque[Line] = field(default_factory=lambda: deque(maxlen=LAST_VERSIONS))
    _overlapping: Line | None = None
    _scored: Line | None = None

    def take_metrics(self, line: Line) -> None:
        """Follow a line of the metrics. Raises one of `UNREADABLE` for a line that no run writes."""
        if line["kind"] in ("version", "score") and type(line["version"]) is not int:
            raise ValueError("the number of a version is a whole number")
        match line["kind"]:
            case "version":
                self._take_version(line)
            case "score":
                self._take_score(line)
            case "task":
                self.statuses[str(line["status"])] += 1
                if isinstance(line.get("staleness"), int):
                    self.staleness[line["staleness"]] += 1
                self.fleet.take_task(line)
            case "sample":
                self.samples.append(line)

    def _take_version(self, line: Line) -> None:
        """Versions are points of: version, training loss, staleness (mean, largest), bytes up and down."""
        names = ("version", "loss", "staleness", "staleness_max", "bytes_up", "bytes_down")
        self.versions.add(*(to_float(line.get(name)) for name in names))
        self.version = line
        self._recent.append(line)
        if to_float(line.get("outstanding")) > 0:
            self._overlapping = line

    def _take_score(self, line: Line) -> None:
        """Scores are points of: version, accuracy, test loss, perplexity."""
        self.scores.add(*(to_float(line.get(name)) for name in ("version", "accuracy", "loss", "perplexity")))
        self.score = line
        self._scored = next((one for one in self._recent if one["version"] == line["version"]), None)
        if line["version"] == 0:
            self.initial = line

    def log(self) -> RunLog:
        """Return what the sentences of the report need of the run, without its many lines."""
        lines = {one["version"]: one for one in (self._overlapping, self._scored, self.version) if one}
        scores = [one for one in (self.initial, self.score) if one is not None]
        table = LineTable.of(lines[number] for number in sorted(lines))
        return RunLog(self.folder, self.manifest, versions=table, scores=tuple(scores))

    def parts(self, time_left: float, behind: float) -> dict[str, Part]:
        """Return the parts of the page; `time_left` in seconds (NaN: unknown), `behind` is the share of the logs that is not read."""
        if not self.manifest:
            return {"run": _waiting_part(self.folder, self.status)}
        log = self.log()
        return {
            "run": self._run_part(log, time_left, behind),
            "figures": {"tiles": [list(map(_plain, tile)) for tile in self._figures(log)]},
            "charts": {"charts": [chart for chart in self._charts(log) if chart["lines"] or chart.get("bars")]},
            "clients": self._clients_part(log),
            "refusals": self._refusals_part(log),
            "plan": {"rows": [_plan_row(name, budget) for name, budget in reversed(self.fleet.reasons.items())]},
            "samples": {"rows": [_sample(line) for line in self.samples]},
        }

    def done(self) -> float:
        """Return the share of the run that is done: of its versions or of its seconds, whichever ends it first."""
        limits = self.manifest.get("run", {}).get("limits", {})
        shares = (
            to_float(self.version.get("version")) / to_float(limits.get("versions")),
            to_float(self.version.get("time")) / to_float(limits.get("seconds")),
        )
        return min(1.0, max((share for share in shares if math.isfinite(share)), default=0.0))

    def _run_part(self, log: RunLog, time_left: float, behind: float) -> Part:
        run, made = self.manifest["run"], int(to_float(self.version.get("version", 0)))
        status, noun = str(self.manifest["status"]), facts.version_noun(log)
        limit = to_float(run.get("limits", {}).get("versions"))
        method = (_kind(run.get("aggregator")), _kind(run.get("schedule")), _model_name(self.manifest))
        return {
            "name": facts.label(self.manifest["name"], 48),
            "folder": _plain(str(self.folder)),
            "status": status,
            "reason": _plain(str(self.manifest["status_reason"])),
            "about": _plain(f"{' · '.join(filter(None, method))} · {plural(len(self.fleet.clients), 'client')}"),
            "sentence": _plain(facts.result_sentence(log)) if self.score else "No version was scored yet.",
            "progress": rounded(self.done()) if status != "finished" else 1.0,
            "progress_text": f"{noun} {made:,}" + (f" of {int(limit):,}" if math.isfinite(limit) else ""),
            "elapsed": _plain(facts.duration_text(log, to_float(self.version.get("time", 0.0)))),
            "left": _plain(format_duration(time_left)) if status == "running" and math.isfinite(time_left) else "",
            "waits": _plain(_waits(self.status)) if status == "running" else "",
            "reading": rounded(1 - behind) if behind > 0 else None,
            "notes": [_plain(str(note)) for note in self.manifest["notes"][:MOST_NOTES]],
        }

    def _figures(self, log: RunLog) -> Iterator[tuple[str, str, str]]:
        """Key figures: each as its name, its value and what to compare it with."""
        score, activities, last = self.score, self.fleet.activities(), self.version
        name, before = facts.score_name(log), facts.accuracy(self.initial)
        chance = f"± {100 * facts.sampling_error(score):.1f} points (95 %)" if score else "not scored yet"
        yield f"Test {name}", percent(facts.accuracy(score)), chance
        if facts.generates_text(log):
            start = short(facts.perplexity(self.initial))
            yield "Test perplexity", short(facts.perplexity(score)), f"{start} before training"
            yield "Before training", percent(before), f"test {name}, version 0"
        else:
            yield "Majority", percent(facts.majority_accuracy(log)), facts.majority_answer(log)
            yield "Before training", percent(before), f"test {name}, version 0"
        waits = f"{activities['answered']:,} answered, {activities['idle']:,} idle, {activities['offline']:,} offline"
        yield "Clients training", f"{activities['training']:,}", waits
        late = f"largest {format_count(to_float(last.get('staleness_max')))}, in the last {facts.version_noun(log)}"
        yield "Staleness", short(self._mean_staleness()), late
        ends = sorted(self.statuses.most_common(MOST_STATUSES))
        lost = ", ".join(f"{count:,} {facts.label(name)}" for name, count in ends if name != "merged")
        yield "Tasks merged", f"{self.statuses['merged']:,}", lost or "none lost"
        yield (
            "Sent up",
            format_bytes(to_float(last.get("bytes_up"))),
            f"{format_bytes(to_float(last.get('bytes_down')))} down",
        )
        lost_time, used = (to_float(last.get(f"{name}_seconds")) for name in ("waiting", "working"))
        share = lost_time / (lost_time + used) if lost_time + used > 0 else math.nan
        yield "Slots waiting", percent(share), "of the time in which they could work"

    def _mean_staleness(self) -> float:
        count = self.staleness.total()
        return sum(k * n for k, n in self.staleness.items()) / count if count else math.nan

    def _charts(self, log: RunLog) -> Iterator[dict[str, Any]]:
        noun, score = facts.version_noun(log), facts.score_name(log)
        levels = [(facts.majority_answer(log), facts.majority_accuracy(log))]
        levels.append(("before training", facts.accuracy(self.initial)))
        yield _chart(f"Test {score}", noun, "percent", [self.scores.line(f"test {score}", percent)], levels)
        if perplexity := self.scores.line("test perplexity", short, 3):
            begin = [("before training", facts.perplexity(self.initial))]
            yield _chart("Test perplexity", noun, "number", [perplexity], begin)
        losses = [self.versions.line("training", short), self.scores.line("test", short, 2)]
        yield _chart("Loss", noun, "number", losses)
        traffic = [self.versions.line("up", format_bytes, 4), self.versions.line("down", format_bytes, 5)]
        yield _chart("Bytes sent", noun, "bytes", traffic)
        if any(self.staleness):
            late = [self.versions.line("largest", short, 3), self.versions.line("mean", short, 2)]
            yield _chart(f"Staleness by {noun}", noun, "number", late)
            yield _chart("Staleness of merged updates", "versions behind", "percent", []) | {"bars": self._bars()}

    def _bars(self) -> list[list[Any]]:
        """The histogram of staleness: of each bar what it is of, and its share of the merged updates."""
        width, bars = 1 + max(self.staleness) // BARS, Counter[int]()
        for behind, count in self.staleness.items():
            bars[behind // width] += count
        names = {k: f"{k * width}" if width == 1 else f"{k * width}\u2013{(k + 1) * width - 1}" for k in bars}
        return [[names[k], rounded(bars[k] / self.staleness.total())] for k in sorted(bars)]

    def _clients_part(self, log: RunLog) -> Part:
        reached = {name: one.get("reached", True) for name, one in self.status.get("clients", {}).items()}
        profiles = self.manifest["clients"]

        def order(item: tuple[str, LiveClient]) -> tuple[int, float, str]:
            return ORDER[item[1].activity], -item[1].since, item[0]

        some = heapq.nsmallest(MOST_ROWS, self.fleet.clients.items(), order)
        rows = [self._client_row(name, one, profiles.get(name, {}), reached.get(name, True), log) for name, one in some]
        return {"counts": dict(self.fleet.activities()), "rows": rows, "hidden": len(self.fleet.clients) - len(rows)}

    def _client_row(self, name: str, one: LiveClient, profile: Line, reached: bool, log: RunLog) -> list[Any]:
        depth = "all" if one.depth is None and one.task is not None else NONE if one.depth is None else f"{one.depth}"
        row = (
            facts.label(name, 40),
            one.activity if reached else "offline",
            NONE if facts.is_deployed(log) else facts.label(profile.get("tier", ""), 18),
            NONE if one.task is None else f"{one.task}",
            NONE if one.rank is None else f"{one.rank}",
            depth,
            clock_text(log, one.since),
            f"{one.merged:,}",
            f"{one.refused:,}",
            short(to_float(one.loss)),
            short(to_float(one.staleness)),
        )
        return [_plain(cell) for cell in row]

    def _refusals_part(self, log: RunLog) -> Part:
        rows = [
            [clock_text(log, one.time), facts.label(one.client, 40), one.what, one.reason]
            for one in self.fleet.refusals
        ]
        calls = self.status.get("calls_refused", {}).items()
        gate = [["", facts.label(name, 40), f"{plural(count, 'call')} refused", "by the gate"] for name, count in calls]
        return {"rows": [list(map(_plain, row)) for row in (*gate, *reversed(rows))]}


def clock_text(log: RunLog, seconds: float) -> str:
    """Return a time of the run in a table: of a simulation in its virtual seconds."""
    return format_duration(seconds) if facts.is_deployed(log) else format_seconds(seconds)


def read_deployment_status(path: Path) -> Line:
    """Return the status of a deployment, as far as a page shows it; empty where it cannot be read."""
    try:
        status = read_json(path)
        clients = {str(name): dict(one) for name, one in status["clients"].items()}
        calls = {str(name): int(count) for name, count in status.get("calls_refused", {}).items()}
        return {
            "waits": str(status["waits"]),
            "ended": str(status["ended"]),
            "clients": clients,
            "calls_refused": calls,
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def _waiting_part(folder: Path, status: Line) -> Part:
    """The head of a page whose run has not begun."""
    blank = dict.fromkeys(("reason", "about", "progress_text", "elapsed", "left"), "")
    return {
        **blank,
        "name": facts.label(folder.name, 48),
        "folder": _plain(str(folder)),
        "status": "waiting",
        "sentence": "The run has not begun: its folder holds no manifest.json yet.",
        "progress": 0.0,
        "waits": _plain(_waits(status)),
        "reading": None,
        "notes": [],
    }


def _waits(status: Line) -> str:
    return f"Waiting {status['waits']}." if status.get("waits") else ""


def _chart(
    title: str, x: str, unit: str, lines: list[dict[str, Any] | None], baselines: list[tuple[str, float]] | None = None
) -> dict[str, Any]:
    show = percent if unit == "percent" else short
    levels = [(name, rounded(value), show(value)) for name, value in baselines or [] if math.isfinite(value)]
    return {
        "title": title,
        "x": x,
        "unit": unit,
        "lines": [line for line in lines if line],
        "baselines": [{"name": _plain(name), "value": value, "text": text} for name, value, text in levels],
    }


def _plan_row(name: str, budget: Line) -> list[str]:
    depth = "all" if budget.get("depth") is None else f"{budget['depth']}"
    numbers = (f"{budget['rank']}", depth, f"{budget.get('rounds', 1)}", f"{budget['steps']}")
    return [_plain(cell) for cell in (facts.label(name, 40), *numbers, facts.label(budget["why"], 240))]


def _sample(line: Line) -> list[str]:
    request = "\n".join(str(line[name]) for name in ("request", "context") if line.get(name))
    texts = (request, *(str(line.get(name) or "") for name in ("reference", "before", "after")))
    return [printable(_cut(text)) for text in texts]


def _cut(text: str) -> str:
    return text if len(text) <= QUOTED else f"{text[: QUOTED - 1]}\u2026"


def _model_name(manifest: Line) -> str:
    """The base model: its name on a hub, or of a local folder the last two parts of the path."""
    name = str(manifest["model"].get("name", ""))
    return "/".join(Path(name).parts[-2:]) if Path(name).is_absolute() else name


def _kind(policy: object) -> str:
    return str(policy.get("type", "")) if isinstance(policy, dict) else ""


def _plain(text: str) -> str:
    """A text as a page may show it: one line, not too long, without characters that turn its direction or cannot be seen."""
    return printable(_cut(text), lines=False)
