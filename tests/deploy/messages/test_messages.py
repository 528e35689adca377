"""What server and site say to each other: it arrives to the bit, and whatever else arrives is Malformed and nothing worse."""

from __future__ import annotations

import json
import random
import resource
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedloom.core.codec import Codec, DeltaInt8, Exact, Half, HalfChange
from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter, Factor, named_tensors
from fedloom.core.rate_by_rank import RateByRank
from fedloom.core.schema import Malformed
from fedloom.core.transfer import encode_start
from fedloom.core.types import Budget, Profile, Pruning, Rules, Task, TaskStart
from fedloom.deploy.messages import messages
from fedloom.deploy.messages.answer import encode_result as answer
from fedloom.deploy.messages.messages import (
    REQUEST,
    JoinRequest,
    Refusal,
    Request,
    RunTerms,
    TaskRequest,
    Welcome,
    decode_reply,
    decode_request,
    encode_request,
)
from fedloom.train.settings import PLAIN, Engine, LoRA, Training, cosine
from tests.support import toys
from tests.support.storms import tries
from tests.support.toys import adapter, changed, make_result, sent

LIMIT = 10**6
CODECS = (None, Exact(), Half(), HalfChange(), DeltaInt8())
every_codec = pytest.mark.parametrize("codec", CODECS, ids=str)
TERMS = RunTerms(
    run="mrpc", run_hash="0123456789ab", model="some/encoder", rank=8, lora=LoRA(("query", "value")),
    training=Training(decay=cosine), engine=Engine("torch"), threads=1, seed=3, labels=("no", "yes"),
)  # fmt: skip


def work_for(start: TaskStart, codec: Codec | None = None, **more: Any) -> TaskRequest:
    task = Task(
        7,
        "Zoë/π",
        3,
        encode_start(start, codec),
        Budget(4, 5, depth=2, why="it is weak"),
        12.5,
    )
    return replace(TaskRequest(TERMS, 2, task, 6), **more)


