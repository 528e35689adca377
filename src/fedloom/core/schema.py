"""Is a value of the kind that a field declares? Asked of what people write, in a file or after `--set`."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from itertools import repeat
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from torch import Tensor

from fedloom.core.errors import Refused
from fedloom.core.indexed_dict import IndexedTable


def check(value: Any, path: str = "") -> None:
    """Raise Refused for the first field, however deep, of another kind than declared, or with an infinite number."""
    if not is_dataclass(value) or isinstance(value, type):
        return
    hints = get_type_hints(type(value))
    for field in fields(value):
        name, given = f"{path}{field.name}", getattr(value, field.name)
        if not fits(given, hints[field.name]):
            raise Refused(name, given, f"expected {words(hints[field.name], None)}")
        if isinstance(given, float) and not math.isfinite(given):
            raise Refused(name, given, "expected a finite number")
        for item in given if isinstance(given, tuple) else (given,):
            check(item, f"{name}.")


def fits(value: Any, hint: Any) -> bool:
    """Whether a field of this type takes the value, as far as that can be seen; a whole number is also a number."""
    return fits_exactly(value, hint) or (type(value) is int and fits_exactly(float(value), hint))


def fits_exactly(value: Any, hint: Any) -> bool:
    """Whether it takes the value as it is."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits_exactly(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        return type(value) is tuple and all(fits(item, inner[0]) for item in value)
    if hint in (int, float, bool, str):
        return type(value) is hint
    if hint is type(None):
        return value is None
    if is_protocol(hint):
        asked = [name for name in vars(hint) if not name.startswith("_")] + ["__call__"] * ("__call__" in vars(hint))
        return not isinstance(value, type | str) and all(hasattr(value, name) for name in asked)
    if origin is Callable:
        return callable(value) and not isinstance(value, type)
    return isinstance(value, origin or hint)


def words(hint: Any, current: object) -> str:
    """What a field of this type takes, for a person."""
    known = {bool: "True or False", int: "a whole number", float: "a number", str: "text", type(None): "None"}
    origin, inner = get_origin(hint), get_args(hint)
    if hint in known:
        return known[hint]
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin in (Union, UnionType):
        return " or ".join(words(one, current) for one in inner)
    if origin is tuple:
        one = current[0] if isinstance(current, tuple) and current else None
        return {int: "a tuple such as (2, 4, 8)", str: "a tuple such as ('query', 'value')"}.get(
            inner[0], f"a tuple, each item {words(inner[0], one)}"
        )
    if origin is Callable:
        return f"a function such as {getattr(current, '__name__', 'linear')}"
    return f"a value like {type(current).__name__}(...)" if is_dataclass(current) else f"a {(origin or hint).__name__}"


def is_protocol(hint: Any) -> bool:
    """Whether it asks for members and not for a class."""
    return bool(getattr(hint, "_is_protocol", False))


