"""Order in the house: sizes, docstrings, sources, public names. An exception is listed with its reason."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import fedloom
import fedloom.aggregate
import fedloom.schedule
from tests.support import toys

ROOT = Path(fedloom.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MAX_LINES, MAX_BODY, MAX_ARGUMENTS = 300, 40, 8
EXCEPTIONS = {
    "types.py": "the words of the whole system, read as one page",
}
BARE = {
    "data/examples.py": "Source says what its one method does",
    "data/load.py": "load() as Source says",
    "data/partition.py": "Partition says what its one method, split(), does",
    "report/facts.py": "figures of a report, named by what they are",
}
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def definitions(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, Definition]]:
    """Every class and function with its dotted name; what is local to a function is left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Definition):
            name = f"{inside}{node.name}"
            yield name, node
            if isinstance(node, ast.ClassDef):
                yield from definitions(node, f"{name}.")
        elif isinstance(node, ast.If | ast.Try):
            yield from definitions(node, inside)


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the body without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


@every_file
def test_a_file_fits_in_the_head(path: Path) -> None:
    if str(path.relative_to(ROOT)) not in EXCEPTIONS:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_exceptions_are_needed() -> None:
    for name in EXCEPTIONS:
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) > MAX_LINES, name
    for name in BARE:
        assert bare(ROOT / name), name


@every_file
def test_functions_are_short_and_take_few_arguments(path: Path) -> None:
    for name, node in definitions(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            continue
        assert body_lines(node) <= MAX_BODY, name
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        assert len([a for a in arguments if a.arg not in ("self", "cls")]) <= MAX_ARGUMENTS, name


def bare(path: Path) -> list[str]:
    """Public classes, methods and functions without a docstring."""
    every = definitions(ast.parse(path.read_text(encoding="utf-8")))
    public = [(name, node) for name, node in every if not any(part.startswith("_") for part in name.split("."))]
    return [name for name, node in public if not ast.get_docstring(node)]


@every_file
def test_what_is_public_is_documented(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert bare(path) == [] or str(path.relative_to(ROOT)) in BARE


@pytest.mark.parametrize(
    "cls",
    toys.classes(fedloom.aggregate, ("merge",)) + toys.classes(fedloom.schedule, ("merge",)),
    ids=lambda cls: cls.__name__,
)
def test_a_method_cites_its_source(cls: type) -> None:
    (module,) = (
        m
        for folder in (fedloom.aggregate, fedloom.schedule)
        for m in toys.modules(folder)
        if m.__name__ == cls.__module__
    )
    assert "Source:" in (module.__doc__ or "")
    assert any(year in (module.__doc__ or "") for year in map(str, range(2016, 2030)))


@pytest.mark.parametrize("folder", [fedloom.aggregate, fedloom.schedule], ids=lambda folder: folder.__name__)
def test_methods_do_not_know_each_other(folder: ModuleType) -> None:
    """A wrapper may name the method that it wraps by default; nobody else imports a method."""
    found = toys.classes(folder, ("merge",))
    methods = {cls.__module__ for cls in found}
    for cls in found:
        tree = ast.parse(Path(sys.modules[cls.__module__].__file__ or "").read_text(encoding="utf-8"))
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)} & methods
        assert imported <= {type(cls().inner).__module__ if hasattr(cls(), "inner") else ""}, cls


def in_ruff_order(name: str) -> tuple[int, str]:
    """CONSTANTS, then Classes, then functions."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


def test_the_public_names_are_sorted_and_can_be_imported() -> None:
    assert fedloom.__all__ == sorted(set(fedloom.__all__), key=in_ruff_order)
    for name in fedloom.__all__:
        thing = getattr(fedloom, name)
        assert getattr(thing, "__name__", name) == name
        assert thing.__doc__
    with pytest.raises(AttributeError, match="nonsense"):
        fedloom.nonsense  # noqa: B018


def test_the_names_that_type_checkers_see_are_the_public_ones() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    (guarded,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name for node in ast.walk(guarded) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == set(fedloom.__all__)


def test_every_aggregator_and_schedule_is_public() -> None:
    found = toys.classes(fedloom.aggregate, toys.AGGREGATOR) + toys.classes(fedloom.schedule, toys.SCHEDULE)
    assert all(getattr(fedloom, cls.__name__) is cls and cls.__name__ in fedloom.__all__ for cls in found)
