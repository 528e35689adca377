"""From a dataclass to JSON and back: strict, complete, in time and memory of the text, and without a word of its values."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.aggregate.flexlora import FlexLoRA
from fedloom.core.change_norms import ChangeNorms
from fedloom.core.codec import Codec, Half
from fedloom.core.errors import Refused
from fedloom.core.events import Event, TaskFailed
from fedloom.core.indexed_dict import IndexedTable
from fedloom.core.rate_by_rank import RateByRank
from fedloom.core.schema import (
    LATER,
    Decoder,
    Encoder,
    Malformed,
    check_fields,
    declared_fields,
    jsonable,
    reachable_classes,
    with_current_names,
)
from fedloom.core.types import Budget, GroupStatistics, MemberWork, Profile
from fedloom.deploy.messages.messages import RunTerms
from fedloom.plan.budget import Plan
from tests.support.storms import one_in

BUDGET = {"type": "Budget", "rank": 2, "steps": 3, "rounds": 1, "depth": None, "why": ""}
STATISTICS = GroupStatistics(
    Budget(4, 8),
    (MemberWork("c0", 4, None, 2, 8, 0.5, 1.0, 0.25, None, 1.5), MemberWork("c1", 2, 1, 1, 4, 0.5, 1.0, 0.25)),
    {"query": 0.5, "value": 3.0},
    0.25,
    (1.0, 0.5),
    None,
)


def double(number: float) -> float:
    """A function that is known by its name."""
    return 2 * number


class Shape(Protocol):
    """A protocol with its implementations beside it."""

    @property
    def corners(self) -> int:
        """How many."""
        ...


@dataclass(frozen=True, slots=True)
class Triangle:
    """One implementation."""

    corners: int = 3


@dataclass(frozen=True, slots=True)
class Circle:
    """None: it has no corners."""

    radius: float = 1.0


@dataclass(frozen=True, slots=True)
class Everything:
    """A field of each kind that can be read."""

    whole: int
    number: float
    flag: bool
    text: str
    word: Literal["a", "b"]
    maybe: int | None
    either: int | str
    pair: tuple[int, str]
    row: tuple[float, ...]
    several: list[Budget]
    table: Mapping[str, Budget | None]
    numbered: dict[int, float]
    places: IndexedTable[str, int]
    event: Event
    shape: Shape
    function: Callable[[float], float]
    codec: Codec | None = None
    inner: tuple[Profile, ...] = field(default=())


EVERYTHING = Everything(
    whole=-3, number=1e-05, flag=True, text='ü "\ud800"\n', word="b", maybe=None, either="x", pair=(1, "y"),
    row=(1.0, math.inf, -0.0), several=[Budget(1, 2)], table={"a": None, "b": Budget(3, 4, 1, 2, "so")},
    numbered={7: 0.1, -1: 1e22}, places=IndexedTable({"k": 1}), event=TaskFailed("c", 1, "why"), shape=Triangle(4),
    function=double, codec=Half(), inner=(Profile("c", 3, most=Budget(1, 1)),),
)  # fmt: skip
FUNCTIONS = Encoder(default=lambda value: json.dumps(value.__name__))


def test_a_value_of_every_kind_comes_back() -> None:
    text = FUNCTIONS.encode(EVERYTHING)
    back = Decoder([double]).decode(Everything, text)
    assert isinstance(back.places, IndexedTable)
    assert {**back.places} == {**EVERYTHING.places}
    assert FUNCTIONS.encode(back) == text
    assert (back.event, back.shape, back.function, back.codec) == (
        TaskFailed("c", 1, "why"),
        Triangle(4),
        double,
        Half(),
    )


@pytest.mark.parametrize("number", [0.1, 1e-05, 1e16, 1e22, 5e-324, -0.0, 12345678.9, 10**30, True, None])
def test_scalars_are_written_as_python_does(number: object) -> None:
    """Run hashes and traces depend on it: other libraries write 0.00001."""
    assert Encoder().encode({"a": [number]}) == json.dumps({"a": [number]}, separators=(",", ":"))


@pytest.mark.parametrize("word", ["nan", "inf", "-inf"])
def test_numbers_that_json_does_not_have_are_words(word: str) -> None:
    assert Encoder().encode(float(word)) == f'"{word}"'
    assert repr(Decoder().decode(float, f'"{word}"')) == word
    with pytest.raises(Malformed, match="expected a finite number, got text"):
        Decoder(finite=True).decode(float, f'"{word}"')
    for literal in ("NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400):
        with pytest.raises(Malformed):
            Decoder(finite=True).decode(float, literal)


@pytest.mark.parametrize("odd", [object(), {1}, {(1, 2): 3}, Budget, double, b"bytes", {"a": [object()]}])
def test_what_has_no_place_in_json_is_an_error(odd: object) -> None:
    with pytest.raises(TypeError):
        Encoder().encode(odd)


def test_settings_hold_paths_names_and_no_data() -> None:
    rows = [{"text": "a patient"}, {"text": "another"}]
    told = jsonable(
        {"at": Path("a/b"), "how": double, "who": object(), "rows": rows, "set": {1}, "budget": Budget(1, 2)}
    )
    assert told["at"] == "a/b"
    assert (told["how"], told["who"], told["set"]) == ("double", "object", [1])
    assert told["budget"] == {"type": "Budget", "rank": 1, "steps": 2, "depth": None, "rounds": 1, "why": ""}
    assert told["rows"].keys() == {"rows", "sha256"}
    assert "patient" not in json.dumps(told)


@pytest.mark.parametrize(
    ("hint", "data"),
    [
        (int, 1.0),
        (int, True),
        (int, "1"),
        (float, "1.0"),
        (float, None),
        (float, True),
        (str, 1),
        (bool, 1),
        (int | None, "x"),
        (int | str, 1.5),
        (Literal["a", "b"], "c"),
        (Literal["a", "b"], ["a"]),
        (tuple[int, str], [1]),
        (tuple[int, str], [1, "x", 2]),
        (tuple[int, ...], {"0": 1}),
        (list[int], "12"),
        (Mapping[int, int], {"x": 1}),
        (Mapping[str, int], [["x", 1]]),
        (Budget, None),
        (Budget, BUDGET | {"rank": "2"}),
        (Budget, BUDGET | {"width": 2}),
        (Budget, {"type": "Budget", "rank": 2}),
        (Budget, {"type": "Profile", "rank": 2}),
        (Budget, {"type": "TimerFired"}),
        (Budget, {"type": []}),
        (Event, BUDGET),
        (Event, {"is": 3}),
        (Event, {"type": ["TimerFired"]}),
        (Event, 3),
        (Shape, {"type": "Circle", "radius": 1.0}),
        (Shape, "Triangle"),
        (Shape, "double"),
        (Codec | None, {"type": "Budget"}),
        (Callable[[float], float], "Triangle"),
        (Callable[[float], float], "eval"),
    ],
    ids=str,
)
def test_json_of_another_kind_is_refused(hint: Any, data: object) -> None:
    with pytest.raises(Malformed):
        Decoder([double]).read(hint, data)


def test_json_of_the_right_kind_is_the_value() -> None:
    decoder = Decoder()
    assert decoder.read(Budget, BUDGET) == Budget(2, 3)
    assert decoder.read(Budget | None, None) is None
    assert decoder.read(tuple[float, ...], [1.5, "inf"]) == (1.5, float("inf"))
    assert type(decoder.read(float, 3)) is int, "so that it is written again as it was"
    assert decoder.read(Event, {"type": "TaskFailed", "client": "a", "task": 1, "reason": ""}) == TaskFailed("a", 1, "")


def test_classes_are_found_and_two_of_one_name_are_not_confused() -> None:
    assert {"Budget", "MemberWork"} <= reachable_classes(GroupStatistics).keys()
    assert reachable_classes(Codec | None).keys() == {"Exact", "Half", "HalfChange", "DeltaInt8", "Summed"}
    with pytest.raises(TypeError, match="cannot be read back"):
        reachable_classes(dict[str, object])
    with pytest.raises(TypeError, match="two kinds of Budget"):
        reachable_classes(Budget, _second_budget())


def _second_budget() -> type:
    from dataclasses import make_dataclass

    return make_dataclass("Budget", [("rank", int)])


def test_what_is_wrong_is_told_by_its_place_and_never_by_its_value() -> None:
    data = json.loads(Encoder().encode(STATISTICS))
    data["work"][1]["client"], data["work"][0]["steps"] = 7, "a patient's name"
    with pytest.raises(Malformed) as caught:
        Decoder().read(GroupStatistics, data)
    assert str(caught.value) == "work: steps: expected a whole number, got text"


WITH_LATER: tuple[type, ...] = (Budget, ChangeNorms, FlexLoRA, Plan, RunTerms)


@pytest.mark.parametrize(
    ("plain", "said"),
    [
        (Budget(2, 3), Budget(2, 3, rate=RateByRank(0.5, 8))),
        (ChangeNorms(1, 2, 0.5, 0.25), ChangeNorms(1, 2, 0.5, 0.25, rate=2.0)),
        (FlexLoRA(), FlexLoRA(0.9)),
    ],
    ids=lambda one: type(one).__name__,
)
def test_a_field_that_came_later_is_written_only_where_it_says_something(plain: Any, said: Any) -> None:
    kind, (name,) = type(plain), LATER[type(plain).__name__]
    for value, there in ((plain, False), (said, True)):
        text = Encoder().encode(value)
        assert (f'"{name}":' in text) == there
        assert Decoder().decode(kind, text) == value
    assert {*LATER} == {kind.__name__ for kind in WITH_LATER}
    assert all(LATER[kind.__name__].keys() <= declared_fields(kind).keys() for kind in WITH_LATER)


def test_names_of_an_older_version_are_those_of_today() -> None:
    old = {
        "plan": {"type": "Planned", "rule": {"type": "Earned", "Planned": "Planned"}},
        "rows": [{"type": "Scored"}],
        "n": 1,
    }
    assert with_current_names(old) == {
        "plan": {"type": "JointPlan", "rule": {"type": "LossRate", "Planned": "Planned"}},
        "rows": [{"type": "GradientScore"}],
        "n": 1,
    }


HOSTILE = {
    "fields that nobody knows": '{"type":"GroupStatistics",' + ",".join(f'"k{i}":0' for i in range(600_000)) + "}",
    "rows of another kind": '{"type":"GroupStatistics","budget":%s,"work":[' + "0," * 4_000_000 + "0]}",
    "rows within a field": json.dumps(BUDGET)[:-1].replace('""', "[" + "0," * 4_000_000 + "0]") + "}",
    "brackets": "[" * 8_000_000,
    "objects": '{"type":' * 1_000_000,
    "a number": "1" * 8_000_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("hint", one_in(2, [GroupStatistics, Budget]), ids=["statistics", "budget"])
def test_a_hostile_text_costs_no_more_than_its_length(hint: Any, text: str) -> None:
    """Eight megabytes, as much as a header may have. Libraries that collect all errors take half a minute and gigabytes."""
    before = time.process_time()
    with pytest.raises(Malformed) as caught:
        Decoder().decode(hint, text)
    assert time.process_time() - before < 5
    assert len(str(caught.value)) < 500


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=5,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in JSON data, however deep."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


def put(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The data with another value in one place."""
    if not path:
        return value
    inner = put(data[path[0]], path[1:], value)
    return {**data, path[0]: inner} if isinstance(data, dict) else [*data[: path[0]], inner, *data[path[0] + 1 :]]


WHOLE = json.loads(FUNCTIONS.encode(EVERYTHING))


@given(st.sampled_from(places(WHOLE)), JSON)
@settings(max_examples=300, deadline=None)
def test_anything_in_any_place_is_read_as_it_is_or_refused(path: tuple[Any, ...], value: Any) -> None:
    data = put(WHOLE, path, value)
    with suppress(Malformed):
        back = Decoder([double]).decode(Everything, json.dumps(data))
        assert json.loads(FUNCTIONS.encode(back)) == json.loads(FUNCTIONS.encode(json.loads(json.dumps(data))))


def test_a_text_that_no_file_can_hold_is_refused() -> None:
    """Half a character (a lone surrogate) in a field: the manifest could not be written."""
    check_fields(budget_because("an emoji: \N{GRINNING FACE}"))
    with pytest.raises(Refused, match=r"why = .*half of a character") as caught:
        check_fields(budget_because("half an emoji: \ud83d"))
    str(caught.value).encode()


def budget_because(why: str) -> Budget:
    return Budget(2, 3, why=why)
