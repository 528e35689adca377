"""Each client's own part of a run's data as a site of its own, so that what was simulated can be repeated on real processes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import torch

from fedloom.core.errors import Refused
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
from fedloom.report.numbers import plural
from fedloom.runs.record_budget import reads_losses
from fedloom.runs.run import Run
from fedloom.runs.toml_run import toml_text

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
ROWS, SITE_FILE = "rows.jsonl", "site.toml"
TEMPLATE_HEADING = """\
# Settings of one site. Copy this file to the site's machine. There its owner
#   1. writes the site's name, the server's address, and the paths of its own table and of its copy of the model;
#   2. runs `fedloom keys site NAME`, sends NAME.pub to the server and gets ca.crt from it;
#   3. runs `fedloom join --config site.toml`, reads the terms of the run, and accepts them.
# docs/site.md explains every line.

"""
SERVER = "127.0.0.1:8080"
"""Where sites look for their server, unless something else is said."""


def by_client(number: int, client: str) -> str:
    """Return the name of a site: its client's."""
    return client


def export_sites(
    run: Run,
    folder: Path,
    server: str = SERVER,
    count: int | None = None,
    name_of: Callable[[int, str], str] = by_client,
) -> list[Path]:
    """Make a folder for each client with its examples, in their order, and a `site.toml`; returns these files.

    Which of them a site holds out follows from its own secret, made at its first start.

    Args:
        run: the run.
        folder: where to.
        server: the server's address, HOST:PORT.
        count: how many clients become sites, the first ones (None: all).
        name_of: the name of a site by its number, from 1, and its client.

    Raises:
        Refused: there is something at `folder` already, or there are fewer clients.
    """
    split = run.data.load(run.seed)
    parts = [*run.partition.split(split.train, run.seed).items()][:count]
    if count is not None and len(parts) < count:
        raise Refused("sites", count, f"the run's data have {plural(len(parts), 'client')}; choose at most as many")
    names = [name_of(number, client) for number, (client, _) in enumerate(parts, 1)]
    create_folder(folder)
    shards = [split.train.take(part) for _, part in parts]
    return [_site(run, name, server, shard, folder / _plain(name)) for name, shard in zip(names, shards, strict=True)]


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
    total = round(
        2 * run.limits.versions * task_epochs(request, least_trained), 3
    )  # who is fast may have more tasks than others
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


def _site(run: Run, name: str, server: str, examples: Examples, folder: Path) -> Path:
    folder.mkdir()
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _rows(examples))
    (folder / ROWS).write_text(without_surrogates(text), encoding="utf-8")
    file = folder / SITE_FILE
    file.write_text(_settings(run, name, server, examples, _section(examples)), encoding="utf-8")
    return file


def site_template(run: Run, examples: Examples, data: Mapping[str, Value]) -> str:
    """Write settings for the owner of a site to complete: a name, the server, the data; with the limits that the run needs.

    Args:
        run: the run of the server.
        examples: as many as a site may hold; its limits are computed for them.
        data: how its data are read: the fields of `[table]` or `[instructions]`, the path first.
    """
    section = ["[table]" if examples.answers is None else "[instructions]"]
    section += [f"{name} = {toml_value(value)}" for name, value in data.items()]
    return TEMPLATE_HEADING + _settings(run, "site-1", "fed.example.org:8080", examples, section)


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


def _section(examples: Examples) -> list[str]:
    """Return the lines that say how the exported rows are read."""
    section = ["[table]" if examples.answers is None else "[instructions]", f"path = {json.dumps(ROWS)}"]
    if examples.answers is None:
        section += ['pair = "pair"'] if examples.pairs is not None else []
    elif examples.before is not None:
        section += ['messages = "messages"']
    else:
        section += ['context = "context"'] if examples.pairs is not None else []
    return section


def _settings(run: Run, name: str, server: str, examples: Examples, section: Sequence[str]) -> str:
    path = str(Path(run.model).resolve()) if Path(run.model).exists() else run.model
    lines = [
        f"name = {toml_text(name)}",
        f"server = {toml_text(server)}",
        'ca = "ca.crt"  # certificate of the server, and the key of this site: see `fedloom keys`; `join --insecure` uses neither',
        f"key = {toml_text(name + '.key')}",
        "",
        "[model]",
        f"path = {toml_text(path)}",
        f"name = {toml_text(run.model)}",
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
