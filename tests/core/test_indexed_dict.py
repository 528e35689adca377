"""The table with places: a dict to whoever asks by key, a row without gaps to whoever asks by place."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.indexed_dict import Indexed, IndexedTable

STEPS = st.lists(st.tuples(st.sampled_from(("put", "put", "take")), st.integers(0, 9), st.integers()), max_size=60)


@given(steps=STEPS)
def test_it_holds_what_a_dict_would_hold(steps: list[tuple[str, int, int]]) -> None:
    table, plain = IndexedTable[int, int](), dict[int, int]()
    for what, key, value in steps:
        if what == "put":
            table.put(key, value)
            plain[key] = value
        elif key in plain:
            assert table.take(key) == plain.pop(key)
        else:
            with pytest.raises(KeyError):
                table.take(key)
        assert dict(table.items()) == plain
        assert [table.at(place) for place in range(len(table))] == list(table)
        assert len(table) == len(plain)
        assert all((key in table) == (key in plain) for key in range(10))


@given(steps=STEPS, size=st.sampled_from([0, 200]))
def test_its_sorted_keys_are_those_that_it_has(steps: list[tuple[str, int, int]], size: int) -> None:
    """Small tables are sorted again, and in one of 200 keys up to three are mended."""
    table = IndexedTable[int, int](dict.fromkeys(range(5, 5 + size), 0))
    for what, key, value in steps:
        if what == "put" or key not in table:
            table.put(key, value)
        else:
            table.take(key)
        if value % 3:
            assert list(table.sorted_keys()) == sorted(table)
    assert list(table.sorted_keys()) == sorted(table)
    assert list(table.items()) == [(key, table[key]) for key in table]


def test_keys_that_went_and_came_back_are_not_compared_again() -> None:
    compared = list[str]()

    class Name(str):
        __slots__ = ()

        def __lt__(self, other: str) -> bool:
            compared.append(self)
            return str(self) < str(other)

    names = [Name(k) for k in range(256)]
    table = IndexedTable(dict.fromkeys(names, 0))
    whole = list(table.sorted_keys())
    compared.clear()
    for name in names[:100]:
        table.take(name)
    for name in reversed(names[:100]):
        table.put(name, 1)
    assert list(table.sorted_keys()) == whole
    assert not compared
    table.take(names[7])
    assert list(table.sorted_keys()) == [name for name in whole if name != names[7]]
    assert 0 < len(compared) <= 9  # a search by halves


@given(steps=STEPS)
def test_a_copy_stands_in_the_same_order(steps: list[tuple[str, int, int]]) -> None:
    table = IndexedTable[int, int]()
    for what, key, value in steps:
        if what == "put" or key not in table:
            table.put(key, value)
        else:
            table.take(key)
    copy = IndexedTable(table)
    assert list(copy) == list(table)
    copy.put(99, 1)
    assert 99 not in table


def test_a_new_value_keeps_its_place_and_the_last_fills_a_gap() -> None:
    table = IndexedTable({"a": 1, "b": 2, "c": 3, "d": 4})
    table.put("b", 5)
    assert list(table.items()) == [("a", 1), ("b", 5), ("c", 3), ("d", 4)]
    assert table.take("b") == 5
    assert list(table.items()) == [("a", 1), ("d", 4), ("c", 3)]


def test_a_reader_cannot_write() -> None:
    reader = Indexed({"a": 1})
    with pytest.raises(TypeError):
        reader["a"] = 2  # type: ignore[index]
    assert not hasattr(reader, "put")
