"""Public names: one list, imported when used, and methods that need no line in it."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields

import pytest

import fedloom
from fedloom.core.settings_view import field_texts
from fedloom.runs import public_names


def test_a_method_that_is_not_listed_is_found_by_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(public_names.HOMES, "HLoRA")
    monkeypatch.delitem(public_names.HOMES, "FedFa")
    assert fedloom.HLoRA.__module__ == "fedloom.aggregate.hlora"
    assert fedloom.FedFa.__module__ == "fedloom.schedule.fedfa"


@pytest.mark.parametrize("name", ["Task", "Adapter", "hlora", "Merge", ""])
def test_what_is_neither_listed_nor_a_method_is_no_public_name(name: str) -> None:
    with pytest.raises(AttributeError, match="no attribute"):
        public_names.public_name(name)


def test_importing_fedloom_and_completing_its_names_imports_no_torch() -> None:
    code = "import fedloom, sys; dir(fedloom); print(len(fedloom.__all__), 'torch' in sys.modules, fedloom.__version__)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert printed == [str(len(fedloom.__all__)), "False", fedloom.__version__]


def test_completion_offers_the_public_names_and_no_internals() -> None:
    offered = {name for name in dir(fedloom) if not name.startswith("__")}
    assert offered == set(fedloom.__all__)
    assert len(offered) >= 100


@pytest.mark.parametrize("name", ["Run", "HLoRA", "ByClient", "LabelDirichlet", "Training", "Limits"])
def test_a_mistyped_name_is_answered_with_the_nearest_one(name: str) -> None:
    for slip in (name.swapcase(), name[:-1], name[0] + name, name[:1] + name[2:]):
        if slip not in fedloom.__all__:
            with pytest.raises(AttributeError, match=rf"has no attribute '{slip}'; did you mean .*\b{name}\b"):
                getattr(fedloom, slip)


def test_a_field_that_does_not_exist_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(TypeError, match=r"Run has no field 'schedulle'; did you mean schedule\? It has: model, data, "):
        fedloom.Run("m", fedloom.Table("x.csv"), schedulle=1)  # type: ignore[call-arg]
    with pytest.raises(
        TypeError, match=r"Table has no field 'sep'; did you mean separator\? It has: path, test, text, "
    ):
        fedloom.Table("x.csv", sep=";")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"Table has no field 'zzz'; It has: path, "):
        fedloom.Table("x.csv", zzz=";")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="missing"):
        fedloom.Run("m")  # type: ignore[call-arg]


def test_help_has_the_meaning_of_each_field_at_its_place() -> None:
    for kind in (fedloom.Run, fedloom.Limits, fedloom.Plan):
        texts = field_texts(kind)
        for name in [field.name for field in fields(kind)]:
            shown = inspect.getdoc(vars(kind)[name]) or ""
            assert shown.split() == texts[name].split()
            assert max(map(len, shown.splitlines())) <= 72
