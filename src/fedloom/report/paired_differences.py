"""What a setting changes: runs that differ in nothing else, compared pair by pair.

Two runs with the same seed draw the same clients, batches and held-out rows. Their difference therefore varies less than either
score, and three to five seeds can show what single scores would not. All runs of a comparison are read as a grid: each setting in
which they differ is a column of it, and the seed says which runs belong together.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import mean
from typing import Any

from fedloom.core.mean_interval import half_width
from fedloom.report import facts
from fedloom.report.numbers import NONE, format_bytes, format_duration, percent, plural, short
from fedloom.report.run_log import RunLog
from fedloom.report.tables import Grid, python_text

UNCOMPARED = ("name", "seed", "device", "threads", "compress_trace")
"""Settings that change at most the last digits of what a run computes, and the seed, by which runs are paired."""


@dataclass(frozen=True, slots=True)
class ComparedFigure:
    """A figure by which runs are compared.

    Fields:
        name: heading of its column.
        read: its value of a run (NaN: there is none).
        scale: what a difference is multiplied with before it is shown: 100 for a share, which differs by points.
        unit: of a difference, in a sentence.
        lower_is_better: whether a negative difference is the better one.
    """

    name: str
    read: Callable[[RunLog], float]
    scale: float = 1.0
    unit: str = ""
    lower_is_better: bool = False


def final_accuracy(log: RunLog) -> float:
    """Accuracy of the last version that was scored."""
    return facts.accuracy(facts.final_score(log))


def clients_accuracy(log: RunLog) -> float:
    """Mean of the clients' accuracies at the end, each on its own held-out examples."""
    return facts.nan_mean(map(facts.accuracy, log.clients))


def worst_accuracy(log: RunLog) -> float:
    """Accuracy of the worst client at the end."""
    return facts.accuracy(facts.worst_client(log))


def final_perplexity(log: RunLog) -> float:
    """Perplexity of the last version that was scored."""
    return facts.perplexity(facts.final_score(log))


CLASSIFIER = (
    ComparedFigure("Accuracy", final_accuracy, 100, "points"),
    ComparedFigure("Mean client", clients_accuracy, 100, "points"),
    ComparedFigure("Worst client", worst_accuracy, 100, "points"),
)
WRITER = (
    ComparedFigure("Perplexity", final_perplexity, lower_is_better=True),
    ComparedFigure("Token accuracy", final_accuracy, 100, "points"),
    ComparedFigure("Mean client", clients_accuracy, 100, "points"),
)


