"""A site of a deployment: SuperNode, executor and worker, kept alive together."""

from __future__ import annotations

import math
import ssl
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPSConnection
from pathlib import Path
from threading import Thread

from fedloom.core.errors import Refused
from fedloom.core.files import private_tree
from fedloom.core.policies import do_nothing
from fedloom.deploy import json_log
from fedloom.deploy.flower.address import is_loopback, parse_address
from fedloom.deploy.flower.supervisor import (
    LogFollower,
    ProcessSpec,
    Supervisor,
    free_port,
    hold_folder,
    process_environment,
    program,
    stop_on_sigterm,
    write_secret,
)

TICK = 0.5
LINGER = 4.0
"""Seconds between the word that the run has ended and the end of a site, in which its reply is delivered."""
WORKER_LOG, RUN_ENDED = "fedloom.worker", "run ended"
"""Name of the worker's logger, and of the event by which it says that the run has ended (`site.worker`, which is heavy)."""
IDLE = 3.0
"""Seconds between two polls of an idle SuperNode for work, as Flower has it."""
EXPLANATIONS = {
    "CERTIFICATE_VERIFY_FAILED": "the server's certificate is not one of the authority that this site trusts, is for another "
    "name, or has expired",
    "[code: 2004]": "the server does not know this site's key (fedloom keys add), or another process of this site is still connected "
    "with it: a connection that was cut is freed after a minute",
    "[code: 2001]": "the server accepts no site without a key",
    "[code: 2900]": "this machine's clock and the server's differ by more than the server allows; set them (NTP)",
}
"""Messages of Flower and of the gate on leaving, and what they mean."""
CLOCK_TOLERANCE, CLOCK_AGAIN = 5.0, 30.0
"""Seconds by which clocks may differ without a word, and between two tries to ask for the server's."""


@dataclass(frozen=True, slots=True)
class SiteSetup:
    """Settings and files that a site needs to join a deployment.

    Fields:
        server: address of the server, host:port or [IPv6 address]:port.
        folder: files of the site.
        socket: Unix socket of its worker.
        worker: command that starts the worker.
        ca: certificate of the authority that it trusts (None: no TLS).
        key: its private key (None: no key).
        idle: time between two polls for work (s; None: as Flower has it, three).
    """

    server: str
    folder: Path
    socket: Path
    worker: Sequence[str]
    ca: Path | None = None
    key: Path | None = None
    idle: float | None = None

    def __post_init__(self) -> None:
        address = parse_address("server", self.server)
        object.__setattr__(self, "server", str(address))
        if (self.ca is None or self.key is None) and not is_loopback(address.host):
            raise Refused("--insecure", self.server, "without a key and TLS a site connects to its own machine only")
        if self.idle is not None and not 0.05 <= self.idle <= 60.0:
            raise Refused("--idle", self.idle, "choose 0.05 to 60 seconds")
        for name, path in (("ca", self.ca), ("key", self.key)):
            if path is not None and not path.is_file():
                raise Refused(name, str(path), "there is no such file; see `fedloom keys`")


def site_setup(config: Path, insecure: bool, idle: float | None = None) -> SiteSetup:
    """Return the setup that a site's settings describe.

    Raises:
        Refused: they lack key or authority, and `insecure` is not set.
    """
    from fedloom.deploy.site.settings import read_site  # heavy: it reads data

    site = read_site(config)
    if not insecure and (site.ca is None or site.key is None):
        raise Refused(
            "key",
            str(site.key),
            "name the site's `key` and the server's `ca` (see `fedloom keys`); on one machine, --insecure",
        )
    worker = [program("fedloom"), "worker", "--config", str(config.resolve())]
    secure = {} if insecure else {"ca": site.ca, "key": site.key}
    return SiteSetup(site.server, site.folder.resolve(), site.socket.resolve(), worker, idle=idle, **secure)


def site_processes(setup: SiteSetup, runtime: int) -> list[list[ProcessSpec]]:
    """Return the processes of a site. SuperNode and executor live and die together.

    A SuperNode waits without end for the answer to a message that its executor took along; and one that leaves in order
    reports to the server at once that the message is lost. The worker goes on: it gives the same answer when it is asked again.
    """
    variables = process_environment(setup.folder / "flower")
    shared = str(setup.folder / "flower" / "secret")
    node = ["--superlink", setup.server, "--host", "127.0.0.1", "--port", str(runtime), "--isolation", "process"]
    node += ["--superexec-auth-secret-file", shared]
    if setup.ca is None or setup.key is None:
        node.append("--insecure")
    else:
        node += ["--root-certificates", str(setup.ca), "--auth-supernode-private-key", str(setup.key)]
    idle = [] if setup.idle is None else ["--idle", str(setup.idle)]
    execute = ["--runtime", f"127.0.0.1:{runtime}", "--socket", str(setup.socket), "--secret", shared]
    execute += ["--ask", f"{min(max((setup.idle or IDLE) / 6, 0.1), 2.0):.2f}"]
    return [
        [ProcessSpec("worker", setup.worker, variables)],
        [
            ProcessSpec(
                "supernode",
                [
                    sys.executable,
                    "-m",
                    "fedloom.deploy.flower.supernode",
                    *idle,
                    "--was",
                    str(setup.folder / "flower" / "node"),
                    "--",
                    *node,
                ],
                variables,
            ),
            ProcessSpec("executor", [sys.executable, "-m", "fedloom.deploy.flower.executor", *execute], variables),
        ],
    ]


