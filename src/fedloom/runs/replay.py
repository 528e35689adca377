"""A recorded run through a fresh server: the same events must give the same bytes. Nothing is trained and no model is loaded.

The trace tells tensors by their sha256. So a run that is to be replayed keeps them beside it: the first model and each answer, in
`updates/`, in the form of a checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from itertools import chain, islice
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

import torch

from fedloom.core import codec
from fedloom.core import server as core
from fedloom.core.errors import Refused
from fedloom.core.events import Command, EdgeReported, Event, UpdateArrived
from fedloom.core.model_shape import Shape
from fedloom.core.policies import Aggregator, BudgetRule, Schedule
from fedloom.core.schema import Malformed, Reader, jsonable, reachable_classes
from fedloom.core.server import Coordinator, Limits, Server
from fedloom.core.types import ClientId, Model, Profile, Result, GroupStatistics
from fedloom.hierarchy.hierarchy import Hierarchy
from fedloom.hierarchy.regrouping import Compared
from fedloom.report.run_log import read_run_log
from fedloom.runs import checkpoint, manifest
from fedloom.runs.trace import encode_step

UPDATES = "updates"
START = "start"
POLICIES = ("aggregate", "schedule", "plan", "hierarchy")
SERVER_SETTINGS: Mapping[str, Any] = {
    "aggregator": Aggregator,
    "schedule": Schedule,
    "plan": BudgetRule,
    "limits": Limits,
    "transfer": codec.Codec | None,
    "hierarchy": Hierarchy | None,
}
"""What of a run's settings its server is made of."""


@dataclass(frozen=True, slots=True)
class Archive:
    """An observer that keeps the answers, as they arrived, in `folder`; what the server began with is written at once."""

    folder: Path

    @classmethod
    def of(cls, folder: Path, server: Coordinator) -> Archive:
        """For this server, which has done nothing yet, or goes on with what it did."""
        folder.mkdir(exist_ok=True)
        checkpoint.write_checkpoint(folder / f"{START}.safetensors", {"first": server.state.first, "shape": server.shape})
        return cls(folder)

    def __call__(self, now: float, event: Event, commands: list[Command]) -> None:
        """One file an answer, also of one that is refused."""
        if isinstance(event, UpdateArrived):
            checkpoint.write_checkpoint(self.folder / f"{event.task}.safetensors", {"result": event.result})


@dataclass(frozen=True, slots=True)
class Replayed:
    """How many events gave the same bytes, and what was different in the next one ("": nothing)."""

    events: int
    difference: str = ""


def replay(folder: Path, server: Coordinator | None = None) -> Replayed:
    """Feed the events of the run in `folder` to a fresh server and compare its trace, up to the first difference.

    The server is made from the manifest; give one where the run has policies of its own. A last line that a killed run left
    unfinished is passed over. Raises Refused where the folder holds no trace or not the answers.
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
            made = encode_step(now, event, server.handle(now, event)).encode()
        except ValueError as error:
            return Replayed(number, f"line {number + 1}: {error}")
        if made != recorded:
            where = "; ".join(islice(manifest.json_differences(json.loads(recorded), json.loads(made)), 3))
            told = f"line {number + 1}, {now:g} virtual s, {type(event).__name__}"
            return Replayed(number, f"{told}: {where or 'the same JSON in other bytes'}")
    unfinished = json.loads((folder / "manifest.json").read_bytes()).get("status") != "finished"
    if not unfinished and (torn or not server.state.stopped):
        return Replayed(
            len(lines), f"the trace ends early, after line {len(lines)}: the run was finished, and its stop is missing"
        )
    return Replayed(len(lines))


def server_from_manifest(folder: Path) -> Coordinator:
    """The server with which the run in `folder` began, from its manifest and what it kept. Raises Refused."""
    about = read_run_log(folder).manifest
    settings, reader = {"hierarchy": None, **about["run"]}, Reader(_names())
    try:
        made = {name: reader.read(hint, settings[name]) for name, hint in SERVER_SETTINGS.items()}
        if manifest.as_json(jsonable(made)) != {name: settings[name] for name in SERVER_SETTINGS}:
            raise Malformed("its manifest does not say all of them")
        kept = checkpoint.read_checkpoint(folder / UPDATES / f"{START}.safetensors").read({"first": Model, "shape": Shape})
        known = about["clients"].items() if made["hierarchy"] else ()
        profiles = {one: reader.read(Profile, told) for one, told in known}
        again = made["hierarchy"] and made["hierarchy"].regroup
        compared = reader.read(Compared, about["compared"]) if again else None
    except (Malformed, KeyError, TypeError) as error:
        remedy = (
            f"its policies cannot be made from the manifest ({error}); in Python, replay(folder, server) takes your own"
        )
        raise Refused("replay", str(folder), remedy) from error
    torch.set_num_threads(settings["threads"])
    policies = (made["aggregator"], made["schedule"], made["plan"])
    more = {"limits": made["limits"], "seed": settings["seed"], "transfer": made["transfer"]}
    flat = Server(kept["first"], *policies, shape=kept["shape"], **more)
    return _led(flat, made["hierarchy"], about, profiles, compared)


def _led(
    flat: Server,
    over: Hierarchy | None,
    about: Mapping[str, Any],
    profiles: Mapping[ClientId, Profile],
    compared: Compared | None,
) -> Coordinator:
    """With its edges, or over regions, where these are elsewhere."""
    if over is None:
        return flat
    if "regions" in about:
        return over.over_regions(flat, about["regions"])
    members = {edge: tuple(profiles[one] for one in own) for edge, own in about["groups"].items()}
    return over.over(flat, members, compared)


def _names() -> Mapping[str, Any]:
    """Classes and functions of the folders of policies, by name; these of the core too."""
    folders = [import_module(f"fedloom.{name}") for name in POLICIES]
    modules = [import_module(one.name) for room in folders for one in walk_packages(room.__path__, f"{room.__name__}.")]
    things = chain.from_iterable(vars(module).items() for module in (*modules, codec, core))
    return {name: thing for name, thing in things if callable(thing)}


def _event(recorded: bytes, updates: Path) -> tuple[float, Event]:
    """Time and event of a line of the trace, with the answer itself. Raises ValueError."""
    told = json.loads(recorded)
    if not isinstance(told, dict) or not isinstance(told.get("event"), dict):
        raise Malformed("it tells no event")
    reader, event = Reader(reachable_classes(Event)), dict(told["event"])
    now = reader.read(float, told.get("time"))
    if event.get("type") not in (UpdateArrived.__name__, EdgeReported.__name__):
        return now, reader.read(Event, event)
    client, task = reader.read(str, event.get("client")), reader.read(int, event.get("task"))
    file = updates / f"{task}.safetensors"
    if not file.is_file():
        raise Malformed(f"the answer to task {task} was not kept")
    result = checkpoint.read_checkpoint(file).read({"result": Result})["result"]
    if event["type"] == UpdateArrived.__name__:
        return now, UpdateArrived(client, task, result)
    told = reader.read(GroupStatistics | None, event.get("statistics"))
    return now, EdgeReported(client, task, result, told, reader.read(tuple[Profile, ...], event.get("members")))
