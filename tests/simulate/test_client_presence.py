"""Clients that come and go, vanish, fail and answer too late: through the real server, with every schedule of the folder."""

from __future__ import annotations

import heapq
import io
import math
import pickle
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.errors import Refused
from fedloom.core.events import (
    Cancel,
    ClientJoined,
    ClientLost,
    Dispatch,
    Publish,
    Reject,
    Stop,
    TaskFailed,
    UpdateArrived,
)
from fedloom.core.limits import Limits
from fedloom.core.policies import Schedule
from fedloom.core.types import ClientState, Profile, Result, Task
from fedloom.runs.metrics import Metrics
from fedloom.runs.slot_usage import SlotUsage
from fedloom.schedule.fedbuff import FedBuff
from fedloom.schedule.rounds import Rounds
from fedloom.simulate.availability import Availability, Stays, Traced, cycle
from fedloom.simulate.client_presence import AvailabilityChanged, Presence
from fedloom.simulate.delays import Delays, ExponentialDelays
from fedloom.simulate.devices import Devices
from fedloom.simulate.faults import Faults, Vanished
from fedloom.simulate.simulation import Simulation
from tests.support import toys
from tests.support.simulated_runs import Log, simulation
from tests.support.storms import tries
from tests.support.toys import Null

SCHEDULES = toys.schedules()
START = toys.adapter(2)
ALWAYS = (math.inf, 0.0)
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=toys.called)
EVERYTHING = Faults(dropout=0.15, dropout_per_second=0.02, fail=0.1, back_after=3.0, notice=1.0, late=0.5)
COMING_AND_GOING = Availability(online=12.0, offline=4.0)


@dataclass
class Ledger(Log):
    """A log with a book of its own: every task ends once, and the server never believes what cannot be."""

    open: dict[int, str] = field(default_factory=dict)
    ended: Counter[str] = field(default_factory=Counter)
    joined: set[str] = field(default_factory=set)

    def __call__(self, now: float, event: Any, commands: list[Any]) -> None:
        """An observer."""
        super().__call__(now, event, commands)
        refused = {command.task for command in commands if isinstance(command, Reject)}
        match event:
            case ClientJoined(profile):
                self.joined.add(profile.client)
            case ClientLost(client):
                assert client in self.joined
                self.joined.discard(client)
                self.end("lost", {n for n, c in self.open.items() if c == client})
            case UpdateArrived(_, number, _) | TaskFailed(_, number, _):
                assert (number in refused) == (number not in self.open)
                kind = "late" if number in refused else type(event).__name__
                self.end(kind, {number})
        for command in commands:
            match command:
                case Dispatch(task):
                    assert task.client in self.joined
                    assert task.client not in self.open.values()
                    self.open[task.id] = task.client
                case Cancel(number, _):
                    self.end("cancelled", {number})

    def end(self, how: str, numbers: set[int]) -> None:
        for number in numbers:
            self.ended[how] += 1
            self.open.pop(number, None)


def storm(
    schedule: Schedule | None = None,
    faults: Faults | None = EVERYTHING,
    stays: Stays | None = None,
    world: Devices | None = None,
    limits: Limits | None = None,
    clients: int = 8,
    seed: int = 0,
    trainer: Any = None,
) -> tuple[Ledger, Simulation]:
    log = Ledger()
    server = toys.server(schedule, limits=limits or Limits(versions=15), seed=seed, start=toys.fresh(2))
    presence = Presence(stays, faults, seed)
    profiles = {f"c{k}": Profile(f"c{k}", 10) for k in range(clients)}
    given: dict[str, Any] = {"profiles": profiles, "devices": world or Delays(), "presence": presence, "seed": seed}
    one = simulation(server, log, trainer or Null(), **given)
    one.run()
    return log, one


def stops(log: Ledger) -> list[str]:
    return [command.reason for command in log.all(Stop)]


@every_schedule
@pytest.mark.parametrize("seed", range(2))
def test_a_run_with_faults_ends_at_its_versions_and_every_task_once(schedule: Schedule, seed: int) -> None:
    log, one = storm(schedule, stays=COMING_AND_GOING.of((), seed), seed=seed)
    assert stops(log) == ["15 versions made"]
    assert not log.open
    assert one.server.state.version == 15
    one.drain()  # what was dropped leaves the heap
    waiting = {what.task for _, _, what in one.heap if isinstance(what, UpdateArrived)}
    assert set(one.in_flight) == waiting
    assert [now for now, _, _ in log.steps] == sorted(now for now, _, _ in log.steps)


