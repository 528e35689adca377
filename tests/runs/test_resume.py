"""Law 10 on toys: stopped between any two events and restored into fresh objects, a run ends in the same bytes."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
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
    Refused,
    Rounds,
    Rows,
    Scaffold,
    World,
    prepare,
)
from fedloom.aggregate.fedit import FedIT
from fedloom.aggregate.hetlora import HetLoRA
from fedloom.core.codec import Codec
from fedloom.core.events import Command, Event
from fedloom.core.fingerprint import fingerprint
from fedloom.core.lora import compact_with_fold
from fedloom.core.policies import Aggregator, Schedule
from fedloom.core.schema import Malformed, declared_fields, reachable_classes
from fedloom.core.server import Coordinator
from fedloom.core.types import Model
from fedloom.hierarchy.grouping import BySpeed, NearIID
from fedloom.hierarchy.hierarchy import Hierarchy
from fedloom.hierarchy.joint_plan.shared import JointRule
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
    locked,
    open_log,
    restore_fields,
    saved_fields,
)
from fedloom.runs.slot_usage import SlotUsage
from fedloom.runs.trace import Trace
from fedloom.simulate.availability import Availability
from fedloom.simulate.client_presence import Presence
from fedloom.simulate.faults import Faults
from fedloom.simulate.simulation import Simulation
from tests.support import killed_runs as kennel
from tests.support import toys
from tests.support.folder_runs import interrupt_run
from tests.support.pairs import goes_together
from tests.support.same_bytes import COMPARED
from tests.support.simulated_runs import Remembering
from tests.support.storms import tries
from tests.support.tiny_runs import tiny_run, toy_rows

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
    "observe",
    "seed",
    "presence",
    "after_step",
    "pending",
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

    def server(self) -> Coordinator:
        """At version 0; with a hierarchy, of two edges."""
        given: dict[str, Any] = {"schedule": self.schedule, "method": self.method, "transfer": self.transfer}
        given |= {"start": toys.fresh(4), "assign": Plan(RandomRank(2, 4), 3)}
        given |= {"limits": Limits(versions=self.versions, evaluate_every=2)}
        given |= {"shape": replace(toys.SHAPE, layers=2, depths={"query": 2, "value": 1})}
        grown: Coordinator | None = toys.tree((4, 2), self.hierarchy, **given) if self.hierarchy else None
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
            logs = [opened.enter_context(open_log(self.folder / name, size)) for name, size in sizes.items()]
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
            simulation = Simulation(
                server, Remembering(), world, clients, evaluate, observe, presence=presence, after_step=settled
            )
            owners = (*server.parts_to_save(), simulation, presence, metrics, progress)
            keeper = CheckpointWriter(self.folder, 0.0, owners, logs)
            if stored:
                hints = {name: hint for owner in owners for name, hint in saved_fields(type(owner)).items()}
                restore_fields(stored.read(hints), owners)
                self.snapshot("after", owners)
                assert (self.folder / "before").read_bytes() == (self.folder / "after").read_bytes()
            reason = simulation.run()
        model = server.state.model
        written = tuple((self.folder / name).read_bytes() for name in LOGS)
        return reason, *written, fingerprint(model.adapter), model.fold and fingerprint(model.fold), str(progress)


STOPS = st.lists(st.integers(1, 9), min_size=1, max_size=4)
"""Events after which a run is stopped, each counted from where it began or went on."""
CODECS = st.sampled_from([None, Half(), DeltaInt8()])


def check_stopped(root: Path, toy: Callable[[Path], Toy], stops: Sequence[int]) -> None:
    undisturbed, broken = toy(root / "whole").run(), toy(root / "broken")
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
@given(data=st.data(), stops=STOPS, transfer=CODECS, unreliable=st.booleans())
@tries(10)
def test_a_run_stopped_between_any_two_events_goes_on_to_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory,
    schedule: Schedule,
    data: st.DataObject,
    stops: Sequence[int],
    transfer: Codec | None,
    unreliable: bool,
) -> None:
    method = data.draw(st.sampled_from([method for method in METHODS if goes_together(method, schedule)]))

    def toy(folder: Path) -> Toy:
        return Toy(folder, method, schedule, transfer, unreliable)

    check_stopped(tmp_path_factory.mktemp("toy"), toy, stops)


@pytest.mark.parametrize("above", toys.schedules(), ids=toys.called)
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


@pytest.mark.parametrize("above", toys.schedules(), ids=toys.called)
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
    below, plan = data.draw(st.sampled_from([None, *toys.schedules()])), JointPlan(GradientScore(6, 3, rank=4), batch_tokens=50)
    how: dict[str, Any] = {"link": data.draw(st.sampled_from([None, Link(2e4, 2e4)])), "schedule": below}
    how |= {"plan": data.draw(st.sampled_from([None, plan])), "regroup": 1e-6}
    hierarchy = Hierarchy(data.draw(st.sampled_from([BySpeed(2), NearIID(2, waiting=1.0, largest=5)])), **how)

    def toy(folder: Path) -> Toy:
        return Toy(folder, FedIT(), above, None, unreliable, hierarchy=hierarchy)

    check_stopped(tmp_path_factory.mktemp("toy"), toy, stops)


@pytest.mark.parametrize(
    "rule", [GradientScore(6, 3, rank=4), LossRate(6, 3, rank=4, patience=2)], ids=toys.called
)
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


@pytest.mark.parametrize("kind", REBUILT, ids=lambda kind: kind.__name__)
def test_every_field_is_saved_or_named_as_rebuilt(kind: type) -> None:
    """A field that is neither cannot be read back, and this says so."""
    assert set(saved_fields(kind)) | {f"{kind.__name__}.{name}" for name in REBUILT[kind]} == {
        f"{kind.__name__}.{field.name}"
        for field in dataclasses.fields(kind)  # type: ignore[arg-type]
    }
    assert REBUILT[kind] <= declared_fields(kind).keys()
    assert reachable_classes(*saved_fields(kind).values()) or kind in (Progress, Presence)


# A real run ----------------------------------------------------------------------------------------------------------------


def asynchronous(encoder: Path, **more: Any) -> Any:
    return tiny_run(
        encoder, **({"schedule": FedFa(window=3, max_in_flight=4), "limits": Limits(versions=8), "seed": 5} | more)
    )


@pytest.fixture(scope="module")
def undisturbed(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, its answers kept."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    prepare(asynchronous(encoder)).execute(out, report=False, keep_updates=True)
    return out


@pytest.fixture(scope="module")
def half(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, interrupted; tests must not write into it."""
    return interrupt_run(asynchronous(encoder), tmp_path_factory.mktemp("half") / "out", checkpoint_seconds=0.0)


