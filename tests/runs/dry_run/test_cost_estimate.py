"""A dry run says what the run then costs: tasks, bytes and virtual time to the digit, real time and memory roughly."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from fedloom.aggregate.fedsa import FedSA
from fedloom.aggregate.flora import FLoRA
from fedloom.aggregate.lora_a2 import LoRAA2
from fedloom.aggregate.rolora import RoLoRA
from fedloom.aggregate.scaffold import Scaffold
from fedloom.core.canary import Canary
from fedloom.core.codec import DeltaInt8, HalfChange
from fedloom.core.errors import Refused
from fedloom.core.limits import Limits
from fedloom.core.policies import Aggregator
from fedloom.data.instructions import Instructions
from fedloom.data.partition import IID
from fedloom.hierarchy.hierarchy import Hierarchy
from fedloom.plan.budget import Plan
from fedloom.plan.depth import FixedDepth
from fedloom.plan.rank import FixedRank
from fedloom.runs.dry_run.cost_estimate import CostEstimate, dry_run, estimate_cost
from fedloom.runs.prepare import prepare
from fedloom.runs.run import Run
from fedloom.schedule.fedbuff import FedBuff
from fedloom.schedule.rounds import Rounds
from fedloom.simulate.faults import Faults
from fedloom.train.settings import Training
from tests.support.tiny_models import tiny_run, toy_answers
from tests.support.toys import aggregators

ESTIMATE = CostEstimate(
    name="mine",
    clients=8,
    ranks={2: 4, 4: 2, 8: 2},
    versions=6,
    tasks=24,
    steps=144,
    tokens=69_980,
    bytes_up=3_410_352,
    bytes_down=3_908_160,
    virtual_seconds=121.8,
    loading_seconds=3.2,
    training_seconds=45.8,
    scoring_seconds=13.1,
    server_seconds=0.2,
    memory=838_000_000,
    accelerator_memory=None,
    client_memory=228_000_000,
    short_of_memory=2,
    cut=("12 of 400 training examples: the end of the text is cut off to fit training.max_length=64.",),
    majority=0.158,
    majority_label="fault",
    simulated_share=0.5,
    assumptions=("Every version passes its canary.",),
)


def test_a_table_of_eighty_columns_says_all_of_it_and_what_is_estimated() -> None:
    shown = repr(ESTIMATE)
    assert max(map(len, shown.splitlines())) <= 80
    assert {name for name, _ in ESTIMATE.rows() if name} <= {line[:20].strip() for line in shown.splitlines()}
    assert "about 24 tasks" in shown
    assert "first 50.0\xa0% of the run" in shown
    assert "2 of 8 devices have less" in shown


def test_real_time_is_training_scoring_and_the_server() -> None:
    assert ESTIMATE.real_seconds == pytest.approx(59.1)
    assert not ESTIMATE.exact


def cost_of(run: Run, folder: Path) -> dict[str, Any]:
    """What a run had cost at its end, by its own log."""
    times = list[float]()
    prepare(run).execute(folder, [lambda now, *_: times.append(now)], report=False)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    tasks = [line for line in lines if line["kind"] == "task"]
    last = [line for line in lines if line["kind"] == "version"][-1]
    return {
        "versions": last["version"],
        "tasks": len(tasks),
        "bytes_up": sum(line["bytes_up"] for line in tasks),
        "bytes_down": sum(line["bytes_down"] for line in tasks),
        "virtual_seconds": times[-1],
    }


def assert_as_said(said: CostEstimate, was: dict[str, Any], room: float = 0.0) -> None:
    for name, figure in was.items():
        assert getattr(said, name) == pytest.approx(figure, rel=room, abs=0), name


ROOM = 1e-3
"""A row of few numbers, such as the bias of two labels, may come back from training as it was sent, and is then not sent back."""

RUNS: dict[str, dict[str, Any]] = {
    "rounds that leave the slowest out": {"schedule": Rounds(cohort_size=3, over_selection=1.5)},
    "asynchronous, eight bits": {"schedule": FedBuff(buffer_size=2, max_in_flight=4), "transfer": DeltaInt8()},
    "folds": {"aggregator": FLoRA(), "transfer": HalfChange()},
}
MORE_RUNS: dict[str, dict[str, Any]] = {
    "private sides": {"aggregator": FedSA()},
    "alternating sides": {"aggregator": RoLoRA()},
    "control variates": {"aggregator": Scaffold(clients=6)},
    "chosen directions": {"aggregator": LoRAA2()},
    "one block, one step": {"plan": Plan(FixedRank(4), local_steps=1, depth=FixedDepth(1))},
    "clients that vanish": {"faults": Faults(dropout=0.3, back_after=5.0)},
    "edges": {"hierarchy": Hierarchy()},
    "a limit of time": {"limits": Limits(versions=50, seconds=0.3)},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_counts_are_those_of_the_run(encoder: Path, tmp_path: Path, name: str) -> None:
    run = tiny_run(encoder, **RUNS[name])
    assert_as_said(dry_run(run), cost_of(run, tmp_path / "run"))


@pytest.mark.storms
@pytest.mark.parametrize("name", MORE_RUNS)
def test_counts_are_those_of_any_run(encoder: Path, tmp_path: Path, name: str) -> None:
    run = tiny_run(encoder, **MORE_RUNS[name])
    assert_as_said(dry_run(run), cost_of(run, tmp_path / "run"), ROOM)


@pytest.mark.storms
@pytest.mark.parametrize("method", aggregators(), ids=lambda method: type(method).__name__)
def test_counts_of_every_method_are_those_of_the_run_or_said_to_be_estimated(
    encoder: Path, tmp_path: Path, method: Aggregator
) -> None:
    if any(part.name == "clients" for part in fields(method)):
        method = replace(method, clients=6)
    plan, schedule = Plan(FixedRank(4), local_steps=4), Rounds(cohort_size=5)
    run = tiny_run(encoder, aggregator=method, plan=plan, schedule=schedule)
    said = dry_run(run)
    assert_as_said(said, cost_of(run, tmp_path / "run"), ROOM if said.exact else 0.3)


@pytest.mark.slow
def test_of_a_writer_it_says_what_is_cut_and_leaves_nothing_behind(
    generator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = Plan(FixedRank(2), local_steps=3, depth=FixedDepth(1))
    data, training = Instructions(toy_answers(60)), Training(max_length=14, batch_size=4)
    run = tiny_run(generator, data=data, partition=IID(3), plan=plan, training=training, canary=Canary(examples=2))
    said = dry_run(run)
    assert said.majority is None
    assert any("training.max_length=14" in sentence for sentence in said.cut)
    assert said.assumptions == ("Every version passes its canary.",)
    assert min(said.training_seconds, said.scoring_seconds, said.server_seconds) > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_long_run_is_cut_and_what_it_costs_follows_from_the_part_seen(encoder: Path) -> None:
    whole = dry_run(tiny_run(encoder, limits=Limits(versions=8)))
    part = estimate_cost(prepare(tiny_run(encoder, limits=Limits(versions=8))), patience=0.0)
    assert part.simulated_share == 1 / 8
    assert not part.exact
    for name in ("versions", "tasks", "steps", "bytes_up", "bytes_down"):
        assert getattr(part, name) == pytest.approx(getattr(whole, name), rel=0.3)


@pytest.mark.slow
def test_a_run_that_goes_on_is_refused(finished: Path, encoder: Path) -> None:
    job = prepare(tiny_run(encoder, name="finished", seed=5), resume=finished, more=1)
    with pytest.raises(Refused, match="leave --resume out"):
        estimate_cost(job)