@pytest.mark.parametrize("schedule", [FedBuff(2, 6, max_staleness=3), Rounds(3, over_selection=2.0)], ids=toys.called)
@pytest.mark.parametrize("seed", range(2))
def test_dropping_a_task_is_as_if_its_entries_had_left_the_heap_at_once(schedule: Schedule, seed: int) -> None:
    class Eager(Simulation):
        def _take_tasks(self, numbers: Iterable[int]) -> Any:
            taken = super()._take_tasks(numbers)
            self._remove_dropped()
            return taken

    class Lazy(Simulation):
        def _remove_dropped(self) -> None:
            """Wait until they come to the top."""

    traces = list[str]()
    for kind in (Eager, Simulation, Lazy):
        log = Ledger()
        server = toys.server(schedule, limits=Limits(versions=15), seed=seed, start=toys.fresh(2))
        presence = Presence(COMING_AND_GOING.of((), seed), EVERYTHING, seed)
        clients = {f"c{k}": Profile(f"c{k}", 10) for k in range(8)}
        kind(server, Null(), Delays(), clients, log.score, log, seed=seed, presence=presence).run()
        traces.append(log.file.getvalue())
        assert log.ended["cancelled"] + log.ended["lost"] > 5
    assert traces[0] == traces[1] == traces[2]


def test_dropping_a_task_does_not_walk_through_the_heap() -> None:
    class Heap(list[Any]):
        def __iter__(self) -> Any:
            raise AssertionError("walked through the heap")

    server = toys.server(FedBuff(50, 40), limits=Limits(versions=5, evaluate_every=0), start=toys.fresh(2))
    clients = {f"c{k}": Profile(f"c{k}", 10) for k in range(300)}
    one = Simulation(
        server, Null(), Delays(), clients, lambda model: {}, Log(), presence=Presence(COMING_AND_GOING.of((), 0))
    )
    for client in clients:
        one._step(0.0, AvailabilityChanged(client))
    one._step(*one._next())
    one.heap = Heap(list.__iter__(one.heap))
    heapq.heapify(one.heap)
    first = sorted(server.state.busy)
    for number in first[:20]:
        one._forget({number})
    assert one.by_task.keys() == set(first[20:])
    assert len(one.in_flight) == 20
    now = -1.0
    for _ in range(40):
        time, what = one._next()
        assert time >= now
        assert getattr(what, "task", 0) not in first[:20]
        now = time


