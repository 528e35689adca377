"""Replay: the events of a recorded run through a new server, which must give the same bytes. Nothing is trained, no model is loaded.

This is the audit of a run, also after an incident at a deployment. The server is made from the manifest: its policies are looked
up by name among the classes and functions of fedloom's rooms of policies, so a manifest can name no other code. The answers come from
`archive`.

A run whose server added secret noise is repeated whole with that secret. Without it, all is checked but what the noise was added to:
each version is taken as it was released, and each answer as one that changed nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from itertools import islice
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

import torch

from fedloom.core.canary import Canary
from fedloom.core.codec import Codec
from fedloom.core.coordinator import Coordinator
from fedloom.core.errors import UNREADABLE, Refused, refuse_damaged
from fedloom.core.events import Command, Dispatch, Event, InsideEdge, Reject, Release, UpdateArrived
from fedloom.core.files import LOCKED, read_json, read_lines, sub_folder
from fedloom.core.limits import Limits
from fedloom.core.model_shape import Shape
from fedloom.core.participation import Mechanism
from fedloom.core.policies import Aggregator, BudgetRule, Merge, Observer, Schedule
from fedloom.core.schema import Decoder, Malformed, jsonable, with_current_names
from fedloom.core.seeds import simulated_secret
from fedloom.core.server import Server
from fedloom.core.server_state import State
from fedloom.core.text import parse_json
from fedloom.core.types import ClientId, Model, Profile, Result, Task
from fedloom.hierarchy.hierarchy import Hierarchy
from fedloom.hierarchy.regrouping import Compared
from fedloom.privacy.private import Private
from fedloom.privacy.secret_noise import commitment
from fedloom.report.run_log import read_manifest
from fedloom.runs import manifest
from fedloom.runs.archive import START, UPDATES, first_kept, read_event, release_file, restore_state
from fedloom.runs.checkpoint import read_checkpoint
from fedloom.runs.private_run import SIMULATED_SERVER, server_privacy
from fedloom.runs.run import MOST_THREADS
from fedloom.runs.trace import encode_step
from fedloom.train.settings import largest_step

_FIELDS = Decoder()
_ANSWER = re.compile(rb'"(hmac|sha256):[0-9a-f]{64}","examples"')
POLICIES = ("aggregate", "schedule", "plan", "hierarchy")
SERVER_SETTINGS: Mapping[str, Any] = {
    "aggregator": Aggregator,
    "schedule": Schedule,
    "plan": BudgetRule,
    "limits": Limits,
    "transfer": Codec | None,
    "hierarchy": Hierarchy | None,
    "canary": Canary | None,
    "privacy": Private | None,
}
"""The settings of a run that its server is made of."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """The outcome of a replay.

    Fields:
        events: how many gave the same bytes.
        difference: what was different in the next one ("": nothing).
        version: version from which answers were kept, where the replay began.
        unverified: what was taken as it is recorded, as a sentence ("": nothing).
    """

    events: int
    difference: str = ""
    version: int = 0
    unverified: str = ""


@dataclass(slots=True)
class RecordedReleases:
    """A mechanism without its secret: versions are those that were released, and all else is done as the mechanism does it.

    Fields:
        inner: the mechanism, with another secret.
        updates: where the released versions are kept.
        values: keyed digests of the releases in the step that is repeated, by outer task and version.
        tasks: tasks that were sent, by number.
        releases: versions that were taken as recorded.
        answers: answers that were taken as recorded.
    """

    inner: Mechanism
    updates: Path
    values: dict[tuple[int, int], str] = field(default_factory=dict)
    tasks: dict[int, Task] = field(default_factory=dict)
    releases: int = 0
    answers: int = 0

    def release(self, aggregator: Aggregator, state: State, merge: Merge) -> tuple[Model, Release]:
        """Return the version that was released, and what it tells of whom."""
        _, made = self.inner.release(aggregator, state, merge)
        release = replace(made, value=self.values.get((made.task, made.version), ""))
        if state.releases and state.releases[-1] is made:  # those that later noise depends on
            state.releases[-1] = release
        file = release_file(self.updates, made.task, made.version)
        if not file.is_file():
            raise Malformed(f"version {made.version} was not kept")
        self.releases += 1
        return read_checkpoint(file).read({"model": Model})["model"], release

    def read_event(self, recorded: bytes) -> tuple[float, Event] | None:
        """Return time and event of a line of the trace, with an answer that changed nothing; None for an answer that was refused.

        Raises ValueError.
        """
        step = parse_json(recorded)
        inner = [one["command"] if one["type"] == InsideEdge.__name__ else one for one in step["commands"]]
        releases = [one for one in inner if one["type"] == Release.__name__]
        self.values = {(one["task"], one["version"]): one["value"] for one in releases}
        if step["event"]["type"] != UpdateArrived.__name__:
            return read_event(recorded, self.updates)
        self.answers += 1
        if any(one["type"] == Reject.__name__ for one in step["commands"]):
            return None
        client, number = _FIELDS.read(str, step["event"]["client"]), _FIELDS.read(int, step["event"]["task"])
        said = step["event"]["result"]
        counts = [_FIELDS.read(int, said[name]) for name in ("examples", "tokens", "steps")]
        metrics = _FIELDS.read(Mapping[str, float], said["metrics"])
        result = Result(self.tasks[number].start.train, counts[0], counts[1], counts[2], metrics)
        return _FIELDS.read(float, step["time"]), UpdateArrived(client, number, result)

    def compared(self, recorded: bytes, repeated: bytes, commands: Iterable[Command]) -> tuple[bytes, bytes]:
        """Return both lines without digests of answers, which are keyed in a record; note the tasks that were sent."""
        self.tasks |= {one.task.id: one.task for one in commands if isinstance(one, Dispatch)}
        return _ANSWER.sub(b'"","examples"', recorded), _ANSWER.sub(b'"","examples"', repeated)

    @property
    def unverified(self) -> str:
        """What was taken as it is recorded."""
        noise = f"the noise of {self.releases} versions, and the sums that it was added to"
        return f"not verified without the secret: {noise}; the content of {self.answers} answers"


def replay(
    folder: str | Path,
    server: Coordinator | None = None,
    watch: Callable[[Coordinator, int], Observer] | None = None,
    secret: bytes | None = None,
) -> Replayed:
    """Feed the events of a recorded run to a new server and compare its trace, up to the first difference.

    A last line that a killed run left unfinished is passed over. Where only the latest answers were kept, it begins at the server's
    state from before them. Raises Refused where the folder holds no trace or not the answers.

    Args:
        folder: the run folder.
        server: the server at version 0, where the run has policies of its own (None: it is made from the manifest).
        watch: is given the server and its version where the replay begins, and returns who is shown each step that gave the same
            bytes (None: nobody).
        secret: that of the server's noise, of a private run (None: that of a simulation, which follows from its seed; else what
            depends on it is taken as recorded).
    """
    folder = _recorded(Path(folder))
    updates, same, torn = sub_folder(folder / UPDATES), 0, False
    with refuse_damaged("replay", str(folder)):
        secret = secret_of_run(folder, secret)
        recording = None if secret is not None else _recorded_releases(folder, server)
        server = server or server_from_manifest(folder, secret or b"", recording)
        begin, state = first_kept(folder)
        if state and recording:
            remedy = "its first answers were not kept, and the server's state after them is sealed; give it"
            raise Refused("secret", "none", remedy)
        version = restore_state(state, server, secret or b"") if state else 0
        observe = watch(server, version) if watch else None
    for line in read_lines(folder / LOCKED, begin):
        recorded, torn = line.removesuffix(b"\n"), not line.endswith(b"\n")
        if torn:
            break
        try:
            step = recording.read_event(recorded) if recording else read_event(recorded, updates, secret or b"")
            if step is None:
                same += 1
                continue
            commands = server.handle(*step)
            repeated = encode_step(*step, commands, secret or b"").encode()
            if recording:
                recorded, repeated = recording.compared(recorded, repeated, commands)
        except UNREADABLE as error:
            what = str(error) if isinstance(error, ValueError) else type(error).__name__
            return Replayed(same, f"line {same + 1}: {what}", version)
        if repeated != recorded:
            where = "; ".join(islice(manifest.json_differences(parse_json(recorded), parse_json(repeated)), 3))
            place = f"line {same + 1}, {step[0]:g} virtual s, {type(step[1]).__name__}"
            return Replayed(same, f"{place}: {where or 'the same JSON in other bytes'}", version)
        same += 1
        if observe is not None:
            observe(*step, commands)
    unfinished = read_json(folder / "manifest.json").get("status") != "finished"
    if not unfinished and (torn or not server.state.stopped):
        early = f"the trace ends early, after line {same}: the run was finished, and its stop is missing"
        return Replayed(same, early, version)
    return Replayed(same, version=version, unverified=recording.unverified if recording else "")


def _recorded(folder: Path) -> Path:
    """Return the folder of a run. Raises Refused where it holds no trace or not the answers."""
    if not (folder / LOCKED).is_file():
        raise Refused("replay", str(folder), "there is no trace.jsonl in it; give the folder of a run")
    if not (folder / UPDATES / f"{START}.safetensors").is_file():
        remedy = "its answers were not kept; record a run with `fedloom run FILE --keep-updates`"
        raise Refused("replay", str(folder), remedy)
    return folder


def secret_of_run(folder: Path, secret: bytes | None = None) -> bytes | None:
    """Return the secret of the noise that the server of a run added: empty for a run without, None where it is not known.

    Raises Refused for the secret of another run.
    """
    about = read_json(folder / "manifest.json") if (folder / "manifest.json").is_file() else {}
    section = about.get("privacy")
    committed = section.get("commitment") if isinstance(section, dict) else None
    if committed is None:
        return b""
    if secret is None and "deployed" not in about and type(about.get("seed")) is int:
        secret = simulated_secret(about["seed"], SIMULATED_SERVER)
        return secret if commitment(secret) == committed else None
    if secret is not None and commitment(secret) != committed:
        raise Refused(
            "secret", "another", "it is not the one with which this run made its noise: see `privacy` in its manifest"
        )
    return secret


def _recorded_releases(folder: Path, server: Coordinator | None) -> RecordedReleases:
    """What stands in for the mechanism of a private run whose secret is not known. Raises Refused."""
    about = read_manifest(folder)
    if server is not None or "regions" in about:
        what = "a server that you made" if server is not None else "reports of regions"
        raise Refused("secret", "none", f"{what} can be repeated with the secret of the server's noise only; give it")
    settings = with_current_names(about["run"])
    private, limits = Decoder().read(Private, settings["privacy"]), Decoder().read(Limits, settings["limits"])
    mechanism = server_privacy(private, limits, bytes(32)).mechanism
    assert mechanism is not None
    return RecordedReleases(mechanism, folder / UPDATES)


def recorded_steps(folder: Path, size: int, secret: bytes = b"") -> list[tuple[float, Event]]:
    """Return the times and events after the first `size` bytes of a run's trace, with the answers that it kept. Raises Refused.

    `secret` opens the answers of a private run.
    """
    lines = [line for line in read_lines(folder / LOCKED, size) if line.endswith(b"\n")]
    try:
        return [read_event(line, sub_folder(folder / UPDATES), secret) for line in lines]
    except ValueError as error:
        remedy = f"its last events cannot be read ({error}); begin a new run with start={folder}"
        raise Refused("--more", str(folder), remedy) from error


def server_from_manifest(folder: Path, secret: bytes = b"", mechanism: Mechanism | None = None) -> Coordinator:
    """The server with which the run in `folder` began, from its manifest and what it kept. Raises Refused.

    Args:
        folder: the run folder.
        secret: that of the noise of a private run.
        mechanism: what stands in for that of a private run (None: nothing).
    """
    about = read_manifest(folder)
    settings, decoder = (
        {"hierarchy": None, "canary": None, "privacy": None, **with_current_names(about["run"])},
        Decoder(declared_names()),
    )
    try:
        values = {name: decoder.read(hint, settings[name]) for name, hint in SERVER_SETTINGS.items()}
        if jsonable(values) != {name: settings[name] for name in SERVER_SETTINGS}:
            raise Malformed("its manifest does not say all of them")
        rate, scaling = float(settings["training"]["learning_rate"]), float(settings["lora"]["scaling"])
        start = read_checkpoint(folder / UPDATES / f"{START}.safetensors").read({"first": Model, "shape": Shape})
        hierarchy: Hierarchy | None = values["hierarchy"]
        clients = about["clients"].items() if hierarchy else ()
        profiles = {client: decoder.read(Profile, data) for client, data in clients}
        compared = decoder.read(Compared, about["compared"]) if hierarchy and hierarchy.regroup else None
        threads = decoder.read(int, settings["threads"])
        if not 1 <= threads <= MOST_THREADS:
            raise Malformed("its number of threads is none")
    except UNREADABLE as error:
        remedy = (
            f"its policies cannot be made from the manifest ({error}); in Python, replay(folder, server) takes your own"
        )
        raise Refused("replay", str(folder), remedy) from error
    torch.set_num_threads(threads)
    policies = (values["aggregator"], values["schedule"], values["plan"])
    private = server_privacy(values["privacy"], values["limits"], secret)
    options = {"limits": private.limits, "mechanism": mechanism or private.mechanism, "seed": settings["seed"]}
    options |= {"participation": private.participation, "transfer": values["transfer"], "canary": values["canary"]}
    options["largest_step"] = largest_step(rate, scaling, getattr(values["plan"], "rates", None))
    server = Server(start["first"], *policies, shape=start["shape"], **options)
    return server if hierarchy is None else _with_edges(server, hierarchy, about, profiles, compared)


def _with_edges(
    server: Server,
    hierarchy: Hierarchy,
    about: Mapping[str, Any],
    profiles: Mapping[ClientId, Profile],
    compared: Compared | None,
) -> Coordinator:
    """The server with its edges, or over regions, where these are elsewhere."""
    if "regions" in about:
        return hierarchy.over_regions(server, about["regions"])
    groups = {edge: tuple(profiles[client] for client in clients) for edge, clients in about["groups"].items()}
    return hierarchy.over(server, groups, compared)


@cache
def declared_names(names: tuple[str, ...] = POLICIES) -> tuple[Any, ...]:
    """The classes and functions that are declared in these rooms: what a manifest may name."""
    rooms = [import_module(f"fedloom.{name}") for name in names]
    modules = [import_module(one.name) for room in rooms for one in walk_packages(room.__path__, f"{room.__name__}.")]
    things = [
        thing
        for module in modules
        for thing in vars(module).values()
        if getattr(thing, "__module__", "") == module.__name__
    ]
    return tuple(thing for thing in things if hasattr(thing, "__name__"))
