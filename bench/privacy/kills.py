"""Whether the ledger of a private run that is killed again and again counts at least what was released.

A tiny simulation, in turn with independent noise, correlated noise, noise at the edges of a hierarchy, and with records that
are private at the sites (each task that is handed out counts), is killed 50 times (`--quick`: 6) at random moments, and every third
time in the middle of writing the ledger, a checkpoint, the trace or the metrics. After each death all releases that the trace has
ever named are looked for in the ledger: it must have each of them, with at least what it spent of each client. At the end the ledger
must hold exactly the releases of the same run left alone, and the folder must hold its bytes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedloom import FFA, FedBuff, Hierarchy, Limits, Link, Private, RandomGroups, Rounds, prepare
from fedloom.privacy.accounting import Gaussian, SampledGaussian
from fedloom.privacy.ledger import LEDGER, Ledger, LedgerEntry, read_ledger
from fedloom.schedule.shared.staleness import CONSTANT
from fedloom.schedule.shared.weights import uniform
from tests.support.killed_runs import DEADLY, dies_at, ended, over, set_trap
from tests.support.same_bytes import COMPARED
from tests.support.tiny_models import settle, tiny_encoder, tiny_run

KILLS, QUICK = 50, 6
RUNS: tuple[dict[str, Any], ...] = (
    {
        "schedule": Rounds(cohort_size=3, over_selection=1.5, weigh=uniform),
        "privacy": Private(clip=0.5, multiplier=1.0, most_answers=4),
        "limits": Limits(versions=5),
    },
    {
        "aggregator": FFA(),
        "schedule": FedBuff(buffer_size=2, max_in_flight=3, discount=CONSTANT),
        "privacy": Private(clip=0.5, multiplier=2.0, most_answers=4, noise="banded", apart=2),
        "limits": Limits(versions=6),
    },
    {
        "schedule": FedBuff(buffer_size=1, max_in_flight=2),
        "hierarchy": Hierarchy(RandomGroups(groups=2), link=Link(1e6, 1e6)),
        "privacy": Private(clip=0.5, multiplier=2.0, most_answers=6),
        "limits": Limits(versions=4),
    },
    {
        "schedule": FedBuff(buffer_size=2, max_in_flight=3),
        "privacy": Private(clip=0.5, multiplier=1.0, most_answers=4, unit="record"),
        "limits": Limits(versions=4),
        "held_out": 0.0,
    },
)


def figures(quick: bool) -> Mapping[str, object]:
    """Kills, and the releases that a ledger lacked or counted too low after one of them. Raises AssertionError if there is one."""
    settle()
    random.seed(0)
    kills, number, missing = 0, 0, list[str]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_encoder(folder / "model")
        while kills < (QUICK if quick else KILLS):
            kills += one_run(folder, number, (QUICK if quick else KILLS) - kills, missing)
            number += 1
    assert not missing, missing
    return {"kills": kills, "ledger_undercounts": 0}


def one_run(folder: Path, number: int, most: int, missing: list[str]) -> int:
    """Carry out one run alone, and again under at most so many kills; how many fell."""
    alone, out, kills = folder / f"alone-{number}", folder / f"killed-{number}", 0
    began = time.monotonic()
    assert came_to_its_end(begin(folder, alone, number))
    length, seen = time.monotonic() - began, dict[str, dict[str, float]]()
    while True:
        place = random.choice((*DEADLY, "ledger", "ledger")) if kills % 3 == 2 and kills < most else ""
        child = begin(folder, out, number, place)
        if not place and kills < most:
            time.sleep(random.uniform(0.05, 0.9) * length)
            os.kill(child, signal.SIGKILL)
        finished = came_to_its_end(child)
        seen |= released(out)
        missing += uncounted(seen, out)
        if finished:
            break
        kills += 1
        if over(out):
            break
    assert spent(alone) == spent(out), "a ledger that was written under kills has other releases"
    for name in COMPARED:
        assert (alone / name).read_bytes() == (out / name).read_bytes(), f"{name} of run {number}"
    print(
        f"   run {number} ({length:.1f} s): {kills} kills, {len(seen)} releases, all in the ledger; same bytes",
        flush=True,
    )
    return kills


def came_to_its_end(child: int) -> bool:
    """Wait for a child: whether it was not killed. Raises RuntimeError where it failed."""
    try:
        return ended(child)
    except SystemExit as error:
        raise RuntimeError(str(error)) from None


def begin(folder: Path, out: Path, number: int, place: str = "") -> int:
    """A child that carries out the run, or goes on with it; its process id."""
    child = os.fork()
    if child:
        return child
    try:
        random.seed(os.getpid())
        if place == "ledger":
            write: Any = Ledger.write
            Ledger.write = dies_at(random.randint(1, 6), write, half_a_line)  # type: ignore[method-assign]
        elif place:
            set_trap(place)
        begun = (out / "manifest.json").exists()
        if not begun:
            shutil.rmtree(out, ignore_errors=True)
        run = tiny_run(folder / "model", seed=number, **RUNS[number % len(RUNS)])
        prepare(run, resume=out if begun else None).execute(out, report=False, checkpoint_seconds=0.0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def half_a_line(ledger: Ledger, entry: LedgerEntry) -> None:
    """Write the beginning of a line, as a crash leaves it."""
    os.write(ledger.file.fileno(), b'{"type":"LedgerEntry","about":{"ed')


def released(out: Path) -> dict[str, dict[str, float]]:
    """What each release spent of each client, as the trace names them: by digest its mu, and by task its steps on private records."""
    commands = [command for step in steps_of(out) for command in step["commands"]]
    found = {one["value"]: one["spent"] for one in releases_in(commands)}
    if not (out / "manifest.json").exists() or '"unit": "client"' in (out / "manifest.json").read_text(
        encoding="utf-8"
    ):
        return found
    tasks = [command["task"] for command in commands if command["type"] == "Dispatch"]
    return {f"task {task['id']}": {task["client"]: task["budget"]["steps"]} for task in tasks}


def steps_of(out: Path) -> list[dict[str, Any]]:
    """The steps of a trace; a torn last line tells nothing."""
    if not (out / "trace.jsonl").exists():
        return []
    lines = (out / "trace.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def releases_in(commands: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The releases among commands, those of edges too."""
    for command in commands:
        if command["type"] == "Release":
            yield command
        elif command["type"] == "InsideEdge":
            yield from releases_in([command["command"]])


def spent(out: Path) -> dict[str, dict[str, float]]:
    """The same, as the ledger has them."""
    found = dict[str, dict[str, float]]()
    for entry in read_ledger(out / LEDGER):
        sizes = dict[str, float]()
        for unit, event in entry.events.items():
            assert isinstance(event, Gaussian | SampledGaussian)
            sizes[unit] = event.mu if isinstance(event, Gaussian) else event.steps
        found[str(entry.about.get("value", f"task {entry.about.get('task')}"))] = sizes
    return found


def uncounted(seen: Mapping[str, Mapping[str, float]], out: Path) -> list[str]:
    """Releases that the ledger lacks, or counts for less than they told of a client."""
    ledger = spent(out)
    return [
        f"{out.name}: {client} in {value}"
        for value, told in seen.items()
        for client, mu in told.items()
        if ledger.get(value, {}).get(client, 0.0) < mu
    ]
