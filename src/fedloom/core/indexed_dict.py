"""A mapping that is read by key and by position, so that drawing k of a million keys costs O(k)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Indexed(Mapping[K, V]):
    """Read-only mapping whose keys have positions. Their order follows from what was put and taken so far, and from nothing else."""

    __slots__ = ("_keys", "_positions", "_values")

    def __init__(self, items: Mapping[K, V] | None = None) -> None:
        """Start with these items, in their order."""
        self._keys, self._values = list(items or ()), list(items.values()) if items else []
        self._positions = {key: position for position, key in enumerate(self._keys)}

    def __getitem__(self, key: K) -> V:
        return self._values[self._positions[key]]

    def __iter__(self) -> Iterator[K]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._positions

    def at(self, position: int) -> K:
        """Return the key at this position, counted from 0."""
        return self._keys[position]


class IndexedTable(Indexed[K, V]):
    """Indexed mapping that may be changed."""

    __slots__ = ()

    def put(self, key: K, value: V) -> None:
        """Set a value. A new key goes to the end, another one keeps its position. O(1)."""
        position = self._positions.setdefault(key, len(self._keys))
        if position == len(self._keys):
            self._keys.append(key)
            self._values.append(value)
        else:
            self._values[position] = value

    def take(self, key: K) -> V:
        """Remove a key and return its value; the last key moves to its position. O(1). Raises KeyError if it is not there."""
        position = self._positions.pop(key)
        last, value = self._keys.pop(), self._values[position]
        moved = self._values.pop()
        if position < len(self._keys):
            self._keys[position], self._values[position], self._positions[last] = last, moved, position
        return value
