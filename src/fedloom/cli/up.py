"""`fedloom up`: a whole federation on this machine, its server and its sites side by side on the screen."""

from __future__ import annotations

import shlex
import textwrap
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fedloom.cli.console import command_name, notes, out
from fedloom.cli.options import Settings, Watch
from fedloom.cli.status import score_words
from fedloom.cli.watch import watching
from fedloom.core.errors import Refused
from fedloom.core.text import printable

if TYPE_CHECKING:
    from fedloom.deploy.flower.local_federation import LocalFederation, Show

KEPT_LINES = 40
"""Lines of each process that may be on the screen."""
NARROWEST = 38
"""Columns of a site's panel, at least, where several stand side by side."""
MOST_SITES = 32
SHOWN_SCORES = ("accuracy", "perplexity", "base_accuracy")
TALLEST = 14
"""Rows of the server's panel, at most."""


def up_command(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="A run file: Python that ends with `run = Run(...)`, or TOML."),
    ] = None,
    sites: Annotated[int, typer.Option("--sites", metavar="N", min=1, max=MOST_SITES, help="Sites to start.")] = 2,
    settings: Settings = None,
    out_dir: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="The folder to write; must not exist yet. (default: runs/NAME-up-001)"
        ),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="DIR", help="Continue the federation in this folder.")
    ] = None,
    watch: Watch = False,
) -> None:
    """Try a run as a real federation on this machine: a server and sites, with TLS and keys, in one command.

    The run's data are divided over the sites as its partition says, and each site gets the limits that the run needs. The processes
    are those of [bold]fedloom serve[/bold] and [bold]fedloom join[/bold], on loopback. They end when the run has ended, or with
    Ctrl-C; [bold]--resume DIR[/bold] continues.

    README.md in the folder says how the server and each site move to hosts of their own.

    Example: [bold]fedloom up experiments/tickets.py --sites 2[/bold]
    """
    import os

    from fedloom.core import files
    from fedloom.deploy.flower.local_federation import make_federation, read_federation, run_federation, run_folder
    from fedloom.deploy.start import finish_reason

    if (file is None) == (resume is None):
        raise Refused("FILE", str(file or ""), "give a run file, or --resume DIR alone to continue a federation")
    if resume is not None:
        if settings or out_dir:
            raise Refused(
                "--resume",
                str(resume),
                "it continues as it was made, in its own folder; leave out --set and --out",
            )
        folder, federation = resume, read_federation(resume)
    else:
        assert file is not None
        os.umask(0o077)  # the rows of the sites are its owner's alone, as with `fedloom join`
        folder = files.require_vacant(out_dir or files.numbered_path(Path("runs"), f"{file.stem}-up"))
        federation = make_federation(file, settings or [], sites, folder)
    run = run_folder(folder)
    if reason := finish_reason(run):
        out.print(f"The run has finished already: {reason}")
    else:
        _introduce(federation, folder)
        try:
            with watching(watch, folder), _shown(federation, folder) as show:
                run_federation(federation, folder, show)
        except KeyboardInterrupt:
            out.print(
                f"\nStopped. Continue with: {command_name()} up --resume {shlex.quote(str(folder))}", soft_wrap=True
            )
            raise
    out.print(f"\nReport   {run / 'report.html'}\nAdapter  {run / 'adapter'}", soft_wrap=True)
    out.print(f"Hosts    {folder / 'README.md'} says how server and sites move to hosts of their own", soft_wrap=True)


def _introduce(federation: LocalFederation, folder: Path) -> None:
    from fedloom.report.numbers import plural

    notes.print(
        f"A server and {plural(len(federation.sites), 'site')} on this machine, with TLS and keys, in {folder}",
        soft_wrap=True,
    )
    notes.print(
        "Each site accepts the terms of the run by itself, since this is a trial. They are in logs/ there.\n",
        soft_wrap=True,
    )


@contextmanager
def _shown(federation: LocalFederation, folder: Path) -> Iterator[Show]:
    """Return what shows a line of a process: in panels side by side on a terminal, else behind the name of the process."""
    screen = FederationScreen(federation.sites, folder / "server")
    if not notes.is_terminal:
        width = max(map(len, ("server", *federation.sites)))
        yield lambda name, line: notes.print(f"{name:{width}} | {printable(line, lines=False)}", soft_wrap=True)
        return
    from rich.live import Live

    with Live(screen, console=notes, refresh_per_second=4, vertical_overflow="crop"):
        yield screen.add


class FederationScreen:
    """What the server and the sites have printed last, in panels that fit the terminal."""

    def __init__(self, sites: Sequence[str], server: Path) -> None:
        """Args: the sites, by name, and the folder of the server."""
        self._sites, self._server = sites, server
        self._lines = {name: deque[str](maxlen=KEPT_LINES) for name in ("server", *sites)}

    def add(self, name: str, line: str) -> None:
        """Add a line of a process; empty ones are left out."""
        if line:
            self._lines[name].append(line)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the panel of the server, and below it those of the sites."""
        width, height = options.max_width, max(console.size.height - 1, 12)
        across = max(1, min(len(self._sites), width // NARROWEST))
        rows = -(-len(self._sites) // across)
        each = max(3, min((height * 2 // 3) // rows, 12))
        grid = Table.grid(expand=True)
        for _ in range(across):
            grid.add_column(ratio=1)
        panels = [self._panel(site, site, width // across, each) for site in self._sites]
        for row in range(rows):
            grid.add_row(*panels[row * across : (row + 1) * across])
        yield Group(
            self._panel("server", f"server{self._progress()}", width, min(TALLEST, max(5, height - rows * each))), grid
        )

    def _panel(self, name: str, title: str, width: int, height: int) -> Panel:
        """Return a panel with the last lines of a process that fit into it."""
        rows = [row for line in self._lines[name] for row in _wrapped(line, width - 4)]
        return Panel(Text("\n".join(rows[-(height - 2) :])), title=Text(title), title_align="left", height=height)

    def _progress(self) -> str:
        """Return the version and the scores of the run, as far as the server has written them."""
        from fedloom.deploy.server.status import read_status

        with suppress(Refused):
            status: Mapping[str, Any] = read_status(self._server)
            if not status["versions"]:
                return f": {status['state']}"
            scores = score_words({name: status["scores"].get(name) for name in SHOWN_SCORES})
            version = f"version {status['version']} of {status['versions']}"
            return ": " + ", ".join(filter(None, (status["state"], version, scores)))
        return ""


def _wrapped(line: str, width: int) -> list[str]:
    """Return a line of a process in rows of this width, the following ones set in below its first word.

    >>> _wrapped("21:30:09 task 3 answered", 18)
    ['21:30:09 task 3', '         answered']
    """
    text = printable(line, lines=False)
    inset = " " * (9 if text[2:3] == ":" and text[5:6] == ":" else 2)
    return textwrap.wrap(text, max(width, 18), subsequent_indent=inset) or [""]
