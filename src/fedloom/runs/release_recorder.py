"""The release recorder: the observer that writes the ledger of a private run before anything else learns of a version.

A driver shows each step to its observers before it carries out what the step commands, and this one is the first of them. So a line
is on the disk before a version is scored, written to a log, saved in a checkpoint, or sent to anybody.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedloom.core.errors import Refused
from fedloom.core.events import Command, Event, InsideEdge, Release, ReleasesCounted
from fedloom.core.types import ClientId
from fedloom.privacy.accounting import Gaussian, merged_events
from fedloom.privacy.ledger import LEDGER, Ledger, LedgerEntry, Unit, Words
from fedloom.runs.job import Job
from fedloom.runs.private_run import client_event

ROUNDING = 1e-9
"""Share by which sums of spent privacy may differ from what was promised, by rounding."""


@dataclass(frozen=True, slots=True)
class ReleaseRecorder:
    """Writes each release of a run into its ledger, or refuses one that would tell more of a client than the run promises.

    Fields:
        ledger: the open ledger.
        promised: all that the run may release of one client.
        noise: where the noise comes from, for each line: "secret", or "simulated", which protects nobody.
    """

    ledger: Ledger
    promised: Gaussian
    noise: Literal["secret", "simulated"] = "secret"

    def __call__(self, now: float, event: Event, commands: Sequence[Command]) -> None:
        """Write the releases among these commands. Raises Refused before anything of them has left."""
        for edge, release in releases_of(commands):
            entry = release_entry(edge, release, self.noise)
            if client := self._overspent(entry):
                remedy = (
                    "a version would tell more of a client than the run promises: it was stopped and resumed after versions that "
                    "its last checkpoint does not know; begin a new run from its adapter, with a budget of its own"
                )
                raise Refused("privacy.most_answers", client, remedy)
            self.ledger.write(entry)

    def _overspent(self, entry: LedgerEntry) -> Unit | None:
        """The first client that would have spent more than promised; None if none would."""
        if self.ledger.has(entry):
            return None
        for client, event in entry.events.items():
            (total,) = merged_events((*self.ledger.spent.get(client, ()), event)) or (Gaussian(0.0),)
            if not isinstance(total, Gaussian) or total.mu > self.promised.mu * (1 + ROUNDING):
                return client
        return None


def release_recorders(job: Job, folder: Path, opened: ExitStack) -> list[ReleaseRecorder]:
    """Open the ledger in this folder until the end of the block, and return what writes it; nothing for a server without a secret."""
    if not job.secret or job.run.privacy is None:
        return []
    ledger = opened.enter_context(Ledger.opened(folder / LEDGER))
    promised = client_event(job.run.privacy, job.run.limits.versions)
    return [ReleaseRecorder(ledger, promised, "simulated" if job.shards else "secret")]


def releases_of(commands: Iterable[Command]) -> Iterator[tuple[ClientId, Release]]:
    """Yield the releases among these commands, each with the name of its edge ("": the server itself)."""
    for command in commands:
        match command:
            case Release():
                yield "", command
            case InsideEdge(edge, _, Release() as release):
                yield edge, release


def release_entry(edge: ClientId, release: Release, noise: str = "secret") -> LedgerEntry:
    """Return the line of a release: what names it, and what it tells of each client."""
    about: dict[str, Words] = {
        "edge": edge,
        "task": release.task,
        "version": release.version,
        "noise": noise,
        "mechanism": release.mechanism,
        "norm": release.norm,
        "multiplier": release.multiplier,
        "value": release.value,
        "merged": tuple(release.shares),
    }
    return LedgerEntry(about, {client: Gaussian(mu) for client, mu in release.spent.items()})


def later_releases(entries: Iterable[LedgerEntry]) -> ReleasesCounted | None:
    """Return the event that counts releases behind the checkpoint that a deployment goes on from; None if there are none.

    A simulation does not need it, since it makes the same versions again.
    """
    merged, last = dict[ClientId, int](), dict[ClientId, int]()
    for entry in entries:
        version, clients = entry.about.get("version"), entry.about.get("merged")
        if isinstance(version, int) and isinstance(clients, tuple):
            for client in clients:
                merged[client] = merged.get(client, 0) + 1
                last[client] = max(version, last.get(client, 0))
    return ReleasesCounted(merged, last) if merged else None
