"""Values in a file: the same memory, shared as it was; whatever is damaged is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.change_norms import change_norms
from fedloom.core.codec import Half
from fedloom.core.events import Event, TaskFailed, UpdateArrived
from fedloom.core.fingerprint import fingerprint
from fedloom.core.indexed_dict import IndexedTable
from fedloom.core.lora import Adapter, Factor, cut_factor, lay_flat, named_tensors
from fedloom.core.schema import Malformed
from fedloom.core.types import ClientId, Model, Profile, Result, Task, TaskStart, Update
from fedloom.runs.checkpoint import FORMAT, HEADER, _digest, read_checkpoint, write_checkpoint
from tests.support import toys
from tests.support.storms import tries


def through(path: Path, hint: Any, value: object, known: tuple[type, ...] = ()) -> Any:
    """What comes back."""
    write_checkpoint(path, {"value": value})
    return read_checkpoint(path).read({"value": hint}, known)["value"]


def test_what_is_one_object_is_one_again_and_is_written_once(tmp_path: Path) -> None:
    model = Model(toys.adapter(4), memory={"velocity": toys.adapter(4, 1)})
    task = toys.make_task(model.adapter, 4)
    updates = [Update(task, toys.make_result(toys.adapter(4, 2)), model) for _ in range(20)]
    size = write_checkpoint(tmp_path / "many", {"updates": updates, "model": model})
    assert size < 1.2 * write_checkpoint(tmp_path / "few", {"updates": updates[:1], "model": model}) + 20 * 2000
    back = read_checkpoint(tmp_path / "many").read({"updates": list[Update], "model": Model})
    assert all(update.base is back["model"] and update.task is back["updates"][0].task for update in back["updates"])
    assert back["updates"][0].task.start.train is back["model"].adapter
    assert fingerprint(back["model"].memory["velocity"]) == fingerprint(model.memory["velocity"])


def test_a_profile_that_the_reader_has_is_written_by_the_name_of_its_client(tmp_path: Path) -> None:
    known = {f"c{k}": Profile(f"c{k}", k + 1, flops=1e9 / (k + 1)) for k in range(50)}
    idle = IndexedTable({**known, "c3": replace(known["c3"], examples=10**9), "new": Profile("new", 2)})
    hints = {"idle": IndexedTable[ClientId, Profile], "working": dict[ClientId, tuple[Profile, int]]}
    values = {"idle": idle, "working": {"c7": (known["c7"], 12)}}
    size = write_checkpoint(tmp_path / "names", values, profiles=known)
    assert size < write_checkpoint(tmp_path / "whole", values) / 3
    stored = read_checkpoint(tmp_path / "names")
    back = stored.read(hints, profiles=known)
    assert back == values == read_checkpoint(tmp_path / "whole").read(hints)
    assert list(back["idle"]) == list(idle)
    assert back["idle"]["c0"] is known["c0"]
    assert json.dumps(stored.values).count("flops") == 2, "those that differ stand in full"
    with pytest.raises(Malformed, match="a reference to nothing"):
        stored.read(hints, profiles={"c0": known["c0"]})


@given(
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.bool]),
    shape=st.lists(st.integers(0, 5), max_size=3),
    start=st.integers(0, 3),
    turned=st.booleans(),
)
@tries(40)
def test_a_tensor_comes_back_with_its_bytes_strides_and_offset(
    tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype, shape: list[int], start: int, turned: bool
) -> None:
    whole = torch.randn(500, generator=torch.Generator().manual_seed(start)).to(dtype)
    tensor = whole[start : start + torch.Size(shape).numel()].reshape(shape)
    tensor = tensor.mT if turned and tensor.ndim > 1 else tensor
    back = through(tmp_path_factory.mktemp("one") / "file", torch.Tensor, tensor)
    assert (back.dtype, back.shape, back.stride(), back.storage_offset()) == (
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
        tensor.storage_offset(),
    )
    assert torch.equal(back, tensor)
    assert back.untyped_storage().data_ptr() % 64 == 0


def test_views_of_one_memory_are_that_again(tmp_path: Path) -> None:
    factor = toys.factor(8, 200, 300)
    views = [Adapter({"only": cut_factor(factor, rank)}) for rank in (2, 4, 8)]
    write_checkpoint(tmp_path / "file", {"views": views})
    back = read_checkpoint(tmp_path / "file").read({"views": list[Adapter]})["views"]
    assert len({view.factors["only"].up.untyped_storage().data_ptr() for view in back}) == 1
    assert [fingerprint(view) for view in back] == [fingerprint(view) for view in views]
    assert (tmp_path / "file").stat().st_size < 4 * 8 * 500 + 5000


def test_an_adapter_in_one_buffer_is_written_once_and_comes_back_for_the_same_bits(tmp_path: Path) -> None:
    start, answer = (lay_flat(toys.adapter(8, seed, {"a": (200, 30), "b": (200, 30), "c": (7, 5)})) for seed in (0, 1))
    assert start.flat is not None
    task = toys.make_task(start, 8)
    norms = change_norms(task, toys.make_result(answer))
    write_checkpoint(tmp_path / "file", {"task": task})
    back: Task = read_checkpoint(tmp_path / "file").read({"task": Task})["task"]
    assert (tmp_path / "file").stat().st_size < start.flat.buffer.nbytes + 6000
    assert fingerprint(back.start.train) == fingerprint(start)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in named_tensors(back.start.train).values())
    assert change_norms(back, toys.make_result(answer)) == norms


def test_tables_keep_their_order_and_numbers_their_kind(tmp_path: Path) -> None:
    idle: IndexedTable[str, Profile] = IndexedTable()
    for client in ("c3", "c1", "c2", "c0"):
        idle.put(client, Profile(client, 10))
    idle.take("c1")
    back = through(tmp_path / "file", IndexedTable[str, Profile], idle)
    assert isinstance(back, IndexedTable)
    assert [back.at(place) for place in range(3)] == ["c3", "c0", "c2"]
    back.put("c9", back["c3"])
    assert back.at(3) == "c9"
    heap: list[tuple[float, int, Event]] = [
        (0.1 + 0.2, 3, TaskFailed("ü", 1, 'odd "name"\n')),
        (float("inf"), 1, TaskFailed("b", 2, "")),
    ]
    assert through(tmp_path / "file", list[tuple[float, int, Event]], heap) == heap
    spoilt = toys.make_result(toys.adapter(2), metrics={"loss": float("nan"), "whole": 3})
    metrics = through(tmp_path / "file", Result, spoilt).metrics
    assert metrics["loss"] != metrics["loss"]
    assert type(metrics["whole"]) is int
    assert through(tmp_path / "file", dict[int, float], {12: 1.0, 3: 2.0}) == {12: 1.0, 3: 2.0}
    assert list(through(tmp_path / "file", dict[int, float], {12: 1.0, 3: 2.0})) == [12, 3]


@dataclass(frozen=True)
class Rough(Half):
    """A codec of a user's own."""

    digits: int = 3


