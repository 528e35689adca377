"""What comes from outside: every malformation is refused with a reason that names it, and nothing ever raises."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fedloom.check import MAX_NORM, fault
from fedloom.lora import Adapter, Factor
from fedloom.types import Result
from toys import LAYERS, adapter, make_result, make_task

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
    assert fault(TASK, make_result(GOOD, metrics={"loss": 0.3, "seconds": 4})) is None
    assert fault(TASK, make_result(GOOD, steps=TASK.budget.steps, tokens=0)) is None


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
    reason = fault(TASK, replace(make_result(GOOD), **{field: value}))
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
    (with_down(filled(2 * MAX_NORM)), "query.down has norm"),
    (with_down(filled(3e38)), "query.down has norm"),
    (make_result(replace(GOOD, dense={"head": torch.full((3,), float("nan"))})), "head is not finite"),
    (make_result(replace(GOOD, dense={"head": torch.zeros(4)})), "head has shape"),
]


@pytest.mark.parametrize(("result", "named"), BAD_ADAPTERS, ids=[named for _, named in BAD_ADAPTERS])
def test_a_bad_adapter_is_named(result: Result, named: str) -> None:
    reason = fault(TASK, result)
    assert reason is not None
    assert named in reason


@pytest.mark.parametrize("thing", [None, 3, GOOD, make_result(None)], ids=str)  # type: ignore[arg-type]
def test_what_is_no_result_is_named_by_its_type(thing: Any) -> None:
    assert "not a result" in str(fault(TASK, thing))


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


@given(st.one_of(st.builds(Result, ADAPTERS, NUMBERS, NUMBERS, NUMBERS, METRICS), JUNK))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_junk_is_answered_with_words_and_never_with_an_exception(result: Any) -> None:
    reason = fault(TASK, result)
    if reason is not None:
        assert 0 < len(reason) < 300
    else:
        assert set(result.adapter.factors) == set(LAYERS)
