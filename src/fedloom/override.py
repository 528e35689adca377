"""`--set a.b=c`: a run with single fields replaced, each checked like the original."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import fedloom
from fedloom.errors import Refused
from fedloom.run import Run


def override(run: Run, settings: Sequence[str]) -> Run:
    """The run with each `path=value` applied in order. Raises Refused for an unknown field or a value of a wrong kind.

    A value is a Python literal (`12`, `0.5`, `None`, `(2,4,8)`), a public fedloom name (`linear`), a value made of one
    (`HLoRA(rank=16)`), or, where text is expected, the text as it stands.
    """
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path.strip():
            raise Refused("--set", setting, "write field=value, for instance schedule.cohort_size=5")
        run = _replaced(run, path.strip().split("."), text.strip(), path.strip())
    return run


def _replaced(owner: Any, path: Sequence[str], text: str, whole: str) -> Any:
    name, rest = path[0], path[1:]
    known = [f.name for f in fields(owner) if f.init] if is_dataclass(owner) else []
    if name not in known:
        has = f"{type(owner).__name__} has: {', '.join(known)}" if known else f"{type(owner).__name__} has no fields"
        raise Refused("--set", whole, f"there is no field {name!r}; {has}")
    current, hint = getattr(owner, name), get_type_hints(type(owner))[name]
    value = _replaced(current, rest, text, whole) if rest else _value(text, current, hint, whole)
    return replace(owner, **{name: value})


def _value(text: str, current: object, hint: Any, whole: str) -> object:
    """What `text` stands for; where text is expected and nothing else fits, the text itself."""
    try:
        value = _evaluate(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError) as error:
        if isinstance(error, Refused):
            raise
        if _fits(text, hint):
            return text
        raise Refused(whole, text, f"expected {_words(hint, current)}") from error
    if _fits(value, hint):
        return float(value) if type(value) is int and not _fits_exactly(value, hint) else value
    if _fits(text, hint):
        return text
    raise Refused(whole, text, f"expected {_words(hint, current)}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a field of this type takes the value, as far as that can be seen; a whole number is also a number."""
    return _fits_exactly(value, hint) or (type(value) is int and _fits_exactly(float(value), hint))


def _fits_exactly(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits_exactly(value, one) for one in inner)
    if origin is tuple:
        return type(value) is tuple and all(_fits(item, inner[0]) for item in value)
    if hint in (int, float, bool, str):
        return type(value) is hint
    if hint is type(None):
        return value is None
    if _is_protocol(hint):
        asked = [name for name in vars(hint) if not name.startswith("_")] + ["__call__"] * ("__call__" in vars(hint))
        return not isinstance(value, type | str) and all(hasattr(value, name) for name in asked)
    if origin is Callable:
        return callable(value) and not isinstance(value, type)
    return isinstance(value, origin or hint)


def _words(hint: Any, current: object) -> str:
    """What a field of this type takes, for a person."""
    known = {bool: "True or False", int: "a whole number", float: "a number", str: "text", type(None): "None"}
    origin, inner = get_origin(hint), get_args(hint)
    if hint in known:
        return known[hint]
    if origin in (Union, UnionType):
        return " or ".join(_words(one, current) for one in inner)
    if origin is tuple:
        one = current[0] if isinstance(current, tuple) and current else None
        return {int: "a tuple such as (2, 4, 8)", str: "a tuple such as ('query', 'value')"}.get(
            inner[0], f"a tuple, each item {_words(inner[0], one)}"
        )
    if origin is Callable:
        return f"a function such as {getattr(current, '__name__', 'linear')}"
    return f"a value like {type(current).__name__}(...)" if is_dataclass(current) else f"a {(origin or hint).__name__}"


def _evaluate(node: ast.expr) -> Any:
    """Literals, public names, and calls of them with such arguments: no other code is ever run."""
    if isinstance(node, ast.Name) and node.id in fedloom.__all__:
        return getattr(fedloom, node.id)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        named = {keyword.arg: _evaluate(keyword.value) for keyword in node.keywords if keyword.arg}
        made = _evaluate(node.func)
        if not isinstance(made, type):
            raise Refused("--set", ast.unparse(node), f"{node.func.id} is no kind of value and cannot be called here")
        try:
            return made(*[_evaluate(argument) for argument in node.args], **named)
        except TypeError as error:
            raise Refused("--set", ast.unparse(node), str(error)) from error
    if isinstance(node, ast.Tuple):
        return tuple(_evaluate(item) for item in node.elts)
    return ast.literal_eval(node)


def _is_protocol(hint: Any) -> bool:
    return bool(getattr(hint, "_is_protocol", False))
