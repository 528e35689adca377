"""What the owner of a SuperLink does with it: accept keys, submit the app, stop a run. Each by a process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
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
    """Flower said no, or nothing; the text is what it said."""


@dataclass(frozen=True, slots=True)
class Coming:
    """Who is to be let in: the file of the public key, and the name of its holder."""

    key: str
    name: str


@dataclass(frozen=True, slots=True)
class Changed:
    """What came of a change, by the fingerprint of a key: the node that its holder is, who is let in no longer, why not."""

    come: dict[str, int] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


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

    def change(self, come: Mapping[str, Coming], go: Mapping[str, int]) -> Changed:
        """Accept these keys, and those of these nodes no longer; it may be said twice. Flower takes a key that went never again.

        Raises Unwilling where the SuperLink cannot be asked.
        """
        where = [str(self.port), *([] if self.certificate is None else [str(self.certificate)])]
        told = json.dumps({"come": {key: asdict(one) for key, one in come.items()}, "go": dict(go)})
        done = self._run([sys.executable, "-m", "fedloom.flower.roster", *where], told)
        if done.returncode:
            raise Unwilling((done.stderr or done.stdout).strip()[-500:])
        return Changed(**json.loads(done.stdout))

    def submit(self, folder: Path, attempt: int) -> int:
        """Start a Flower run of the app; returns its number."""
        config = f"folder={json.dumps(str(folder))} attempt={attempt}"
        try:
            return int(self._ask("run", str(self.home / "app"), HERE, "--run-config", config)["run-id"])
        except Unwilling:
            with suppress(Unwilling):  # one whose number was not told would hold the folder against the next
                self._halt_all()
            raise

    def halt(self, run: int) -> None:
        """Stop a Flower run, so that what it left at the sites is dropped."""
        self._ask("stop", str(run), HERE)

    def _halt_all(self) -> None:
        """Stop every Flower run; nobody else has one here."""
        for run in self._ask("list", HERE).get("runs", []):
            if not str(run["status"]).startswith("finished"):
                self.halt(int(run["run-id"]))

    def _ask(self, *words: str) -> Mapping[str, Any]:
        """Flower's command line."""
        done = self._run([program("flwr"), *words, "--format", "json"])
        start = done.stdout.find("{")
        try:
            answer: Mapping[str, Any] = json.loads(done.stdout[start:]) if start >= 0 else {}
        except json.JSONDecodeError:
            answer = {}
        if done.returncode or not answer.get("success"):
            raise Unwilling(str(answer.get("error-message") or done.stderr or done.stdout).strip()[-500:])
        return answer

    def _run(self, command: Sequence[str], told: str = "") -> subprocess.CompletedProcess[str]:
        """A process to its end. Raises Unwilling where that does not come."""
        try:
            return subprocess.run(
                command,
                env=environment(self.home),
                input=told,
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise Unwilling(f"the SuperLink was asked and did not answer within {TIMEOUT:.0f} s") from error
