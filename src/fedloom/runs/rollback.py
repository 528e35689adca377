"""Rollback: the model of an earlier version, or the recorded answers merged again without those of one site.

Both come from a replay of the run, so they need its answers (`archive`), and no training. The run folder stays as it is: what comes
out is a folder of its own with an adapter, from which a new run begins (`Run.start`).

Without a site, the tasks stay those that were sent: each version is merged again as the schedule decided on it, its weights
normalised over the other sites, and one that the site made alone is left out. So what others learnt from versions with the site in
them stays in their answers: this removes what the site sent, not all that followed from it. Where that matters, go back to the
version before its first answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedloom.core.canary import without_sites
from fedloom.core.coordinator import Coordinator
from fedloom.core.errors import Refused
from fedloom.core.events import Command, Event, Publish
from fedloom.core.files import create_folder, numbered_path, read_json, write_json
from fedloom.core.lora import Adapter, compact_with_fold, pad_to_one_rank
from fedloom.core.partial_depth import merge_by_layer
from fedloom.core.policies import Fleet, Merge, Schedule
from fedloom.core.server import Server
from fedloom.core.types import ClientId, Model
from fedloom.hierarchy.root_server import RootServer
from fedloom.hierarchy.tree import Tree
from fedloom.report.numbers import plural
from fedloom.runs.replay import replay, secret_of_run
from fedloom.train.export import open_run, save_adapter


@dataclass(frozen=True, slots=True)
class RolledBack:
    """The outcome of a rollback.

    Fields:
        folder: where the adapter lies.
        version: the version that it is, or the last one that was merged again.
        notes: what has to be known of it, as sentences.
    """

    folder: Path
    version: int
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HeardSchedule:
    """A schedule, and the merges that it has decided on and that are not published yet."""

    inner: Schedule
    merges: list[Merge]

    @property
    def max_in_flight(self) -> int:
        """That of the schedule."""
        return self.inner.max_in_flight

    def merge(self, fleet: Fleet) -> Merge | None:
        """Decide as the schedule does, and note it."""
        merge = self.inner.merge(fleet)
        if merge is not None:
            self.merges.append(merge)
        return merge

    def start(self, fleet: Fleet) -> Sequence[ClientId]:
        """Start whom the schedule starts."""
        return self.inner.start(fleet)

    def wake(self, fleet: Fleet) -> float | None:
        """Return the schedule's next due time."""
        return self.inner.wake(fleet)


@dataclass(slots=True)
class MergedAgain:
    """An observer of a replay that makes its versions again without one site, or takes one version as it was.

    Fields:
        server: the server that is replayed, its schedule heard.
        model: the model so far.
        version: its number in the run.
        until: the version to take (None: the last).
        without: the site that is left out (None: nobody is).
        left_out: its merged answers that were left out.
        derived: merged answers of others to tasks that were cut from versions with it.
        first: first version with an answer of the site (None: none yet).
        passed: the model of the last version that passed the canary.
        sites: all whose answers were merged.
    """

    server: Server
    model: Model
    version: int
    until: int | None = None
    without: ClientId | None = None
    left_out: set[int] = field(default_factory=set)
    derived: set[int] = field(default_factory=set)
    first: int | None = None
    passed: Model | None = None
    sites: set[ClientId] = field(default_factory=set)

    def __call__(self, now: float, event: Event, commands: list[Command]) -> None:
        """Follow the versions that were published in this step."""
        for command in commands:
            if isinstance(command, Publish) and (self.until is None or command.version <= self.until):
                self._follow(command)

    def _follow(self, made: Publish) -> None:
        self.version = made.version
        self.sites |= {update.task.client for update in made.updates}
        self.passed = self.passed or self.model
        if self.without is None:
            self.model = made.model
        elif not made.updates:  # the canary went back to the last version that passed
            self.model = self.passed
        else:
            self._merge_again(made, self.without)
        if self.server.state.canary.version == made.version:
            self.passed = self.model

    def _merge_again(self, made: Publish, site: ClientId) -> None:
        heard: list[Merge] = self.server.schedule.merges  # type: ignore[attr-defined]  # a `HeardSchedule`
        tasks = [update.task for update in made.updates]
        numbers = [task.id for task in tasks]
        at = next(k for k, one in enumerate(heard) if [update.task.id for _, update in one.weighted_updates] == numbers)
        merge = heard[at]
        del heard[: at + 1]  # those before it failed the canary
        mine = {task.id for task in tasks if task.client == site}
        left, self.left_out = without_sites(merge, {site}), self.left_out | mine
        if mine and self.first is None:
            self.first = made.version
        others = [task for task in tasks if task.id not in mine]
        self.derived |= {task.id for task in others if self.first is not None and task.version >= self.first}
        # a version that the site made alone is left out, but an alternating method goes on to the side that others trained next
        self.model = (
            merge_by_layer(self.server.aggregator, self.model, left)
            if left
            else replace(self.model, phase=made.model.phase)
        )


