"""`fedloom init`: a commented run file for a table, which runs as it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.cli.console import notes, out
from fedloom.cli.options import ClientColumn, Columns, Reading, file_format, named_columns
from fedloom.core.errors import Refused
from fedloom.core.text import did_you_mean

if TYPE_CHECKING:
    from fedloom.runs.run_template import ModelChoice, TableFacts

KINDS = ("classify", "instruct", "deploy")
OWN_RATE, RATE = 5e-3, 1e-3
"""Learning rate of the small models that are taken where none is named, and of any other model, also in a deployment."""
TOP_BLOCKS = 2
"""Blocks that are trained of the small language model, which has thirty."""


def init_command(  # they are its options
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="[classify|instruct|deploy]",
            help="What to make: a run that classifies texts, one that writes answers, or a deployment with its sites' settings. "
            "Left out: as the columns say.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Argument(metavar="DATA", help="A table (CSV, JSON, Excel, Parquet, Arrow or a saved data set)."),
    ] = None,
    clients: ClientColumn = None,
    columns: Columns = None,
    read: Reading = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The base model: a folder, or a name on the Hugging Face hub."),
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="The run file to write, by default named as the table; with deploy the folder. Must not exist yet.",
        ),
    ] = None,
) -> None:
    """Write a run file for a table: text in TOML with comments, which runs as it is.

    Columns are guessed by their names, else by what they hold, and what the table needs is written down: how it is read, empty cells,
    clients, a share to test on. With [bold]deploy[/bold] a folder is written: the run file of the server, and
    site.toml, the settings of a site.

    Example: [bold]fedloom init classify notes.csv --column label=diagnosis[/bold], then [bold]fedloom run notes.toml[/bold]
    """
    if data is None and kind not in KINDS:
        kind, data = None, kind
    if data is None:
        raise Refused("DATA", "", "name a table, such as `fedloom init notes.csv`")
    if kind is not None and kind not in KINDS:
        near = did_you_mean(kind, KINDS)
        raise Refused("init", kind, " ".join(filter(None, [near, f"choose {', '.join(KINDS)}, or leave it out"])))
    from fedloom.runs.run_template import examine_table

    writes = {"classify": False, "instruct": True}.get(kind or "")
    facts = examine_table(data, named_columns(clients, columns or []), file_format(read or []), writes)
    stem = Path(data).name.partition(".")[0] or "run"
    if kind == "deploy":
        _write_deployment(facts, stem, model, target or Path(f"{stem}-deployment"))
    else:
        _write_run_file(facts, stem, model, target or Path(f"{stem}.toml"))


def _write_run_file(facts: TableFacts, name: str, model: str | None, file: Path) -> None:
    from fedloom.core.files import require_vacant
    from fedloom.runs.run_template import run_file_text

    if file.suffix.lower() != ".toml":
        raise Refused("--out", str(file), "a run file that init writes is TOML; name it with .toml")
    require_vacant(file)
    base, note = _base_model(facts, model)
    heading = [
        f"Run file for {facts.settings['path']}, written by `fedloom init`. It is TOML: reading it executes nothing.",
        "",
        f"  fedloom run {file} --dry-run     what it will cost, before anything is trained",
        f"  fedloom run {file}               the run itself, with a report at its end",
        "",
        "One value changed, this time:    --set training.learning_rate=1e-3",
        "All fields:                      docs/reference/runs.md, or help(fedloom.Run) in Python",
    ]
    text = run_file_text(facts, name, base, sites=False, heading=heading)
    file.write_text(text, encoding="utf-8")
    for line in (*_notes(facts), note):
        notes.print(line, soft_wrap=True)
    out.print(f"\nRun file  {file}\nNext      fedloom run {file} --dry-run", soft_wrap=True)


def _base_model(facts: TableFacts, model: str | None) -> tuple[ModelChoice, str]:
    """Return the base model, and a note on where it comes from."""
    from fedloom.runs.run_template import ModelChoice
    from fedloom.train.demo_model import MINILM, SMOLLM2, minilm, smollm2

    if model is not None:
        return ModelChoice(model, RATE), f"Model {model}, as given."
    package, find = (SMOLLM2, smollm2) if facts.writes else (MINILM, minilm)
    try:
        name, place = str(find()), "as installed here"
    except Refused:
        name, place = package.hub, "which the first run downloads"
    choice = ModelChoice(name, OWN_RATE, TOP_BLOCKS if facts.writes else None)
    return choice, f"Model {package.hub}, {place}; --model NAME takes another one."


def _notes(facts: TableFacts) -> Iterator[str]:
    """Say how the table was read, and what is doubtful about it."""
    from fedloom.data import data_checks

    columns = ", ".join(f"{role} from “{name}”" for role, name in facts.guessed.items())
    yield f"Read {facts.settings['path']}: {facts.rows} examples" + (f"; guessed: {columns}." if columns else ".")
    yield from facts.split.notes
    if not facts.writes:
        yield from data_checks.label_sentences(facts.split.train)
    yield from data_checks.repeat_sentences(facts.split.train)


def _write_deployment(facts: TableFacts, name: str, model: str | None, folder: Path) -> None:
    from fedloom.core.files import create_folder, require_vacant
    from fedloom.deploy.site.export_sites import site_template
    from fedloom.runs.run_template import run_file_text, site_fields
    from fedloom.runs.toml_run import parse_run

    require_vacant(folder)
    base, note = _base_model(facts, model)
    base = replace(base, learning_rate=RATE, top_blocks=None)
    run_file, site_file = folder / "run.toml", folder / "site.toml"
    heading = [
        "Run file of a deployment, written by `fedloom init`. It is TOML: reading it executes nothing.",
        "",
        f"  fedloom up {run_file} --sites 2      server and sites on this machine, to try it",
        f"  fedloom keys new {folder / 'server'} --host fed.example.org",
        f"  fedloom serve {run_file} --folder {folder / 'server'} --clients 3",
        "",
        "The server scores with the test examples of [data]; its other rows stay unused, for the sites have their own.",
        "All steps: docs/deployment.md. All fields: docs/reference/runs.md",
    ]
    text = run_file_text(facts, name, base, sites=True, heading=heading)
    site = site_template(parse_run(text), facts.split.train, site_fields(facts))
    create_folder(folder)
    run_file.write_text(text, encoding="utf-8")
    site_file.write_text(site, encoding="utf-8")
    for line in (*_notes(facts), note):
        notes.print(line, soft_wrap=True)
    out.print(
        f"\nServer  {run_file}\nSites   {site_file}: a copy for each, to be completed by its owner", soft_wrap=True
    )
    out.print(f"Next    fedloom up {run_file} --sites 2", soft_wrap=True)
