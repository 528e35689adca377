"""Replay: the events of a recorded run through a new server, which must give the same bytes. Nothing is trained, no model is loaded.

This is the audit of a run, also after an incident at a deployment. The server is made from the manifest: its policies are looked
up by name among the classes and functions of fedloom's rooms of policies, so a manifest can name no other code. The trace holds
tensors by their sha256. So a run that is to be replayed keeps them too: the first model and each answer, in `updates/`, in
the form of a checkpoint, which is read as strictly (`checkpoint`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import islice
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

import torch

from fedloom.core.codec import Codec
from fedloom.core.coordinator import Coordinator
from fedloom.core.errors import Refused
from fedloom.core.events import Command, EdgeReported, Event, UpdateArrived
from fedloom.core.model_shape import Shape
from fedloom.core.policies import Aggregator, BudgetRule, Schedule
from fedloom.core.schema import Decoder, Malformed, jsonable, with_current_names
from fedloom.core.server import Limits, Server
from fedloom.core.types import ClientId, GroupStatistics, Model, Profile, Result
from fedloom.hierarchy.hierarchy import Hierarchy
from fedloom.hierarchy.regrouping import Compared
from fedloom.report.run_log import read_run_log
from fedloom.runs import manifest
from fedloom.runs.checkpoint import read_checkpoint, write_checkpoint
from fedloom.runs.trace import encode_step

UPDATES = "updates"
START = "start"
POLICIES = ("aggregate", "schedule", "plan", "hierarchy")
SERVER_SETTINGS: Mapping[str, Any] = {
    "aggregator": Aggregator,
    "schedule": Schedule,
    "plan": BudgetRule,
    "limits": Limits,
    "transfer": Codec | None,
    "hierarchy": Hierarchy | None,
}
"""The settings of a run that its server is made of."""


@dataclass(frozen=True, slots=True)
class Archive:
    """An observer that keeps the answers as they arrived.

    Fields:
        folder: where they are kept, one file per answer.
    """

    folder: Path

    @classmethod
    def of(cls, folder: Path, server: Coordinator) -> Archive:
        """Write what this server began with, and return the observer."""
        folder.mkdir(exist_ok=True)
        write_checkpoint(folder / f"{START}.safetensors", {"first": server.state.first, "shape": server.shape})
        return cls(folder)

    def __call__(self, now: float, event: Event, commands: list[Command]) -> None:
        """Keep the answer in a file, also one that is refused."""
        if isinstance(event, UpdateArrived):
            write_checkpoint(self.folder / f"{event.task}.safetensors", {"result": event.result})


@dataclass(frozen=True, slots=True)
class Replayed:
    """The outcome of a replay.

    Fields:
        events: how many gave the same bytes.
        difference: what was different in the next one ("": nothing).
    """

    events: int
    difference: str = ""


def replay(folder: Path, server: Coordinator | None = None) -> Replayed:
    """Feed the events of a recorded run to a new server and compare its trace, up to the first difference.

    A last line that a killed run left unfinished is passed over. Raises Refused where the folder holds no trace or not the answers.

    Args:
        folder: the run folder.
        server: the server at version 0, where the run has policies of its own (None: it is made from the manifest).
    """
    if not (folder / "trace.jsonl").is_file():
        raise Refused("replay", str(folder), "there is no trace.jsonl in it; give the folder of a run")
    if not (folder / UPDATES / f"{START}.safetensors").is_file():
        remedy = "its answers were not kept; record a run with `fedloom run FILE --keep-updates`"
        raise Refused("replay", str(folder), remedy)
    server = server or server_from_manifest(folder)
    *lines, torn = (folder / "trace.jsonl").read_bytes().split(b"\n")
    for number, recorded in enumerate(lines):
        try:
            now, event = _event(recorded, folder / UPDATES)
            repeated = encode_step(now, event, server.handle(now, event)).encode()
        except ValueError as error:
            return Replayed(number, f"line {number + 1}: {error}")
        if repeated != recorded:
            where = "; ".join(islice(manifest.json_differences(json.loads(recorded), json.loads(repeated)), 3))
            place = f"line {number + 1}, {now:g} virtual s, {type(event).__name__}"
            return Replayed(number, f"{place}: {where or 'the same JSON in other bytes'}")
    unfinished = json.loads((folder / "manifest.json").read_bytes()).get("status") != "finished"
    if not unfinished and (torn or not server.state.stopped):
        return Replayed(
            len(lines), f"the trace ends early, after line {len(lines)}: the run was finished, and its stop is missing"
        )
    return Replayed(len(lines))


def recorded_steps(folder: Path, size: int) -> list[tuple[float, Event]]:
    """Return the times and events after the first `size` bytes of a run's trace, with the answers that it kept. Raises Refused."""
    *lines, _ = (folder / "trace.jsonl").read_bytes()[size:].split(b"\n")
    try:
        return [_event(recorded, folder / UPDATES) for recorded in lines]
    except ValueError as error:
        remedy = f"its last events cannot be read ({error}); begin a new run with start={folder}"
        raise Refused("--more", str(folder), remedy) from error


