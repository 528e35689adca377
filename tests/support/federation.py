"""A federation on this machine for benches and tests: a run file, a folder for the server and one for each site, real processes.

TLS and keys are on. What stands in the settings is what a newcomer would write there.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fedloom.core.files import private_folder
from fedloom.core.seeds import simulated_secret
from fedloom.deploy.flower import app_outcome, keys
from fedloom.deploy.flower.supervisor import free_port, program
from fedloom.deploy.site import export_sites
from fedloom.deploy.site.site_secret import SECRET
from fedloom.runs.run_file import load_run_file
from tests.support.tiny_models import tiny_encoder, toy_rows

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
RUNFILE = """\
from pathlib import Path

from fedloom import IID, FedFa, FixedRank, Limits, Plan, Run, Table, Training

HERE = Path(__file__).parent
run = Run(
    name="federation",
    model=str(HERE / "model"),
    data=Table(HERE / "train.jsonl", HERE / "test.jsonl"),
    partition=IID({clients}),
    schedule=FedFa(window=4, max_in_flight={clients}),
    plan=Plan(FixedRank(4), local_steps={steps}),
    training=Training(learning_rate=1e-2, batch_size=8, max_length=32),
    limits=Limits(versions={versions}, evaluate_every=0),
    held_out=0.0,
    threads=1,
    seed={seed},
)
"""
MARKS: Mapping[str, tuple[str, ...]] = {
    "superlink": ("flower-superlink",),
    "gate": ("fedloom.deploy.flower.gate",),
    "worker": ("fedloom worker",),
    "supernode": ("flower-supernode", "fedloom.deploy.flower.supernode"),
}
"""What the command line of each part says, one of these."""


@dataclass(slots=True)
class Federation:
    """`folder` holds `run.py`, `server/` and `sites/NAME/`; `host` is where sites find the server, `inside` what a command of
    a place ("server" or a site) is put behind, to run it on another host.
    """

    folder: Path
    names: Sequence[str]
    port: int
    host: str = "127.0.0.1"
    inside: Mapping[str, Sequence[str]] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def server(self) -> Path:
        """The server's folder."""
        return self.folder / "server"

    def serve(self, *words: str) -> None:
        """`fedloom serve`, for as many clients as there are sites."""
        given = ["--folder", str(self.server), "--clients", str(len(self.names)), "--port", f"0.0.0.0:{self.port}"]
        self._begin("server", "serve", str(self.folder / "run.py"), *given, *words)

    def region(self, config: Path) -> None:
        """`fedloom region` with these settings, for as many clients as there are sites."""
        given = ["--config", str(config), "--folder", str(self.server), "--clients", str(len(self.names))]
        self._begin("server", "region", str(self.folder / "run.py"), *given, "--port", f"0.0.0.0:{self.port}")

    def join(self, name: str) -> None:
        """`fedloom join` for this site, which asks for work five times a second."""
        self._begin(
            name, "join", "--config", str(self.folder / "sites" / name / "site.toml"), "--idle", "0.2", "--accept"
        )

    def _begin(self, place: str, *words: str) -> None:
        command = [*self.inside.get(place, ()), program("fedloom"), *words]
        with (self.folder / f"{place}.out").open("ab") as out:
            self.processes[place] = subprocess.Popen(command, stdout=out, stderr=out, env=environment())

    def said(self, place: str) -> str:
        """All that the command of this place has printed."""
        return (self.folder / f"{place}.out").read_text(encoding="utf-8", errors="replace")

    def pid(self, place: str, part: str) -> int | None:
        """The process of a part, while it runs: "superlink", "gate", "serverapp" of the server, "worker", "supernode" of a site."""
        if part == "serverapp":
            word = (
                app_outcome.read_outcome(self.server, app_outcome.last_attempt(self.server))
                if self.server.exists()
                else None
            )
            return word.pid if word and word.lives and not word.ended else None
        parent = self.processes[place].pid
        return next((pid for pid in children(parent) if any(mark in command_of(pid) for mark in MARKS[part])), None)

    def lines(self) -> list[dict[str, Any]]:
        """The whole lines of the trace so far."""
        path = self.server / "run" / "trace.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]

    def status(self) -> Mapping[str, Any]:
        """What the server wrote last, {} before."""
        with suppress(OSError, ValueError):
            told: Mapping[str, Any] = json.loads((self.server / "status.json").read_bytes())
            return told
        return {}

    def version(self) -> int:
        """As far as the server said."""
        return int(self.status().get("version", 0))

    def over(self) -> bool:
        """Whether the server's command has ended."""
        return self.processes["server"].poll() is not None

    def close(self) -> None:
        """End all."""
        for one in self.processes.values():
            if one.poll() is None:
                one.send_signal(signal.SIGTERM)
        for one in self.processes.values():
            try:
                one.wait(60)
            except subprocess.TimeoutExpired:
                one.kill()
                one.wait()


def environment() -> dict[str, str]:
    """Of this process, for commands that run this source on one thread."""
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def make(
    folder: Path, clients: int, versions: int, steps: int, seed: int = 0, host: str = "127.0.0.1", text: str = RUNFILE
) -> Federation:
    """A run of a tiny model on toy sentences that needs some eighty answers to learn them; its sites, keys and settings."""
    tiny_encoder(folder / "model")
    for name, rows in (("train", toy_rows(1000, 1)), ("test", toy_rows(400, 2))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.py").write_text(text.format(clients=clients, versions=versions, steps=steps, seed=seed))
    export_sites.export_sites(load_run_file(folder / "run.py"), folder / "sites")
    made = Federation(folder, sorted(one.name for one in (folder / "sites").iterdir()), free_port(), host)
    for name in made.names:
        write_secret(folder / "sites" / name / "state", simulated_secret(seed, name))
    keys.new(made.server, [host])
    for name in made.names:
        let_in(made, name)
    return made


def write_secret(state: Path, secret: bytes) -> None:
    """Give a site this secret before its first start: with that of a simulation its draws repeat from run to run."""
    (private_folder(state) / SECRET).write_text(secret.hex())
    (state / SECRET).chmod(0o600)


def let_in(made: Federation, name: str) -> None:
    """A key for this site, and settings that name it."""
    site = made.folder / "sites" / name
    private, public = keys.site(name, site)
    keys.add(public, name, made.server)
    lines = (site / "site.toml").read_text().splitlines()
    own = {"server": f"{made.host}:{made.port}", "ca": str(made.server / "keys" / "ca.crt"), "key": private.name}
    kept = [line for line in lines if not re.match(r"(# )?(server|ca|key) = ", line)]
    (site / "site.toml").write_text("\n".join([f"{key} = {json.dumps(value)}" for key, value in own.items()] + kept))


@contextmanager
def running(made: Federation) -> Iterator[Federation]:
    """Server and all sites."""
    try:
        made.serve()
        for name in made.names:
            made.join(name)
        yield made
    finally:
        made.close()


def until(true: Callable[[], T], seconds: float, why: str, every: float = 0.1) -> T:
    """Wait for it, and return what it is. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not (found := true()):
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:.0f} s in vain: {why}")
        time.sleep(every)
    return found


def children(parent: int) -> list[int]:
    """Of this process and theirs."""
    of = dict[int, list[int]]()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            of.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found = list(of.get(parent, []))
    for pid in found:
        found += of.get(pid, [])
    return found


def command_of(pid: int) -> str:
    """Its words; of one that has gone, none."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
