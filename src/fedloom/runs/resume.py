"""Resuming: a run that was killed goes on where its last checkpoint stands, and ends in the same bytes as if nothing had happened.

Between two events everything that a run has is in six values: the server's state, the simulation, what stays at clients, who is
away, the metrics' observer and the scores so far. A tree of servers has its edges beside the root's state, and a deployment has its
driver in the place of the simulation. What clients keep that lasts is in files beside the checkpoint (`state_files`). All their
fields are saved but those named in `REBUILT`, so a new field needs no line here.

A checkpoint names the lengths of the logs at its moment, which are on the disk before it, and the sha256 of what they held. On
resuming, the logs are cut to these lengths and the rest is written again. The run's value, its data and the base model are not
saved: they are loaded anew, and the manifest says whether they are those with which the run began.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from fedloom.core.errors import Refused
from fedloom.core.files import DRAFT, LOCKED, lock, open_regular
from fedloom.core.limits import Limits
from fedloom.core.packed_log import PackedFile, log_size
from fedloom.core.policies import do_nothing
from fedloom.core.schema import Decoder, Malformed, declared_fields, jsonable, with_current_names
from fedloom.core.server_state import State
from fedloom.core.types import ClientId, Profile
from fedloom.hierarchy.tree_state import TreeState
from fedloom.privacy.ledger import LEDGER
from fedloom.report.run_log import RunLog, read_run_log
from fedloom.runs import manifest
from fedloom.runs.checkpoint import NOBODY, StoredValues, read_checkpoint, write_checkpoint
from fedloom.runs.metrics import Metrics
from fedloom.runs.run import Run
from fedloom.runs.state_files import StateFiles
from fedloom.simulate.client_presence import Presence
from fedloom.simulate.client_states import ClientStates
from fedloom.simulate.simulation import Simulation
from fedloom.train.confusion import Confusion
from fedloom.train.device import AUTO
from fedloom.train.evaluate import AnswerScores, Scores
from fedloom.train.settings import Engine

CHECKPOINT = "checkpoint.safetensors"
LOGS = (LOCKED, "metrics.jsonl")
SHARE = 0.05
"""The share of a run's time that checkpoints may take."""
CHECKPOINT_SECONDS = 30.0
"""Time between two checkpoints (s), or more where they take more than their share."""
FIXED = ("computed", "start", "model", "partition", "clients", "groups", "compared", "baselines", "privacy")
"""Sections of the manifest that follow from the run and its data, and have to be the same when it goes on."""

PIECE = 2**20
"""Bytes of a log that are read at once."""
OTHER_DATA = "; for other data or settings begin a new run from its adapter, with start=DIR"
"""Advice to somebody who makes a run longer and changed more than its length."""


@dataclass(slots=True)
class Progress:
    """Counts of a job's driver.

    Fields:
        scores: the figures of all evaluations so far, in order.
        confusions: by version, the predictions of the untrained model and of the last one that was scored, where labels are chosen.
    """

    scores: list[Mapping[str, float]] = field(default_factory=list)
    confusions: dict[int, Confusion] = field(default_factory=dict)

    def add(self, version: int, scores: Scores | AnswerScores, examples: int) -> Mapping[str, float]:
        """Add the scores of a version on so many examples; returns its figures."""
        if isinstance(scores, Scores):
            untrained = {0: self.confusions[0]} if 0 in self.confusions else {}
            self.confusions = {**untrained, version: scores.confusion()}
        self.scores.append({**scores.metrics(), "examples": examples})
        return self.scores[-1]


REBUILT: Mapping[type, frozenset[str]] = {
    State: frozenset(),
    TreeState: frozenset(),
    Simulation: frozenset(
        {"server", "trainer", "devices", "profiles", "evaluate", "observe", "check", "seed", "presence"}
        | {"after_step", "pending", "by_task", "dropped", "measured", "client_states"}
    ),
    ClientStates: frozenset({"store", "rotates"}),
    Presence: frozenset({"stays", "faults", "seed"}),
    Metrics: frozenset({"file", "majority", "listener"}),
    Progress: frozenset(),
}
"""Fields that follow from the run's value, are the program's own, or are empty when a checkpoint is written (`pending`, `dropped`).

Another driver than the simulation names its own in `rebuilt`.
"""

