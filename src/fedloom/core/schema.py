"""The one way from a frozen dataclass to JSON and back, and the check of values that people write.

A dataclass stands in JSON as an object of its fields behind a "type" word, the name of its class. Scalars, rows and tables stand
as they are, a function by its name, and numbers that JSON does not have as the words "nan", "inf" and "-inf". The trace, the
manifest, checkpoints, the messages of a deployment and the summaries of clients are all written by `Encoder` and read by
`Decoder`. What differs between them is handed in: how an adapter is written (its sha256, numbers in a buffer), and whether
dataclasses stand in place or by reference.

Reading is strict, since some of these texts come over the network. Only the fields that a class declares are read, all of them
and no others, each of exactly the kind that is declared: no text becomes a number, and True is no number. The text never chooses
a class freely. A field of a dataclass type takes that class, and one of a protocol type (a policy, a codec) takes a class that
the reader handed in or that is declared in the module of the protocol, and only if it has the protocol's members. What is wrong
raises `Malformed`, which tells the path of fields and the kinds, never the value. Reading stops at the first error: a text costs
time and memory in proportion to its length, whatever stands in it. (pydantic was tried for this and collects all errors: a
hostile text of 8 MB then takes 37 s and 3 GB, see decision 0029.)
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache
from json.encoder import encode_basestring_ascii
from operator import attrgetter
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeAlias, Union, cast, get_args, get_origin, get_type_hints

from fedloom.core.errors import Refused
from fedloom.core.indexed_dict import IndexedTable
from fedloom.core.text import has_surrogate

RENAMED: Mapping[str, str] = {
    "Scored": "GradientScore",
    "Earned": "LossRate",
    "Paced": "BestRoundTime",
    "Planned": "JointPlan",
}
"""Policies that had another name: the "type" word in older manifests, with that of today."""
LATER: Mapping[str, Mapping[str, object]] = {
    "Budget": {"rate": None},
    "ChangeNorms": {"rate": 1.0},
    "FlexLoRA": {"energy": None},
    "Plan": {"rate": None},
    "RunTerms": {"rates": None},
}
"""By class, the field that came later, with the value at which it is left out: so all that does without it is written as before."""

SCALARS = (bool, int, float, str)
UNIONS = (Union, UnionType)
TABLES = (dict, Mapping, IndexedTable)
ROWS = (list, Sequence)
LARGEST_FLOAT = 3e38
"""Largest number in a setting: what is computed with is float32."""
LARGEST_WHOLE = 2**64
"""Largest whole number in a setting, which may be a seed."""
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
_quoted: Writer = encode_basestring_ascii
_FINITE: Writer = float.__repr__
_SCALARS: Mapping[type, Writer] = {
    NoneType: lambda value: "null",
    str: _quoted,
    bool: lambda value: "true" if value else "false",
    int: int.__repr__,
    float: lambda value: _FINITE(value) if math.isfinite(value) else f'"{value}"',
}


class Encoder(dict[type, Writer]):
    """Writes values as JSON text. It is a table of one writer per class, made when a value of the class is first met.

    A run writes some sixty values an event, so no decision is taken twice for a class. Floats are written as Python prints them,
    which is also what the `json` module writes; run hashes and traces depend on it.
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

    def record(self, kind: type, parts: Callable[[Any], tuple[object, ...]] | None = None) -> Writer:
        """The writer of a dataclass by its fields, behind its name; `parts` gives what is written of them, in their order."""
        names = [field.name for field in fields(kind)]
        if kind.__name__ not in LATER or parts:
            return self._record(kind, names, parts)
        ((later, before),) = LATER[kind.__name__].items()
        whole, short = self._record(kind, names), self._record(kind, [name for name in names if name != later])
        return lambda value: (short if getattr(value, later) == before else whole)(value)

    def _record(
        self, kind: type, names: Sequence[str], parts: Callable[[Any], tuple[object, ...]] | None = None
    ) -> Writer:
        if not names:
            empty = f'{{"type":"{kind.__name__}"}}'
            return lambda value: empty
        template = f'{{"type":"{kind.__name__}",' + ",".join(f'"{name}":%s' for name in names) + "}"
        if len(names) == 1:  # attrgetter gives no tuple then
            only = attrgetter(names[0])
            return lambda value: template % self[type(part := only(value))](part)
        parts = parts or attrgetter(*names)
        return lambda value: template % tuple([self[type(part)](part) for part in parts(value)])

    def row(self, value: Iterable[object]) -> str:
        """Encode items as a list."""
        return f"[{','.join([self[type(item)](item) for item in value])}]"

    def table(self, value: Mapping[Any, object]) -> str:
        """Encode a mapping. Its keys are text or whole numbers, which become text."""
        if not all(issubclass(kind, str | int) for kind in set(map(type, value))):
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

    Used for settings and summaries. Paths are text, sets are lists, functions stand by their name, and what has no place in JSON
    by the name of its class. Rows of data are told by their number and their sha256: a manifest holds no data.
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
    """Reads JSON data back as values of declared types.

    Args:
        known: classes and functions that may stand by name in fields of a protocol type or of a function type.
        special: how values of some types are read, from (data, context).
        reference: reads an object that stands by reference, from (data, context), where data have no "type" word.
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
        origin, inner = get_origin(hint), get_args(hint)
        if hint in self.special:
            return self.special[hint](data, context)
        if hint is float:
            return self._number(data)
        if hint in SCALARS:
            return _expect(hint, data)
        if origin is Literal:
            return _choice(inner, data)
        if origin in UNIONS:
            return self._one_of(inner, data, context)
        if origin is tuple and inner[-1] is not Ellipsis:
            if len(_expect(list, data, "a list")) != len(inner):
                raise Malformed(f"expected a list of {len(inner)}, got one of {len(data)}")
            return tuple([self.read(kind, item, context) for kind, item in zip(inner, data, strict=True)])
        if origin in ROWS or origin is tuple:
            row = [self.read(inner[0], item, context) for item in _expect(list, data, "a list")]
            return tuple(row) if origin is tuple else row
        if origin in TABLES:
            items = _expect(dict, data, "an object").items()
            table = {_key(inner[0], key): self.read(inner[1], item, context) for key, item in items}
            return IndexedTable(table) if origin is IndexedTable else table
        if is_dataclass(hint) and self.reference is None:
            return self._record(cast(type, hint), data, context)
        return self._named(hint, data, context)

    def read_object(self, data: Any, context: Any = None) -> object:
        """The dataclass that JSON data hold by name and fields. Raises Malformed."""
        kind = self.known.get(_word(data))
        if not isinstance(kind, type) or not is_dataclass(kind):
            raise Malformed(f"there is no kind {_word(data)!r:.60}")
        return self._record(kind, data, context)

    def _record(self, kind: type, data: Any, context: Any) -> object:
        """A dataclass by its fields: all of them and no others."""
        if _expect(dict, data, f"a {kind.__name__}").get("type", kind.__name__) != kind.__name__:
            raise Malformed(f"there is no kind {_word(data)!r:.60} here, expected {kind.__name__}")
        hints, values, name = declared_fields(kind), dict[str, object](), ""
        if later := LATER.get(kind.__name__):
            data = {**later, **data}
        if len(data) != len(hints) + 1 or not all(name in data for name in ("type", *hints)):
            differ = ", ".join(sorted(data.keys() ^ {"type", *hints}))
            raise Malformed(f"{kind.__name__} has other fields ({differ:.60})")
        try:
            for name, hint in hints.items():
                values[name] = self.read(hint, data[name], context)
        except Malformed as error:
            raise Malformed(f"{name}: {error}") from error
        return kind(**values)

    def _one_of(self, kinds: Sequence[Any], data: Any, context: Any) -> object:
        """A value of one of several types, a dataclass by its word, or None."""
        rest = [kind for kind in kinds if kind is not NoneType]
        if data is None and len(rest) < len(kinds):
            return None
        if len(rest) == 1:
            return self.read(rest[0], data, context)
        for kind in rest:
            if is_dataclass(kind) and cast(type, kind).__name__ == _word(data):
                return self._record(cast(type, kind), data, context)
        for kind in rest:
            if not is_dataclass(kind) or (self.reference is not None and not _word(data)):
                with suppress(Malformed):
                    return self.read(kind, data, context)
        if all(map(is_dataclass, rest)) and isinstance(data, dict):
            raise Malformed(f"there is no kind {_word(data)!r:.60} here")
        raise _wrong(" or ".join(describe_type(kind, None) for kind in kinds), data)

    def _named(self, hint: Any, data: Any, context: Any) -> object:
        """A reference, a function by its name, or a dataclass by its word where the type asks for members only."""
        if isinstance(data, str) and data in self.known:
            value = self.known[data]
        elif not isinstance(data, dict):
            raise _wrong(describe_type(hint, None), data)
        elif self.reference is not None and not _word(data):
            value = self.reference(data, context)
        elif is_protocol(hint) and _word(data) in _implementations(hint):
            value = self._record(_implementations(hint)[_word(data)], data, context)
        else:
            value = self.read_object(data, context)
        if not matches_type(value, hint):
            raise Malformed(f"a {type(value).__name__} in the place of {describe_type(hint, None)}")
        return value

    def _number(self, data: Any) -> Any:
        """A number. A whole one stays whole, so that it is written again as it was."""
        if type(data) in (int, float) and (not self.finite or math.isfinite(data)):
            return data
        if type(data) is str and data in NOT_FINITE and not self.finite:
            return NOT_FINITE[data]
        raise _wrong("a finite number" if self.finite else "a number", data)


def reachable_classes(*hints: Any) -> dict[str, type]:
    """The dataclasses by name that values of these types are made of, and `Tensor` if it is among them.

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
        elif isinstance(hint, type) and (hint.__module__, hint.__name__) == ("torch", "Tensor"):
            classes["Tensor"] = hint  # by its name: who reads no tensors need not wait for torch
        elif hint not in (*SCALARS, NoneType) and origin is not Literal:
            raise TypeError(f"{hint} cannot be read back")
    return classes


