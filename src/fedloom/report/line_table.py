"""Lines of a log as columns: a million tasks take the memory of their numbers, and not that of a million dictionaries.

A table is a sequence of its lines, which are made when they are asked for. What is reckoned over all of them takes columns instead:
`numbers` and `words` of a field, and `select` or `by_text` for some of the lines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from types import NoneType
from typing import Any, NamedTuple, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

Line: TypeAlias = Mapping[str, Any]
Floats: TypeAlias = NDArray[np.float64]
Places: TypeAlias = NDArray[np.int64]
Flags: TypeAlias = NDArray[np.bool_]

BLOCK = 4096
"""Lines that become parts of columns, or lines again, at once."""
MOST_FIELDS = 64
"""Fields with columns, each of which costs something in every line. What lines have beyond them, which no run writes, stays whole."""
PARTS = ("down", "train", "up")
"""Names in an object of numbers that is kept as columns of its own: the seconds of a task."""
TEXT, REST = "text", "rest"
"""Beside `PARTS` and "" (numbers): columns of what is no number, and of all fields without a column."""
NUMBER, NULL, ABSENT, OTHER = range(4)
_STATES = {int: NUMBER, float: NUMBER, NoneType: NULL}
_SIGNED = (np.int8, np.int16, np.int32, np.int64)
LARGEST_WHOLE = 2**53
"""Whole numbers up to here are the same among broken ones; larger ones are kept as texts are."""


class _Missing:
    """In the place of a field that a line does not have."""


_STATES[_Missing] = ABSENT
MISSING = _Missing()


class ColumnKey(NamedTuple):
    """Which column: a field may have numbers in some lines and texts in others, and each has its own.

    Fields:
        name: the field.
        part: what of it: "" its numbers, `TEXT` all else, one of `PARTS` the numbers of this name in an object.
    """

    name: str
    part: str


@dataclass(frozen=True, slots=True)
class Column:
    """One field in all lines of a log.

    Fields:
        values: its numbers; or, where there are `words`, the places among these.
        holes: NULL or ABSENT where a line has no value (None: all have one).
        words: what is no number, each text once (None: the values are numbers).
    """

    values: NDArray[Any]
    holes: NDArray[np.uint8] | None = None
    words: Sequence[Any] | None = None

    def present(self, rows: Places) -> Flags:
        """Tell which of these lines have a value."""
        return np.ones(len(rows), bool) if self.holes is None else self.holes[rows] == NUMBER

    def read(self, rows: Places) -> list[Any]:
        """Return the values of these lines as they were written, MISSING where there is none."""
        values: list[Any] = self.values[rows].tolist()
        if self.words is not None:
            values = [self.words[place] for place in values]
        if self.holes is not None:
            for place in np.flatnonzero(self.holes[rows]).tolist():
                values[place] = None if self.holes[rows[place]] == NULL else MISSING
        return values


@dataclass(frozen=True, slots=True, eq=False)
class LineTable(Sequence[Line]):
    """Lines of a log as columns.

    Fields:
        columns: of all lines of the log that are of one kind.
        rows: the lines that this table has, in order.
    """

    columns: Mapping[ColumnKey, Column] = field(default_factory=dict)
    rows: Places = field(default_factory=lambda: np.arange(0))

    @classmethod
    def of(cls, lines: Iterable[Line]) -> LineTable:
        """Return a table of these lines."""
        builder, every = TableBuilder(), iter(lines)
        while block := list(islice(every, BLOCK)):
            builder.add(block)
        return builder.table()

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Line]:
        for begin in range(0, len(self), BLOCK):
            yield from self._lines(self.rows[begin : begin + BLOCK])

    @overload
    def __getitem__(self, index: int) -> Line: ...
    @overload
    def __getitem__(self, index: slice) -> LineTable: ...
    def __getitem__(self, index: int | slice) -> Line | LineTable:
        if isinstance(index, slice):
            return replace(self, rows=self.rows[index])
        place = range(len(self))[index]
        return next(self._lines(self.rows[place : place + 1]))

    def numbers(self, name: str, part: str = "") -> Floats:
        """Return the numbers of a field, or those of one name in its objects; NaN for lines without one."""
        if (column := self.columns.get(ColumnKey(name, part))) is None:
            return np.full(len(self), np.nan)
        return np.where(column.present(self.rows), column.values[self.rows].astype(np.float64), np.nan)

    def words(self, name: str) -> tuple[Places, Sequence[Any]]:
        """Return what a field has that is no number, and for each line the place of its own among it (-1: it has none)."""
        if (column := self.columns.get(ColumnKey(name, TEXT))) is None:
            return np.full(len(self), -1), ()
        return np.where(column.present(self.rows), column.values[self.rows].astype(np.int64), -1), column.words or ()

    def matches(self, name: str, texts: Iterable[str]) -> Flags:
        """Tell for each line whether a field is one of these texts."""
        places, words, wanted = *self.words(name), frozenset(texts)
        return np.isin(places, [place for place, word in enumerate(words) if isinstance(word, str) and word in wanted])

    def counts(self, name: str) -> Counter[str]:
        """Count the lines with each text of a field."""
        places, words = self.words(name)
        found, counts = np.unique(places[places >= 0], return_counts=True)
        pairs = zip(found.tolist(), counts.tolist(), strict=True)
        return Counter({words[place]: count for place, count in pairs if isinstance(words[place], str)})

    def has(self, name: str) -> bool:
        """Tell whether any line of the log has this field, be it null."""
        return any(key.name == name for key in self.columns)

    def select(self, chosen: Places | Flags) -> LineTable:
        """Return the lines at these places, or those for which it is true."""
        return replace(self, rows=self.rows[chosen])

    def by_text(self, name: str) -> dict[str, LineTable]:
        """Divide the lines by the text of a field. Lines without one are in no part."""
        places, words = self.words(name)
        order = np.argsort(places, kind="stable")
        found, begins = np.unique(places[order], return_index=True)
        spans = zip(found.tolist(), begins.tolist(), [*begins.tolist(), len(order)][1:], strict=True)
        texts = [(words[place], span) for place, *span in spans if place >= 0 and isinstance(words[place], str)]
        return {text: self.select(order[begin:end]) for text, (begin, end) in texts}

    def _lines(self, rows: Places) -> Iterator[Line]:
        plain = [key for key in self.columns if key.part in ("", TEXT)]
        names = [key.name for key in plain]
        rest = self.columns.get(ColumnKey("", REST))
        others = rest.read(rows) if rest else [MISSING] * len(rows)
        inner = {key: column.read(rows) for key, column in self.columns.items() if key.part in PARTS}
        objects = {key.name for key in inner}
        every = zip(*(self.columns[key].read(rows) for key in plain), strict=True) if plain else [()] * len(rows)
        for place, (values, more) in enumerate(zip(every, others, strict=True)):
            line = {name: value for name, value in zip(names, values, strict=True) if value is not MISSING}
            for name in objects:
                if type(parts := line.get(name)) is tuple:
                    line[name] = {part: inner[ColumnKey(name, part)][place] for part in parts}
            yield line if more is MISSING else line | more


@dataclass(slots=True)
class TableBuilder:
    """Takes lines, block by block, and keeps their columns.

    Fields:
        size: lines so far.
        parts: by column, where a part of it begins, its values, and its holes.
        words: by field, what is no number.
        places: by field, the place of each text among its words.
    """

    size: int = 0
    parts: dict[ColumnKey, list[tuple[int, NDArray[Any], NDArray[np.uint8]]]] = field(default_factory=dict)
    words: dict[ColumnKey, list[Any]] = field(default_factory=dict)
    places: dict[ColumnKey, dict[Any, int]] = field(default_factory=dict)

    def add(self, lines: Sequence[Line]) -> None:
        """Take these lines."""
        names = dict.fromkeys(chain.from_iterable(lines))
        known = {key.name for key in self.parts}
        new = [name for name in names if name not in known]
        rest = set(new[max(0, MOST_FIELDS - len(known)) :])
        for name in names:
            if name not in rest:
                self._add(name, [line.get(name, MISSING) for line in lines])
        if rest:
            others = [{name: line[name] for name in line if name in rest} or MISSING for line in lines]
            self._add_words(ColumnKey("", REST), others, _states(others))
        self.size += len(lines)

    def table(self) -> LineTable:
        """Return the table of all lines; the builder must not be used after."""
        columns = {key: self._assembled(key, self.parts.pop(key)) for key in list(self.parts)}
        return LineTable(columns, np.arange(self.size))

    def _add(self, name: str, values: list[Any]) -> None:
        """Take the values that a field has in the lines of a block."""
        objects = [value for value in values if type(value) is dict]
        if objects and all(map(_holds_parts, objects)):
            for part in PARTS:
                own = [value.get(part, MISSING) if type(value) is dict else MISSING for value in values]
                self._add_numbers(ColumnKey(name, part), own, _states(own))
            values = [tuple(value) if type(value) is dict else value for value in values]
        states = _states(values)
        numbers, texts = states == NUMBER, states == OTHER
        if not texts.any():
            self._add_numbers(ColumnKey(name, ""), values, states)
            return
        if numbers.any():
            self._add_numbers(ColumnKey(name, ""), values, np.where(numbers, NUMBER, ABSENT))
        self._add_words(ColumnKey(name, TEXT), values, np.where(numbers, ABSENT, states))

    def _add_numbers(self, key: ColumnKey, values: list[Any], states: NDArray[Any]) -> None:
        here = states == NUMBER
        found = np.array(values if here.all() else [v if h else 0 for v, h in zip(values, here.tolist(), strict=True)])
        self.parts.setdefault(key, []).append((self.size, found, np.where(here, NUMBER, states).astype(np.uint8)))

    def _add_words(self, key: ColumnKey, values: list[Any], states: NDArray[Any]) -> None:
        words, places, here = self.words.setdefault(key, [None]), self.places.setdefault(key, {}), states == OTHER
        found = [
            _place(value, words, places) if known else 0 for value, known in zip(values, here.tolist(), strict=True)
        ]
        self.parts.setdefault(key, []).append(
            (self.size, np.array(found), np.where(here, NUMBER, states).astype(np.uint8))
        )

    def _assembled(self, key: ColumnKey, parts: list[tuple[int, NDArray[Any], NDArray[np.uint8]]]) -> Column:
        """Join the parts of a column; lines in no part do not have the field."""
        values = np.zeros(self.size, _smallest_type([found for _, found, _ in parts]))
        holes = np.full(self.size, ABSENT, np.uint8)
        for begin, found, missing in parts:
            values[begin : begin + len(found)] = found
            holes[begin : begin + len(found)] = missing
        return Column(values, holes if holes.any() else None, self.words.get(key))


def _states(values: Sequence[Any]) -> NDArray[np.uint8]:
    """Tell what each value is: a number that a column can hold, null, absent, or something else."""
    kinds = set(map(type, values))
    if int in kinds and not all(map(_fits, values)):
        return np.array([_STATES.get(type(value), OTHER) if _fits(value) else OTHER for value in values], np.uint8)
    if len(kinds) == 1:
        return np.full(len(values), _STATES.get(kinds.pop(), OTHER), np.uint8)
    return np.array([_STATES.get(type(value), OTHER) for value in values], np.uint8)


def _fits(value: object) -> bool:
    return type(value) is not int or -LARGEST_WHOLE <= value <= LARGEST_WHOLE


def _holds_parts(value: Mapping[str, Any]) -> bool:
    """Tell whether an object has only numbers, under some of the names in `PARTS`."""
    return all(name in PARTS and type(inner) in (int, float) and _fits(inner) for name, inner in value.items())


def _place(value: Any, words: list[Any], places: dict[Any, int]) -> int:
    """The place of a value among the words. A text stands there once, and so does an object of such; a list is not looked for."""
    key = tuple(value.items()) if type(value) is dict else value
    try:
        place = places.setdefault(key, len(words))
    except TypeError:  # it holds a list or an object
        place = len(words)
    if place == len(words):
        words.append(value)
    return place


def _smallest_type(parts: Sequence[NDArray[Any]]) -> Any:
    """The type of numbers that holds all of these in the fewest bytes without changing any."""
    if any(part.dtype.kind == "f" for part in parts):
        return np.float64
    low, high = min(int(part.min()) for part in parts), max(int(part.max()) for part in parts)
    return next(kind for kind in _SIGNED if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max)