SIMULATED: tuple[type, ...] = (Simulation, ClientStates, Presence)


def saved_fields(kind: type) -> dict[str, Any]:
    """The fields of a class that a checkpoint holds, as "Class.field", with their types."""
    rebuilt: frozenset[str] = getattr(kind, "rebuilt", None) or REBUILT[kind]
    return {f"{kind.__name__}.{name}": hint for name, hint in declared_fields(kind).items() if name not in rebuilt}


def saved_types(run: Run, driver: Sequence[type] = SIMULATED) -> list[type]:
    """The classes of the values that a run has, with those of its driver. Edges are saved where they are simulated here."""
    edges = [TreeState] if run.hierarchy and driver is SIMULATED else []
    return [State, *edges, *driver, Metrics, Progress]


def stored_values(
    stored: StoredValues, types: Sequence[type], run: Run, profiles: Mapping[ClientId, Profile] = NOBODY
) -> dict[str, Any]:
    """The saved fields of values of these classes, from the checkpoint of this run. Raises Malformed.

    A codec of the user's own is known by the run's value; all else by the declared fields.
    """
    hints = {name: hint for kind in types for name, hint in saved_fields(kind).items()}
    return stored.read(hints, () if run.transfer is None else (type(run.transfer),), profiles)


@dataclass(slots=True)
class LogDigest:
    """The sha256 of the beginning of a log, which goes on where it stopped when the log has grown.

    Fields:
        path: the log.
        size: bytes of it that were read so far.
        digest: their sha256.
    """

    path: Path
    size: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    def up_to(self, size: int) -> str:
        """The sha256 of the first `size` bytes, at least as many as before, in hex. Raises Malformed where there are fewer."""
        with open_regular(self.path) as file:
            file.seek(self.size)
            while self.size < size:
                piece = file.read(min(PIECE, size - self.size))
                if not piece:
                    raise Malformed(f"{self.path.name} is shorter than when it was written")
                self.digest.update(piece)
                self.size += len(piece)
        return str(self.digest.hexdigest())


@dataclass(slots=True)
class CheckpointWriter:
    """Writes the checkpoint of a run; called between two events.

    Fields:
        folder: where the checkpoint is written.
        seconds: time between two checkpoints, more where they would take over 5 % of the run's time; 0: one at each call.
        owners: the values whose fields are saved.
        logs: open logs, the first of `LOGS` or all, which are synchronised to the disk before a checkpoint names their lengths.
        due: when the next one is written (s of the monotonic clock); None: at the first call.
        drain: waits for the answers of all tasks in training. They are needed anyway, so this time does not count.
        digests: of the logs, as far as the last checkpoint.
        secret: seals the checkpoint of a private run (empty: it is none).
        states: files that a checkpoint names (None: there are none).
        profiles: those that the manifest has held since the run was begun.
    """

    folder: Path
    seconds: float = CHECKPOINT_SECONDS
    owners: Sequence[object] = ()
    logs: Sequence[TextIO] = ()
    due: float | None = None
    drain: Callable[[], None] = do_nothing
    digests: dict[str, LogDigest] = field(default_factory=dict)
    secret: bytes = field(default=b"", repr=False)
    states: StateFiles | None = None
    profiles: Mapping[ClientId, Profile] = field(default_factory=dict)

    def __call__(self) -> None:
        """Write a checkpoint if it is time."""
        now = time.monotonic()
        if self.due is None and self.seconds:
            self.due = now + self.seconds
        if self.due is None or now >= self.due:
            self.drain()
            now = time.monotonic()
            self.write()
            took = time.monotonic() - now
            self.due = now + took + (max(self.seconds, took / SHARE - took) if self.seconds else 0.0)

    def write(self) -> int:
        """Write a checkpoint now; returns its bytes. The logs are safe on the disk before it names their lengths."""
        about: dict[str, int | float | str] = {}
        for name, log in zip(LOGS, self.logs, strict=False):
            size = log_size(log)
            os.fsync(log.fileno())
            self._note(about, name, size)
        if self.secret:  # each line of the ledger is on the disk since it was written
            self._note(about, LEDGER, (self.folder / LEDGER).stat().st_size)
        values = {name: getattr(owner, _field(name)) for owner in self.owners for name in saved_fields(type(owner))}
        about |= {"version": values.get("State.version", 0), "time": values.get("State.now", 0.0)}
        with self.states.named() if self.states else nullcontext():
            return write_checkpoint(self.folder / CHECKPOINT, values, about, self.secret, self.profiles)

    def _note(self, about: dict[str, int | float | str], name: str, size: int) -> None:
        """Note the length of a log, and the sha256 of what it holds."""
        about[name] = size
        about[_digest_of(name)] = self.digests.setdefault(name, LogDigest(self.folder / name)).up_to(size)


