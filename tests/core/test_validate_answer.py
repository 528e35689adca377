"""What comes from outside: every malformation is refused with a reason that names it, and nothing ever raises."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fedloom.core.lora import Adapter, Factor, cut_factor
from fedloom.core.types import Pruning, Result, Rules, Task
from fedloom.core.validate_answer import MAX_NORM, why_invalid
from tests.support.storms import tries
from tests.support.toys import LAYERS, adapter, make_result, make_task

TASK = make_task(adapter(4), 4)
GOOD = adapter(4, 1)
QUERY = GOOD.factors["query"]


def with_factor(name: str, given: Any) -> Result:
    return make_result(replace(GOOD, factors={**GOOD.factors, name: given}))


def with_down(given: Any) -> Result:
    return with_factor("query", Factor(given, QUERY.up))


def filled(value: float) -> torch.Tensor:
    down = QUERY.down.clone()
    down[1, 2] = value
    return down


def nested(whole: torch.Tensor) -> torch.Tensor:
    """Strided, and without a shape."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a prototype, torch says
        return torch.nested.nested_tensor([*whole, whole[0, :1]])


def test_a_good_answer_has_no_fault() -> None:
    assert why_invalid(TASK, make_result(GOOD, metrics={"loss": 0.3, "seconds": 4})) is None
    assert why_invalid(TASK, make_result(GOOD, steps=TASK.budget.steps, tokens=0)) is None


def test_of_an_answer_that_is_clipped_it_is_not_told_how_far_it_moved() -> None:
    """A private run would tell the norm of one client's change in the reason; one that is not finite is no answer there either."""
    assert "changed by norm" in str(why_invalid(TASK, with_down(filled(2 * MAX_NORM))))
    assert why_invalid(TASK, with_down(filled(2 * MAX_NORM)), clipped=True) is None
    assert why_invalid(TASK, with_down(filled(float("nan"))), clipped=True) == "query.down is not finite"


BAD_NUMBERS: list[tuple[str, Any, str]] = [
    ("examples", 0, "examples is 0"),
    ("examples", -3, "examples is -3"),
    ("examples", 10**13, "examples"),
    ("examples", 10**5000, "examples"),
    ("examples", 2.0, "examples is 2.0"),
    ("examples", True, "examples is True"),
    ("examples", "many", "examples is 'many'"),
    ("tokens", -1, "tokens is -1"),
    ("tokens", None, "tokens is None"),
    ("steps", 0, "steps is 0"),
    ("steps", TASK.budget.steps + 1, "steps is 6"),
    ("metrics", None, "metrics"),
    ("metrics", [("loss", 1.0)], "metrics"),
    ("metrics", {"loss": float("nan")}, "'loss' is nan"),
    ("metrics", {"loss": float("inf")}, "'loss' is inf"),
    ("metrics", {"loss": "low"}, "'loss' is 'low'"),
    ("metrics", {"loss": torch.tensor(1.0)}, "'loss'"),
    ("metrics", {"loss": 10**400}, "'loss'"),
    ("metrics", {"loss": True}, "'loss' is True"),
    ("metrics", {3: 1.0}, "metric 3"),
]


@pytest.mark.parametrize(
    ("field", "value", "named"), BAD_NUMBERS, ids=lambda v: str(v)[:30] if not isinstance(v, int) else ""
)
def test_a_bad_number_is_named(field: str, value: Any, named: str) -> None:
    reason = why_invalid(TASK, replace(make_result(GOOD), **{field: value}))
    assert reason is not None
    assert named in reason
    assert len(reason) < 200


BAD_ADAPTERS = [
    (make_result(replace(GOOD, factors={"query": QUERY})), "'value' is missing"),
    (with_factor("key", QUERY), "'key'"),
    (make_result(replace(GOOD, factors=[QUERY])), "layer"),  # type: ignore[arg-type]
    (make_result(replace(GOOD, dense={})), "'head' is missing"),
    (make_result(replace(GOOD, dense=None)), "dense"),  # type: ignore[arg-type]
    (with_factor("query", (QUERY.down, QUERY.up)), "'query' holds a tuple"),
    (with_factor("query", adapter(3).factors["query"]), "query.down has shape (3, 10), expected (4, 10)"),
    (with_down(QUERY.down.T), "query.down has shape"),
    (with_down(QUERY.down[None]), "query.down has shape"),
    (with_factor("query", Factor(QUERY.down, QUERY.up[:-1])), "query.up has shape"),
    (with_down(QUERY.down.double()), "query.down is torch.strided torch.float64"),
    (with_down(QUERY.down.bfloat16()), "bfloat16"),
    (with_down(QUERY.down.to_sparse()), "query.down is torch.sparse_coo"),
    (with_down(QUERY.down.to("meta")), "query.down is on meta"),
    (with_down([[0.0] * 10] * 4), "query.down is a list"),
    (with_down(nested(QUERY.down)), "query.down is a nested tensor"),
    (with_down(QUERY.down.clone().requires_grad_()), "query.down requires a gradient"),
    (with_down(QUERY.down.clone().requires_grad_() * 2), "query.down requires a gradient"),
    (with_down(torch.nn.Parameter(QUERY.down.clone())), "query.down is a Parameter"),
    (with_down(torch.nn.Parameter(QUERY.down.clone(), requires_grad=False)), "query.down is a Parameter"),
    (with_down(torch.nn.UninitializedParameter()), "query.down is a UninitializedParameter"),
    (with_down(FakeTensorMode().from_tensor(QUERY.down)), "query.down is a FakeTensor"),
    (make_result(replace(GOOD, dense={"head": torch.nn.Parameter(torch.zeros(3))})), "head is a Parameter"),
    (with_down(filled(float("nan"))), "query.down is not finite"),
    (with_down(filled(float("-inf"))), "query.down is not finite"),
    (with_down(filled(2 * MAX_NORM)), "query.down changed by norm"),
    (with_down(filled(3e38)), "query.down changed by norm"),
    (make_result(replace(GOOD, dense={"head": torch.full((3,), float("nan"))})), "head is not finite"),
    (make_result(replace(GOOD, dense={"head": torch.zeros(4)})), "head has shape"),
]


