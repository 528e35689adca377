"""The server of a deployment: starts Flower's processes, lets the sites in, and sees the run through whatever is killed."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from fedloom.core.errors import Refused
from fedloom.core.files import disk_full_error, write_json
from fedloom.deploy.flower import keys
from fedloom.deploy.flower.address import Address, listen_at
from fedloom.deploy.flower.app_outcome import AppOutcome, last_attempt, read_outcome
from fedloom.deploy.flower.roster import ROSTER, RosterEntry, read_roster, write_roster
from fedloom.deploy.flower.server_processes import LOCK, ServerSetup, server_processes
from fedloom.deploy.flower.superlink import SiteKey, SuperLink, SuperLinkError
from fedloom.deploy.flower.supervisor import (
    LogFollower,
    ProcessSpec,
    Supervisor,
    free_port,
    hold_folder,
    is_listening,
    stop_on_sigterm,
    write_secret,
)
from fedloom.deploy.server.status import REFUSALS_FILE, read_status
from fedloom.report.numbers import plural

TICK, AGAIN, RELAY = 0.5, 5.0, 10.0
"""Seconds between two looks, after Flower has said no, and between two lines on what the driver waits for."""
QUICK, MOST_QUICK = 60.0, 5
"""A ServerApp that ends within so many seconds and makes no version came to nothing; after so many of those in a row we give up."""
STARTS = 180.0
"""Seconds in which a submitted app must have started."""
ROOM = 2**24
"""Bytes that must be free on the disk before a ServerApp is begun."""
CLEARING = 30.0
"""Seconds until a new ServerApp is begun after one that found the disk full, although there was so much room."""
NOTE = "deployment.json"
"""Configuration of the deployment, in the folder of the server (`server.config`, which is heavy)."""
GO_ON = "then continue with `fedloom serve ... --resume`"

LOOPBACK = "127.0.0.1"

MOVED = re.compile(r"\[Fleet\.(?:De)?[Aa]ctivateNode\] (Activated|Deactivated) node_id=(\d+)")

Say = Callable[[str], None]


@dataclass(slots=True)
class Serving:
    """State of one `fedloom serve`: what it has started and learnt so far."""

    server: ServerSetup
    control: SuperLink
    supervisor: Supervisor
    say: Say
    log: LogFollower
    attempt: int
    run: int = 0
    since: float = 0.0
    quick: int = 0
    reached: int = 0
    up: bool = False
    names: dict[str, str] = field(default_factory=dict)
    troubles: dict[str, str] = field(default_factory=dict)
    pauses: dict[str, float] = field(default_factory=dict)
    announced: dict[str, tuple[Any, Any, Any]] = field(default_factory=dict)
    line: str = ""
    relayed: float = -RELAY
    full: bool = False
    here: set[str] = field(default_factory=set)
    nodes: dict[str, int] = field(default_factory=dict)
    keys_sent: bool = False
    listed: dict[str, keys.Registered] = field(default_factory=dict)
    roster: list[RosterEntry] | None = None
    gate_log: LogFollower | None = None
    refusals: dict[str, int] = field(default_factory=dict)

    def look(self) -> str | None:
        """Check the processes and the run once; returns why the run ended, once it has.

        Raises:
            Refused: the run cannot be carried out, or comes to nothing again and again.
        """
        self._try(self._list_keys)
        self._try(self.supervisor.look)
        if self.supervisor.pid("superlink") is None or not is_listening(LOOPBACK, self.control.port):
            return None
        if not self.up:
            self.up = True
            self.say(f"listening at {self.server.address}; sites connect with fedloom join")
        self._look_for_room()
        self._try(self._admit)
        self._announce()
        self._try(self._say_refusals)
        self._relay()
        return self._try(self._follow)

    def _try(self, step: Callable[[], str | None]) -> str | None:
        """A step that Flower may refuse: the SuperLink has just gone, or says no. It is tried again, and said once.

        As it is where the disk is full, which `_look_for_room` says.
        """
        name = step.__name__
        if time.monotonic() < self.pauses.get(name, 0.0):
            return None
        try:
            return step()
        except OSError as error:
            if not disk_full_error(error):
                raise
            self.pauses[name] = time.monotonic() + AGAIN
        except SuperLinkError as error:
            if str(error) != self.troubles.get(name):
                self.say(f"not yet: {error}")
            self.troubles[name], self.pauses[name] = str(error), time.monotonic() + AGAIN
        return None

    def _look_for_room(self) -> None:
        """Say that the disk is full, and that it is so no longer. No ServerApp is begun in between: it could write no checkpoint."""
        crammed = shutil.disk_usage(self.server.folder).free < ROOM
        if crammed != self.full:
            where = f"the disk of {self.server.folder}"
            if crammed:
                self.say(f"{where} is full; free space there and the run continues (if it has ended: {GO_ON})")
            else:
                self.say(f"{where} has free space again")
        self.full = crammed

    def _list_keys(self) -> None:
        """Read which keys are accepted, and tell the gate. A key that was removed is refused there at once.

        After a restart the gate goes by the nodes of before, until the SuperLink can be asked.
        """
        if self.server.insecure:
            return
        try:
            self.listed = {entry.fingerprint: entry for entry in keys.listed(self.server.folder)}
        except Refused as error:  # a file in `sites` that is no key
            raise SuperLinkError(str(error)) from error
        path = self.server.home / ROSTER
        before = {} if self.keys_sent else {entry.key: entry.node for entry in self.roster or read_roster(path)}
        nodes = {key: self.nodes.get(key) or before.get(one.key) for key, one in self.listed.items()}
        roster = [RosterEntry(one.key, one.name, node) for key, one in self.listed.items() if (node := nodes[key])]
        if roster != self.roster:
            write_roster(path, roster)
            self.roster = roster

    def _admit(self) -> None:
        """Let in the sites whose keys were added, and no longer those whose keys were removed."""
        if self.server.insecure:
            return
        listed = self.listed
        self.names = {fingerprint: entry.name for fingerprint, entry in listed.items()}
        if not self.keys_sent or listed.keys() != self.nodes.keys():
            self._send_keys({key: SiteKey(str(one.path), one.name) for key, one in listed.items()})
        if not listed and not self.run:
            self.say(
                "no site is authorised yet: `fedloom keys add PUB --name NAME --folder DIR` authorises one, also now"
            )

    def _send_keys(self, listed: Mapping[str, SiteKey]) -> None:
        """Send the SuperLink the keys that it may accept, until it has accepted them."""
        before, self.keys_sent = self.nodes, False
        done = self.control.admit(listed)
        self.nodes, self.keys_sent = done.nodes, True
        self._list_keys()
        for fingerprint in sorted(done.nodes.keys() - before.keys()):
            self.say(f"{listed[fingerprint].name} is authorised (key {fingerprint})")
        for fingerprint in sorted(before.keys() - done.nodes.keys()):
            self.say(f"key {fingerprint} is revoked: its site can no longer connect")
        if done.refused:
            raise SuperLinkError("; ".join(done.refused.values()))

    def _announce(self) -> None:
        """Say who came and who left, from the SuperLink's log."""
        of = {node: self.names.get(fingerprint) for fingerprint, node in self.nodes.items()}
        for came, number in (found.groups() for line in self.log.lines() if (found := MOVED.search(line))):
            name = of.get(int(number)) or f"node {number}"
            (self.here.add if came == "Activated" else self.here.discard)(name)
            what = "connected" if came == "Activated" else "disconnected"
            who = f"{name} {what} ({len(self.here)} of {plural(len(of), 'authorised site')})"
            self.say(who if of else f"a site {what} ({len(self.here)} connected)")

    def _say_refusals(self) -> None:
        """Say what the gate refused to a site whose key it knows, and write down how often, for `fedloom status`."""
        for line in self.gate_log.lines() if self.gate_log else []:
            with suppress(ValueError, LookupError, TypeError):  # not one of its lines of JSON
                note = json.loads(line)
                if note["event"] == "refused":
                    site, times = str(note["site"]), int(note["times"])
                    self.refusals[site] = self.refusals.get(site, 0) + times
                    often = f" ({times} calls since the last such line)" if times > 1 else ""
                    self.say(f"refused a call of {site}: {note['reason']}{often}")
                    write_json(self.server.folder / REFUSALS_FILE, self.refusals)

    def _relay(self) -> None:
        """Say what the driver waits for, when that has changed, and not too often."""
        note = self.server.folder / "status.json"
        if time.monotonic() < self.relayed + RELAY or not note.exists():
            return
        status = read_status(self.server.folder)
        self._tell_examples(status["clients"])
        line = f"version {status['version']} of {status['versions']}; waiting {status['waits']}"
        if line != self.line and status["waits"]:
            self.say(line)
            self.line, self.relayed = line, time.monotonic()

    def _tell_examples(self, clients: Mapping[str, Mapping[str, Any]]) -> None:
        """Say with how many examples each client counts, and where that is not what it says."""
        for name, client in clients.items():
            examples, counted, told = (client.get(key) for key in ("examples", "counted", "told"))
            if counted is None or self.announced.get(name) == (examples, counted, told):
                continue
            why = "" if counted == examples else f", counted as {counted}: at most three times the median of all sites"
            if told is not None:
                why += f"; its last answer says {told}, which is ignored"
            self.say(f"{name} is ready with {plural(int(examples or 0), 'training example')}{why}")
            self.announced[name] = (examples, counted, told)

    def _follow(self) -> str | None:
        """Submit the app, wait for its outcome, and submit it again where it was killed."""
        if not self.run:
            if self.full:
                return None
            self.attempt, self.since = self.attempt + 1, time.monotonic()
            self.run = self.control.submit(self.server.folder, self.attempt)
            self.say("starting the run: the server loads its model and the test examples")
            return None
        outcome, lived = read_outcome(self.server.folder, self.attempt), time.monotonic() - self.since
        if outcome is not None and outcome.ended:
            if outcome.reason:
                return outcome.reason
            if outcome.refused:
                raise Refused("FILE", str(self.server.folder), f"the run cannot be carried out: {outcome.refused}")
        elif outcome.lives if outcome is not None else lived < STARTS:
            return None
        reason, reached = self._why(outcome), self._version()
        self.quick = self.quick + 1 if lived < QUICK and not self.full and reached <= self.reached else 0
        self.reached = reached
        if self.quick >= MOST_QUICK:
            raise self._vain(outcome, reason)
        self.say(f"the ServerApp ended ({reason}); a new one continues from the last checkpoint")
        self.run = 0
        if outcome is not None and outcome.full:
            self.pauses[self._follow.__name__] = time.monotonic() + CLEARING
        return None

    def _version(self) -> int:
        """Return the version that the run has made, as far as its status says."""
        noted = (self.server.folder / "status.json").exists()
        return int(read_status(self.server.folder)["version"]) if noted else 0

    def _why(self, outcome: AppOutcome | None) -> str:
        """Return why a ServerApp ended that did not carry the run out."""
        if outcome is not None and (outcome.failed or outcome.full):
            return outcome.failed or f"the disk is full: {outcome.full} could not be written"
        return ("it was killed" if outcome else "it did not start") + (", and the disk is full" if self.full else "")

    def _vain(self, outcome: AppOutcome | None, reason: str) -> Refused:
        """Return the refusal of a run that comes to nothing again and again."""
        if outcome is not None and outcome.full:
            return disk_full(self.server, outcome.full)
        remedy = f"the run fails as soon as it starts: {reason}; see logs/serverapp.log"
        return Refused("FILE", str(self.server.folder), remedy)


