"""Many tensors in one buffer, so that what is asked of all of them costs a few calls and not a few for each.

Tensors of one side and shape lie side by side: a model has hundreds of tensors and some four to eight shapes, and all that have one
shape are one tensor with a dimension more. A layout (names, shapes, places) exists once in a process, so that whether two adapters
have the same form is whether their layouts are the same object. Each tensor begins at a multiple of 64 bytes, as memory of its own
would: some kernels round differently elsewhere. What is between them is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, ItemsView, Iterator, KeysView, Mapping, ValuesView
from dataclasses import dataclass
from math import prod
from typing import Any, Generic, Literal, TypeAlias, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

Places: TypeAlias = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and shapes of tensors, in order."""

ALIGNED = 16
"""Numbers at whose multiples tensors begin: 64 bytes of float32."""
TOGETHER = 2**17
"""Numbers of tensors of one shape that are worked on at a time (0.5 MB): more and what is made of them leave the cache."""


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Tensors of one side and one shape, one behind the other.

    Fields:
        side: what they are in an adapter.
        shape: shape of each.
        names: their names (`lora.named_tensors`), in order.
        start: place of the first number.
        stride: numbers from the beginning of one to that of the next.
    """

    side: Literal["down", "up", "dense"]
    shape: tuple[int, ...]
    names: tuple[str, ...]
    start: int
    stride: int

    @property
    def size(self) -> int:
        """Numbers of one tensor."""
        return prod(self.shape)

    def view(self, buffer: Tensor) -> Tensor:
        """Return the tensors of this group as one, (names, *shape)."""
        strides, first = (
            [prod(self.shape[k + 1 :]) for k in range(len(self.shape))],
            buffer.storage_offset() + self.start,
        )
        return buffer.as_strided((len(self.names), *self.shape), (self.stride, *strides), first)

    def rows(self, buffer: Tensor) -> Tensor:
        """Return the tensors of this group as rows, (names, numbers of one)."""
        first = buffer.storage_offset() + self.start
        return buffer.as_strided((len(self.names), self.size), (self.stride, 1), first)


class BufferLayout:
    """Places of an adapter's tensors in a buffer. Made by `buffer_layout` alone; two of one form are the same object.

    Fields:
        layers: by layer, the shapes of `down` and `up`.
        dense: by name, the shapes of the dense tensors.
        groups: the tensors, by side and shape.
        places: by tensor, its place and shape; in the order of `lora.named_tensors`.
        hashed: by tensor in order of name, what a fingerprint says of it before its bytes (float32), and where these begin and end.
        size: numbers of a buffer.
        ranks: the ranks that its layers have.
    """

    __slots__ = ("__weakref__", "dense", "groups", "hashed", "layers", "places", "ranks", "size")

    def __init__(self, downs: Places, ups: Places, dense: Places) -> None:
        self.layers = {name: (down, up) for (name, down), (_, up) in zip(downs, ups, strict=True)}
        self.dense = dict(dense)
        names: dict[tuple[Any, ...], list[str]] = {}
        for side, of_side in (("down", downs), ("up", ups), ("dense", dense)):
            for name, shape in of_side:
                full = f"dense:{name}" if side == "dense" else f"{name}.{side}"
                names.setdefault((side, shape), []).append(full)
        groups, place = [], dict[str, tuple[int, tuple[int, ...]]]()
        self.size = 0
        for (side, shape), same in names.items():
            groups.append(TensorGroup(side, shape, tuple(same), self.size, -(-prod(shape) // ALIGNED) * ALIGNED))
            place |= {name: (self.size + k * groups[-1].stride, shape) for k, name in enumerate(same)}
            self.size += len(same) * groups[-1].stride
        self.groups = tuple(groups)
        order = [f"{name}.{side}" for side in ("down", "up") for name in self.layers]
        self.places = {name: place[name] for name in (*order, *(f"dense:{name}" for name in self.dense))}
        self.hashed = [
            (f"{name}{shape}torch.float32".encode(), 4 * first, 4 * (first + prod(shape)))
            for name, (first, shape) in sorted(self.places.items())
        ]
        self.ranks = frozenset(down[0] for down, _ in self.layers.values())

    def numbers(self, without: Collection[str] = ()) -> int:
        """Return how many numbers there are, without these sides."""
        return sum(len(group.names) * group.size for group in self.groups if group.side not in without)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by its form, so that it is one object in the other process too."""
        downs = tuple((name, down) for name, (down, _) in self.layers.items())
        ups = tuple((name, up) for name, (_, up) in self.layers.items())
        return buffer_layout, (downs, ups, tuple(self.dense.items()))


_LAYOUTS: WeakValueDictionary[tuple[Places, Places, Places], BufferLayout] = WeakValueDictionary()
"""Two threads that first meet a form at once may make two layouts of it: adapters then differ in form, which costs time alone."""


