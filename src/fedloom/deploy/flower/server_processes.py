"""Processes of a deployment's server: where it lives, and the commands of Flower's programs there."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedloom.core.errors import Refused
from fedloom.deploy.flower import keys
from fedloom.deploy.flower.address import Address, is_loopback
from fedloom.deploy.flower.supervisor import ProcessSpec, is_held, process_environment, program

APP = "fedloom.deploy.flower.server_app:app"
HOME, LOCK = "flower", "lock"
"""Flower's part of a server's folder, and the file there that the server's process holds."""


@dataclass(frozen=True, slots=True)
class ServerSetup:
    """Folder and addresses of a deployment.

    Fields:
        folder: its folder.
        host: name or address that it listens at, an IPv6 address without brackets.
        port: port for the sites.
        insecure: without keys and TLS, on this machine only.
        app: the ServerApp, as MODULE:NAME.
        quota: bytes that a site may send a day (None: as the gate has it).
    """

    folder: Path
    host: str = "0.0.0.0"
    port: int = 8080
    insecure: bool = False
    app: str = APP
    quota: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", self.folder.resolve())  # Flower's processes want whole paths
        if self.insecure and not is_loopback(self.host):
            remedy = f"without keys and TLS the server listens on this machine only; --port 127.0.0.1:{self.port}"
            raise Refused("--insecure", self.host, remedy)
        if not self.insecure:
            certificate = self.folder / "keys" / "server.crt"
            if not certificate.exists():
                raise Refused(
                    "--folder",
                    str(self.folder),
                    f"it has no keys; make them first: fedloom keys new {self.folder} --host NAME",
                )
            if keys.expiry(certificate) < datetime.now(UTC):
                raise Refused(
                    "--folder",
                    str(self.folder),
                    "the server's certificate has expired; make a new one with fedloom keys renew",
                )

    @property
    def address(self) -> Address:
        """Address that sites connect to."""
        return Address(self.host, self.port)

    @property
    def home(self) -> Path:
        """Flower's part of the folder."""
        return self.folder / HOME


def is_serving(folder: Path) -> bool:
    """Whether the process of a server in this folder is running, on this machine."""
    return is_held(folder / HOME / LOCK)


def server_processes(server: ServerSetup, inner: int, sockets: Sequence[int]) -> list[list[ProcessSpec]]:
    """Return the processes at the server: SuperLink at port `inner` of loopback, the gate before it at open `sockets`, SuperExec."""
    variables, pki = process_environment(server.home), server.folder / "keys"
    shared = ["--superexec-auth-secret-file", str(server.home / "secret")]
    link = [
        "--host",
        "127.0.0.1",
        "--port",
        str(inner),
        "--isolation",
        "process",
        "--disable-runtime-dependency-installation",
    ]
    link += ["--database", str(server.home / "state.db"), *shared]
    gate = ["--sockets", *map(str, sockets), "--to", str(inner), "--home", str(server.home)]
    gate += [] if server.quota is None else ["--limits", json.dumps({"quota": server.quota})]
    execute = ["--runtime-api-address", f"127.0.0.1:{inner}", *shared]
    if server.insecure:
        link, execute = [*link, "--insecure"], [*execute, "--insecure"]
    else:
        tls = ["--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "server.crt", "--ssl-keyfile", "server.key"]
        link += [word if word.startswith("--") else str(pki / word) for word in tls] + ["--enable-supernode-auth"]
        execute += ["--root-certificates", str(pki / "ca.crt")]
        gate += ["--keys", str(pki)]
    return [
        [ProcessSpec("superlink", [program("flower-superlink"), *link], variables)],
        [ProcessSpec("gate", [sys.executable, "-m", "fedloom.deploy.flower.gate", *gate], variables, sockets)],
        [ProcessSpec("superexec", [program("flower-superexec"), *execute], variables)],
    ]
