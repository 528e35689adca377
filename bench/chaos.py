"""A federation of real processes whose parts are killed: does the run end, and does every answer count exactly once?

    python -m bench.chaos [--quick] [--seed N]

`fedloom serve` and four `fedloom join`, with TLS and keys, on a tiny model that learns toy sentences (FedFa, a window of four).
At moments drawn from the seed (when the run has made so many versions, and up to 1.5 s later) `kill -9` hits a worker, a
SuperNode, the ServerApp or the SuperLink: ten times each, or 2, 1, 1 and 1 with `--quick`. Once the gate stops for ten seconds, so
that no byte gets through between server and sites, and once the disk of the server's folder is full until the server has said so (a
tmpfs of its own; left out where this process is not root). Where a part is not there, because it was killed just before, the kill
waits.

Afterwards the trace is audited: `lost` are accepted answers that are in no version, `double_counted` those that counted twice,
`unfinished` tasks of which the trace does not tell the end, and runs that did not end. The trace must replay to the byte. A kill is
`recovered` if an answer was accepted later: from that site, or from any if it hit the server. The accuracy is held against
undisturbed runs of the same seed (three; one with `--quick`), which give the noise. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from fedloom.runs.replay import replay
from tests.support.federation import Federation, make, running, until
from tests.support.tiny_models import hush, settle

SITES, STEPS = 4, 40
"""Of a task: about half a second."""
AT_SITES = ("worker", "supernode")
FULL = {"worker": 10, "supernode": 10, "serverapp": 10, "superlink": 10}
QUICK = {"worker": 2, "supernode": 1, "serverapp": 1, "superlink": 1}
CUT = 10.0
"""Seconds."""
DISK = "192m"
"""Of the server's folder; a run fills a few megabytes of it."""
LATEST = {"supernode": 0.5, "worker": 0.6}
"""Share of the versions after which no more such kills are drawn, by default 0.75: what comes later could not be seen to recover."""


@dataclass(slots=True)
class Blow:
    """Something that befalls the part of a place as soon as the run has made `version` versions, and `later` seconds."""

    part: str
    place: str
    version: int
    later: float
    due: float | None = None
    after: int | None = None


@dataclass(slots=True)
class Storm:
    """The blows still to come, and those that fell."""

    run: Federation
    coming: list[Blow]
    fallen: list[Blow] = field(default_factory=list)

    def look(self) -> None:
        """Let fall what is due."""
        version, now = self.run.version(), time.monotonic()
        for blow in list(self.coming):
            if blow.due is None and version >= blow.version:
                blow.due = now + blow.later
            if blow.due is not None and now >= blow.due and self._strike(blow):
                blow.after = len(self.run.lines())
                self.coming.remove(blow)
                self.fallen.append(blow)
                print(f"{time.strftime('%H:%M:%S')} version {version:3d}: {blow.part} of {blow.place}", flush=True)

    def _strike(self, blow: Blow) -> bool:
        """Whether it could be done."""
        if blow.part == "disk":
            fill(self.run)
            return True
        pid = self.run.pid(blow.place, "gate" if blow.part == "cut" else blow.part)
        if pid is None:
            return False
        if blow.part == "cut":
            os.kill(pid, signal.SIGSTOP)
            time.sleep(CUT)
            os.kill(pid, signal.SIGCONT)
        else:
            os.kill(pid, signal.SIGKILL)
        return True


def draw_blows(counts: Mapping[str, int], versions: int, names: Sequence[str], seed: int) -> list[Blow]:
    """The blows of a seed: so many of each part, the cut, and the full disk where there is one of its own."""
    random, blows = Random(seed), list[Blow]()
    for part, count in {**counts, "cut": 1, **({"disk": 1} if os.geteuid() == 0 else {})}.items():
        for _ in range(count):
            place = random.choice(list(names)) if part in AT_SITES else "server"
            last = round(versions * LATEST.get(part, 0.75))
            blows.append(Blow(part, place, random.randint(2, last), random.uniform(0.0, 1.5)))
    return sorted(blows, key=lambda blow: blow.version)


def fill(run: Federation) -> None:
    """No room is left on the server's disk, until the server has said so, and five seconds more."""
    ballast, told = run.server / "ballast", len(run.said("server"))
    with ballast.open("wb", buffering=0) as file, _until_full():
        while True:
            file.write(bytes(2**16))
    until(lambda: "full" in run.said("server")[told:], 120, "that the server says that its disk is full")
    time.sleep(5)
    ballast.unlink()


@contextmanager
def _until_full() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


@contextmanager
def disk(folder: Path) -> Iterator[None]:
    """Inside, the folder is a small disk of its own (root), so that it can be full."""
    folder.mkdir()
    if os.geteuid() != 0:
        print("not root: the disk of the server is never full")
        yield
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=700", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        shutil.copytree(folder / "run", folder.with_name("kept"), dirs_exist_ok=True)
        subprocess.run(["umount", "-l", folder], check=True)


@dataclass(frozen=True, slots=True)
class Audit:
    """What the trace says about the tasks of a run; `replayed` is the first difference of its replay ("": none)."""

    accepted: tuple[int, ...]
    lost: tuple[int, ...]
    double: int
    unfinished: tuple[int, ...]
    replayed: str


