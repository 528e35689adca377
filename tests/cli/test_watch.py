"""`fedloom watch` refuses what is no run, before it listens anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedloom.cli.watch import require_one_run, watching
from fedloom.core.errors import Refused
from tests.support.fake_runs import write_run


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", write_run(tmp_path / "run") / "metrics.jsonl"):
        with pytest.raises(Refused, match="give a run folder"):
            require_one_run(folder)


def test_of_several_runs_one_has_to_be_named(tmp_path: Path) -> None:
    """As in the folders of a demo and of a sweep."""
    for name in ("fedit", "hlora"):
        write_run(tmp_path / "demo" / name)
    with pytest.raises(Refused, match="several runs; give the folder of one: fedit, hlora"):
        require_one_run(tmp_path / "demo")


def test_runs_and_deployments_are_taken_also_before_they_begin(tmp_path: Path) -> None:
    write_run(tmp_path / "server" / "run")
    (tmp_path / "empty").mkdir()
    for name in ("server", "server/run", "empty"):
        require_one_run(tmp_path / name)


def test_without_the_option_nothing_is_served(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with watching(False, tmp_path / "run"):
        pass
    assert capfd.readouterr() == ("", "")
