"""Groups that are only summed: as exact as groups that are seen, whatever the order, masks or drop-outs; what is refused."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom import FedFa, JointPlan, ProductDelta, RandomRank, Refused, Rounds
from fedloom.aggregate.clip import Clip
from fedloom.aggregate.fedit import FedIT
from fedloom.aggregate.fedsvd import FedSVD
from fedloom.aggregate.ffa import FFA
from fedloom.aggregate.hetlora import HetLoRA
from fedloom.aggregate.hlora import HLoRA
from fedloom.aggregate.momentum import Momentum
from fedloom.aggregate.robust import Robust
from fedloom.aggregate.rolora import RoLoRA
from fedloom.aggregate.shared.parts import (
    block_part,
    flat_part,
    part_from_flat,
    start_digest,
)
from fedloom.core.codec import Summed
from fedloom.core.events import (
    Cancel,
    ClientJoined,
    ClientLost,
    Command,
    Dispatch,
    InsideEdge,
    OpenSum,
    PartsReady,
    Publish,
    Reject,
    Report,
    SlotBlock,
    SumFailed,
    SumOpened,
    TaskFailed,
    TimerFired,
    UpdateArrived,
)
from fedloom.core.fingerprint import fingerprint
from fedloom.core.lora import Adapter, map_tensors, server_rank
from fedloom.core.policies import Aggregator
from fedloom.core.types import Profile
from fedloom.hierarchy.hierarchy import Hierarchy
from fedloom.hierarchy.secure_edge import Secure, shared_rank, sum_blocks, why_no_sum
from fedloom.schedule.shared.weights import uniform
from fedloom.simulate.faults import Faults
from fedloom.simulate.simulation import open_sum
from tests.support import toys
from tests.support.summed_groups import RANKS, SECURE, asked, group, simulated, with_masks

# As exact as what is seen -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", [FFA(), RoLoRA(), FedSVD(), FedIT(), Momentum(FFA())], ids=toys.called)
def test_summed_groups_learn_what_groups_learn_whose_members_weigh_alike(method: Aggregator) -> None:
    seen = simulated(method, Hierarchy(schedule=Rounds(6, weigh=uniform)))
    summed = simulated(method, Hierarchy(secure=replace(SECURE, bits=24)))
    assert len(summed.all(OpenSum)) == 2 * 2 * 3
    assert summed.losses == pytest.approx(seen.losses, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_products_are_summed_by_their_factors_and_end_where_the_exact_merge_ends() -> None:
    for method in (ProductDelta(), HLoRA()):
        seen = simulated(method, Hierarchy(schedule=Rounds(6, weigh=uniform)), RandomRank(2, 4))
        summed = simulated(method, Hierarchy(secure=SECURE), RandomRank(2, 4))
        assert seen.losses[-1] < 0.02
        assert summed.losses[-1] < 1.5 * seen.losses[-1]


@pytest.mark.slow
def test_sixteen_bits_are_as_good_as_twenty_four() -> None:
    one, other = (simulated(FFA(), Hierarchy(secure=replace(SECURE, bits=bits))) for bits in (16, 24))
    assert one.losses == pytest.approx(other.losses, rel=1e-3)
    assert one.losses != other.losses


def test_the_order_of_members_changes_no_bit() -> None:
    found = set()
    for order in itertools.islice(itertools.permutations(range(len(RANKS))), 0, None, 9001):
        made = group(method=ProductDelta())
        wanted = asked(made.ready(*(f"c{k}" for k in order)))
        made.do(open_sum(wanted, made.held))
        found.add(made.model)
    assert len(found) == 1


@pytest.mark.slow
@pytest.mark.parametrize("lost", [(), ("c1", "c4")])
def test_masks_change_no_bit_also_where_members_drop_out_after_they_sent_their_numbers(lost: Sequence[str]) -> None:
    plain, masked = group(method=FedIT()), group(method=FedIT())
    for made, opener in ((plain, open_sum), (masked, with_masks(lost))):
        wanted = asked(made.ready(*made.tasks))
        assert [len(block.tasks) for block in wanted.blocks] == [8, 4]
        made.do(opener(wanted, made.held))
        assert made.edge.state.server.version == 1
    assert plain.model == masked.model


# Rounds, and who is in them ------------------------------------------------------------------------------------------------


def test_a_round_takes_all_members_and_a_report_counts_them() -> None:
    made = group(rounds=1)
    commands = made.do(open_sum(asked(made.ready(*made.tasks)), made.held))
    published = next(command for command in commands if isinstance(command, Publish))
    assert {update.task.client for update in published.updates} == set(made.tasks)
    report = next(command for command in commands if isinstance(command, Report))
    assert report.result.examples == sum(10 + k for k in range(len(RANKS)))
    assert report.result.tokens == 0
    assert report.result.metrics.keys().isdisjoint({"loss", "first_loss"})
    assert report.statistics is None


def test_a_member_that_fails_before_it_is_ready_is_left_out() -> None:
    made = group()
    made.ready("c0", "c1", "c2", "c3", "c4", "c7")
    assert not made.do(TaskFailed("c6", made.tasks["c6"].id, "no power"))
    wanted = asked(made.do(ClientLost("c5")))
    assert [block.tasks for block in wanted.blocks] == [(1, 2, 3, 4, 5, 8), (1, 2, 3)]
    made.do(open_sum(wanted, made.held))
    assert made.edge.state.server.version == 1


def test_where_too_few_of_a_rank_are_ready_the_others_of_it_are_left_out_too() -> None:
    made = group()
    for client in ("c0", "c1"):
        made.do(TaskFailed(client, made.tasks[client].id, "no power"))
    made.ready("c2", "c3", "c4", "c5", "c6")
    last = made.ready("c7")
    assert not any(isinstance(command, OpenSum) for command in last), "4 of 8 are left, and 5 are needed"
    made = group(secure=replace(SECURE, threshold=0.51), ranks=(*RANKS, 2, 2))
    for client in ("c0", "c1"):
        made.do(TaskFailed(client, made.tasks[client].id, "no power"))
    made.ready("c2", "c3", "c4", "c5", "c6", "c7", "c8")
    commands = made.ready("c9")
    assert [block.tasks for block in asked(commands).blocks] == [(4, 5, 6, 8, 9, 10)]
    assert {command.client for command in commands if isinstance(command, Cancel)} == {"c2", "c6"}


def test_members_of_one_rank_have_the_same_start_and_others_not() -> None:
    made = group(method=ProductDelta())
    made.ready(*made.tasks)
    digests = {client: start_digest(task.start) for client, task in made.tasks.items()}
    assert len({digests[f"c{k}"] for k, rank in enumerate(RANKS) if rank == 4}) == 1
    assert len(set(digests.values())) == 2
    other = map_tensors(torch.clone, made.tasks["c0"].start.train)
    other.factors["query"].up[0, 0] += 1e-6
    assert start_digest(replace(made.tasks["c0"].start, train=other)) != digests["c0"]


def test_a_ready_member_that_is_lost_before_the_sum_is_asked_for_is_in_no_sum() -> None:
    made = group()
    made.ready("c0", "c1", "c2", "c3", "c4", "c5", "c7")
    made.do(ClientLost("c0"))
    wanted = asked(made.ready("c6"))
    assert 1 not in wanted.blocks[0].tasks


def test_one_that_is_lost_while_the_sum_is_opened_counts_and_is_gone_afterwards() -> None:
    made, other = group(), group()
    wanted = asked(made.ready(*made.tasks))
    assert made.do(ClientLost("c3")) == []
    commands = made.do(open_sum(wanted, made.held))
    other.do(open_sum(asked(other.ready(*other.tasks)), other.held))
    assert made.model == other.model
    assert "c3" not in {command.task.client for command in commands if isinstance(command, Dispatch)}
    assert "c3" not in made.edge.state.server.idle


def test_too_few_ready_members_drop_the_round_and_another_one_begins() -> None:
    made = group()
    made.ready("c0", "c1")
    before, commands = made.model, list[Command]()
    for client in ("c2", "c3", "c4", "c5", "c6", "c7"):
        commands = made.do(TaskFailed(client, made.tasks[client].id, "no power"))
    assert not any(isinstance(command, OpenSum) for command in commands)
    assert made.model == before
    assert {command.task.client for command in commands if isinstance(command, Dispatch)} == set(made.tasks)
    assert {command.client for command in commands if isinstance(command, Cancel)} == {"c0", "c1"}


def test_the_deadline_closes_a_round_with_enough_members_and_drops_one_with_too_few() -> None:
    made = group(secure=replace(SECURE, deadline=10.0, threshold=0.6))
    made.ready("c0", "c1", "c2", "c3", "c4", "c5")
    assert made.edge.state.due == 10.5
    commands = made.do(TimerFired(), 10.5)
    assert asked(commands).blocks[0].tasks == (1, 2, 3, 4, 5, 6)
    few = group(secure=replace(SECURE, deadline=10.0))
    few.ready("c0", "c1", "c2", "c6")
    assert not any(isinstance(command, OpenSum) for command in few.do(TimerFired(), 10.5)), "4 of 8 are below 0.6"


def test_too_few_members_do_not_begin_a_round() -> None:
    made = group()
    for client in ("c0", "c1", "c2", "c3", "c4", "c7"):
        made.do(ClientLost(client))
    commands = made.ready("c5") + made.ready("c6")
    assert not any(isinstance(command, Dispatch | OpenSum) for command in commands)
    made.do(ClientJoined(Profile("c0", 10)), 2.0)
    assert {c.task.client for c in made.do(TimerFired(), 2.0) if isinstance(c, Dispatch)} == {"c0", "c5", "c6"}


def test_a_sum_of_a_round_that_was_cancelled_is_ignored() -> None:
    made = group()
    wanted = asked(made.ready(*made.tasks))
    opened, before = open_sum(wanted, made.held), made.model
    made.edge.go_down(2.0)
    again = made.edge.come_back(3.0)
    assert len([command for command in again if isinstance(command, Dispatch)]) == len(RANKS)
    assert made.do(opened, 3.0) == []
    assert made.do(SumFailed(wanted.task, "late"), 3.0) == []
    assert made.model == before


def test_a_failed_sum_drops_the_round() -> None:
    made = group()
    wanted = asked(made.ready(*made.tasks))
    commands = made.do(SumFailed(wanted.task, "two members were left"))
    assert len([command for command in commands if isinstance(command, Dispatch)]) == len(RANKS)
    assert made.edge.state.server.version == 0
    assert made.edge.state.server.last_failure == "two members were left"


@pytest.mark.slow
def test_a_run_with_drop_outs_comes_to_its_end() -> None:
    faults = Faults(dropout=0.2, fail=0.1, back_after=20.0, late=0.5)
    log = simulated(FFA(), Hierarchy(secure=replace(SECURE, threshold=0.51)), RandomRank(2, 4), faults)
    assert log.losses[-1] < 0.95
    assert any(len(one.blocks[0].tasks) < 5 for one in log.all(OpenSum)), "else nobody dropped out"
    assert all(len(block.tasks) >= 3 for one in log.all(OpenSum) for block in one.blocks)


# Slot blocks ---------------------------------------------------------------------------------------------------------------


def test_no_member_trains_what_fewer_than_least_members_hold() -> None:
    for ranks, wanted in (
        ((8, 4, 4, 4, 2, 2, 2, 2, 1, 1, 1, 1), [4, 4, 4, 4, 2, 2, 2, 2, 1, 1, 1, 1]),
        ((8, 4, 2, 2, 1, 1, 1, 1), [2, 2, 2, 2, 1, 1, 1, 1]),
        ((2, 2, 2, 2, 2, 2, 2, 1), [1, 1, 1, 2, 2, 2, 2, 1]),
        ((4, 4, 1), [1, 1, 1]),
    ):
        made = group(ranks)
        assert [server_rank(made.tasks[f"c{k}"].start.train) for k in range(len(ranks))] == wanted


@given(st.lists(st.sampled_from([1, 2, 4, 8]), min_size=5, max_size=12), st.integers(3, 5))
def test_ranks_that_are_given_one_after_the_other_are_shared_by_enough_and_never_higher(
    ranks: list[int], least: int
) -> None:
    lowered = list(ranks)
    for k in range(len(ranks)):
        lowered[k] = shared_rank(lowered[k], lowered, least)
    assert min(Counter(lowered).values()) >= least
    assert all(one <= planned for one, planned in zip(lowered, ranks, strict=True))


def test_blocks_are_cut_at_the_ranks_in_use_and_each_has_enough_holders() -> None:
    made = group((4, 4, 4, 4, 3, 3, 3, 3, 1, 1, 1, 1))
    blocks = sum_blocks(list(made.tasks.values()), 4)
    assert [(b.first, b.last, len(b.tasks)) for b in blocks] == [(0, 1, 12), (1, 3, 8), (3, 4, 4)]
    assert [(b.first, b.last) for b in sum_blocks(list(made.tasks.values()), 5)] == [(0, 1), (1, 3)]
    assert sum_blocks(list(made.tasks.values()), 13) == ()


def test_a_block_of_too_few_members_counts_as_not_changed() -> None:
    made = group()
    wanted = asked(made.ready(*made.tasks))
    few = replace(wanted, blocks=wanted.blocks[:1])
    made.do(open_sum(few, made.held))
    assert made.edge.state.server.version == 1
    for name, factor in made.edge.state.server.model.adapter.factors.items():
        assert bool(factor.up[:, :2].any(0).all()), name
        assert not factor.up[:, 2:].any(), "fresh LoRA: `up` is zero"


def test_only_trained_sides_are_in_the_numbers_of_a_member() -> None:
    made = group()
    made.ready("c0")
    start = made.tasks["c0"].start
    whole = made.held[1].part
    numbers = flat_part(start, whole)
    up = sum(factor.up.numel() for factor in start.train.factors.values())
    assert len(numbers) == up + start.train.dense["head"].numel()
    assert torch.equal(flat_part(start, part_from_flat(start, whole, numbers)), numbers)


# What a sum cannot be -------------------------------------------------------------------------------------------------------


def spoilt(opened: SumOpened, what: str, codec: Summed) -> SumOpened:
    """A sum that no honest members have."""
    first, *rest = opened.blocks
    match what:
        case "larger":
            over = len(first.tasks) * codec.largest + 1
            return replace(opened, sums=Adapter(opened.sums.factors, {"head": torch.full((3,), over)}))
        case "larger in a block":
            few = len(rest[-1].tasks) * codec.largest + 1
            changed = map_tensors(torch.clone, opened.sums)
            changed.factors["query"].up[0, -1] = few
            return replace(opened, sums=changed)
        case "other members":
            return replace(opened, blocks=(replace(first, tasks=(*first.tasks, 77)), *rest))
        case "too few":
            return replace(opened, blocks=(replace(first, tasks=first.tasks[:2]),))
        case "one twice":
            return replace(opened, blocks=(replace(first, tasks=(1, 1, 1)),))
        case "no first block":
            return replace(opened, blocks=tuple(rest))
        case "other blocks":
            return replace(opened, blocks=(SlotBlock(0, 1, first.tasks),))
        case "numbers":
            return replace(opened, sums=map_tensors(doubled, opened.sums))
    return replace(opened, sums=block_part(opened.sums, 0, 1))


def doubled(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double()


@pytest.mark.parametrize(
    "what",
    [
        "larger",
        "larger in a block",
        "other members",
        "too few",
        "one twice",
        "no first block",
        "other blocks",
        "numbers",
        "shape",
    ],
)
def test_a_sum_that_no_members_can_have_drops_the_round(what: str) -> None:
    made = group()
    wanted = asked(made.ready(*made.tasks))
    before, bad = made.model, spoilt(open_sum(wanted, made.held), what, wanted.codec)
    assert why_no_sum(bad, [made.edge.state.server.busy[n] for n in wanted.blocks[0].tasks], 3, wanted.codec)
    commands = made.do(bad)
    assert made.model == before
    assert made.edge.state.server.version == 0
    assert len([command for command in commands if isinstance(command, Dispatch)]) == len(RANKS)


def test_a_single_answer_is_not_taken() -> None:
    made = group()
    task = made.tasks["c0"]
    commands = made.do(UpdateArrived("c0", task.id, toys.make_result(task.start.train)))
    assert [type(command) for command in commands] == [Reject]
    assert made.do(PartsReady("c1", task.id)) == [Reject("c1", task.id, "task 1 is not outstanding at client 'c1'")]


def test_numbers_beyond_the_bound_are_cut_off_and_the_sum_of_all_fits() -> None:
    codec = Summed(8, 1.0, 5)
    values = torch.tensor([0.0, 0.5, 1.0, 7.0, -7.0, 0.0039])
    assert codec.integers(values).tolist() == [0, 64, 127, 127, -127, 0]
    assert 5 * codec.largest < 2 ** (codec.word_bits - 1)


@pytest.mark.slow
def test_the_trace_of_a_summed_run_tells_of_no_single_answer() -> None:
    log = simulated(FFA(), Hierarchy(secure=SECURE))
    kinds = {type(event) for _, event, _ in log.steps}
    assert UpdateArrived not in kinds
    assert {PartsReady, SumOpened} <= kinds
    for one in log.all(InsideEdge):
        if isinstance(one.command, Publish):
            assert len({fingerprint(u.result.adapter) for u in one.command.updates}) == 1, "all answered with the mean"


# What does not go together ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"schedule": FedFa()}, "hierarchy.schedule"),
        ({"plan": JointPlan()}, "hierarchy.plan"),
        ({"regroup": 0.1}, "hierarchy.regroup"),
    ],
)
def test_what_needs_single_answers_is_refused_beside_sums(fields: Mapping[str, Any], named: str) -> None:
    with pytest.raises(Refused, match=named.replace(".", r"\.")):
        Hierarchy(secure=SECURE, **fields)


@pytest.mark.parametrize(
    "wrong",
    [
        {"least": 2},
        {"threshold": 0.5},
        {"threshold": 1.1},
        {"bits": 3},
        {"bits": 25},
        {"bound": 0.0},
        {"deadline": 0.0},
    ],
)
def test_settings_that_protect_nobody_are_refused(wrong: Mapping[str, Any]) -> None:
    with pytest.raises(Refused, match=rf"hierarchy\.secure\.{next(iter(wrong))}"):
        Secure(**wrong)


@pytest.mark.parametrize("method", [HetLoRA(prune=False), Clip(FFA())], ids=toys.called)
def test_methods_that_need_single_answers_are_refused_by_name(method: Aggregator) -> None:
    with pytest.raises(Refused, match=type(method).__name__):
        toys.tree((5, 6), Hierarchy(secure=SECURE, aggregator=method), method=method)


def test_groups_smaller_than_least_are_refused() -> None:
    with pytest.raises(Refused, match=r"hierarchy\.secure\.least.*a group has 5 members"):
        toys.tree((5, 6), Hierarchy(secure=Secure(least=6, bound=1.0)), method=FFA())


def test_robust_rules_above_are_refused_since_they_exclude_each_other() -> None:
    with pytest.raises(Refused, match="secrecy or robustness"):
        toys.tree((5, 6), Hierarchy(secure=SECURE), method=Robust(FFA()))


def test_a_sum_that_would_not_fit_into_a_word_is_refused() -> None:
    made = toys.server(method=FFA(), start=toys.fresh(4))
    Hierarchy(secure=replace(SECURE, bits=24)).edge(made, 256, 1)
    with pytest.raises(Refused, match=r"hierarchy\.secure\.bits"):
        Hierarchy(secure=replace(SECURE, bits=24)).edge(made, 257, 1)


def test_how_far_a_step_goes_has_to_be_known() -> None:
    with pytest.raises(Refused, match=r"hierarchy\.secure\.bound"):
        toys.tree((5, 6), Hierarchy(secure=Secure(least=3)), method=FFA())
