"""The trace: one line of JSON a step, tensors by their sha256."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, get_args
from weakref import ref

import pytest
import torch

from fedloom.core import fingerprint as fingerprints
from fedloom.core.codec import DeltaInt8, Summed
from fedloom.core.events import (
    CanaryScored,
    Cancel,
    CheckCanary,
    ClientJoined,
    ClientLost,
    Command,
    Discarded,
    Dispatch,
    EdgeJoined,
    EdgeLost,
    EdgeReported,
    EdgeReturned,
    Evaluate,
    Event,
    InsideEdge,
    Move,
    Moved,
    OpenSum,
    PartsReady,
    Publish,
    Regroup,
    Reject,
    Release,
    ReleasesCounted,
    Report,
    ScoresReady,
    SetAside,
    SlotBlock,
    Stop,
    SumFailed,
    SumOpened,
    TaskFailed,
    TaskReceived,
    TimerFired,
    UpdateArrived,
)
from fedloom.core.fingerprint import fingerprint
from fedloom.core.lora import Adapter, Factor, cut_factor
from fedloom.core.schema import LATER
from fedloom.core.types import Budget, GroupStatistics, MemberWork, Model, Profile, Pruning, Result, Rules, Update
from fedloom.runs.trace import ENCODER, Trace, encode_step
from tests.support.toys import adapter, make_result, make_task, make_update

ONE = adapter(2)
QUERY = ONE.factors["query"]


def with_query(f: Factor) -> Adapter:
    return replace(ONE, factors={**ONE.factors, "query": f})


def test_a_fingerprint_does_not_depend_on_order_or_memory() -> None:
    backwards = Adapter(dict(reversed(list(ONE.factors.items()))), ONE.dense)
    strided = with_query(Factor(QUERY.down.T.contiguous().T, cut_factor(Factor(QUERY.down, QUERY.up), 2).up))
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
    monkeypatch.setattr(fingerprints, "_digest", lambda adapter: str(hashed.append(adapter)))
    one = adapter(2)
    for _ in range(2):
        encode_step(
            0.0, UpdateArrived("a", 1, make_result(one)), [Publish(1, Model(one), ()), Dispatch(make_task(one, 2))]
        )
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
    ScoresReady(3, {"accuracy": 0.9}),
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
    text = encode_step(1.5, event, COMMANDS)
    assert "\n" not in text
    step = json.loads(text)
    assert step["time"] == 1.5
    assert step["event"]["type"] == type(event).__name__
    assert [command["type"] for command in step["commands"]] == [type(command).__name__ for command in COMMANDS]


def encoded(value: object) -> object:
    """What Python's own encoder is to make of a value: the rule of the trace, one level deep."""
    if isinstance(value, Adapter):
        return f"sha256:{fingerprint(value)}"
    if isinstance(value, Update):
        return value.task.id
    if dataclasses.is_dataclass(value):
        told = {"type": type(value).__name__} | {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        for name, before in LATER.get(type(value).__name__, {}).items():
            if told[name] == before:  # a field that came later and says nothing is not written
                del told[name]
        if isinstance(value, Model):
            text = "".join(f"{name}:{fingerprint(value.memory[name])};" for name in sorted(value.memory))
            told["memory"] = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}" if text else None
        return told
    assert isinstance(value, Mapping)
    return dict(value)


ODD = 'Zoë \U0001f9f5 \ud800 \x00\x7f\u2028 "\\/\n'
RULES = Rules(("down", "dense"), ("up",), 3, 0.1, Pruning(1e-17, 0.99, 2))
RICH = replace(make_task(ONE, 2), client=ODD, sent=1e22)
RICH = replace(
    RICH, start=replace(RICH.start, directions=(0, 5), fold=ONE, seeded=("down",), rules=RULES, codec=DeltaInt8())
)
MEMORY = Model(ONE, 3, 0.25, fold=ONE, memory=MappingProxyType({"ö": ONE, "b": adapter(3)}))
HOSTILE = Result(ONE, True, None, 10**30, MappingProxyType({ODD: 0.1, "b": [1, (2.5, {})], "c": -0.0, 3: "x"}), ONE)  # type: ignore[arg-type,dict-item]
TOLD = GroupStatistics(
    Budget(4, 2), (MemberWork(ODD, 4, None, 1, 2, 0.5, 1e-300, 0.0, None, 1.0),), {ODD: 0.1}, 0.5, (1.0, 0.0), None
)


