"""What the owner of a SuperLink does with it, through Flower's own command line: accept keys, submit the app, stop a run."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedloom.flower.processes import environment, program

HERE = "here"
TIMEOUT = 120.0
APP = """\
[project]
name = "fedloom-deployment"
version = "1.0.0"
license = "Apache-2.0"
description = "No code: the server runs the ServerApp that is installed there, the sites run nothing of this."

[tool.flwr.app]
publisher = "fedloom"

[tool.flwr.app.components]
serverapp = "{app}"
clientapp = "{app}"

[tool.flwr.app.config]
folder = ""
attempt = 0
"""


class Unwilling(Exception):
    """Flower's command line said no; the text is what it said."""


@dataclass(frozen=True, slots=True)
class Control:
    """The SuperLink at `port` of loopback; Flower's settings are kept in `home`. `certificate` None: without TLS."""

    home: Path
    port: int
    certificate: Path | None

    def prepare(self, app: str) -> None:
        """Write down where the SuperLink is, and the app that names `app`. It has no client part; Flower wants a name there."""
        (self.home / "app").mkdir(parents=True, exist_ok=True)
        secure = (
            "insecure = true"
            if self.certificate is None
            else f"root-certificates = {json.dumps(str(self.certificate))}"
        )
        connection = (
            f'[superlink]\ndefault = "{HERE}"\n\n[superlink.{HERE}]\naddress = "127.0.0.1:{self.port}"\n{secure}\n'
        )
        (self.home / "config.toml").write_text(connection, encoding="utf-8")
        (self.home / "app" / "pyproject.toml").write_text(APP.format(app=app), encoding="utf-8")

    def register(self, public: Path, name: str) -> int:
        """Accept a key; returns the node id that its holder will have."""
        return int(self._ask("supernode", "register", str(public), HERE, "--name", name)["node-id"])

    def unregister(self, node: int) -> None:
        """Accept it no longer. Flower takes the same key never again."""
        self._ask("supernode", "unregister", str(node), HERE)

    def submit(self, folder: Path, attempt: int) -> int:
        """Start a Flower run of the app; returns its number."""
        config = f"folder={json.dumps(str(folder))} attempt={attempt}"
        return int(self._ask("run", str(self.home / "app"), HERE, "--run-config", config)["run-id"])

    def halt(self, run: int) -> None:
        """Stop a Flower run, so that what it left at the sites is dropped."""
        self._ask("stop", str(run), HERE)

    def _ask(self, *words: str) -> Mapping[str, Any]:
        done = subprocess.run(
            [program("flwr"), *words, "--format", "json"],
            env=environment(self.home),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        start = done.stdout.find("{")
        try:
            answer: Mapping[str, Any] = json.loads(done.stdout[start:]) if start >= 0 else {}
        except json.JSONDecodeError:
            answer = {}
        if done.returncode or not answer.get("success"):
            raise Unwilling(str(answer.get("error-message") or done.stderr or done.stdout).strip()[-500:])
        return answer
