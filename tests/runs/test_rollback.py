"""Rollback: an earlier version, or the recorded answers without those of one site, from kept answers; and a bound on these."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from fedloom import FedBuff, FedFa, FixedRank, Limits, Plan, Rounds, prepare
from fedloom.aggregate.fedit import FedIT
from fedloom.core.errors import Refused
from fedloom.core.events import Command, Event, Publish
from fedloom.core.fingerprint import fingerprint
from fedloom.core.policies import Aggregator, Schedule
from fedloom.core.schema import jsonable
from fedloom.runs.archive import Archive, first_kept, stored_states
from fedloom.runs.replay import replay
from fedloom.runs.resume import open_log
from fedloom.runs.rollback import MergedAgain, _merged_again, roll_back
from fedloom.runs.run import Run
from fedloom.runs.trace import Trace
from fedloom.schedule.shared.weights import uniform
from tests.support import toys
from tests.support.canary_world import STRICT, Play
from tests.support.tiny_models import tiny_run


class Recorded:
    """A run of the toy federation in a folder, as `record` leaves it, with a bound on the answers."""

    def __init__(self, folder: Path, play: Play, most: int | None = None, packed: bool = False) -> None:
        """Carry it out."""
        self.folder, self.play, self.models = folder, play, {0: play.server.state.model}
        folder.mkdir()
        settings = {"aggregator": play.method, "schedule": play.schedule, "plan": play.server.budget_rule}
        settings |= {"limits": play.server.limits, "canary": play.canary, "transfer": None}
        run = {name: jsonable(value) for name, value in settings.items()} | {"seed": 0, "threads": 1}
        run |= {"training": {"learning_rate": 1e9}, "lora": {"scaling": 2.0}}
        (folder / "manifest.json").write_text(json.dumps({"run": run, "status": "finished"}))
        with open_log(folder / "trace.jsonl", 0, packed) as file:
            trace, archive = Trace(file), Archive.of(folder / "updates", play.server, most, trace=file)
            handle = play.server.handle

            def recorded(now: float, event: Event) -> list[Command]:
                commands = handle(now, event)
                trace(now, event, commands)
                archive(now, event, commands)
                self.models |= {one.version: one.model for one in commands if isinstance(one, Publish)}
                return commands

            play.server.handle = recorded  # type: ignore[method-assign]
            play.run()

    def again(self, to: int | None = None, without: str | None = None) -> MergedAgain:
        """What a rollback would write."""
        watching = list[MergedAgain]()

        def watch(server: Any, version: int) -> MergedAgain:
            watching.append(_merged_again(self.folder, server, version, to, without))
            return watching[0]

        assert not replay(self.folder, watch=watch).difference
        return watching[0]


SCHEDULES = [
    Rounds(cohort_size=6, weigh=uniform),
    FedBuff(buffer_size=3, max_in_flight=4),
    FedFa(window=3, max_in_flight=4),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda one: type(one).__name__)
def test_each_version_comes_back_as_it_was_published(tmp_path: Path, schedule: Schedule) -> None:
    run = Recorded(tmp_path / "run", Play(schedule, FedIT(), versions=2))
    for version, model in run.models.items():
        again = run.again(to=version)
        assert (again.version, fingerprint(again.model.adapter)) == (version, fingerprint(model.adapter))


def test_without_a_site_that_is_nowhere_it_is_the_run_itself(tmp_path: Path) -> None:
    run = Recorded(tmp_path / "run", Play(FedFa(window=3, max_in_flight=4), FedIT()))
    again = run.again(without="c9")
    assert not again.left_out
    assert fingerprint(again.model.adapter) == fingerprint(run.models[4].adapter)


@pytest.mark.slow
@pytest.mark.parametrize("method", toys.aggregators(), ids=toys.called)
def test_without_a_site_the_first_round_is_that_of_the_others(tmp_path: Path, method: Aggregator) -> None:
    """To the byte what a run makes in which the site's first task fails: no answer of others knew of it yet."""
    if getattr(method, "clients", None):
        pytest.skip("a method of that many clients")
    schedule = Rounds(cohort_size=6, weigh=uniform)
    run = Recorded(tmp_path / "run", Play(schedule, method, poisoned=("c3",), versions=1))
    absent = Play(schedule, method, absent=("c3",), versions=1).run()
    again = run.again(without="c3")
    assert len(again.left_out) == 1
    assert not again.derived
    kept, wanted = toys.function(again.model), toys.function(absent.server.state.model)
    assert toys.distance(kept, wanted) < 1e-5


def test_answers_to_tasks_from_versions_with_the_site_are_counted(tmp_path: Path) -> None:
    run = Recorded(tmp_path / "run", Play(Rounds(cohort_size=6), FedIT(), poisoned=("c3",), versions=3))
    again = run.again(without="c3")
    assert (len(again.left_out), len(again.derived), again.first) == (3, 10, 1)
    for model in (again.model, run.models[3]):
        assert all(tensor.isfinite().all() for tensor in toys.function(model).values())


