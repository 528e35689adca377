"""The runs of a sweep: one for each combination of the grid's values, each with a folder named by these."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

from fedloom.core import schema
from fedloom.core.errors import Refused
from fedloom.core.settings_view import as_written
from fedloom.runs.field_values import replace_field
from fedloom.runs.run import Run
from fedloom.runs.run_file import load_run_file, override

MOST_RUNS = 1000
"""Runs of one sweep."""
LONGEST_NAME = 80
"""Characters of a folder's name."""

Combination: TypeAlias = tuple[tuple[str, Any], ...]
"""Fields by dotted name, each with its value."""


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One run of a sweep.

    Fields:
        name: values of the grid that it has, as the name of its folder.
        folder: its run folder.
        load: makes its settings, in whatever process it is carried out.
    """

    name: str
    folder: Path
    load: Callable[[], Run]


def plan_runs(run: Run, grid: Mapping[str, Iterable[object]], folder: Path) -> list[PlannedRun]:
    """Return the runs of a grid of values, for instance {"aggregator": [HLoRA(), FedIT()], "seed": range(3)}.

    The last field varies fastest. Raises Refused for a field or a value that a run does not have.
    """
    combinations = _combinations({name: list(values) for name, values in grid.items()})
    runs = [_with_values(run, combination) for combination in combinations]
    names = _names([[(name, as_written(value)) for name, value in one] for one in combinations])
    return [PlannedRun(name, folder / name, partial(_same, run)) for name, run in zip(names, runs, strict=True)]


def plan_file(file: Path, settings: Sequence[str], grid: Mapping[str, Sequence[str]], folder: Path) -> list[PlannedRun]:
    """Return the runs of a run file with each combination of values that are written as after `--set`."""
    base = override(load_run_file(file), settings)
    combinations = _combinations({name: list(values) for name, values in grid.items()})
    given = [[f"{name}={text}" for name, text in combination] for combination in combinations]
    for more in given:
        schema.check_fields(override(base, more))
    loads = [partial(load_run, file, [*settings, *more]) for more in given]
    return [PlannedRun(name, folder / name, load) for name, load in zip(_names(combinations), loads, strict=True)]


def load_run(file: Path, settings: Sequence[str]) -> Run:
    """Return the run of a file with these settings."""
    return override(load_run_file(file), settings)


def grid_values(texts: Sequence[str]) -> dict[str, list[str]]:
    """Read `FIELD=VALUE,VALUE,...` texts of a command line: values as they are written after `--set`.

    `range(3)` stands for 0, 1, 2, and a list `[..]` for its items. Raises Refused.

    >>> grid_values(["aggregator=HLoRA(rank=8),FedIT", "seed=range(2)"])
    {'aggregator': ['HLoRA(rank=8)', 'FedIT'], 'seed': ['0', '1']}
    """
    grid = dict[str, list[str]]()
    for text in texts:
        name, equals, values = (part.strip() for part in text.partition("="))
        if not equals or not name or not values:
            raise Refused("--grid", text, "write field=value,value, for instance seed=0,1,2")
        if name in grid:
            raise Refused("--grid", text, f"{name} is given twice; list all of its values after one --grid")
        grid[name] = _listed(text, values)
    return grid


def _listed(whole: str, values: str) -> list[str]:
    """The values in a text: separated by commas, except inside brackets and quotes."""
    try:
        (statement,) = ast.parse(f"[{values}]").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if not re.search(r"[\[\](){}'\"]", values):  # names of models and the like, which are no Python
            return [value.strip() for value in values.split(",") if value.strip()]
        raise Refused("--grid", whole, "its values cannot be told apart; put texts into quotes") from error
    items = getattr(getattr(statement, "value", None), "elts", None)
    if items is None:
        raise Refused("--grid", whole, "write field=value,value, for instance seed=0,1,2")
    if len(items) == 1 and isinstance(items[0], ast.List):
        items = items[0].elts
    return [text for item in items for text in _texts(whole, item, f"[{values}]")]


def _texts(whole: str, item: ast.expr, source: str) -> list[str]:
    """A value as it was written; of a range all of its numbers."""
    if not (isinstance(item, ast.Call) and isinstance(item.func, ast.Name) and item.func.id == "range"):
        return [ast.get_source_segment(source, item) or ""]
    try:
        numbers = range(*(int(ast.literal_eval(argument)) for argument in item.args))
    except (TypeError, ValueError) as error:
        raise Refused("--grid", whole, f"{ast.unparse(item)} is no range of whole numbers; write range(3)") from error
    if len(numbers) > MOST_RUNS:
        raise Refused("--grid", whole, f"a sweep has at most {MOST_RUNS:,} runs")
    return [str(number) for number in numbers]


def _combinations(grid: Mapping[str, Sequence[Any]]) -> list[Combination]:
    """All combinations of the values. Raises Refused for an empty grid and for too large a one."""
    if not grid:
        raise Refused("grid", {}, "name at least one field and its values, for instance seed=0,1,2")
    count = 1
    for name, values in grid.items():
        if not values:
            raise Refused("grid", name, "give at least one value")
        count *= len(values)
    if count > MOST_RUNS:
        raise Refused("grid", f"{count:,} runs", f"a sweep has at most {MOST_RUNS:,} runs")
    return [tuple(zip(grid, values, strict=True)) for values in product(*grid.values())]


def _with_values(run: Run, combination: Combination) -> Run:
    for name, value in combination:
        run = replace_field(run, name, value)
    schema.check_fields(run)
    return run


def _same(run: Run) -> Run:
    return run


def _names(combinations: Sequence[Iterable[tuple[str, str]]]) -> list[str]:
    """Distinct names for folders, which do not depend on the other combinations unless two would be the same."""
    names = list[str]()
    for combination in combinations:
        name = ",".join(f"{path.rpartition('.')[2]}={_plain(text)}" for path, text in combination)[:LONGEST_NAME]
        number, unique = 2, name
        while unique in names:
            number, unique = number + 1, f"{name}-{number}"
        names.append(unique)
    return names


def _plain(text: str) -> str:
    """A text with only what any file system and shell takes."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-.") or "none"
