"""Run files and `--set`: reading a `Run` from a Python file, and replacing single fields of it, each checked like the original."""

from __future__ import annotations

import ast
import difflib
import inspect
import re
import runpy
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from fedloom.core.errors import Refused
from fedloom.core.schema import RENAMED, check_scalar, describe_type, matches_exactly, matches_type
from fedloom.runs.public_names import HOMES, public_name
from fedloom.runs.run import Run


def override(run: Run, settings: Sequence[str]) -> Run:
    """Return the run with each `path=value` applied in order.

    A value is a Python literal (`12`, `0.5`, `None`, `(2,4,8)`), a public fedloom name (`linear`), a value made of one
    (`HLoRA(rank=16)`), or, where text is expected, the text as it stands. Raises Refused for an unknown field or a value of a wrong
    kind.
    """
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path.strip():
            raise Refused("--set", setting, "write field=value, for instance schedule.cohort_size=5")
        run = _replaced(run, path.strip().split("."), text.strip(), path.strip())
    return run


def _replaced(owner: Any, path: Sequence[str], text: str, whole: str) -> Any:
    name, rest = path[0], path[1:]
    names = [f.name for f in fields(owner) if f.init] if is_dataclass(owner) else []
    if name not in names:
        has = f"{type(owner).__name__} has: {', '.join(names)}" if names else f"{type(owner).__name__} has no fields"
        raise Refused("--set", whole, f"there is no field {name!r}; {has}")
    current, hint = getattr(owner, name), get_type_hints(type(owner))[name]
    value = _replaced(current, rest, text, whole) if rest else _value(text, current, hint, whole)
    return replace(owner, **{name: value})


def _value(text: str, current: object, hint: Any, whole: str) -> object:
    """Return the value that `text` is written for; where text is expected and nothing else fits, the text itself."""
    try:
        value = _evaluate(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError) as error:
        if isinstance(error, Refused):
            raise
        if matches_type(text, hint):
            return text
        raise Refused(whole, text, f"expected {describe_type(hint, current)}") from error
    check_scalar(whole, value)  # before a class computes with it
    if matches_type(value, hint):
        return float(value) if type(value) is int and not matches_exactly(value, hint) else value
    if matches_type(text, hint):
        return text
    raise Refused(whole, text, f"expected {describe_type(hint, current)}")


def _evaluate(node: ast.expr) -> Any:
    """Evaluate literals, public names, and calls of them with such arguments. No other code is ever run."""
    if isinstance(node, ast.Name) and _is_public(node.id):
        return public_name(node.id)
    if isinstance(node, ast.Name | ast.Call) and isinstance(name := getattr(node, "func", node), ast.Name):
        _check_name(name.id)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        named = {keyword.arg: _evaluate(keyword.value) for keyword in node.keywords if keyword.arg}
        kind = _evaluate(node.func)
        if not isinstance(kind, type):
            raise Refused("--set", ast.unparse(node), f"{node.func.id} is no kind of value and cannot be called here")
        positional = [_evaluate(argument) for argument in node.args]
        _check_arguments(ast.unparse(node), kind, len(positional), named)
        return kind(*positional, **named)
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


def _check_name(name: str) -> None:
    """Raise Refused for a name that looks like a public one and is none."""
    near = difflib.get_close_matches(name, [*HOMES], 3, 0.7)
    if near and not _is_public(name):
        raise Refused("--set", name, f"there is no such name; did you mean {' or '.join(near)}?")


def _is_public(name: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a name is an older one is told when its value is taken
            public_name(name)
    except AttributeError:
        return False
    return True


def load_run_file(file: Path) -> Run:
    """Execute the file and return its value `run`. Raises Refused if it stops with an error or has no such value."""
    if not file.is_file():
        raise Refused("FILE", str(file), "there is no such file; give a Python file with a value `run = Run(...)`")
    sys.path.insert(0, str(file.parent.resolve()))  # as `python FILE` would
    try:
        value = runpy.run_path(str(file), init_globals=_older_names(file)).get("run")
        value = value() if callable(value) else value
    except (Refused, KeyboardInterrupt):
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, SyntaxError) and re.search("unicode error|null bytes", str(error)):
            raise Refused("FILE", str(file), "it is not a text in UTF-8; save it again in that encoding") from error
        raise Refused("FILE", str(file), f"it stopped with {type(error).__name__}: {error}") from error
    if not isinstance(value, Run):
        raise Refused("FILE", str(file), "it defines no `run`; end it with `run = Run(...)`")
    return value


def _older_names(file: Path) -> dict[str, Any]:
    """Return the policies that a run file calls by an earlier name: `from fedloom import *` brings the names of today only."""
    words = set(re.findall(r"\w+", file.read_text(encoding="utf-8", errors="replace")))
    return {name: public_name(name) for name in RENAMED if name in words}
