"""The supervisor: what ends is started again, what belongs together ends together, and nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedloom.core.errors import Refused
from fedloom.deploy.flower import supervisor
from fedloom.deploy.flower.supervisor import Backoff, LogFollower, ProcessSpec, Supervisor, hold_folder, stop_on_sigterm

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
PARENT = [
    sys.executable,
    "-c",
    "import subprocess, time; print(subprocess.Popen(['sleep', '601']).pid, flush=True); time.sleep(600)",
]
DEAF = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)",
]


def until(true: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait for it."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    """Whether no such process runs; a zombie does not."""
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


class Kennel:
    """A supervisor, and what it said."""

    def __init__(self, folder: Path, *units: list[ProcessSpec]) -> None:
        self.said: list[str] = []
        self.supervisor = Supervisor(units, folder, self.said.append, Backoff(0.05, 0.2, 60.0))

    def up(self, name: str) -> int | None:
        self.supervisor.look()
        return self.supervisor.pid(name)


@pytest.fixture
def kennel(tmp_path: Path) -> Iterator[Callable[..., Kennel]]:
    made: list[Kennel] = []

    def make(*units: list[ProcessSpec]) -> Kennel:
        made.append(Kennel(tmp_path, *units))
        return made[-1]

    yield make
    for each in made:
        each.supervisor.stop()


def part(name: str, command: list[str] = SLEEP) -> ProcessSpec:
    return ProcessSpec(name, command, dict(os.environ))


def test_what_is_killed_is_started_again(kennel: Callable[..., Kennel]) -> None:
    two = kennel([part("a")], [part("b")])
    first, other = two.up("a"), two.up("b")
    assert first
    os.kill(first, signal.SIGKILL)
    until(lambda: two.up("a") not in (None, first))
    assert two.up("b") == other, "b is another unit"
    assert two.said[0].startswith("a was killed (SIGKILL)")


def test_a_unit_dies_and_lives_together(kennel: Callable[..., Kennel]) -> None:
    pair = kennel([part("a"), part("b")])
    first, second = pair.up("a"), pair.up("b")
    assert first
    assert second
    os.kill(second, signal.SIGKILL)
    until(lambda: pair.up("a") not in (None, first))
    assert gone(first)
    assert pair.up("b") != second


def test_what_ends_at_once_is_started_ever_more_seldom(kennel: Callable[..., Kennel]) -> None:
    poor = kennel([part("a", [sys.executable, "-c", "raise SystemExit(3)"])])
    until(lambda: poor.up("a") is None and len(poor.said) >= 4)
    assert all(line.startswith("a ended with code 3") for line in poor.said)


def test_stopping_ends_children_of_children_and_who_does_not_listen(
    kennel: Callable[..., Kennel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "GRACE", 0.5)
    three = kennel([part("parent", PARENT)], [part("deaf", DEAF)])
    pids = [three.up("parent"), three.up("deaf")]
    until(lambda: (tmp_path / "parent.log").read_text() and (tmp_path / "deaf.log").read_text())
    pids.append(int((tmp_path / "parent.log").read_text()))
    three.supervisor.stop()
    until(lambda: all(pid and gone(pid) for pid in pids))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's word to the children of a killed parent is Linux's")
def test_nothing_is_left_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    code = f"""
import os, time
from pathlib import Path
from fedloom.flower.processes import Part, Supervisor
units = [[Part(name, {SLEEP!r}, dict(os.environ))] for name in "ab"]
pack = Supervisor(units, Path({str(tmp_path)!r}), print)
pack.look()
print(pack.pid("a"), pack.pid("b"), flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout
        pids = [int(word) for word in killed.stdout.readline().split()]
        assert not any(map(gone, pids))
        killed.kill()
    until(lambda: all(map(gone, pids)))


def test_a_folder_has_one_supervisor(tmp_path: Path) -> None:
    with (
        hold_folder(tmp_path / "lock", tmp_path),
        pytest.raises(Refused, match="another process"),
        hold_folder(tmp_path / "lock", tmp_path),
    ):
        pass
    with hold_folder(tmp_path / "lock", tmp_path):
        pass


def test_a_reader_sees_each_whole_line_once_also_when_the_log_is_shortened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "a.log"
    reader = LogFollower(log)
    assert reader.lines() == []
    log.write_text("one\ntwo\nthr")
    assert reader.lines() == ["one", "two"]
    with log.open("a") as file:
        file.write("ee\n")
    assert reader.lines() == ["three"]
    assert LogFollower(log).skip().lines() == []
    monkeypatch.setattr(supervisor, "LARGEST_LOG", 8)
    monkeypatch.setattr(supervisor, "KEPT_LOG", 4)
    supervisor._shorten(log)
    assert log.read_text() == "ree\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_comes_in_a_finaliser_is_not_lost(number: signal.Signals) -> None:
    """Python prints what is raised there, and goes on."""

    class Finalised:
        def __del__(self) -> None:
            os.kill(os.getpid(), number)
            for _ in range(1000):  # Python calls the handler between two instructions
                pass

    given = signal.signal(
        number, signal.default_int_handler
    )  # SIGINT is ignored in what a shell runs in the background
    try:
        with stop_on_sigterm() as asked_to_stop:
            asked_to_stop()
            one = Finalised()
            del one
            with pytest.raises(KeyboardInterrupt):
                asked_to_stop()
        assert signal.getsignal(number) is signal.default_int_handler
        signal.signal(number, signal.SIG_IGN)
        with stop_on_sigterm() as asked_to_stop:
            os.kill(os.getpid(), number)
            asked_to_stop()
    finally:
        signal.signal(number, given)