def alike(one: Any, other: Any) -> bool:
    """To the bit, with the order of a table, and of a matrix's numbers in memory."""
    if isinstance(one, Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        turned = [t.ndim == 2 and t.stride(0) < t.stride(1) for t in (one, other)]
        bits = [t.contiguous().reshape(-1).view(torch.int32) for t in (one, other)] if same else []
        return same and turned[0] == turned[1] and torch.equal(*bits)
    if is_dataclass(one) and not isinstance(one, type):
        names = [field.name for field in fields(one)]
        return type(one) is type(other) and all(alike(getattr(one, n), getattr(other, n)) for n in names)
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(alike(one[key], other[key]) for key in one)
    return bool(one == other) and type(one) is type(other)


# What arrives --------------------------------------------------------------------------------------------------------


@every_codec
@pytest.mark.parametrize("method", toys.aggregators(), ids=toys.called)
def test_every_method_s_start_arrives_to_the_bit(method: Any, codec: Codec | None) -> None:
    task = sent(method, method.init(adapter(8)), 4)
    work = TaskRequest(TERMS, 1, replace(task, start=encode_start(task.start, codec)), 0)
    data = encode_request(work)
    assert alike(decode_request(data, LIMIT), work)
    assert encode_request(decode_request(data, LIMIT)) == data, "the same ask, the same bytes"


@every_codec
def test_all_that_a_start_can_say_arrives(codec: Codec | None) -> None:
    rules = Rules(("down",), ("up", "dense"), 3, 4.0, Pruning(0.1, 0.9, 2))
    start = TaskStart(adapter(4), "7/4", 1.5, adapter(40, 1), (0, 2, 3, 9), ("down", "dense"), adapter(4, 2), rules)
    work = work_for(start, codec)
    assert alike(decode_request(encode_request(work), LIMIT), work)


@pytest.mark.parametrize(
    "terms",
    [TERMS, replace(TERMS, labels=None), replace(TERMS, lora=LoRA()), replace(TERMS, lora=LoRA("all-linear")),
     replace(TERMS, rates=RateByRank(0.5, 8)),
     replace(TERMS, engine=PLAIN, training=Training(proximal=0.01, stratified=True))],
)  # fmt: skip
def test_terms_arrive(terms: RunTerms) -> None:
    assert decode_request(encode_request(JoinRequest(terms, 2)), LIMIT) == JoinRequest(terms, 2)


def test_a_task_brings_its_rate_by_rank_and_a_run_without_one_has_the_message_that_it_had() -> None:
    work = work_for(TaskStart(adapter(4), "7/4"), None)
    budget = replace(work.task.budget, rate=RateByRank(1.0, 8))
    ruled = replace(work, task=replace(work.task, budget=budget), terms=replace(work.terms, rates=budget.rate))
    assert alike(decode_request(encode_request(ruled), LIMIT), ruled)
    assert b"RateByRank" in encode_request(ruled)
    assert b'"rate' not in encode_request(work)


def test_special_values_and_the_order_in_memory_survive() -> None:
    turned = adapter(4)
    f = turned.factors["query"]
    f.up[0, 0], f.up[1, 1], f.down[0, 0] = float("nan"), -0.0, 1e-42
    factors = {"b": Factor(f.down.T.contiguous().T, f.up), "a": Factor(f.down, f.up.T.contiguous().T)}
    work = work_for(TaskStart(Adapter(factors, {"head": torch.ones(2, 3, 4)}), "0", fold=turned))
    assert alike(decode_request(encode_request(work), LIMIT), work)


def test_what_a_codec_made_fit_for_float16_takes_two_bytes_a_number_and_an_identity_none() -> None:
    start = TaskStart(adapter(4), "0", fold=Adapter(adapter(40).factors))
    count = sum(tensor.numel() for tensor in named_tensors(start.train).values())
    count += sum(d_out * d_in for d_out, d_in in toys.LAYERS.values())
    data = encode_request(work_for(start, Half()))
    assert sum(buffer.nbytes for buffer in safetensors.torch.load(data).values()) == 2 * count


def test_replies_arrive() -> None:
    welcome = Welcome(Profile("ward-7", 1200, 2.5e10, tier="cpu", most=Budget(8, 100, 4)), 2)
    leads = replace(welcome, members=(welcome.profile, Profile("ward-8", 3)))
    for word in (
        welcome,
        leads,
        Refusal("ward-7", None, "not at this hour", False),
        Refusal("ward-7", 7, "rank", True),
    ):
        assert decode_reply(messages.encode_reply(word), LIMIT, {}) == word
    task = work_for(TaskStart(adapter(4), "0")).task
    result = make_result(changed(task.start, 1))
    client, number, back = decode_reply(answer(task, result), LIMIT, {7: task})  # type: ignore[misc]
    assert (client, number) == (task.client, 7)
    assert alike(back.adapter, result.adapter)


def test_no_code_travels() -> None:
    def mine(done: float) -> float:
        return 1.0

    class Own(Half):
        __slots__ = ()

    with pytest.raises(Refused, match=r"training\.decay = 'mine'"):
        replace(TERMS, training=Training(decay=mine))
    with pytest.raises(Refused, match="transfer"):
        encode_request(work_for(TaskStart(adapter(2), "0"), Own()))


# What is refused -----------------------------------------------------------------------------------------------------

WORK = work_for(TaskStart(adapter(2), "0", directions=(0, 5), control=adapter(2, 3), fold=adapter(40, 1)), Half())
BYTES = encode_request(WORK)
FLAT = safetensors.torch.load(BYTES)
TEXT = json.loads(json.loads(BYTES[8 : 8 + int.from_bytes(BYTES[:8], "little")])["__metadata__"][REQUEST])


def packed(text: Any, flat: dict[str, Tensor] | None = None) -> bytes:
    """A file with any text and any buffers."""
    told = text if isinstance(text, str) else json.dumps(text)
    return safetensors.torch.save(FLAT if flat is None else flat, {REQUEST: told})


def refused(data: bytes, because: str = ".", limit: int = LIMIT) -> None:
    with pytest.raises(Malformed, match=because):
        decode_request(data, limit)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a text, however deep."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*path, key))


PLACES = list(places(TEXT))


def put(text: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The text with another value in one place."""
    if not path:
        return value
    inner = put(text[path[0]], path[1:], value)
    return {**text, path[0]: inner} if isinstance(text, dict) else [*text[: path[0]], inner, *text[path[0] + 1 :]]


def test_the_helper_packs_what_encode_would() -> None:
    assert alike(decode_request(packed(TEXT), LIMIT), WORK)


def test_a_file_cut_off_at_any_length_is_refused() -> None:
    for length in range(0, len(BYTES), 7):
        refused(BYTES[:length])


def test_more_bytes_than_allowed_are_refused_before_they_are_read() -> None:
    decode_request(BYTES, len(BYTES))
    refused(BYTES, "above the limit", len(BYTES) - 1)
    refused(b"x" * 1000, "above the limit", 999)
    refused((2**40).to_bytes(8, "little") + b"{}", "a header of")


@pytest.mark.parametrize("text", ["", "null", "[]", "{", "[" * 100_000, '"x"', "NaN", "[1,null]", "[2,{}]", "1" * 9999])
def test_a_text_that_is_no_ask_is_refused(text: str) -> None:
    refused(packed(text))


RANGES = [
    ("incarnation", -1), ("last_accepted", -1), ("last_accepted", 2**63), ("terms.held_out", -0.1), ("terms.held_out", 1.0),
    ("terms.held_out", float("nan")), ("task.id", 0), ("task.client", ""), ("task.client", "x" * 201),
    ("task.version", -1), ("task.sent", float("inf")), ("task.budget.rank", 0),
    ("task.budget.steps", 0), ("task.budget.depth", 0), ("task.budget.rounds", 0),
    ("task.start.scaling", 0.0), ("task.start.scaling", -1.0), ("task.start.directions", [5, 0]), ("task.start.directions", [1]),
    ("task.start.rules.select", 0), ("task.start.rules.up_rate", 0.0), ("task.start.seeded", ["left"]),
    ("task.start.codec", "Half"), ("task.start.codec", "cosine"), ("task.start.codec", {"type": "Rules"}),
    ("terms.run_hash", "../../etc/x"), ("terms.run_hash", "0123456789AB"), ("terms.rank", 0), ("terms.threads", 10**6),
    ("terms.training.decay", "eval"), ("terms.training.decay", "Half"), ("terms.training.learning_rate", -1.0),
    ("terms.training.learning_rate", float("nan")), ("terms.engine.kernel", "rm"), ("terms.labels", ["a", ""]),
    ("terms.lora.target_modules", [1]), ("task.start.train", None), ("task.start.train", {"adapter": [{}, {}]}),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), RANGES, ids=str)
def test_a_value_out_of_its_range_is_refused(field: str, value: Any) -> None:
    text = put(TEXT, (1, *field.split(".")), value)
    refused(packed(text))


@pytest.mark.parametrize(("power", "reference"), [(0.5, None), (3.0, 8), (0.5, 0), ("0.5", 8)])
@pytest.mark.parametrize("place", [("task", "budget", "rate"), ("terms", "rates")])
def test_a_rate_by_rank_is_whole_and_in_its_range(place: tuple[str, ...], power: Any, reference: int | None) -> None:
    inner = TEXT[1]
    for key in place[:-1]:
        inner = inner[key]
    rule = {"type": "RateByRank", "power": power, "reference": reference}
    refused(packed(put(TEXT, (1, *place[:-1]), {**inner, place[-1]: rule})))


def test_an_ask_has_all_its_fields_and_no_others() -> None:
    for path in PLACES:
        inner = TEXT
        for key in path:
            inner = inner[key]
        if isinstance(inner, dict) and "type" in inner:
            refused(packed(put(TEXT, path, {**inner, "code": "import os"})), "other fields")
            refused(packed(put(TEXT, path, dict(list(inner.items())[:-1]))), "other fields|null|no |nothing")


def test_shapes_cannot_ask_for_more_memory_than_was_sent() -> None:
    path = next(path for path in PLACES if path[-3:] == ("adapter", 0, "query") and "train" in path)
    for shape, form in (([2**20, 2**20], "eye"), ([2**40, 2**40], "eye"), ([2**62, 4], "f16"), ([10**4000], "f32")):
        refused(packed(put(TEXT, (*path, 0), [form, 0, False, shape])))


ODD = {
    "a buffer too many": FLAT | {"f32": torch.zeros(1)},
    "an unknown buffer": FLAT | {"odd": torch.zeros(1)},
    "bytes": FLAT | {"i8": torch.zeros(1, dtype=torch.int8)},
    "a longer buffer": FLAT | {"f16": torch.zeros(len(FLAT["f16"]) + 1, dtype=torch.float16)},
    "a shorter buffer": FLAT | {"f16": FLAT["f16"][:-1]},
    "a matrix": FLAT | {"f16": FLAT["f16"][None]},
    "another dtype": FLAT | {"f16": FLAT["f16"].to(torch.bfloat16)},
    "nothing": {},
}


@pytest.mark.parametrize("flat", ODD.values(), ids=ODD)
def test_buffers_that_do_not_hold_what_the_text_says_are_refused(flat: dict[str, Tensor]) -> None:
    refused(packed(TEXT, flat), "buffer")


@given(st.binary(max_size=300))
@tries(400)
def test_random_bytes_are_refused(data: bytes) -> None:
    refused(data)
    with pytest.raises(Malformed):
        decode_reply(data, LIMIT, {})


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=5,
)


@given(st.sampled_from(PLACES), JSON)
@tries(800)
def test_anything_in_any_place_is_read_or_refused(path: tuple[Any, ...], value: Any) -> None:
    with suppress(Malformed):
        assert isinstance(decode_request(packed(put(TEXT, path, value)), LIMIT), Request)


def malformed(seed: int, good: bytes, text: Any) -> bytes:
    """Bytes that are no ask: junk, a torn file, a file with a wrong value somewhere, a header that lies about its length."""
    draw = random.Random(seed)
    wrong = (None, -1, "", [], {}, {"type": "Half"}, {"adapter": []}, "os.system", 10**30, float("nan"), True)
    match draw.randrange(4):
        case 0:
            return draw.randbytes(draw.randrange(2000))
        case 1:
            return good[: draw.randrange(len(good))]
        case 2:
            return draw.randrange(2 ** draw.randrange(64)).to_bytes(8, "little") + good[8 + draw.randrange(1, 99) :]
    path = draw.choice(
        [path for path in PLACES if not {"labels", "target_modules"} & {*path}]
    )  # any text will do there
    return packed(put(text, path, [draw.choice(wrong), draw.choice(wrong)])) + draw.choice((b"", b"x"))


def storm(count: int) -> None:
    """So many malformed messages, each refused; memory does not grow, or by less than a thousandth of what came."""
    for seed in range(100):
        refused(malformed(seed, BYTES, TEXT))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(count):
        refused(malformed(seed, BYTES, TEXT))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 8e6, f"{grown / 1e6:.1f} MB"


def test_a_storm_of_malformed_messages_is_refused() -> None:
    storm(300)


@pytest.mark.slow
def test_ten_thousand_malformed_messages_are_refused_and_memory_stays_flat() -> None:
    storm(10_000)


@given(st.integers(0, len(BYTES) - 1), st.integers(1, 255))
@tries(600)
def test_a_flipped_byte_is_refused_or_stays_in_its_place(position: int, mask: int) -> None:
    damaged = bytearray(BYTES)
    damaged[position] ^= mask
    with suppress(Malformed):
        assert isinstance(decode_request(bytes(damaged), LIMIT), TaskRequest)


@pytest.mark.parametrize(
    "word",
    [Refusal("", None, "why", True), Refusal("x" * 201, 7, "why", True), Refusal("x", -1, "why", True),
     Refusal("x", 7, "y" * 2001, True), Welcome(Profile("", 3), 1), Welcome(Profile("x", 0), 1),
     Welcome(Profile("x", 3, flops=0.0), 1), Welcome(Profile("x", 3, memory=float("inf")), 1),
     Welcome(Profile("x", 3, most=Budget(0, 1)), 1), Welcome(Profile("x", 3, most=Budget(1, 1, depth=0)), 1),
     Welcome(Profile("x", 3), -1), Welcome(Profile("x", 3), 1, members=(Profile("y", 0),)),
     Welcome(Profile("x", 3), 1, members=(Profile("y", 1),) * 10_002)],
)  # fmt: skip
def test_a_reply_out_of_its_range_is_refused(word: messages.Reply) -> None:
    with pytest.raises(Malformed):
        decode_reply(messages.encode_reply(word), LIMIT, {})
