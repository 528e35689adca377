"""The one way from a frozen dataclass to JSON and back, and the check of values that people write.

A dataclass stands in JSON as an object of its fields behind a "type" word, the name of its class. Scalars, rows and tables stand as they
are, a function by its name, and numbers that JSON does not have as the words "nan", "inf" and "-inf". The trace, the manifest, checkpoints,
the messages of a deployment and the summaries of clients are all written by `Encoder` and read by `Decoder`. What differs between them
is handed in: how an adapter is written (its sha256, numbers in a buffer), and whether dataclasses stand in place or by reference.

Reading is strict, since some of these texts come over the network. Only the fields that a class declares are read, all of them and no others,
each of exactly the kind that is declared: no text becomes a number, and True is no number. The text never chooses a class freely. A
field of a dataclass type takes that class, and one of a protocol type (a policy, a codec) takes a class that the reader handed in or that
is declared in the module of the protocol, and only if it has the protocol's members. What is wrong raises `Malformed`, which tells the
path of fields and the kinds, never the value. Reading stops at the first error: a text costs time and memory in proportion to its
length, whatever stands in it. (pydantic was tried for this and collects all errors: a hostile text of 8 MB then takes 37 s and 3 GB, see
decision 0029.)
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache, partial
from operator import attrgetter
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeAlias, Union, cast, get_args, get_origin, get_type_hints

from torch import Tensor

from fedloom.core.errors import Refused
from fedloom.core.indexed_dict import IndexedTable

RENAMED: Mapping[str, str] = {}
"""Classes that had another name: the "type" word in older manifests, with that of today. A class that bears the old name goes before."""

SCALARS = (bool, int, float, str)
UNIONS = (Union, UnionType)
TABLES = (dict, Mapping, IndexedTable)
ROWS = (list, Sequence)
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
"""How numbers are written that JSON does not have."""


class Malformed(ValueError):
    """Data that are not what they should be. The text says where and why, and repeats no value of theirs."""


@cache
def declared_fields(kind: Any) -> Mapping[str, Any]:
    """The fields of a dataclass and their types."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


# Writing -------------------------------------------------------------------------------------------------------------

Writer: TypeAlias = Callable[[Any], str]
_quoted = json.JSONEncoder().encode
_FINITE: Writer = float.__repr__
_SCALARS: Mapping[type, Writer] = {
    NoneType: lambda value: "null",
    str: _quoted,
    bool: lambda value: "true" if value else "false",
    int: int.__repr__,
    float: lambda value: _FINITE(value) if math.isfinite(value) else f'"{value}"',
}


class Encoder(dict[type, Writer]):
    """Writes values as JSON text. It is a table of one writer a class, made when a value of the class is first met.

    A run writes some sixty values an event, so no decision is taken twice for a class. Floats are written as Python prints them, which is
    also what the `json` module writes; run hashes and traces depend on it.
    """

    def __init__(
        self,
        special: Mapping[type, Writer] | None = None,
        dataclass: Writer | None = None,
        default: Writer | None = None,
    ) -> None:
        """With other writers for some classes.

        Args:
            special: writers of classes and their subclasses, which go before the general rules.
            dataclass: writes a dataclass in the place of `record`; a checkpoint writes a reference.
            default: writes what JSON has no place for; None: such a value raises TypeError.
        """
        self.special, self.dataclass, self.default = {**_SCALARS, **(special or {})}, dataclass, default

    def encode(self, value: object) -> str:
        """Encode a value as JSON. Raises TypeError for what has no place in it."""
        return self[type(value)](value)

    def record(self, kind: type) -> Writer:
        """The writer of a dataclass by its fields, behind its name."""
        names = [field.name for field in fields(kind)]
        if not names:
            empty = f'{{"type":"{kind.__name__}"}}'
            return lambda value: empty
        template = f'{{"type":"{kind.__name__}",' + ",".join(f'"{name}":%s' for name in names) + "}"
        if len(names) == 1:  # attrgetter gives no tuple then
            only = attrgetter(names[0])
            return lambda value: template % self[type(part := only(value))](part)
        parts = attrgetter(*names)
        return lambda value: template % tuple([self[type(part)](part) for part in parts(value)])

    def row(self, value: Iterable[object]) -> str:
        """Encode items as a list."""
        return f"[{','.join([self[type(item)](item) for item in value])}]"

    def table(self, value: Mapping[Any, object]) -> str:
        """Encode a mapping. Its keys are text or whole numbers, which become text."""
        if not all(isinstance(key, str | int) for key in value):
            raise TypeError("keys of JSON are text or whole numbers")
        return f"{{{','.join([f'{_quoted(str(key))}:{self[type(item)](item)}' for key, item in value.items()])}}}"

    def __missing__(self, kind: type) -> Writer:
        self[kind] = self._writer(kind)
        return self[kind]

    def _writer(self, kind: type) -> Writer:
        for base, writer in self.special.items():
            if issubclass(kind, base):
                return writer
        if is_dataclass(kind):
            return self.dataclass or self.record(kind)
        if issubclass(kind, Mapping):
            return self.table
        if issubclass(kind, Sequence) and not issubclass(kind, bytes | bytearray | memoryview):
            return self.row
        if self.default is not None:
            return self.default
        raise TypeError(f"a {kind.__name__} cannot be written as JSON")


