"""Several hosts on one machine, as network namespaces: a server and four sites, one five times slower, one behind a bad line.

    python -m bench.hosts [--quick]        (as root: `ip netns` and `tc` are needed)

Each host has its own network stack and a cable to one bridge. The slow site takes five times as many steps a task, which is as long
as a machine five times slower takes: the limits of the others cap the run's plan. The bad line delays each packet by 60 to 100 ms
(there and back) and loses 2 % (netem); where the kernel has no netem it carries 192 kbit/s, and what would wait longer than 30 ms is
dropped (tbf). In the middle of the run the cable of another site is pulled for ten seconds. FedFa, a window of four.

A site is idle from the end of one task to the start of the next, as its executor's log tells. First the run is carried out by one
site alone, on a good line: its median gap is what Flower and TLS take of themselves (`fixed_seconds`). What the fast site on a good
line is idle beyond it, as a share of its time, is the price of the others (`idle_beyond`; the bar is 0.1). The staleness of
the answers is told from the trace, which must replay to the byte. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedloom.runs.replay import replay
from tests.support.federation import Federation, make
from tests.support.tiny_models import hush, settle

SITES, TIMES, STEPS = 4, 5, 300
"""A task of the fast sites is some seconds long: still short for a real one, against which what Flower takes is less."""
SLOW, POOR, PULLED = 0, 1, 3
CUT = 10.0
"""Seconds for which a cable is pulled."""
BAR = 0.1
NET = "10.213.77"


def command(*words: str) -> None:
    """Carry it out; raises CalledProcessError with what it said."""
    subprocess.run(words, check=True, capture_output=True, text=True)


def able() -> str:
    """Why hosts cannot be made here, "" if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with hosts(1) as names:
            slow_down(names[0])
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no network namespaces here: {getattr(error, 'stderr', '') or error}"
    return ""


@contextmanager
def hosts(count: int) -> Iterator[list[str]]:
    """So many hosts at one bridge; the n-th has the address NET.(n + 10). All is gone afterwards."""
    mark = f"fl{os.getpid() % 10000}"
    bridge, names = f"{mark}b", [f"{mark}h{number}" for number in range(count)]
    try:
        command("ip", "link", "add", bridge, "type", "bridge")
        command("ip", "link", "set", bridge, "up")
        for number, name in enumerate(names):
            command("ip", "netns", "add", name)
            command("ip", "link", "add", f"{name}v", "type", "veth", "peer", "name", "eth0", "netns", name)
            command("ip", "link", "set", f"{name}v", "master", bridge, "up")
            command("ip", "-n", name, "addr", "add", f"{NET}.{number + 10}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                command("ip", "-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
            subprocess.run(["ip", "link", "del", f"{name}v"], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True, check=False)


def slow_down(host: str) -> str:
    """Make the line of this host a bad one, both ways; returns the kernel's word for how."""
    ways = (
        ["netem", "delay", "40ms", "10ms", "loss", "1%"],
        ["tbf", "rate", "192kbit", "burst", "1600", "latency", "30ms"],
    )
    for way in ways:
        try:
            command("tc", "-n", host, "qdisc", "add", "dev", "eth0", "root", *way)
            command("tc", "qdisc", "add", "dev", f"{host}v", "root", *way)
        except subprocess.CalledProcessError:
            if way is ways[-1]:
                raise
            continue
        return way[0]
    raise AssertionError


def dropped(host: str) -> int:
    """Packets that its bad line has lost."""
    shown = [
        subprocess.run(["tc", *words, "-s", "qdisc", "show", "dev", device], capture_output=True, text=True, check=True)
        for words, device in ((["-n", host], "eth0"), ([], f"{host}v"))
    ]
    return sum(int(count) for one in shown for count in re.findall(r"dropped (\d+)", one.stdout))


def pull(host: str, out: bool) -> None:
    """Pull the cable of this host out, or put it back."""
    command("ip", "link", "set", f"{host}v", "down" if out else "up")


def placed(folder: Path, names: Sequence[str], sites: int, versions: int) -> Federation:
    """A federation with the server on the first host and each site on the next; all but the slow one do a fifth of the steps."""
    folder.mkdir()
    run = make(folder, sites, versions, TIMES * STEPS, host=f"{NET}.10")
    run.inside = {
        place: ("ip", "netns", "exec", host) for place, host in zip(["server", *run.names], names, strict=False)
    }
    for name in run.names[1:] if sites > 1 else run.names:
        file = folder / "sites" / name / "site.toml"
        file.write_text(file.read_text() + f"\n[limits]\nsteps = {STEPS}\n")
    return run


def carried_out(run: Federation, seconds: float, look: Callable[[int], None]) -> None:
    """The whole run. Raises TimeoutError where it does not end."""
    end = time.monotonic() + seconds
    try:
        run.serve()
        for name in run.names:
            run.join(name)
        while not run.over():
            look(run.version())
            if time.monotonic() > end:
                raise TimeoutError(f"no end after {seconds:.0f} s:\n{run.said('server')}")
            time.sleep(0.2)
    finally:
        run.close()


@dataclass(frozen=True, slots=True)
class Work:
    """The tasks that a site did: when each began and ended, in seconds of the machine's clock."""

    times: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, run: Federation, name: str) -> Work:
        """From the log of the site's executor; what took less than a tenth of a second was no training."""
        log = run.folder / "sites" / name / "state" / "logs" / "executor.log"
        told = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
        done = [one for one in told if one["event"] == "answered" and one["seconds"] > 0.1 and not one["error"]]
        return cls(tuple((one["time"] - one["seconds"], one["time"]) for one in done[1:]))  # the first loaded the model

    @property
    def gaps(self) -> list[float]:
        """Seconds between two tasks."""
        return [after[0] - before[1] for before, after in zip(self.times, self.times[1:], strict=False)]

    @property
    def seconds(self) -> float:
        """From the first to the last."""
        return self.times[-1][1] - self.times[0][0]

    def idle(self, fixed: float = 0.0) -> float:
        """Share of its time in which it had nothing to do, of each gap only what is above `fixed`."""
        return sum(max(0.0, gap - fixed) for gap in self.gaps) / self.seconds


