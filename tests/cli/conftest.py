"""The command line as a test calls it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fedloom.cli import main
from tests.support.command_line import Fedloom


@pytest.fixture
def fedloom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fedloom:
    """The command in an empty folder: its exit code, and all that it said on one line."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int | str | None, str]:
        monkeypatch.setattr(sys, "argv", ["fedloom", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main.main()
        said = capsys.readouterr()
        return stop.value.code, " ".join((said.out + said.err).split())

    return call
