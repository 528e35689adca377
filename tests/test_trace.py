"""The trace: one line of JSON a step, tensors by their sha256."""

from __future__ import annotations

import gc
import io
import json
from dataclasses import replace
from typing import Any
from weakref import ref

import pytest
import torch

from fedloom import trace
from fedloom.lora import Adapter, Factor, cut
from fedloom.trace import Trace, fingerprint, line, written
from fedloom.types import (
    Cancel,
    ClientLost,
    Dispatch,
    Evaluate,
    Model,
    Publish,
    Reject,
    Scored,
    Stop,
    TaskFailed,
    TimerFired,
    UpdateArrived,
)
from toys import adapter, make_result, make_task, make_update

ONE = adapter(2)
QUERY = ONE.factors["query"]


def with_query(f: Factor) -> Adapter:
    return replace(ONE, factors={**ONE.factors, "query": f})


def test_a_fingerprint_does_not_depend_on_order_or_memory() -> None:
    backwards = Adapter(dict(reversed(list(ONE.factors.items()))), ONE.dense)
    strided = with_query(Factor(QUERY.down.T.contiguous().T, cut(Factor(QUERY.down, QUERY.up), 2).up))
    assert fingerprint(ONE) == fingerprint(backwards) == fingerprint(strided)


def next_float(tensor: torch.Tensor) -> torch.Tensor:
    return torch.nextafter(tensor, torch.tensor(float("inf")))


@pytest.mark.parametrize(
    "other",
    [
        with_query(Factor(next_float(QUERY.down), QUERY.up)),
        with_query(Factor(QUERY.down, next_float(QUERY.up))),
        with_query(Factor(QUERY.down.double(), QUERY.up)),
        with_query(Factor(QUERY.down.reshape(10, 2), QUERY.up)),
        with_query(Factor(-0.0 * QUERY.down, QUERY.up)),
        Adapter({"renamed" if n == "query" else n: f for n, f in ONE.factors.items()}, ONE.dense),
        Adapter({"query": ONE.factors["value"], "value": QUERY}, ONE.dense),
        replace(ONE, dense={}),
        replace(ONE, dense={"head": ONE.dense["head"] + 1}),
        replace(ONE, dense={"tail": ONE.dense["head"]}),
    ],
)
def test_a_fingerprint_sees_every_change(other: Adapter) -> None:
    assert fingerprint(other) != fingerprint(ONE)


def test_an_adapter_is_hashed_once_and_not_kept_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Adapter] = []
    monkeypatch.setattr(trace, "_digest", lambda adapter: str(hashed.append(adapter)))
    one = adapter(2)
    for _ in range(2):
        line(0.0, UpdateArrived("a", 1, make_result(one)), [Publish(1, Model(one), ()), Dispatch(make_task(one, 2))])
    assert hashed == [one]
    gone = ref(one)
    hashed.clear()
    del one
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_a_fingerprint_is_taken_of_any_dtype(dtype: torch.dtype) -> None:
    """Also of an answer that will be rejected for it."""
    odd = replace(ONE, dense={"head": torch.ones(3).to(dtype), "scalar": torch.tensor(1).to(dtype)})
    assert len(fingerprint(odd)) == 64


EVENTS = [
    UpdateArrived("a", 1, make_result(ONE, metrics={"loss": 0.5})),
    TaskFailed("a", 1, "out of memory"),
    ClientLost("a"),
    TimerFired(),
    Scored(3, {"accuracy": 0.9}),
]
COMMANDS = [
    Dispatch(make_task(ONE, 2)),
    Cancel(1, "a"),
    Publish(1, Model(ONE), (make_update(ONE, 2, 5),)),
    Evaluate(1, Model(ONE)),
    Reject("a", 1, 'odd "name"\n'),
    Stop("done"),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_a_step_is_one_line_of_json(event: Any) -> None:
    text = line(1.5, event, COMMANDS)
    assert "\n" not in text
    step = json.loads(text)
    assert step["time"] == 1.5
    assert step["event"]["type"] == type(event).__name__
    assert [command["type"] for command in step["commands"]] == [type(command).__name__ for command in COMMANDS]


def test_a_step_tells_tensors_by_their_fingerprint_and_updates_by_their_task() -> None:
    step = json.loads(line(0.0, EVENTS[0], COMMANDS))
    assert step["event"]["result"]["adapter"] == f"sha256:{fingerprint(ONE)}"
    assert step["event"]["result"]["metrics"] == {"loss": 0.5}
    assert step["commands"][0]["task"]["start"]["train"] == f"sha256:{fingerprint(ONE)}"
    assert step["commands"][2]["updates"] == [5]
    assert step["commands"][4]["reason"] == 'odd "name"\n'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_json_does_not_know_is_told_in_words(value: float) -> None:
    """A client whose training diverged is rejected; the trace must be able to say so."""
    step = json.loads(line(0.0, UpdateArrived("a", 1, make_result(ONE, metrics={"loss": value})), []))
    assert step["event"]["result"]["metrics"] == {"loss": str(value)}


@pytest.mark.parametrize("odd", [torch.zeros(1), object(), {"a": {torch.zeros(1)}}, Model])
def test_what_has_no_place_in_a_trace_is_an_error(odd: object) -> None:
    with pytest.raises(TypeError, match="place in a trace"):
        written(odd)


def test_the_observer_writes_and_flushes_each_step() -> None:
    class Counted(io.StringIO):
        flushed = 0

        def flush(self) -> None:
            self.flushed += 1

    file = Counted()
    trace = Trace(file)
    trace(0.0, TimerFired(), [])
    trace(1.0, ClientLost("a"), [Stop("done")])
    assert [json.loads(text)["time"] for text in file.getvalue().splitlines()] == [0.0, 1.0]
    assert file.flushed == 2