def plain(value: object) -> object:
    """A value as JSON: dataclasses by their fields under "type", functions by their name, other objects by their type."""
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {"type": type(value).__name__} | {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and value and isinstance(value[0], Mapping):  # rows of data stay where they are
        text = json.dumps(list(value), default=str)
        return {"rows": len(value), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    if isinstance(value, Sequence | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, Callable):  # type: ignore[arg-type]
        return getattr(value, "__name__", type(value).__name__)
    return type(value).__name__


SCALARS = (bool, int, float, str)
UNIONS = (Union, UnionType)
TABLES = (dict, Mapping, IndexedTable)
ROWS = (list, Sequence)
NOT_FINITE = ("nan", "inf", "-inf")
"""How a trace writes what JSON has no number for."""


class Malformed(ValueError):
    """Data that do not say what they should; the text tells why."""


@cache
def declared(kind: Any) -> Mapping[str, Any]:
    """The fields of a dataclass and what they hold."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def reachable(*hints: Any) -> dict[str, type]:
    """The dataclasses by name that values of these kinds are made of. Raises TypeError for a kind that cannot be read back."""
    found, todo = dict[str, type](), list(hints)
    while todo:
        hint = todo.pop()
        origin = get_origin(hint)
        if origin in (*UNIONS, *TABLES, *ROWS, tuple):
            todo += [one for one in get_args(hint) if one is not Ellipsis]
        elif is_dataclass(hint):
            kind = cast(type, hint)
            if found.setdefault(kind.__name__, kind) is not kind:
                raise TypeError(f"there are two kinds of {kind.__name__}")
            todo += [one for one in declared(kind).values() if one not in found.values()]
        elif hint not in (*SCALARS, NoneType, Tensor) and origin is not Literal and not is_protocol(hint):
            raise TypeError(f"{hint} cannot be read back")
    return found


@dataclass(frozen=True, slots=True)
class Reader:
    """`known` are classes, and functions, by the name that stands for them; `refer` finds what a reference stands for."""

    known: Mapping[str, Any]
    refer: Callable[[Mapping[str, Any]], object] | None = None

    def read(self, hint: Any, data: Any) -> Any:
        """The value of this kind that `data` tells. Raises Malformed."""
        origin, inner = get_origin(hint), get_args(hint)
        if origin in UNIONS:
            return self._one_of(inner, data)
        if hint in SCALARS:
            return _scalar(hint, data)
        if origin is Literal and data in inner:
            return data
        if origin is tuple and isinstance(data, list) and (inner[-1] is Ellipsis or len(inner) == len(data)):
            kinds = repeat(inner[0]) if inner[-1] is Ellipsis else inner
            return tuple(self.read(kind, item) for kind, item in zip(kinds, data, strict=False))
        if origin in ROWS and isinstance(data, list):
            return [self.read(inner[0], item) for item in data]
        if origin in TABLES and isinstance(data, dict):
            table = {_key(inner[0], key): self.read(inner[1], item) for key, item in data.items()}
            return IndexedTable(table) if origin is IndexedTable else table
        return self._checked(self.thing(data), hint)

    def thing(self, data: Any) -> object:
        """What is told by its own name or by a reference."""
        if isinstance(data, str) and data in self.known:
            return self.known[data]
        if not isinstance(data, dict):
            raise Malformed(f"{str(data)[:60]!r} names nothing")
        if "type" not in data and self.refer is not None:
            return self.refer(data)
        kind = self.known.get(str(data.get("type")))
        if not isinstance(kind, type) or not is_dataclass(kind):
            raise Malformed(f"there is no kind {data.get('type')!r}")
        asked = declared(kind)
        if data.keys() != {"type", *asked}:
            differ = ", ".join(sorted(data.keys() ^ {"type", *asked}))
            raise Malformed(f"{kind.__name__} has other fields ({differ})")
        return kind(**{name: self.read(hint, data[name]) for name, hint in asked.items()})

    def _one_of(self, kinds: Sequence[Any], data: Any) -> object:
        rest = [kind for kind in kinds if kind is not NoneType]
        if data is None and len(rest) < len(kinds):
            return None
        if len(rest) == 1:
            return self.read(rest[0], data)
        if type(data) in rest:
            return data
        rows = [kind for kind in rest if get_origin(kind) is tuple]
        if isinstance(data, list) and len(rows) == 1:
            return self.read(rows[0], data)
        made = self.thing(data)
        if not any(fits(made, kind) for kind in rest):
            raise Malformed(f"a {type(made).__name__} has no place here")
        return made

    def _checked(self, value: object, hint: Any) -> object:
        if not fits(value, hint):
            raise Malformed(f"a {type(value).__name__} in the place of {getattr(hint, '__name__', hint)}")
        return value


def _scalar(kind: type, data: Any) -> Any:
    if type(data) is kind or (kind is float and type(data) is int):
        return data
    if kind is float and data in NOT_FINITE:
        return float(data)
    raise Malformed(f"{str(data)[:60]!r} is no {kind.__name__}")


def _key(kind: type, text: str) -> Any:
    """JSON's keys are text."""
    if kind is not int:
        return _scalar(kind, text)
    if not text.removeprefix("-").isdecimal():
        raise Malformed(f"{text!r} is no whole number")
    return int(text)