@pytest.mark.parametrize(("result", "named"), BAD_ADAPTERS, ids=[named for _, named in BAD_ADAPTERS])
def test_a_bad_adapter_is_named(result: Result, named: str) -> None:
    reason = why_invalid(TASK, result)
    assert reason is not None
    assert named in reason


@pytest.mark.parametrize("thing", [None, 3, GOOD, make_result(None)], ids=str)  # type: ignore[arg-type]
def test_what_is_no_result_is_named_by_its_type(thing: Any) -> None:
    assert "not a result" in str(why_invalid(TASK, thing))


# What the rules of a start ask for ------------------------------------------------------------------------------------------


def ruled(**more: Any) -> Task:
    """The task with these rules."""
    control = more.pop("control", None)
    return replace(TASK, start=replace(TASK.start, rules=Rules(**more), control=control))


def keeping(*sides: str) -> Adapter:
    """A good answer in which these sides are as they were sent."""
    sent, factors = TASK.start.train, {}
    for name, f in GOOD.factors.items():
        own = sent.factors[name]
        factors[name] = Factor(own.down if "down" in sides else f.down, own.up if "up" in sides else f.up)
    return Adapter(factors, sent.dense if "dense" in sides else GOOD.dense)


@pytest.mark.parametrize("rule", ["frozen", "private"])
@pytest.mark.parametrize("side", ["down", "up", "dense"])
def test_a_side_that_was_to_stay_and_did_not_is_refused(rule: str, side: str) -> None:
    task, others = ruled(**{rule: (side,)}), {"down", "up", "dense"} - {side}
    assert why_invalid(task, make_result(keeping(side))) is None
    assert f"the {side} side of" in str(why_invalid(task, make_result(keeping(*others))))


def test_one_bit_of_a_frozen_side_is_enough() -> None:
    task, given = ruled(frozen=("down",)), keeping("down")
    down = given.factors["value"].down.clone()
    down[3, 5] = torch.nextafter(down[3, 5], torch.tensor(9.0))
    factors = {**given.factors, "value": Factor(down, given.factors["value"].up)}
    assert (
        str(why_invalid(task, make_result(Adapter(factors, given.dense))))
        == "the down side of 'value' was not to be changed"
    )


@pytest.mark.parametrize(("rank", "taken"), [(0, False), (1, False), (2, True), (3, True), (4, True), (5, False)])
def test_a_pruned_rank_is_between_the_least_and_the_asked_one(rank: int, taken: bool) -> None:
    task, given = ruled(pruning=Pruning(least=2)), make_result(adapter(rank, 1))
    assert (why_invalid(task, given) is None) == taken
    assert (why_invalid(TASK, given) is None) == (rank == 4)


@pytest.mark.parametrize(("query", "value"), [(3, 4), (4, 3), (2, 3)])
def test_all_layers_are_pruned_to_the_same_rank(query: int, value: int) -> None:
    factors = {"query": adapter(query).factors["query"], "value": adapter(value).factors["value"]}
    assert "has shape" in str(why_invalid(ruled(pruning=Pruning()), make_result(Adapter(factors, GOOD.dense))))


def test_a_least_rank_above_the_clients_is_the_clients() -> None:
    task = ruled(pruning=Pruning(least=8))
    assert why_invalid(task, make_result(GOOD)) is None
    assert "has shape" in str(why_invalid(task, make_result(adapter(3))))


def test_a_frozen_side_may_be_pruned_but_not_changed() -> None:
    task = ruled(pruning=Pruning(), frozen=("down",))
    left = Adapter({n: cut_factor(f, 3) for n, f in keeping("down").factors.items()}, GOOD.dense)
    assert why_invalid(task, make_result(left)) is None
    assert "down side" in str(why_invalid(task, make_result(adapter(3, 1))))


