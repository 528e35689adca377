"""The line that says how far a run is: written again in a terminal, once in a file."""

from __future__ import annotations

import io
import sys

import pytest

from fedloom.runs import progress
from fedloom.runs.progress import show_line


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def show_until_error() -> None:
    with show_line() as show:
        show("first" + "." * 200)
        show("last")
        raise KeyError


@pytest.mark.parametrize("terminal", [True, False])
def test_the_last_state_is_always_shown_and_those_before_only_in_a_terminal(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream(terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "SHOWN_EVERY", 0.0)
    with pytest.raises(KeyError):
        show_until_error()
    written = stream.getvalue()
    assert written.endswith("\n")
    assert ("first" in written) == terminal
    lines = written[:-1].split("\r")
    assert lines[-1].strip() == "last"
    assert all(len(line) < 80 for line in lines)


def test_a_terminal_is_not_flooded(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(terminal=True)
    monkeypatch.setattr(sys, "stderr", stream)
    with show_line() as show:
        for number in range(1000):
            show(f"{number}")
    assert stream.getvalue().count("\r") < 20
    assert stream.getvalue().split("\r")[-1].strip() == "999"
