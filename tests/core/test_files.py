"""Files: run folders are never overwritten, files are written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedloom.core import files
from fedloom.core.errors import Refused


def test_a_folder_is_made_with_its_parents_or_taken_if_empty(tmp_path: Path) -> None:
    place = files.create_folder(tmp_path / "a" / "b")
    assert place.is_dir()
    assert files.create_folder(place) == place


def test_what_exists_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(Refused, match="exists already"):
            files.create_folder(taken)
    assert (tmp_path / "file").read_text() == "mine"


def test_free_is_the_first_number_that_is_not_taken(tmp_path: Path) -> None:
    assert files.numbered_path(tmp_path, "run").name == "run-001"
    (tmp_path / "run-001").mkdir()
    (tmp_path / "run-003").write_text("")
    assert files.numbered_path(tmp_path, "run").name == "run-002"
    (tmp_path / "run-other-004").mkdir()
    (tmp_path / "run-x").mkdir()
    latest = files.latest_path(tmp_path, "run")
    assert latest is not None
    assert latest.name == "run-003"
    assert files.latest_path(tmp_path, "nobody") is None


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    files.write_json(path, {"who": "Zoë"})
    with pytest.raises(TypeError):
        files.write_json(path, {"who": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"who": "Zoë"}
    assert list(tmp_path.iterdir()) == [path]