def roll_back(
    folder: str | Path,
    to: int | None = None,
    without: ClientId | None = None,
    out: str | Path | None = None,
    secret: bytes | None = None,
) -> RolledBack:
    """Write the adapter of an earlier version, or of the run without a site, into a new folder.

    Args:
        folder: a run folder with its answers, or that of a deployment.
        to: the version to go back to (None: the last).
        without: the site whose answers are left out (None: nobody's).
        out: the folder to write, which must not exist yet (None: `rollback-001` in the run folder, numbered).
        secret: that of the noise of a private run's server (None: it is not needed, or not known).

    Raises Refused with the remedy: without both, without the answers, for a version or site that is not in them.
    """
    if (to is None) == (without is None):
        raise Refused("rollback", str(folder), "say exactly one of --to VERSION, --without SITE")
    folder = Path(folder)
    if not (folder / "manifest.json").is_file() and (folder / "run" / "manifest.json").is_file():
        folder = folder / "run"
    if without is not None and secret_of_run(folder) != b"":
        remedy = (
            "it would release the others' answers once more, which no budget was kept for; go back with --to VERSION"
        )
        raise Refused("--without", without, remedy)
    watching = list[MergedAgain]()

    def watch(server: Coordinator, version: int) -> MergedAgain:
        watching.append(_merged_again(folder, server, version, to, without))
        return watching[0]

    found = replay(folder, watch=watch, secret=secret)
    (again,) = watching
    if found.difference:
        remedy = f"its trace does not lead to its versions ({found.difference}); was it made by another fedloom?"
        raise Refused("rollback", str(folder), remedy)
    if to is not None and again.version != to:
        raise Refused("--to", to, f"its answers lead from version {found.version} to version {again.version}")
    if without is not None and not again.left_out:
        there = ", ".join(sorted(again.sites)) or "nobody's"
        raise Refused("--without", without, f"none of its answers is in a version; merged are those of {there}")
    base, _, names = open_run(folder)
    target = create_folder(numbered_path(folder, "rollback") if out is None else Path(out))
    about, notes = read_json(folder / "manifest.json"), _notes(again, found.version)
    adapter: Adapter = pad_to_one_rank(compact_with_fold(again.model.adapter, again.model.fold))
    save_adapter(base, adapter, names, target / "adapter", about["run"].get("date"))
    told = {"of": folder.resolve().name, "version": again.version, "without": without}
    (target / "metrics.jsonl").touch()
    end = {"status": "finished", "status_reason": "rolled back", "notes": [*notes, *about.get("notes", [])]}
    write_json(target / "manifest.json", {**about, **end, "rollback": told})
    return RolledBack(target, again.version, tuple(notes))


def _merged_again(
    folder: Path, server: Coordinator, version: int, to: int | None, without: ClientId | None
) -> MergedAgain:
    """Return the observer of a replay with this server. Raises Refused for a client whose answers are inside those of a region."""
    flat: Any = server
    if isinstance(server, Tree):
        flat = server.root.server
    elif isinstance(server, RootServer):
        flat = server.server
    groups = read_json(folder / "manifest.json").get("groups", {})
    if above := [edge for edge, members in groups.items() if without in members]:
        raise Refused("--without", without, f"its answers are inside those of {above[0]}: leave that out")
    flat.schedule = HeardSchedule(flat.schedule, [])
    return MergedAgain(flat, flat.state.model, version, to, without)


def _notes(again: MergedAgain, oldest: int) -> list[str]:
    """Sentences on what the adapter is."""
    if again.without is None:
        return [f"This is version {again.version} of the run, as it was published."]
    notes = [
        f"Merged again up to version {again.version} without {plural(len(again.left_out), 'answer')} of {again.without}.",
        f"Unchanged answers of others to tasks from versions that include this site: {len(again.derived)}.",
    ]
    if oldest:
        notes.append(
            f"Answers are kept from version {oldest} on: what the site contributed to earlier versions remains."
        )
    return notes
