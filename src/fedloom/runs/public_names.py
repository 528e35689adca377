"""The names that `import fedloom` offers, each imported from its module when it is first used.

So `import fedloom` and the command line start without torch, which takes seconds. The list is `fedloom/__init__.pyi`. A class
of an aggregator or a schedule need not be listed: it is found in the files of their folders, so that a new method is one file.
"""

from __future__ import annotations

import ast
import gc
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

STUB = Path(__file__).parents[1] / "__init__.pyi"
METHOD_FOLDERS = ("fedloom.aggregate", "fedloom.schedule")
"""Folders with one method per file."""


def _read_stub() -> dict[str, str]:
    imports = [node for node in ast.parse(STUB.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


HOMES = _read_stub()
"""The module of each listed name."""


def public_name(name: str) -> Any:
    """Import a public name, listed or not; an earlier name of a policy is understood, with a warning.

    Raises AttributeError if there is none.
    """
    with collector_paused():
        if name in HOMES:
            return getattr(import_module(HOMES[name]), name)
        for module in _methods() if name[:1].isupper() else ():
            value = getattr(import_module(module), name, None)
            if isinstance(value, type) and value.__module__ == module:
                return value
        renamed: Mapping[str, str] = import_module("fedloom.core.schema").RENAMED
    if name in renamed:
        # a FutureWarning is shown to whoever runs a run file, a DeprecationWarning would not be
        warnings.warn(f"{name} is {renamed[name]} now, and the old name will go", FutureWarning, stacklevel=3)
        return public_name(renamed[name])
    raise AttributeError(f"module 'fedloom' has no attribute {name!r}")


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