def test_a_run_with_a_canary_is_merged_again_as_it_was_published(tmp_path: Path) -> None:
    """Merges that failed are heard too, and are none of its versions."""
    play = Play(FedBuff(buffer_size=3, max_in_flight=4), FedIT(), STRICT, poisoned=("c3",))
    run = Recorded(tmp_path / "run", play)
    assert play.set_aside
    again = run.again(without="c9")
    assert fingerprint(again.model.adapter) == fingerprint(run.models[4].adapter)


@pytest.mark.parametrize("packed", [False, True])
def test_the_oldest_answers_go_first_and_what_is_kept_can_be_replayed(tmp_path: Path, packed: bool) -> None:
    whole = Recorded(tmp_path / "whole", Play(FedBuff(buffer_size=2, max_in_flight=4), FedIT(), versions=14))
    size = max(path.stat().st_size for path in (tmp_path / "whole" / "updates").glob("[0-9]*"))
    play = Play(FedBuff(buffer_size=2, max_in_flight=4), FedIT(), versions=14)
    run = Recorded(tmp_path / "run", play, 8 * size, packed)
    kept = list((tmp_path / "run" / "updates").glob("[0-9]*"))
    assert 4 <= len(kept) <= 9
    assert len(stored_states(tmp_path / "run" / "updates")) == 2
    begin, state = first_kept(tmp_path / "run")
    assert begin > 0
    assert state is not None
    found = replay(tmp_path / "run")
    assert (found.difference, found.version > 5) == ("", True)
    plain, lines = ((tmp_path / name / "trace.jsonl").read_bytes() for name in ("whole", "run"))
    assert (gzip.decompress(lines) if packed else lines) == plain
    for version in (found.version, 14):
        again = run.again(to=version)
        assert fingerprint(again.model.adapter) == fingerprint(whole.models[version].adapter)
    with pytest.raises(Refused, match=f"from version {found.version} to version"):
        roll_back(tmp_path / "run", to=found.version - 1)


def test_a_run_that_goes_on_counts_what_is_there_and_drops_states_from_after_its_checkpoint(tmp_path: Path) -> None:
    play = Play(FedBuff(buffer_size=2, max_in_flight=4), FedIT(), versions=14)
    run = Recorded(tmp_path / "run", play, 12_000)
    updates = run.folder / "updates"
    first, last = sorted(stored_states(updates))
    answered = Archive.of(updates, play.server, 12_000, (run.folder / "trace.jsonl").stat().st_size)
    assert answered.since <= 6_000 + 2_000
    earlier = Archive.of(updates, play.server, 12_000, last - 1)
    assert list(stored_states(updates)) == [first]
    assert earlier.since > answered.since


@pytest.mark.parametrize(("to", "without"), [(None, None), (1, "c1")])
def test_one_of_both_is_said(tmp_path: Path, to: int | None, without: str | None) -> None:
    with pytest.raises(Refused, match="exactly one"):
        roll_back(tmp_path, to, without)


def test_without_answers_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"no trace\.jsonl"):
        roll_back(tmp_path, to=1)
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "trace.jsonl").touch()
    with pytest.raises(Refused, match="--keep-updates"):
        roll_back(tmp_path, without="c1")


@pytest.mark.slow
def test_a_new_run_begins_from_what_was_rolled_back(encoder: Path, tmp_path: Path) -> None:
    """A simulation with kept answers, to a version and without a client; both are starts of a run, and DIR stays as it is."""
    run: Run = tiny_run(
        encoder, schedule=Rounds(cohort_size=6), limits=Limits(versions=2), plan=Plan(FixedRank(2)), test_limit=20
    )
    out = tmp_path / "run"
    prepare(run).execute(out, report=False, keep_updates=True)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    back, without = roll_back(out, to=1), roll_back(out, without="c00", out=tmp_path / "without")
    assert (back.folder, back.version, without.version) == (out / "rollback-001", 1, 2)
    assert "without 2 answers of c00" in without.notes[0]
    assert all(path.read_bytes() == content for path, content in before.items())
    score = next(line for line in _lines(out) if line["kind"] == "score" and line["version"] == 1)
    begun = prepare(
        tiny_run(encoder, start=str(back.folder), limits=Limits(versions=1), plan=Plan(FixedRank(2)), test_limit=20)
    )
    assert begun.evaluate(begun.server.state.model)["loss"] == pytest.approx(score["loss"], abs=1e-4)
    assert prepare(tiny_run(encoder, start=str(without.folder))).start
    with pytest.raises(Refused, match="a rollback is no run"):
        prepare(run, resume=back.folder)
    with pytest.raises(Refused, match="merged are those of c00, c01"):
        roll_back(out, without="nobody")


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
