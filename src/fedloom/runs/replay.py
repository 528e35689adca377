"""Replay: the events of a recorded run through a new server, which must give the same bytes. Nothing is trained, no model is loaded.

This is the audit of a run, also after an incident at a deployment. The server is made from the manifest: its policies are looked
up by name among the classes and functions of fedloom's rooms of policies, so a manifest can name no other code. The answers come from
`archive`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from fedloom.core.events import Event
from fedloom.core.files import LOCKED, read_json, read_lines, sub_folder
from fedloom.core.model_shape import Shape
from fedloom.core.policies import Aggregator, BudgetRule, Observer, Schedule
from fedloom.core.schema import Decoder, Malformed, jsonable, with_current_names
from fedloom.core.server import Limits, Server
from fedloom.core.text import parse_json
from fedloom.core.types import ClientId, Model, Profile
from fedloom.hierarchy.hierarchy import Hierarchy
from fedloom.hierarchy.regrouping import Compared
from fedloom.report.run_log import read_run_log
from fedloom.runs import manifest
from fedloom.runs.archive import START, UPDATES, first_kept, read_event, restore_state
from fedloom.runs.checkpoint import read_checkpoint
from fedloom.runs.run import MOST_THREADS
from fedloom.runs.trace import encode_step
from fedloom.train.settings import largest_step

POLICIES = ("aggregate", "schedule", "plan", "hierarchy")
SERVER_SETTINGS: Mapping[str, Any] = {
    "aggregator": Aggregator,
    "schedule": Schedule,
    "plan": BudgetRule,
    "limits": Limits,
    "transfer": Codec | None,
    "hierarchy": Hierarchy | None,
    "canary": Canary | None,
}
"""The settings of a run that its server is made of."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """The outcome of a replay.

    Fields:
        events: how many gave the same bytes.
        difference: what was different in the next one ("": nothing).
        version: version from which answers were kept, where the replay began.
    """

    events: int
    difference: str = ""
    version: int = 0


def replay(
    folder: Path, server: Coordinator | None = None, watch: Callable[[Coordinator, int], Observer] | None = None
) -> Replayed:
    """Feed the events of a recorded run to a new server and compare its trace, up to the first difference.

    A last line that a killed run left unfinished is passed over. Where only the latest answers were kept, it begins at the server's
    state from before them. Raises Refused where the folder holds no trace or not the answers.

    Args:
        folder: the run folder.
        server: the server at version 0, where the run has policies of its own (None: it is made from the manifest).
        watch: is given the server and its version where the replay begins, and returns who is shown each step that gave the same
            bytes (None: nobody).
    """
    if not (folder / LOCKED).is_file():
        raise Refused("replay", str(folder), "there is no trace.jsonl in it; give the folder of a run")
    if not (folder / UPDATES / f"{START}.safetensors").is_file():
        remedy = "its answers were not kept; record a run with `fedloom run FILE --keep-updates`"
        raise Refused("replay", str(folder), remedy)
    updates, same, torn = sub_folder(folder / UPDATES), 0, False
    with refuse_damaged("replay", str(folder)):
        server = server or server_from_manifest(folder)
        begin, state = first_kept(folder)
        version = restore_state(state, server) if state else 0
        observe = watch(server, version) if watch else None
    for line in read_lines(folder / LOCKED, begin):
        recorded, torn = line.removesuffix(b"\n"), not line.endswith(b"\n")
        if torn:
            break
        try:
            now, event = read_event(recorded, updates)
            commands = server.handle(now, event)
            repeated = encode_step(now, event, commands).encode()
        except UNREADABLE as error:
            what = str(error) if isinstance(error, ValueError) else type(error).__name__
            return Replayed(same, f"line {same + 1}: {what}", version)
        if repeated != recorded:
            where = "; ".join(islice(manifest.json_differences(parse_json(recorded), parse_json(repeated)), 3))
            place = f"line {same + 1}, {now:g} virtual s, {type(event).__name__}"
            return Replayed(same, f"{place}: {where or 'the same JSON in other bytes'}", version)
        same += 1
        if observe is not None:
            observe(now, event, commands)
    unfinished = read_json(folder / "manifest.json").get("status") != "finished"
    if not unfinished and (torn or not server.state.stopped):
        early = f"the trace ends early, after line {same}: the run was finished, and its stop is missing"
        return Replayed(same, early, version)
    return Replayed(same, version=version)


def recorded_steps(folder: Path, size: int) -> list[tuple[float, Event]]:
    """Return the times and events after the first `size` bytes of a run's trace, with the answers that it kept. Raises Refused."""
    lines = [line for line in read_lines(folder / LOCKED, size) if line.endswith(b"\n")]
    try:
        return [read_event(line, sub_folder(folder / UPDATES)) for line in lines]
    except ValueError as error:
        remedy = f"its last events cannot be read ({error}); begin a new run with start={folder}"
        raise Refused("--more", str(folder), remedy) from error


def server_from_manifest(folder: Path) -> Coordinator:
    """The server with which the run in `folder` began, from its manifest and what it kept. Raises Refused."""
    about = read_run_log(folder).manifest
    settings, decoder = (
        {"hierarchy": None, "canary": None, **with_current_names(about["run"])},
        Decoder(_policy_names()),
    )
    try:
        values = {name: decoder.read(hint, settings[name]) for name, hint in SERVER_SETTINGS.items()}
        if jsonable(values) != {name: settings[name] for name in SERVER_SETTINGS}:
            raise Malformed("its manifest does not say all of them")
        rates = float(settings["training"]["learning_rate"]), float(settings["lora"]["scaling"])
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
    options = {name: values[name] for name in ("limits", "transfer", "canary")} | {"seed": settings["seed"]}
    options["largest_step"] = largest_step(*rates)
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
