"""Is a value of the kind that a field declares? Asked of what people write, in a file or after `--set`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fedloom.errors import Refused


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
