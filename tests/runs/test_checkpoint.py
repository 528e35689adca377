"""Values in a file: the same memory, shared as it was; whatever is damaged is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.codec import Half
from fedloom.core.events import Event, TaskFailed, UpdateArrived
from fedloom.core.fingerprint import fingerprint
from fedloom.core.indexed_dict import IndexedTable
from fedloom.core.lora import Adapter, Factor, cut_factor
from fedloom.core.schema import Malformed, Reader, reachable_classes
from fedloom.core.types import Budget, Model, Profile, Result, TaskStart, Task, Update
from fedloom.runs import checkpoint
from tests.support import toys
from tests.support.storms import tries


def through(path: Path, hint: Any, value: object, **given: object) -> Any:
    """What comes back."""
    checkpoint.write_checkpoint(path, {"value": value}, None, **given)
    return checkpoint.read_checkpoint(path).read({"value": hint}, **given)["value"]


def test_what_is_one_object_is_one_again_and_is_written_once(tmp_path: Path) -> None:
    model = Model(toys.adapter(4), memory={"velocity": toys.adapter(4, 1)})
    task = toys.make_task(model.adapter, 4)
    updates = [Update(task, toys.make_result(toys.adapter(4, 2)), model) for _ in range(20)]
    size = checkpoint.write_checkpoint(tmp_path / "many", {"updates": updates, "model": model})
    assert size < 1.2 * checkpoint.write_checkpoint(tmp_path / "few", {"updates": updates[:1], "model": model}) + 20 * 2000
    back = checkpoint.read_checkpoint(tmp_path / "many").read({"updates": list[Update], "model": Model})
    assert all(update.base is back["model"] and update.task is back["updates"][0].task for update in back["updates"])
    assert back["updates"][0].task.start.train is back["model"].adapter
    assert fingerprint(back["model"].memory["velocity"]) == fingerprint(model.memory["velocity"])


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
    checkpoint.write_checkpoint(tmp_path / "file", {"views": views})
    back = checkpoint.read_checkpoint(tmp_path / "file").read({"views": list[Adapter]})["views"]
    assert len({view.factors["only"].up.untyped_storage().data_ptr() for view in back}) == 1
    assert [fingerprint(view) for view in back] == [fingerprint(view) for view in views]
    assert (tmp_path / "file").stat().st_size < 4 * 8 * 500 + 5000


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


def test_what_the_reader_has_is_only_named(tmp_path: Path) -> None:
    codec = Half()
    start = TaskStart(toys.adapter(2), "0", codec=codec)
    assert through(tmp_path / "file", TaskStart, start, transfer=codec).codec is codec
    with pytest.raises(Malformed, match="refers to nothing"):
        checkpoint.read_checkpoint(tmp_path / "file").read({"value": TaskStart})


@pytest.mark.parametrize("odd", [object(), {1, 2}, {(1, 2): 3}, Task, print, b"bytes"])
def test_what_has_no_place_is_an_error_and_leaves_the_file_as_it_was(tmp_path: Path, odd: object) -> None:
    checkpoint.write_checkpoint(tmp_path / "file", {"value": 1})
    before = (tmp_path / "file").read_bytes()
    with pytest.raises(TypeError):
        checkpoint.write_checkpoint(tmp_path / "file", {"value": odd})
    assert (tmp_path / "file").read_bytes() == before


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a bit of everything."""
    path = tmp_path_factory.mktemp("whole") / "file"
    event = UpdateArrived("c1", 1, toys.make_result(toys.adapter(2), metrics={"loss": 0.5}))
    checkpoint.write_checkpoint(path, {"heap": [(1.0, 2, event)]}, {"version": 3})
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
        checkpoint.read_checkpoint(path)


def test_a_newer_format_and_other_files_are_refused(whole: Path, tmp_path: Path) -> None:
    parts = {"numbers": torch.zeros(1, dtype=torch.uint8), "text": torch.zeros(1, dtype=torch.uint8)}
    safetensors.torch.save_file(parts, tmp_path / "newer", {"fedloom": json.dumps([checkpoint.FORMAT + 1, ""])})
    with pytest.raises(Malformed, match="a newer fedloom wrote it"):
        checkpoint.read_checkpoint(tmp_path / "newer")
    safetensors.torch.save_file(parts, tmp_path / "other")
    (tmp_path / "none").write_bytes(b"")
    for name in ("other", "none", "nowhere"):
        with pytest.raises(Malformed, match="damaged"):
            checkpoint.read_checkpoint(tmp_path / name)
    with pytest.raises(Malformed, match="another version"):
        checkpoint.read_checkpoint(whole).read({"heap": list[tuple[float, int, Event]], "more": int})
    with pytest.raises(Malformed, match="no kind"):
        checkpoint.read_checkpoint(whole).read({"heap": list[tuple[float, int, TaskFailed]]})


BUDGET = {"type": "Budget", "rank": 2, "steps": 3, "rounds": 1, "depth": None, "why": ""}


@pytest.mark.parametrize(
    ("hint", "data"),
    [
        (int, 1.0),
        (int, True),
        (int, "1"),
        (float, "1.0"),
        (float, None),
        (str, 1),
        (int | None, "x"),
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
        (Event, BUDGET),
        (Event, {"is": 3}),
        (Event, 3),
    ],
    ids=str,
)
def test_json_of_another_kind_is_refused(hint: Any, data: object) -> None:
    with pytest.raises(Malformed):
        Reader(reachable_classes(Event, Budget)).read(hint, data)


def test_json_of_the_right_kind_is_the_value() -> None:
    reader = Reader(reachable_classes(Event, Budget))
    assert reader.read(Budget, BUDGET) == Budget(2, 3)
    assert reader.read(Budget | None, None) is None
    assert reader.read(tuple[float, ...], [1.5, "inf"]) == (1.5, float("inf"))
    assert reader.read(Event, {"type": "TaskFailed", "client": "a", "task": 1, "reason": ""}) == TaskFailed("a", 1, "")
    with pytest.raises(TypeError, match="cannot be read back"):
        reachable_classes(dict[str, object])
    with pytest.raises(TypeError, match="two kinds of Budget"):
        reachable_classes(Budget, _second_budget())


def _second_budget() -> type:
    from dataclasses import make_dataclass

    return make_dataclass("Budget", [("rank", int)])


def test_a_factor_is_told_by_memory(tmp_path: Path) -> None:
    """A transposed `up` rounds otherwise in a product than a copy of it."""
    up = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).T
    back = through(tmp_path / "file", Factor, Factor(torch.ones(3, 5), up))
    assert back.up.stride() == up.stride() == (1, 40)
