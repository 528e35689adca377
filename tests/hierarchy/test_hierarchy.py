"""Runs with a hierarchy, of a tiny model: the folder, the report, replay, resumption, workers, the command line's settings."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom import (
    BestRoundTime,
    FedFa,
    GradientScore,
    Hierarchy,
    JointPlan,
    Limits,
    Link,
    Plan,
    RandomRank,
    Refused,
    Rounds,
    World,
    by_work,
    prepare,
)
from fedloom.core.events import Publish
from fedloom.core.schema import RENAMED
from fedloom.core.types import ClientState, Profile, Result, Task
from fedloom.data.private_histogram import noised
from fedloom.hierarchy.grouping import Given, Member
from fedloom.hierarchy.tree import Tree
from fedloom.report.page import write_report
from fedloom.report.run_log import read_run_log
from fedloom.report.tables import group_table
from fedloom.runs.prepare import devices_of
from fedloom.runs.replay import Replayed, replay, server_from_manifest
from fedloom.runs.run_file import override
from fedloom.simulate.simulation import Simulation
from fedloom.train.base_model import initial_adapter
from tests.support import toys
from tests.support.folder_runs import GROUPS, grouped_run, interrupt_run
from tests.support.same_bytes import COMPARED
from tests.support.simulated_runs import Log
from tests.support.tiny_runs import base_of, tiny_run, trainer_of


@pytest.fixture(scope="module")
def recorded(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, its answers kept; tests must not write into it."""
    out = tmp_path_factory.mktemp("led") / "out"
    prepare(grouped_run(encoder)).execute(out, keep_updates=True)
    return out


def test_fedfa_over_hlora_over_groups_fills_a_run_folder(recorded: Path) -> None:
    log = read_run_log(recorded)
    assert log.manifest["status"] == "finished"
    assert log.manifest["groups"] == {"edge0": ["c00", "c03", "c05"], "edge1": ["c01", "c02", "c04"]}
    assert [line["version"] for line in log.versions] == [1, 2, 3, 4, 5, 6]
    assert [line["version"] for line in log.scores] == list(range(7))
    merged = [line for line in log.edges if line["status"] == "merged"]
    assert len(merged) == 6
    assert all((line["rounds"], line["steps"], line["members"]) == (2, 4, 3) for line in merged)
    assert {line["edge"] for line in log.tasks} == {"edge0", "edge1"}
    done = [line for line in log.tasks if line["status"] == "merged"]
    assert len(done) == 6 * 2 * 3 + 6 * sum(
        line["status"] in ("unused", "cancelled") for line in log.edges if "rounds" in line
    )
    assert {line["staleness"] for line in done} == {0}, "a group works in rounds"
    assert {line["steps"] for line in done} == {2}


