"""The door to the terminal: no control character of others passes, whatever prints it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedloom.cli.console import SafeConsole, print_traceback
from fedloom.cli.status import status_view
from fedloom.deploy.json_log import JsonLines
from tests.attacks.files import EVIL, has_control, reaches_terminal

STATUS = {
    "run": EVIL,
    "version": 1,
    "versions": 3,
    "seconds": 1.0,
    "incarnation": 1,
    "state": EVIL,
    "waits": EVIL,
    "at": 0.0,
    "accepted": 1,
    "rejected": 0,
    "failed": 0,
    "mean_staleness": None,
    "scores": {EVIL: 0.5},
    "clients": {
        EVIL: {"reached": True, "answers": 1, "task": None, "since": None, "rank": 2, "stale": None, "why": EVIL}
    },
    "set_aside": {EVIL: EVIL},
    "ended": "",
    "calls_refused": {EVIL: 2},
    "traffic": {"bytes_down": 1, "bytes_up": 1, "resent": 0},
}


def in_table(console: Console) -> None:
    table = Table(title=EVIL)
    table.add_column(EVIL)
    table.add_row(EVIL)
    table.add_row(Text(EVIL, "red"))
    console.print(table)


@pytest.mark.parametrize(
    "show",
    [
        lambda console: console.print(EVIL),
        lambda console: console.print(EVIL, soft_wrap=True),
        lambda console: console.print(Text.assemble((EVIL, "bold"), EVIL)),
        lambda console: console.print(status_view(STATUS, 100.0)),
        in_table,
    ],
    ids=["text", "long line", "coloured", "status", "table"],
)
def test_what_others_wrote_is_shown_as_escapes(show: object) -> None:
    assert not reaches_terminal(show)  # type: ignore[arg-type]
    assert reaches_terminal(show, Console)  # type: ignore[arg-type]  # the control: rich lets it through


def test_marks_in_a_text_are_text() -> None:
    console = SafeConsole(width=100, force_terminal=True)
    with console.capture() as said:
        console.print("[link=http://evil]x[/link] [/bold] :smile:")
    assert said.get() == "[link=http://evil]x[/link] [/bold] :smile:\n"


def test_one_line_of_a_status_stays_one_line() -> None:
    console = SafeConsole(width=500)
    with console.capture() as plain:
        console.print(status_view({**STATUS, "waits": "x"}, 0.0))
    with console.capture() as forged:
        console.print(status_view({**STATUS, "waits": "x\nScores accuracy 1"}, 0.0))
    assert forged.get().count("\n") == plain.get().count("\n")


def test_a_log_line_says_the_same_to_a_reader_and_nothing_to_a_terminal() -> None:
    record = logging.LogRecord("fedloom", logging.WARNING, "", 0, "refused: %s", (EVIL,), None)
    line = JsonLines().format(record)
    assert not has_control(line)
    assert json.loads(line)["message"] == f"refused: {EVIL}"


def test_an_error_that_nobody_expected_is_printed_in_the_same_way(capsys: pytest.CaptureFixture[str]) -> None:
    error = ValueError(EVIL)
    print_traceback(ValueError, error, None)
    assert not has_control(capsys.readouterr().err)


def test_no_module_makes_a_console_of_its_own() -> None:
    cli = Path(__file__).parents[2] / "src" / "fedloom"
    makes = [path.name for path in cli.rglob("*.py") if " Console(" in path.read_text("utf-8")]
    assert makes == []
