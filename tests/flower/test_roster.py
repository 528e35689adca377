"""Whose keys a SuperLink takes: a real one, and the process that tells it. What was said before may be said again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedloom.flower import control as controlled
from fedloom.flower import keys
from fedloom.flower.control import Coming, Control, Unwilling
from fedloom.flower.place import Server, parts
from fedloom.flower.processes import Supervisor, free_port, listens, secret


@pytest.fixture
def control(tmp_path: Path) -> Iterator[Control]:
    """Of a SuperLink with TLS that runs."""
    keys.new(tmp_path / "server", ["localhost"])
    server, port = Server(tmp_path / "server", "127.0.0.1", free_port()), free_port()
    server.home.mkdir()
    secret(server.home / "secret")
    supervisor = Supervisor(parts(server, port)[:1], tmp_path / "logs", print)
    supervisor.look()
    until = time.monotonic() + 60
    while not listens("127.0.0.1", port):
        assert time.monotonic() < until
        time.sleep(0.1)
    yield Control(server.home, port, server.folder / "keys" / "ca.crt")
    supervisor.stop()


@pytest.mark.slow
def test_keys_are_taken_at_once_and_a_change_may_be_said_again(control: Control, tmp_path: Path) -> None:
    files = {name: keys.site(name, tmp_path / "sites")[1] for name in ("north", "south")}
    junk = tmp_path / "junk.pub"
    junk.write_text("no key")
    come = {name: Coming(str(path), name) for name, path in files.items()}
    done = control.change({**come, "junk": Coming(str(junk), "junk")}, {})
    assert done.come.keys() == {"north", "south"}
    assert done.come["north"] != done.come["south"]
    assert "junk cannot be let in" in done.refused["junk"]

    again = control.change(come, {})
    assert again.come == done.come, "as if its answer had been lost"
    assert not again.refused

    gone = {"north": done.come["north"]}
    assert control.change({}, gone).gone == ["north"]
    assert control.change({}, gone).gone == ["north"], "also twice"
    back = control.change({"north": come["north"]}, {})
    assert "already in use" in back.refused["north"], "Flower takes the key of who went never again"


@pytest.mark.slow
def test_a_superlink_that_is_away_or_hangs_is_told_of(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = Control(control.home, free_port(), control.certificate)
    with pytest.raises(Unwilling, match="does not answer"):
        nobody.change({}, {})
    with pytest.raises(Unwilling):
        nobody.halt(1)
    monkeypatch.setattr(controlled, "TIMEOUT", 0.2)
    for ask in (lambda: control.change({}, {}), lambda: control.halt(1), lambda: control.submit(control.home, 1)):
        with pytest.raises(Unwilling, match="did not answer within"):
            ask()