def jsonable(value: object) -> Any:
    """A value as plain JSON data: what `json.loads` gives for it.

    Used for settings and summaries. Paths are text, sets are lists, functions stand by their name, and what has no place in JSON by the
    name of its class. Rows of data are told by their number and their sha256: a manifest holds no data.
    """
    return json.loads(_SETTINGS.encode(value))


def _rows(value: Sequence[object]) -> str:
    """Encode a row. If it is one of examples, each a mapping, their count and hash take its place."""
    if not value or not isinstance(value[0], Mapping):
        return _SETTINGS.row(value)
    text = json.dumps(list(value), default=str)
    return json.dumps({"rows": len(value), "sha256": hashlib.sha256(text.encode()).hexdigest()})


def function_name(value: object) -> str:
    """Encode a function by its name, and any other object by that of its class."""
    return _quoted(getattr(value, "__name__", type(value).__name__))


_SETTINGS = Encoder(default=function_name)
_SETTINGS.special |= {Path: lambda value: _quoted(str(value)), set: _SETTINGS.row, frozenset: _SETTINGS.row}
_SETTINGS.special |= {Sequence: _rows}


# Reading -------------------------------------------------------------------------------------------------------------

Read: TypeAlias = Callable[[Any, Any], Any]
"""Makes a value of JSON data, with the context of the call."""


