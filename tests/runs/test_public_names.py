"""Public names: one list, imported when used, and methods that need no line in it."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fedloom
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


def test_importing_fedloom_imports_no_torch() -> None:
    code = "import fedloom, sys; print(len(fedloom.__all__), 'torch' in sys.modules, fedloom.__version__)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert printed == [str(len(fedloom.__all__)), "False", fedloom.__version__]
