"""`fedloom serve` listens where it says, or says in one sentence why not, before anything is begun."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fedloom.core.errors import Refused
from fedloom.deploy.flower.address import Address, listen_at
from fedloom.deploy.flower.serve import NOTE, serve_deployment
from fedloom.deploy.flower.server_processes import ServerSetup
from fedloom.deploy.flower.supervisor import free_port, program
from tests.deploy.flower.test_address import ipv6
from tests.support import federation

linux = pytest.mark.skipif(sys.platform != "linux", reason="as the processes of a deployment")


@pytest.mark.parametrize("field", ["--port", "--metrics-port"])
def test_a_taken_port_is_refused_before_anything_is_begun(tmp_path: Path, field: str) -> None:
    ports = {"--port": free_port(), "--metrics-port": free_port()}
    server, said = ServerSetup(tmp_path, "127.0.0.1", ports["--port"], insecure=True), list[str]()
    with listen_at("ours", Address("127.0.0.1", ports[field])), pytest.raises(Refused, match=field):
        serve_deployment(server, {"metrics_port": ports["--metrics-port"]}, False, said.append)
    assert said == []
    assert not (tmp_path / NOTE).exists()


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
        assert f"the server listens at [::1]:{made.port}" in made.said("server")
    finally:
        made.close()
