"""A federation on this machine, to try a run: a server and sites with TLS and keys on loopback, each a process of its own.

Its folder:

    federation.json    what it was made of
    server/            the folder of `fedloom serve`
    sites/NAME/        a folder for each site: its rows, settings, key, and the server's certificate
    logs/              what each process has printed
    README.md          how the server and each site move to hosts of their own

Server and sites are the commands `fedloom serve` and `fedloom join`, so all that holds for them holds here.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from fedloom.core.errors import UNREADABLE, Refused
from fedloom.core.files import atomic_write, open_regular, private_folder, read_json, write_json
from fedloom.core.schema import Decoder
from fedloom.deploy.flower import keys
from fedloom.deploy.flower.roster import ROSTER, read_roster
from fedloom.deploy.flower.server_processes import HOME
from fedloom.deploy.flower.supervisor import (
    LogFollower,
    die_with_parent,
    free_port,
    hold_folder,
    is_listening,
    program,
    stop_on_sigterm,
)
from fedloom.deploy.server.config import CONFIG_FILE, RUN_FOLDER
from fedloom.deploy.site.export_sites import SITE_FILE, export_sites
from fedloom.runs.run import Run
from fedloom.runs.run_file import load_run_file, override

LOOPBACK = "127.0.0.1"
BY_NUMBER = "site-"
"""How names of sites begin that are made of their numbers."""
FILE, README, LOGS, SERVER, SITES = "federation.json", "README.md", "logs", "server", "sites"
TICK = 0.2
"""Seconds between two looks at what was printed."""
IDLE = 0.3
"""Seconds between two polls of an idle site: all is on one machine, and tasks are short."""
ENDING, STOPPING = 40.0, 60.0
"""Seconds for sites to end after the server has, and for all to end when they are asked to."""

NEWS = re.compile(r"\d\d:\d\d:\d\d |Accepted |Finished |fedloom: ")
"""How lines begin that are shown; others, such as the terms of the run, stand in the log of their process only."""

Show = Callable[[str, str], None]
"""Called with the name of a process ("server", or a site's) and a line that it has printed."""


@dataclass(frozen=True, slots=True)
class LocalFederation:
    """What a federation on this machine was made of.

    Fields:
        runfile: path of the run file.
        settings: fields of the run that were given with `--set`, and its number of clients.
        port: port of the server on loopback.
        sites: names of the sites.
    """

    runfile: str
    settings: tuple[str, ...]
    port: int
    sites: tuple[str, ...]

    def serve_command(self, folder: Path) -> list[str]:
        """Return the command of the server; it continues a deployment that is there."""
        server = folder / SERVER
        given = ["--folder", str(server), "--clients", str(len(self.sites)), "--port", f"{LOOPBACK}:{self.port}"]
        given += [word for setting in self.settings for word in ("--set", setting)]
        resume = ["--resume"] if (server / CONFIG_FILE).exists() else []
        return ["serve", self.runfile, *given, *resume]

    def join_command(self, folder: Path, site: str) -> list[str]:
        """Return the command of a site."""
        return ["join", "--config", str(folder / SITES / site / SITE_FILE), "--accept", "--idle", str(IDLE)]


def make_federation(file: Path, settings: Sequence[str], sites: int, folder: Path) -> LocalFederation:
    """Make the folder of a federation: the run's data divided over so many sites, their settings and keys.

    The partition of the run is made for as many clients; where the data name their clients, the first ones become sites.

    Raises:
        Refused: as reading the run file and its data; the run has regions; there are fewer clients; `folder` is in use.
    """
    file = file.resolve()  # as the server reads it
    own = [one for one in settings if not one.startswith("patience.")]  # those are the server's alone
    run = override(load_run_file(file), own)
    if run.hierarchy is not None:
        raise Refused(
            "hierarchy", type(run.hierarchy).__name__, "regions need servers of their own; see docs/deployment.md"
        )
    clients = _clients_setting(run, sites)
    given = (*settings, *clients)
    made = LocalFederation(str(file), given, free_port(), ())
    files = export_sites(override(run, clients), folder / SITES, f"{LOOPBACK}:{made.port}", sites, site_name)
    made = replace(made, sites=tuple(one.parent.name for one in files))
    server = folder / SERVER
    certificate = keys.new(server, ["localhost"])
    for name in made.sites:
        _, public = keys.site(name, folder / SITES / name)
        keys.add(public, name, server)
        shutil.copy(certificate, folder / SITES / name)
    with atomic_write(folder / README) as draft:
        draft.write_text(host_guide(made, folder), encoding="utf-8")
    write_json(folder / FILE, asdict(made))
    return made


def read_federation(folder: Path) -> LocalFederation:
    """Return what the federation in a folder was made of. Raises Refused where there is none."""
    try:
        fields = {"type": LocalFederation.__name__, **read_json(folder / FILE)}
        federation: LocalFederation = Decoder().read(LocalFederation, fields)
    except (*UNREADABLE, OSError) as error:
        raise Refused("--resume", str(folder), f"it holds no usable {FILE}; `fedloom up` makes one") from error
    return federation


def site_name(number: int, client: str) -> str:
    """Return the client's name for a site, or where a key, a folder or a log cannot have that name, one by its number.

    >>> site_name(1, "north"), site_name(2, "ward 7"), site_name(3, "server"), site_name(4, "site-02")
    ('north', 'site-02', 'site-03', 'site-04')
    """
    fits = keys.NAME.fullmatch(client) and "." not in client and client != SERVER and not client.startswith(BY_NUMBER)
    return client if fits else f"{BY_NUMBER}{number:02d}"


def _clients_setting(run: Run, sites: int) -> list[str]:
    """Return the setting by which the run's partition makes so many clients; none where the data name them."""
    clients = getattr(run.partition, "clients", None)
    return [f"partition.clients={sites}"] if isinstance(clients, int) and clients != sites else []


def host_guide(federation: LocalFederation, folder: Path) -> str:
    """Return how the server and each site move to a host of their own, as Markdown."""
    settings = "".join(f" --set {shlex.quote(one)}" for one in federation.settings if "partition." not in one)
    first, count = federation.sites[0], len(federation.sites)
    return f"""\
# From this trial to hosts of their own

`fedloom up` ran these commands on one machine. On real hosts the same commands run apart.
Each site then has its own data, which never leave it, and its own key, which is made there.

## The server

On its host (here called fed.example.org, port 8080 open to the sites):

    fedloom keys new server --host fed.example.org
    fedloom serve {shlex.quote(Path(federation.runfile).name)} --folder server --clients {count}{settings}

Copy the run file there. The server needs the model and the test examples, and no training data.

## Each site

On its host, for the site {first}:

    fedloom keys site {first}

Send `{first}.pub` to the server. There: `fedloom keys add {first}.pub --name {first} --folder server`.
Get `server/keys/ca.crt` from it. Copy `{folder / SITES / first / SITE_FILE}` and change three things in it:

- `server = "fed.example.org:8080"`
- `path` in the section with the data: the site's own file, with its columns
- `path` in `[model]`: the site's copy of the same model

Then, without `--accept`, so that the owner reads the terms of the run first:

    fedloom join --config site.toml

Leave `state` here: it belongs to this trial. All fields of `site.toml`: docs/site.md. More: docs/deployment.md.
"""


# Processes ------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class FederationProcess:
    """A process of the federation.

    Fields:
        name: "server", or the site's.
        command: words of its `fedloom` command.
        process: the process.
        log: what it prints.
        ended: whether its end was shown.
    """

    name: str
    command: Sequence[str]
    process: subprocess.Popen[bytes]
    log: LogFollower
    ended: bool = False


def run_federation(federation: LocalFederation, folder: Path, show: Show) -> None:
    """Run the server and the sites of a folder until the run has ended; all have ended then, also after Ctrl-C or SIGTERM.

    A site that fails is not started again here: it can be, with its own command, while the others go on.

    Raises:
        Refused: another process runs it; the server could not carry out the run; no site is left.
        KeyboardInterrupt: it was stopped. The folder can continue.
    """
    with hold_folder(folder / LOGS / "lock", folder), stop_on_sigterm() as asked_to_stop:
        with _ended_after() as members:
            server = _started(SERVER, federation.serve_command(folder), folder)
            members.append(server)
            until = math.inf
            while time.monotonic() < until and any(one.process.poll() is None for one in members):
                asked_to_stop()
                if len(members) == 1 and _expects_sites(federation, folder):
                    members += [
                        _started(site, federation.join_command(folder, site), folder) for site in federation.sites
                    ]
                _show_news(members, show)
                if server.process.poll() is not None:
                    until = min(until, time.monotonic() + (ENDING if server.process.returncode == 0 else 0.0))
                else:
                    _require_sites(members[1:], folder)
                time.sleep(TICK)
            _show_news(members, show)
        if server.process.returncode:
            words = [line for line in LogFollower(server.log.path).lines() if line]
            last = words[-1].removeprefix("fedloom: ") if words else "it printed nothing"
            raise Refused("server", str(server.log.path), f"it ended with code {server.process.returncode}: {last}")


def _expects_sites(federation: LocalFederation, folder: Path) -> bool:
    """Whether the server listens and has authorised the sites: before that they would be refused, and wait to try again."""
    authorised = {entry.name for entry in read_roster(folder / SERVER / HOME / ROSTER)}
    return authorised >= {*federation.sites} and is_listening(LOOPBACK, federation.port)


def _require_sites(sites: Sequence[FederationProcess], folder: Path) -> None:
    """Raise Refused where all sites have ended and one of them has failed: the run would wait for ever."""
    codes = [one.process.poll() for one in sites]
    if any(codes) and None not in codes:
        raise Refused("sites", len(sites), f"all have ended before the run had; see {folder / LOGS}")


def _show_news(members: Sequence[FederationProcess], show: Show) -> None:
    """Show what was printed since the last time, and which site has failed."""
    for one in members:
        code = one.process.poll()  # before its lines are read: the last ones are among them
        for line in filter(NEWS.match, one.log.lines()):
            show(one.name, line)
        if code is not None and not one.ended:
            one.ended = True
            if code:
                how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"
                again = shlex.join(["fedloom", *one.command])
                show(one.name, f"{how}; start it again with: {again}" if one.name != SERVER else how)


@contextmanager
def _ended_after() -> Iterator[list[FederationProcess]]:
    """Yield a list for processes; at the end of the block all of them are ended in order."""
    members = list[FederationProcess]()
    try:
        yield members
    finally:
        for one in members:
            if one.process.poll() is None:
                one.process.terminate()
        until = time.monotonic() + STOPPING
        for one in members:
            try:
                one.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                one.process.kill()  # and the kernel ends its children with it
                one.process.wait()


def _started(name: str, words: Sequence[str], folder: Path) -> FederationProcess:
    """Start a command, whose output goes to a log."""
    path = private_folder(folder / LOGS) / f"{name}.log"
    follower = LogFollower(path).skip()
    with open_regular(path, "ab") as log:
        process = subprocess.Popen(
            [program("fedloom"), *words],
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "NO_COLOR": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for this process, which ends the others in order
            preexec_fn=partial(die_with_parent, os.getpid()),
        )
    return FederationProcess(name, words, process, follower)


def run_folder(folder: Path) -> Path:
    """Return the run folder of a federation."""
    return folder / SERVER / RUN_FOLDER
