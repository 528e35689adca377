"""A mapping that is read by key and by position, so that drawing k of a million keys costs O(k)."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import ItemsView, Iterator, Mapping, Sequence
from typing import Any, TypeVar

K = TypeVar("K", bound=Any)
V = TypeVar("V")
FEW = 64
"""A sorted row is mended where one key in so many has come or gone since it was sorted, and else sorted again."""


class Indexed(Mapping[K, V]):
    """Read-only mapping whose keys have positions. Their order follows from what was put and taken so far, and from nothing else."""

    __slots__ = ("_changed", "_keys", "_positions", "_sorted", "_values")

    def __init__(self, items: Mapping[K, V] | None = None) -> None:
        """Start with these items, in their order."""
        self._sorted: list[K] | None = None
        self._changed = set[K]()
        self._keys, self._values = list(items or ()), list(items.values()) if items else []
        self._positions = {key: position for position, key in enumerate(self._keys)}

    def __getitem__(self, key: K) -> V:
        return self._values[self._positions[key]]

    def __iter__(self) -> Iterator[K]:
        return iter(self._keys)

    def items(self) -> ItemsView[K, V]:
        """Return the items, in their order."""
        return _Items(self)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._positions

    def at(self, position: int) -> K:
        """Return the key at this position, counted from 0."""
        return self._keys[position]

    def sorted_keys(self) -> Sequence[K]:
        """Return the keys in sorted order, in a row that counts until the table changes.

        It is kept: where the keys are those of the last call, whatever was taken and put again in between, this costs O(1).
        """
        if self._sorted is None or len(self._changed) * FEW > len(self._keys):
            self._sorted = sorted(self._keys)
        else:
            for key in self._changed:
                if key in self._positions:
                    insort(self._sorted, key)
                else:
                    del self._sorted[bisect_left(self._sorted, key)]
        self._changed.clear()
        return self._sorted


class _Items(ItemsView[K, V]):
    """Items of an indexed mapping, which are not looked up one by one."""

    _mapping: Indexed[K, V]

    def __iter__(self) -> Iterator[tuple[K, V]]:
        return zip(self._mapping._keys, self._mapping._values, strict=True)


class IndexedTable(Indexed[K, V]):
    """Indexed mapping that may be changed."""

    __slots__ = ()

    def put(self, key: K, value: V) -> None:
        """Set a value. A new key goes to the end, another one keeps its position. O(1)."""
        position = self._positions.setdefault(key, len(self._keys))
        if position == len(self._keys):
            self._keys.append(key)
            self._values.append(value)
            self._toggle(key)
        else:
            self._values[position] = value

    def take(self, key: K) -> V:
        """Remove a key and return its value; the last key moves to its position. O(1). Raises KeyError if it is not there."""
        position = self._positions.pop(key)
        self._toggle(key)
        last, value = self._keys.pop(), self._values[position]
        moved = self._values.pop()
        if position < len(self._keys):
            self._keys[position], self._values[position], self._positions[last] = last, moved, position
        return value

    def _toggle(self, key: K) -> None:
        """Note that a key has come or gone since the keys were sorted; a second time undoes the first."""
        if self._sorted is None:
            return
        if key in self._changed:
            self._changed.remove(key)
        else:
            self._changed.add(key)
