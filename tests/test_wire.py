"""A result as bytes: the round trip is exact, and whatever else arrives is Malformed and nothing worse."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.check import fault
from fedloom.lora import Adapter, Factor, cut
from fedloom.trace import fingerprint
from fedloom.types import Budget, Result, Start, Task
from fedloom.wire import FORMAT, HEADER, Malformed, decode, encode, tensors
from toys import adapter, fresh, make_result

LIMIT = 10**6
SMALL = make_result(adapter(1, layers={"only": (2, 3)}), metrics={"loss": 0.1 + 0.2, "seconds": 3.0})
BYTES = encode("c1", 7, SMALL)
MANIFEST = {
    "format": FORMAT,
    "task": 7,
    "client": "c1",
    "examples": 10,
    "tokens": 100,
    "steps": 1,
    "metrics": {},
    "tensors": 3,
}


def packed(manifest: Any, flat: dict[str, torch.Tensor] | None = None) -> bytes:
    """A file with any manifest and any tensors."""
    header = manifest if isinstance(manifest, str) else json.dumps(manifest)
    return safetensors.torch.save(tensors(SMALL.adapter) if flat is None else flat, {HEADER: header})


def refused(data: bytes, because: str = ".", limit: int = LIMIT) -> None:
    with pytest.raises(Malformed, match=because):
        decode(data, limit)


@pytest.mark.parametrize(
    "given_adapter", [adapter(4), fresh(2), Adapter({}, adapter(1).dense), Adapter(adapter(3).factors)]
)
def test_a_round_trip_is_exact(given_adapter: Adapter) -> None:
    result = Result(given_adapter, 12, 345, 6, {"loss": 0.1 + 0.2, "seconds": 1e-300, "big": 1.7e308})
    client, task, back = decode(encode("Zoë/π", 9, result), LIMIT)
    assert (client, task) == ("Zoë/π", 9)
    assert fingerprint(back.adapter) == fingerprint(given_adapter)
    assert replace(back, adapter=given_adapter) == result


def test_a_control_variate_travels_beside_the_adapter() -> None:
    result = replace(SMALL, control=adapter(1, 5, layers={"only": (2, 3)}))
    back = decode(encode("c1", 7, result), LIMIT)[2]
    assert back.control is not None
    assert result.control is not None
    assert fingerprint(back.control) == fingerprint(result.control)
    assert fingerprint(back.adapter) == fingerprint(SMALL.adapter)


def test_views_and_special_values_survive() -> None:
    f = adapter(4).factors["query"]
    f.up[0, 0], f.up[1, 1] = float("nan"), -0.0
    sent = Adapter({"a.b": cut(f, 2), "c": Factor(f.down[::2], f.up[:, ::2])})
    assert fingerprint(decode(encode("c", 1, make_result(sent)), LIMIT)[2].adapter) == fingerprint(sent)


def test_what_was_sent_passes_the_check_on_the_other_side() -> None:
    start = adapter(4)
    task = Task(1, "c", 0, Start(start, "0"), Budget(4, 5), 0, 0.0)
    assert fault(task, decode(encode("c", 1, make_result(adapter(4, 1))), LIMIT)[2]) is None
    assert fault(task, decode(encode("c", 1, make_result(adapter(2, 1))), LIMIT)[2]) is not None


def test_the_same_result_gives_the_same_bytes_twice() -> None:
    assert encode("c1", 7, SMALL) == BYTES
    assert encode("c1", 7, make_result(adapter(1, layers={"only": (2, 3)}), metrics=SMALL.metrics)) == BYTES
    assert encode("c1", 8, SMALL) != BYTES


def test_the_helper_packs_what_encode_would() -> None:
    assert decode(packed(MANIFEST), LIMIT)[:2] == ("c1", 7)


def test_a_file_cut_off_at_any_length_is_refused() -> None:
    for length in range(len(BYTES)):
        refused(BYTES[:length])


def test_more_bytes_than_allowed_are_refused_before_they_are_read() -> None:
    decode(BYTES, len(BYTES))
    refused(BYTES, "above the limit", len(BYTES) - 1)
    refused(b"x" * 1000, "above the limit", 999)
    refused(BYTES + b"x")


@given(st.integers(0, len(BYTES) - 1), st.integers(1, 255))
@settings(max_examples=600, deadline=None, derandomize=True)
def test_a_flipped_byte_is_refused_or_stays_in_its_place(position: int, mask: int) -> None:
    """Numbers have no checksum: what may pass is a result of the same form, for `check` to judge."""
    damaged = bytearray(BYTES)
    damaged[position] ^= mask
    with suppress(Malformed):
        assert isinstance(decode(bytes(damaged), LIMIT)[2], Result)


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_random_bytes_are_refused(data: bytes) -> None:
    refused(data)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from([*MANIFEST, "odd"]), JSON, max_size=4))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_manifest_is_read_or_refused(changes: dict[str, Any]) -> None:
    with suppress(Malformed):
        assert isinstance(decode(packed(MANIFEST | changes), LIMIT)[2], Result)


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
    ],
    ids=str,
)
def test_a_wrong_manifest_is_refused_by_the_name_of_its_field(change: dict[str, Any]) -> None:
    refused(packed(MANIFEST | change), f"manifest field {next(iter(change))}")


def test_a_manifest_has_all_its_fields_and_no_others() -> None:
    for name in MANIFEST:
        refused(packed({n: v for n, v in MANIFEST.items() if n != name}), f"manifest field {name}")
    refused(packed(MANIFEST | {"code": "import os"}), "manifest field code")


@pytest.mark.parametrize("text", ["", "null", "[]", "{", "[" * 100_000, '"x"', "NaN"], ids=lambda t: t[:5])
def test_a_header_that_is_no_manifest_is_refused(text: str) -> None:
    refused(packed(text))


def test_a_file_without_a_manifest_is_refused() -> None:
    refused(safetensors.torch.save(tensors(SMALL.adapter)), "no manifest")
    refused(safetensors.torch.save(tensors(SMALL.adapter), {"other": "x"}), "no manifest")


FLAT = tensors(SMALL.adapter)
ODD = {
    "an extra tensor": FLAT | {"odd": torch.zeros(1)},
    "a missing tensor": {n: t for n, t in FLAT.items() if n != "only.up"},
    "a half factor": {n: t for n, t in FLAT.items() if n != "only.up"} | {"odd": torch.zeros(1)},
    "another up": {n: t for n, t in FLAT.items() if n != "only.up"} | {"lonely.up": torch.zeros(2, 1)},
    "ranks that differ": FLAT | {"only.up": torch.zeros(2, 2)},
    "a vector": FLAT | {"only.down": torch.zeros(3)},
    "nothing": {},
}


@pytest.mark.parametrize("flat", ODD.values(), ids=ODD)
def test_tensors_that_are_no_adapter_are_refused(flat: dict[str, torch.Tensor]) -> None:
    refused(packed(MANIFEST, flat))
    if flat and len(flat) != 3:
        refused(packed(MANIFEST | {"tensors": len(flat)}, flat), "pairs")


def test_an_empty_tensor_is_read_or_refused() -> None:
    flat = {"only.down": torch.zeros(0, 3), "only.up": torch.zeros(2, 0), "dense:head": torch.zeros(0)}
    with suppress(Malformed):
        assert fingerprint(decode(packed(MANIFEST, flat), LIMIT)[2].adapter)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.uint16]
)
def test_other_dtypes_travel_or_are_refused_and_never_pass_the_check(dtype: torch.dtype) -> None:
    flat = {name: tensor.to(dtype) for name, tensor in FLAT.items()}
    try:
        _, _, result = decode(packed(MANIFEST, flat), LIMIT)
    except Malformed:
        return
    task = Task(7, "c1", 0, Start(SMALL.adapter, "0"), Budget(1, 5), 0, 0.0)
    assert "float32" in str(fault(task, result))
