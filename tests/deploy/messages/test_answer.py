"""An answer as bytes: what arrives is what the codec gives, and whatever else arrives is Malformed and nothing worse."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom.aggregate.scaffold import Scaffold
from fedloom.core import message_size
from fedloom.core.codec import Codec, DeltaInt8, Exact, Half, HalfChange
from fedloom.core.fingerprint import fingerprint
from fedloom.core.lora import Adapter, Factor, cut_factor, from_tensors, map_tensors, named_tensors
from fedloom.core.schema import Malformed
from fedloom.core.transfer import encode_answer, encode_start
from fedloom.core.types import Budget, ClientState, Result, Rules, Task, TaskStart
from fedloom.core.validate_answer import why_invalid
from fedloom.deploy.messages.answer import FORMAT, HEADER, decode_result, encode_result
from fedloom.hierarchy.edge import trained_part
from tests.support import toys
from tests.support.storms import tries
from tests.support.toys import adapter, changed, make_result, returned, sent

LIMIT = 10**6
CODECS = (None, Exact(), Half(), HalfChange(), DeltaInt8())
LAYERS = {"only": (2, 3), "twin": (3, 2)}
every_codec = pytest.mark.parametrize("codec", CODECS, ids=str)


def task_for(start: Adapter, codec: Codec | None = None, number: int = 7, client: str = "c1", **more: Any) -> Task:
    begin = encode_start(TaskStart(start, "0", **more), codec)
    return Task(number, client, 0, begin, Budget(4, 5), 0.0)


def through(task: Task, result: Result) -> Result:
    client, number, back = decode_result(encode_result(task, result), LIMIT, {task.id: task})
    assert (client, number) == (task.client, task.id)
    return back


TASK = task_for(adapter(2, layers=LAYERS), DeltaInt8())
SMALL = make_result(changed(TASK.start, 1), metrics={"loss": 0.1 + 0.2, "seconds_train": 3.0})
BYTES = encode_result(TASK, SMALL)
TASKS = {7: TASK}
FLAT = safetensors.torch.load(BYTES)
MANIFEST = json.loads(json.loads(BYTES[8 : 8 + int.from_bytes(BYTES[:8], "little")])["__metadata__"][HEADER])


def packed(manifest: Any, flat: dict[str, torch.Tensor] | None = None) -> bytes:
    """A file with any manifest and any buffers."""
    header = manifest if isinstance(manifest, str) else json.dumps(manifest)
    return safetensors.torch.save(FLAT if flat is None else flat, {HEADER: header})


def refused(data: bytes, because: str = ".", limit: int = LIMIT) -> None:
    with pytest.raises(Malformed, match=because):
        decode_result(data, limit, TASKS)


# What arrives --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [None, Exact()], ids=str)
@pytest.mark.parametrize("start", [adapter(4), Adapter({}, adapter(1).dense), Adapter(adapter(3).factors)])
def test_in_float32_a_round_trip_is_exact(start: Adapter, codec: Codec | None) -> None:
    task = task_for(start, codec, 9, "Zoë/π")
    result = Result(changed(start, 1), 12, 345, 6, {"loss": 0.1 + 0.2, "seconds_train": 1e-300, "cut": -1e12})
    back = through(task, result)
    assert fingerprint(back.adapter) == fingerprint(result.adapter)
    assert replace(back, adapter=result.adapter) == result


@every_codec
@pytest.mark.parametrize("method", toys.aggregators(), ids=toys.called)
def test_what_arrives_is_what_a_simulation_merges_and_costs_what_is_counted(method: Any, codec: Codec | None) -> None:
    task = sent(method, method.init(adapter(8)), 4)
    task = replace(task, start=encode_start(task.start, codec))
    given = returned(task, changed(task.start, 1)).result
    if task.start.control is not None:
        moved = map_tensors(torch.add, task.start.control, map_tensors(torch.ones_like, task.start.control))
        given = replace(given, control=moved)
    merged, _ = encode_answer(task, ClientState(), given, ClientState())
    back = through(task, given)
    assert why_invalid(task, back) is None
    assert fingerprint(back.adapter) == fingerprint(merged.adapter)
    assert (back.control is None) == (merged.control is None)
    if back.control is not None and merged.control is not None:
        assert fingerprint(back.control) == fingerprint(merged.control)
    buffers = safetensors.torch.load(encode_result(task, given)).values()
    assert sum(buffer.nbytes for buffer in buffers) == message_size.upload_size(task, merged).total


def test_a_control_variate_travels_beside_the_adapter() -> None:
    task = sent(Scaffold(), Scaffold().init(adapter(8)), 4)
    given = make_result(changed(task.start, 1), control=adapter(4, 5))
    back = through(task, given)
    assert back.control is not None
    assert given.control is not None
    assert fingerprint(back.control) == fingerprint(given.control)
    assert fingerprint(back.adapter) == fingerprint(given.adapter)


def test_views_and_special_values_survive() -> None:
    f = adapter(4).factors["query"]
    f.up[0, 0], f.up[1, 1] = float("nan"), -0.0
    given = Adapter({"a.b": cut_factor(f, 2), "c": Factor(f.down[::2], f.up[:, ::2])})
    start = map_tensors(torch.zeros_like, given)
    assert fingerprint(through(task_for(start), make_result(given)).adapter) == fingerprint(given)


@every_codec
def test_what_stayed_is_not_sent_and_arrives_to_the_bit(codec: Codec | None) -> None:
    task = task_for(adapter(4), codec)
    flat = {name: tensor.clone() for name, tensor in named_tensors(task.start.train).items()}
    flat["query.up"][:, 2] += 1.0
    data = encode_result(task, make_result(from_tensors(task.start.train, flat)))
    numbers = sum(buffer.nbytes for buffer in safetensors.torch.load(data).values())
    assert numbers == (codec or Exact()).number * 12 + (codec or Exact()).row
    back = named_tensors(decode_result(data, LIMIT, {7: task})[2].adapter)
    still = torch.arange(4) != 2
    assert all(back[name].equal(tensor) for name, tensor in flat.items() if name != "query.up")
    assert back["query.up"][:, still].equal(flat["query.up"][:, still])


@every_codec
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3.4e38, 1e31])
def test_what_no_server_takes_is_sent_and_refused_there(codec: Codec | None, value: float) -> None:
    task = task_for(adapter(4), codec)
    spoiled = changed(task.start, 1)
    spoiled.factors["value"].up[3, 1] = value
    reason = why_invalid(task, through(task, make_result(spoiled)))
    assert reason is not None
    assert "value.up" in reason


@every_codec
def test_an_answer_that_pruned_itself_arrives_at_its_rank(codec: Codec | None) -> None:
    task = sent(toys.aggregators()[0], toys.aggregators()[0].init(adapter(8)), 4)
    task = replace(task, start=encode_start(TaskStart(adapter(4), "0", rules=Rules()), codec))
    given = changed(task.start, 1)
    pruned = Adapter({name: cut_factor(factor, 3) for name, factor in given.factors.items()}, given.dense)
    back = through(task, make_result(pruned))
    assert {factor.rank for factor in back.adapter.factors.values()} == {3}
    assert why_invalid(task, back) is not None, "nobody allowed it here, and the server says so"


@every_codec
def test_an_answer_of_some_layers_arrives_with_these_and_takes_no_bytes_for_others(codec: Codec | None) -> None:
    task = task_for(adapter(4), codec)
    whole = make_result(changed(task.start, 1))
    for held in (["query"], ["value"]):
        factors = {name: whole.adapter.factors[name] for name in held}
        some = replace(whole, adapter=Adapter(factors, whole.adapter.dense))
        back = through(task, some)
        assert list(back.adapter.factors) == held
        alone = encode_answer(trained_part(task, some), ClientState(), some, ClientState())[0]
        assert fingerprint(back.adapter) == fingerprint(alone.adapter)
        assert len(encode_result(task, some)) < len(encode_result(task, whole))
        assert "query" in str(why_invalid(task, back)) or "value" in str(why_invalid(task, back)), (
            "a client was asked for all"
        )


@pytest.mark.parametrize("layers", [[], [2], [-1], [1, 0], [0, 0], ["only"], "only", [10**400], [True]])
def test_layers_that_the_task_has_not_are_refused(layers: Any) -> None:
    refused(packed(MANIFEST | {"layers": layers}))


def test_the_same_result_gives_the_same_bytes_twice() -> None:
    assert encode_result(TASK, SMALL) == BYTES
    assert encode_result(TASK, make_result(changed(TASK.start, 1), metrics=SMALL.metrics)) == BYTES
    assert encode_result(replace(TASK, id=8), SMALL) != BYTES


# What is refused -----------------------------------------------------------------------------------------------------


def test_the_helper_packs_what_encode_would() -> None:
    assert decode_result(packed(MANIFEST), LIMIT, TASKS)[:2] == ("c1", 7)


def test_a_file_cut_off_at_any_length_is_refused() -> None:
    for length in range(len(BYTES)):
        refused(BYTES[:length])


def test_more_bytes_than_allowed_are_refused_before_they_are_read() -> None:
    decode_result(BYTES, len(BYTES), TASKS)
    refused(BYTES, "above the limit", len(BYTES) - 1)
    refused(b"x" * 1000, "above the limit", 999)
    refused(BYTES + b"x")


def test_an_answer_to_a_task_that_nobody_gave_is_refused() -> None:
    refused(encode_result(replace(TASK, id=8), SMALL), "task 8 is not outstanding")


@given(st.integers(0, len(BYTES) - 1), st.integers(1, 255))
@tries(1200)
def test_a_flipped_byte_is_refused_or_stays_in_its_place(position: int, mask: int) -> None:
    """Numbers have no checksum: what may pass is an answer of the form asked for, for `check` to judge."""
    damaged = bytearray(BYTES)
    damaged[position] ^= mask
    with suppress(Malformed):
        back = decode_result(bytes(damaged), LIMIT, TASKS)[2]
        assert {n: t.shape for n, t in named_tensors(back.adapter).items()} == {
            n: t.shape for n, t in named_tensors(TASK.start.train).items()
        }


@given(st.binary(max_size=300))
@tries(600)
def test_random_bytes_are_refused(data: bytes) -> None:
    refused(data)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from([*MANIFEST, "odd"]), JSON, max_size=4))
@tries(400)
def test_any_manifest_is_read_or_refused(changes: dict[str, Any]) -> None:
    with suppress(Malformed):
        assert isinstance(decode_result(packed(MANIFEST | changes), LIMIT, TASKS)[2], Result)


FORMS = st.sampled_from(["f32", "f16", "i8"])
ENTRIES = st.lists(
    st.tuples(FORMS, st.integers(-126, 126), st.none() | st.lists(st.integers(-1, 4), max_size=3)).map(list),
    min_size=5, max_size=5,
)  # fmt: skip


@given(ENTRIES, st.dictionaries(FORMS, st.integers(0, 24)))
@tries(800)
def test_any_entries_over_any_buffers_are_read_or_refused(entries: Any, sizes: dict[str, int]) -> None:
    kinds = {"f32": torch.float32, "f16": torch.float16, "i8": torch.int8}
    flat = {form: torch.ones(size, dtype=kinds[form]) for form, size in sizes.items()}
    with suppress(Malformed):
        decode_result(packed(MANIFEST | {"tensors": entries}, flat), LIMIT, TASKS)


@pytest.mark.parametrize(
    "change",
    [
        {"format": FORMAT + 1},
        {"format": "1"},
        {"task": 0},
        {"task": "7"},
        {"task": True},
        {"task": 1.0},
        {"client": ""},
        {"client": "x" * 201},
        {"client": 3},
        {"examples": "many"},
        {"tokens": None},
        {"steps": 1.5},
        {"metrics": []},
        {"metrics": {"loss": "low"}},
        {"metrics": {str(k): 0.0 for k in range(101)}},
        {"metrics": {"loss" * 20_000: 0.0}},
        {"metrics": {"note": 0.0}},
        {"metrics": {"loss": 1e300}},
        {"rank": -1},
        {"layout": None},
        {"tensors": [["f64", 0, None]] * 5},
        {"tensors": [["f32", 127, None]] * 5},
        {"tensors": [["f32", 0, [0.5]]] * 5},
    ],
    ids=str,
)
def test_a_wrong_manifest_is_refused_by_the_name_of_its_field(change: dict[str, Any]) -> None:
    refused(packed(MANIFEST | change), f"manifest: .*{next(iter(change))}")


def test_a_manifest_has_all_its_fields_and_no_others() -> None:
    for name in MANIFEST:
        refused(packed({n: v for n, v in MANIFEST.items() if n != name}), f"manifest: .*{name}")
    refused(packed(MANIFEST | {"code": "import os"}), "manifest: .*code")


@pytest.mark.parametrize("text", ["", "null", "[]", "{", "[" * 100_000, '"x"', "NaN"], ids=lambda t: t[:5])
def test_a_header_that_is_no_manifest_is_refused(text: str) -> None:
    refused(packed(text))


def test_a_file_without_a_manifest_is_refused() -> None:
    refused(safetensors.torch.save(FLAT), "no manifest")
    refused(safetensors.torch.save(FLAT, {"other": "x"}), "no manifest")


@pytest.mark.parametrize(
    "other",
    [adapter(1, layers=LAYERS), adapter(3, layers=LAYERS), adapter(2, layers={"only": (2, 3), "other": (3, 2)}),
     adapter(2, layers={"only": (3, 3), "twin": (3, 2)}), Adapter(adapter(2, layers=LAYERS).factors)],
)  # fmt: skip
def test_an_answer_of_other_layers_is_refused(other: Adapter) -> None:
    task = task_for(other, DeltaInt8())
    data = encode_result(task, make_result(changed(task.start, 1)))
    with suppress(Malformed):
        back = decode_result(data, LIMIT, TASKS)[2]
        assert why_invalid(TASK, back) is not None
        assert {factor.rank for factor in back.adapter.factors.values()} == {1}, "a lower rank is for `check` to judge"


ODD = {
    "a buffer too many": FLAT | {"f16": torch.zeros(1, dtype=torch.float16)},
    "an unknown buffer": FLAT | {"odd": torch.zeros(1)},
    "a missing buffer": {"i8": FLAT["i8"]},
    "a longer buffer": FLAT | {"i8": torch.zeros(len(FLAT["i8"]) + 1, dtype=torch.int8)},
    "a shorter buffer": FLAT | {"f32": FLAT["f32"][:-1]},
    "a matrix": FLAT | {"i8": FLAT["i8"][None]},
    "another dtype": FLAT | {"i8": FLAT["i8"].to(torch.uint8)},
    "nothing": {},
}


@pytest.mark.parametrize("flat", ODD.values(), ids=ODD)
def test_buffers_that_do_not_hold_what_the_manifest_says_are_refused(flat: dict[str, torch.Tensor]) -> None:
    refused(packed(MANIFEST, flat), "buffer")


@pytest.mark.parametrize("rows", [[1, 0], [0, 0], [0, 2], [-1, 0]], ids=str)
def test_rows_out_of_order_or_out_of_range_are_refused(rows: list[int]) -> None:
    entries = [
        [form, exponent, rows if number else None] for number, (form, exponent, _) in enumerate(MANIFEST["tensors"])
    ]
    refused(packed(MANIFEST | {"tensors": entries}), "no such rows")


def test_only_float16_has_an_exponent() -> None:
    refused(packed(MANIFEST | {"tensors": [["i8", 1, None]] * 5}), "has no exponent")