@every_schedule
def test_two_runs_of_one_seed_write_the_same_trace(schedule: Schedule) -> None:
    first, again, other = (
        storm(schedule, stays=COMING_AND_GOING.of((), seed), seed=seed)[0].file.getvalue() for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


@given(
    st.sampled_from(SCHEDULES),
    st.builds(
        Faults,
        dropout=st.sampled_from((0.0, 0.3, 0.7)),
        dropout_per_second=st.sampled_from((0.0, 0.1)),
        fail=st.sampled_from((0.0, 0.2)),
        back_after=st.sampled_from((0.01, 1.0, 20.0)),
        notice=st.sampled_from((0.0, 1.0, 50.0)),
        late=st.sampled_from((0.0, 0.5, 1.0)),
    ),
    st.sampled_from((None, Availability(5.0, 5.0), Availability(5.0, 2.0, regular=True))),
    st.sampled_from((Delays(sigma=0.0), Delays(), ExponentialDelays(), Delays(median=1e-9, sigma=0.0))),
    st.integers(0, 9),
)
@tries(25)
def test_in_any_storm_every_task_ends_and_nobody_blocks(
    schedule: Schedule, faults: Faults, windows: Availability | None, world: Devices, seed: int
) -> None:
    limits = Limits(versions=5, evaluate_every=0)
    log, _ = storm(schedule, faults, windows and windows.of((), seed), world, limits, 5, seed)
    assert stops(log)[0] == "5 versions made"
    assert not log.open


def test_all_that_can_go_wrong_does() -> None:
    """The storms are none if nothing of this happens in them."""
    log, _ = storm(FedBuff(4, 6), stays=COMING_AND_GOING.of((), 0), limits=Limits(versions=60), seed=0)
    reasons = Counter(event.reason.split()[-1] for _, event, _ in log.steps if isinstance(event, TaskFailed))
    assert reasons["up"] > 5  # the device gave up
    assert reasons["work"] > 5  # reconnected while the server believed it at work
    assert log.ended["lost"] > 5
    assert log.ended["late"] > 5
    assert log.ended["UpdateArrived"] >= 240


def test_late_answers_are_rejected_and_change_nothing() -> None:
    log, _ = storm(Rounds(2, over_selection=2.0), Faults(0, 0, 0, late=1.0))
    late = [(event, commands) for _, event, commands in log.steps if isinstance(event, UpdateArrived) and commands]
    late = [(event, commands) for event, commands in late if isinstance(commands[0], Reject)]
    assert len(late) > 10
    for event, commands in late:
        assert commands == [Reject(event.client, event.task, commands[0].reason)]
        assert "not outstanding" in commands[0].reason
    calm, _ = storm(Rounds(2, over_selection=2.0), None)
    merged = [[[u.task.id for u in p.updates] for p in one.all(Publish)] for one in (log, calm)]
    assert merged[0] == merged[1]


def test_a_client_that_comes_back_before_it_is_missed_reconnects() -> None:
    """The server believes it at work: it hears ClientJoined, then that the task failed, and never that it was lost."""
    log, _ = storm(Rounds(3), Faults(dropout=0.4, fail=0.0, back_after=1e-9, notice=100.0), clients=3)
    kinds = [type(event) for _, event, _ in log.steps]
    assert ClientLost not in kinds
    failed = [k for k, kind in enumerate(kinds) if kind is TaskFailed]
    assert len(failed) > 5
    assert all(kinds[k - 1] is ClientJoined for k in failed)


def test_a_client_lost_for_ever_blocks_nobody() -> None:
    log, _ = storm(Rounds(3), Faults(dropout=0.08, fail=0.0, back_after=None), clients=40)
    gone = [event.client for _, event, _ in log.steps if isinstance(event, ClientLost)]
    assert 0 < len(gone) == len(set(gone))
    assert stops(log) == ["15 versions made"]


def test_when_all_are_lost_for_ever_the_run_says_so() -> None:
    with pytest.raises(Refused, match="no idle client"):
        storm(Rounds(3), Faults(dropout=1.0, back_after=None))


def test_windows_too_short_for_any_task_end_the_run_with_a_reason() -> None:
    stays = Availability(online=0.5, offline=0.5, regular=True).of((), 0)
    log, _ = storm(Rounds(3), None, stays, Delays(sigma=0.0), Limits(versions=3, failures=20))
    assert "20 tasks failed in a row" in stops(log)[0]
    assert "was lost" in stops(log)[0]


def test_clients_are_there_in_their_windows_alone() -> None:
    """c0: [0, 5) and [7, 10) of every 10 s, c1 always, c2 never; tasks of 1 s, so c0's last one of a window is lost or not begun."""
    stays = Traced({"c0": (5.0, 2.0, 3.0, 0.0), "c1": (math.inf, 0.0), "c2": (0.0, math.inf)})
    limits = Limits(versions=10**6, seconds=29.5)
    log, _ = storm(FedBuff(1, 3), None, stays, Delays(sigma=0.0), limits, clients=3)
    told = [(now, type(event).__name__) for now, event, _ in log.steps if getattr(event, "client", "") == "c0"
            and isinstance(event, ClientLost)]  # fmt: skip
    back = [now for now, event, _ in log.steps if isinstance(event, ClientJoined) and event.profile.client == "c0"]
    assert [now for now, _ in told] == [5.0, 15.0, 25.0]
    assert back == [0.0, 7.0, 17.0, 27.0]  # 7 to 10 goes on into the next cycle
    assert {task.client for task in (command.task for command in log.all(Dispatch))} == {"c0", "c1"}


def test_events_of_one_moment_come_in_the_order_in_which_they_were_made() -> None:
    """All tasks take 1 s and all windows close at 1 s: the answers, made later than the windows, come from clients that are gone."""
    stays = Traced({f"c{k}": (1.0, 1.0) for k in range(4)})
    log, one = storm(Rounds(4), None, stays, Delays(sigma=0.0), Limits(versions=2, failures=8), clients=4)
    first = [type(event) for now, event, _ in log.steps if now == 1.0]
    assert first[:4] == [ClientLost] * 4
    assert UpdateArrived not in first
    assert one.server.state.version == 0
    again, _ = storm(Rounds(4), None, stays, Delays(sigma=0.0), Limits(versions=2, failures=8), clients=4)
    assert again.file.getvalue() == log.file.getvalue()


def test_a_client_keeps_what_its_last_accepted_task_left_whatever_went_wrong_since() -> None:
    """Lost, failed, late: none leaves anything behind. So SCAFFOLD's and FedSA's clients agree with the server on what counted."""
    given: dict[int, str] = {}
    clients: dict[int, str] = {}

    class Marking(Null):
        def train(self, work: Sequence[tuple[Task, ClientState]]) -> list[tuple[Result, ClientState]]:
            given.update({task.id: local.basis for task, local in work})
            clients.update({task.id: task.client for task, _ in work})
            plain = super().train(work)
            return [
                (r, replace(local, basis=f"task {task.id}")) for (task, local), (r, _) in zip(work, plain, strict=True)
            ]

    log, one = storm(FedBuff(2, 5), stays=COMING_AND_GOING.of((), 1), trainer=Marking(), limits=Limits(versions=40))
    accepted: dict[str, str] = {}
    for _, event, commands in log.steps:
        if isinstance(event, UpdateArrived) and not any(isinstance(c, Reject) for c in commands):
            accepted[event.client] = f"task {event.task}"
        for command in commands:
            if isinstance(command, Dispatch):
                assert given[command.task.id] == accepted.get(command.task.client, "")
    assert {client: local.basis for client, local in one.client_states.settled.items()} == accepted
    assert log.ended["late"] + log.ended["lost"] + log.ended["TaskFailed"] > 20


@dataclass(frozen=True)
class OneVanishes(Faults):
    """c0 is cut off half a second into its first task."""

    def interruption(self, task: Task, seconds: float, seed: int) -> Any:
        """Nothing befalls the others."""
        return (0.5, Vanished("c0", task.id)) if task.client == "c0" else None


def test_tasks_sent_to_a_client_that_vanished_end_when_it_is_missed() -> None:
    """Each round its straggler is cancelled and started again, all before the server knows that nobody is there any more."""
    faults = OneVanishes(back_after=None, notice=50.0)
    rounds = Rounds(1, over_selection=2.0)
    log, _ = storm(rounds, faults, world=Delays(sigma=0.0), clients=2, limits=Limits(versions=80))
    gone = [(now, event.client) for now, event, _ in log.steps if isinstance(event, ClientLost)]
    assert gone == [(50.5, "c0")]
    sent = [(now, c.task.client) for now, _, commands in log.steps for c in commands if isinstance(c, Dispatch)]
    assert [now for now, client in sent if client == "c0"] == [float(now) for now in range(51)]
    assert log.ended["cancelled"] == 50
    assert log.ended["lost"] == 1


@dataclass(frozen=True)
class AwayFor(OneVanishes):
    """It is away for a given time."""

    seconds: float = 15.0

    def outage(self, client: str, task: int, seed: int) -> float:
        """Always as long."""
        return self.seconds


@pytest.mark.parametrize(("seconds", "back"), [(15.0, 15.5), (20.0, 21.0)])
def test_who_vanished_is_back_when_it_can_be_reached_and_its_window_is_open(seconds: float, back: float) -> None:
    """Windows [0, 5), [7, 12), [14, 19), [21, 26): none that opens in between brings it back; in a closed one it waits."""
    stays = Traced({"c0": (5.0, 2.0), "c1": ALWAYS})
    faults = AwayFor(notice=1.0, seconds=seconds)
    log, _ = storm(FedBuff(1, 2), faults, stays, Delays(sigma=0.0), Limits(versions=10**6, seconds=back + 0.25), 2)
    joined = [now for now, event, _ in log.steps if isinstance(event, ClientJoined) and event.profile.client == "c0"]
    lost = [now for now, event, _ in log.steps if isinstance(event, ClientLost)]
    assert joined == [0.0, back]
    assert lost == [1.5]
    assert not [event for _, event, _ in log.steps if isinstance(event, UpdateArrived) and event.client == "c0"]


def test_an_answer_to_a_cancelled_task_is_refused_also_while_the_client_works_on_the_next() -> None:
    log, _ = storm(Rounds(1, over_selection=2.0), Faults(0, 0, 0, late=1.0), world=Delays(sigma=1.0), clients=2)
    refused = [command.client for command in log.all(Reject)]
    assert len(refused) > 5
    assert len(set(refused)) == 1  # the slower one


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"dropout": -0.1}, "dropout"),
        ({"dropout": math.nan}, "dropout"),
        ({"fail": 1.5}, "fail"),
        ({"late": 2}, "late"),
        ({"dropout_per_second": -1}, "dropout_per_second"),
        ({"dropout_per_second": math.inf}, "dropout_per_second"),
        ({"notice": -1}, "notice"),
        ({"back_after": -1}, "back_after"),
        ({"back_after": math.nan}, "back_after"),
    ],
)
def test_faults_that_make_no_sense_are_refused_by_name(more: Mapping[str, float], field: str) -> None:
    with pytest.raises(Refused) as caught:
        Faults(**more)  # type: ignore[arg-type]
    assert caught.value.field == f"faults.{field}"


