"""`fedloom watch`: a page in the browser that follows a run; `--watch` of the commands that carry one out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.console import err, out
from fedloom.core.errors import Refused
from fedloom.core.text import list_some


def watch_command(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="A run folder; or the folder of [bold]fedloom serve[/bold] or [bold]fedloom up[/bold].",
            show_default=False,
        ),
    ],
    port: Annotated[
        int | None,
        typer.Option(
            "--port",
            metavar="N",
            min=1,
            max=65535,
            help="Port of this machine; by default the first free one from 8765.",
        ),
    ] = None,
    browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Follow a run on a page in the browser: scores, clients, staleness, bytes, time left, refusals and events.

    It shows a finished run as well. The page is served to this machine only, under an address with a random token that is printed.
    From another machine, use a tunnel: [bold]ssh -L 8765:127.0.0.1:8765 HOST[/bold]. Ctrl-C ends the page, and not the run.

    Example: [bold]fedloom watch runs/mine[/bold]
    """
    from fedloom.report.live.server import reserve_address, serve_page

    require_one_run(folder)
    address = reserve_address(port)
    out.print(f"Watch    {address.url}\nCtrl-C ends the page, and not the run.", soft_wrap=True)
    if browser:
        import webbrowser

        webbrowser.open(address.url)
    try:
        serve_page(folder, address)
    except KeyboardInterrupt:
        out.print("The page is closed.")


def require_one_run(folder: Path) -> None:
    """Raise Refused for what is no folder, and for one with several runs in it, such as that of a sweep or a demo."""
    if not folder.is_dir():
        raise Refused("DIR", str(folder), "give a run folder, or the folder of a deployment")
    inside = sorted(path.parent.name for path in folder.glob("*/manifest.json"))
    if inside not in ([], ["run"]) and not (folder / "manifest.json").exists():
        raise Refused("DIR", str(folder), f"it holds several runs; give the folder of one: {list_some(inside, 3)}")


@contextmanager
def watching(wanted: bool, folder: Path) -> Iterator[None]:
    """Serve the page about a folder during the block if that is wanted; its address is printed on stderr, as progress is."""
    if not wanted:
        yield
        return
    from fedloom.report.live.server import page_process

    with page_process(folder) as url:
        err.print(f"Watch    {url}", soft_wrap=True)
        yield
