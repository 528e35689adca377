"""`fedloom serve` listens where it says, or says in one sentence why not, before anything is begun."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fedloom.core.errors import Refused
from fedloom.core.files import write_json
from fedloom.deploy.flower import keys
from fedloom.deploy.flower.address import Address, listen_at
from fedloom.deploy.flower.app_outcome import AppOutcome, write_outcome
from fedloom.deploy.flower.roster import ROSTER, read_roster
from fedloom.deploy.flower.serve import MOST_QUICK, NOTE, Serving, serve_deployment
from fedloom.deploy.flower.server_processes import ServerSetup, server_processes
from fedloom.deploy.flower.supervisor import LogFollower, free_port, program
from fedloom.deploy.server.status import read_refusals
from tests.deploy.flower.test_address import ipv6
from tests.support import federation
from tests.support.malformed_files import STATUS

linux = pytest.mark.skipif(sys.platform != "linux", reason="as the processes of a deployment")


@pytest.mark.parametrize("field", ["--port", "--metrics-port"])
def test_a_taken_port_is_refused_before_anything_is_begun(tmp_path: Path, field: str) -> None:
    ports = {"--port": free_port(), "--metrics-port": free_port()}
    server, said = ServerSetup(tmp_path, "127.0.0.1", ports["--port"], insecure=True), list[str]()
    with listen_at("ours", Address("127.0.0.1", ports[field])), pytest.raises(Refused, match=field):
        serve_deployment(server, {"metrics_port": ports["--metrics-port"]}, False, said.append)
    assert said == []
    assert not (tmp_path / NOTE).exists()


def test_a_quota_is_handed_to_the_gate(tmp_path: Path) -> None:
    for quota in (None, 5_000_000):
        server = ServerSetup(tmp_path, "127.0.0.1", insecure=True, quota=quota)
        [gate] = [unit[0].command for unit in server_processes(server, 1, [3]) if unit[0].name == "gate"]
        assert ('{"quota": 5000000}' in gate) is (quota is not None)


def test_one_port_is_not_for_both(tmp_path: Path) -> None:
    server = ServerSetup(tmp_path, "127.0.0.1", free_port(), insecure=True)
    with pytest.raises(Refused, match=r"--metrics-port.*another program"):
        serve_deployment(server, {"metrics_port": server.port}, False, print)


@linux
@pytest.mark.slow
def test_the_command_ends_with_code_2(tmp_path: Path) -> None:
    federation.make(tmp_path, clients=1, versions=1, steps=1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for given in (port, "::1:8080"):
            command = ["serve", str(tmp_path / "run.py"), "--folder", str(tmp_path / "server"), "--port", given]
            done = subprocess.run(
                [program("fedloom"), *command],
                env=federation.environment(),
                capture_output=True,
                text=True,
                check=False,
            )
            assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
            assert "--port" in done.stderr


@linux
@pytest.mark.slow
@pytest.mark.federation
def test_sites_reach_a_server_by_an_address_of_ipv6(tmp_path: Path) -> None:
    """With keys and TLS; the name of the server in its certificate is the address."""
    if not ipv6():
        pytest.skip("this machine has no IPv6")
    made = federation.make(tmp_path, clients=2, versions=2, steps=1, host="[::1]")
    try:
        made.serve("--port", f"[::1]:{made.port}")
        for name in made.names:
            made.join(name)
        federation.until(made.over, 600, "the run did not end")
        assert made.processes["server"].returncode == 0, made.said("server")
        assert f"listening at [::1]:{made.port}" in made.said("server")
    finally:
        made.close()


def test_the_gate_knows_who_may_come_also_after_a_restart_and_before_the_superlink_answers(tmp_path: Path) -> None:
    """A key is on the roster once it has a node; after a restart at once, unless it was removed meanwhile."""
    keys.new(tmp_path, ["localhost"])
    server, nobody = ServerSetup(tmp_path, "127.0.0.1"), Any
    server.home.mkdir()
    registered = {}
    for name in ("one", "two"):
        _, public = keys.site(name, tmp_path / "made")
        registered[name] = keys.add(public, name, tmp_path)

    def serving() -> Serving:
        return Serving(server, nobody, nobody, print, nobody, 0)  # type: ignore[arg-type]

    def on_roster() -> dict[str, int]:
        return {entry.name: entry.node for entry in read_roster(server.home / ROSTER)}

    first = serving()
    first._list_keys()
    assert on_roster() == {}
    first.nodes, first.keys_sent = {one.fingerprint: number for number, one in enumerate(registered.values(), 7)}, True
    first._list_keys()
    assert on_roster() == {"one": 7, "two": 8}
    keys.remove("one", tmp_path)
    serving()._list_keys()
    assert on_roster() == {"two": 8}
    keys.add(tmp_path / "made" / "one.pub", "one", tmp_path)
    again = serving()
    again._list_keys()
    assert on_roster() == {"two": 8}, "its node is known from the SuperLink alone"
    again.keys_sent = True
    again._list_keys()
    assert on_roster() == {}, "nor is a node that the SuperLink no longer names"


def test_a_server_app_that_is_killed_again_and_again_ends_the_run_only_where_it_makes_no_version(
    tmp_path: Path,
) -> None:
    server, nobody = ServerSetup(tmp_path, "127.0.0.1", insecure=True), Any
    server.home.mkdir()
    one = Serving(server, nobody, nobody, [].append, nobody, 0)  # type: ignore[arg-type]

    def killed(version: int) -> None:
        one.attempt, one.run, one.since = one.attempt + 1, 1, time.monotonic()
        write_json(tmp_path / "status.json", STATUS | {"version": version})
        write_outcome(tmp_path, one.attempt, AppOutcome(2**22 + 1))  # no process has this number
        assert one._follow() is None

    for version in range(1, 3 * MOST_QUICK):
        killed(version)
    for _ in range(MOST_QUICK - 1):
        killed(version)
    with pytest.raises(Refused, match="fails as soon as it starts"):
        killed(version)


def test_what_the_gate_refuses_is_said(tmp_path: Path) -> None:
    log, said, nobody = tmp_path / "gate.log", list[str](), Any
    server = ServerSetup(tmp_path, "127.0.0.1", insecure=True)
    one = Serving(server, nobody, nobody, said.append, nobody, 0, gate_log=LogFollower(log))  # type: ignore[arg-type]
    lines = [
        '{"event": "refused", "site": "one", "reason": "413 too large", "times": 1}',
        '{"event": "refused", "site": "one", "reason": "429 too much", "times": 3}',
        "Traceback",
        '{"event": "other"}',
        "[]",
        "3",
    ]
    log.write_text("\n".join(lines) + "\n", encoding="utf-8")
    one._say_refusals()
    assert said == [
        "refused a call of one: 413 too large",
        "refused a call of one: 429 too much (3 calls since the last such line)",
    ]
    assert read_refusals(tmp_path) == {"one": 4}