def with_current_names(data: Any) -> Any:
    """JSON data of an older version, with the names that its policies have today."""
    if isinstance(data, dict):
        renamed = {key: with_current_names(item) for key, item in data.items()}
        return renamed if "type" not in data else {**renamed, "type": RENAMED.get(_word(data), data["type"])}
    return [with_current_names(item) for item in data] if isinstance(data, list) else data


@cache
def _implementations(protocol: Any) -> dict[str, type]:
    """The dataclasses in the module of a protocol that have its members."""
    things = vars(sys.modules[protocol.__module__]).values()
    kinds = [thing for thing in things if isinstance(thing, type) and is_dataclass(thing)]
    return {kind.__name__: kind for kind in kinds if implements(kind, protocol)}


def _word(data: Any) -> str:
    """The name of a class that data bear; "" if they bear none."""
    word = data.get("type") if isinstance(data, dict) else None
    return word if isinstance(word, str) else ""


def _expect(kind: type, data: Any, expected: str = "") -> Any:
    """The data, if they are exactly of this kind: True is no number."""
    if type(data) is not kind:
        raise _wrong(expected or describe_type(kind, None), data)
    return data


def _choice(values: Sequence[object], data: Any) -> Any:
    if not isinstance(data, bool | int | str) or data not in values:
        raise _wrong(" or ".join(map(repr, values)), data)
    return data