BAD_CONTROLS: list[tuple[Any, str]] = [
    (None, "the control variate is a NoneType"),
    ((GOOD,), "the control variate is a tuple"),
    (Adapter({"query": QUERY}, GOOD.dense), "control variate: layer 'value' is missing"),
    (Adapter(GOOD.factors, {}), "control variate: dense tensor 'head' is missing"),
    (Adapter(None, GOOD.dense), "control variate: layer"),  # type: ignore[arg-type]
    (adapter(3), "control variate: query.down has shape (3, 10)"),
    (
        Adapter({**GOOD.factors, "query": Factor(filled(float("nan")), QUERY.up)}, GOOD.dense),
        "query.down is not finite",
    ),
    (Adapter({**GOOD.factors, "query": Factor(nested(QUERY.down), QUERY.up)}, GOOD.dense), "is a nested tensor"),
]


@pytest.mark.parametrize(("control", "named"), BAD_CONTROLS, ids=[named for _, named in BAD_CONTROLS])
def test_a_bad_control_variate_is_named(control: Any, named: str) -> None:
    reason = why_invalid(ruled(control=adapter(4, 2)), make_result(GOOD, control=control))
    assert named in str(reason)


def test_a_control_variate_is_given_exactly_if_it_was_asked_for() -> None:
    assert why_invalid(ruled(control=adapter(4, 2)), make_result(GOOD, control=adapter(4, 3))) is None
    assert "not asked for" in str(why_invalid(TASK, make_result(GOOD, control=adapter(4, 3))))


STRICT = ruled(pruning=Pruning(), frozen=("down", "dense"), private=("up",), control=adapter(4, 2))
ODD_FACTORS: dict[str, Any] = {
    "none": {},
    "no mapping": [QUERY],
    "no factor first": {"query": None, "value": QUERY},
    "a list": {"query": Factor([[0.0]], QUERY.up)},  # type: ignore[arg-type]
    "nested": {"query": Factor(nested(QUERY.down), QUERY.up)},
    "a subclass": {"query": Factor(torch.nn.Parameter(QUERY.down), QUERY.up)},
    "without shape": {"query": Factor(torch.nn.UninitializedParameter(), QUERY.up)},
    "fake": {"query": Factor(FakeTensorMode().from_tensor(QUERY.down), QUERY.up)},
    "a number": {"query": Factor(torch.tensor(1.0), QUERY.up)},
    "sparse": {"query": Factor(QUERY.down.to_sparse(), QUERY.up)},
    "one layer, pruned": {"query": cut_factor(QUERY, 2)},
    "an odd layer, pruned": {"key": cut_factor(QUERY, 2), "value": cut_factor(QUERY, 2)},
    "one side pruned": {"query": Factor(QUERY.down[:2], QUERY.up), "value": GOOD.factors["value"]},
}


@pytest.mark.parametrize("task", [STRICT, ruled(pruning=Pruning())], ids=["strict", "pruning"])
@pytest.mark.parametrize("odd", ODD_FACTORS)
def test_a_pruned_answer_that_is_none_never_raises(odd: str, task: Task) -> None:
    given = make_result(Adapter(ODD_FACTORS[odd], GOOD.dense))
    assert 0 < len(str(why_invalid(task, given))) < 300
    assert why_invalid(task, given) is not None


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(10**400, 10**401),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(
        st.one_of(st.text(max_size=3), st.integers(), st.none()), st.one_of(st.floats(), st.integers(), st.text())
    ),
)
TENSORS = st.builds(
    lambda shape, dtype, fill: torch.full(shape, fill).to(dtype),
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64]),
    st.sampled_from([0.0, 1.0, float("nan"), float("inf"), 1e38]),
)
SIDES = st.one_of(TENSORS, JUNK, st.just(QUERY.down), st.just(QUERY.up))
FACTORS = st.one_of(st.builds(Factor, SIDES, SIDES), st.just(QUERY), JUNK)
NAMES = st.sampled_from([*LAYERS, "head", "odd"])
ADAPTERS = st.one_of(
    st.builds(
        Adapter,
        st.one_of(st.just(GOOD.factors), st.dictionaries(NAMES, FACTORS), JUNK),
        st.one_of(st.just(GOOD.dense), st.dictionaries(NAMES, SIDES), JUNK),
    ),
    st.just(GOOD),
    JUNK,
)
NUMBERS = st.one_of(st.just(1), JUNK)
METRICS = st.one_of(st.just({}), JUNK)


@given(
    st.one_of(st.builds(Result, ADAPTERS, NUMBERS, NUMBERS, NUMBERS, METRICS, ADAPTERS), JUNK),
    st.sampled_from([TASK, STRICT, ruled(pruning=Pruning())]),
)
@tries(600)
def test_junk_is_answered_with_words_and_never_with_an_exception(result: Any, task: Task) -> None:
    reason = why_invalid(task, result)
    if reason is not None:
        assert 0 < len(reason) < 300
    else:
        assert set(result.adapter.factors) == set(LAYERS)
