"""`--set a.b=c`: a run with single fields replaced, each checked like the original."""

from __future__ import annotations

import ast
import difflib
import inspect
import runpy
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import fedloom
from fedloom.core.errors import Refused
from fedloom.core.schema import matches_type, matches_exactly, describe_type
from fedloom.runs.run import Run

METHODS = ("fedloom.aggregate.", "fedloom.schedule.")
"""Folders whose classes may be named without being listed."""


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
        if matches_type(text, hint):
            return text
        raise Refused(whole, text, f"expected {describe_type(hint, current)}") from error
    if matches_type(value, hint):
        return float(value) if type(value) is int and not matches_exactly(value, hint) else value
    if matches_type(text, hint):
        return text
    raise Refused(whole, text, f"expected {describe_type(hint, current)}")


def _evaluate(node: ast.expr) -> Any:
    """Literals, public names, and calls of them with such arguments: no other code is ever run."""
    if isinstance(node, ast.Name) and _is_public(node.id):
        return getattr(fedloom, node.id)
    if isinstance(node, ast.Name | ast.Call) and isinstance(name := getattr(node, "func", node), ast.Name):
        _known(name.id)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        named = {keyword.arg: _evaluate(keyword.value) for keyword in node.keywords if keyword.arg}
        made = _evaluate(node.func)
        if not isinstance(made, type):
            raise Refused("--set", ast.unparse(node), f"{node.func.id} is no kind of value and cannot be called here")
        given = [_evaluate(argument) for argument in node.args]
        _check_arguments(ast.unparse(node), made, len(given), named)
        return made(*given, **named)
    if isinstance(node, ast.Tuple):
        return tuple(_evaluate(item) for item in node.elts)
    return ast.literal_eval(node)


def _check_arguments(text: str, kind: type, count: int, named: Iterable[str]) -> None:
    """Raise Refused where `kind` cannot be made of `count` values in order and these named ones."""
    signature = inspect.signature(kind)
    has = f"{kind.__name__} has: {', '.join(signature.parameters)}"
    for name in named:
        if name not in signature.parameters:
            near = difflib.get_close_matches(name, [*signature.parameters], 1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise Refused("--set", text, f"there is no field {name!r}; {meant}{has}")
    try:
        signature.bind(*[None] * count, **dict.fromkeys(named))
    except TypeError as error:  # too many values, one field twice, or one missing
        raise Refused("--set", text, f"{error}; {has}") from error


def _known(name: str) -> None:
    """Raise Refused for a name that looks like one of ours and is none."""
    near = difflib.get_close_matches(name, [*fedloom.__all__], 3, 0.7)
    if near and not _is_public(name):
        raise Refused("--set", name, f"there is no such name; did you mean {' or '.join(near)}?")


def _is_public(name: str) -> bool:
    """A name of the package's list, or of a class in a folder of methods, which need not be listed."""
    found = None if name in fedloom.__all__ else getattr(fedloom, name, None)
    return name in fedloom.__all__ or getattr(found, "__module__", "").startswith(METHODS)


def load_run_file(file: Path) -> Run:
    """The value `run` of the file, which is executed. Raises Refused if it stops or has none."""
    if not file.is_file():
        raise Refused("FILE", str(file), "there is no such file; give a Python file with a value `run = Run(...)`")
    sys.path.insert(0, str(file.parent.resolve()))  # as `python FILE` would
    try:
        value = runpy.run_path(str(file)).get("run")
        value = value() if callable(value) else value
    except (Refused, KeyboardInterrupt):
        raise
    except (Exception, SystemExit) as error:
        raise Refused("FILE", str(file), f"it stopped with {type(error).__name__}: {error}") from error
    if not isinstance(value, Run):
        raise Refused("FILE", str(file), "it defines no `run`; end it with `run = Run(...)`")
    return value
