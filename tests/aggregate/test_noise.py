"""Noise (arXiv 1710.06963, Alg. 1): N(0, (z S max_k p_k)^2) on the mean of clipped changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedloom.aggregate.clip import Clip
from fedloom.aggregate.fedit import FedIT
from fedloom.aggregate.fedplora import FedPLoRA
from fedloom.aggregate.fedsa import FedSA
from fedloom.aggregate.ffa import FFA
from fedloom.aggregate.hetlora import HetLoRA
from fedloom.aggregate.hlora import HLoRA
from fedloom.aggregate.momentum import Momentum
from fedloom.aggregate.noise import Noise
from fedloom.aggregate.rolora import RoLoRA
from fedloom.aggregate.scaffold import Scaffold
from fedloom.aggregate.shared.wrapper import euclidean_norm
from fedloom.core.errors import Refused
from fedloom.core.lora import map_tensors
from fedloom.core.policies import Aggregator, Merge
from fedloom.core.types import Model
from tests.support import toys
from tests.support.toys import adapter, answers, fresh, mean_of, returned, sent

WIDE = {"wide": (400, 300), "tall": (500, 200)}
CLIP = Clip(FedIT(), 0.5)


def drawn(method: Noise, model: Model, merge: Merge) -> dict[str, Tensor]:
    """What the noise added, by side."""
    plain, noisy = method.inner.merge(model, merge).adapter, method.merge(model, merge).adapter
    found = {"head": noisy.dense["head"].double() - plain.dense["head"].double()}
    for side in ("down", "up"):
        pairs = [(getattr(noisy.factors[n], side), getattr(f, side)) for n, f in plain.factors.items()]
        found[side] = torch.cat([(a.double() - b.double()).flatten() for a, b in pairs])
    return found


@pytest.mark.parametrize("as_delta", [False, True])
@pytest.mark.parametrize(("z", "norm", "step", "weights"), [
    (1.0, 0.5, 1.0, (1.0,)), (3.0, 0.5, 1.0, (0.5, 0.5)), (1.0, 2.0, 0.25, (0.2, 0.7, 0.1)),
])  # fmt: skip
def test_the_deviation_is_z_times_norm_times_step_times_the_largest_weight(
    z: float, norm: float, step: float, weights: tuple[float, ...], as_delta: bool
) -> None:
    method = Noise(Clip(FedIT(), norm), z)
    model = method.init(adapter(8, layers=WIDE))
    merge = mean_of(
        [returned(sent(method, model, 8, k)) for k in range(len(weights))], weights, step=step, as_delta=as_delta
    )
    noise = drawn(method, model, merge)
    wanted = z * norm * step * max(weights)
    for side in ("down", "up"):  # 4000 and 7200 entries: 4 standard errors
        entries = noise[side]
        assert float(entries.std()) == pytest.approx(wanted, rel=4 / (2 * len(entries)) ** 0.5)
        assert abs(float(entries.mean())) < 4 * wanted / len(entries) ** 0.5
        fourth = float(entries.pow(4).mean()) / wanted**4
        assert fourth == pytest.approx(3.0, abs=0.4)  # a Gaussian, not any draw of this deviation
    assert bool((noise["head"].abs() > 0).all())


def test_a_client_with_two_answers_in_a_buffer_weighs_what_both_weigh() -> None:
    """A fast client answers twice before a buffer is full: taking it away takes both away."""
    model = Noise(CLIP).init(adapter(8, layers=WIDE))
    tasks = [replace(sent(CLIP, model, 8, k), client=client) for k, client in enumerate(("a", "b", "a"))]
    merge = mean_of([returned(task) for task in tasks], (0.3, 0.4, 0.3), step=0.5, as_delta=True)
    assert float(drawn(Noise(CLIP), model, merge)["up"].std()) == pytest.approx(0.5 * 0.5 * 0.6, rel=0.05)


@pytest.mark.parametrize(("inner", "frozen"), [(FFA(), "down"), (RoLoRA(), "down")], ids=["FFA", "RoLoRA"])
def test_a_side_that_nobody_trained_gets_none(inner: Aggregator, frozen: str) -> None:
    method = Noise(Clip(inner, 0.5))
    model = method.init(adapter(8))
    noise = drawn(method, model, mean_of(answers(method, model, (2, 8))))
    assert not bool(noise[frozen].any())
    assert bool((noise["up"].abs() > 0).all())
    after = method.merge(model, mean_of(answers(method, model, (2, 8))))
    assert all(f.down.equal(model.adapter.factors[n].down) for n, f in after.adapter.factors.items())


def test_every_merge_draws_anew_and_the_seed_decides() -> None:
    """The same draw twice would cancel out in the difference of two models."""
    model = Noise(CLIP).init(adapter(8))
    merge = mean_of([returned(sent(CLIP, model, 8))])
    first = drawn(Noise(CLIP), model, merge)["up"]
    assert first.equal(drawn(Noise(CLIP), model, merge)["up"])
    after = Noise(CLIP).merge(model, merge)
    again = drawn(Noise(CLIP), after, mean_of([returned(sent(CLIP, after, 8))]))["up"]
    other = drawn(Noise(CLIP, seed=1), model, merge)["up"]
    for one in (again, other):
        assert abs(float(torch.corrcoef(torch.stack([first, one]))[0, 1])) < 0.3


def test_no_two_sides_share_their_noise() -> None:
    method = Noise(CLIP)
    model = method.init(fresh(8))
    noise = drawn(method, model, mean_of([returned(sent(method, model, 8))]))
    entries = torch.cat([*noise.values()])
    assert len(set((entries * 1e5).round().tolist())) > 0.95 * len(entries)


@pytest.mark.parametrize("inner", [FedIT(), FFA(), Momentum()], ids=lambda m: type(m).__name__)
def test_an_inner_that_does_not_clip_is_refused(inner: Any) -> None:
    with pytest.raises(Refused, match=r"wrap Clip") as caught:
        Noise(inner)
    assert (caught.value.field, caught.value.value) == ("aggregator (Noise).inner", type(inner).__name__)


def test_products_are_refused_because_noise_on_a_factor_would_not_be_calibrated() -> None:
    with pytest.raises(Refused, match="calibrated") as caught:
        Noise(Clip(HLoRA()))
    assert (caught.value.field, caught.value.value) == ("aggregator (Noise).inner", "HLoRA")


@pytest.mark.parametrize("multiplier", [0.0, -1.0, float("nan")])
def test_a_multiplier_that_is_not_positive_is_refused(multiplier: float) -> None:
    with pytest.raises(Refused, match="multiplier"):
        Noise(multiplier=multiplier)


@pytest.mark.parametrize("inner", [HetLoRA(), FedPLoRA(), FedSA(), Momentum(), Scaffold()], ids=toys.called)
def test_a_method_in_which_a_client_weighs_more_than_its_weight_is_refused(inner: Aggregator) -> None:
    with pytest.raises(Refused, match="one client can change more"):
        Noise(Clip(inner))


PLAIN = [method for method in toys.aggregators() if getattr(method, "plain_mean", False)]


@pytest.mark.parametrize("inner", PLAIN, ids=toys.called)
@pytest.mark.parametrize("as_delta", [False, True])
def test_a_plain_mean_is_moved_by_one_client_by_no_more_than_the_noise_is_made_for(
    inner: Aggregator, as_delta: bool
) -> None:
    """The sensitivity: with one client's change taken away, the model moves by at most S * step * p_k."""
    clip = Clip(inner, 0.5)
    model = clip.init(adapter(8))
    tasks = [sent(clip, model, rank, rank) for rank in (2, 4, 8)]
    given = [returned(task, toys.changed(task.start, task.id, 3.0)) for task in tasks]
    weights = (0.5, 0.3, 0.2)
    all_of_them = clip.merge(model, mean_of(given, weights, step=0.7, as_delta=as_delta)).adapter
    for k, weight in enumerate(weights):
        others = [returned(task) if i == k else given[i] for i, task in enumerate(tasks)]
        without = clip.merge(model, mean_of(others, weights, step=0.7, as_delta=as_delta)).adapter
        moved = euclidean_norm(map_tensors(lambda a, b: a.double() - b.double(), all_of_them, without))
        assert 0.0 < moved <= 0.5 * 0.7 * weight * (1 + 1e-5)


def test_a_wrapper_does_not_wrap_itself() -> None:
    with pytest.raises(Refused, match="already"):
        Momentum(Momentum())
