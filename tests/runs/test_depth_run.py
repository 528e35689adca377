"""Whole runs in which clients train to different depths: repeated, resumed, replayed, and refused where a method cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedloom import (
    ACE,
    DepthByCapability,
    FedFa,
    FedSA,
    FixedDepth,
    FLoRA,
    HLoRA,
    Limits,
    Momentum,
    Plan,
    ProductDelta,
    RankByCapability,
    Refused,
    prepare,
)
from fedloom.plan.rank import FixedRank
from fedloom.runs.replay import Replayed, replay
from tests.support import toys
from tests.support.same_bytes import COMPARED
from tests.support.storms import one_in
from tests.support.tiny_models import tiny_encoder, tiny_run


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three blocks."""
    return tiny_encoder(tmp_path_factory.mktemp("three"), num_hidden_layers=3)


def mixed(encoder: Path, **more: Any) -> Any:
    """Phones train the top block alone, laptops and workstations all three."""
    plan = Plan(RankByCapability((2, 4, 8), upload_seconds=0.02), 4, DepthByCapability(seconds=0.12))
    return tiny_run(encoder, **({"plan": plan, "seed": 5} | more))


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, text) if line["kind"] == kind]


ASYNC: dict[str, Any] = {"schedule": FedFa(window=3, max_in_flight=4), "limits": Limits(versions=8)}


@pytest.mark.slow
@pytest.mark.parametrize("method", one_in(3, [ProductDelta(), FLoRA(), Momentum()]), ids=toys.called)
def test_a_run_of_mixed_depth_repeats_resumes_and_replays(encoder: Path, tmp_path: Path, method: Any) -> None:
    run = mixed(encoder, aggregator=method, **ASYNC)
    one = prepare(run).execute(tmp_path / "one", report=False, keep_updates=True)
    assert {line["depth"] for line in lines(one.folder, "task")} == {1, 3}
    assert replay(one.folder) == Replayed((one.folder / "trace.jsonl").read_bytes().count(b"\n"))

    def stop(now: float, event: Any, commands: Any) -> None:
        if any(getattr(command, "version", 0) == 5 for command in commands):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(run).execute(tmp_path / "two", [stop], report=False, checkpoint_seconds=0.0)
    prepare(run, resume=tmp_path / "two").execute(report=False)
    for name in COMPARED:
        assert (tmp_path / "two" / name).read_bytes() == (one.folder / name).read_bytes(), name
    shutil.rmtree(tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [pytest.param({}, id="rounds", marks=pytest.mark.storms), pytest.param(ASYNC, id="fedfa")]
)
def test_any_number_of_workers_writes_the_same_bytes(encoder: Path, tmp_path: Path, more: Any) -> None:
    run = mixed(encoder, engine=None, **more)
    folders = [prepare(run).execute(tmp_path / str(n), report=False, workers=n).folder for n in (1, 2)]
    for name in COMPARED:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def test_a_depth_saves_upload_and_time(encoder: Path, tmp_path: Path) -> None:
    taken = {}
    for depth in (1, 2, 3):
        plan = Plan(FixedRank(8), 4, FixedDepth(depth))
        done = prepare(mixed(encoder, plan=plan, limits=Limits(versions=1))).execute(
            tmp_path / str(depth), report=False
        )
        (version,) = lines(done.folder, "version")
        taken[depth] = version["bytes_up"] - version["bytes_up_dense"], version["time"]
        assert done.adapter.factors.keys() == prepare(mixed(encoder)).server.state.model.adapter.factors.keys()
    assert taken[1][0] * 3 == taken[2][0] * 3 // 2 == taken[3][0]
    assert taken[1][1] < taken[2][1] < taken[3][1]


@pytest.mark.parametrize("method", [FedSA(), ACE(clients=6)], ids=toys.called)
def test_methods_that_need_all_layers_are_refused_before_anything_runs(encoder: Path, method: Any) -> None:
    prepare(mixed(encoder, aggregator=method, plan=Plan(FixedRank(4), 4)))
    with pytest.raises(Refused, match=r"plan\.depth"):
        prepare(mixed(encoder, aggregator=method))


def test_a_depth_that_the_model_does_not_have_is_refused(encoder: Path) -> None:
    with pytest.raises(Refused, match=r"plan\.depth = 4: the model has 3 blocks; choose at most"):
        prepare(mixed(encoder, aggregator=HLoRA(), plan=Plan(FixedRank(4), 4, FixedDepth(4))))