def compared_figures(logs: Sequence[RunLog]) -> tuple[ComparedFigure, ...]:
    """The figures by which these runs are compared, the most important first; without those that no run has."""
    figures = WRITER if facts.generates_text(*logs) else CLASSIFIER
    return tuple(one for one in figures if any(not math.isnan(one.read(log)) for log in logs))


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Differences between runs with one value of a setting and runs with its baseline, all else being equal.

    Fields:
        setting: dotted name of the setting; several, joined by ", ", where they never differ one at a time.
        value, baseline: the two values, as text.
        figure: what is compared.
        differences: figure with `value` minus figure with `baseline`, one for each pair; in points for a share.
    """

    setting: str
    value: str
    baseline: str
    figure: ComparedFigure
    differences: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the pairs."""
        return mean(self.differences)

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval of the mean (Student's t over the pairs); infinite for a single pair."""
        return half_width(self.differences)

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return abs(self.mean) > self.half_width

    def sentence(self) -> str:
        """The difference in words."""
        better = (self.mean < 0) == self.figure.lower_is_better
        size = f"{short(abs(self.mean))} {self.figure.unit}".strip()
        name = self.figure.name.lower()
        more = f"{name} is {size} {'better' if better else 'worse'}" if self.mean else f"{name} is the same"
        pairs = plural(len(self.differences), "pair")
        text = f"With {self.setting} = {self.value} instead of {self.baseline}, {more} (mean of {pairs}"
        if len(self.differences) < 2:
            return f"{text}; more seeds would show what chance does)."
        ends = f"{short(self.mean - self.half_width)} to {short(self.mean + self.half_width)}"
        return f"{text}; 95 % interval {ends}{'' if self.clear else ', so chance may explain it'})."


def differing_settings(logs: Sequence[RunLog]) -> dict[str, tuple[str, ...]]:
    """The settings in which runs differ, by dotted name: the value of each run, as text. The seed is none of them."""
    settings = [{k: v for k, v in log.manifest["run"].items() if k not in UNCOMPARED} for log in logs]
    return dict(_differing("", settings))


def _differing(path: str, values: Sequence[Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    if all(value == values[0] for value in values):
        return
    objects = [value for value in values if isinstance(value, dict)]
    if len(objects) == len(values) and len({value.get("type") for value in objects}) == 1:
        for name in dict.fromkeys(chain.from_iterable(objects)):
            yield from _differing(f"{path}.{name}".lstrip("."), [value.get(name) for value in objects])
    else:
        yield path, tuple(_short_text(value, objects) for value in values)


def _short_text(value: Any, others: Sequence[Mapping[str, Any]]) -> str:
    """A value as text; an object by its class, and by the fields in which it differs from others of that class."""
    if not isinstance(value, dict) or "type" not in value:
        return value if isinstance(value, str) else python_text(value)
    alike = [other for other in others if other.get("type") == value["type"]]
    own = {key: item for key, item in value.items() if any(other.get(key) != item for other in alike)}
    return python_text({"type": value["type"], **own}) if own else str(value["type"])


def paired_differences(logs: Sequence[RunLog], figure: ComparedFigure) -> list[PairedDifference]:
    """The differences of each value of each setting from the first one; only runs that were scored count.

    Two runs make a pair where they have the same seed and differ in this setting alone. Where no setting differs alone in any pair,
    all of them together are taken for one.
    """
    scored = [log for log in logs if not math.isnan(figure.read(log))]
    settings = differing_settings(scored) if scored else {}
    found = [
        difference
        for name, values in settings.items()
        for difference in _differences(scored, name, values, [v for k, v in settings.items() if k != name], figure)
    ]
    if found or len(settings) < 2:
        return found
    joined = tuple(", ".join(values) for values in zip(*settings.values(), strict=True))
    return list(_differences(scored, ", ".join(settings), joined, (), figure))


def _differences(
    logs: Sequence[RunLog],
    name: str,
    values: Sequence[str],
    others: Sequence[Sequence[str]],
    figure: ComparedFigure,
) -> Iterator[PairedDifference]:
    """Differences of one setting; `others` are the values of the settings that a pair has in common."""
    cells = defaultdict[str, dict[tuple[str, ...], float]](dict)
    rest = zip(*others, strict=True) if others else [()] * len(logs)
    for log, value, same in zip(logs, values, rest, strict=True):
        cells[value].setdefault((str(log.manifest["seed"]), *same), figure.scale * figure.read(log))
    baseline, *compared = cells
    for value in compared:
        pairs = [key for key in cells[value] if key in cells[baseline]]
        if pairs:
            gaps = tuple(cells[value][key] - cells[baseline][key] for key in pairs)
            yield PairedDifference(name, value, baseline, figure, gaps)


def differences_grid(logs: Sequence[RunLog]) -> Grid:
    """Tabulate paired differences: a row for each value of a setting, a column for each figure."""
    figures = compared_figures(logs)
    rows = dict[tuple[str, str, str], dict[str, PairedDifference]]()
    for figure in figures:
        for one in paired_differences(logs, figure):
            rows.setdefault((one.setting, one.value, one.baseline), {})[figure.name] = one
    heads = (f"{one.name}{f' ({one.unit})' if one.unit else ''}" for one in figures)
    return Grid(
        ("Setting", "Value", "Instead of", "Pairs", *heads),
        tuple(
            (*what, str(max(len(one.differences) for one in own.values())), *_shown(own, figures))
            for what, own in rows.items()
        ),
    )


def _shown(own: Mapping[str, PairedDifference], figures: Sequence[ComparedFigure]) -> Iterator[str]:
    for figure in figures:
        one = own.get(figure.name)
        spread = "" if one is None or math.isinf(one.half_width) else f" ± {short(one.half_width)}"
        yield NONE if one is None else f"{one.mean:+.{2 if abs(one.mean) < 10 else 1}f}{spread}"


def cells_grid(logs: Sequence[RunLog]) -> Grid:
    """Tabulate runs by their settings: a row for each combination, with the mean over its seeds and their range."""
    figures = compared_figures(logs)
    heads = ("Seeds", *(one.name for one in figures), "Sent up", facts.time_name(*logs).capitalize())
    rows = ((*values, str(len(own)), *_means(own, figures)) for values, own in _cells(logs).items())
    return Grid((*differing_settings(logs), *heads), tuple(rows))


def best_cell_sentence(logs: Sequence[RunLog]) -> str:
    """Name the combination of settings with the best mean over its seeds; empty where none has several seeds."""
    cells, figures = _cells(logs), compared_figures(logs)
    seeds = [len({str(log.manifest["seed"]) for log in own}) for own in cells.values()]
    if len(cells) < 2 or not figures or max(seeds) < 2:
        return ""
    figure, form = figures[0], _form(figures[0])
    means = {values: facts.nan_mean(map(figure.read, own)) for values, own in cells.items()}
    ordered = sorted(
        (values for values in means if not math.isnan(means[values])),
        key=lambda values: means[values] * (1 if figure.lower_is_better else -1),
    )
    first, last, name = ordered[0], ordered[-1], figure.name.lower()
    what = ", ".join(f"{path} = {value}" for path, value in zip(differing_settings(logs), first, strict=True))
    reached = f"a mean {name} of {form(means[first])} over {plural(len(cells[first]), 'seed')}"
    return f"Of {len(cells)} combinations, {what} is best: {reached}. The worst has {form(means[last])}."


def _cells(logs: Sequence[RunLog]) -> dict[tuple[str, ...], list[RunLog]]:
    """Runs by the values of the settings in which they differ."""
    settings, cells = differing_settings(logs), defaultdict[tuple[str, ...], list[RunLog]](list)
    rows = zip(*settings.values(), strict=True) if settings else [()] * len(logs)
    for log, values in zip(logs, rows, strict=True):
        cells[values].append(log)
    return dict(cells)


def _form(figure: ComparedFigure) -> Callable[[float], str]:
    return percent if figure.scale == 100 else short


def _means(logs: Sequence[RunLog], figures: Sequence[ComparedFigure]) -> Iterator[str]:
    """Means over runs of one cell, and the range of the scores."""
    for figure in figures:
        values = [value for value in map(figure.read, logs) if not math.isnan(value)]
        form = _form(figure)
        ends = f" ({form(min(values))} to {form(max(values))})" if len(values) > 1 else ""
        yield f"{form(facts.nan_mean(values))}{ends}"
    yield format_bytes(facts.nan_mean(facts.latest_value(log, "bytes_up") for log in logs))
    yield format_duration(facts.nan_mean(map(facts.elapsed_seconds, logs)))