def _key(kind: type, text: str) -> Any:
    """A key of a table. JSON's keys are text."""
    if kind is not int:
        return _expect(kind, text, "another key than text")
    if not text.removeprefix("-").isdecimal():
        raise Malformed("expected a whole number as a key")
    return int(text)


_JSON_KINDS: Mapping[type, str] = {
    dict: "an object",
    list: "a list",
    str: "text",
    int: "a whole number",
    float: "a number",
}


def _wrong(expected: str, data: object) -> Malformed:
    """The error of data of another kind, which tells the kind and not the data."""
    return Malformed(f"expected {expected}, got {_JSON_KINDS.get(type(data), json.dumps(data))}")


# Values that people write, in a run file or after `--set` --------------------------------------------------------------


def check_fields(value: Any, path: str = "") -> None:
    """Raise Refused for the first field, however deep, of another type than declared, with an infinite number or no Unicode."""
    if not is_dataclass(value) or isinstance(value, type):
        return
    for field, hint in declared_fields(type(value)).items():
        name, content = f"{path}{field}", getattr(value, field)
        if not matches_type(content, hint):
            raise Refused(name, content, f"expected {describe_type(hint, None)}")
        for item in content if isinstance(content, tuple) else (content,):
            check_scalar(name, item)
            check_fields(item, f"{name}.")


def check_scalar(name: str, content: object) -> None:
    """Raise Refused for a number or a text that no file or no library can hold."""
    if isinstance(content, float) and not abs(content) <= LARGEST_FLOAT:
        raise Refused(name, content, "expected a finite number, of a size that float32 can hold")
    if isinstance(content, int) and abs(content) > LARGEST_WHOLE:
        raise Refused(name, f"a number of {content.bit_length()} bits", "expected a whole number of at most 64 bits")
    if isinstance(content, str) and has_surrogate(content):
        raise Refused(name, ascii(content), "it has half of a character (a lone surrogate), which no file can hold")
    if isinstance(content, str) and "\0" in content:
        raise Refused(name, content, "it has the character of number 0, which no name of a file can hold")


def matches_type(value: Any, hint: Any) -> bool:
    """Whether a field of this type takes the value, as far as that can be seen. A whole number is also a number."""
    if matches_exactly(value, hint):
        return True
    return type(value) is int and abs(value) <= LARGEST_WHOLE and matches_exactly(float(value), hint)


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
    """Describe what a field of this type takes, in words for a person; `current` is its value now, as an example."""
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
    if is_dataclass(current):
        return f"a value like {type(current).__name__}(...)"
    name = (origin or hint).__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def is_protocol(hint: Any) -> bool:
    """Whether a type asks for members and not for a class."""
    return bool(getattr(hint, "_is_protocol", False))


def implements(kind: type, protocol: Any) -> bool:
    """Whether a class has the members of a protocol, and its methods as methods."""
    wanted = {name: callable(vars(protocol)[name]) for name in _members(protocol)}
    return all(hasattr(kind, name) and (callable(getattr(kind, name)) or not call) for name, call in wanted.items())


def _members(protocol: Any) -> list[str]:
    names = [name for name in vars(protocol) if not name.startswith("_")]
    return [*names, "__call__"] if "__call__" in vars(protocol) else names
