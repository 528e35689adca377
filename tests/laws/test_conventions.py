"""What ruff and import-linter cannot check: the length of files, sources of methods, and the list of public names."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import fedloom
import fedloom.aggregate
import fedloom.schedule
from tests.support import toys

ROOT = Path(fedloom.__file__).parent
MAX_LINES = 500
FOLDERS = (fedloom.aggregate, fedloom.schedule)


def test_a_file_has_at_most_500_lines() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in ROOT.rglob("*.py")}
    assert {str(path.relative_to(ROOT)): count for path, count in lines.items() if count > MAX_LINES} == {}


@pytest.mark.parametrize(
    "cls", [cls for folder in FOLDERS for cls in toys.classes(folder, ("merge",))], ids=lambda cls: cls.__name__
)
def test_a_method_cites_its_source(cls: type) -> None:
    """The module of an aggregator or schedule names the paper and its year."""
    text = sys.modules[cls.__module__].__doc__ or ""
    assert "Source:" in text
    assert any(str(year) in text for year in range(2016, 2030))


def test_the_public_names_are_sorted_and_can_be_imported() -> None:
    assert fedloom.__all__ == sorted(set(fedloom.__all__))
    for name in fedloom.__all__:
        thing = getattr(fedloom, name)
        assert getattr(thing, "__name__", name) == name
        assert thing.__doc__
    with pytest.raises(AttributeError, match="nonsense"):
        fedloom.nonsense  # noqa: B018


def test_every_aggregator_and_schedule_is_public() -> None:
    found = toys.classes(fedloom.aggregate, toys.AGGREGATOR) + toys.classes(fedloom.schedule, toys.SCHEDULE)
    assert all(getattr(fedloom, cls.__name__) is cls and cls.__name__ in fedloom.__all__ for cls in found)
