"""Two machines of a Ray cluster, as two raylets of this one: the same bytes when a machine dies, whether or not another comes."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

import pytest

from fedloom.train.workers.pool import WorkerPool, open_pool
from fedloom.train.workers.worker import Workers
from tests.support.hazards import Toy, toy_work

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (pip install ray)"),
]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A head with one processor."""
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(os.path.abspath, sys.path)))  # actors find `tests`
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield made
    ray.shutdown()
    made.shutdown()


def drawn(answers: Any) -> list[Any]:
    return [(result.examples, result.adapter.factors["only"].down.tolist(), state) for result, state in answers]


@pytest.mark.parametrize("comes_back", [False, True])
def test_a_machine_that_dies_costs_time_and_nothing_else(cluster: Any, comes_back: bool) -> None:
    """Its groups are trained again, by a new machine or by those that are left."""
    node = cluster.add_node(num_cpus=1)
    with open_pool(Toy(seconds=0.5), Workers.parse(f"2@ray:{cluster.address}")) as pool:
        assert isinstance(pool, WorkerPool)
        first = pool.train(toy_work(6))
        assert len({result.metrics["pid"] for result, _ in first}) == 2
        calls = pool.begin(later := toy_work(6, first=7), [0.0] * 6)
        cluster.remove_node(node, allow_graceful=False)  # SIGKILL
        if comes_back:
            cluster.add_node(num_cpus=1)
        second = [call() for call in calls]
        assert len(pool.started) == 1 + comes_back
    assert drawn(first + second) == drawn(Toy().train([*toy_work(6), *later]))