def log_sizes(folder: Path, stored: StoredValues, names: Sequence[str] = LOGS) -> dict[str, int]:
    """The lengths of these logs at a checkpoint (bytes).

    Raises Malformed where a log in the folder does not begin with what it held then.
    """
    sizes = {}
    for name in names:
        size, digest = stored.about.get(name), stored.about.get(_digest_of(name))
        if type(size) is not int or size < 0 or type(digest) is not str:
            raise Malformed(f"it was written by another version of fedloom ({name})")
        try:
            found = LogDigest(folder / name).up_to(size)
        except FileNotFoundError as error:
            raise Malformed(f"{name} is shorter than when it was written") from error
        if found != digest:
            raise Malformed(f"{name} is not what it was when it was written")
        sizes[name] = size
    return sizes


def ledger_size(folder: Path, stored: StoredValues | None) -> int:
    """The length of the ledger of a private run at its checkpoint (bytes; 0: there was none, or the run is not private).

    Raises Refused where the ledger does not begin with what it held then, or is gone: what was spent would not be known.
    """
    lost = Refused("ledger", str(folder / LEDGER), "it is not what it was, so what was spent is not known; put it back")
    if stored is None:
        begun = (folder / LOCKED).exists() and (folder / LOCKED).stat().st_size > 0
        if begun and not (folder / LEDGER).exists():
            raise lost
        return 0
    try:
        return log_sizes(folder, stored, (LEDGER,))[LEDGER]
    except Malformed as error:
        raise lost from error


def _digest_of(log: str) -> str:
    """The name under which a checkpoint has the sha256 of a log."""
    return f"{log} sha256"


def restore_fields(values: Mapping[str, Any], owners: Sequence[object]) -> None:
    """Put saved fields back into the values that own them. Without any (there was no checkpoint) nothing happens."""
    for owner in owners if values else ():
        for name in saved_fields(type(owner)):
            setattr(owner, _field(name), values[name])


def _field(name: str) -> str:
    return name.partition(".")[2]