class Decoder:
    """Reads JSON data back as values of declared types. How a type is read is worked out once for each type.

    Args:
        known: classes and functions that may stand by name in fields of a protocol type or of a function type.
        special: how values of some types are read, from (data, context).
        reference: reads a dataclass or a tensor that stands by reference, from (data, context); None: they stand in place.
        finite: whether numbers have to be finite.
    """

    def __init__(
        self,
        known: Iterable[Any] = (),
        special: Mapping[Any, Read] | None = None,
        reference: Read | None = None,
        finite: bool = False,
    ) -> None:
        self.known = {thing.__name__: thing for thing in known}
        self.special, self.reference, self.finite = special or {}, reference, finite
        self._readers, self._records = dict[Any, Read](), dict[type, Read]()

    def decode(self, hint: Any, text: str | bytes, context: Any = None) -> Any:
        """The value of this type that a JSON text holds. Raises Malformed, whatever the text is."""
        try:
            return self.read(hint, json.loads(text), context)
        except Malformed:
            raise
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError, RuntimeError) as error:
            raise Malformed(str(error)[:200] or type(error).__name__) from error

    def read(self, hint: Any, data: Any, context: Any = None) -> Any:
        """The value of this type that JSON data hold. Raises Malformed, or what a class raises that refuses its fields."""
        reader = self._readers.get(hint)
        if reader is None:
            reader = self._readers[hint] = self._reader(hint)
        return reader(data, context)

    def read_object(self, data: Any, context: Any = None) -> object:
        """The dataclass that JSON data hold by name and fields. Raises Malformed."""
        kind = self._known(_word(data))
        if not isinstance(kind, type) or not is_dataclass(kind):
            raise Malformed(f"there is no kind {_word(data)!r:.60}")
        return self._record(kind)(data, context)

    def _known(self, word: str) -> Any:
        return self.known.get(word, self.known.get(RENAMED.get(word, "")))

    def _reader(self, hint: Any) -> Read:
        """How values of this type are read."""
        origin, inner = get_origin(hint), get_args(hint)
        if hint in self.special:
            return self.special[hint]
        if hint is float:
            return _read_finite if self.finite else _read_float
        if hint in SCALARS:
            return partial(_read_scalar, hint)
        if origin is Literal:
            return partial(_read_literal, inner)
        if origin in UNIONS:
            return self._union(inner)
        if origin is tuple and inner[-1] is not Ellipsis:
            return self._items(inner)
        if origin in ROWS or origin is tuple:
            return self._row(inner[0], tuple if origin is tuple else list)
        if origin in TABLES:
            return self._table(*inner, IndexedTable if origin is IndexedTable else dict)
        if is_dataclass(hint) and self.reference is None:
            return self._record(cast(type, hint))
        return self._named(hint)

    def _record(self, kind: type) -> Read:
        """A dataclass by its fields."""
        if kind in self._records:
            return self._records[kind]
        hints = declared_fields(kind)
        readers = {name: partial(self.read, hint) for name, hint in hints.items()}
        names = {"type", *hints}

        def record(data: Any, context: Any) -> object:
            word = _word(data)
            if word != kind.__name__ and RENAMED.get(word) != kind.__name__:
                raise Malformed(f"there is no kind {word!r:.60} here, expected {kind.__name__}")
            if data.keys() != names:
                differ = ", ".join(sorted(data.keys() ^ names))
                raise Malformed(f"{kind.__name__} has other fields ({differ:.60})")
            values, name = dict[str, object](), ""
            try:
                for name, reader in readers.items():
                    values[name] = reader(data[name], context)
            except Malformed as error:
                raise Malformed(f"{name}: {error}") from error
            return kind(**values)

        self._records[kind] = record
        return record

    def _union(self, kinds: Sequence[Any]) -> Read:
        """One of several types, a dataclass by its word, or None."""
        rest = [kind for kind in kinds if kind is not NoneType]
        optional, inside = len(rest) < len(kinds), self.reference is None
        records = {kind.__name__: self._record(kind) for kind in rest if inside and is_dataclass(kind)}
        others = [kind for kind in rest if not (inside and is_dataclass(kind))]

        def one_of(data: Any, context: Any) -> object:
            if data is None and optional:
                return None
            if records and isinstance(data, dict):
                word = _word(data)
                reader = records.get(word) or records.get(RENAMED.get(word, ""))
                if reader is not None:
                    return reader(data, context)
                if not others:
                    raise Malformed(f"there is no kind {word!r:.60}")
            if len(rest) == 1:
                return self.read(rest[0], data, context)
            for kind in others:
                with suppress(Malformed):
                    return self.read(kind, data, context)
            raise _wrong(" or ".join(describe_type(kind, None) for kind in kinds), data)

        return one_of

    def _items(self, kinds: Sequence[Any]) -> Read:
        """A row of fixed length."""

        def items(data: Any, context: Any) -> tuple[object, ...]:
            if type(data) is not list or len(data) != len(kinds):
                raise _wrong(f"a list of {len(kinds)}", data)
            return tuple([self.read(kind, item, context) for kind, item in zip(kinds, data, strict=True)])

        return items

    def _row(self, kind: Any, build: Callable[[list[Any]], Any]) -> Read:
        """A row of items of one type."""
        item = partial(self.read, kind)

        def row(data: Any, context: Any) -> object:
            if type(data) is not list:
                raise _wrong("a list", data)
            return build([item(part, context) for part in data])

        return row

    def _table(self, key: Any, kind: Any, build: Callable[[dict[Any, Any]], Any]) -> Read:
        """A table; keys that are numbers stand as text in JSON."""
        item = partial(self.read, kind)

        def table(data: Any, context: Any) -> object:
            if type(data) is not dict:
                raise _wrong("an object", data)
            return build({_read_key(key, name): item(part, context) for name, part in data.items()})

        return table

    def _named(self, hint: Any) -> Read:
        """A reference, a function by its name, or a dataclass by its word where the type asks for members only."""
        if is_protocol(hint):
            self.known = {**_implementations(hint), **self.known}

        def named(data: Any, context: Any) -> object:
            if isinstance(data, str) and self._known(data) is not None:
                value = self._known(data)
            elif not isinstance(data, dict):
                raise _wrong(describe_type(hint, None), data)
            elif self.reference is not None and "type" not in data:
                value = self.reference(data, context)
            else:
                value = self.read_object(data, context)
            if not matches_type(value, hint):
                raise Malformed(f"a {type(value).__name__} in the place of {describe_type(hint, None)}")
            return value

        return named


def reachable_classes(*hints: Any) -> dict[str, type]:
    """The dataclasses by name that values of these types are made of.

    Raises TypeError for a type that cannot be read back, and for two classes of one name.
    """
    classes, todo = dict[str, type](), list(hints)
    while todo:
        hint = todo.pop()
        origin = get_origin(hint)
        if origin in (*UNIONS, *TABLES, *ROWS, tuple):
            todo += [inner for inner in get_args(hint) if inner is not Ellipsis]
        elif is_dataclass(hint):
            kind = cast(type, hint)
            if classes.setdefault(kind.__name__, kind) is not kind:
                raise TypeError(f"there are two kinds of {kind.__name__}")
            todo += [inner for inner in declared_fields(kind).values() if inner not in classes.values()]
        elif is_protocol(hint):
            todo += [kind for kind in _implementations(hint).values() if kind not in classes.values()]
        elif hint not in (*SCALARS, NoneType, Tensor) and origin is not Literal:
            raise TypeError(f"{hint} cannot be read back")
    return classes


