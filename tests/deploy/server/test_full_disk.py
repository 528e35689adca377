"""A full disk: what could not be written and what to do is told, and the run goes on when there is room. The kernel says no here."""

from __future__ import annotations

import errno
import json
import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedloom.core.errors import Refused
from fedloom.core.files import disk_full_error, write_json
from fedloom.deploy import start
from fedloom.deploy.flower import serve as serve_module
from fedloom.deploy.flower.app_outcome import AppOutcome, read_outcome, write_outcome
from fedloom.deploy.flower.serve import MOST_QUICK, ROOM, Serving, serve_deployment
from fedloom.deploy.flower.server_app import run_server_app
from fedloom.deploy.flower.server_processes import ServerSetup
from fedloom.deploy.flower.supervisor import free_port
from fedloom.runs import checkpoint
from fedloom.runs.prepare import prepare
from fedloom.runs.replay import replay
from tests.support.deployment_runs import folder_of, net_of, run_of
from tests.support.small_disk import crowd, small_disk

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/dev/full and tmpfs")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "small") as place:
        yield place


def test_a_full_disk_is_known_however_it_is_told(small: Path) -> None:
    ballast = crowd(small, 0)
    with pytest.raises(OSError, match=r"note\.json") as told:
        write_json(small / "note.json", {"a": 1})
    assert disk_full_error(told.value) is not None
    assert list(small.iterdir()) == [ballast]
    ballast.unlink()
    with pytest.raises(OSError, match=r"tensors\.safetensors") as told:  # safetensors has an error of its own
        checkpoint.write_checkpoint(small / "tensors.safetensors", {"a": torch.zeros(10**6)})
    assert told.value.errno == errno.ENOSPC
    assert [*small.iterdir()] == [], "the draft takes no room"
    try:
        try:
            raise told.value
        finally:
            raise ValueError("what came of it")
    except ValueError as error:
        found = disk_full_error(error)
        assert found is not None
        assert found.filename == str(small / "tensors.safetensors")
    assert disk_full_error(ValueError("no")) is None
    assert disk_full_error(PermissionError(errno.EACCES, "no")) is None


def test_the_last_word_finds_its_place_on_a_full_disk(small: Path) -> None:
    (small / "flower").mkdir()
    write_outcome(small, 1, AppOutcome(7))
    crowd(small, 0)
    word = AppOutcome(7, full=f"{small}/run/checkpoint.safetensors")
    write_outcome(small, 1, word)
    assert read_outcome(small, 1) == word
    write_outcome(small, 1, AppOutcome(7, reason="over"))
    assert read_outcome(small, 1) == AppOutcome(7, reason="over")
    with pytest.raises(OSError, match="No space"):
        write_outcome(small, 2, AppOutcome(7))
    assert read_outcome(small, 2) is None


def lived(folder: Path, attempt: int, run: Any) -> int | None:
    """A ServerApp in a process of its own; returns how it ended."""
    context: Any = SimpleNamespace(run_config={"folder": str(folder), "attempt": attempt})
    grid = SimpleNamespace(run=SimpleNamespace(run_id=attempt))
    child = multiprocessing.get_context("fork").Process(target=run_server_app, args=(grid, context, run))
    child.start()
    child.join(120)
    return child.exitcode


@pytest.mark.slow
def test_a_run_without_room_says_what_it_could_not_write_and_goes_on_with_room(
    encoder: Path, tmp_path: Path, small: Path
) -> None:
    run = run_of(encoder)
    (small / "deployment.json").write_bytes((folder_of(tmp_path, run) / "deployment.json").read_bytes())
    job = prepare(run)

    def carried(link: Any, folder: Path) -> str:
        net = net_of(tmp_path, job, encoder)
        return start.run_deployment(net, folder, net.pause, net.clock)

    (small / "flower").mkdir()
    ballast = crowd(small, 250_000)
    assert lived(small, 1, carried) == 1
    word = read_outcome(small, 1)
    assert word is not None
    assert word.ended
    assert word.full.startswith(str(small / "run"))
    assert json.loads((small / "run" / "manifest.json").read_text())["status"] != "finished"
    ballast.unlink()
    assert lived(small, 2, carried) == 0
    assert read_outcome(small, 2).reason == "3 versions made"  # type: ignore[union-attr]
    assert replay(small / "run").difference == ""


