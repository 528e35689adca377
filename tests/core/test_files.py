"""Files: run folders are never overwritten, files are written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from fedloom.core import files
from fedloom.core.errors import Refused
from tests.attacks.files import KINDS, ODD_TEXTS, put


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


# Files of others -----------------------------------------------------------------------------------------------------


def precious(tmp_path: Path) -> Path:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    return victim


@pytest.mark.parametrize("mode", ["rb", "r+b", "ab"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "second name"])
def test_only_a_regular_file_is_opened(tmp_path: Path, kind: str, mode: files.OpenMode) -> None:
    victim, place = precious(tmp_path), tmp_path / "run" / "trace.jsonl"
    put(kind, place, victim)
    with pytest.raises(Refused, match="is not opened"):
        files.open_regular(place, mode)
    assert victim.read_text() == "precious"
    assert not (tmp_path / "made").exists()


def test_a_file_with_a_second_name_is_read_and_not_written(tmp_path: Path) -> None:
    victim, place = precious(tmp_path), tmp_path / "run" / "trace.jsonl"
    put("second name", place, victim)
    assert files.read_regular(place) == b"precious"
    for mode in ("r+b", "ab"):
        with pytest.raises(Refused, match="second name"):
            files.open_regular(place, mode)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_written_in_the_place_of_a_link_and_not_through_it(tmp_path: Path, kind: str) -> None:
    victim, place = precious(tmp_path), tmp_path / "run" / "manifest.json"
    for taken in (place, place.with_suffix(files.DRAFT)):
        put(kind, taken, victim)
        if kind == "folder":
            with pytest.raises(Refused, match="a folder"):
                files.write_json(place, {"a": 1})
            shutil.rmtree(taken)
            continue
        files.write_json(place, {"a": 1})
        assert files.read_json(place) == {"a": 1}
        assert victim.read_text() == "precious"
        place.unlink()
        assert list(place.parent.iterdir()) == []


def test_a_folder_inside_is_a_real_one(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "updates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Refused, match="where a folder belongs"):
        files.sub_folder(tmp_path / "updates")
    assert files.sub_folder(files.sub_folder(tmp_path / "real")).is_dir()


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_a_private_folder_is_private_and_so_is_what_is_made_in_it(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        inner = files.sub_folder(files.private_folder(tmp_path / "a" / "b") / "c")
        files.write_json(inner / "value.json", {})
        files.open_regular(inner / "log", "ab").close()
    finally:
        os.umask(before)
    made = {path: path.stat().st_mode & 0o777 for path in (tmp_path / "a").rglob("*")}
    assert all(mode == (0o700 if path.is_dir() else 0o600) for path, mode in made.items())


def test_a_folder_that_was_open_becomes_private(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o755)
    assert files.private_folder(tmp_path / "state").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("text", [*ODD_TEXTS, "\xff"])
def test_json_that_is_none_is_refused_whatever_it_is(tmp_path: Path, text: str) -> None:
    (tmp_path / "file.json").write_bytes(text.encode("latin-1" if text == "\xff" else "utf-8", "surrogatepass"))
    with suppress(Refused):
        assert isinstance(files.read_json(tmp_path / "file.json"), dict)


def test_a_file_is_read_as_far_as_its_kind_may_be_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(10**13)
    with pytest.raises(Refused, match="larger than"):
        files.read_json(tmp_path / "huge")
    monkeypatch.setattr(files, "LONGEST_LINE", 100)
    with pytest.raises(Refused, match="a line of more than"):
        list(files.read_lines(tmp_path / "huge"))
    assert list(files.read_lines(tmp_path / "missing")) == []


def test_without_locks_a_folder_is_refused_and_a_look_says_that_it_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def lacking(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", lacking)
    with files.open_regular(tmp_path / "trace.jsonl", "ab") as file:
        with pytest.raises(Refused, match="has no locks"):
            files.lock(file)
        assert not files.lock(file, shared=True)
