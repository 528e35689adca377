"""Each client's own part of a run's data as a site of its own, so that what was simulated can be repeated on real processes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import torch

from fedloom.core.files import create_folder
from fedloom.core.lora import Adapter, Factor
from fedloom.core.text import without_surrogates
from fedloom.core.types import Budget, Task
from fedloom.data.examples import Examples
from fedloom.deploy.messages.messages import EvaluateRequest, TaskRequest
from fedloom.deploy.messages.terms import largest_start, terms_of_run
from fedloom.deploy.site.limits import (
    Asked,
    SiteLimits,
    Value,
    is_allowed,
    needed_rows,
    requested,
    task_epochs,
    toml_value,
)
from fedloom.runs.record_budget import reads_losses
from fedloom.runs.run import Run

UNSURE = 4.0
"""Standard deviations by which the number of rows that a site holds out may differ from what its share says."""
MEANINGS = {
    "rank": "a higher rank tells more of single rows",
    "least_steps": "one step is nearest to a bare gradient",
    "least_rows": "of few rows, rare words and single rows can be told",
    "least_scored": "sums over few rows tell about each",
    "losses": "a loss can tell of a row that the server knows",
    "least_batch": "a step over few rows tells their words",
    "epochs": "each pass more tells which rows are there",
    "total_epochs": "each pass more tells which rows are there",
    "learning_rate": "a higher one tells more of rare texts",
    "folds": "the server changes the base model too",
    "controls": "the server adds numbers to gradients",
}
"""What the owner of a site gives away with a limit that is looser than its default."""
ROWS = "rows.jsonl"


def export_sites(run: Run, folder: Path) -> list[Path]:
    """A folder for each client with its examples, in their order, and a `site.toml`; returns these files.

    Which of them a site holds out follows from its own secret, made at its first start. Raises Refused if there is something at
    `folder` already.
    """
    split = run.data.load(run.seed)
    parts = run.partition.split(split.train, run.seed)
    create_folder(folder)
    names = [(client, split.train.take(part), folder / _plain(client)) for client, part in parts.items()]
    return [_site(run, client, examples, place) for client, examples, place in names]


def needed_limits(run: Run, rows: int, labels: Sequence[str] | None) -> dict[str, Value]:
    """Return the limits that a site with so many rows needs to take part in the run as it was simulated, where not the default.

    How many of its rows a site holds out is left to chance, so the least numbers of rows leave room for it.
    """
    rank = run.plan.rank.largest
    model = run.aggregator.init(Adapter({"layer": Factor(torch.ones(rank, rank), torch.zeros(rank, rank))}))
    terms = terms_of_run(run, model, labels, "0" * 12, "0" * 12)
    task = Task(1, "site", 0, largest_start(run, model), Budget(rank, terms.steps, terms.depth), 0.0)
    request, evaluation = TaskRequest(terms, 1, task, 0), EvaluateRequest(terms, 1, "site", task.start, 0)
    least_trained, least_scored = (_fewest(rows, share) for share in (1 - run.held_out, run.held_out))
    fewest = replace(task, budget=replace(task.budget, steps=_fewest_steps(run, terms.steps)))
    short = replace(request, task=fewest)
    asked = [one for each in (request, short) for one in (*requested(each), *needed_rows(each, least_trained, 0))]
    asked += needed_rows(evaluation, 0, least_scored) if run.held_out else ()
    total = 2 * run.limits.versions * task_epochs(request, least_trained)  # who is fast may have more tasks than others
    asked += [Asked("total_epochs", total, ""), Asked("tasks_a_day", 2 * run.limits.versions, "")]
    asked += [Asked("losses", reads_losses(run), "")]
    needed = dict[str, Value]()
    for limit, value, _ in asked:
        allowed = needed.get(limit, getattr(SiteLimits(), limit))
        if not is_allowed(limit, allowed, value) and not math.isinf(value if isinstance(value, float) else 0):
            needed[limit] = value
    return needed


def _fewest_steps(run: Run, steps: int) -> int:
    """Return the smallest number of steps of a site's task: a region divides its own by its rounds; how a plan does is not known."""
    if run.hierarchy is None:
        return steps
    rounds = run.hierarchy.rounds
    return max(1, steps // rounds) if isinstance(rounds, int) and run.hierarchy.plan is None else 1


def _fewest(rows: int, share: float) -> int:
    """Return the number of rows, at least 1, that a side with this share has almost surely."""
    return max(1, math.floor(rows * share - UNSURE * math.sqrt(rows * share * (1 - share))))


def _plain(name: str) -> str:
    """A name that a folder can have, whatever the data call their clients; most stay as they are."""
    return quote(name, safe=" ").replace(".", "%2E")


def _site(run: Run, name: str, examples: Examples, folder: Path) -> Path:
    folder.mkdir()
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _rows(examples))
    (folder / ROWS).write_text(without_surrogates(text), encoding="utf-8")
    file = folder / "site.toml"
    file.write_text(_settings(run, name, examples), encoding="utf-8")
    return file


def _rows(examples: Examples) -> Iterator[dict[str, object]]:
    for i, text in enumerate(examples.texts):
        beside = None if examples.pairs is None else examples.pairs[i]
        if examples.answers is None:
            pair = {} if beside is None else {"pair": beside}
            yield {"text": text, **pair, "label": examples.names[examples.labels[i]]}
        elif examples.before is not None:
            turns = [turn._asdict() for turn in examples.before[i]]
            turns += [{"role": "user", "content": text}, {"role": "assistant", "content": examples.answers[i]}]
            yield {"messages": turns}
        else:
            context = {} if beside is None else {"context": beside}
            yield {"instruction": text, **context, "answer": examples.answers[i]}


def _settings(run: Run, name: str, examples: Examples) -> str:
    """The site's file, for a server on this machine."""
    section = ["[table]" if examples.answers is None else "[instructions]", f"path = {json.dumps(ROWS)}"]
    if examples.answers is None:
        section += ['pair = "pair"'] if examples.pairs is not None else []
    elif examples.before is not None:
        section += ['messages = "messages"']
    else:
        section += ['context = "context"'] if examples.pairs is not None else []
    path = str(Path(run.model).resolve()) if Path(run.model).exists() else run.model
    lines = [
        f"name = {_text(name)}",
        'server = "127.0.0.1:8080"',
        'ca = "ca.crt"  # whom this site trusts, and how it is known: see `fedloom keys`; not looked at by `join --insecure`',
        f"key = {_text(name + '.key')}",
        "",
        "[model]",
        f"path = {_text(path)}",
        f"name = {_text(run.model)}",
        *(["any_weights = true  # weights in 4 bits cannot be compared"] if run.engine and run.engine.four_bit else ()),
        "",
        *section,
        "",
        "# What this run needs; docs/site.md says what each limit stops and what it does not.",
        "[limits]",
        *_limit_lines(run, examples),
    ]
    return "\n".join(lines) + "\n"


def _limit_lines(run: Run, examples: Examples) -> Iterator[str]:
    """Yield the lines of `[limits]`, each with the default and what it means to leave it."""
    labels = None if examples.answers is not None else examples.names
    needed, defaults = needed_limits(run, len(examples), labels), SiteLimits()
    shown: dict[str, Value] = {"rank": run.plan.rank.largest, **needed}
    for name, value in shown.items():
        meaning = f": {MEANINGS[name]}" if name in needed and name in MEANINGS else ""
        yield f"{name} = {toml_value(value)}  # default {toml_value(getattr(defaults, name))}{meaning}"


def _text(value: str) -> str:
    """A text in TOML, which has JSON's."""
    return json.dumps(value, ensure_ascii=False)
