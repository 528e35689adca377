"""Whatever is kept grows with the clients and never with the events: a server that runs for a year must not fill its memory."""

from __future__ import annotations

import dataclasses
import gc
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from fedloom.core.events import Command, Event
from fedloom.core.limits import Limits
from fedloom.core.policies import Schedule
from fedloom.core.server import Server
from fedloom.core.types import ClientState, Profile, Result, Task
from fedloom.runs.metrics import Metrics
from fedloom.runs.slot_usage import SlotUsage
from fedloom.runs.trace import Trace
from fedloom.schedule.fedfa import FedFa
from fedloom.schedule.rounds import Rounds
from fedloom.simulate.devices import World
from fedloom.simulate.simulation import Simulation
from tests.support import toys
from tests.support.storms import one_in

CLIENTS, VERSIONS = 12, 160
PROFILES = toys.profiles(CLIENTS) | {"c0": Profile("c0", 10, flops=1e-3)}
"""One is so slow that a schedule that can do without it never hears of it."""
SCHEDULES = [*toys.schedules(), FedFa(max_in_flight=5), FedFa(window=1, max_in_flight=CLIENTS)]


class Sink(io.StringIO):
    """A file that keeps nothing."""

    def write(self, text: str) -> int:
        """Gone."""
        return len(text)


@dataclass
class Unreliable:
    """A trainer: one answer in seven is refused."""

    def train(self, work: Sequence[tuple[Task, ClientState]]) -> list[tuple[Result, ClientState]]:
        """What was sent, or half of what it takes."""
        return [
            (toys.make_result(task.start.train, examples=0 if task.id % 7 == 0 else 10), local) for task, local in work
        ]


def sizes(*owners: object) -> dict[str, int]:
    """The length of every table in these, by its name."""
    found = {}
    for owner in owners:
        for one in dataclasses.fields(owner):  # type: ignore[arg-type]
            table = getattr(owner, one.name)
            if hasattr(table, "__len__") and not isinstance(table, str):
                found[f"{type(owner).__name__}.{one.name}"] = len(table)
    return found


@dataclass
class Watch:
    """An observer: the largest size of every table in each half of a run."""

    server: Server
    metrics: Metrics = field(default_factory=lambda: Metrics(Sink(), SlotUsage(CLIENTS)))
    trace: Trace = field(default_factory=lambda: Trace(Sink()))
    simulation: Simulation | None = None
    halves: tuple[dict[str, int], dict[str, int]] = field(default_factory=lambda: ({}, {}))

    def __call__(self, now: float, event: Event, commands: list[Command]) -> None:
        """Look after each step."""
        self.metrics(now, event, commands)
        self.trace(now, event, commands)
        half = self.halves[self.server.state.version * 2 >= VERSIONS]
        for name, size in sizes(
            self.server.state, self.simulation, self.metrics, self.metrics.slots, self.metrics.observation
        ).items():
            half[name] = max(size, half.get(name, 0))


@pytest.mark.parametrize("schedule", one_in(3, SCHEDULES), ids=toys.called)
def test_no_table_grows_with_the_events(schedule: Schedule) -> None:
    server = toys.server(schedule, limits=Limits(versions=VERSIONS, evaluate_every=50))
    watch = Watch(server)
    watch.simulation = Simulation(server, Unreliable(), World(), PROFILES, lambda model: {"loss": 0.5}, watch)
    watch.simulation.run()
    first, second = watch.halves
    assert {
        "State.idle",
        "State.busy",
        "State.arrived",
        "Simulation.heap",
        "Metrics.sent",
        "RunObservation.sent",
        "SlotUsage.idle",
    } <= first.keys()
    assert {name: size for name, size in second.items() if size > max(first[name], CLIENTS)} == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule", one_in(2, [FedFa(max_in_flight=5), Rounds(cohort_size=4, over_selection=1.5)]), ids=toys.called
)
def test_no_object_outlives_its_use(schedule: Schedule) -> None:
    """Also what no table of ours holds: objects that the garbage collector knows, halfway and towards the end."""
    counts, moments = list[int](), (VERSIONS // 2, VERSIONS - 10, -1)

    def observe(now: float, event: Event, commands: list[Command]) -> None:
        if server.state.version == moments[len(counts)]:
            gc.collect()
            counts.append(len(gc.get_objects()))

    server = toys.server(schedule, limits=Limits(versions=VERSIONS, evaluate_every=50))
    Simulation(server, Unreliable(), World(), PROFILES, lambda model: {}, observe).run()
    assert len(counts) == 2
    assert counts[1] - counts[0] < VERSIONS // 4
