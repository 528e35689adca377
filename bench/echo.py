"""What `bench.deploy` measures with: a ServerApp that times messages, and a worker that gives back what it gets."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from flwr.app import Context
from flwr.serverapp import ServerApp
from flwr.superlink.grid import HttpGrid

from fedloom.deploy.flower.join import SiteSetup, join_deployment
from fedloom.deploy.flower.server_app import run_server_app
from fedloom.deploy.link import Transport
from fedloom.deploy.site.worker_socket import Listener

app = ServerApp()
POLL = 0.05
SERVER = {"flower-superlink": "superlink", "flower.gate": "gate", "flower-superexec": "superexec"}
"""Processes at the server, by a word of their command."""
HERTZ, PAGE = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")


@app.main()  # type: ignore[untyped-decorator, arg-type]
def main(grid: HttpGrid, context: Context) -> None:
    """Measure as `deployment.json` says."""
    run_server_app(grid, context, measure)


def measure(link: Transport, folder: Path) -> str:
    """Times and figures to `figures.json`."""
    told = json.loads((folder / "deployment.json").read_text())
    while len(here := {name: node for node, name in link.nodes().items() if name}) < told["sites"]:
        time.sleep(0.5)
    figures: dict[str, Any] = {"crowd": crowd(link, here, told["seconds"], folder)}
    for name in ("plain", "hasty"):
        figures[name] = {size: trips(link, here[name], size, count, folder) for size, count in told["counts"].items()}
    figures["superlink_mb"] = memory(folder, "superlink")
    (folder / "figures.json").write_text(json.dumps(figures))
    return "measured"


def trips(link: Transport, node: int, megabytes: str, count: int, folder: Path) -> dict[str, float]:
    """Seconds of the median, the shortest and the longest round trip, and CPU seconds of all processes for one."""
    seconds, size = [], int(float(megabytes) * 1e6) or 100
    before = sum(cpu(folder).values())
    for _ in range(count):
        body, begun = os.urandom(size), time.monotonic()
        link.send(node, body, len(body))
        while not (replies := link.collect()):
            time.sleep(POLL)
        seconds.append(time.monotonic() - begun)
        assert replies[0].body == body, replies[0].error
    used = (sum(cpu(folder).values()) - before) / count
    return {"median": median(seconds), "least": min(seconds), "most": max(seconds), "cpu": used}


def crowd(link: Transport, here: Mapping[str, int], seconds: float, folder: Path) -> dict[str, Any]:
    """All sites at once, each with one small message under way: messages a second, and cores in use, by process."""
    begun, before, came, waiting = time.monotonic(), cpu(folder), 0, 0
    for node in here.values():
        link.send(node, os.urandom(100), 100)
        waiting += 1
    while (now := time.monotonic() - begun) < seconds:
        for reply in link.collect():
            came, waiting = came + (reply.body is not None), waiting - 1
            if time.monotonic() < begun + seconds:
                link.send(reply.node, os.urandom(100), 100)
                waiting += 1
        time.sleep(POLL)
    used, told = cpu(folder), {name: memory(folder, name) for name in ("superlink", "gate")}
    told["left"] = free()
    while waiting:  # so that no answer is taken for one of the next measurement
        waiting -= len(link.collect())
        time.sleep(POLL)
    cores = {name: (used[name] - before[name]) / now for name in used}
    return {"sites": len(here), "rate": came / now, "cores": cores, "mb": told}


def cpu(folder: Path) -> dict[str, float]:
    """CPU seconds so far of this process, the server's others, and all sites together: what names the deployment's folder."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    spent = {"serverapp": own.ru_utime + own.ru_stime, **dict.fromkeys((*SERVER.values(), "sites"), 0.0)}
    for stat, words in processes(folder):
        fields = stat.rpartition(")")[2].split()
        spent[part_of(words)] += (int(fields[11]) + int(fields[12])) / HERTZ
    return spent


def part_of(command: str) -> str:
    """Whose process it is: the server's part, or the sites'."""
    return next((part for word, part in SERVER.items() if word in command), "sites")


def memory(folder: Path, name: str) -> float:
    """Megabytes that a process of the server has in memory."""
    [stat] = [stat for stat, words in processes(folder) if part_of(words) == name]
    return int(stat.rpartition(")")[2].split()[21]) * PAGE / 1e6


def free() -> float:
    """Megabytes that the machine has left."""
    [line] = [line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable")]
    return int(line.split()[1]) / 1e3


def processes(folder: Path) -> list[tuple[str, str]]:
    """Of each process of the deployment, `stat` and command line."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_text().replace("\0", " ")
            if str(folder.parent) in words and "bench.deploy" not in words and int(place.name) != os.getpid():
                found.append(((place / "stat").read_text(), words))
        except (OSError, UnicodeDecodeError):
            continue
    return found


def site(server: str, folder: Path, ca: Path, key: Path, idle: float | None) -> None:
    """Take part with a worker that gives back what it gets, until stopped."""
    worker = [sys.executable, "-m", "bench.echo", str(folder / "w.sock")]
    with suppress(KeyboardInterrupt):
        join_deployment(SiteSetup(server, folder, folder / "w.sock", worker, ca, key, idle), partial(print, flush=True))


if __name__ == "__main__":
    if len(sys.argv) == 2:
        Listener(Path(sys.argv[1]), 2**30).serve(lambda body: body, lambda: b"{}", lambda size: b"")
    else:
        address, place, authority, private, pause = sys.argv[1:]
        site(address, Path(place), Path(authority), Path(private), float(pause) if pause != "-" else None)