def staleness(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Of each client's accepted answers: versions made since its task was cut."""
    version, cut, found = 0, dict[int, int](), dict[str, list[int]]()
    for line in lines:
        event, commands = line["event"], line["commands"]
        if event["type"] == "UpdateArrived" and not any(one["type"] == "Reject" for one in commands):
            found.setdefault(event["client"], []).append(version - cut[event["task"]])
        for one in commands:
            if one["type"] == "Publish":
                version = one["version"]
            elif one["type"] == "Dispatch":
                cut[one["task"]["id"]] = one["task"]["version"]
    return found


def measured(folder: Path, alone: int, versions: int) -> dict[str, Any]:
    """Both runs; the figures."""
    with hosts(SITES + 1) as names:
        one = placed(folder / "alone", names, 1, alone)
        carried_out(one, 300.0, lambda version: None)
        fixed = statistics.median(Work.of(one, one.names[0]).gaps)
        print(f"one site alone: {fixed:.2f} s from the end of a task to the start of the next", flush=True)
        way = slow_down(names[1 + POOR])
        run, pulled = placed(folder / "all", names, SITES, versions), list[float]()

        def look(version: int) -> None:
            if version >= versions // 2 and not pulled:
                pulled.append(time.time())
                pull(names[1 + PULLED], True)
            if len(pulled) == 1 and time.time() > pulled[0] + CUT:
                pulled.append(time.time())
                pull(names[1 + PULLED], False)

        carried_out(run, 900.0, look)
        print(f"the bad line: {way}, {dropped(names[1 + POOR])} packets lost")
        lines, kinds = run.lines(), {SLOW: "slow", POOR: "bad line", PULLED: "pulled"}
        stale, figures = staleness(lines), dict[str, Work]()
        for number, name in enumerate(run.names):
            figures[name] = work = Work.of(run, name)
            seconds = statistics.median(end - begin for begin, end in work.times)
            print(
                f"{name} {kinds.get(number, ''):9s}{len(stale.get(name, [])):4d} answers, {seconds:5.2f} s a task, gap "
                f"{statistics.median(work.gaps):5.2f} s, idle {work.idle():.1%}, beyond Flower {work.idle(fixed):.1%}, "
                f"staleness {statistics.mean(stale[name]):.2f} (most {max(stale[name])})"
            )
        difference = replay(run.server / "run").difference
        print(f"replay: {difference or 'the same to the byte, so the same staleness'}")
        good = [figures[name] for number, name in enumerate(run.names) if number not in kinds]
        took = [statistics.median(end - begin for begin, end in figures[run.names[n]].times) for n in (SLOW, 2)]
        every = [value for values in stale.values() for value in values]
        return {
            "sites": SITES,
            "accepted": len(every),
            "slower": round(took[0] / took[1], 2),
            "fixed_seconds": round(fixed, 3),
            "idle": round(max(work.idle() for work in good), 4),
            "idle_beyond": round(max(work.idle(fixed) for work in good), 4),
            "mean_staleness": round(statistics.mean(every), 3),
            "replayed": not difference,
        }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="bench.hosts")
    parser.add_argument("--quick", action="store_true", help="fewer answers, about five minutes")
    options = parser.parse_args()
    settle()
    hush()
    if why := able():
        raise SystemExit(why)
    with tempfile.TemporaryDirectory(prefix="hosts-") as folder:
        figures = measured(Path(folder), *((10, 60) if options.quick else (30, 200)))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
