"""Law 10 on toys: stopped between any two events and restored into fresh objects, a run ends in the same bytes."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedloom
from fedloom import (
    Averaged,
    DeltaInt8,
    FedEx,
    FedFa,
    FedSA,
    FLoRA,
    GradientScore,
    Half,
    JointPlan,
    Limits,
    LossRate,
    Momentum,
    Plan,
    ProductDelta,
    RandomRank,
    Scaffold,
    World,
)
from fedloom.aggregate.fedit import FedIT
from fedloom.aggregate.hetlora import HetLoRA
from fedloom.core.codec import Codec
from fedloom.core.coordinator import Coordinator
from fedloom.core.events import Command, Event
from fedloom.core.files import read_lines
from fedloom.core.fingerprint import fingerprint
from fedloom.core.lora import compact_with_fold
from fedloom.core.policies import Aggregator, Schedule
from fedloom.core.schema import declared_fields, reachable_classes
from fedloom.core.types import Model
from fedloom.hierarchy.grouping import BySpeed, NearIID
from fedloom.hierarchy.hierarchy import Hierarchy
from fedloom.hierarchy.joint_plan.shared import JointRule
from fedloom.hierarchy.secure_edge import Secure
from fedloom.hierarchy.tree_state import Link
from fedloom.runs import checkpoint, resume
from fedloom.runs.metrics import Metrics
from fedloom.runs.observation import RunObservation
from fedloom.runs.resume import (
    CHECKPOINT,
    LOGS,
    REBUILT,
    CheckpointWriter,
    Progress,
    open_log,
    restore_fields,
    saved_fields,
)
from fedloom.runs.slot_usage import SlotUsage
from fedloom.runs.state_files import STATES, StateFiles
from fedloom.runs.trace import Trace
from fedloom.simulate.availability import Availability
from fedloom.simulate.client_presence import Presence
from fedloom.simulate.client_states import ClientStates
from fedloom.simulate.faults import Faults
from fedloom.simulate.simulation import Simulation
from tests.support import toys
from tests.support.pairs import goes_together
from tests.support.simulated_runs import Remembering
from tests.support.storms import one_in, tries

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(Path(fedloom.__file__).parents[1]), str(ROOT)]),
}
METHODS: tuple[Aggregator, ...] = (
    ProductDelta(), FLoRA(), FedEx(), FedSA(), HetLoRA(), Momentum(FedIT()), Scaffold(FedIT(), clients=6),
    Averaged(ProductDelta()), Averaged(FedEx()),
)  # fmt: skip
PAIRS = [pair for pair in itertools.product(METHODS, toys.schedules()) if goes_together(*pair)]


OUTSIDE = {
    "server",
    "trainer",
    "devices",
    "profiles",
    "evaluate",
    "check",
    "observe",
    "seed",
    "presence",
    "client_states",
    "store",
    "rotates",
    "after_step",
    "pending",
    "by_task",
    "dropped",
    "file",
    "stays",
    "faults",
}
"""Fields that are no state, by a list of the test's own."""


FAULTS = Faults(dropout=0.15, fail=0.1, back_after=3.0, notice=1.0, late=0.5)
COMING_AND_GOING = Availability(online=12.0, offline=4.0)


class Stopped(Exception):
    """Killed between two events."""


