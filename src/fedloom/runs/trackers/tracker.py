"""What a tracker is, which there are, and how the lines of `metrics.jsonl` become its figures."""

from __future__ import annotations

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from statistics import mean
from typing import Any

from fedloom.core.errors import Refused
from fedloom.core.policies import Observer
from fedloom.core.text import did_you_mean, first_line
from fedloom.report.run_log import RunLog
from fedloom.report.tables import settings_table

PLACES = ("kind", "version", "time")
"""Fields of a line that say what it is about, and when."""
HELD_BACK = re.compile(r"(^|\.)(labels|query|roles|client|groups\.groups)(\.|$)")
"""Settings that name labels, clients or, in a query, a person."""


class Tracker(ABC):
    """Follows the figures of a run, beside its run folder; given to a run among its observers."""

    @abstractmethod
    def begin(self, folder: Path, manifest: Mapping[str, Any], version: int) -> None:
        """Begin to follow a run.

        Args:
            folder: its run folder, which exists.
            manifest: what stands in its `manifest.json` now.
            version: the version at which it goes on (0: it begins); figures of later ones come again.
        """

    @abstractmethod
    def write(self, version: int, figures: Mapping[str, float]) -> None:
        """Take figures of a global version, by names such as "test/accuracy"."""

    @abstractmethod
    def end(self, status: str) -> None:
        """Take the status with which the run ended: "finished", "interrupted" or "failed"."""


def open_trackers(to: str | Sequence[str] | None) -> list[Tracker]:
    """Return the trackers of these names, each as "NAME" or "NAME:PLACE" (None: none). Nothing is written yet.

    Raises Refused for a name that is none, a package that is missing, and a tracking server that does not answer.
    """
    return [_open_tracker(name) for name in ([to] if isinstance(to, str) else to or ())]


def _open_tracker(text: str) -> Tracker:
    name, _, place = text.partition(":")
    if name not in tracker_names():
        remedy = f"{did_you_mean(name, tracker_names())} choose {' or '.join(tracker_names())}"
        raise Refused("to", text, remedy.strip())
    module = import_module(f"{__package__}.{name}")
    (kind,) = (one for one in vars(module).values() if isinstance(one, type) and one.__module__ == module.__name__)
    tracker: Tracker = kind(place)
    return tracker


def tracker_names() -> list[str]:
    """Return the names of the trackers: the other modules of this folder, each with one class."""
    folder = str(Path(__file__).parent)
    return sorted(module.name for module in iter_modules([folder]) if module.name != Path(__file__).stem)


def settings_texts(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings of a run under their dotted names, as its report lists them, without those that name labels or clients."""
    rows = settings_table(RunLog(Path(), {**manifest})).rows
    return {row[0]: row[1] for row in rows if not HELD_BACK.search(row[0])}


@dataclass(slots=True)
class Tracking:
    """The trackers of a run while it goes on.

    One that fails is left out from then on, with a warning: the run does not depend on it, and its figures are in `metrics.jsonl`.

    Fields:
        trackers: those that still take figures.
        version: the last version that a figure was about.
        accuracies: of the clients at the end.
    """

    trackers: list[Tracker]
    version: int = 0
    accuracies: list[float] = field(default_factory=list)

    def begin(self, folder: Path, manifest: Mapping[str, Any], version: int) -> None:
        """Begin to follow the run in this folder."""
        self._each(lambda tracker: tracker.begin(folder, manifest, version))

    def take(self, line: Mapping[str, object]) -> None:
        """Pass on the figures of a line of `metrics.jsonl`, if it is about the whole run."""
        kind, accuracy = line["kind"], line.get("accuracy")
        if kind == "client" and isinstance(accuracy, float):
            self.accuracies.append(accuracy)
        elif kind in ("version", "score"):
            self.version = int(str(line["version"]))
            figures = {name: value for name, value in line.items() if name not in PLACES}
            self._write({_name(str(kind), name): float(v) for name, v in figures.items() if isinstance(v, int | float)})

    def end(self, status: str) -> None:
        """Pass on how the clients fare at the end, and the status of the run."""
        if self.accuracies:
            self._write(
                {"clients/mean_accuracy": mean(self.accuracies), "clients/worst_accuracy": min(self.accuracies)}
            )
        self._each(lambda tracker: tracker.end(status))

    def _write(self, figures: Mapping[str, float]) -> None:
        self._each(lambda tracker: tracker.write(self.version, figures))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self.trackers):
            try:
                call(tracker)
            except Exception as error:
                self.trackers.remove(tracker)
                what = f"{type(tracker).__name__} gets no more figures of this run, which goes on"
                warnings.warn(f"{what}: {type(error).__name__}: {first_line(error)}", RuntimeWarning, stacklevel=2)


def _name(kind: str, name: str) -> str:
    """The name of a figure, with the group that it is shown in."""
    if kind == "score":
        return "test/majority" if name == "base_accuracy" else f"test/{name}"
    return f"train/{name}" if name == "loss" else f"traffic/{name}" if name.startswith("bytes_") else f"server/{name}"


def split_observers(observers: Sequence[Observer | Tracker]) -> tuple[list[Observer], Tracking]:
    """Tell observers of steps from trackers."""
    trackers = [one for one in observers if isinstance(one, Tracker)]
    return [one for one in observers if not isinstance(one, Tracker)], Tracking(trackers)