def test_faults_come_as_often_as_they_say() -> None:
    """Of 3000 tasks of 10 s: fail 0.1; dropout 0.2; at 0.02 a second 1 - exp(-0.2) of them; each at a uniform moment."""

    def seen(faults: Faults) -> list[Any]:
        tasks = [toys.make_task(START, 2, k, f"c{k % 7}") for k in range(3000)]
        return [found for task in tasks if (found := faults.interruption(task, 10.0, 0))]

    for faults, share in (
        (Faults(0.0, 0.0, 0.1), 0.1),
        (Faults(0.2, 0.0, 0.0), 0.2),
        (Faults(0.0, 0.02, 0.0), 1 - math.exp(-0.2)),
        (Faults(0.0, 0.0, 0.0), 0.0),
        (Faults(1.0, 0.0, 0.0), 1.0),
    ):
        found = seen(faults)
        assert len(found) / 3000 == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 3000))
        assert all(0 <= when <= 10 for when, _ in found)
        assert {type(what) for _, what in found} <= {Vanished if faults.fail == 0 else TaskFailed}
    assert mean(when for when, _ in seen(Faults(1.0, 0, 0))) == pytest.approx(5.0, abs=0.2)
    away = [Faults(back_after=7.0).outage("c0", k, 0) for k in range(3000)]
    assert mean(away) == pytest.approx(7.0, rel=4 / 3000**0.5)
    late = [Faults(late=0.3).comes_late("c0", k, 0) for k in range(3000)]
    assert mean(late) == pytest.approx(0.3, abs=0.03)


