"""Public names are found in their modules, and policies also by an earlier name."""

from __future__ import annotations

from pathlib import Path

import pytest

import fedloom
from fedloom import Hierarchy, JointPlan, LossRate, Run, Tickets
from fedloom.core.schema import RENAMED
from fedloom.runs.public_names import HOMES, public_name
from fedloom.runs.run_file import load_run_file, override


@pytest.mark.parametrize("name", sorted(HOMES))
def test_a_listed_name_is_where_the_list_says(name: str) -> None:
    assert getattr(fedloom, name) is public_name(name)


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_earlier_name_is_understood_with_a_warning(old: str, new: str) -> None:
    with pytest.warns(FutureWarning, match=f"{old} is {new} now") as warned:
        assert getattr(fedloom, old) is getattr(fedloom, new)
    assert warned[0].filename == __file__, "it points to the line that has to be changed"
    assert old not in fedloom.__all__


def test_a_run_file_with_earlier_names_is_read(tmp_path: Path) -> None:
    file = tmp_path / "old.py"
    file.write_text(
        "from fedloom import Earned, Hierarchy, Planned, Run, Tickets\n"
        "run = Run('model', Tickets(), hierarchy=Hierarchy(plan=Planned(Earned())))\n"
    )
    with pytest.warns(FutureWarning) as warned:
        run = load_run_file(file)
    assert {str(one.message).partition(",")[0] for one in warned} == {
        "Earned is LossRate now",
        "Planned is JointPlan now",
    }
    assert run == Run("model", Tickets(), hierarchy=Hierarchy(plan=JointPlan(LossRate())))


def test_a_setting_with_earlier_names_is_read() -> None:
    run = Run("model", Tickets(), hierarchy=Hierarchy())
    with pytest.warns(FutureWarning):
        changed = override(run, ["hierarchy.plan=Planned(Earned())"])
    assert changed.hierarchy == Hierarchy(plan=JointPlan(LossRate()))
