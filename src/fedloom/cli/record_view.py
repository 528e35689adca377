"""The record of a site in the terminal: its lines, sums for each run, and whether it holds."""

from __future__ import annotations

import json
import textwrap
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fedloom.core.errors import Refused
from fedloom.core.text import printable
from fedloom.deploy.site.request_record import BrokenRecord, RecordChain

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

WIDTH = 80
HEAD = f"{'time (UTC)':16} {'run':14} {'what':19} {'task':>6} {'rows':>7} {'size':>13}"
WAYS = (("bytes_out", "out"), ("bytes_in", "in"))


@dataclass(slots=True)
class RunTotals:
    """Sums over the lines of one run.

    Fields:
        tasks: tasks that were begun.
        epochs: passes over the rows in them.
        evaluations: evaluations that were begun.
        refused: refusals.
        sent: bytes that were sent.
        noised: answers with noise, or clipped alone.
    """

    tasks: int = 0
    epochs: float = 0.0
    evaluations: int = 0
    refused: int = 0
    sent: int = 0
    noised: int = 0

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a line."""
        kind, is_new = line["kind"], not line.get("again")
        self.tasks += kind == "task asked" and is_new
        self.epochs += line.get("epochs", 0.0) if kind == "task asked" and is_new else 0.0
        self.evaluations += kind == "evaluation asked" and is_new
        self.refused += kind == "refused"
        self.noised += kind == "noise spent"
        self.sent += line.get("bytes_out", 0)


def print_record(path: Path, keys: list[EllipticCurvePublicKey], head: str, as_json: bool, last: int) -> None:
    """Print a record and check it.

    Args:
        path: the record.
        keys: public keys that may have signed it.
        head: a head that was noted before ("": none).
        as_json: print the lines as they are, and nothing else.
        last: lines to print (0: all).

    Raises Refused where the record does not hold, after what stands before the first line that does not.
    """
    chain, totals = RecordChain(keys), dict[str, RunTotals]()
    rows = deque[str](maxlen=last or None)
    found_at = 0
    try:
        for line in chain.lines(path):
            if head and chain.head == head:
                found_at = chain.number
            if "run" in line:
                totals.setdefault(line["run"], RunTotals()).add(line)
            rows.append(json.dumps(line, separators=(",", ":")) if as_json else "\n".join(line_rows(line)))
            if as_json and not last:
                typer.echo(rows.pop())
    except FileNotFoundError:
        raise Refused("record", str(path), "there is none: no server has asked this site for anything yet") from None
    except BrokenRecord as error:
        _echo(rows, as_json)
        raise Refused("record", str(path), str(error)) from None
    _echo(rows, as_json)
    if not as_json:
        typer.echo("\n".join(["", *totals_rows(totals), *verdict_rows(chain, found_at)]))
    if keys and chain.unsigned:
        last_lines = f"the last {chain.unsigned} of {chain.number} lines bear no signature"
        raise Refused("record", str(path), f"{last_lines}: anybody who can write the file may have made them")
    if head and not found_at:
        raise Refused("--head", head, "no line has this head: lines were removed from the end, or written anew")


def _echo(rows: Iterable[str], as_json: bool) -> None:
    if not as_json:
        typer.echo(HEAD)
    for row in rows:
        typer.echo(row)


def size_words(size: int) -> str:
    """Return a number of bytes in words.

    >>> size_words(812), size_words(56_700_000)
    ('812 B', '56.7 MB')
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size} B"


def line_rows(line: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line of a record as rows of at most 80 columns; the reason of a refusal below it."""
    time = line["time"].replace("T", " ")[:16]
    run = printable(line.get("run", ""), lines=False)
    what = line["kind"] + (" again" if line.get("again") and line["kind"] == "task asked" else "")
    size = next((f"{size_words(line[name])} {way}" for name, way in WAYS if name in line), "")
    yield f"{time:16} {run:14.14} {what:19.19} {line.get('task', ''):>6} {line.get('rows', ''):>7} {size:>13}".rstrip()
    if reason := line.get("reason"):
        yield from textwrap.wrap(
            printable(reason, lines=False), WIDTH - 17, initial_indent=" " * 17, subsequent_indent=" " * 17
        )
    if line["kind"] == "noise spent":
        each = " in each step of training" if line.get("unit") == "record" else ""
        yield f"{'':17}clip {line['clip']:g}, noise {line.get('multiplier', 0.0):g} times that{each}"


def totals_rows(totals: Mapping[str, RunTotals]) -> Iterator[str]:
    """Yield the sums of each run."""
    yield f"{'run':14} {'tasks':>6} {'epochs':>8} {'evaluations':>11} {'refused':>7} {'noised':>6} {'out':>10}"
    for run, one in totals.items():
        name = printable(run, lines=False)
        counts = f"{one.tasks:>6} {one.epochs:>8.2f} {one.evaluations:>11} {one.refused:>7} {one.noised:>6}"
        yield f"{name:14.14} {counts} {size_words(one.sent):>10}"


def verdict_rows(chain: RecordChain, found_at: int) -> Iterator[str]:
    """Yield what was checked, and what that does not show."""
    yield ""
    if chain.keys:
        yield f"Verified {chain.number} lines: the hash chain is intact, and this key signed each line"
    else:
        yield f"Verified {chain.number} lines: the hash chain is intact; no signature was checked"
    if chain.loose:
        yield f"Note     line {chain.loose} is incomplete (a power cut); the next start continues after it"
    if found_at:
        yield f"Head     the given head is that of line {found_at} of {chain.number}"
    yield f"Head     {chain.head}"
    yield "         Store it elsewhere: it reveals lines that are removed from the end"