def test_what_befalls_a_task_does_not_depend_on_the_other_faults_or_on_the_order() -> None:
    tasks = [toys.make_task(START, 2, k, f"c{k % 3}") for k in range(200)]
    alone = {task.id: Faults(0.3, 0.0, 0.0).interruption(task, 10.0, 1) for task in tasks}
    both = {task.id: Faults(0.3, 0.0, 0.2).interruption(task, 10.0, 1) for task in reversed(tasks)}
    assert all(both[k] == alone[k] for k in both if both[k] and isinstance(both[k][1], Vanished))  # type: ignore[index]
    assert sum(both[k] != alone[k] for k in both) > 10


def test_random_windows_are_stationary_and_of_the_given_lengths() -> None:
    """A client is there with probability 30 / (30 + 10), at the start and much later; periods have these means."""
    for regular in (False, True):
        stays = Availability(30.0, 10.0, regular).of((), 0)
        names = [f"c{k}" for k in range(1000)]
        for moment in (0.0, 87.0):
            there = 0
            for name in names:
                now, k = stays.stay(name, 0), 0
                while now <= moment:
                    k += 1
                    now += stays.stay(name, k)
                there += k % 2 == 0
            assert there / 1000 == pytest.approx(0.75, abs=4 * math.sqrt(0.75 * 0.25 / 1000))
        assert mean(stays.stay(name, 2) for name in names) == pytest.approx(30.0, rel=0.1)
        assert mean(stays.stay(name, 3) for name in names) == pytest.approx(10.0, rel=0.1)
        assert stays.stay("c1", 5) == Availability(30.0, 10.0, regular).of((), 0).stay("c1", 5)


