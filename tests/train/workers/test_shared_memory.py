"""Objects on their way to other processes: what arrives is what was sent, and only what was meant to be is shared."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedloom.core.errors import Refused
from fedloom.train.workers.shared_memory import ALIGNMENT, _unnamed_file, pickle_object, share_object, unpickle_object

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


@st.composite
def tensors(draw: Any) -> Tensor:
    """Of any type and up to three dimensions, also none or empty ones, turned, cut, stretched or with gaps."""
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    made = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(0)).to(draw(st.sampled_from(DTYPES)))
    if shape and draw(st.booleans()):
        made = made.transpose(0, -1)
    if shape and draw(st.booleans()):
        made = made[..., ::2]
    if shape and draw(st.booleans()):
        made = made[1:]
    return made.unsqueeze(0).expand(2, *made.shape) if draw(st.booleans()) else made


def shared_again(thing: Any, folder: Path = Path("/tmp")) -> Any:
    """As another process gets it."""
    with (shared := share_object(thing, [folder])).file:
        return shared.get()


def arrives(sent: Tensor, got: Tensor) -> None:
    assert (got.dtype, got.shape, got.requires_grad) == (sent.dtype, sent.shape, sent.requires_grad)
    assert got.equal(sent)
    if sent.is_contiguous() or (sent.dim() == 2 and sent.t().is_contiguous()):
        assert got.stride() == sent.stride()
    assert got.numel() == 0 or got.data_ptr() % ALIGNMENT == 0


@given(st.lists(tensors(), max_size=4))
def test_what_arrives_is_what_was_sent(sent: list[Tensor]) -> None:
    copies = [one.clone() for one in sent]
    for got in (unpickle_object(pickle_object(sent)), shared_again(sent), sent):
        assert len(got) == len(copies)
        for before, after in zip(copies, got, strict=True):
            arrives(before, after)


def test_a_view_costs_what_it_shows() -> None:
    assert len(pickle_object(torch.zeros(1000, 1000)[:3, :3])) < 1000


def test_layouts_stay_as_they_are() -> None:
    turned, part = torch.rand(3, 5).t(), torch.rand(6, 8)[:, :4]
    assert unpickle_object(pickle_object(turned)).stride() == turned.stride()
    assert unpickle_object(pickle_object(part)).stride() == (4, 1)


def test_a_module_arrives_with_its_ties_and_what_it_does_not_train() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones(4, 3)
    got = unpickle_object(pickle_object(model))
    assert got[1].weight is got[0].weight
    assert isinstance(got[0].weight, nn.Parameter)
    assert [p.requires_grad for p in got.parameters()] == [p.requires_grad for p in model.parameters()]
    assert got[0].weight.grad is None
    for name, tensor in model.state_dict().items():
        assert got.state_dict()[name].equal(tensor)


def test_who_writes_writes_for_himself(tmp_path: Path) -> None:
    thing = {"a": torch.zeros(5000), "b": torch.zeros(5000)}
    shared = share_object(thing, [tmp_path])
    with shared.file:
        one, other = shared.get(), shared.get()
        one["a"] += 1
        thing["b"] += 2
        assert [float(part[name].sum()) for part in (one, other, thing) for name in "ab"] == [5e3, 0, 0, 0, 0, 1e4]
        assert float(shared.get()["a"].sum()) == 0


def test_the_file_has_no_name_and_tensors_outlive_its_closing(tmp_path: Path) -> None:
    thing = [torch.arange(10_000)]
    with (shared := share_object(thing, [tmp_path])).file:
        got = shared.get()
        assert list(tmp_path.iterdir()) == []
    assert got[0].equal(thing[0])
    assert got[0].equal(torch.arange(10_000))


def test_what_was_there_moves_to_the_shared_memory() -> None:
    model = nn.Linear(64, 64)
    weight, before = model.weight, model.weight.data_ptr()
    shared_again(model)
    assert model.weight is weight
    assert weight.data_ptr() != before
    model(torch.ones(64)).sum().backward()
    assert weight.grad is not None


def test_a_folder_without_room_is_passed_over(tmp_path: Path) -> None:
    with _unnamed_file(10, [Path("/nowhere"), tmp_path]) as file:
        assert os.fstat(file.fileno()).st_dev == tmp_path.stat().st_dev
    with pytest.raises(OSError, match="1,000,000,000 MB are needed"):
        _unnamed_file(10**15, [tmp_path])


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    def once() -> int:
        unpickle_object(pickle_object([torch.rand(10) for _ in range(20)]))
        shared_again([torch.rand(10)], tmp_path)
        return len(os.listdir("/proc/self/fd"))

    assert once() == once() == once()


@pytest.mark.parametrize("thing", [lambda x: x, (n for n in ())], ids=["lambda", "generator"])
def test_what_has_no_pickle_is_one_kind_of_error(thing: object) -> None:
    with pytest.raises(pickle.PicklingError):
        pickle_object(thing)


def test_a_refusal_travels_whole() -> None:
    got = unpickle_object(pickle_object(Refused("rank", 0, "choose more")))
    assert (str(got), got.field, got.value, got.remedy) == ("rank = 0: choose more", "rank", 0, "choose more")
