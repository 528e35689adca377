"""The runs of a grid: every combination, each with a folder that its values name, whatever else is in the grid."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom import IID, FedIT, HLoRA, Refused, Rounds, Rows, Run
from fedloom.runs.run_file import override
from fedloom.runs.sweep.grid import grid_values, plan_file, plan_runs

RUN = Run(model="tiny", data=Rows([{"text": "a", "label": "b"}]))
FILE = """
from fedloom import Rows, Run
run = Run(model="tiny", data=Rows([{"text": "a", "label": "b"}]))
"""


def test_every_combination_is_a_run_the_last_field_fastest(tmp_path: Path) -> None:
    planned = plan_runs(
        RUN, {"aggregator": [HLoRA(rank=4), FedIT], "schedule.cohort_size": [2], "seed": range(2)}, tmp_path
    )
    names = ["aggregator=HLoRA-rank-4,cohort_size=2,seed=0", "aggregator=HLoRA-rank-4,cohort_size=2,seed=1"]
    assert [one.name for one in planned][:2] == names
    assert [one.folder.parent for one in planned] == [tmp_path] * 4
    runs = [one.load() for one in planned]
    assert [(run.aggregator, run.seed) for run in runs][1:3] == [(HLoRA(rank=4), 1), (FedIT(), 0)]
    assert all(run.schedule == Rounds(cohort_size=2) and run.partition == RUN.partition for run in runs)


def test_a_run_keeps_its_folder_when_the_grid_grows(tmp_path: Path) -> None:
    small = plan_runs(RUN, {"aggregator": [HLoRA()], "seed": [0]}, tmp_path)
    large = plan_runs(RUN, {"aggregator": [FedIT(), HLoRA(), HLoRA(rank=4)], "seed": range(3)}, tmp_path)
    assert {one.name: one.load() for one in small}.items() <= {one.name: one.load() for one in large}.items()


IN_A_NAME = st.characters(exclude_categories=["Cs"], exclude_characters="/\0")
"""Letters that the name of a run may have."""


@settings(max_examples=25)
@given(st.lists(st.text(IN_A_NAME, min_size=1, max_size=200), min_size=1, max_size=6, unique=True))
def test_names_are_distinct_and_safe_for_any_texts(texts: list[str]) -> None:
    planned = plan_runs(RUN, {"name": [text + "x" for text in texts]}, Path())
    names = [one.name for one in planned]
    assert len(set(names)) == len(names)
    assert all(
        set(name) <= set("=,.+-_ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789") for name in names
    )
    assert all(name not in (".", "..") and len(name) < 100 for name in names)


def test_texts_of_a_command_line_are_the_values_of_python(tmp_path: Path) -> None:
    file = tmp_path / "run.py"
    file.write_text(FILE)
    texts = grid_values(["aggregator=HLoRA(rank=4),FedIT", "partition=[IID(2), IID(clients=3)]", "seed=range(1, 3)"])
    written = plan_file(file, ["test_limit=7"], texts, tmp_path)
    values: dict[str, list[object]] = {
        "aggregator": [HLoRA(rank=4), FedIT()],
        "partition": [IID(2), IID(3)],
        "seed": [1, 2],
    }
    by_value = plan_runs(override(RUN, ["test_limit=7"]), values, tmp_path)
    assert [repr(one.load()) for one in written] == [repr(one.load()) for one in by_value]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("model=prajjwal1/bert-tiny,other/model-2", ["prajjwal1/bert-tiny", "other/model-2"]),
        ("model='a,b',c", ["'a,b'", "c"]),
        ("plan.rank.ranks=(2,4),(2,8)", ["(2,4)", "(2,8)"]),
        ("seed=7", ["7"]),
        ("test_limit=None,100", ["None", "100"]),
    ],
)
def test_commas_inside_brackets_and_quotes_separate_nothing(text: str, values: list[str]) -> None:
    assert grid_values([text]) == {text.partition("=")[0]: values}


@pytest.mark.parametrize(
    "texts",
    [
        ["seed"],
        ["seed="],
        ["=1"],
        ["seed=1", "seed=2"],
        ["seed=range(x)"],
        ["seed=range(10**9)"],
        ["aggregator=HLoRA(rank=4"],
        ["seed=1]+[2"],
    ],
)
def test_what_is_no_list_of_values_is_refused(texts: list[str]) -> None:
    with pytest.raises(Refused, match="--grid"):
        grid_values(texts)


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({}, "at least one field"),
        ({"seed": []}, "at least one value"),
        ({"seed": range(2000)}, "at most 1,000 runs"),
        ({"shedule.cohort_size": [2]}, "did you mean schedule"),
        ({"seed": ["zero"]}, "seed"),
        ({"aggregator": [3]}, "aggregator"),
        ({"threads": [0]}, "threads"),
    ],
)
def test_a_grid_that_no_run_can_have_is_refused(grid: dict[str, list[object]], words: str) -> None:
    with pytest.raises(Refused, match=words):
        plan_runs(RUN, grid, Path())
