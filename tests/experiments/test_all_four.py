"""All four at once, and FedFa on a language model: equal terms for every method, and claims that follow the times."""

from __future__ import annotations

import math
from typing import Any

import all_four
import fedfa_llm
import pytest
from fedfa_speed import IN_FLIGHT, per_version
from hierfedlora_llm import COHORT, EVERY, STARTED, UPLOADS


def line(cell: str, found: list[float], seed: int = 0) -> dict[str, Any]:
    """A run with these test losses after its base's, a second apart."""
    scores = [{"loss": loss, "label_accuracy": 0.5} for loss in (9.0, *found)]
    curve = [[place, float(place), 0.0] for place in range(len(scores))]
    return {"cell": cell, "seed": seed, "scores": scores, "curve": curve, "work": [[0, 0, 0]] * len(scores)}


def test_every_run_of_all_four_has_as_many_tasks_and_devices_at_work() -> None:
    for name, what in all_four.METHODS.items():
        method = what.method
        assert UPLOADS % method.answers == 0, name
        assert EVERY % method.answers == 0, name
        inside = method.hierarchy.schedule.max_in_flight if method.hierarchy else 1  # type: ignore[union-attr]
        at_work = getattr(method.schedule, "max_in_flight", 0) * inside
        assert at_work == (COHORT if name == "fedit" else STARTED), name


@pytest.mark.parametrize("name", fedfa_llm.USED)
def test_every_run_of_fedfa_has_as_many_uploads_between_scores(name: str) -> None:
    schedule = fedfa_llm.METHODS[name].schedule
    assert fedfa_llm.EVERY % per_version(schedule) == 0
    assert fedfa_llm.UPLOADS % fedfa_llm.EVERY == 0
    assert IN_FLIGHT == 20


def test_all_four_are_compared_with_the_best_baseline_that_waits_for_nobody() -> None:
    low = all_four.TARGET
    after = {2: [low + 1, low, low, low], 3: [low + 1, low + 1, low, low], 1: [low, low, low, low]}
    order = {"ours": 1, "all-four": 1, "fedbuff": 3, "fedfa": 2, "ours-ungrouped": 3, "fedit": 3, "hierfedlora": 2}
    found = [line(name, after[at], seed) for seed in (0, 1) for name, at in order.items()]
    judged = {claim.name: claim for claim in all_four.claims(found)}
    assert all_four.hardest(found) == "fedfa"
    for name in ("asynchronous", "papers"):
        assert judged[f"all-four-{name}"].values == pytest.approx([math.log(2)] * 2)
    assert judged["all-four-fedit"].values == pytest.approx([math.log(3)] * 2)
    assert judged["all-four-asynchronous"].margin == pytest.approx(math.log(all_four.WANTED))


def test_fedfa_on_a_language_model_is_judged_on_each_split_apart() -> None:
    goal = fedfa_llm.TARGETS["iid"]
    found = [
        line(f"{name}/iid", [goal + 1] * wait + [goal] * 3, seed)
        for seed in (0, 1)
        for name, wait in {"fedavg": 7, "fedfa": 1, "fedfa+avg": 0, "ours": 1}.items()
    ]
    judged = {claim.name: claim for claim in fedfa_llm.claims(found)}
    assert judged["fedfa-llm-vs-fedavg-iid"].values == pytest.approx([math.log(4)] * 2)
    assert judged["fedfa-llm-avg-vs-fedavg-iid"].values == pytest.approx([math.log(8)] * 2)
    assert judged["fedfa-llm-ours-iid"].values == pytest.approx([-math.log(2)] * 2)
    assert {claim.seeds for name, claim in judged.items() if name.endswith("dir01")} == {0}
