"""Devices and their availability from files: a CSV of one's own, or the traces of FedScale exported to JSON or CSV.

FedScale distributes pickles, which may run code when they are opened and are therefore never read here. Whoever trusts such a file
exports it once, in Python:

    import json, pickle
    json.dump(pickle.load(open("client_device_capacity", "rb")), open("devices.json", "w"), default=float)

and `client_behave_trace` likewise. Source: FedScale, Lai et al. 2022, benchmark/dataset/data/device_info and client_metadata.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from fedloom.core.errors import Refused
from fedloom.core.model_shape import Shape
from fedloom.core.types import ClientId, Profile, Result, Task
from fedloom.simulate.availability import Stays, Traced, cycle
from fedloom.simulate.devices import Seconds, jittered, priced
from fedloom.simulate.table_file import Entry, Listing

USUAL = Profile("", 0)


@dataclass(frozen=True, slots=True)
class DeviceFile:
    """A CSV table of devices: columns `flops`, `up_bps`, `down_bps`, and if wanted `client`, `memory` (bytes), `tier`.

    With a `client` column each client has the line of its name; without, the lines are dealt in seeded random order, again from
    the first where there are more clients. `jitter` is as in `World`.
    """

    path: str | Path
    jitter: float = 0.0

    def __post_init__(self) -> None:
        _check_jitter(self.jitter)

    def profiles(self, examples: Mapping[ClientId, int], seed: int) -> tuple[Profile, ...]:
        """Read the file. Raises Refused with line and column."""
        file = Listing("world.path", str(self.path))
        entries = file.read(("flops", "up_bps", "down_bps"), ("client", "memory", "tier"))
        for entry in entries:
            self._profile(file, entry, "", 0)  # also lines that nobody gets are checked
        own = file.dealt(entries, examples, seed) if entries[0].client is None else file.named(entries, examples)
        return tuple(self._profile(file, entry, client, examples[client]) for client, entry in own.items())

    def seconds(self, task: Task, result: Result, profile: Profile, shape: Shape, seed: int, turn: int = 0) -> Seconds:
        """Bytes over links, FLOP over speed."""
        return priced(task, result, profile, shape, jittered(task, self.jitter, seed))

    def _profile(self, file: Listing, entry: Entry, client: ClientId, examples: int) -> Profile:
        flops, up, down = (file.number(entry, column) for column in ("flops", "up_bps", "down_bps"))
        memory = file.number(entry, "memory") if "memory" in entry.cells else USUAL.memory
        return Profile(client, examples, flops, up, down, memory, str(entry.cells.get("tier", USUAL.tier)))


@dataclass(frozen=True, slots=True)
class FedScaleDevices:
    """FedScale's devices, dealt in seeded random order: `computation` in ms a sample, `communication` in kbit/s both ways.

    A JSON object {client: {"computation": 162.0, "communication": 5648.1}, ...} or a CSV table with columns client, computation,
    communication. The latency is that of one inference of a small image network on the device; `sample_flops` is what it costs
    in FLOP and makes a speed of it (our choice: FedScale takes the latency for whatever is trained). `jitter` is as in `World`.
    """

    path: str | Path
    sample_flops: float = 1e9
    jitter: float = 0.0

    def __post_init__(self) -> None:
        if not self.sample_flops > 0:
            raise Refused("world.sample_flops", self.sample_flops, "FLOP of one inference: 1e9 is usual")
        _check_jitter(self.jitter)

    def profiles(self, examples: Mapping[ClientId, int], seed: int) -> tuple[Profile, ...]:
        """Read the file. Raises Refused with line and column, or the entry."""
        file, found = Listing("world.path", str(self.path)), list[Profile]()
        entries = file.read(("client", "computation", "communication"))
        for client, entry in file.dealt(entries, examples, seed).items():
            latency, kilobits = (file.number(entry, column) for column in ("computation", "communication"))
            bps = 1e3 * kilobits
            found.append(Profile(client, examples[client], self.sample_flops * 1e3 / latency, bps, bps))
        return tuple(found)

    def seconds(self, task: Task, result: Result, profile: Profile, shape: Shape, seed: int, turn: int = 0) -> Seconds:
        """Bytes over links, FLOP over speed."""
        return priced(task, result, profile, shape, jittered(task, self.jitter, seed))


@dataclass(frozen=True, slots=True)
class AvailabilityFile:
    """Windows from a file in FedScale's format, repeated after `finish_time` seconds.

    A JSON object {client: {"active": [0, 700], "inactive": [300, 900], "finish_time": 1000}, ...}, times in seconds, other keys
    ignored, or a CSV table with columns client, active, inactive, finish_time and a line for each window. Traces are dealt to
    clients in seeded random order, or with `by_name` each client has the one of its name.
    """

    path: str | Path
    by_name: bool = False

    def of(self, clients: Sequence[ClientId], seed: int) -> Stays:
        """Read the file. Raises Refused with line and column, or the entry."""
        file = Listing("availability.path", str(self.path))
        entries = file.read(("client", "active", "inactive", "finish_time"))
        traces = entries if file.is_json else _joined(file, entries)
        own = file.named(traces, clients) if self.by_name else file.dealt(traces, clients, seed)
        cycles = {client: _cycle(file, entry) for client, entry in own.items()}
        if cycles and all(one == NEVER for one in cycles.values()):
            raise file.refused("none of the clients is ever available; add windows")
        return Traced(cycles)


NEVER = cycle([], 1.0)


def _cycle(file: Listing, entry: Entry) -> tuple[float, ...]:
    length = file.number(entry, "finish_time")
    active, inactive = (_times(file, entry, column) for column in ("active", "inactive"))
    if len(inactive) == len(active) - 1:
        inactive = [*inactive, max(length, active[-1])]
    times = [time for pair in zip(active, inactive, strict=False) for time in pair]
    if len(active) != len(inactive) or any(after < before for before, after in pairwise(times)):
        raise file.refused(f"{entry.where}: active and inactive times must alternate and grow, active first")
    within = [min(time, length) for time in times]
    return cycle(list(zip(within[::2], within[1::2], strict=True)), length)


def _times(file: Listing, entry: Entry, column: str) -> list[float]:
    given = entry.cells[column]
    if not isinstance(given, list):
        raise file.refused(f"{entry.where}, {column}: give a list of seconds")
    return [file.number(Entry(None, entry.where, {column: one}), column, zero=True) for one in given]


def _joined(file: Listing, lines: Sequence[Entry]) -> list[Entry]:
    """The lines of each client as one entry with lists, which is how JSON has it."""
    found = dict[ClientId | None, list[Entry]]()
    for line in lines:
        own = found.setdefault(line.client, [])
        if own and own[0].cells["finish_time"] != line.cells["finish_time"]:
            raise file.refused(f"{line.where}, finish_time: another than in {own[0].where} for the same client")
        own.append(line)
    return [
        Entry(
            client,
            own[-1].where,
            {**own[-1].cells, **{c: [one.cells[c] for one in own] for c in ("active", "inactive")}},
        )
        for client, own in found.items()
    ]


def _check_jitter(jitter: float) -> None:
    if not jitter >= 0:
        raise Refused("world.jitter", jitter, "0 means that a task always takes the same time")