def buffer_layout(downs: Places, ups: Places, dense: Places) -> BufferLayout:
    """Return the layout of these tensors, the one that there is in this process while somebody holds it."""
    key = (downs, ups, dense)
    found = _LAYOUTS.get(key)
    if found is None:
        found = _LAYOUTS[key] = BufferLayout(*key)
    return found


class FlatTensors:
    """Tensors in one buffer. Nobody writes into it once an adapter holds it.

    Fields:
        buffer: (layout.size,) all numbers.
        layout: where each tensor lies.
    """

    __slots__ = ("_tensors", "buffer", "layout")

    def __init__(self, buffer: Tensor, layout: BufferLayout) -> None:
        if buffer.shape != (layout.size,) or not buffer.is_contiguous():
            raise ValueError(f"a buffer of shape {tuple(buffer.shape)}, expected {layout.size} numbers in one row")
        self.buffer, self.layout = buffer, layout
        self._tensors: dict[str, Tensor] | None = None

    @classmethod
    def copied(cls, tensors: Mapping[str, Tensor], layout: BufferLayout) -> FlatTensors:
        """Copy tensors of one type, by the names of the layout, into a new buffer."""
        first = next(iter(tensors.values()))
        buffer = torch.zeros(layout.size, dtype=first.dtype, device=first.device)
        for group in layout.groups:
            torch.stack([tensors[name] for name in group.names], out=group.view(buffer))
        return cls(buffer, layout)

    def tensor(self, name: str) -> Tensor:
        """Return a view of one tensor."""
        place, shape = self.layout.places[name]
        return self.buffer[place : place + prod(shape)].view(shape)

    def tensors(self) -> Mapping[str, Tensor]:
        """Return views of all tensors by name; made when they are first asked for."""
        if self._tensors is None:
            found = dict[str, Tensor]()
            for group in self.layout.groups:
                found.update(zip(group.names, group.view(self.buffer).unbind(), strict=True))
            self._tensors = {name: found[name] for name in self.layout.places}
        return self._tensors

    def same_form(self, other: FlatTensors) -> bool:
        """Whether the other has the same names, shapes, type and device, and is a plain tensor without a gradient."""
        mine, its = self.buffer, other.buffer
        plain = type(its) is Tensor and not its.requires_grad
        return plain and self.layout is other.layout and mine.dtype == its.dtype and mine.device == its.device

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the buffer, not the views."""
        return FlatTensors, (self.buffer, self.layout)


def map_groups(rule: Callable[..., Tensor], *flats: FlatTensors) -> FlatTensors:
    """Apply a rule to tensors of one side and shape at a time, (count, *shape); it must treat each of them by itself.

    Args:
        rule: gets the side, and for each buffer the same tensors of it; returns tensors of their shape.
        flats: buffers of one layout.
    """
    buffer = torch.zeros_like(flats[0].buffer)
    for group in flats[0].layout.groups:
        if not group.size:
            continue
        views, found = [group.view(flat.buffer) for flat in flats], group.view(buffer)
        step = max(1, TOGETHER // max(1, group.size))
        for first in range(0, len(group.names), step):
            found[first : first + step] = rule(group.side, *(view[first : first + step] for view in views))
    return FlatTensors(buffer, flats[0].layout)


def rows_of(side: str, tensors: Tensor) -> Tensor:
    """Return a view (count, rows, width) of tensors of one side and shape: of factors a row a direction; a vector is one row."""
    if side != "dense":
        return tensors if side == "down" else tensors.mT
    return tensors.flatten(2) if tensors.ndim > 2 else tensors.reshape(len(tensors), 1, -1)


Entry = TypeVar("Entry")


class FlatTable(Mapping[str, Entry], Generic[Entry]):
    """A table of what lies in a buffer, made when something of it is first asked for.

    Fields:
        flat: the buffer.
        kind: the table of the layout that has its names.
        entries: makes all entries.
    """

    __slots__ = ("_made", "_names", "entries", "flat", "kind")

    def __init__(
        self, flat: FlatTensors, kind: Literal["layers", "dense"], entries: Callable[[FlatTensors], dict[str, Entry]]
    ) -> None:
        self.flat, self.kind, self.entries = flat, kind, entries
        self._names: dict[str, Any] = flat.layout.layers if kind == "layers" else flat.layout.dense
        self._made: dict[str, Entry] | None = None

    def _table(self) -> dict[str, Entry]:
        if self._made is None:
            self._made = self.entries(self.flat)
        return self._made

    def __getitem__(self, name: str) -> Entry:
        return self._table()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def keys(self) -> KeysView[str]:
        """Return the names."""
        return self._names.keys()

    def values(self) -> ValuesView[Entry]:
        """Return the entries."""
        return self._table().values()

    def items(self) -> ItemsView[str, Entry]:
        """Return names and entries."""
        return self._table().items()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the buffer, not the views."""
        return FlatTable, (self.flat, self.kind, self.entries)
