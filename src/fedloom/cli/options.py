"""Options and arguments that several commands have, each with one name, one metavar and one text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.cli.console import notes, out
from fedloom.core.errors import Refused

if TYPE_CHECKING:
    from fedloom.data.delimited import FileFormat

RunFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="A run file: Python that ends with `run = Run(...)`, or TOML.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.")]


def _only_json(chosen: bool) -> bool:
    out.quiet, notes.stderr = out.quiet or chosen, notes.stderr or chosen
    return chosen


AsJson = Annotated[
    bool,
    typer.Option("--json", callback=_only_json, help="Print the answer as one JSON object; all else goes to stderr."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Replace a field of the run, for example schedule.cohort_size=5; may be repeated.",
    ),
]
OutDir = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The folder to write; must not exist yet.")]
Seed = Annotated[
    int | None, typer.Option("--seed", metavar="N", help="The seed of the run: the same seed gives the same bytes.")
]

TrackerNames = Annotated[
    list[str] | None,
    typer.Option(
        "--to",
        metavar="NAME",
        help="A tracker that gets the figures, too: [bold]tensorboard[/bold] (files in the run folder) or [bold]mlflow[/bold]; "
        "[bold]NAME:PLACE[/bold] for another folder, database or server. May be repeated.",
    ),
]

WorkerPool = Annotated[
    str,
    typer.Option(
        metavar="WORKERS",
        help="Where clients are trained. [bold]1[/bold]: in this process. [bold]2[/bold] or more: in so many processes with one "
        "copy of the base model in memory, each with the run's number of threads; they take seconds to start. [bold]ray[/bold] or "
        "[bold]ray:ADDRESS[/bold]: on a Ray cluster, with as many actors as it has room for ([bold]4@ray[/bold]: with four). The "
        "results do not depend on it, but for the last digits where the run leaves its threads open: processes share the cores.",
    ),
]
Watch = Annotated[
    bool, typer.Option("--watch", help="Follow the run on a page in the browser, as [bold]fedloom watch[/bold] does.")
]
Insecure = Annotated[
    bool,
    typer.Option("--insecure", help="Without TLS and keys, to try things on one machine: loopback addresses only."),
]
ServerFolder = Annotated[Path, typer.Option("--folder", metavar="DIR", help="The server's folder.")]
Quota = Annotated[
    int | None,
    typer.Option(
        "--quota", metavar="MB", min=1, help="Megabytes of answers that a site may send a day (default 34000)."
    ),
]
ClientColumn = Annotated[
    str | None, typer.Option("--clients", metavar="COLUMN", help="The column that names the client of each row.")
]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--column", metavar="WHAT=NAME", help="Say what a column is: text, pair, answer or label; may be repeated."
    ),
]
Reading = Annotated[
    list[str] | None,
    typer.Option(
        "--read",
        metavar="WHAT=VALUE",
        help="Say how to read the table: separator, encoding, quoted, sheet_name or query; may be repeated.",
    ),
]


def named_columns(clients: str | None, columns: Sequence[str]) -> dict[str, str]:
    """Return the column of each role that is named in `--clients` and `--column`. Raises Refused."""
    return ({} if clients is None else {"client": clients}) | _pairs("--column", columns)


def file_format(reading: Sequence[str]) -> FileFormat:
    """Return the settings of `--read`. Raises Refused."""
    from fedloom.data.delimited import FileFormat

    how = _pairs("--read", reading)
    known = FileFormat.__dataclass_fields__
    for what, value in how.items():
        if what not in known:
            raise Refused("--read", f"{what}={value}", f"say how to read it: one of {', '.join(known)}")
    if how.get("quoted", "true").lower() not in ("true", "false"):
        raise Refused("--read", f"quoted={how['quoted']}", "write quoted=true or quoted=false")
    quoted = {"quoted": how["quoted"].lower() == "true"} if "quoted" in how else {}
    return FileFormat(**{**how, **quoted})  # type: ignore[arg-type]


def _pairs(option: str, given: Sequence[str]) -> dict[str, str]:
    """Return the settings WHAT=VALUE of an option that may be repeated."""
    pairs = [setting.partition("=") for setting in given]
    for what, equals, _ in pairs:
        if not equals:
            raise Refused(option, what, f"write it as WHAT={'NAME' if option == '--column' else 'VALUE'}")
    return {what: value for what, _, value in pairs}
