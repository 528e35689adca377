"""Events per CPU second through the real server and the real virtual-clock driver, and what an idle client costs.

    python -m bench.simulate [--quick]

One event is one upload that arrives: it is checked, merged with the nine before it, published as a new version (FedFa); the
freed place goes at once to an idle client drawn at random, its task is "trained" (the answer is taken from a store), priced
by device and link models and queued; and the step is written and flushed to a trace file. 100 of the clients are always at
work, however many there are. Smallest adapter: one layer of 1 x 1, rank 1, and an aggregator that takes the newest upload,
so that what is measured is the server and not the algebra. "1k floats": one layer of 64 x 64, rank 8 (1,024 numbers),
averaged with FedIT. "224 layers": as many of that size, the modules of a language model (229,376 numbers), in a tenth of the events.
One thread; CPU seconds per event after 200 events of warming up, runs interleaved, median (minimum - maximum) over runs. Memory
is the growth of the resident set while a million clients join, in a fresh process, by client.

What must not cost more with many clients: an event of 100 at work; one where clients come and go (an hour each on average) and 5 % of
tasks are cut off (its virtual time is short, so that hardly a window opens or closes: those are events of their own, and there are
more of them between two uploads the more clients there are); a round of a tenth of all clients. And one checkpoint of a run with
100,000 clients, written to the disk, with its logs left out. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import ClassVar, Literal

import torch

from bench.client_states import MEGABYTES_BAR, checkpoint_megabytes
from bench.memory import resident
from fedloom.aggregate.fedit import FedIT
from fedloom.aggregate.shared.factor_space import leading_start
from fedloom.core.events import ClientJoined, Command, Event, UpdateArrived
from fedloom.core.limits import Limits
from fedloom.core.lora import Adapter, Factor, lay_flat
from fedloom.core.model_shape import Shape
from fedloom.core.policies import Aggregator, Merge, Observer, Schedule
from fedloom.core.server import Server
from fedloom.core.types import Budget, ClientId, ClientState, Model, Profile, Result, Task, TaskStart
from fedloom.plan.budget import Plan
from fedloom.plan.rank import FixedRank
from fedloom.runs.resume import CheckpointWriter
from fedloom.runs.trace import Trace
from fedloom.schedule.fedfa import FedFa
from fedloom.schedule.rounds import Rounds
from fedloom.simulate.availability import Availability
from fedloom.simulate.client_presence import Presence
from fedloom.simulate.devices import World
from fedloom.simulate.faults import Faults
from fedloom.simulate.simulation import Simulation

PLACES, STORE, MANY, MILLION = 100, 64, 100_000, 1_000_000
EVENTS_BAR, FLOATS_BAR, LAYERS_BAR, RATIO_BAR = 20_000, 10_000, 230, 1.1
DROPOUTS_BAR, ROUNDS_BAR, CHECKPOINT_BAR = 1.5, 2.0, 0.3


@dataclass(frozen=True, slots=True)
class Newest:
    """The model is the newest upload: an aggregator without arithmetic."""

    space: ClassVar[Literal["factor"]] = "factor"
    exempt: ClassVar[Mapping[int, str]] = MappingProxyType({})

    def init(self, start: Adapter) -> Model:
        """The start itself."""
        return Model(start)

    def merge(self, model: Model, merge: Merge) -> Model:
        """The last in task order."""
        return replace(model, adapter=merge.weighted_updates[-1][1].result.adapter)

    def start(self, model: Model, budget: Budget, seed: int) -> TaskStart:
        """The model as it is."""
        return leading_start(model, budget)


@dataclass(frozen=True, slots=True)
class Answering:
    """A trainer that answers from a store, in turn: no number is what was sent, and every answer is an adapter of its own."""

    answers: Sequence[Adapter]

    def train(self, work: Sequence[tuple[Task, ClientState]]) -> list[tuple[Result, ClientState]]:
        """At once."""
        return [(Result(self._next(task.id), 10, 100, 1), local) for task, local in work]

    def _next(self, number: int) -> Adapter:
        return replace(self.answers[number % len(self.answers)])


@dataclass(slots=True)
class Meter:
    """An observer around another: CPU and wall seconds from the end of the warming up to the last arrival."""

    inner: Observer
    first: int
    last: int
    arrivals: int = 0
    times: list[tuple[float, float]] = field(default_factory=list)

    def __call__(self, now: float, event: Event, commands: list[Command]) -> None:
        """Pass it on, count it."""
        self.inner(now, event, commands)
        if isinstance(event, UpdateArrived):
            self.arrivals += 1
            if self.arrivals in (self.first, self.last):
                self.times.append((time.process_time(), time.perf_counter()))


@dataclass(frozen=True, slots=True)
class Case:
    """A federation, the size of its adapter, its aggregator and schedule; without a trace nothing observes.

    Fields:
        warm: uploads before the measurement.
        least: uploads that are measured, at least.
        per_version: uploads that make a version.
    """

    name: str
    clients: int = 1000
    width: int = 1
    rank: int = 1
    layers: int = 1
    warm: int = 200
    least: int = 0
    per_version: int = 1
    how: Aggregator = field(default_factory=Newest)
    schedule: Schedule = field(default_factory=lambda: FedFa(max_in_flight=PLACES))
    presence: Callable[[], Presence] = Presence
    traced: bool = True


SMALLEST = Case("smallest adapter, 1,000 clients")
CROWD = Case("smallest adapter, 100,000 clients", clients=MANY)
FLOATS = Case("1k floats with FedIT, 1,000 clients", width=64, rank=8, how=FedIT())
UNSEEN = Case("smallest adapter, without a trace", traced=False)
LAYERS = Case("224 layers of 64 x 64 with FedIT", width=64, rank=8, layers=224, warm=20, how=FedIT())


def unreliable() -> Presence:
    """Clients that come and go, and vanish in one task of twenty."""
    return Presence(Availability().of((), 0), Faults(dropout=0.05), 0)


DROPOUTS = (
    Case("windows and drop-outs, 1,000", presence=unreliable),
    Case("windows and drop-outs, 50,000", clients=50_000, presence=unreliable),
)
ROUNDS = (
    Case("rounds of 100 of 1,000", schedule=Rounds(100), per_version=100),
    Case("rounds of 10,000 of 100,000", MANY, warm=10_000, least=10_000, schedule=Rounds(10_000), per_version=10_000),
)


def make_adapters(case: Case, count: int) -> list[Adapter]:
    """Random ones, in one buffer as a trainer hands them over."""
    draws, sides = torch.Generator().manual_seed(0), ((case.rank, case.width), (case.width, case.rank))
    names = [f"layer.{k}" for k in range(case.layers)]
    return [
        lay_flat(
            Adapter({name: Factor(*(0.1 * torch.randn(shape, generator=draws) for shape in sides)) for name in names})
        )
        for _ in range(count)
    ]


def make_server(case: Case, versions: int) -> Server:
    """With a random adapter, never scored."""
    shape = Shape(1000, 0, 1, case.width, modules=((case.width, case.width),) * case.layers, dense=0)
    # of ten thousand random answers in one round, a hundred in a row may have moved too far
    limits = Limits(versions=versions, failures=10**9, evaluate_every=2 * versions)
    model = case.how.init(make_adapters(case, 1)[0])
    return Server(model, case.how, case.schedule, Plan(FixedRank(case.rank), 1), shape=shape, limits=limits)


def make_profiles(clients: int) -> dict[ClientId, Profile]:
    """Phones, laptops and workstations."""
    return {profile.client: profile for profile in World().profiles({f"c{k:07d}": 10 for k in range(clients)}, 0)}


def unseen(now: float, event: Event, commands: list[Command]) -> None:
    """Nobody looks."""


def make_simulation(case: Case, uploads: int, observe: Observer) -> Simulation:
    """A run of so many uploads."""
    server, profiles = make_server(case, uploads // case.per_version), make_profiles(case.clients)
    trainer, presence = Answering(make_adapters(case, STORE)), case.presence()
    return Simulation(server, trainer, World(), profiles, lambda model: {}, observe, presence=presence)


def checkpoint_seconds(repeats: int = 3) -> float:
    """CPU seconds in which a checkpoint of 100,000 clients is written; prints them."""
    simulation = make_simulation(CROWD, 2 * PLACES, unseen)
    simulation.run()
    owners = (*simulation.server.parts_to_save(), simulation, simulation.client_states, simulation.presence)
    taken, size = list[float](), 0
    with tempfile.TemporaryDirectory() as folder:
        writer = CheckpointWriter(Path(folder), 0.0, owners, profiles=simulation.profiles)
        for _ in range(repeats):
            begun = time.process_time()
            size = writer.write()
            taken.append(time.process_time() - begun)
    print(f"\ncheckpoint of {MANY:,} clients: {spread(taken, 1.0)} CPU s, {size / 1e6:.2f} MB")
    return median(taken)


def per_event(case: Case, events: int, folder: Path) -> tuple[float, float]:
    """CPU and wall seconds of one event."""
    events = max(events, case.least)
    last = case.warm + events
    with (folder / "trace.jsonl").open("w", encoding="utf-8") as file:
        meter = Meter(Trace(file) if case.traced else unseen, case.warm, last)
        make_simulation(case, last, meter).run()
    (cpu, wall), (cpu_end, wall_end) = meter.times
    return (cpu_end - cpu) / events, (wall_end - wall) / events


def compare(cases: Iterable[Case], events: int, repeats: int) -> dict[str, float]:
    """The median CPU seconds of an event by case, all cases in turn; prints the table."""
    cases = list(cases)
    samples: dict[str, list[tuple[float, float]]] = {case.name: [] for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):
            for case in cases:
                samples[case.name].append(per_event(case, events, Path(folder)))
                gc.collect()
    print(f"{'one event':36s} {'CPU us':>30s} {'wall us':>30s}   events per CPU s")
    for name, times in samples.items():
        cpu, wall = zip(*times, strict=True)
        print(f"{name:36s} {spread(cpu, 1e6):>30s} {spread(wall, 1e6):>30s}   {1 / median(cpu):,.0f}")
    return {name: median(cpu for cpu, _ in times) for name, times in samples.items()}


def register() -> None:
    """In a process of its own: a million clients made, then joined; bytes a client of each, and CPU seconds of the second."""
    server, before = make_server(SMALLEST, 1), resident()
    profiles, made = make_profiles(MILLION), resident()
    begun = time.process_time()
    for profile in profiles.values():
        server.handle(0.0, ClientJoined(profile))
    took, joined = time.process_time() - begun, resident()
    assert len(server.state.idle) == MILLION
    print(json.dumps([(joined - made) / MILLION, (made - before) / MILLION, took]))


def registered() -> tuple[float, float, float]:
    """What `register` says."""
    command = [sys.executable, "-m", "bench.simulate", "--register"]
    done = subprocess.run(command, env=os.environ, stdout=subprocess.PIPE, text=True, check=True)
    server, profile, seconds = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{MILLION:,} clients join: {seconds:.2f} CPU s, {server:.0f} bytes a client in the server's tables")
    print(f"(and {profile:.0f} for the profile itself, its name, and the driver's table)")
    return server, profile, seconds


def spread(values: Sequence[float], unit: float) -> str:
    """Median (minimum - maximum)."""
    low, high = min(values) * unit, max(values) * unit
    return f"{median(values) * unit:.1f} ({low:.1f} - {high:.1f}, n={len(values)})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="bench.simulate")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs, within two minutes")
    parser.add_argument("--register", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.register:
        return register()
    events, repeats = (2000, 3) if options.quick else (10_000, 9)
    cost = compare((SMALLEST, CROWD, FLOATS, UNSEEN, *DROPOUTS, *ROUNDS), events, repeats)
    cost |= compare((LAYERS,), events // 10, repeats)
    checkpoint, megabytes = checkpoint_seconds(), checkpoint_megabytes()
    server, profile, seconds = registered()
    rates = {key: 1 / cost[case.name] for key, case in (("smallest", SMALLEST), ("floats", FLOATS), ("layers", LAYERS))}
    ratio, dropouts, rounds = (cost[many.name] / cost[few.name] for few, many in ((SMALLEST, CROWD), DROPOUTS, ROUNDS))
    print()
    say("events per CPU second, smallest adapter", rates["smallest"], EVENTS_BAR, rates["smallest"] >= EVENTS_BAR)
    say("events per CPU second, 1k floats", rates["floats"], FLOATS_BAR, rates["floats"] >= FLOATS_BAR)
    say("events per CPU second, 224 layers", rates["layers"], LAYERS_BAR, rates["layers"] >= LAYERS_BAR)
    say("cost of an event, 100,000 to 1,000 clients", ratio, RATIO_BAR, ratio <= RATIO_BAR)
    say("the same with windows and drop-outs, 50,000 to 1,000", dropouts, DROPOUTS_BAR, dropouts <= DROPOUTS_BAR)
    say("the same in rounds of a tenth, 100,000 to 1,000", rounds, ROUNDS_BAR, rounds <= ROUNDS_BAR)
    say("CPU seconds of a checkpoint, 100,000 clients", checkpoint, CHECKPOINT_BAR, checkpoint <= CHECKPOINT_BAR)
    say("MB of a checkpoint, 1,000 clients that answered", megabytes, MEGABYTES_BAR, megabytes <= MEGABYTES_BAR)
    figures = {
        "server_events_per_second": rates["smallest"],
        "server_events_per_second_1k_floats": rates["floats"],
        "events_per_second_224_layers": rates["layers"],
        "cost_ratio_100k_vs_1k_clients": ratio,
        "cost_ratio_50k_vs_1k_dropouts": dropouts,
        "cost_ratio_rounds_100k_vs_1k": rounds,
        "checkpoint_seconds_100k_clients": checkpoint,
        "checkpoint_mb_1000_clients": megabytes,
        "server_events_per_second_without_trace": 1 / cost[UNSEEN.name],
        "bytes_per_idle_client": server,
        "bytes_per_profile": profile,
        "register_1m_cpu_seconds": seconds,
    }
    print(json.dumps(figures))


def say(what: str, value: float, bar: float, met: bool) -> None:
    """A figure beside its bar."""
    print(f"{what}: {value:,.4g} (bar {bar:,}: {'met' if met else 'MISSED'})")


if __name__ == "__main__":
    main()