def test_an_interrupted_run_goes_on_to_the_same_files(
    encoder: Path, undisturbed: Path, half: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(half, tmp_path / "out")
    (out / "checkpoint.draft").write_bytes(b"half")
    job = prepare(asynchronous(encoder), resume=out)
    assert job.resumed_from is not None
    assert "version 4" in job.resumed_from.resume_point
    outcome = job.execute(report=False)
    assert (len(outcome.scores), outcome.folder) == (9, out)
    for name in (*COMPARED, "manifest.json"):
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert not {CHECKPOINT, "checkpoint.draft"} & {path.name for path in out.iterdir()}
    with pytest.raises(Refused, match="its run is finished"):
        prepare(asynchronous(encoder), resume=out)


def test_a_run_without_a_checkpoint_begins_again_in_its_folder(
    encoder: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = interrupt_run(asynchronous(encoder), tmp_path / "out")
    assert not (out / CHECKPOINT).exists(), "half a minute had not passed"
    job = prepare(asynchronous(encoder), resume=out)
    assert job.resumed_from is not None
    assert "version 0" in job.resumed_from.resume_point
    job.execute(report=False)
    for name in COMPARED:
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes(), name


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ({"schedule": FedFa(window=4, max_in_flight=4)}, ("schedule.window: 3 there, 4 here",)),
        ({"schedule": Rounds()}, ("schedule.type", "FedFa", "Rounds")),
        ({"data": Rows(toy_rows(120))}, ("data.rows.rows: 240 there, 120 here",)),
        ({"seed": 6}, ("seed: 5 there, 6 here",)),
        ({"seed": 0}, ("seed: 5 there, 0 here",)),
        ({"held_out": 0.0}, ("held_out: 0.2 there, 0.0 here",)),
    ],
)
def test_another_run_is_refused_with_what_differs(
    encoder: Path, half: Path, more: dict[str, Any], parts: tuple[str, ...]
) -> None:
    with pytest.raises(Refused, match="not the one that was begun") as caught:
        prepare(asynchronous(encoder, **more), resume=half)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_other_data_under_the_same_name_are_refused(encoder: Path, half: Path, tmp_path: Path) -> None:
    out = shutil.copytree(half, tmp_path / "out")
    text = (out / "manifest.json").read_text(encoding="utf-8")
    (out / "manifest.json").write_text(text.replace('"majority": 0.5', '"majority": 0.6'), encoding="utf-8")
    with pytest.raises(
        Refused, match=r"its data or its model are not what .*baselines\.majority: 0\.6 there, 0\.5 here"
    ):
        prepare(asynchronous(encoder), resume=out)


