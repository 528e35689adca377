"""JSON back to frozen dataclasses by their fields and annotations: what is not of the declared kind is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from itertools import repeat
from types import NoneType, UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from torch import Tensor

from fedloom.indexed import IndexedTable
from fedloom.kinds import fits, is_protocol

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
