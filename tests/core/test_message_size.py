"""Bytes on the wire, worked out by hand: two layers of 12 x 10 and 10 x 14, a head of 3, four bytes a number."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fedloom.aggregate.fedex import FedEx
from fedloom.aggregate.fedit import FedIT
from fedloom.aggregate.fedplora import FedPLoRA
from fedloom.aggregate.fedsa import FedSA
from fedloom.aggregate.ffa import FFA
from fedloom.aggregate.flora import FLoRA
from fedloom.aggregate.hetlora import HetLoRA
from fedloom.aggregate.hlora import HLoRA
from fedloom.aggregate.lora_a2 import LoRAA2
from fedloom.aggregate.rolora import RoLoRA
from fedloom.aggregate.scaffold import Scaffold
from fedloom.core import message_size
from fedloom.core.codec import Summed
from fedloom.core.lora import Adapter, Factor, cut_factor
from fedloom.core.message_size import MessageSize
from fedloom.core.types import Task, TaskStart, Update
from tests.support.toys import adapter, answers, changed, fresh, make_result, make_task, mean_of, returned, sent

DOWN, UP, HEAD = 10 + 14, 12 + 10, 3
"""Numbers of one direction over both layers, on either side; and of the head."""


def wire(numbers: int, dense: int = HEAD) -> MessageSize:
    return MessageSize(4 * numbers, 4 * dense)


def answer(method: Any, rank: int = 4) -> Update:
    """What a client of this rank gives back in the first round."""
    return answers(method, method.init(adapter(8)), (rank,))[0]


ROUND_TRIPS = [
    (FedIT(), 4 * (DOWN + UP) + HEAD, 4 * (DOWN + UP) + HEAD, HEAD),
    (HLoRA(), 4 * (DOWN + UP) + HEAD, 4 * (DOWN + UP) + HEAD, HEAD),
    (FFA(), 4 * UP + HEAD, 4 * UP + HEAD, HEAD),  # `down` follows from the seed, and is not changed
    (RoLoRA(), 4 * (DOWN + UP) + HEAD, 4 * UP + HEAD, HEAD),  # the frozen side goes down: it is another one each round
    (FedSA(), 4 * DOWN, 4 * DOWN, 0),  # `up` and the head begin as the seed says, and stay private
    (LoRAA2(freeze_head=True), 8 * (DOWN + UP), 8 * UP, 0),  # everybody holds rank 8; here all were chosen
    (FedPLoRA(), 4 * (DOWN + UP) + HEAD + 4 * (DOWN + UP), 4 * (DOWN + UP) + HEAD, HEAD),  # the other four in the fold
    (Scaffold(), 2 * (4 * (DOWN + UP) + HEAD), 2 * (4 * (DOWN + UP) + HEAD), HEAD),
    (Scaffold(FFA()), 2 * (4 * UP + HEAD), 2 * (4 * UP + HEAD), HEAD),
    (Scaffold(FedSA()), 2 * 4 * DOWN, 2 * 4 * DOWN, 0),
]


@pytest.mark.parametrize(("method", "down", "up", "head"), ROUND_TRIPS, ids=lambda v: str(v)[:40])
def test_what_a_method_sends_down_and_up_at_rank_4(method: Any, down: int, up: int, head: int) -> None:
    update = answer(method)
    if isinstance(method, Scaffold):
        update = replace(update, result=replace(update.result, control=update.task.start.control))
    assert message_size.download_size(update.task.start) == wire(
        down, 0 if "dense" in update.task.start.seeded else HEAD
    )
    assert message_size.upload_size(update.task, update.result) == wire(up, head)


def test_an_answer_that_changed_nothing_costs_nothing() -> None:
    task = sent(FedIT(), FedIT().init(adapter(8)), 4)
    assert message_size.upload_size(task, make_result(task.start.train)) == MessageSize(0, 0)


@pytest.mark.parametrize("chosen", [{"query": [1]}, {"query": [0, 3], "value": [2]}, {"value": [0, 1, 2, 3]}])
def test_rows_and_columns_that_stayed_are_not_sent(chosen: dict[str, list[int]]) -> None:
    """LoRA-A2: only the selected slots go up; a row of `down` has d_in numbers, a column of `up` d_out."""
    task, factors = make_task(adapter(4), 4), {}
    for name, f in task.start.train.factors.items():
        up, down = f.up.clone(), f.down.clone()
        up[:, chosen.get(name, [])] += 1.0
        down[chosen.get(name, [])[:1], 0] += 1.0  # one entry is one row
        factors[name] = Factor(down, up)
    rows = {"query": 10, "value": 14}
    columns = {"query": 12, "value": 10}
    numbers = sum(rows[n] + columns[n] * len(slots) for n, slots in chosen.items())
    given = make_result(Adapter(factors, task.start.train.dense))
    assert message_size.upload_size(task, given) == wire(numbers, 0)


@pytest.mark.parametrize(("side", "numbers"), [("down", 4 * UP), ("up", 4 * DOWN), ("dense", 4 * (DOWN + UP))])
def test_a_seeded_side_is_not_sent_down(side: Any, numbers: int) -> None:
    head = 0 if side == "dense" else HEAD
    assert message_size.download_size(TaskStart(adapter(4), "0", seeded=(side,))) == wire(numbers + head, head)


@pytest.mark.parametrize(
    ("rank", "query", "value"),
    [
        (1, 10 + 12, 14 + 10),
        (5, 5 * (10 + 12), 5 * (14 + 10)),  # 110 < 120 and 120 < 140
        (6, 120, 140),  # 6 * 22 > 12 * 10 and 6 * 24 > 10 * 14: dense
    ],
)
def test_a_fold_is_sent_in_the_smaller_of_its_two_forms(rank: int, query: int, value: int) -> None:
    fold = Adapter(adapter(rank, 5).factors)
    assert message_size.download_size(TaskStart(adapter(4), "0", fold=fold)) == wire(
        4 * (DOWN + UP) + HEAD + query + value
    )


def test_the_stack_of_flora_grows_until_it_is_as_large_as_the_layers() -> None:
    method = FLoRA()
    model = method.init(fresh(8))
    sizes = []
    for turn in range(3):
        sizes.append(message_size.download_size(sent(method, model, 2).start).total)
        model = method.merge(model, mean_of(answers(method, model, (1, 2), 10 * turn + 1)))
    own = HEAD  # the fresh adapter follows from its seed
    assert sizes == [4 * own, 4 * (own + 3 * (DOWN + UP)), 4 * (own + 12 * 10 + 10 * 14)]


def test_the_fold_of_fedex_holds_what_a_low_rank_cannot_train() -> None:
    start = sent(FedEx(), FedEx().init(adapter(8)), 6).start
    assert message_size.download_size(start) == wire(6 * (DOWN + UP) + HEAD + 2 * (DOWN + UP))


def test_a_pruned_answer_costs_what_is_left() -> None:
    task = sent(HetLoRA(), HetLoRA().init(adapter(8)), 4)
    trained = changed(task.start, 1)
    pruned = returned(task, Adapter({n: cut_factor(f, 3) for n, f in trained.factors.items()}, trained.dense))
    assert message_size.upload_size(task, pruned.result) == wire(3 * (DOWN + UP) + HEAD)


def spoiled(task: Task) -> list[Any]:
    good = changed(task.start, 1)
    return [
        None,
        make_result(None),  # type: ignore[arg-type]
        make_result(good, examples=0),
        make_result(Adapter({}, {})),
        make_result(adapter(3)),
        make_result(Adapter({n: Factor(f.down * float("nan"), f.up) for n, f in good.factors.items()}, good.dense)),
        make_result(good, control=good),
    ]


@pytest.mark.parametrize("number", range(7))
def test_an_answer_that_will_be_refused_counts_as_if_all_had_been_sent(number: int) -> None:
    task = make_task(adapter(4), 4)
    assert message_size.upload_size(task, spoiled(task)[number]) == wire(4 * (DOWN + UP) + HEAD)


def test_a_refused_answer_to_a_start_with_a_control_variate_counts_double() -> None:
    task = sent(Scaffold(), Scaffold().init(adapter(8)), 4)
    assert message_size.upload_size(task, make_result(changed(task.start, 1))) == wire(2 * (4 * (DOWN + UP) + HEAD))


def test_an_answer_that_is_only_summed_has_all_numbers_of_the_trained_sides_in_bits() -> None:
    start = replace(sent(FFA(), FFA().init(adapter(8)), 4).start, codec=Summed(16, 1.0, 10))
    task = replace(make_task(adapter(4), 4), start=start)
    bits = 20 * (4 * UP + HEAD)
    expected = MessageSize(-(-bits // 8), -(-20 * HEAD // 8))
    assert message_size.upload_size(task, make_result(start.train)) == expected == message_size.summed_size(start)
