"""A run file for a table: what the table holds, and a commented file in TOML whose run fits it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from statistics import mean
from typing import Any, cast

from fedloom.core.errors import Refused
from fedloom.core.seeds import simulated_secret
from fedloom.core.text import printable
from fedloom.data.cells import MOST_CLASSES, describe_columns, identity, is_missing
from fedloom.data.delimited import FileFormat
from fedloom.data.examples import Source, Split
from fedloom.data.file_formats import read_tables
from fedloom.data.instructions import Instructions, conversation_columns
from fedloom.data.partition import hold_out
from fedloom.data.raw_table import RawTable, row_count
from fedloom.data.table import Table, guess_columns
from fedloom.runs.field_values import make_value, read_data
from fedloom.runs.run import Run
from fedloom.runs.toml_run import parse_run, toml_text

FEW_ROWS, FEW_SHARE, SHARE = 50, 0.34, 0.2
"""Below so many rows a larger share is set aside to test on; the share then, and else."""
ROWS_A_CLIENT, MOST_CLIENTS = 25, 8
"""Rows that a made-up client has at least, and how many of them there are at most."""
FEWEST_LETTERS = 20
"""Letters of a cell, on average, from which on a column without a telling name is taken for the text."""
ROWS_A_TASK = 100
"""Rows that a site trains on in a task at least, unless its owner allows fewer."""
LONG_TEXT = 1000
"""Characters of a text, with its answer, from which on texts are cut: a long one costs its length."""
FIELDS: Mapping[str, str] = {"text": "instruction", "pair": "context", "answer": "answer", "label": "kind"}
"""What `Instructions` calls the roles of columns."""


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """A base model, and how it is trained at first.

    Fields:
        name: hub name or folder.
        learning_rate: largest learning rate of a task.
        top_blocks: blocks that are trained, from the top (None: all).
    """

    name: str
    learning_rate: float
    top_blocks: int | None = None


@dataclass(frozen=True, slots=True)
class TableFacts:
    """What a table holds, as far as its run file depends on it.

    Fields:
        source: the class that reads it.
        settings: fields of that class.
        gaps: number of rows with an empty cell that is needed.
        split: its examples.
        guessed: columns that were guessed, by the role of each.
    """

    source: type
    settings: Mapping[str, Any]
    gaps: int
    split: Split
    guessed: Mapping[str, str]

    @property
    def writes(self) -> bool:
        """Whether a model has to write answers."""
        return self.split.train.answers is not None

    @property
    def clients(self) -> int:
        """Number of clients with training examples; 0 where the data name none."""
        return len(set(self.split.train.clients or ()))

    @property
    def rows(self) -> int:
        """Number of examples."""
        return len(self.split.train) + len(self.split.test)


# What a table holds -----------------------------------------------------------------------------------------------------


def examine_table(path: str, columns: Mapping[str, str], how: FileFormat, writes: bool | None = None) -> TableFacts:
    """Read a table and find which columns a run needs.

    Args:
        path: the table, as `Table` and `Instructions` take it.
        columns: column by role, where they are chosen: text, pair, answer, label, client.
        how: settings for reading the file.
        writes: whether a model is to write answers (None: as the columns say).

    Raises Refused where columns are missing, or where the rows cannot be divided into training and test examples.
    """
    tables = read_tables(path, how)
    raw, talks = tables.train, conversation_columns(tables.train)
    roles = _guessed_roles(raw, {"text": talks[0], **columns} if len(talks) == 1 else columns)
    talk = roles["text"] in talks
    if writes is None:
        writes = talk or ("answer" in roles and "label" not in roles)
    need = "answer" if writes and not talk else "label"
    if need not in roles and not (writes and talk):
        other = "fedloom init classify" if writes else "fedloom init instruct"
        remedy = f"no column is known to be the {need} ({describe_columns(raw)}); say which with --column {need}=NAME"
        raise Refused(
            "DATA", raw.where, f"{remedy}, or use `{other}`" if talk or {"answer", "label"} & set(roles) else remedy
        )
    roles = _useful_roles(raw, roles, columns, writes)
    needed = [name for role, name in roles.items() if not (writes and role in ("pair", "answer"))]
    gaps = sum(any(is_missing(raw.columns[name][row]) for name in needed) for row in range(row_count(raw)))
    settings = {"path": path, **{name: value for name, value in vars(how).items() if value is not None}}
    settings |= _source_columns(roles, writes, talk) | ({"missing": "drop"} if gaps else {})
    if tables.test is None:
        settings["test_share"] = SHARE if row_count(raw) - gaps >= FEW_ROWS else FEW_SHARE
    kind: type = Instructions if writes else Table
    split = cast(Source, make_value(kind, (), settings, "data", read_data)).load(0)
    guessed = {role: name for role, name in roles.items() if columns.get(role) != name}
    return TableFacts(kind, settings, gaps, split, guessed)


def _guessed_roles(raw: RawTable, chosen: Mapping[str, str]) -> dict[str, str]:
    """Guess columns by their names; where none is named like a text, or a label or an answer, by what they hold. Raises Refused."""
    texts, labels = _columns_of_texts(raw), _columns_of_labels(raw)
    try:
        roles = guess_columns(raw, chosen)
    except Refused:
        if "text" in chosen or len(texts) != 1:
            raise
        roles = guess_columns(raw, {**chosen, "text": texts[0]})
    labels = [name for name in labels if name not in roles.values()]
    if len(labels) == 1 and not {"label", "answer"} & {*roles}:
        roles["label"] = labels[0]
    return roles


def _columns_of_texts(raw: RawTable) -> list[str]:
    """The columns whose cells are long on average, and at least twice as long as those of any other."""
    lengths = {name: mean([len(str(cell or "")) for cell in cells] or [0]) for name, cells in raw.columns.items()}
    most = max(lengths.values(), default=0)
    return [name for name, length in lengths.items() if length >= FEWEST_LETTERS and 2 * length > most]


def _columns_of_labels(raw: RawTable) -> list[str]:
    """The columns with few values, each of which stands in several rows on average."""
    values = {name: {*map(str, cells)} for name, cells in raw.columns.items()}
    return [
        name for name, found in values.items() if 2 <= len(found) <= MOST_CLASSES and 3 * len(found) <= row_count(raw)
    ]


def _useful_roles(raw: RawTable, roles: Mapping[str, str], chosen: Mapping[str, str], writes: bool) -> dict[str, str]:
    """Return the roles that the task has, without guessed ones that would cost rows.

    Guessed clients have to be several, with several rows each; a guessed second text of a classifier has to be in each row.
    """
    owners = (
        [identity(cell) for cell in raw.columns[roles["client"]] if not is_missing(cell)] if "client" in roles else []
    )
    needless = {
        "answer": not writes,
        "client": len(set(owners)) < 2 or 2 * len(set(owners)) > len(owners),
        "pair": not writes and "pair" in roles and any(map(is_missing, raw.columns[roles["pair"]])),
    }
    return {role: name for role, name in roles.items() if role in chosen or not needless.get(role)}


def _source_columns(roles: Mapping[str, str], writes: bool, talk: bool) -> dict[str, str]:
    if not writes:
        return dict(roles)
    if talk:
        return {
            "messages": roles["text"],
            **{k: roles[r] for r, k in (("client", "client"), ("label", "kind")) if r in roles},
        }
    return {FIELDS.get(role, role): name for role, name in roles.items()}


# The file ---------------------------------------------------------------------------------------------------------------


def run_file_text(facts: TableFacts, name: str, model: ModelChoice, sites: bool, heading: Sequence[str]) -> str:
    """Write the run file of a table.

    Args:
        facts: what the table holds.
        name: name of the run.
        model: the base model.
        sites: whether it is for a deployment.
        heading: lines of comment to begin with.

    Raises Refused where the run would not divide the data.
    """
    lines = [
        *(f"# {printable(line, lines=False)}".rstrip() for line in heading),
        "",
        *_top(facts, name, model.name),
        *_data(facts),
    ]
    lines += [*_partition(facts), *_schedule(facts, sites), *_work(facts, model, sites), *_limits(facts, sites)]
    text = "\n".join(lines) + "\n"
    _check_divides(parse_run(text), facts.split)
    return text


def site_fields(facts: TableFacts) -> dict[str, Any]:
    """Return how a site reads a table like this one: fields of `site.toml`."""
    alone = ("client", "kind", "test_share", "path")  # a site is one client, and tests on what it holds out
    return {"path": "my-table.csv", **{name: value for name, value in facts.settings.items() if name not in alone}}


def _check_divides(run: Run, split: Split) -> None:
    """Raise Refused where the partition of a run does not fit the data."""
    parts = run.partition.split(split.train, run.seed)
    hold_out(parts, split.train, run.held_out, partial(simulated_secret, run.seed))


def _entry(key: str, value: object, comment: str = "") -> str:
    """Write a line of TOML, whose text and lists of text are those of JSON."""
    line = f"{key} = {toml_text(value)}"
    return f"{line:34s}  # {comment}" if comment else line


def _top(facts: TableFacts, name: str, model: str) -> Iterator[str]:
    yield _entry("name", name, "of the run folder: runs/NAME-001")
    yield "# The model that is fine-tuned: a folder, or a name on the Hugging Face hub."
    yield _entry("model", model)
    yield _entry("seed", 0, "the same seed gives the same bytes")
    yield _entry("device", "auto", "a GPU if there is one, else the CPU")
    if len(facts.split.test) > 2 * (most := 64 if facts.writes else 500):
        yield _entry("test_limit", most, f"test examples that score a version, of {len(facts.split.test)}")


def _data(facts: TableFacts) -> Iterator[str]:
    comments = {
        "path": f"{facts.rows} examples",
        "client": f"whose row it is: {facts.clients} clients",
        "missing": f"rows with empty cells are left out: {facts.gaps}",
        "test_share": "set aside to score on; no client sees it",
        "kind": "kind of task, for partitions by label",
    }
    if not facts.writes:
        comments["label"] = f"{len(facts.split.train.names)} labels"
    guessed = {FIELDS.get(role, role) if facts.writes else role for role in facts.guessed}
    yield from (
        "",
        "[data]",
        _entry("type", facts.source.__name__, "requests with answers" if facts.writes else "labelled texts"),
    )
    for key, value in facts.settings.items():
        parts = [comments.get(key, ""), "guessed" if key in guessed else ""]
        yield _entry(key, value, ", ".join(filter(None, parts)))


def _partition(facts: TableFacts) -> Iterator[str]:
    if facts.clients:
        yield from ("", "[partition]", _entry("type", "ByClient", "clients as the data name them"))
        return
    size = len(facts.split.train)
    clients = max(2, min(MOST_CLIENTS, size // ROWS_A_CLIENT))
    skewed = not facts.writes and size >= ROWS_A_CLIENT * clients
    yield from (
        "",
        "# The data name no clients, so they are made up; a column that names them: client = ... in [data].",
        "[partition]",
    )
    if not skewed:
        yield from (_entry("type", "IID", "all alike"), _entry("clients", clients))
        return
    yield _entry("type", "LabelDirichlet", "each client has other shares of the labels")
    yield from (_entry("clients", clients), _entry("alpha", 1.0, "the smaller, the more uneven"))


def _schedule(facts: TableFacts, sites: bool) -> Iterator[str]:
    if sites:
        yield from ("", "[schedule]", _entry("type", "FedFa", "nobody waits for the slowest site"), _entry("window", 4))
        return
    clients = facts.clients or MOST_CLIENTS
    yield from ("", "[schedule]", _entry("type", "Rounds", "or FedBuff, FedAsync, FedFa, Immediate"))
    yield _entry("cohort_size", min(2 if facts.writes else 4, clients), "clients that train in a round")


def _work(facts: TableFacts, model: ModelChoice, sites: bool) -> Iterator[str]:
    size, batch = len(facts.split.train), 4 if facts.writes else 16
    largest = max(Counter(facts.split.train.clients).values()) if facts.split.train.clients else size / 2
    steps = max(2, min(8, ceil(largest / batch)))
    if sites:  # as many rows as sites ask for by default, so that no single one can be told
        batch = max(batch, 8)
        steps = ceil(ROWS_A_TASK / batch)
    yield from ("", "[plan]", _entry("local_steps", steps, "optimiser steps of a client in a round"))
    if model.top_blocks is not None:
        yield from (
            "",
            "# Several times faster on a CPU; leave these two tables out to train all blocks.",
            "[plan.depth]",
        )
        yield from (
            _entry("type", "FixedDepth"),
            _entry("depth", model.top_blocks, "blocks that are trained, from the top"),
        )
        yield from ("", "[lora]", _entry("target_modules", "all-linear"))
    yield from ("", "[training]", _entry("learning_rate", model.learning_rate, "a large model needs a smaller one"))
    yield _entry("batch_size", batch)
    if _longest(facts.split) > LONG_TEXT:
        yield _entry("max_length", 256, "tokens; what is longer is cut, see --dry-run")


def _limits(facts: TableFacts, sites: bool) -> Iterator[str]:
    versions = 8 if facts.writes else 10
    yield from ("", "[limits]", _entry("versions", versions, "of the global model; the run ends then"))
    yield _entry("evaluate_every", 2, "so many versions; each costs a pass over the test examples")
    test = len(facts.split.test)
    if sites and test >= FEW_ROWS:
        yield from (
            "",
            "# Each version is tried on these test examples before it is published; answers that harm it are set aside.",
        )
        yield from ("[canary]", _entry("examples", min(200, test // 4)))


def _longest(split: Split) -> int:
    some = split.train
    texts = zip(some.texts, some.pairs or ("",) * len(some), some.answers or ("",) * len(some), strict=True)
    return max((sum(map(len, parts)) for parts in texts), default=0)