@dataclass(frozen=True, slots=True)
class UnfinishedRun:
    """A run that has not come to its end.

    Fields:
        folder: its run folder.
        manifest: its manifest.
        sizes: the lengths of its logs at the last checkpoint (bytes).
        values: the saved fields of the last checkpoint (empty: there was none, and it begins again).
        limits: with which it goes on.
        extended: where it had ended before it was made longer: `version`, and the `run_hash` that it had until then.
        ledger: length of its ledger at the last checkpoint (bytes; 0: there was none, or the run is not private).
    """

    folder: Path
    manifest: Mapping[str, Any]
    sizes: Mapping[str, int]
    values: Mapping[str, Any]
    limits: Limits
    extended: tuple[Mapping[str, Any], ...] = ()
    ledger: int = 0

    @property
    def version(self) -> int:
        """The last version that was made."""
        return int(self.values.get("State.version", 0))

    @property
    def resume_point(self) -> str:
        """Describe where a run goes on, in words for a person."""
        if not self.values:
            return "at version 0: it had written no checkpoint"
        return f"at version {self.version}, {self.values['State.now']:,.0f} virtual s"

    @property
    def written_version(self) -> int:
        """The version whose adapter lies in the folder as a final one; 0: none does."""
        return int(self.extended[-1]["version"]) if self.extended else 0

    @property
    def extension_notes(self) -> list[str]:
        """Notes for a reader of a deployment's figures, where it was made longer."""
        ends = ", ".join(str(one["version"]) for one in self.extended)
        return [f"Extended after version {ends}: sites may have used other data since then."] if ends else []

    @property
    def advice(self) -> str:
        """Advice for other data, where the run is made longer."""
        return OTHER_DATA if self.extended else ""

    @property
    def first_hash(self) -> str:
        """The hash of the settings with which the run was begun: its name among the sites, also when it is made longer."""
        return str((self.extended[0] if self.extended else self.manifest)["run_hash"])

    def run_as_begun(self, run: Run) -> Run:
        """The run with what was found when it was begun, and with the limits that it has now."""
        return replace(as_settled(run, self.manifest["run"]), limits=self.limits)

    def engine_as_begun(self, engine: Engine) -> Engine:
        """The engine with the kernel that was chosen when the run was begun: another one has other last digits."""
        return replace(engine, kernel=self.manifest["computed"]["kernel"])

    def notes(self, own: list[str]) -> list[str]:
        """Notes of the manifest: the run's `own`, and that versions or the processor are others than at the beginning."""
        there = {**self.manifest["versions"], **self.manifest["machine"], "fedloom": self.manifest["fedloom"]}
        here = manifest.computing_environment()
        changed = [f"{name} {there.get(name)} -> {here[name]}" for name in here if there.get(name) != here[name]]
        note = f"Resumed with other software or hardware ({', '.join(changed)}): last digits may differ from an uninterrupted run."
        return list(dict.fromkeys([*own, *self.manifest["notes"], *([note] if changed else [])]))

    def check_unchanged(self, about: Mapping[str, object], sections: Sequence[str] = FIXED) -> None:
        """Raise Refused where the data or the model are not what they were when the run was begun."""
        then = {name: self.manifest.get(name) for name in sections} | self._base_weights(self.manifest)
        now = json.loads(json.dumps({name: about.get(name) for name in sections})) | self._base_weights(about)
        changed = _changed(then, now)
        if changed:
            remedy = f"its data or its model are not what they were when it was begun: {changed}{self.advice}"
            raise Refused("--resume", str(self.folder), remedy)

    def _base_weights(self, about: Mapping[str, object]) -> dict[str, object]:
        """Return the fingerprint of the base model in a manifest, if this run kept one."""
        return {"base_weights": about.get("base_weights")} if self.manifest.get("base_weights") else {}


def version_to_reach(folder: Path, more: int) -> int:
    """The version at which the finished run in `folder` ends when it is made longer by `more`. Raises Refused."""
    log = read_run_log(folder)
    if more < 1:
        raise Refused("--more", more, "how many versions to add: at least 1")
    if log.manifest["status"] != "finished":
        remedy = f"the run in {folder} has not come to its end; go on with --resume, without --more"
        raise Refused("--more", more, remedy)
    return versions_made(log) + more


def versions_made(log: RunLog) -> int:
    """The last version that a run has made."""
    return max((int(line["version"]) for line in log.versions), default=0)