def audit(lines: Sequence[Mapping[str, Any]], folder: Path) -> Audit:
    """Of the whole trace of a run that has ended."""
    sent, ended, accepted, merged = Counter[int](), set[int](), list[int](), set[int]()
    of = dict[int, str]()
    for line in lines:
        event, commands = line["event"], line["commands"]
        rejected = any(command["type"] == "Reject" for command in commands)
        if event["type"] == "UpdateArrived" and not rejected:
            assert of[event["task"]] == event["client"]
            accepted.append(event["task"])
        if event["type"] in ("UpdateArrived", "TaskFailed"):
            ended.add(event["task"])
        if event["type"] == "ClientLost":
            ended |= {task for task, client in of.items() if client == event["client"]}
        for command in commands:
            if command["type"] == "Dispatch":
                task = command["task"]
                sent[task["id"]] += 1
                of[task["id"]] = task["client"]
            elif command["type"] == "Publish":
                merged |= {*command["updates"]}
            elif command["type"] == "Cancel":
                ended.add(command["task"])
            elif command["type"] == "Stop":
                ended |= sent.keys()
    double = len(accepted) - len({*accepted}) + sum(count > 1 for count in sent.values())
    lost, left = {*accepted} - merged, sent.keys() - ended
    return Audit(tuple(accepted), tuple(sorted(lost)), double, tuple(sorted(left)), replay(folder).difference)


def accuracy(lines: Sequence[Mapping[str, Any]]) -> float:
    """Of the last version."""
    return float(
        next(line["event"]["metrics"]["accuracy"] for line in reversed(lines) if line["event"]["type"] == "ScoresReady")
    )


def recovered(blow: Blow, lines: Sequence[Mapping[str, Any]]) -> bool:
    """Whether an answer was accepted afterwards, of that site, or of any where it hit the server."""
    after = lines[min(blow.after or 0, len(lines)) :]
    arrived = [line["event"]["client"] for line in after if line["event"]["type"] == "UpdateArrived"]
    return blow.place in arrived or (blow.place == "server" and bool(arrived))


def carried_out(
    folder: Path, versions: int, seed: int, counts: Mapping[str, int] | None, seconds: float, sites: int = SITES
) -> Storm:
    """One run, with what befell it; its folder is kept at `kept`."""
    folder.mkdir()
    with disk(folder / "server"):
        run = make(folder, sites, versions, STEPS, seed)
        storm, end = (
            Storm(run, draw_blows(counts, versions, run.names, seed) if counts else []),
            time.monotonic() + seconds,
        )
        with running(run):
            while not run.over() and time.monotonic() < end:
                storm.look()
                time.sleep(0.05)
        if storm.run.processes["server"].returncode:
            print(run.said("server"))
    return storm


def main() -> None:
    """Storm, audit, print."""
    parser = argparse.ArgumentParser(prog="bench.chaos")
    parser.add_argument("--quick", action="store_true", help="one or two kills of each kind, within ten minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="keep the folders here")
    options = parser.parse_args()
    settle()
    hush()
    counts, versions, calm = (QUICK, 80, 1) if options.quick else (FULL, 260, 3)
    with tempfile.TemporaryDirectory(prefix="chaos-") as made:
        place = options.keep or Path(made)
        place.mkdir(exist_ok=True)
        print(json.dumps(stormed(place, versions, options.seed, counts, calm, 480.0 if options.quick else 3600.0)))


def stormed(
    place: Path, versions: int, seed: int, counts: Mapping[str, int], calm: int, seconds: float, sites: int = SITES
) -> dict[str, int]:
    """The figures of one storm, beside `calm` undisturbed runs."""
    began = time.monotonic()
    storm = carried_out(place / "storm", versions, seed, counts, seconds, sites)
    folder, took = place / "storm" / "kept", time.monotonic() - began
    lines = [json.loads(line) for line in (folder / "trace.jsonl").read_bytes().split(b"\n")[:-1]]
    found = audit(lines, folder)
    kills = [blow for blow in storm.fallen if blow.part in counts]
    back = [blow for blow in storm.fallen if recovered(blow, lines)]
    told = json.loads((folder / "manifest.json").read_bytes())
    ended = told["status"] == "finished" and not storm.coming
    print(f"{took:.0f} s; {told['status']}: {told['status_reason']}; {len(found.accepted)} answers accepted")
    print(
        f"fallen: {dict(Counter(blow.part for blow in storm.fallen))}; not recovered: {[b for b in storm.fallen if b not in back]}"
    )
    print(f"replay: {found.replayed or 'the same to the byte'}")
    figures = [accuracy(_calm(place / f"calm{k}", versions, seed)) for k in range(calm)]
    if figures and ended:
        noise = statistics.stdev(figures) if calm > 1 else 0.0
        print(f"accuracy {accuracy(lines):.3f}; undisturbed {', '.join(f'{x:.3f}' for x in figures)}, sd {noise:.3f}")
    return {
        "accepted": len(found.accepted),
        "kills": len(kills),
        "recovered": sum(blow in back for blow in kills),
        "lost": len(found.lost),
        "double_counted": found.double,
        "unfinished": len(found.unfinished) + (not ended) + bool(found.replayed),
    }


def _calm(folder: Path, versions: int, seed: int) -> list[dict[str, Any]]:
    carried_out(folder, versions, seed, None, 900.0)
    return [json.loads(line) for line in (folder / "kept" / "trace.jsonl").read_bytes().split(b"\n")[:-1]]


if __name__ == "__main__":
    main()