class Obliging:
    """In Flower's place: it takes every app, which then ends with this word."""

    def __init__(self, folder: Path, word: AppOutcome | None) -> None:
        self.folder, self.word, self.taken = folder, word, 0

    def submit(self, folder: Path, attempt: int) -> int:
        self.taken += 1
        if self.word is not None:
            write_outcome(folder, attempt, self.word)
        return attempt

    def halt(self, run: int) -> None:
        pass


def serving(folder: Path, word: AppOutcome | None) -> tuple[Serving, list[str]]:
    (folder / "flower").mkdir(parents=True)
    said = list[str]()
    server = ServerSetup(folder, "127.0.0.1", free_port(), insecure=True)
    nobody: Any = None
    return Serving(server, Obliging(folder, word), nobody, said.append, nobody, 0), said  # type: ignore[arg-type]


def test_serve_tells_of_the_full_disk_and_gives_up_after_some_tries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "server"
    one, said = serving(folder, AppOutcome(2**22, full=f"{folder}/run/checkpoint.safetensors"))
    write_json(folder / "deployment.json", {})
    now = 1000
    monkeypatch.setattr(serve_module.time, "monotonic", lambda: now)

    def follow() -> None:
        nonlocal now
        while now < 2000:
            one._try(one._follow)
            now += 1

    with pytest.raises(Refused, match="its disk is full") as told:
        follow()
    assert one.control.taken == MOST_QUICK  # type: ignore[attr-defined]
    assert now > 1000 + (MOST_QUICK - 1) * serve_module.CLEARING, "there is time to make room"
    assert f"{folder}/run/checkpoint.safetensors could not be written" in " ".join(said)
    assert "killed" not in " ".join(said)
    for part in (str(folder), "checkpoint.safetensors", "free space", "fedloom serve ... --resume"):
        assert part in str(told.value)


def test_a_disk_with_hardly_any_room_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, said = serving(tmp_path / "server", None)
    free = ROOM - 1
    monkeypatch.setattr(serve_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    for _ in range(3):
        one._look_for_room()
        one._try(one._follow)
    assert len(said) == 1
    assert "is full; free space there" in said[0]
    assert "fedloom serve ... --resume" in said[0]
    assert one.control.taken == 0  # type: ignore[attr-defined]
    write_outcome(tmp_path / "server", 1, AppOutcome(2**22))  # it died without a word
    one.run = one.attempt = 1
    one._try(one._follow)
    assert "it was killed, and the disk is full" in said[-1]
    free = ROOM
    one._look_for_room()
    one._try(one._follow)
    assert one.control.taken == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("resume", [False, True])
def test_a_server_that_cannot_even_begin_says_why_with_code_2(small: Path, resume: bool) -> None:
    folder = small / "server"
    folder.mkdir()
    if resume:
        (folder / "deployment.json").write_text("{}")
    crowd(small, 0)
    with pytest.raises(Refused, match=r"its disk is full: .*deployment\.json could not be written; free space"):
        serve_deployment(ServerSetup(folder, "127.0.0.1", free_port(), insecure=True), {}, resume, print)


@pytest.mark.slow
def test_the_command_ends_with_code_2_and_no_traceback(encoder: Path, tmp_path: Path, small: Path) -> None:
    folder, run = small / "server", tmp_path / "run.py"
    run.write_text(f"from tests.support.tiny_models import tiny_run\n\nrun = tiny_run({str(encoder)!r})\n")
    crowd(small, 0)
    words = ["serve", str(run), "--folder", str(folder), "--insecure"]
    ended = subprocess.run(
        [sys.executable, "-c", "from fedloom.cli.main import main; main()", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    assert "its disk is full" in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