def serve_deployment(
    server: ServerSetup, facts: Mapping[str, object], resume: bool, say: Say, more: Sequence[Sequence[ProcessSpec]] = ()
) -> str:
    """Carry out a deployment; returns why it ended. `facts` are written to `deployment.json` for the ServerApp, and `more` are
    processes to keep alive beside it.

    Raises:
        Refused: the folder is in use, or has a deployment already, or has none to resume, or its disk is full, or the address cannot
            be listened at, or the run cannot be carried out.
    """
    try:
        return _serve(server, facts, resume, say, more)
    except OSError as error:
        if not (lack := disk_full_error(error)):
            raise
        raise disk_full(server, lack.filename or str(server.home)) from error


def disk_full(server: ServerSetup, path: str) -> Refused:
    """Return the refusal that the disk has no room for this file, with what to do."""
    again = GO_ON if (server.folder / NOTE).exists() else "then give the same command again"
    return Refused(
        "--folder", str(server.folder), f"its disk is full: {path} could not be written; free space, {again}"
    )


def _serve(
    server: ServerSetup, facts: Mapping[str, object], resume: bool, say: Say, more: Sequence[Sequence[ProcessSpec]]
) -> str:
    note = server.folder / NOTE
    if note.exists() != resume:
        remedy = (
            "it holds no deployment to continue" if resume else "it holds a deployment already; --resume continues it"
        )
        raise Refused("--folder", str(server.folder), remedy)
    with hold_folder(server.home / LOCK, server.folder), listen_at("--port", server.address) as sockets:
        _check_metrics_port(facts.get("metrics_port"))
        write_json(note, {**facts, "insecure": server.insecure})
        (server.folder / REFUSALS_FILE).unlink(missing_ok=True)
        write_secret(server.home / "secret")
        inner = free_port()
        control = SuperLink(server.home, inner, None if server.insecure else server.folder / "keys" / "ca.crt")
        control.prepare(server.app)
        processes = server_processes(server, inner, [one.fileno() for one in sockets])
        supervisor = Supervisor([*processes, *map(list, more)], server.folder / "logs", say)
        log = LogFollower(server.folder / "logs" / "superlink.log").skip()
        gate_log = LogFollower(server.folder / "logs" / "gate.log").skip()
        serving = Serving(server, control, supervisor, say, log, last_attempt(server.folder), gate_log=gate_log)
        try:
            with stop_on_sigterm() as asked_to_stop:
                while (reason := serving.look()) is None:
                    asked_to_stop()
                    time.sleep(TICK)
                return reason
        finally:
            supervisor.stop()


def _check_metrics_port(port: object) -> None:
    """Raise Refused where the ServerApp could not listen there."""
    if isinstance(port, int):
        with listen_at("--metrics-port", Address(LOOPBACK, port)):
            pass