@dataclass
class Toy:
    """A run without a model, in a folder."""

    folder: Path
    method: Aggregator
    schedule: Schedule
    transfer: Codec | None
    unreliable: bool = False
    versions: int = 4
    hierarchy: Hierarchy | None = None
    groups: Sequence[int] = (4, 2)
    packed: bool = False

    def server(self) -> Coordinator:
        """At version 0; with a hierarchy, of an edge for each group."""
        given: dict[str, Any] = {"schedule": self.schedule, "method": self.method, "transfer": self.transfer}
        given |= {"start": toys.fresh(4), "assign": Plan(RandomRank(2, 4), 3)}
        given |= {"limits": Limits(versions=self.versions, evaluate_every=2)}
        given |= {"shape": replace(toys.SHAPE, layers=2, depths={"query": 2, "value": 1})}
        grown: Coordinator | None = toys.tree(self.groups, self.hierarchy, **given) if self.hierarchy else None
        return grown or toys.server(**given)

    def snapshot(self, name: str, owners: Sequence[Any]) -> None:
        """All that these values hold, to the bit and with what is shared."""
        names = [(owner, field.name) for owner in owners for field in dataclasses.fields(owner)]
        values = {f"{type(owner)} {one}": getattr(owner, one) for owner, one in names if one not in OUTSIDE}
        checkpoint.write_checkpoint(self.folder / name, values)

    def run(self, stop: Callable[[int], bool] = lambda event: False, goes_on: bool = False) -> tuple[object, ...]:
        """From the start or from the checkpoint; where `stop` says so, write a checkpoint and raise Stopped."""
        server = self.server()
        progress, stored = Progress(), checkpoint.read_checkpoint(self.folder / CHECKPOINT) if goes_on else None
        self.folder.mkdir(exist_ok=True)
        with ExitStack() as opened:
            sizes = {name: stored.about[name] if stored else 0 for name in LOGS}
            packed = {LOGS[0]: self.packed}
            logs = [
                opened.enter_context(open_log(self.folder / name, size, packed.get(name, False)))
                for name, size in sizes.items()
            ]
            trace, metrics, count = (
                Trace(logs[0]),
                Metrics(
                    logs[1],
                    SlotUsage(server.max_in_flight),
                    RunObservation(server.edges),
                ),
                itertools.count(),
            )

            def evaluate(model: Model) -> Mapping[str, float]:
                progress.scores.append({"loss": toys.Quadratic().loss(compact_with_fold(model.adapter, model.fold))})
                return progress.scores[-1]

            def observe(now: float, event: Event, commands: list[Command]) -> None:
                trace(now, event, commands)
                metrics(now, event, commands)

            def settled() -> None:
                if stop(next(count)):
                    simulation.drain()
                    keeper.write()
                    self.snapshot("before", owners)
                    raise Stopped

            world, clients = World(jitter=0.3), toys.profiles(6)
            presence = Presence(COMING_AND_GOING.of((), 0), FAULTS, 0) if self.unreliable else Presence()
            store = StateFiles(self.folder / STATES)
            states = ClientStates(store, rotates=self.method.space == "product")
            simulation = Simulation(
                server, Remembering(), world, clients, evaluate, observe, presence=presence, client_states=states
            )
            simulation.after_step, store.needed = settled, simulation.stored_states
            owners = (*server.parts_to_save(), simulation, states, presence, metrics, progress)
            keeper = CheckpointWriter(self.folder, 0.0, owners, logs, states=store)
            if stored:
                hints = {name: hint for owner in owners for name, hint in saved_fields(type(owner)).items()}
                restore_fields(stored.read(hints), owners)
                store.reopen()
                self.snapshot("after", owners)
                assert (self.folder / "before").read_bytes() == (self.folder / "after").read_bytes()
            reason = simulation.run()
        model = server.state.model
        written = tuple(b"".join(read_lines(self.folder / name)) for name in LOGS)
        return reason, *written, fingerprint(model.adapter), model.fold and fingerprint(model.fold), str(progress)


STOPS = st.lists(st.integers(1, 9), min_size=1, max_size=4)
"""Events after which a run is stopped, each counted from where it began or went on."""
CODECS = st.sampled_from([None, Half(), DeltaInt8()])


def check_stopped(root: Path, toy: Callable[[Path], Toy], stops: Sequence[int]) -> None:
    undisturbed, broken = replace(toy(root / "whole"), packed=False).run(), toy(root / "broken")
    goes_on, finished = False, None
    for after in [*stops, 10**6]:
        try:
            finished = broken.run(lambda event, after=after: event == after, goes_on)  # type: ignore[misc]
            break
        except Stopped:
            goes_on = True
            for name in LOGS:  # what was written after the checkpoint, the last line half
                with (root / "broken" / name).open("a") as file:
                    file.write('{"time":1.0,"ev')
    assert finished == undisturbed
    shutil.rmtree(root)


