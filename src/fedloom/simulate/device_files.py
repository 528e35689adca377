"""Devices and their availability from files: a CSV of one's own, or the traces of FedScale exported to JSON or CSV.

FedScale distributes pickles, which may run code when they are opened and are therefore never read here. Whoever trusts such a file
exports it once, in Python:

    import json, pickle
    json.dump(pickle.load(open("client_device_capacity", "rb")), open("devices.json", "w"), default=float)

and `client_behave_trace` likewise. Source: FedScale, Lai et al. 2022, benchmark/dataset/data/device_info and client_metadata.py.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from fedloom.core.errors import Refused
from fedloom.core.model_shape import Shape
from fedloom.core.seeds import rng
from fedloom.core.types import ClientId, Profile, Result, Task
from fedloom.simulate.availability import Stays, Traced, cycle
from fedloom.simulate.devices import Seconds, check_jitter, jitter_factor, task_seconds

USUAL = Profile("", 0)


@dataclass(frozen=True, slots=True)
class DeviceFile:
    """Devices from a CSV table: columns `flops`, `up_bps`, `down_bps`, and if wanted `client`, `memory` (bytes), `tier`.

    With a `client` column each client has the line of its name. Without one, the lines are dealt in seeded random order, again from
    the first where there are more clients.

    Fields:
        path: the table.
        jitter: standard deviation of the logarithm of each task's training time (0: none).
    """

    path: str | Path
    jitter: float = 0.0

    def __post_init__(self) -> None:
        check_jitter(self.jitter)

    def profiles(self, examples: Mapping[ClientId, int], seed: int) -> tuple[Profile, ...]:
        """Read the devices of these clients. Raises Refused with line and column."""
        file = ClientTable("world.path", str(self.path))
        entries = file.read(("flops", "up_bps", "down_bps"), ("client", "memory", "tier"))
        for entry in entries:
            self._profile(file, entry, "", 0)  # also lines that nobody gets are checked
        named = entries[0].client is not None
        by_client = file.by_name(entries, examples) if named else file.deal(entries, examples, seed)
        return tuple(self._profile(file, entry, client, examples[client]) for client, entry in by_client.items())

    def seconds(self, task: Task, result: Result, profile: Profile, shape: Shape, seed: int, turn: int = 0) -> Seconds:
        """Return bytes over links and FLOP over speed."""
        return task_seconds(task, result, profile, shape, jitter_factor(task, self.jitter, seed))

    def _profile(self, file: ClientTable, entry: Entry, client: ClientId, examples: int) -> Profile:
        flops, up, down = (file.positive_number(entry, column) for column in ("flops", "up_bps", "down_bps"))
        memory = file.positive_number(entry, "memory") if "memory" in entry.cells else USUAL.memory
        return Profile(client, examples, flops, up, down, memory, str(entry.cells.get("tier", USUAL.tier)))


@dataclass(frozen=True, slots=True)
class FedScaleDevices:
    """FedScale's devices, dealt in seeded random order: `computation` in ms a sample, `communication` in kbit/s both ways.

    The file is a JSON object {client: {"computation": 162.0, "communication": 5648.1}, ...} or a CSV table with columns client,
    computation, communication. The latency is that of one inference of a small image network on the device.

    Fields:
        path: the file.
        sample_flops: what that inference costs, which makes a speed of the latency (FLOP; 1e9). It is our choice: FedScale takes
            the latency for whatever is trained.
        jitter: standard deviation of the logarithm of each task's training time (0: none).
    """

    path: str | Path
    sample_flops: float = 1e9
    jitter: float = 0.0

    def __post_init__(self) -> None:
        if not self.sample_flops > 0:
            raise Refused("world.sample_flops", self.sample_flops, "FLOP of one inference: 1e9 is usual")
        check_jitter(self.jitter)

    def profiles(self, examples: Mapping[ClientId, int], seed: int) -> tuple[Profile, ...]:
        """Read the devices of these clients. Raises Refused with line and column, or the entry."""
        file, profiles = ClientTable("world.path", str(self.path)), list[Profile]()
        entries = file.read(("client", "computation", "communication"))
        for client, entry in file.deal(entries, examples, seed).items():
            latency, kilobits = (file.positive_number(entry, column) for column in ("computation", "communication"))
            bps = 1e3 * kilobits
            profiles.append(Profile(client, examples[client], self.sample_flops * 1e3 / latency, bps, bps))
        return tuple(profiles)

    def seconds(self, task: Task, result: Result, profile: Profile, shape: Shape, seed: int, turn: int = 0) -> Seconds:
        """Return bytes over links and FLOP over speed."""
        return task_seconds(task, result, profile, shape, jitter_factor(task, self.jitter, seed))


@dataclass(frozen=True, slots=True)
class AvailabilityFile:
    """Windows of availability from a file in FedScale's format, repeated after `finish_time` seconds.

    The file is a JSON object {client: {"active": [0, 700], "inactive": [300, 900], "finish_time": 1000}, ...}, times in seconds and
    other keys ignored, or a CSV table with columns client, active, inactive, finish_time and a line for each window.

    Fields:
        path: the file.
        by_name: give each client the windows of its name (False: they are dealt in seeded random order).
    """

    path: str | Path
    by_name: bool = False

    def of(self, clients: Sequence[ClientId], seed: int) -> Stays:
        """Read the windows of these clients. Raises Refused with line and column, or the entry."""
        file = ClientTable("availability.path", str(self.path))
        entries = file.read(("client", "active", "inactive", "finish_time"))
        traces = entries if file.is_json else _join_lines(file, entries)
        by_client = file.by_name(traces, clients) if self.by_name else file.deal(traces, clients, seed)
        cycles = {client: _cycle(file, entry) for client, entry in by_client.items()}
        if cycles and all(periods == NEVER for periods in cycles.values()):
            raise file.refused("none of the clients is ever available; add windows")
        return Traced(cycles)


NEVER = cycle([], 1.0)


def _cycle(file: ClientTable, entry: Entry) -> tuple[float, ...]:
    length = file.positive_number(entry, "finish_time")
    active, inactive = (_times(file, entry, column) for column in ("active", "inactive"))
    if len(inactive) == len(active) - 1:
        inactive = [*inactive, max(length, active[-1])]
    times = [time for pair in zip(active, inactive, strict=False) for time in pair]
    if len(active) != len(inactive) or any(after < before for before, after in pairwise(times)):
        raise file.refused(f"{entry.where}: active and inactive times must alternate and grow, active first")
    within = [min(time, length) for time in times]
    return cycle(list(zip(within[::2], within[1::2], strict=True)), length)


def _times(file: ClientTable, entry: Entry, column: str) -> list[float]:
    times = entry.cells[column]
    if not isinstance(times, list):
        raise file.refused(f"{entry.where}, {column}: give a list of seconds")
    return [file.positive_number(Entry(None, entry.where, {column: time}), column, zero=True) for time in times]


def _join_lines(file: ClientTable, lines: Sequence[Entry]) -> list[Entry]:
    """Return the lines of each client as one entry with lists, which is the form of the JSON file."""
    by_client = dict[ClientId | None, list[Entry]]()
    for line in lines:
        earlier = by_client.setdefault(line.client, [])
        if earlier and earlier[0].cells["finish_time"] != line.cells["finish_time"]:
            raise file.refused(f"{line.where}, finish_time: another than in {earlier[0].where} for the same client")
        earlier.append(line)
    entries = []
    for client, parts in by_client.items():
        times = {column: [part.cells[column] for part in parts] for column in ("active", "inactive")}
        entries.append(Entry(client, parts[-1].where, {**parts[-1].cells, **times}))
    return entries


# Reading small files of clients: a mistake is reported with its line and column ---------------------------------------------

PICKLE = b"\x80"
"""The first byte of every pickle since protocol 2."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of a CSV table, or an item of a JSON object.

    Fields:
        client: the client that it names (None: it names none).
        where: its place in the file, in words.
        cells: its values, by column.
    """

    client: ClientId | None
    where: str
    cells: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class ClientTable:
    """A file with an entry for each client, and the setting that names it. Every method raises Refused."""

    field: str
    path: str

    @property
    def is_json(self) -> bool:
        """Whether it is JSON, by its name."""
        return Path(self.path).suffix.lower() == ".json"

    def read(self, required: Sequence[str], optional: Sequence[str] = ()) -> list[Entry]:
        """Read all entries, at least one: of a `.json` file {client: {column: value}}, else of a CSV table with a header."""
        try:
            content = Path(self.path).read_bytes()
            if content.startswith(PICKLE):
                raise self.refused(
                    "a pickle may run code and is never opened; export it to JSON, see fedloom.simulate.device_files"
                )
            text = content.decode("utf-8-sig")
        except OSError as error:
            raise self.refused(f"cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise self.refused(f"is not UTF-8 text (byte {error.start}); write a CSV table or JSON") from error
        entries = self._json(text, required) if self.is_json else self._table(text, required, optional)
        if not entries:
            raise self.refused("there are no entries; give at least one")
        return entries

    def positive_number(self, entry: Entry, column: str, zero: bool = False) -> float:
        """Return the positive finite number in this column; with `zero` it may be 0."""
        value = entry.cells.get(column)
        try:
            number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not (0 < number < math.inf or (zero and number == 0)):
            raise self.refused(
                f"{entry.where}, {column}: {value!r:.40} must be {'0 or ' if zero else ''}a positive number"
            )
        return number

    def deal(self, entries: Sequence[Entry], clients: Iterable[ClientId], seed: int) -> dict[ClientId, Entry]:
        """Return an entry for each client, dealt in random order, again from the first where there are more clients."""
        order = list(entries)
        rng(seed, "dealt", self.field).shuffle(order)
        return {client: order[k % len(order)] for k, client in enumerate(sorted(clients))}

    def by_name(self, entries: Sequence[Entry], clients: Iterable[ClientId]) -> dict[ClientId, Entry]:
        """Return the entry that names each client."""
        by_name = dict[ClientId | None, Entry]()
        for entry in entries:
            if entry.client in by_name:
                twice = f"{by_name[entry.client].where} and {entry.where}"
                raise self.refused(f"client {entry.client!r} has two entries: {twice}; keep one")
            by_name[entry.client] = entry
        missing = [client for client in sorted(clients) if client not in by_name]
        if missing:
            raise self.refused(f"{len(missing)} clients have no entry: add {', '.join(missing[:3])}")
        return {client: by_name[client] for client in sorted(clients)}

    def refused(self, remedy: str) -> Refused:
        """Return the error that says what is wrong with the file."""
        return Refused(self.field, self.path, remedy)

    def _json(self, text: str, required: Sequence[str]) -> list[Entry]:
        try:
            content = json.loads(text)
        except RecursionError as error:
            raise self.refused("is nested too deep; give an object of objects") from error
        except ValueError as error:
            raise self.refused(f"is not JSON ({error})") from error
        if not isinstance(content, dict) or not all(isinstance(item, dict) for item in content.values()):
            raise self.refused("give a JSON object of objects, one for each client")
        entries = [Entry(client, f"client {client!r:.40}", cells) for client, cells in content.items()]
        for entry in entries:
            lacking = [name for name in required if name not in entry.cells and name != "client"]
            if lacking:
                raise self.refused(f"{entry.where} has no {lacking[0]!r}; every client needs {', '.join(required)}")
        return entries

    def _table(self, text: str, required: Sequence[str], optional: Sequence[str]) -> list[Entry]:
        reader, entries = csv.reader(io.StringIO(text), strict=True), list[Entry]()
        header: list[str] | None = None
        try:
            for cells in reader:
                row = [cell.strip() for cell in cells]
                if header is None:
                    header = self._header(row, required, optional)
                elif any(row):
                    entries.append(self._line(header, row, reader.line_num))
        except csv.Error as error:
            raise self.refused(f"line {reader.line_num}: {error}") from error
        return entries

    def _header(self, header: list[str], required: Sequence[str], optional: Sequence[str]) -> list[str]:
        columns = [*required, *optional]
        for column in header:
            if column not in columns or header.count(column) > 1:
                problem = "is there twice" if column in columns else "is not known"
                raise self.refused(f"line 1: column {column!r:.40} {problem}; the columns are {', '.join(columns)}")
        lacking = [column for column in required if column not in header]
        if lacking:
            raise self.refused(f"line 1: there is no column {lacking[0]!r}; needed are {', '.join(required)}")
        return header

    def _line(self, header: Sequence[str], row: Sequence[str], number: int) -> Entry:
        if len(row) != len(header):
            raise self.refused(f"line {number} has {len(row)} cells; the header has {len(header)}")
        cells = dict(zip(header, row, strict=True))
        empty = [column for column, cell in cells.items() if not cell]
        if empty:
            raise self.refused(f"line {number}, {empty[0]}: the cell is empty; fill it")
        return Entry(cells.get("client"), f"line {number}", cells)