def _implementations(protocol: Any) -> dict[str, type]:
    """The dataclasses in the module of a protocol that have its members."""
    things = vars(sys.modules[protocol.__module__]).values()
    kinds = [thing for thing in things if isinstance(thing, type) and is_dataclass(thing)]
    return {kind.__name__: kind for kind in kinds if all(hasattr(kind, name) for name in _members(protocol))}


def _word(data: Any) -> str:
    """The name of a class that data bear; "" if they bear none."""
    word = data.get("type") if isinstance(data, dict) else None
    return word if isinstance(word, str) else ""


def _read_scalar(kind: type, data: Any, context: Any) -> Any:
    if type(data) is not kind:
        raise _wrong(describe_type(kind, None), data)
    return data


def _read_float(data: Any, context: Any) -> Any:
    """A number; a whole one stays whole, so that it is written again as it was."""
    if type(data) is float or type(data) is int:
        return data
    if type(data) is str and data in NOT_FINITE:
        return NOT_FINITE[data]
    raise _wrong("a number", data)


def _read_finite(data: Any, context: Any) -> Any:
    if type(data) is int or (type(data) is float and math.isfinite(data)):
        return data
    raise _wrong("a finite number", data)


def _read_literal(values: Sequence[object], data: Any, context: Any) -> Any:
    if not isinstance(data, bool | int | str) or data not in values:
        raise _wrong(" or ".join(map(repr, values)), data)
    return data


def _read_key(kind: type, text: str) -> Any:
    if kind is not int:
        return _read_scalar(kind, text, None)
    if not text.removeprefix("-").isdecimal():
        raise Malformed("expected a whole number as a key")
    return int(text)


_JSON_KINDS = {dict: "an object", list: "a list", str: "text", int: "a whole number", float: "a number"}


def _wrong(expected: str, data: object) -> Malformed:
    """The error of data of another kind, which tells the kind and not the data."""
    kind = {None: "null", True: "true", False: "false"}[data] if data is None or isinstance(data, bool) else ""  # type: ignore[index]
    return Malformed(f"expected {expected}, got {kind or _JSON_KINDS.get(type(data), type(data).__name__)}")


# Values that people write, in a run file or after `--set` --------------------------------------------------------------


def check_fields(value: Any, path: str = "") -> None:
    """Raise Refused for the first field, however deep, of another type than declared, or with an infinite number."""
    if not is_dataclass(value) or isinstance(value, type):
        return
    for field, hint in declared_fields(type(value)).items():
        name, content = f"{path}{field}", getattr(value, field)
        if not matches_type(content, hint):
            raise Refused(name, content, f"expected {describe_type(hint, None)}")
        if isinstance(content, float) and not math.isfinite(content):
            raise Refused(name, content, "expected a finite number")
        for item in content if isinstance(content, tuple) else (content,):
            check_fields(item, f"{name}.")


def matches_type(value: Any, hint: Any) -> bool:
    """Whether a field of this type takes the value, as far as that can be seen. A whole number is also a number."""
    return matches_exactly(value, hint) or (type(value) is int and matches_exactly(float(value), hint))


def matches_exactly(value: Any, hint: Any) -> bool:
    """Whether a field of this type takes the value as it is, a whole number only where one is declared."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in UNIONS:
        return any(matches_exactly(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        return type(value) is tuple and all(matches_type(item, inner[0]) for item in value)
    if hint in SCALARS:
        return type(value) is hint
    if hint is NoneType:
        return value is None
    if is_protocol(hint):
        return not isinstance(value, type | str) and all(hasattr(value, name) for name in _members(hint))
    if origin is Callable:
        return callable(value) and not isinstance(value, type)
    return isinstance(value, origin or hint)


def describe_type(hint: Any, current: object) -> str:
    """What a field of this type takes, in words for a person; `current` is its value now, as an example."""
    simple = {bool: "True or False", int: "a whole number", float: "a number", str: "text", NoneType: "None"}
    origin, inner = get_origin(hint), get_args(hint)
    if hint in simple:
        return simple[hint]
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin in UNIONS:
        return " or ".join(describe_type(one, current) for one in inner)
    if origin is tuple:
        first = current[0] if isinstance(current, tuple) and current else None
        return {int: "a tuple such as (2, 4, 8)", str: "a tuple such as ('query', 'value')"}.get(
            inner[0], f"a tuple, each item {describe_type(inner[0], first)}"
        )
    if origin is Callable:
        return f"a function such as {getattr(current, '__name__', 'linear')}"
    return f"a value like {type(current).__name__}(...)" if is_dataclass(current) else f"a {(origin or hint).__name__}"


def is_protocol(hint: Any) -> bool:
    """Whether a type asks for members and not for a class."""
    return bool(getattr(hint, "_is_protocol", False))


def _members(protocol: Any) -> list[str]:
    names = [name for name in vars(protocol) if not name.startswith("_")]
    return [*names, "__call__"] if "__call__" in vars(protocol) else names
