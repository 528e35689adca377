"""Whose keys a SuperLink takes: a real one, and the process that tells it. What was said before may be said again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedloom.deploy.flower import keys, superlink
from fedloom.deploy.flower.server_processes import ServerSetup, server_processes
from fedloom.deploy.flower.superlink import SiteKey, SuperLink, SuperLinkError
from fedloom.deploy.flower.supervisor import Supervisor, free_port, is_listening, write_secret


@pytest.fixture
def control(tmp_path: Path) -> Iterator[SuperLink]:
    """Of a SuperLink with TLS that runs."""
    keys.new(tmp_path / "server", ["localhost"])
    server, port = ServerSetup(tmp_path / "server", "127.0.0.1", free_port()), free_port()
    server.home.mkdir()
    write_secret(server.home / "secret")
    supervisor = Supervisor(server_processes(server, port, [])[:1], tmp_path / "logs", print)
    supervisor.look()
    until = time.monotonic() + 60
    while not is_listening("127.0.0.1", port):
        assert time.monotonic() < until
        time.sleep(0.1)
    yield SuperLink(server.home, port, server.folder / "keys" / "ca.crt")
    supervisor.stop()


@pytest.mark.slow
def test_who_is_listed_may_come_and_nobody_else_however_often_it_is_said(control: SuperLink, tmp_path: Path) -> None:
    files = {name: keys.site(name, tmp_path / "sites")[1] for name in ("north", "south")}
    junk = tmp_path / "junk.pub"
    junk.write_text("no key")
    both = {name: SiteKey(str(path), name) for name, path in files.items()}
    done = control.admit(both)
    assert done.nodes.keys() == {"north", "south"}
    assert done.nodes["north"] != done.nodes["south"]
    assert control.admit(both) == done, "as if its answer had been lost"

    some = control.admit({"north": both["north"], "junk": SiteKey(str(junk), "junk")})
    assert "junk cannot be registered" in some.refused["junk"]
    assert some.nodes == {"north": done.nodes["north"]}
    assert control.admit(both) == done, "south was not put out while a key could not be read"

    assert control.admit({"south": both["south"]}).nodes == {"south": done.nodes["south"]}
    back = control.admit(both)
    assert back.nodes == {"south": done.nodes["south"]}
    assert "north cannot be registered" in back.refused["north"], "Flower takes the key of who went never again"
    assert control.admit({}).nodes == {}


@pytest.mark.slow
def test_a_superlink_that_is_away_is_told_of(control: SuperLink) -> None:
    nobody = SuperLink(control.home, free_port(), control.certificate)
    nobody.prepare("toy:app")
    for ask in (lambda: nobody.admit({}), lambda: nobody.submit(control.home, 1)):
        with pytest.raises(SuperLinkError, match=r"does not answer|navailable|onnect"):
            ask()


def test_what_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(superlink, "TIMEOUT", 0.2)
    with pytest.raises(SuperLinkError, match="did not answer within"):
        SuperLink(tmp_path, free_port(), None)._run(["sleep", "60"])


def test_before_a_run_is_submitted_all_others_are_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one whose number nobody was told; one that is over is left alone, and nothing is begun while one cannot be stopped."""
    asked, stuck = list[tuple[str, ...]](), False

    def ask(self: SuperLink, *words: str) -> dict[str, Any]:
        asked.append(words[:2])
        if words[0] == "stop" and stuck:
            raise SuperLinkError("not now")
        runs = [{"run-id": "3", "status": "finished:failed"}, {"run-id": "4", "status": "running"}]
        return {"list": {"runs": runs}, "run": {"run-id": "5"}}.get(words[0], {})

    monkeypatch.setattr(SuperLink, "_ask", ask)
    control = SuperLink(tmp_path, 1, None)
    assert control.submit(tmp_path, 1) == 5
    assert [words[0] for words in asked] == ["list", "stop", "run"]
    assert asked[1] == ("stop", "4")
    stuck = True
    with pytest.raises(SuperLinkError):
        control.submit(tmp_path, 2)
    assert asked[-1] == ("stop", "4")
