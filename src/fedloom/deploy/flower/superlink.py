"""Owner's calls to a SuperLink: accept keys, submit the app, stop a run. Each by a process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedloom.core.files import atomic_write, private_folder, sub_folder
from fedloom.deploy.flower.supervisor import process_environment, program

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


class SuperLinkError(Exception):
    """Flower refused a call, or did not answer; the text is what it said."""


@dataclass(frozen=True, slots=True)
class SiteKey:
    """A key to accept: the file of the public key, and the name of its holder."""

    key: str
    name: str


@dataclass(frozen=True, slots=True)
class Admission:
    """Result of accepting keys: the node of each accepted key, and why others were refused, by fingerprint of the key."""

    nodes: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SuperLink:
    """The SuperLink at `port` of loopback; Flower's settings are kept in `home`. `certificate` None: without TLS."""

    home: Path
    port: int
    certificate: Path | None

    def prepare(self, app: str) -> None:
        """Write down where the SuperLink is, and the app that names `app`. It has no client part; Flower wants a name there."""
        private_folder(self.home)
        sub_folder(self.home / "app")
        secure = (
            "insecure = true"
            if self.certificate is None
            else f"root-certificates = {json.dumps(str(self.certificate))}"
        )
        connection = (
            f'[superlink]\ndefault = "{HERE}"\n\n[superlink.{HERE}]\naddress = "127.0.0.1:{self.port}"\n{secure}\n'
        )
        for path, text in (
            (self.home / "config.toml", connection),
            (self.home / "app" / "pyproject.toml", APP.format(app=app)),
        ):
            with atomic_write(path) as draft:
                draft.write_text(text, encoding="utf-8")

    def admit(self, listed: Mapping[str, SiteKey]) -> Admission:
        """Accept these keys, by their fingerprints, and no others. Flower takes the key of who went never again.

        Raises SuperLinkError where the SuperLink cannot be asked; then it is not known who may come.
        """
        where = [str(self.port), *([] if self.certificate is None else [str(self.certificate)])]
        text = json.dumps({key: asdict(one) for key, one in listed.items()})
        done = self._run([sys.executable, "-m", "fedloom.deploy.flower.register_keys", *where], text)
        if done.returncode:
            raise SuperLinkError((done.stderr or done.stdout).strip()[-500:])
        return Admission(**json.loads(done.stdout))

    def submit(self, folder: Path, attempt: int) -> int:
        """Start a Flower run of the app; returns its number.

        All others are stopped first, and what they left at the sites is dropped: also one whose number was never returned,
        because the SuperLink ended or hung. It would hold the folder against this one.
        """
        for run in self._ask("list", HERE).get("runs", []):
            if not str(run["status"]).startswith("finished"):
                self._ask("stop", str(run["run-id"]), HERE)
        config = f"folder={json.dumps(str(folder))} attempt={attempt}"
        return int(self._ask("run", str(self.home / "app"), HERE, "--run-config", config)["run-id"])

    def _ask(self, *words: str) -> Mapping[str, Any]:
        """Call Flower's command line; returns its JSON."""
        done = self._run([program("flwr"), *words, "--format", "json"])
        start = done.stdout.find("{")
        try:
            answer: Mapping[str, Any] = json.loads(done.stdout[start:]) if start >= 0 else {}
        except json.JSONDecodeError:
            answer = {}
        if done.returncode or not answer.get("success"):
            raise SuperLinkError(str(answer.get("error-message") or done.stderr or done.stdout).strip()[-500:])
        return answer

    def _run(self, command: Sequence[str], input_text: str = "") -> subprocess.CompletedProcess[str]:
        """A process to its end. Raises SuperLinkError where that does not come."""
        try:
            return subprocess.run(
                command,
                env=process_environment(self.home),
                input=input_text,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise SuperLinkError(f"the SuperLink was asked and did not answer within {TIMEOUT:.0f} s") from error