def region_processes(config: Path, insecure: bool) -> list[list[ProcessSpec]]:
    """Return the processes that connect a region to the server above it; in the place of a worker, its ServerApp answers.

    Raises:
        Refused: as `site_setup`, or the settings are not those of a region.
    """
    from fedloom.deploy.site.settings import read_site

    if not read_site(config).region:
        raise Refused(
            "--config", str(config), "these are the settings of a site with data; a region's say `region = true`"
        )
    place = site_setup(config, insecure)
    private_tree(place.folder)
    write_secret(place.folder / "flower" / "secret")
    return site_processes(place, free_port())[1:]


def clock_ahead(server: str, ca: Path) -> float | None:
    """Return by how many seconds this machine's clock is ahead of the server's, to half a second; None: the server is not there.

    It asks the server without a key, which is refused, with the time.
    """
    address = parse_address("server", server)
    trusted = ssl.create_default_context(cafile=str(ca))
    server_line = HTTPSConnection(address.host, address.port, timeout=10.0, context=trusted)
    with (
        suppress(OSError, HTTPException, ValueError, TypeError),
        closing(server_line),
    ):  # not there, or no server of ours
        server_line.connect()
        before = time.time()
        server_line.request("POST", "/v1/fleet/pull-messages", b"")
        date = parsedate_to_datetime(server_line.getresponse().headers["Date"])
        return (before + time.time()) / 2 - date.timestamp() - 0.5
    return None


def clock_warning(ahead: float) -> str:
    """Return what to say of a clock that is ahead of the server's by so many seconds; "": nothing."""
    if abs(ahead) <= CLOCK_TOLERANCE:
        return ""
    where = "ahead of" if ahead > 0 else "behind"
    return f"this machine's clock is {abs(ahead):.0f} s {where} the server's; set it (NTP), or the server will refuse this site"


def _compare_clocks(server: str, ca: Path, say: Callable[[str], None]) -> None:
    """Say once, as soon as the server answers, that the clocks differ."""
    while (ahead := clock_ahead(server, ca)) is None:
        time.sleep(CLOCK_AGAIN)
    if warning := clock_warning(ahead):
        say(warning)


@dataclass(slots=True)
class SiteLogs:
    """What a site's processes write to their logs, in words for its owner.

    Fields:
        server: address of the server.
        supernode: log of what talks to the server.
        worker: log of what trains.
        say: prints a line.
        silent: whether the server does not answer.
        repeated: the last warning of the worker; the same again is not printed.
    """

    server: str
    supernode: LogFollower
    worker: LogFollower
    say: Callable[[str], None]
    silent: bool = False
    repeated: str = ""

    def look(self) -> bool:
        """Print what is new; returns whether the worker has learnt that the run has ended."""
        for line in self.supernode.lines():
            if "SuperNode ID:" in line:
                self.say(f"connected to the server at {self.server}")
                self.silent = False
            elif "retrying in" in line and not self.silent:
                self.say(f"the server at {self.server} does not answer; retrying until it does")
                self.silent = True
            elif "Failed to send message" in line:
                self.say(f"the server rejected an answer: {line.partition('Failed to send message')[2].strip()}")
        ended = False
        for event, message in json_log.notable_lines(self.worker.lines(), WORKER_LOG):
            if event or message != self.repeated:
                self.say(message)
            self.repeated = "" if event else message
            ended = ended or event == RUN_ENDED
        return ended


def join_deployment(
    setup: SiteSetup, say: Callable[[str], None], look: Callable[[], None] = do_nothing, stay: bool = False
) -> None:
    """Take part until the server says that the run has ended, or until stopped: then it ends with KeyboardInterrupt.

    Args:
        setup: the site.
        say: prints what happens.
        look: called twice a second; shows what a server offers.
        stay: wait for the next run of the same server where one has ended.

    Raises:
        Refused: another process holds the folder.
    """
    if wide := private_tree(setup.folder):
        say(f"other users could read {wide} of the files and folders in {setup.folder}; now only this user can")
    with hold_folder(setup.folder / "flower" / "lock", setup.folder), stop_on_sigterm() as asked_to_stop:
        write_secret(setup.folder / "flower" / "secret")
        supervisor = Supervisor(
            site_processes(setup, free_port()), setup.folder / "logs", lambda line: say(explain(line))
        )
        if setup.ca is not None:
            Thread(target=_compare_clocks, args=(setup.server, setup.ca, say), daemon=True).start()
        supernode, worker = (
            LogFollower(setup.folder / "logs" / f"{name}.log").skip() for name in ("supernode", "worker")
        )
        logs, end = SiteLogs(setup.server, supernode, worker, say), math.inf
        try:
            while time.monotonic() < end:
                asked_to_stop()
                supervisor.look()
                if logs.look() and not stay:
                    end = min(end, time.monotonic() + LINGER)
                look()
                time.sleep(TICK)
        finally:
            supervisor.stop()


def explain(line: str) -> str:
    """Return a supervisor's line, explained where it is one of Flower's known messages."""
    return (
        "; ".join([line.partition(": ")[0], *(word for sign, word in EXPLANATIONS.items() if sign in line)])
        if is_explained(line)
        else line
    )


def is_explained(line: str) -> bool:
    """Whether an explanation is known for a line."""
    return any(sign in line for sign in EXPLANATIONS)
