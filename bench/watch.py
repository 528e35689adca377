"""The live page in a real browser: how soon a new version is seen, and what the server of the page costs.

    python -m bench.watch [--quick]

A real server makes a run of 200 clients and 5,000 events (FedFa, a version an answer, every tenth scored; the answers come from a
store). All but the last of its lines stand in a run folder when the page is opened in headless Chromium; the others are written
while it is open, ten events a second. The delay of a version is from the write of its line to the change of the page, both by the
clock of this machine; the CPU is that of the process that serves, over the same seconds. Then the same at a hundred events a second.
Without `--quick` also a log of a million tasks of 100,000 clients: CPU seconds until a page has read it, and how far memory rose.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from statistics import median

import psutil

from bench.memory import peak
from bench.report import write_folder
from bench.simulate import STORE, Answering, Case, make_adapters, make_profiles
from fedloom.core.events import Command, Event
from fedloom.core.files import lock
from fedloom.core.limits import Limits
from fedloom.core.model_shape import Shape
from fedloom.core.policies import Observer
from fedloom.core.schema import jsonable
from fedloom.core.server import Server
from fedloom.core.types import Model
from fedloom.plan.budget import Plan
from fedloom.plan.rank import FixedRank
from fedloom.report.live.folder_feed import FolderFeed
from fedloom.report.live.server import page_process
from fedloom.runs.metrics import Metrics
from fedloom.runs.slot_usage import SlotUsage
from fedloom.runs.trace import Trace
from fedloom.simulate.devices import World
from fedloom.simulate.simulation import Simulation

CLIENTS, EVENTS, SCORED = 200, 5000, 10
RATE, FAST = 10, 100
DELAY_BAR, CPU_BAR = 1.0, 0.05
PAGE_SERVER = "fedloom.report.live.server"
CHROMIUM = "/usr/bin/chromium"
SEEN = """() => {
  window.seen = [];
  const look = () => {
    const found = /(?:version|round) ([\\d,]+)/.exec(document.getElementById("progress-text").textContent);
    if (found) window.seen.push([Number(found[1].replaceAll(",", "")), Date.now() / 1000]);
  };
  new MutationObserver(look).observe(document.getElementById("progress-text"), {childList: true, characterData: true, subtree: true});
}"""


def write_source(folder: Path) -> list[tuple[list[str], list[str]]]:
    """A run of a real server, as the lines of its trace, each with the lines of its metrics; its manifest goes into the folder."""
    case = Case("live", clients=CLIENTS, width=8, rank=2)
    adapter, profiles = make_adapters(case, 1)[0], make_profiles(CLIENTS)
    shape = Shape(1000, 0, 1, case.width, modules=((case.width, case.width),), dense=0)
    limits = Limits(versions=EVENTS - CLIENTS, failures=10**9, evaluate_every=SCORED)
    server = Server(case.how.init(adapter), case.how, case.schedule, Plan(FixedRank(2), 1), shape=shape, limits=limits)
    steps: list[tuple[list[str], list[str]]] = []
    with (folder / "t").open("w+") as trace, (folder / "m").open("w+") as metrics:
        observers: list[Observer] = [Trace(trace), Metrics(metrics, SlotUsage(server.max_in_flight), majority=0.3)]

        def observe(now: float, event: Event, commands: list[Command]) -> None:
            begins = trace.tell(), metrics.tell()
            for observer in observers:
                observer(now, event, commands)
            trace.seek(begins[0])
            metrics.seek(begins[1])
            steps.append((trace.readlines(), metrics.readlines()))

        def score(model: Model) -> Mapping[str, float]:
            return {"accuracy": 0.9 - 0.5 / (1 + len(steps) / 800), "loss": 1 / (1 + len(steps) / 900), "examples": 500}

        Simulation(server, Answering(make_adapters(case, STORE)), World(), profiles, score, observe).run()
    about = {"name": "live", "status": "running", "seed": 0, "model": {"labels": 5}, "baselines": {"majority": 0.3}}
    clients = {name: jsonable(profile) for name, profile in profiles.items()}
    settings = {"limits": jsonable(limits), "aggregator": {"type": "HLoRA"}, "schedule": jsonable(case.schedule)}
    (folder / "manifest.json").write_text(json.dumps(about | {"clients": clients, "run": settings}))
    return steps


def watch(folder: Path, steps: list[tuple[list[str], list[str]]], rate: int, seconds: int) -> dict[str, float]:
    """Write the last steps at this rate while a browser looks; prints and returns the figures."""
    from playwright.sync_api import sync_playwright

    live = min(rate * seconds, len(steps) // 2)
    with (folder / "trace.jsonl").open("w") as trace, (folder / "metrics.jsonl").open("w") as metrics:
        assert lock(trace)  # a run that goes on
        for lines, others in steps[:-live]:
            trace.writelines(lines)
            metrics.writelines(others)
        trace.flush()
        metrics.flush()
        with page_process(folder) as url, sync_playwright() as driver:
            server = next(one for one in psutil.Process().children() if PAGE_SERVER in one.cmdline())
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page()
            page.goto(url)
            page.locator("#clients tbody tr").nth(CLIENTS - 1).wait_for()
            page.locator("#waits", has_text="Reading").wait_for(state="hidden")
            page.evaluate(SEEN)
            processes = [one for one in psutil.Process().children(recursive=True) if "chromium" in one.name()]
            written, before = dict[int, float](), (cpu(server), sum(map(cpu, processes)))
            begin = time.time()
            for k, (lines, others) in enumerate(steps[-live:]):
                time.sleep(max(0.0, begin + k / rate - time.time()))
                trace.writelines(lines)
                trace.flush()
                metrics.writelines(others)
                metrics.flush()
                written |= {json.loads(line)["version"]: time.time() for line in others if '"kind":"version"' in line}
            took = time.time() - begin
            used = (cpu(server) - before[0]) / took, (sum(map(cpu, processes)) - before[1]) / took
            page.wait_for_timeout(1500)
            seen, memory = page.evaluate("() => window.seen"), server.memory_info().rss / 2**20
            size = len(page.content()) / 1e3
            browser.close()
    delays = [min(at for version, at in seen if version >= number) - at for number, at in written.items()]
    figures = {"delay_max_seconds": max(delays), "delay_median_seconds": median(delays), "server_cpu_share": used[0]}
    figures |= {"browser_cpu_share": used[1], "server_mib": memory, "document_kb": size}
    print(
        f"{rate:4d} events a second, {len(written)} versions: seen after {median(delays):.2f} s, at most {max(delays):.2f} s; "
        f"server {100 * used[0]:.1f} % of a core, {memory:.0f} MiB; browser {100 * used[1]:.0f} %; document {size:.0f} kB",
        flush=True,
    )
    return figures


def cpu(process: psutil.Process) -> float:
    """CPU seconds of a process so far."""
    with suppress(psutil.NoSuchProcess):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0


def million(folder: Path) -> dict[str, float]:
    """CPU seconds until a page has read the metrics of a million tasks of 100,000 clients, and how far memory rose."""
    write_folder(folder, 1_000_000)
    feed, begin = FolderFeed(folder), time.process_time()

    def read() -> None:
        while feed.refresh():
            pass

    before, highest = peak(read)
    used, size = time.process_time() - begin, len(feed.message(0)) / 1e3
    print(
        f"a million tasks: read in {used:.1f} CPU s, {(highest - before) / 2**20:.0f} MiB, first message {size:.0f} kB"
    )
    return {"million_cpu_seconds": used, "million_mib": (highest - before) / 2**20, "million_message_kb": size}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="bench.watch", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="ten seconds each, without the million tasks")
    quick = parser.parse_args().quick
    if not os.path.exists(CHROMIUM):
        raise SystemExit(f"there is no {CHROMIUM}")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        folder.mkdir()
        steps = write_source(folder)
        figures = watch(folder, steps, RATE, 10 if quick else 30)
        fast = watch(folder, steps, FAST, 10 if quick else 20)
        figures |= {f"fast_{name}": value for name, value in fast.items()}
        if not quick:
            figures |= million(Path(place) / "million")
    met = figures["delay_max_seconds"] <= DELAY_BAR and figures["server_cpu_share"] <= CPU_BAR
    print(f"a version within {DELAY_BAR:g} s, under {100 * CPU_BAR:g} % of a core: {'met' if met else 'MISSED'}")
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
