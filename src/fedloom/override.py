"""`--set a.b=c`: a run with single fields replaced, each checked like the original."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import fedloom
from fedloom.errors import Refused
from fedloom.run import Run


def override(run: Run, settings: Sequence[str]) -> Run:
    """The run with each `path=value` applied in order. Raises Refused for an unknown field or a value of the wrong kind.

    A value is a Python literal (`12`, `0.5`, `None`, `(2,4,8)`), a public fedloom name or call of one (`HLoRA(rank=16)`,
    `linear`), or, where text is expected, the text as it stands.
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
    current = getattr(owner, name)
    value = _replaced(current, rest, text, whole) if rest else _value(text, current, whole)
    return replace(owner, **{name: value})


def _value(text: str, current: object, whole: str) -> object:
    if isinstance(current, str):
        return text
    try:
        value = _evaluate(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError) as error:
        if isinstance(error, Refused):
            raise
        remedy = f"expected {_kind(current)}: a literal such as 12, None, (2,4,8), or a fedloom name such as HLoRA(rank=16)"
        raise Refused(whole, text, remedy) from error
    if isinstance(current, float) and type(value) is int:
        return float(value)
    if isinstance(current, bool | int | float | tuple) and value is not None and type(value) is not type(current):
        raise Refused(whole, text, f"expected {_kind(current)}, not {_kind(value)}")
    if is_dataclass(current) and not is_dataclass(value):
        raise Refused(whole, text, f"expected a value like {type(current).__name__}(...), not {_kind(value)}")
    return value


def _evaluate(node: ast.expr) -> Any:
    """Literals, public names, and calls of them with such arguments: no other code is ever run."""
    if isinstance(node, ast.Name) and node.id in fedloom.__all__:
        return getattr(fedloom, node.id)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        named = {keyword.arg: _evaluate(keyword.value) for keyword in node.keywords if keyword.arg}
        made = _evaluate(node.func)
        try:
            return made(*[_evaluate(argument) for argument in node.args], **named)
        except TypeError as error:
            raise Refused("--set", ast.unparse(node), str(error)) from error
    if isinstance(node, ast.Tuple):
        return tuple(_evaluate(item) for item in node.elts)
    return ast.literal_eval(node)


def _kind(value: object) -> str:
    words = {bool: "True or False", int: "a whole number", float: "a number", tuple: "a tuple", str: "text"}
    return "None" if value is None else words.get(type(value), type(value).__name__)
