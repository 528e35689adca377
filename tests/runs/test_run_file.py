"""Run files, and `--set`: single fields replaced, by values and by nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from fedloom import (
    Clip,
    FixedRank,
    GradientScore,
    Hierarchy,
    HLoRA,
    JointPlan,
    RandomGroups,
    RandomRank,
    Refused,
    Rounds,
    Rows,
    Run,
    Table,
    Tickets,
    linear,
    uniform,
)
from fedloom.core.schema import check_fields
from fedloom.runs.run_file import load_run_file, override

RUN = Run(model="some/model", data=Table(path="a.csv"))
RUN_FILE = "from fedloom import Run, Table\nrun = Run(name='caf\u00e9', model='m', data=Table(path='a.csv'))\n"


def read(run: Any, path: str) -> Any:
    for name in path.split("."):
        run = getattr(run, name)
    return run


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("seed=7", 7),
        ("seed = 7", 7),
        ("model=other/model", "other/model"),
        ("name=12", "12"),
        ("name=linear", "linear"),
        ("test_limit=5", 5),
        ("test_limit=None", None),
        ("held_out=0.5", 0.5),
        ("limits.seconds=60", 60.0),
        ("schedule.cohort_size=5", 5),
        ("schedule.weigh=uniform", uniform),
        ("schedule=Rounds(cohort_size=3, deadline=2.5)", Rounds(3, deadline=2.5)),
        ("training.decay=linear", linear),
        ("training.bucket=False", False),
        ("aggregator=HLoRA(rank=4)", HLoRA(4)),
        ("plan.rank=RandomRank(1, 4)", RandomRank(1, 4)),
        ("plan.rank.ranks=(1,2)", (1, 2)),
        ("lora.target_modules=('query','key')", ("query", "key")),
        ("lora.target_modules=None", None),
        ("data=Tickets(clients=2)", Tickets(2)),
        ("data.text=title+body", "title+body"),
        ("data.text=('title','body')", ("title", "body")),
        ("data.pair=second", "second"),
        ("data.labels={'0':'no','1':'yes'}", {"0": "no", "1": "yes"}),
        ("data.path=b=c.csv", "b=c.csv"),
    ],
)
def test_a_field_is_replaced(setting: str, value: object) -> None:
    found = read(override(RUN, [setting]), setting.partition("=")[0].strip())
    assert found == value
    assert type(found) is type(value)


def test_settings_apply_in_order_and_leave_the_run_alone() -> None:
    changed = override(RUN, ["plan.rank=FixedRank(4)", "plan.rank.rank=2", "seed=1", "seed=2"])
    assert changed.plan.rank == FixedRank(2)
    assert changed.seed == 2
    assert Run(model="some/model", data=Table(path="a.csv")) == RUN


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("seed", "write field=value"),
        ("=3", "write field=value"),
        ("sede=3", "has: model, data"),
        ("schedule.cohort=3", "Rounds has: cohort_size"),
        ("schedule.cohort_size.x=3", "has no fields"),
        ("seed=abc", "expected a whole number"),
        ("seed=None", "expected a whole number"),
        ("seed=1.5", "expected a whole number"),
        ("threads=True", "expected a whole number"),
        ("test_limit='x'", "expected a whole number or None"),
        ("training.bucket=1", "expected True or False"),
        ("training.learning_rate=fast", "expected a number"),
        ("schedule.weigh=5", "expected a function"),
        ("schedule.weigh=HLoRA", "expected a function"),
        ("aggregator=HLoRA", "expected a value like ProductDelta(...)"),
        ("aggregator=Rounds()", "expected a value like ProductDelta(...)"),
        ("aggregator=HLoRA(rnk=3)", "there is no field 'rnk'; did you mean rank? HLoRA has: rank"),
        ("aggregator=HLoRA(3, rank=3)", "HLoRA has: rank"),
        ("schedule=FedFa(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11)", "too many positional arguments; FedFa has: window"),
        ("aggregator=HetLora()", "did you mean HetLoRA"),
        ("aggregator=Momentum(5)", "wrap an aggregator"),
        ("aggregator=Momentum(FedIT)", "wrap an aggregator"),
        ("aggregator=Clip(3)", "wrap an aggregator"),
        ("partition=IID", "expected a value like LabelDirichlet(...)"),
        ("plan=FixedRank(2)", "expected a value like Plan(...)"),
        ("plan.rank.ranks=4", "expected a tuple"),
        ("plan.rank.ranks=('a',)", "expected a tuple"),
        ("world.tiers=(3,)", "Tier"),
        ("schedule.cohort_size=0", "at least 1"),
        ("plan.rank.ranks=(0,)", "at least 1"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(setting: str, told: str) -> None:
    with pytest.raises(Refused) as caught:
        override(RUN, [setting])
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "code",
    ["__import__('os').getcwd()", "prepare(1)", "open('x')", "(lambda: 3)()", "[x for x in (1,)]", "Run.a"],
)
def test_no_code_is_run(code: str) -> None:
    with pytest.raises(Refused):
        override(RUN, [f"aggregator={code}"])


def test_rows_may_be_replaced_by_other_rows() -> None:
    assert override(RUN, ["data=Rows([{'text': 'a', 'label': 'b'}])"]).data == Rows([{"text": "a", "label": "b"}])


@pytest.mark.parametrize(
    "line", ["from fedloom import *", "from fedloom import *\nfrom fedloom import Planned, Scored"]
)
def test_a_run_file_with_earlier_names_of_policies_goes_on_to_be_read(tmp_path: Path, line: str) -> None:
    """`from fedloom import *`, as in the README, brings the names of today; the earlier ones are understood, and told of."""
    file = tmp_path / "old.py"
    file.write_text(f"{line}\nrun = Run('none', Rows([]), hierarchy=Hierarchy(plan=Planned(Scored(rank=4))))\n")
    with pytest.warns(FutureWarning, match="is (JointPlan|GradientScore) now"):
        assert load_run_file(file).hierarchy == Hierarchy(plan=JointPlan(GradientScore(rank=4)))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_run_file_is_in_utf_8_with_or_without_a_mark(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(RUN_FILE, encoding=encoding)
    assert load_run_file(path).name == "caf\u00e9"


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-le"])
def test_a_run_file_in_another_encoding_is_refused_in_one_sentence(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(RUN_FILE, encoding=encoding)
    with pytest.raises(Refused, match=r"^FILE = .*save it again in that encoding$"):
        load_run_file(path)
    if encoding == "cp1252":
        path.write_text(f"# coding: {encoding}\n{RUN_FILE}", encoding=encoding)
        assert load_run_file(path).name == "caf\u00e9", "Python knows which it is"


def _numbers(value: Any, path: str = "") -> Iterator[str]:
    """The paths to the fields of a run that hold a number."""
    for field in fields(value) if is_dataclass(value) else ():
        yield from _numbers(getattr(value, field.name), f"{path}.{field.name}".lstrip("."))
    if type(value) in (int, float):
        yield path


@pytest.mark.parametrize("odd", ["nan", "inf", "-inf", "1e999", "1e300", "-1e300", "1" + "0" * 400, "9" * 5000])
def test_a_number_that_no_file_or_float_can_hold_is_refused_in_every_field(odd: str) -> None:
    run = replace(
        RUN, hierarchy=Hierarchy(RandomGroups(2)), schedule=Rounds(3, deadline=2.5), aggregator=Clip(HLoRA(4), 1.0)
    )
    for path in _numbers(run):
        with pytest.raises(Refused):
            check_fields(override(run, [f"{path}={odd}"]))