def test_a_codec_needs_no_hand_in_and_one_of_a_users_own_only_its_class(tmp_path: Path) -> None:
    start = TaskStart(toys.adapter(2), "0", codec=Half())
    assert through(tmp_path / "file", TaskStart, start).codec == Half()
    start = TaskStart(toys.adapter(2), "0", codec=Rough(4))
    assert through(tmp_path / "file", TaskStart, start, (Rough,)).codec == Rough(4)
    with pytest.raises(Malformed, match="no kind 'Rough'"):
        read_checkpoint(tmp_path / "file").read({"value": TaskStart})


def test_two_equal_values_give_the_same_bytes_and_a_value_that_was_read_gives_them_again(tmp_path: Path) -> None:
    hint = tuple[Update, Model]
    for name in ("one", "other"):
        model = Model(toys.adapter(4), memory={"velocity": toys.adapter(4, 1)})
        update = Update(toys.make_task(model.adapter, 4), toys.make_result(toys.adapter(4, 2)), model)
        write_checkpoint(tmp_path / name, {"value": (update, model)})
    write_checkpoint(tmp_path / "again", read_checkpoint(tmp_path / "one").read({"value": hint}))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes() == (tmp_path / "again").read_bytes()


@pytest.mark.parametrize("odd", [object(), {1, 2}, {(1, 2): 3}, Task, print, b"bytes"])
def test_what_has_no_place_is_an_error_and_leaves_the_file_as_it_was(tmp_path: Path, odd: object) -> None:
    write_checkpoint(tmp_path / "file", {"value": 1})
    before = (tmp_path / "file").read_bytes()
    with pytest.raises(TypeError):
        write_checkpoint(tmp_path / "file", {"value": odd})
    assert (tmp_path / "file").read_bytes() == before


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a bit of everything."""
    path = tmp_path_factory.mktemp("whole") / "file"
    event = UpdateArrived("c1", 1, toys.make_result(toys.adapter(2), metrics={"loss": 0.5}))
    write_checkpoint(path, {"heap": [(1.0, 2, event)]}, {"version": 3})
    return path


@given(data=st.data())
@tries(300)
def test_no_byte_can_change_or_be_missing(whole: Path, data: st.DataObject) -> None:
    good = whole.read_bytes()
    place = data.draw(st.integers(0, len(good) - 1))
    if data.draw(st.booleans()):
        bad = good[:place] + bytes([good[place] ^ (1 << data.draw(st.integers(0, 7)))]) + good[place + 1 :]
    else:
        bad = good[:place]
    path = whole.with_name("bad")
    path.write_bytes(bad)
    with pytest.raises(Malformed, match=r"it is damaged|a newer fedloom"):
        read_checkpoint(path)


def test_a_newer_format_and_other_files_are_refused(whole: Path, tmp_path: Path) -> None:
    parts = {"numbers": torch.zeros(1, dtype=torch.uint8), "text": torch.zeros(1, dtype=torch.uint8)}
    safetensors.torch.save_file(parts, tmp_path / "newer", {"fedloom": json.dumps([FORMAT + 1, ""])})
    with pytest.raises(Malformed, match="a newer fedloom wrote it"):
        read_checkpoint(tmp_path / "newer")
    safetensors.torch.save_file(parts, tmp_path / "other")
    (tmp_path / "none").write_bytes(b"")
    for name in ("other", "none", "nowhere"):
        with pytest.raises(Malformed, match="damaged"):
            read_checkpoint(tmp_path / name)
    with pytest.raises(Malformed, match="another version"):
        read_checkpoint(whole).read({"heap": list[tuple[float, int, Event]], "more": int})
    with pytest.raises(Malformed, match="no kind"):
        read_checkpoint(whole).read({"heap": list[tuple[float, int, TaskFailed]]})


def test_a_factor_is_told_by_memory(tmp_path: Path) -> None:
    """A transposed `up` rounds otherwise in a product than a copy of it."""
    up = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).T
    back = through(tmp_path / "file", Factor, Factor(torch.ones(3, 5), up))
    assert back.up.stride() == up.stride() == (1, 40)


# Forged files --------------------------------------------------------------------------------------------------------


def forged(path: Path, text: object, numbers: bytes = b"") -> Path:
    """A file whose sha256 is right, with any text and any numbers."""
    raw = json.dumps(text).encode()
    parts = {"numbers": torch.frombuffer(bytearray(numbers or b"\0"), dtype=torch.uint8)[: len(numbers)]}
    parts["text"] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    safetensors.torch.save_file(parts, path, {HEADER: json.dumps([FORMAT, _digest(parts)])})
    return path


TENSOR = {
    "type": "Tensor",
    "memory": 0,
    "bytes": 8,
    "device": "cpu",
    "dtype": "float32",
    "offset": 0,
    "shape": [2],
    "stride": [1],
}
FACTOR = {"type": "Factor", "down": {"is": 0}, "up": {"is": 0}}


def test_a_forged_file_is_read_as_far_as_it_is_a_right_one(tmp_path: Path) -> None:
    text = {"about": {}, "objects": [TENSOR, FACTOR], "values": {"value": {"is": 1}}}
    assert read_checkpoint(forged(tmp_path / "file", text, b"\0" * 8)).read({"value": Factor})["value"].up.tolist() == [
        0,
        0,
    ]


@pytest.mark.parametrize(
    "objects",
    [
        [TENSOR | {"shape": [10**12]}, FACTOR],
        [TENSOR | {"offset": 1}, FACTOR],
        [TENSOR | {"offset": -1}, FACTOR],
        [TENSOR | {"bytes": 10**15, "shape": [10**14]}, FACTOR],
        [TENSOR | {"dtype": "load"}, FACTOR],
        [TENSOR | {"dtype": "nothing"}, FACTOR],
        [TENSOR | {"device": "cuda:99"}, FACTOR],
        [TENSOR | {"memory": 7}, FACTOR],
        [TENSOR | {"memory": "0"}, FACTOR],
        [{"type": "Tensor"}, FACTOR],
        [TENSOR, FACTOR | {"up": {"is": 1}}],
        [TENSOR, FACTOR | {"up": {"is": -1}}],
        [TENSOR, FACTOR | {"up": 3}],
        [TENSOR, FACTOR | {"up": {"type": "Tensor"}}],
        [TENSOR, FACTOR | {"type": "Path"}],
        [TENSOR, FACTOR | {"more": 1}],
        [TENSOR, TENSOR],
        [TENSOR, "os.system"],
        [TENSOR],
    ],
    ids=lambda objects: json.dumps(objects)[-60:],
)
def test_a_forged_file_makes_nothing_but_what_its_reader_expects(tmp_path: Path, objects: list[object]) -> None:
    text = {"about": {}, "objects": objects, "values": {"value": {"is": 1}}}
    with pytest.raises(Malformed):
        read_checkpoint(forged(tmp_path / "file", text, b"\0" * 8)).read({"value": Factor})


@pytest.mark.parametrize(
    "text", [None, [], {}, {"about": {}, "objects": 3, "values": {"value": 1}}, {"about": 1, "objects": []}], ids=str
)
def test_a_forged_text_that_is_no_checkpoint_is_refused(tmp_path: Path, text: object) -> None:
    with pytest.raises(Malformed):
        read_checkpoint(forged(tmp_path / "file", text)).read({"value": Factor})
