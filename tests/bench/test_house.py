"""The tree keeps what `bench.house` counts: rooms on floors, names that stand once, no private words."""

from __future__ import annotations

import ast

import pytest

from bench import house


@pytest.fixture(scope="module")
def modules() -> dict[str, ast.Module]:
    paths = sorted(house.PACKAGE.rglob("*.py"))
    return {house.name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def test_no_import_goes_up_and_none_in_a_circle(modules: dict[str, ast.Module]) -> None:
    imports = {name: house.imported_by(name, tree, modules.keys()) for name, tree in modules.items()}
    assert list(house.upward(imports)) == []
    assert list(house.circles(imports)) == []


def test_a_public_name_stands_once_and_is_a_word_of_the_field(modules: dict[str, ast.Module]) -> None:
    assert list(house.twice(modules, ast.ClassDef)) == []
    assert list(house.twice(modules, ast.FunctionDef)) == []
    assert list(house.private_words(modules)) == []


def test_a_module_that_one_other_imports_has_a_reason(modules: dict[str, ast.Module]) -> None:
    imports = {name: house.imported_by(name, tree, modules.keys()) for name, tree in modules.items()}
    rows = list(house.one_importer(imports))
    assert [row for row in rows if row.endswith("NO REASON GIVEN")] == []
    assert len(rows) <= 35


def test_a_folder_is_small_enough_to_look_at() -> None:
    assert len({path.name for path in house.PACKAGE.iterdir() if house.is_code(path)}) <= 15
    assert max(len(list(folder.glob("*.py"))) for folder in house.folders()) <= 34