@pytest.mark.parametrize("schedule", toys.schedules(), ids=toys.called)
@given(data=st.data(), stops=STOPS, transfer=CODECS, unreliable=st.booleans(), packed=st.booleans())
@tries(10)
def test_a_run_stopped_between_any_two_events_goes_on_to_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory,
    schedule: Schedule,
    data: st.DataObject,
    stops: Sequence[int],
    transfer: Codec | None,
    unreliable: bool,
    packed: bool,
) -> None:
    """And with a packed trace to the lines of a plain one."""
    method = data.draw(st.sampled_from([method for method in METHODS if goes_together(method, schedule)]))

    def toy(folder: Path) -> Toy:
        return Toy(folder, method, schedule, transfer, unreliable, packed=packed)

    check_stopped(tmp_path_factory.mktemp("toy"), toy, stops)


@pytest.mark.parametrize("above", one_in(3, toys.schedules()), ids=toys.called)
@given(data=st.data(), stops=STOPS, transfer=CODECS, unreliable=st.booleans())
@tries(10)
def test_so_does_a_run_with_edges(
    tmp_path_factory: pytest.TempPathFactory,
    above: Schedule,
    data: st.DataObject,
    stops: Sequence[int],
    transfer: Codec | None,
    unreliable: bool,
) -> None:
    method = data.draw(st.sampled_from([FedIT(), ProductDelta(), FLoRA(), Averaged(FedEx())]))
    below = data.draw(st.sampled_from(toys.schedules()))
    hierarchy = Hierarchy(rounds=2, schedule=below, link=data.draw(st.sampled_from([None, Link(2e4, 2e4)])))

    def toy(folder: Path) -> Toy:
        return Toy(folder, method, above, transfer, unreliable, hierarchy=hierarchy)

    check_stopped(tmp_path_factory.mktemp("toy"), toy, stops)


@pytest.mark.slow
@pytest.mark.parametrize("method", [FedIT(), ProductDelta()], ids=toys.called)
@given(stops=STOPS, unreliable=st.booleans())
@tries(10)
def test_so_does_a_run_whose_groups_are_summed(
    tmp_path_factory: pytest.TempPathFactory, method: Aggregator, stops: Sequence[int], unreliable: bool
) -> None:
    """A checkpoint of a simulation holds who is ready, and what ready clients hold."""
    hierarchy = Hierarchy(secure=Secure(least=3, bound=5.0, threshold=0.51), link=Link(2e4, 2e4))

    def toy(folder: Path) -> Toy:
        return Toy(folder, method, FedFa(2, 2), None, unreliable, hierarchy=hierarchy, groups=(6,))

    check_stopped(tmp_path_factory.mktemp("toy"), toy, stops)


@pytest.mark.parametrize("above", one_in(4, toys.schedules()), ids=toys.called)
@given(data=st.data(), stops=STOPS, unreliable=st.booleans())
@tries(10)
def test_so_does_a_run_whose_groups_are_made_again(
    tmp_path_factory: pytest.TempPathFactory,
    above: Schedule,
    data: st.DataObject,
    stops: Sequence[int],
    unreliable: bool,
) -> None:
    """A checkpoint holds the present groups, the times that they were made of, and who is still to move."""
    below, plan = (
        data.draw(st.sampled_from([None, *toys.schedules()])),
        JointPlan(GradientScore(6, 3, rank=4), batch_tokens=50),
    )
    how: dict[str, Any] = {"link": data.draw(st.sampled_from([None, Link(2e4, 2e4)])), "schedule": below}
    how |= {"plan": data.draw(st.sampled_from([None, plan])), "regroup": 1e-6}
    hierarchy = Hierarchy(data.draw(st.sampled_from([BySpeed(2), NearIID(2, waiting=1.0, largest=5)])), **how)

    def toy(folder: Path) -> Toy:
        return Toy(folder, FedIT(), above, None, unreliable, hierarchy=hierarchy)

    check_stopped(tmp_path_factory.mktemp("toy"), toy, stops)


