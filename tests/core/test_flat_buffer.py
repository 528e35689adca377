"""One buffer for all tensors: the same numbers, the same bits, one layout a form."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedloom.aggregate.fedit import FedIT
from fedloom.aggregate.shared.merge_terms import SMALL, weighted_adapters
from fedloom.core import fingerprint, message_size, validate_answer
from fedloom.core.change_norms import change_norms
from fedloom.core.flat_buffer import ALIGNED, FlatTensors
from fedloom.core.lora import (
    Adapter,
    Factor,
    cut_adapter,
    from_tensors,
    lay_flat,
    map_tensors,
    named_tensors,
    take_sides,
    view_as_adapter,
)
from fedloom.core.types import Rules, Task
from tests.support.toys import adapter, answers, changed, make_result, make_task, mean_of

ODD = {"a": (7, 3), "b": (3, 7), "c": (7, 3), "d": (1, 1), "e": (40, 9)}
"""Sizes that fill no 64 bytes, two layers of one shape, and names that are not in the order of the groups."""


def pair(seed: int = 0, rank: int = 3) -> tuple[Adapter, Adapter]:
    """The same adapter apart and in one buffer."""
    apart = adapter(rank, seed, ODD)
    return apart, lay_flat(apart)


def buffer_of(one: Adapter) -> FlatTensors:
    assert one.flat is not None
    return one.flat


def apart(flat: Adapter) -> Adapter:
    """The same numbers in tensors of their own."""
    return map_tensors(torch.clone, flat)


def task_of(start: Adapter, **rules: Any) -> Task:
    task = make_task(start, 3)
    return replace(task, start=replace(task.start, rules=Rules(**rules)))


def test_a_flat_adapter_is_the_same_adapter() -> None:
    one, flat = pair()
    assert flat.flat is not None
    assert one.flat is None
    assert [*named_tensors(flat)] == [*named_tensors(one)]
    assert [*flat.factors] == [*one.factors] == [*ODD]
    assert all(tensor.equal(named_tensors(flat)[name]) for name, tensor in named_tensors(one).items())
    assert flat.factors["a"] is flat.factors["a"]
    assert fingerprint.fingerprint(one) == fingerprint.fingerprint(flat)


def test_tensors_begin_where_memory_of_their_own_would_and_gaps_are_zero() -> None:
    """Some kernels round differently at another alignment."""
    _, flat = pair()
    layout, buffer = buffer_of(flat).layout, buffer_of(flat).buffer.clone()
    assert all(place % ALIGNED == 0 for place, _ in layout.places.values())
    for group in layout.groups:
        group.view(buffer).zero_()
    assert not bool(buffer.any())


def test_adapters_of_one_form_share_a_layout_also_in_another_process() -> None:
    (_, one), (_, other), (_, lower) = pair(0), pair(1), pair(2, rank=2)
    again: Adapter = pickle.loads(pickle.dumps(one))
    assert buffer_of(one).layout is buffer_of(other).layout is buffer_of(again).layout
    assert buffer_of(lower).layout is not buffer_of(one).layout
    assert fingerprint.fingerprint(again) == fingerprint.fingerprint(one)


def test_the_order_of_layers_is_a_part_of_the_form() -> None:
    one, flat = pair()
    turned = lay_flat(Adapter(dict(reversed(list(one.factors.items()))), one.dense))
    assert [*turned.factors] == [*turned.factors.keys()] == [*reversed(ODD)]
    assert buffer_of(turned).layout is not buffer_of(flat).layout


@pytest.mark.parametrize(
    "odd",
    [
        lambda x: x.double() if x.ndim == 1 else x,
        lambda x: x.T.contiguous().T if x.ndim == 2 else x,
        lambda x: x.clone().requires_grad_(),
    ],
    ids=["types", "order", "gradient"],
)
def test_tensors_that_are_not_alike_stay_apart(odd: Any) -> None:
    """A copy in another order in memory would make products round differently."""
    strange = map_tensors(odd, adapter(3, 0, ODD))
    assert lay_flat(strange) is strange


def test_an_adapter_with_a_part_of_the_tensors_is_not_flat() -> None:
    _, flat = pair()
    assert Adapter(flat.factors).flat is None
    assert replace(flat, dense={}).flat is None
    assert replace(flat).flat is flat.flat
    assert cut_adapter(flat, 2).flat is None
    assert cut_adapter(flat, 3) is flat
    assert take_sides((), adapter(3), flat) is flat


def test_a_buffer_may_be_a_part_of_a_larger_one() -> None:
    one, flat = pair()
    part = torch.cat([torch.ones(32), buffer_of(flat).buffer, torch.ones(32)])[32:-32]
    again = view_as_adapter(FlatTensors(part, buffer_of(flat).layout))
    assert fingerprint.fingerprint(again) == fingerprint.fingerprint(one)
    assert all(tensor.equal(named_tensors(again)[name]) for name, tensor in named_tensors(one).items())


def test_a_buffer_of_another_size_is_refused() -> None:
    flat = buffer_of(pair()[1])
    for wrong in (flat.buffer[1:], flat.buffer.repeat(2)[::2]):
        with pytest.raises(ValueError, match="numbers in one row"):
            FlatTensors(wrong, flat.layout)


@pytest.mark.parametrize("count", [1, 5, 11])
@pytest.mark.parametrize("width", [5, 64, SMALL // 11 // 3 + 1])
def test_a_mean_in_one_buffer_has_the_bits_of_the_mean_apart(count: int, width: int) -> None:
    """On both sides of the size up to which tensors are added together, with sizes that fill no vector."""
    layers = {**ODD, "wide": (width, 2), "wider": (width, 2)}
    ones = [adapter(3, seed, layers) for seed in range(count)]
    shares = [(-0.7) ** k for k in range(count)]
    expected = weighted_adapters(ones[0], list(zip(shares, ones, strict=True)))
    flats = [lay_flat(one) for one in ones]
    found = weighted_adapters(flats[0], list(zip(shares, flats, strict=True)))
    assert found.flat is not None
    assert expected.flat is None
    assert all(tensor.equal(named_tensors(found)[name]) for name, tensor in named_tensors(expected).items())


def test_fedit_gives_the_same_bits_and_keeps_the_basis() -> None:
    """Also where a direction is dead and drawn anew, and where the model or an answer is not in one buffer."""
    one = adapter(3, 0, ODD)
    dead = Adapter(
        {n: Factor(f.down * torch.tensor([[1.0], [1.0], [0.0]]), f.up) for n, f in one.factors.items()}, one.dense
    )
    for start in (one, from_tensors(one, {**named_tensors(dead), "a.up": torch.zeros(7, 3)})):
        plain, flat = FedIT().init(start), FedIT().init(lay_flat(start))
        merge = mean_of(answers(FedIT(), plain, (3, 2, 3)))
        models = [FedIT().merge(model, merge) for model in (plain, flat)]
        assert models[0].basis == models[1].basis
        assert fingerprint.fingerprint(models[0].adapter) == fingerprint.fingerprint(models[1].adapter)


def few_rows(start: Adapter) -> Adapter:
    """One number of `down`, one of `up` and nothing of the head changed."""
    tensors = {name: tensor.clone() for name, tensor in named_tensors(start).items()}
    tensors["a.down"][1, 2] += 1.0
    tensors["e.up"][17, 0] += 1.0
    return from_tensors(start, tensors)


@pytest.mark.parametrize(
    "answer",
    [few_rows, lambda s: changed(s, 1, 0.1), lambda s: s, lambda s: take_sides(("up",), changed(s, 1, 0.1), s)],
)
def test_what_is_asked_of_an_answer_has_the_same_reply_in_one_buffer(answer: Any) -> None:
    start = adapter(3, 0, ODD)
    came = answer(start)
    for rules in ({}, {"frozen": ("down", "dense")}):
        plain, flat = task_of(start, **rules), task_of(lay_flat(start), **rules)
        replies = [
            (
                validate_answer.why_invalid(task, result),
                message_size.upload_size(task, result),
                message_size.download_size(task.start),
            )
            for task, result in ((plain, make_result(came)), (flat, make_result(lay_flat(apart(came)))))
        ]
        assert replies[0] == replies[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6, -1e30])
def test_one_bad_number_among_all_is_found_and_named(value: float) -> None:
    start = lay_flat(adapter(3, 0, ODD))
    tensors = {name: tensor.clone() for name, tensor in named_tensors(start).items()}
    tensors["d.up"][0, 2] = value
    bad = lay_flat(from_tensors(start, tensors))
    assert bad.flat is not None
    reason = validate_answer.why_invalid(task_of(start), make_result(bad))
    assert reason is not None
    assert reason.startswith("d.up ")


@pytest.mark.parametrize("odd", [{**ODD, "a": (3, 7)}, {**ODD, "f": (2, 2)}, dict(list(ODD.items())[1:])], ids=str)
def test_an_answer_of_another_form_is_refused(odd: dict[str, tuple[int, int]]) -> None:
    start, other = lay_flat(adapter(3, 0, ODD)), lay_flat(adapter(3, 1, odd))
    assert buffer_of(other).layout is not buffer_of(start).layout
    assert validate_answer.why_invalid(task_of(start), make_result(other)) is not None


def test_a_buffer_that_asks_for_a_gradient_is_no_valid_answer() -> None:
    start = lay_flat(adapter(3, 0, ODD))
    flat = buffer_of(start)
    forged = view_as_adapter(FlatTensors(flat.buffer.clone().requires_grad_(), flat.layout))
    assert "gradient" in str(validate_answer.why_invalid(task_of(start), make_result(forged)))


@pytest.mark.parametrize("by", [0.0, 1e-6, 0.1])
def test_norms_of_a_change_are_those_of_float64(by: float) -> None:
    """Products too, where layers are grouped otherwise by their one side than by the other."""
    start = adapter(3, 0, ODD)
    came = changed(start, 1, by)
    found = change_norms(task_of(lay_flat(start)), make_result(lay_flat(came)))
    numbers = sum(f.up.numel() + f.down.numel() for f in start.factors.values())
    products = factors = 0.0
    for name, new in came.factors.items():
        old = start.factors[name]
        products += float((new.up.double() @ new.down.double() - old.up.double() @ old.down.double()).square().sum())
        factors += sum(
            float((getattr(new, s).double() - getattr(old, s).double()).square().sum()) for s in ("up", "down")
        )
    assert found.products == pytest.approx((products / numbers) ** 0.5, rel=1e-5)
    assert found.factors == pytest.approx((factors / numbers) ** 0.5, rel=1e-5)
