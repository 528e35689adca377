"""`fedloom status`: what a deployment is doing."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import ConsoleRenderable, Group
from rich.table import Table
from rich.text import Text

from fedloom.cli.console import out, print_json
from fedloom.cli.options import AsJson
from fedloom.core.text import printable
from fedloom.report.numbers import format_bytes, percent, plural, short

HEADINGS = {"counted": "examples", "since": "for s", "stale": "behind"}


def status_command(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The folder of [bold]fedloom serve[/bold] or [bold]fedloom up[/bold].")
    ],
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew every second, until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a deployment is doing: versions, which sites are connected and at work, staleness, bytes, and why it waits."""
    import time

    from rich.live import Live

    from fedloom.deploy.flower.server_processes import is_serving
    from fedloom.deploy.server.config import CONFIG_FILE
    from fedloom.deploy.server.status import read_status

    inside = folder / "server"  # of `fedloom up`
    if not (folder / CONFIG_FILE).exists() and (inside / CONFIG_FILE).exists():
        folder = inside

    def now() -> ConsoleRenderable:
        written = read_status(folder)
        return status_view(written, time.time() - written["at"], is_serving(folder))

    if as_json:
        print_json({**read_status(folder), "serving": is_serving(folder)})
    elif not watch:
        out.print(now())
    else:
        with suppress(KeyboardInterrupt), Live(now(), console=out) as live:
            while True:
                time.sleep(1.0)
                live.update(now())


def status_view(status: Mapping[str, Any], age: float, alive: bool = True) -> Group:
    """Return the status of a deployment as the terminal shows it.

    Args:
        status: as `read_status` returns it.
        age: seconds since it was written.
        alive: whether the server's process is running.
    """
    traffic, scores = status["traffic"], status["scores"]
    restarts = f", {plural(status['incarnation'] - 1, 'restart')} of the server" if status["incarnation"] > 1 else ""
    state = status["state"] if alive or status["ended"] else "stopped"
    ended = f": {status['ended']}" if status["ended"] else ""
    lines: list[str | Text] = [Text.assemble((status["run"], "bold"), printable(f"  {state}{ended}", lines=False))]
    if status["waits"] and state != "stopped":
        lines.append(printable(f"Waiting {status['waits']}", lines=False))
    if state == "stopped":
        lines.append(Text("The server is not running; continue with: fedloom serve ... --resume", "yellow"))
    elif not status["ended"] and age > 60:
        lines.append(
            Text(f"The server has written nothing for {age:,.0f} s; see logs/serverapp.log in its folder", "yellow")
        )
    if status["state"] == "starting":
        return Group(*lines)
    lines += [
        f"Version {status['version']} of {status['versions']} after {status['seconds']:,.0f} s{restarts}",
        f"{plural(status['accepted'], 'answer')} accepted, {status['rejected']} refused, {plural(status['failed'], 'task')} failed; "
        f"mean staleness {status['mean_staleness'] or 0:g}",
        f"{format_bytes(traffic['bytes_down'])} down, {format_bytes(traffic['bytes_up'])} up, "
        f"{plural(traffic['resent'], 'task')} sent again",
    ]
    if scores:
        lines.append(printable(f"Scores: {score_words(scores)}", lines=False))
    if status["calls_refused"]:
        counts = ", ".join(f"{name} {calls}" for name, calls in status["calls_refused"].items())
        lines.append(printable(f"Calls refused: {counts}", lines=False))
    clients = status["clients"].items()
    why = [printable(f"{name}: {client['why']}", lines=False) for name, client in clients if client.get("why")]
    why += [printable(f"{name}: {what}", lines=False) for name, what in status["set_aside"].items()]
    return Group(*lines, _client_table(status["clients"]), *why)


def score_words(scores: Mapping[str, float | None]) -> str:
    """Return the scores of a version in words, the accuracy beside that of always answering the commonest label.

    >>> score_words({"accuracy": 0.585, "loss": 0.6777, "examples": 400, "base_accuracy": 0.5})
    'accuracy 58.5\xa0% (majority 50.0\xa0%), loss 0.678'
    """
    majority = scores.get("base_accuracy")
    words = []
    for name, value in scores.items():
        if value is None or name in ("examples", "base_accuracy"):
            continue
        beside = f" (majority {percent(majority)})" if name == "accuracy" and majority is not None else ""
        words.append(f"{name} {percent(value) if name == 'accuracy' else short(value)}{beside}")
    return ", ".join(words)


def _client_table(clients: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return a table with a row for each client, or region."""
    regions = any("rounds" in client for client in clients.values())
    keys = ("counted", "answers", "task", "since", "rank", *(("depth", "rounds", "steps") if regions else ()), "stale")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("region" if regions else "site", overflow="fold")
    for heading in keys:
        table.add_column(HEADINGS.get(heading, heading), justify="right", no_wrap=True)
    for name, client in clients.items():
        cells = (client[key] if isinstance(client.get(key), str) else _number(client.get(key)) for key in keys)
        table.add_row(name if client["reached"] else f"{name} (not connected)", *cells)
    return table


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"