def test_a_damaged_checkpoint_is_refused_and_nothing_is_written(encoder: Path, half: Path, tmp_path: Path) -> None:
    out = shutil.copytree(half, tmp_path / "out")
    good = (out / CHECKPOINT).read_bytes()
    for bad in (b"", good[:-1], good[:99] + b"x" + good[100:], good.replace(b"[1, ", b"[7, ", 1)):
        (out / CHECKPOINT).write_bytes(bad)
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        with pytest.raises(Refused, match=r"cannot be used: .* remove it to begin again at version 0"):
            prepare(asynchronous(encoder), resume=out)
        assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (out / CHECKPOINT).write_bytes(good)
    (out / "trace.jsonl").write_bytes(b"")
    with pytest.raises(Refused, match=r"trace\.jsonl is shorter"):
        prepare(asynchronous(encoder), resume=out)


def test_what_is_no_run_or_still_goes_on_is_refused(encoder: Path, half: Path, tmp_path: Path) -> None:
    for place in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(Refused, match=r"holds a manifest\.json"):
            prepare(asynchronous(encoder), resume=place)
    out = shutil.copytree(half, tmp_path / "out")
    job = prepare(asynchronous(encoder), resume=out)
    before = (out / "manifest.json").read_bytes()
    with locked(out), pytest.raises(Refused, match="still going on"):
        job.execute()
    assert (out / "manifest.json").read_bytes() == before
    with pytest.raises(Refused, match="goes on in its own folder"):
        job.execute(tmp_path / "elsewhere")


def test_the_kernel_is_the_one_that_was_chosen_first(encoder: Path, half: Path, tmp_path: Path) -> None:
    out = shutil.copytree(half, tmp_path / "out")
    text = (out / "manifest.json").read_text(encoding="utf-8")
    other = {"onednn": "torch", "torch": "onednn"}
    found = next(name for name in other if f'"kernel": "{name}",' in text)
    (out / "manifest.json").write_text(
        text.replace(f'"kernel": "{found}",', f'"kernel": "{other[found]}",'), encoding="utf-8"
    )
    job = prepare(asynchronous(encoder), resume=out)
    assert job.base.computation["kernel"] == other[found]


def test_other_libraries_are_noted(encoder: Path, half: Path, tmp_path: Path) -> None:
    out = shutil.copytree(half, tmp_path / "out")
    text = (out / "manifest.json").read_text(encoding="utf-8")
    (out / "manifest.json").write_text(text.replace('"peft": "', '"peft": "9.', 1), encoding="utf-8")
    (note,) = prepare(asynchronous(encoder), resume=out).describe()["notes"]  # type: ignore[misc]
    assert "peft 9." in note
    assert "last digits" in note


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


@pytest.mark.slow
def test_a_run_killed_at_fifty_moments_ends_in_the_same_bytes(tmp_path: Path) -> None:
    """kill -9 from outside at any moment, and from inside in the middle of a checkpoint, a rename, a line, the last files."""
    command = [sys.executable, str(Path(kennel.__file__)), str(tmp_path), "50", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=590, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.splitlines()[-1].removesuffix(" kills")) >= 50


def version_at(path: Path) -> int:
    """Of a checkpoint that is replaced now and then; one that was replaced while it was read is looked at again."""
    while True:
        with suppress(Malformed):
            return int(checkpoint.read_checkpoint(path).about["version"])


@pytest.mark.slow
def test_it_may_go_on_with_other_workers(encoder: Path, tmp_path: Path) -> None:
    """Killed while two processes train, which end with it, and resumed by one."""
    run = tiny_run(encoder, limits=Limits(versions=6))
    prepare(run).execute(tmp_path / "alone", report=False)
    code = "import sys; from pathlib import Path; from tests.support.tiny_models import *; settle(); from fedloom import *\n"
    code += "if __name__ == '__main__':\n    run = tiny_run(Path(sys.argv[1]), limits=Limits(versions=6))\n"
    code += "    prepare(run).execute(Path(sys.argv[2]), workers=2, report=False, checkpoint_seconds=0)\n"
    (tmp_path / "start.py").write_text(code, encoding="utf-8")
    out = tmp_path / "out"
    child = subprocess.Popen(
        [sys.executable, str(tmp_path / "start.py"), str(encoder), str(out)], cwd=ROOT, env=ENVIRONMENT
    )
    while child.poll() is None and not (out / CHECKPOINT).exists():
        time.sleep(0.01)
    while child.poll() is None and version_at(out / CHECKPOINT) < 2:
        time.sleep(0.01)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    job = prepare(run, resume=out)
    assert job.resumed_from is not None
    assert job.resumed_from.version >= 2
    job.execute(report=False)
    for name in COMPARED:
        assert (out / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name