@pytest.mark.parametrize("rule", [GradientScore(6, 3, rank=4), LossRate(6, 3, rank=4, patience=2)], ids=toys.called)
@given(stops=STOPS, unreliable=st.booleans(), linked=st.booleans())
@tries(10)
def test_so_does_a_run_whose_root_plans(
    tmp_path_factory: pytest.TempPathFactory, rule: JointRule, stops: Sequence[int], unreliable: bool, linked: bool
) -> None:
    """What a plan knows is in the state: after a stop it chooses the same, and says the same why."""
    hierarchy = Hierarchy(plan=JointPlan(rule, batch_tokens=50), link=Link(2e4, 2e4) if linked else None)

    def toy(folder: Path) -> Toy:
        return Toy(folder, FedIT(), FedFa(2, 2), None, unreliable, hierarchy=hierarchy)

    check_stopped(tmp_path_factory.mktemp("toy"), toy, stops)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "schedule"), PAIRS, ids=toys.called)
@given(stops=STOPS, transfer=CODECS)
@tries(10)
def test_so_does_every_pair(
    tmp_path_factory: pytest.TempPathFactory,
    method: Aggregator,
    schedule: Schedule,
    stops: Sequence[int],
    transfer: Codec | None,
) -> None:
    check_stopped(tmp_path_factory.mktemp("toy"), lambda folder: Toy(folder, method, schedule, transfer), stops)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", toys.schedules(), ids=toys.called)
@given(data=st.data(), shorter=st.integers(1, 6), unreliable=st.booleans())
@tries(4)
def test_a_run_made_longer_from_before_its_last_event_is_the_longer_run(
    tmp_path_factory: pytest.TempPathFactory,
    schedule: Schedule,
    data: st.DataObject,
    shorter: int,
    unreliable: bool,
) -> None:
    """Up to its last event, nothing depends on how long a run is."""
    method = data.draw(st.sampled_from([method for method in METHODS if goes_together(method, schedule)]))
    root, events = tmp_path_factory.mktemp("toy"), list[int]()
    short = Toy(root / "short", method, schedule, None, unreliable, shorter)
    short.run(lambda event: bool(events.append(event)))  # type: ignore[func-returns-value]
    with pytest.raises(Stopped):
        short.run(lambda event: event == events[-1])
    whole = replace(short, folder=root / "whole", versions=7).run()
    assert replace(short, versions=7).run(goes_on=True) == whole
    shutil.rmtree(root)


@pytest.mark.parametrize("kind", REBUILT, ids=lambda kind: kind.__name__)
def test_every_field_is_saved_or_named_as_rebuilt(kind: type) -> None:
    """A field that is neither cannot be read back, and this says so."""
    assert set(saved_fields(kind)) | {f"{kind.__name__}.{name}" for name in REBUILT[kind]} == {
        f"{kind.__name__}.{field.name}"
        for field in dataclasses.fields(kind)  # type: ignore[arg-type]
    }
    assert REBUILT[kind] <= declared_fields(kind).keys()
    assert reachable_classes(*saved_fields(kind).values()) or kind in (Progress, Presence)


def test_checkpoints_take_at_most_a_twentieth_of_the_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = [100.0]
    written = list[float]()

    def write(keeper: CheckpointWriter) -> int:
        written.append(now[0])
        now[0] += 2.0
        return 0

    monkeypatch.setattr(resume.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(CheckpointWriter, "write", write)
    keeper = CheckpointWriter(tmp_path, seconds=30.0)
    while now[0] < 300.0:
        keeper()
        now[0] += 1.0
    assert written == [130.0, 170.0, 210.0, 250.0, 290.0]
    written.clear()
    keeper = CheckpointWriter(tmp_path, seconds=0.0)
    for _ in range(3):
        keeper()
    assert len(written) == 3
