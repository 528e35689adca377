"""A table that is read by key and by place, so that drawing k of a million keys costs O(k)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Indexed(Mapping[K, V]):
    """A mapping whose keys stand in a row. Their order follows from what was put and taken so far, and from nothing else."""

    __slots__ = ("_keys", "_places", "_values")

    def __init__(self, items: Mapping[K, V] | None = None) -> None:
        """With these items, in their order."""
        self._keys, self._values = list(items or ()), list(items.values()) if items else []
        self._places = {key: place for place, key in enumerate(self._keys)}

    def __getitem__(self, key: K) -> V:
        return self._values[self._places[key]]

    def __iter__(self) -> Iterator[K]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def at(self, place: int) -> K:
        """The key at this place, counted from 0."""
        return self._keys[place]


class IndexedTable(Indexed[K, V]):
    """The same for its owner, who may change it."""

    __slots__ = ()

    def put(self, key: K, value: V) -> None:
        """A new key goes to the end of the row, a known one keeps its place. O(1)."""
        place = self._places.setdefault(key, len(self._keys))
        if place == len(self._keys):
            self._keys.append(key)
            self._values.append(value)
        else:
            self._values[place] = value

    def take(self, key: K) -> V:
        """Remove a key; the last of the row moves to its place. O(1). Raises KeyError if it is not there."""
        place = self._places.pop(key)
        last, value = self._keys.pop(), self._values[place]
        moved = self._values.pop()
        if place < len(self._keys):
            self._keys[place], self._values[place], self._places[last] = last, moved, place
        return value