@pytest.mark.parametrize("field", ["online", "offline"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_availability_without_length_is_refused(field: str, value: float) -> None:
    with pytest.raises(Refused, match=f"availability.{field}"):
        Availability(**{field: value})  # type: ignore[arg-type]


@given(st.lists(st.floats(0, 100), max_size=8), st.floats(1, 100))
def test_a_cycle_is_as_long_as_it_should_be_and_open_when_it_should(times: list[float], length: float) -> None:
    ends = sorted(min(time, length) for time in times[: len(times) // 2 * 2])
    windows = list(zip(ends[::2], ends[1::2], strict=True))
    periods = cycle(windows, length)
    assert len(periods) % 2 == 0
    assert all(one >= 0 for one in periods)
    if math.inf not in periods:
        assert sum(periods) == pytest.approx(length)
        assert sum(periods[::2]) == pytest.approx(sum(end - start for start, end in windows))
    else:
        assert sum(end - start for start, end in windows) in (0.0, pytest.approx(length))


def test_no_table_grows_with_the_events() -> None:
    """Lost and late tasks leave nothing behind, neither here nor in what writes the metrics."""
    halves: tuple[dict[str, int], dict[str, int]] = ({}, {})
    metrics = Metrics(io.StringIO(), SlotUsage(4))

    class Watched(Ledger):
        def __call__(self, now: float, event: Any, commands: list[Any]) -> None:
            metrics(now, event, commands)
            tables = {
                "heap": one.heap,
                "in_flight": one.in_flight,
                "client_states": one.client_states.settled,
                "sent": metrics.sent,
            }
            tables |= {
                "uploaded": metrics.uploaded,
                "vanished_in": one.presence.vanished_in,
                "periods": one.presence.periods,
            }
            half = halves[one.server.state.version >= 60]
            for name, table in tables.items():
                half[name] = max(half.get(name, 0), len(table))  # type: ignore[arg-type]

    presence = Presence(COMING_AND_GOING.of((), 0), EVERYTHING, 0)
    server = toys.server(FedBuff(2, 6), limits=Limits(versions=120, evaluate_every=0), start=toys.fresh(2))
    clients = {f"c{k}": Profile(f"c{k}", 10) for k in range(8)}
    one = Simulation(server, Null(), Delays(), clients, lambda model: {}, Watched(), presence=presence)
    one.run()
    assert min(halves[0].values()) > 0
    assert {name: size for name, size in halves[1].items() if size > max(halves[0][name] + 3, 8)} == {}


def test_a_simulation_that_is_written_down_in_the_middle_goes_on_the_same() -> None:
    """All of its state is in tables that can be pickled: no closure, no generator, no stream with a position."""

    class Copied(Simulation):
        def _next(self) -> Any:
            self.heap, self.presence, self.in_flight, self.client_states = pickle.loads(
                pickle.dumps((self.heap, self.presence, self.in_flight, self.client_states))
            )
            return super()._next()

    traces = []
    for kind in (Simulation, Copied):
        log = Log()
        server = toys.server(FedBuff(2, 5), limits=Limits(versions=12), start=toys.fresh(2))
        presence = Presence(COMING_AND_GOING.of((), 3), EVERYTHING, 3)
        clients = {f"c{k}": Profile(f"c{k}", 10) for k in range(8)}
        kind(server, toys.Quadratic(), Delays(), clients, log.score, log, 3, presence).run()
        traces.append(log.file.getvalue())
    assert traces[0] == traces[1]


def test_without_windows_and_faults_nothing_changes() -> None:
    plain, none = (Log(), Log())
    for log, presence in ((plain, None), (none, Presence(seed=5))):
        server = toys.server(Rounds(3, over_selection=1.5), limits=Limits(versions=6), start=toys.fresh(2))
        simulation(server, log, **({"presence": presence} if presence else {})).run()
    never = Log()
    server = toys.server(Rounds(3, over_selection=1.5), limits=Limits(versions=6), start=toys.fresh(2))
    simulation(server, never, presence=Presence(Traced(dict.fromkeys(toys.profiles(6), ALWAYS)), Faults(0, 0, 0))).run()
    assert plain.file.getvalue() == none.file.getvalue() == never.file.getvalue()


def test_a_late_answer_comes_after_its_client_is_back() -> None:
    log, _ = storm(
        FedBuff(1, 2), AwayFor(notice=1.0, late=1.0), None, Delays(sigma=0.0), Limits(versions=10**6, seconds=15.75), 2
    )
    own = [(now, type(event)) for now, event, commands in log.steps if isinstance(event, UpdateArrived)
           and event.client == "c0"]  # fmt: skip
    assert own == [(15.5, UpdateArrived)]


def test_nothing_is_late_unless_it_is_said() -> None:
    """Who failed, vanished or was cancelled is not heard of again."""
    faults = replace(EVERYTHING, late=0.0)
    log, _ = storm(Rounds(3, over_selection=2.0), faults, COMING_AND_GOING.of((), 0), limits=Limits(versions=30))
    assert log.ended["TaskFailed"] > 5
    assert log.ended["cancelled"] > 5
    assert not log.all(Reject)
