"""Fed-PLoRA (arXiv 2602.16936): R one-rank modules; a client draws r_i of them, folds the others, and nothing is lost."""

from __future__ import annotations

import pytest
import torch

from fedloom.aggregate.fedplora import FedPLoRA
from fedloom.core.types import Update
from tests.support.toys import LAYERS, adapter, answers, distance, fresh, function, mean_of, sent

METHOD = FedPLoRA()


def drawn(update: Update) -> tuple[int, ...]:
    assert update.task.start.directions
    return update.task.start.directions


def test_modules_are_drawn_per_task_and_from_all() -> None:
    model = METHOD.init(adapter(8))
    draws = [sent(METHOD, model, 2, number).start.directions or () for number in range(1, 41)]
    assert all(len(set(slots)) == 2 and list(slots) == sorted(slots) for slots in draws)
    assert {slot for slots in draws for slot in slots} == set(range(8))
    assert draws[0] == sent(METHOD, model, 2, 1).start.directions


def test_moments_are_kept_for_the_same_modules_only() -> None:
    model = METHOD.init(adapter(8))
    starts = [sent(METHOD, model, 3, number).start for number in range(1, 20)]
    assert len({start.basis for start in starts}) == len({start.directions for start in starts}) > 5


@pytest.mark.parametrize("rank", [1, 3, 5, 8])
def test_every_client_runs_the_whole_model(rank: int) -> None:
    """W_i = W0 + sum over j not in K_i of B_j A_j: no initialisation noise, whatever the rank."""
    model = METHOD.init(adapter(8))
    model = METHOD.merge(model, mean_of(answers(METHOD, model, (2, 4))))
    for number in range(3):
        start = sent(METHOD, model, rank, number).start
        assert distance(function(start), function(model)) < 1e-6
        for name, f in start.train.factors.items():
            assert f.down.equal(model.adapter.factors[name].down[list(start.directions or ())])
        assert (start.fold is None) == (rank == 8)


def test_modules_are_averaged_over_those_who_trained_them_and_others_stay_to_the_bit() -> None:
    """B_j = mean over Q_j of B_ij, A_j likewise; untouched if Q_j is empty."""
    model = METHOD.init(adapter(8))
    updates, weights = answers(METHOD, model, (3, 2, 4)), (0.5, 0.2, 0.3)
    after = METHOD.merge(model, mean_of(updates, weights)).adapter
    assert 0 < len({slot for update in updates for slot in drawn(update)}) < 8
    for name, own in model.adapter.factors.items():
        for slot in range(8):
            having = [(w, u, drawn(u).index(slot)) for w, u in zip(weights, updates, strict=True) if slot in drawn(u)]
            total = sum(w for w, _, _ in having)
            if not having:
                assert after.factors[name].up[:, slot].equal(own.up[:, slot])
                assert after.factors[name].down[slot].equal(own.down[slot])
                continue
            ups = [w / total * u.result.adapter.factors[name].up[:, at] for w, u, at in having]
            torch.testing.assert_close(after.factors[name].up[:, slot], torch.stack(ups).sum(0))


def test_a_merge_of_low_ranks_loses_nothing_of_the_model() -> None:
    """Truncating methods would lose what rank 1 cannot carry; here the change of the whole is the change of one module."""
    model = METHOD.init(adapter(8))
    (update,) = answers(METHOD, model, (1,))
    after = function(METHOD.merge(model, mean_of([update])))
    for name in LAYERS:
        assert int(torch.linalg.matrix_rank(after[name] - function(model)[name], atol=1e-4)) <= 2  # one gone, one come
        assert float((after[name] - function(model)[name]).norm()) > 0.1


def test_a_fresh_model_gives_everybody_a_fresh_adapter() -> None:
    start = sent(METHOD, METHOD.init(fresh(8)), 3).start
    assert all(float(p.norm()) == 0 for p in function(start).values())
    assert all(float(f.down.norm(dim=1).min()) > 0.1 for f in start.train.factors.values())
