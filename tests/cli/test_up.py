"""The screen of `fedloom up` fits every terminal, and shows what was printed last."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedloom.cli.main import app
from fedloom.cli.up import FederationScreen
from fedloom.core.errors import Refused


def drawn(screen: FederationScreen, width: int, height: int) -> list[str]:
    console = Console(width=width, height=height, file=StringIO(), force_terminal=True, color_system=None)
    console.print(screen)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("sites", "width", "height"), [(1, 80, 24), (2, 80, 24), (2, 200, 60), (5, 60, 40), (8, 80, 50)]
)
def test_it_fits_and_shows_the_last_line_of_each(tmp_path: Path, sites: int, width: int, height: int) -> None:
    names = [f"c{number:02d}" for number in range(sites)]
    screen = FederationScreen(names, tmp_path)
    for count in range(100):
        for name in ("server", *names):
            screen.add(name, f"21:00:{count % 60:02d} line {count} of {name} and some words more")
    lines = drawn(screen, width, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).replace("│", " ").split())
    for name in ("server", *names):
        assert f"line 99 of {name}" in text
        assert f"line 3 of {name}" not in text


def test_what_a_process_prints_moves_no_cursor(tmp_path: Path) -> None:
    screen = FederationScreen(["c00"], tmp_path)
    screen.add("c00", "21:00:00 \x1b[2Jgone\u202e")
    assert "\x1b[2J" not in "".join(drawn(screen, 80, 24))


@pytest.mark.parametrize(
    "words", [[], ["a.py", "--resume", "x"], ["--resume", "x", "--set", "seed=2"], ["--resume", "x"]]
)
def test_what_contradicts_itself_is_refused(tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["up", *words], standalone_mode=False)
    assert isinstance(done.exception, Refused)
    assert not [*tmp_path.iterdir()]