@pytest.mark.parametrize("now", [0, 0.1, 1e-300, 12345678.9])
def test_a_line_is_what_pythons_encoder_writes(now: float) -> None:
    """Byte for byte, for every event and command: what was written yesterday can be compared with what is written today."""
    encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False, default=encoded).encode
    profile = Profile(ODD, 3, 1e300, tier="")
    events = [
        *EVENTS,
        ClientJoined(profile),
        UpdateArrived(ODD, 7, HOSTILE),
        ScoresReady(0, {}),
        TaskFailed(ODD, 1, ODD),
    ]
    events += [TaskReceived(RICH), EdgeLost(ODD, resumes=True), EdgeReturned(ODD)]
    events += [
        EdgeJoined(profile, (profile,)),
        EdgeReported(ODD, 7, HOSTILE, TOLD, (profile,)),
        EdgeReported(ODD, 7, HOSTILE),
        CanaryScored(2, {ODD: 0.1, "loss": -0.0}),
        ReleasesCounted({ODD: 2}, {ODD: 3}),
        PartsReady(ODD, 7),
        SumOpened(7, (SlotBlock(0, 2, (7, 8)),), ONE),
        SumFailed(7, ODD),
    ]
    commands = [*COMMANDS, Dispatch(RICH), Publish(2, MEMORY, ()), Evaluate(2, MEMORY), Reject(ODD, 2, ODD)]
    commands += [
        Report(HOSTILE),
        Discarded(3, ODD, ODD),
        InsideEdge(ODD, 9, Publish(2, MEMORY, (make_update(ONE, 2, 5),))),
    ]
    commands += [Regroup(3, 0.25, 0.1, (Move(ODD, "e0", "e1"),)), Moved(Move(ODD, "e0", "e1"), 4)]
    commands += [CheckCanary(2, 3, MEMORY, (ODD, "b")), SetAside(ODD, 9, ODD)]
    release = Release(3, 7, "banded", 0.5, 2.0, {ODD: 1.0}, {ODD: 0.5}, "ab" * 32)
    commands += [
        release,
        InsideEdge(ODD, 7, release),
        OpenSum(7, (SlotBlock(0, 2, (7, 8)),), 5, 0.6, Summed(16, 1e-3, 8)),
    ]
    assert {type(event) for event in events} == set(get_args(Event))
    assert {type(command) for command in commands} == set(get_args(Command))
    for event in events:
        assert encode_step(now, event, commands) == encode({"time": now, "event": event, "commands": commands})


def test_a_step_tells_tensors_by_their_fingerprint_and_updates_by_their_task() -> None:
    step = json.loads(encode_step(0.0, EVENTS[0], COMMANDS))
    assert step["event"]["result"]["adapter"] == f"sha256:{fingerprint(ONE)}"
    assert step["event"]["result"]["metrics"] == {"loss": 0.5}
    assert step["commands"][0]["task"]["start"]["train"] == f"sha256:{fingerprint(ONE)}"
    assert step["commands"][2]["updates"] == [5]
    assert step["commands"][4]["reason"] == 'odd "name"\n'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_json_does_not_know_is_told_in_words(value: float) -> None:
    """A client whose training diverged is rejected; the trace must be able to say so."""
    step = json.loads(encode_step(0.0, UpdateArrived("a", 1, make_result(ONE, metrics={"loss": value})), []))
    assert step["event"]["result"]["metrics"] == {"loss": str(value)}


@pytest.mark.parametrize("odd", [torch.zeros(1), object(), {"a": {torch.zeros(1)}}, Model])
def test_what_has_no_place_in_a_trace_is_an_error(odd: object) -> None:
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        ENCODER.encode(odd)


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


def test_answers_of_a_private_run_are_told_by_digests_that_need_its_secret() -> None:
    """Of an answer and of one inside a tree; all else is written as ever, so that a reader can check what was released."""
    event, report = UpdateArrived("a", 1, make_result(ONE)), InsideEdge("e0", 9, Report(make_result(ONE)))
    commands = [Dispatch(make_task(ONE, 2)), Publish(1, Model(ONE), (make_update(ONE, 2, 5),)), report]
    plain, one, other = (encode_step(0.0, event, commands, secret) for secret in (b"", b"s" * 32, b"t" * 32))
    digest = f'"sha256:{fingerprint(ONE)}"'
    assert plain.count(digest) == one.count(digest) + 2 == other.count(digest) + 2
    mine, theirs = (json.loads(line)["event"]["result"]["adapter"] for line in (one, other))
    assert mine.startswith("hmac:")
    assert mine != theirs
    assert re.sub(r'"hmac:[0-9a-f]{64}"', digest, one) == plain


def test_a_guess_of_anothers_answer_does_not_meet_its_digest() -> None:
    """A member may send its guess as its own answer, and read the trace."""
    mine, guess = (encode_step(0.0, UpdateArrived("a", task, make_result(ONE)), [], b"s" * 32) for task in (1, 2))
    digests = {json.loads(line)["event"]["result"]["adapter"] for line in (mine, guess)}
    assert len(digests) == 2
    again = encode_step(0.0, UpdateArrived("a", 1, make_result(ONE)), [], b"s" * 32)
    assert again == mine
