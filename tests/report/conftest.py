"""Fake run folders, and the page of a finished one, drawn once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedloom.report.page import write_report
from tests.support.fake_runs import write_run

Fake = Callable[..., Path]


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    """Writes a run folder below the test's own folder; the arguments are those of `write_run`."""

    def make(folder: str = "run", **options: Any) -> Path:
        return write_run(tmp_path / folder, **options)

    return make


@pytest.fixture(scope="session")
def finished_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a finished run, alone in a folder that was made for it."""
    folder = tmp_path_factory.mktemp("finished")
    return write_report([write_run(folder / "run")], folder / "new" / "report.html")