def server_from_manifest(folder: Path) -> Coordinator:
    """The server with which the run in `folder` began, from its manifest and what it kept. Raises Refused."""
    about = read_run_log(folder).manifest
    settings, decoder = {"hierarchy": None, **with_current_names(about["run"])}, Decoder(_policy_names())
    try:
        values = {name: decoder.read(hint, settings[name]) for name, hint in SERVER_SETTINGS.items()}
        if jsonable(values) != {name: settings[name] for name in SERVER_SETTINGS}:
            raise Malformed("its manifest does not say all of them")
        start = read_checkpoint(folder / UPDATES / f"{START}.safetensors").read({"first": Model, "shape": Shape})
        hierarchy: Hierarchy | None = values["hierarchy"]
        clients = about["clients"].items() if hierarchy else ()
        profiles = {client: decoder.read(Profile, data) for client, data in clients}
        compared = decoder.read(Compared, about["compared"]) if hierarchy and hierarchy.regroup else None
    except (Malformed, KeyError, TypeError) as error:
        remedy = (
            f"its policies cannot be made from the manifest ({error}); in Python, replay(folder, server) takes your own"
        )
        raise Refused("replay", str(folder), remedy) from error
    torch.set_num_threads(settings["threads"])
    policies = (values["aggregator"], values["schedule"], values["plan"])
    options = {"limits": values["limits"], "seed": settings["seed"], "transfer": values["transfer"]}
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
def _policy_names() -> tuple[Any, ...]:
    """The classes and functions that are declared in the rooms of policies."""
    rooms = [import_module(f"fedloom.{name}") for name in POLICIES]
    modules = [import_module(one.name) for room in rooms for one in walk_packages(room.__path__, f"{room.__name__}.")]
    things = [
        thing
        for module in modules
        for thing in vars(module).values()
        if getattr(thing, "__module__", "") == module.__name__
    ]
    return tuple(thing for thing in things if hasattr(thing, "__name__"))


def _event(recorded: bytes, updates: Path) -> tuple[float, Event]:
    """Time and event of a line of the trace, with the answer itself. Raises ValueError."""
    step = json.loads(recorded)
    if not isinstance(step, dict) or not isinstance(step.get("event"), dict):
        raise Malformed("it tells no event")
    now, event = _EVENTS.read(float, step.get("time")), dict(step["event"])
    if event.get("type") not in (UpdateArrived.__name__, EdgeReported.__name__):
        return now, _EVENTS.read(Event, event)
    client, task = _EVENTS.read(str, event.get("client")), _EVENTS.read(int, event.get("task"))
    file = updates / f"{task}.safetensors"
    if not file.is_file():
        raise Malformed(f"the answer to task {task} was not kept")
    result = read_checkpoint(file).read({"result": Result})["result"]
    if event["type"] == UpdateArrived.__name__:
        return now, UpdateArrived(client, task, result)
    statistics = _EVENTS.read(GroupStatistics | None, event.get("statistics"))
    return now, EdgeReported(client, task, result, statistics, _EVENTS.read(tuple[Profile, ...], event.get("members")))


_EVENTS = Decoder()
