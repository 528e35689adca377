"""Small files of clients, CSV or JSON, read with an eye on who wrote them: a mistake is told with its line and column."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedloom.core.errors import Refused
from fedloom.core.seeds import rng
from fedloom.core.types import ClientId

PICKLE = b"\x80"
"""The first byte of every pickle since protocol 2."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of a CSV table, or an item of a JSON object: the client that it names, where it is, what it says."""

    client: ClientId | None
    where: str
    cells: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Listing:
    """A file, and the setting that names it. Every method raises Refused."""

    field: str
    path: str

    @property
    def is_json(self) -> bool:
        """By its name."""
        return Path(self.path).suffix.lower() == ".json"

    def read(self, required: Sequence[str], optional: Sequence[str] = ()) -> list[Entry]:
        """All entries: of a `.json` file {client: {column: value}}, else of a CSV table with a header; at least one."""
        try:
            content = Path(self.path).read_bytes()
            if content.startswith(PICKLE):
                raise self.refused(
                    "a pickle may run code and is never opened; export it to JSON, see fedloom.devicefile"
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

    def number(self, entry: Entry, column: str, zero: bool = False) -> float:
        """The positive finite number of this column; with `zero` it may be 0."""
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

    def dealt(self, entries: Sequence[Entry], clients: Iterable[ClientId], seed: int) -> dict[ClientId, Entry]:
        """An entry for each client, dealt in random order, again from the first where there are more clients."""
        order = list(entries)
        rng(seed, "dealt", self.field).shuffle(order)
        return {client: order[k % len(order)] for k, client in enumerate(sorted(clients))}

    def named(self, entries: Sequence[Entry], clients: Iterable[ClientId]) -> dict[ClientId, Entry]:
        """The entry of each client."""
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
        """What is wrong with the file."""
        return Refused(self.field, self.path, remedy)

    def _json(self, text: str, required: Sequence[str]) -> list[Entry]:
        try:
            given = json.loads(text)
        except RecursionError as error:
            raise self.refused("is nested too deep; give an object of objects") from error
        except ValueError as error:
            raise self.refused(f"is not JSON ({error})") from error
        if not isinstance(given, dict) or not all(isinstance(item, dict) for item in given.values()):
            raise self.refused("give a JSON object of objects, one for each client")
        entries = [Entry(client, f"client {client!r:.40}", cells) for client, cells in given.items()]
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
        known = [*required, *optional]
        for column in header:
            if column not in known or header.count(column) > 1:
                problem = "is there twice" if column in known else "is not known"
                raise self.refused(f"line 1: column {column!r:.40} {problem}; the columns are {', '.join(known)}")
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