def test_the_report_has_a_row_for_each_group(recorded: Path, tmp_path: Path) -> None:
    grid = group_table(read_run_log(recorded))
    assert [row[:2] for row in grid.rows] == [("edge0", "3"), ("edge1", "3")]
    manifest = read_run_log(recorded).manifest
    examples = [sum(manifest["clients"][one]["examples"] for one in group) for group in manifest["groups"].values()]
    expected = [f"{100 * one / sum(examples):.1f} %" for one in examples]
    assert [row[-1].replace("\u00a0", " ") for row in grid.rows] == expected, (
        "as large as the split by chance left them"
    )
    page = write_report([recorded], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Seconds inside" in page
    assert "Why its last task" not in page
    assert write_report([recorded, recorded], tmp_path / "two.html").is_file()


@pytest.fixture(scope="module")
def planned(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose root plans; tests must not write into it."""
    out = tmp_path_factory.mktemp("planned") / "out"
    prepare(planning(encoder)).execute(out, keep_updates=True)
    return out


def planning(encoder: Path) -> Any:
    """Two groups; the root chooses rounds and depth of each."""
    plan = JointPlan(BestRoundTime(GradientScore(4, 4, rank=4)), batch_tokens=100)
    return grouped_run(
        encoder, schedule=Rounds(2, weigh=by_work), hierarchy=Hierarchy(GROUPS, plan=plan), limits=Limits(versions=4)
    )


def test_a_plan_is_in_the_folder_and_in_the_report(planned: Path, tmp_path: Path) -> None:
    log = read_run_log(planned)
    assert len(log.edges) == 8
    assert all("gradient norm" in line["why"] and line["rank"] == 4 for line in log.edges)
    assert {line["depth"] for line in log.edges} <= {None, 1}
    assert "Why its last task" in write_report([planned], tmp_path / "page.html").read_text(encoding="utf-8")
    assert b'"why":"gradient norm' in (planned / "trace.jsonl").read_bytes()


@pytest.mark.slow
def test_a_planned_run_replays_and_goes_on_to_the_same_files(encoder: Path, planned: Path, tmp_path: Path) -> None:
    """Law 10: what the plan knows is in the checkpoint, and follows from the answers alone."""
    assert replay(planned) == Replayed((planned / "trace.jsonl").read_bytes().count(b"\n"))
    out = interrupt_run(planning(encoder), tmp_path / "out", version=3, checkpoint_seconds=0.0)
    prepare(planning(encoder), resume=out).execute(report=False)
    for name in (*COMPARED, "manifest.json"):
        assert (out / name).read_bytes() == (planned / name).read_bytes(), name


def with_earlier_names(folder: Path) -> None:
    """The manifest of a run folder as it would have been written before policies were renamed."""
    file = folder / "manifest.json"
    text = file.read_text(encoding="utf-8")
    earlier = {new: old for old, new in RENAMED.items()}
    for new in ("JointPlan", "GradientScore"):
        assert f'"{new}"' in text
        text = text.replace(f'"{new}"', f'"{earlier[new]}"')
    file.write_text(text, encoding="utf-8")


@pytest.mark.slow
def test_a_manifest_with_earlier_names_is_read(encoder: Path, planned: Path, tmp_path: Path) -> None:
    done = shutil.copytree(planned, tmp_path / "done")
    with_earlier_names(done)
    assert replay(done).difference == ""
    out = interrupt_run(planning(encoder), tmp_path / "out", version=3, checkpoint_seconds=0.0)
    with_earlier_names(out)
    prepare(planning(encoder), resume=out).execute(report=False)
    assert (out / "trace.jsonl").read_bytes() == (planned / "trace.jsonl").read_bytes()


def test_a_recorded_run_gives_the_same_bytes_without_its_model(recorded: Path) -> None:
    assert isinstance(server_from_manifest(recorded), Tree)
    assert replay(recorded) == Replayed((recorded / "trace.jsonl").read_bytes().count(b"\n"))


def test_replay_finds_another_inner_version(recorded: Path, tmp_path: Path) -> None:
    out = shutil.copytree(recorded, tmp_path / "out")
    text = (out / "trace.jsonl").read_bytes()
    changed = text.replace(b'"command":{"type":"Publish","version":1,', b'"command":{"type":"Publish","version":3,', 1)
    assert changed != text
    (out / "trace.jsonl").write_bytes(changed)
    assert "commands[0].command.version: 3 there, 1 here" in replay(out).difference


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_files(encoder: Path, recorded: Path, tmp_path: Path) -> None:
    out = interrupt_run(grouped_run(encoder), tmp_path / "out", version=4, checkpoint_seconds=0.0)
    job = prepare(grouped_run(encoder), resume=out)
    assert job.resumed_from is not None
    assert "version 3" in job.resumed_from.resume_point
    job.execute(report=False)
    for name in (*COMPARED, "manifest.json"):
        assert (out / name).read_bytes() == (recorded / name).read_bytes(), name


@dataclass(frozen=True)
class Overheard:
    """A grouping that keeps what it was told."""

    told: list[Member] = field(default_factory=list)

    def __call__(self, members: Sequence[Member], seed: int) -> tuple[tuple[str, ...], ...]:
        self.told.extend(members)
        return (tuple(sorted(member.client for member in members)),)


def test_with_epsilon_groups_are_told_noisy_counts_and_nothing_else(encoder: Path) -> None:
    true, noisy = Overheard(), Overheard()
    prepare(grouped_run(encoder, hierarchy=Hierarchy(true)))
    job = prepare(grouped_run(encoder, hierarchy=Hierarchy(noisy, epsilon=0.5)))
    assert [sum(member.labels) for member in true.told] == [len(shard.train) for shard in job.shards]
    expected = [noised(member.labels, 0.5, job.run.seed, member.client) for member in true.told]
    assert [member.labels for member in noisy.told] == expected
    assert expected != [member.labels for member in true.told]
    with pytest.raises(Refused, match=r"hierarchy\.epsilon"):
        Hierarchy(epsilon=-1.0)


def test_another_grouping_is_another_run(encoder: Path, tmp_path: Path) -> None:
    out = interrupt_run(grouped_run(encoder), tmp_path / "out", version=2)
    other = Given((("c00", "c01", "c05"), ("c03", "c02", "c04")))
    with pytest.raises(Refused, match=r"hierarchy\.groups"):
        prepare(grouped_run(encoder, hierarchy=Hierarchy(other, link=Link(1e6, 1e6), inner_speedup=4.0)), resume=out)


@pytest.mark.slow
def test_two_workers_give_the_same_bytes(encoder: Path, recorded: Path, tmp_path: Path) -> None:
    prepare(grouped_run(encoder)).execute(tmp_path / "out", workers=2, report=False)
    for name in COMPARED:
        assert (tmp_path / "out" / name).read_bytes() == (recorded / name).read_bytes(), name


def test_members_are_nearer_to_their_edge_and_an_edge_on_the_server_costs_no_time(encoder: Path) -> None:
    run = grouped_run(encoder)
    sizes = {f"c{k:02d}": 32 for k in range(6)}
    far, near = (one.profiles(sizes, 0) for one in (run.world, devices_of(run)))
    assert [one.up_bps for one in near] == [4.0 * one.up_bps for one in far]
    assert len(far) == 6
    assert devices_of(grouped_run(encoder, hierarchy=Hierarchy(GROUPS))) == run.world
    job = prepare(grouped_run(encoder, hierarchy=Hierarchy(GROUPS), limits=Limits(versions=1)))
    assert isinstance(job.server, Tree)
    assert job.server.root.server.transfer is None


def test_settings_reach_into_the_hierarchy(encoder: Path) -> None:
    run = override(
        grouped_run(encoder), ["hierarchy.rounds=3", "hierarchy.link=None", "hierarchy.schedule=FedFa(window=2)"]
    )
    assert (run.hierarchy.rounds, run.hierarchy.link, run.hierarchy.schedule) == (3, None, FedFa(window=2))
    assert override(tiny_run(encoder), ["hierarchy=Hierarchy(rounds=4)"]).hierarchy == Hierarchy(rounds=4)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_one_group_of_all_answers_as_the_flat_run_to_the_byte(encoder: Path, tmp_path: Path) -> None:
    """A real model, one version: later ones differ, because moments begin anew with each task of an edge."""
    everybody: dict[str, Any] = {"limits": Limits(versions=1), "held_out": 0.0, "schedule": Rounds(cohort_size=6)}
    answers = []
    for name, how in (("flat", None), ("tree", Hierarchy(rounds=1))):
        prepare(tiny_run(encoder, hierarchy=how, **everybody)).execute(tmp_path / name, report=False)
        trace = lines_of(tmp_path / name / "trace.jsonl")
        answers.append([(step["time"], step["event"]) for step in trace if step["event"]["type"] == "UpdateArrived"])
    assert len(answers[0]) == 6
    assert answers[0] == answers[1]


def test_the_final_adapter_is_the_roots(recorded: Path) -> None:
    """Inner versions are told, and are no versions of the run."""
    trace = lines_of(recorded / "trace.jsonl")
    commands = [command for step in trace for command in step["commands"]]
    assert [c["version"] for c in commands if c["type"] == Publish.__name__] == [1, 2, 3, 4, 5, 6]
    inner = [c for c in commands if c["type"] == "InsideEdge" and c["command"]["type"] == Publish.__name__]
    assert {c["command"]["version"] for c in inner} == {1, 2}
    assert len(inner) >= 12


# Moments -------------------------------------------------------------------------------------------------------------------


@dataclass
class Watching:
    """A real trainer; notes for each task how many steps the moments had that it began with (0: none of them were of use)."""

    inner: Any
    began: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))

    def train(self, work: Sequence[tuple[Task, ClientState]]) -> list[tuple[Result, ClientState]]:
        """Passed on and noted."""
        for task, local in work:
            goes_on = local.basis == task.start.basis and bool(local.moments)
            steps = next(iter(local.moments.values()))["step"] if goes_on else torch.tensor(0.0)
            self.began[task.client].append((task.version, int(steps)))
        trained: list[tuple[Result, ClientState]] = self.inner.train(work)
        return trained


def test_moments_live_through_inner_rounds_and_begin_anew_with_each_outer_task(encoder: Path) -> None:
    base = base_of(encoder)
    own = {name: Profile(name, 30, up_bps=1e7, down_bps=1e7) for name in ("a", "b")}
    given = {"start": initial_adapter(base, 4), "shape": base.shape(), "assign": Plan(RandomRank(4, 4), 6)}
    flat = toys.server(Rounds(cohort_size=1), limits=Limits(versions=2), **given)
    tree = Hierarchy(rounds=3).over(flat, {"edge0": tuple(own.values())})
    trainer, log = Watching(trainer_of(base)), Log()
    Simulation(tree, trainer, World(), own, lambda model: {"loss": 0.0}, log).run()
    assert trainer.began["a"] == trainer.began["b"] == [(0, 0), (1, 2), (2, 4)] * 2
