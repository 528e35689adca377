"""The names that `import fedloom` offers, each imported from its module when it is first used.

So `import fedloom` and the command line start without torch, which takes seconds. The list is `fedloom/__init__.pyi`. A class
of an aggregator or a schedule need not be listed: it is found in the files of their folders, so that a new method is one file.

Classes of settings get two things on the way, which a docstring alone cannot give: `help` has the meaning of each field at its place,
and a field that does not exist is answered with the nearest one.
"""

from __future__ import annotations

import ast
import functools
import gc
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from importlib import import_module
from inspect import signature
from pathlib import Path
from pkgutil import iter_modules
from textwrap import fill
from typing import Any

from fedloom.core.settings_view import field_texts
from fedloom.core.text import did_you_mean

STUB = Path(__file__).parents[1] / "__init__.pyi"
METHOD_FOLDERS = ("fedloom.aggregate", "fedloom.schedule")
"""Folders with one method per file."""
HELP_WIDTH = 72
"""Characters of a line in which `help` explains a field."""


def _read_stub() -> dict[str, str]:
    imports = [node for node in ast.parse(STUB.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


HOMES = _read_stub()
"""The module of each listed name."""


def public_name(name: str) -> Any:
    """Import a public name, listed or not; an earlier name of a policy is understood, with a warning.

    Raises AttributeError if there is none, with the nearest one.
    """
    with collector_paused():
        if name in HOMES:
            return _explained(getattr(import_module(HOMES[name]), name))
        for module in _methods() if name[:1].isupper() else ():
            value = getattr(import_module(module), name, None)
            if isinstance(value, type) and value.__module__ == module:
                return _explained(value)
        renamed: Mapping[str, str] = import_module("fedloom.core.schema").RENAMED
    if name in renamed:
        # a FutureWarning is shown to whoever runs a run file, a DeprecationWarning would not be
        warnings.warn(f"{name} is {renamed[name]} now, and the old name will go", FutureWarning, stacklevel=3)
        return public_name(renamed[name])
    # a debugger or a notebook asks for names such as `__wrapped__`, and nobody has mistyped them
    near = "" if name.startswith("_") else did_you_mean(name, all_names())
    raise AttributeError(f"module 'fedloom' has no attribute {name!r}{near and f'; {near}'}")


def _explained(value: Any) -> Any:
    """Return a public value; a dataclass has the meaning of its fields for `help`, and knows the nearest one to a mistyped field."""
    if not (isinstance(value, type) and is_dataclass(value)) or hasattr(value.__init__, "__wrapped__"):
        return value
    plain, names = value.__init__, [*signature(value).parameters]

    @functools.wraps(plain)
    def checked(self: Any, *args: Any, **named: Any) -> None:
        for unknown in [name for name in named if name not in names]:
            near = did_you_mean(unknown, names)
            meant = f"{near} " if near else ""
            raise TypeError(f"{type(self).__name__} has no field {unknown!r}; {meant}It has: {', '.join(names)}")
        plain(self, *args, **named)

    value.__init__ = checked  # type: ignore[method-assign]
    if own := vars(value).get("__slots__"):
        texts = field_texts(value)
        # where `help` looks for them
        value.__slots__ = {name: fill(texts.get(name, ""), HELP_WIDTH) for name in own}  # type: ignore[attr-defined]
    return value


@functools.cache
def all_names() -> list[str]:
    """Return the listed names and those of all aggregators and schedules, sorted: what `from fedloom import *` imports."""
    folders = [STUB.parent / folder.rpartition(".")[2] for folder in METHOD_FOLDERS]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for folder in folders for path in folder.glob("*.py")]
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    return sorted({*HOMES, *(one.name for one in classes if one.name[0] != "_" and _has_merge(one))})


def _has_merge(method: ast.ClassDef) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == "merge" for node in method.body)


def _methods() -> Iterator[str]:
    """Modules of aggregators and schedules."""
    for folder in METHOD_FOLDERS:
        yield from (f"{folder}.{module.name}" for module in iter_modules(import_module(folder).__path__))


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause garbage collection inside the block: importing torch and transformers makes a million objects that all stay."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