def unfinished_run(
    folder: Path, run: Run, driver: Sequence[type] = SIMULATED, until: int | None = None, secret: bytes = b""
) -> UnfinishedRun:
    """The unfinished run in `folder`, begun by a driver of these classes; a finished one goes on `until` this version.

    `secret` is that of a private run, whose checkpoint is sealed.

    A run that is made longer has no limit in seconds any more. Its last checkpoint stands before its last event, which is handled
    again under the new limits.

    Raises Refused if there is none, if it was another run, or if its checkpoint is damaged.
    """
    log = read_run_log(folder)
    about = log.manifest
    if "rollback" in about:
        raise Refused(
            "--resume", str(folder), f"a rollback is no run; begin a new one from its adapter: --set start={folder}"
        )
    if about["status"] == "finished" and until is None:
        remedy = f"its run is finished ({about['status_reason']}); --more N adds N versions to it"
        raise Refused("--resume", str(folder), remedy)
    extended, limits = tuple(about.get("extended", ())), run.limits
    if until or extended:
        there = with_current_names(about["run"])["limits"]
        limits = replace(limits, versions=there["versions"], seconds=there["seconds"])
    settled = replace(as_settled(run, about["run"]), limits=limits)
    require_same_settings(folder, about, settled, OTHER_DATA if until else "")
    if until:
        extended += ({"version": versions_made(log), "run_hash": about["run_hash"]},)
        limits = replace(limits, versions=until, seconds=None)
    if not (folder / CHECKPOINT).exists():
        if secret:
            ledger_size(folder, None)
        return UnfinishedRun(folder, about, dict.fromkeys(LOGS, 0), {}, limits, extended)
    try:
        stored = read_checkpoint(folder / CHECKPOINT, secret)
        sizes, ledger = log_sizes(folder, stored), ledger_size(folder, stored) if secret else 0
        clients = {name: Decoder().read(Profile, profile) for name, profile in about.get("clients", {}).items()}
        values = stored_values(stored, saved_types(run, driver), run, clients)
        return UnfinishedRun(folder, about, sizes, values, limits, extended, ledger)
    except Malformed as error:
        remedy = f"{CHECKPOINT} cannot be used: {error}; remove it to begin again at version 0 in the same folder"
        raise Refused("--resume", str(folder), remedy) from error


def require_same_settings(folder: Path, about: Mapping[str, Any], run: Run, advice: str = "") -> None:
    """Raise Refused where the run of this folder, with this manifest, had other settings than a run that is settled."""
    settings = jsonable(run)
    hashes = {about.get("run_hash"), manifest.settings_hash(with_current_names(about["run"]))}
    if manifest.settings_hash(settings) not in hashes:
        changed = _changed(about["run"], settings)
        raise Refused("--resume", str(folder), f"the run is not the one that was begun there: {changed}{advice}")


def as_settled(run: Run, settings: Mapping[str, Any]) -> Run:
    """The run with what it leaves open (`training.max_length`, `date`, `engine.bfloat16`, `device`, `threads`) as in these settings
    of a manifest.
    """
    length, date = settings["training"]["max_length"], settings.get("date")
    device = settings["device"] if run.device == AUTO else run.device
    run = replace(run, device=device, threads=run.threads or settings["threads"])
    if run.engine and run.engine.bfloat16 is None:
        run = replace(run, engine=replace(run.engine, bfloat16=settings["engine"]["bfloat16"]))
    training = run.training if run.training.max_length else replace(run.training, max_length=length)
    return replace(run, training=training, date=run.date or date)


def _changed(there: object, here: object) -> str:
    """The first differences of two settings as JSON; what is off, and where files lie, does not count."""
    differences = manifest.json_differences(manifest.short_paths(there), manifest.short_paths(here), off=True)
    return "; ".join(islice(differences, 5))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of the run of this folder, and remove what a killed one left half written.

    Raises Refused where another process carries it out. A lock ends with its process.
    """
    with open_regular(folder / LOCKED, "ab") as file:
        if not lock(file):
            remedy = "its run is still going on, in another process; wait for its end or stop it"
            raise Refused("--resume", str(folder), remedy)
        for draft in folder.rglob(f"*{DRAFT}"):
            if draft.is_symlink() or not draft.is_dir():
                draft.unlink()
        yield


def open_log(path: Path, size: int, packed: bool = False) -> TextIO:
    """Open a log to go on after its first `size` bytes; the rest will be written again. Raises Refused for a link."""
    file = open_regular(path, "ab")
    file.truncate(size)
    if packed:
        return TextIOWrapper(PackedFile(file), encoding="utf-8")
    return TextIOWrapper(file, encoding="utf-8")
