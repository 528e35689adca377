"""`fedloom serve` and `fedloom join` with Flower's real processes, a toy ServerApp and a toy worker. Minutes: marked slow.

Flower takes its time to notice that somebody is gone: a lease is a minute.
"""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedloom.core.errors import Refused
from fedloom.deploy.flower import keys
from fedloom.deploy.flower.join import SiteSetup
from fedloom.deploy.flower.server_processes import ServerSetup
from fedloom.deploy.flower.supervisor import free_port, program

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")]
ROOT, TOYS = Path(__file__).parents[2], Path(__file__).parent / "flower" / "toys"
LEASE = 100.0
"""Seconds in which a node is back that could not say that it left: twice 30 s of lease, the backoff, the start of a process."""


def until(true: Callable[[], Any], seconds: float, why: str) -> Any:
    """Wait for it, and return what it is."""
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, f"waited {seconds:.0f} s in vain: {why}"
        time.sleep(0.3)
    return found


def running(mark: str) -> dict[int, str]:
    """The processes whose command line has `mark` in it."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if mark in words:
            found[int(path.parent.name)] = words
    return found


class Stage:
    """A folder with a server and sites in it."""

    def __init__(self, folder: Path, inside: tuple[str, ...] = ()) -> None:
        self.folder, self.port, self.inside = folder, free_port(), inside
        self.server = folder / "server"
        self.open: list[subprocess.Popen[bytes]] = []
        paths = os.pathsep.join([str(ROOT / "src"), str(ROOT), str(TOYS)])
        self.environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}

    def _begin(self, name: str, toy: str, *words: object) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.out").open("ab") as out:
            command = [*self.inside, sys.executable, str(TOYS / toy), *map(str, words)]
            child = subprocess.Popen(command, stdout=out, stderr=out, env=self.environment)
        self.open.append(child)
        return child

    def serve(self, *more: str, **facts: object) -> subprocess.Popen[bytes]:
        return self._begin("serve", "toyserve.py", self.server, self.port, json.dumps({"size": 1000, **facts}), *more)

    def join(self, name: str, *pair: Path, seconds: float = 0.0) -> subprocess.Popen[bytes]:
        (self.folder / name).mkdir(exist_ok=True)
        return self._begin(name, "toyjoin.py", f"localhost:{self.port}", self.folder / name, seconds, *pair)

    def said(self, name: str) -> str:
        path = self.folder / f"{name}.out"
        return path.read_text() if path.exists() else ""

    def replies(self) -> list[dict[str, Any]]:
        path = self.server / "replies.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def good(self) -> list[dict[str, Any]]:
        return [reply for reply in self.replies() if reply["same"]]

    def more(self, seconds: float, why: str) -> dict[str, Any]:
        """One good reply that was not there yet, to a message sent after now."""
        count = len(self.good())
        return until(lambda: self.good()[count + 1 :], seconds, f"{why}\n{self.said('serve')}\n{self.said('one')}")[-1]

    def pid(self, part: str, place: Path) -> int:
        [pid] = [pid for pid, words in running(str(place)).items() if part in words]
        return pid

    def close(self) -> None:
        for child in self.open:
            child.terminate()
        for child in self.open:
            child.wait(60)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path)
    yield made
    made.close()
    left = until(lambda: not running(str(tmp_path)) or None, 20, f"left: {running(str(tmp_path))}")
    assert left


@pytest.fixture
def secured(stage: Stage) -> tuple[Stage, Path, Path]:
    """With an authority, and a site named `north` there whose key is let in: its pair of files."""
    ca = keys.new(stage.server, ["localhost"])
    private, public = keys.site("one", stage.folder / "keys")
    keys.add(public, "north", stage.server)
    return stage, ca, private


def test_who_is_refused(secured: tuple[Stage, Path, Path]) -> None:
    """A key that is not registered, none at all, another authority's, an expired certificate; and what is not for sites."""
    stage, ca, private = secured
    stage.serve()
    stage.join("one", ca, private)
    assert until(stage.good, 90, stage.said("serve"))[0]["name"] == "north"

    stranger, public = keys.site("stranger", stage.folder / "keys")
    stage.join("stranger", ca, stranger)
    until(lambda: "does not know this site's key" in stage.said("stranger"), 60, stage.said("stranger"))

    other = keys.new(stage.folder / "other", ["localhost"])
    stage.join("fooled", other, private)
    until(lambda: "certificate is not one of the authority" in stage.said("fooled"), 60, stage.said("fooled"))

    node = [program("flower-supernode"), "--superlink", f"localhost:{stage.port}", "--root-certificates", str(ca)]
    node += ["--isolation", "process", "--host", "127.0.0.1", "--port", str(free_port())]
    environment = {**stage.environment, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    keyless = subprocess.run(node, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert keyless.returncode
    assert "2001" in keyless.stdout + keyless.stderr

    trusted = ssl.create_default_context(cafile=str(ca))
    for path in ("control/list-runs", "control/register-node", "runtime/acquire-task"):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"https://localhost:{stage.port}/v1/{path}", b"", 10, context=trusted)

    keys.add(public, "late", stage.server)
    until(lambda: any(reply["name"] == "late" for reply in stage.good()), 90, "a key that is added later is let in")
    keys.remove("late", stage.server)
    until(lambda: "is revoked" in stage.said("serve"), 30, stage.said("serve"))
    until(lambda: stage.said("stranger").count("does not know this site's key") > 1, 60, stage.said("stranger"))

    keys.add(public, "late", stage.server)
    until(
        lambda: "late cannot be registered" in stage.said("serve"),
        30,
        "Flower takes a removed key never again, and we say so",
    )
    keys.remove("late", stage.server)
    (stage.server / "sites" / "junk.pub").write_text("no key")
    until(lambda: "junk.pub" in stage.said("serve"), 30, "a file that is no key is told of")
    (stage.server / "sites" / "junk.pub").unlink()
    stage.more(60, "and nobody else suffers from either")

    keys.renew(stage.server, ["localhost"], days=-1)
    os.kill(stage.pid("fedloom.deploy.flower.gate", stage.server), signal.SIGKILL)
    until(lambda: "certificate is not one of the authority" in stage.said("one"), 60, stage.said("one"))
    keys.renew(stage.server, ["localhost"])
    os.kill(stage.pid("fedloom.deploy.flower.gate", stage.server), signal.SIGKILL)
    stage.more(LEASE, "a new certificate under the same authority")


@pytest.mark.federation
def test_whatever_is_killed_comes_back_and_nothing_is_left(secured: tuple[Stage, Path, Path]) -> None:
    """kill -9 of each process; at last of the supervisors."""
    stage, ca, private = secured
    server, site = stage.serve(), stage.join("one", ca, private)
    first = until(stage.good, 90, stage.said("serve"))[0]

    for part, place, seconds in (
        ("fedloom.deploy.flower.supernode", "one", 40.0),
        ("fedloom.deploy.flower.executor", "one", 40.0),
        ("toyworker", "one", 40.0),
        ("flower-superlink", "server", 60.0),
        ("fedloom.deploy.flower.gate", "server", 40.0),
    ):
        os.kill(stage.pid(part, stage.folder / place), signal.SIGKILL)
        reply = stage.more(seconds, part)
        assert reply["node"] == first["node"], f"after {part}"
        assert reply["pid"] == first["pid"], f"the ServerApp lives through {part}"

    os.kill(first["pid"], signal.SIGKILL)
    again = stage.more(90, "ServerApp")
    assert again["pid"] != first["pid"]
    os.kill(stage.pid("flower-superexec", stage.server), signal.SIGKILL)
    assert stage.more(90, "SuperExec")["pid"] != again["pid"]

    for supervisor in (server, site):
        supervisor.kill()
        supervisor.wait()
    until(lambda: not running(str(stage.folder)), 20, f"left: {running(str(stage.folder))}")

    server = stage.serve("resume")
    stage.join("one", ca, private)
    assert stage.more(LEASE, "after a restart of all")["node"] == first["node"]
    (stage.server / "enough").touch()
    server.wait(60)
    assert stage.said("serve").splitlines()[-1] == "END enough"


def test_what_fails_again_and_again_is_given_up(stage: Stage) -> None:
    server = stage.serve("insecure", fail=True)
    server.wait(150)
    assert "REFUSED" in stage.said("serve")
    assert "RuntimeError: as told" in stage.said("serve")


def test_nothing_is_insecure_unless_said_and_then_on_this_machine_only(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="keys new"):
        ServerSetup(tmp_path)
    with pytest.raises(Refused, match="this machine only"):
        ServerSetup(tmp_path, insecure=True)
    with pytest.raises(Refused, match="its own machine only"):
        SiteSetup("server.example.org:8080", tmp_path, tmp_path / "w.sock", [])
    keys.new(tmp_path, ["localhost"])
    ServerSetup(tmp_path)
    keys.renew(tmp_path, ["localhost"], days=-1)
    with pytest.raises(Refused, match="expired"):
        ServerSetup(tmp_path)


@pytest.fixture
def island() -> Iterator[str]:
    """A network namespace with loopback and one line to nowhere, whose packets are counted."""
    if os.geteuid():
        pytest.skip("network namespaces need root")
    name = f"fedloom{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    set_up = (
        "sysctl -qw net.ipv6.conf.all.disable_ipv6=1; ip link set lo up; ip link add out type veth peer name nowhere; "
        "ip addr add 10.99.0.1/24 dev out; ip link set nowhere up; ip link set out up; ip route add default via 10.99.0.2"
    )
    subprocess.run(["ip", "netns", "exec", name, "sh", "-ec", set_up], check=True)
    yield name
    subprocess.run(["ip", "netns", "del", name], check=True)


def test_nobody_calls_outside_and_nobody_waits_for_it(island: str, tmp_path: Path) -> None:
    """With TLS and keys, where every way out leads to nowhere: not one packet goes there, and all works as fast."""
    inside = ("ip", "netns", "exec", island)

    def sent() -> int:
        count = [*inside, "cat", "/sys/class/net/out/statistics/tx_packets"]
        return int(subprocess.run(count, capture_output=True, text=True, check=True).stdout)

    stage = Stage(tmp_path, inside)
    ca = keys.new(stage.server, ["localhost"])
    private, public = keys.site("one", tmp_path / "keys")
    keys.add(public, "north", stage.server)
    before = sent()
    server = stage.serve()
    stage.join("one", ca, private)
    try:
        until(lambda: len(stage.good()) > 2, 90, stage.said("serve"))
        (stage.server / "enough").touch()
        server.wait(60)
        assert stage.said("serve").splitlines()[-1] == "END enough"
        assert sent() == before
        probe = [
            *inside,
            sys.executable,
            "-c",
            "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('10.98.0.1', 9))",
        ]
        subprocess.run(probe, check=True)
        until(lambda: sent() > before, 10, "the count counts")
    finally:
        stage.close()
