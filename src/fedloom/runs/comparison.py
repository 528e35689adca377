"""A comparison of runs: what each combination of settings reached, and what each setting changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

from fedloom.core.errors import Refused, refuse_damaged
from fedloom.report.facts import run_names
from fedloom.report.line_table import Line
from fedloom.report.numbers import plural
from fedloom.report.page import write_report
from fedloom.report.paired_differences import (
    PairedDifference,
    cells_grid,
    compared_figures,
    differences_grid,
    differing_settings,
    paired_differences,
)
from fedloom.report.run_log import RunLog, run_folders
from fedloom.report.tables import Grid
from fedloom.runs.run_result import RunResult, data_frame, open_result

DIFFERENCE = ("setting", "value", "instead_of", "figure", "pairs", "mean", "low", "high")
"""Columns of a table of paired differences."""


@dataclass(frozen=True)
class Comparison:
    """Several runs, compared.

    Fields:
        results: the runs, in order; the settings of the first one are what those of the others are compared with.
    """

    results: tuple[RunResult, ...]

    @cached_property
    def _logs(self) -> list[RunLog]:
        return [result.log for result in self.results]

    @property
    def table(self) -> Any:
        """A row for each run: its name and seed, the settings in which runs differ, and what it reached.

        A pandas data frame; a list of mappings where pandas is not installed.
        """
        return data_frame(run_rows(self._logs))

    @property
    def paired(self) -> Any:
        """A row for each value of a setting and each figure: its mean difference from the first value, and the 95 % interval.

        Differences are between runs that differ in nothing else and have the same seed. Of a share they are in points.
        A pandas data frame; a list of mappings where pandas is not installed.
        """
        return data_frame(difference_rows(self._logs), DIFFERENCE)

    def report(self, out: str | Path = "comparison.html") -> Path:
        """Write the page that compares the runs, and return its path."""
        return write_report([result.folder for result in self.results], Path(out))

    @property
    def _grids(self) -> list[Grid]:
        with refuse_damaged("run folder", ", ".join(str(result.folder) for result in self.results)):
            grids = [cells_grid(self._logs), differences_grid(self._logs)]
        return [grid for grid in grids if grid.rows]

    def __repr__(self) -> str:
        return "\n\n".join([f"Comparison of {plural(len(self.results), 'run')}", *map(_text, self._grids)])

    def _repr_html_(self) -> str:
        return "".join(map(_html, self._grids))


def compare(results: Iterable[RunResult | str | Path] | str | Path) -> Comparison:
    """Compare runs: results, run folders, or the folder of a sweep.

    Raises Refused for a folder that is none of a run, and for fewer than two runs.
    """
    given = [results] if isinstance(results, str | Path) else list(results)
    found = [
        result
        for one in given
        for result in ([one] if isinstance(one, RunResult) else map(open_result, run_folders(Path(one))))
    ]
    if len(found) < 2:
        raise Refused("results", f"{len(found)} runs", "give at least two results, run folders, or a sweep's folder")
    return Comparison(tuple(found))


def run_rows(logs: Sequence[RunLog]) -> list[Line]:
    """A row for each run: its name and seed, the settings in which runs differ, and what it reached."""
    settings, figures = differing_settings(logs), compared_figures(logs)
    return [
        {"run": name, "seed": log.manifest["seed"]}
        | {path: values[place] for path, values in settings.items()}
        | {_column(one.name): one.read(log) for one in figures}
        for place, (name, log) in enumerate(zip(run_names(logs), logs, strict=True))
    ]


def difference_rows(logs: Sequence[RunLog]) -> list[Line]:
    """A row for each paired difference of each figure, under the names of `DIFFERENCE`; of a single pair the ends are infinite."""
    found = [one for figure in compared_figures(logs) for one in paired_differences(logs, figure)]
    rows = ((_name_of(one), (one.mean, one.mean - one.half_width, one.mean + one.half_width)) for one in found)
    return [dict(zip(DIFFERENCE, (*names, *numbers), strict=True)) for names, numbers in rows]


def _name_of(one: PairedDifference) -> tuple[object, ...]:
    return one.setting, one.value, one.baseline, _column(one.figure.name), len(one.differences)


def _column(name: str) -> str:
    return name.lower().replace(" ", "_")


def _text(grid: Grid) -> str:
    """A table as plain text, its columns aligned."""
    rows = [grid.head, *grid.rows]
    widths = [max(len(row[k]) for row in rows) for k in range(len(grid.head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _html(grid: Grid) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in grid.head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in grid.rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
