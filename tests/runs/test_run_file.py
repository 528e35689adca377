"""Run files, and `--set`: single fields replaced, by values and by nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from fedloom import (
    IID,
    ByQuality,
    Clip,
    FedIT,
    FixedRank,
    GradientScore,
    Hierarchy,
    HLoRA,
    JointPlan,
    Momentum,
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
        ("aggregator=HLoRA", HLoRA()),
        ("aggregator=Momentum(FedIT)", Momentum(FedIT())),
        ("schedule.weigh=ByQuality", ByQuality()),
        ("partition=IID", IID()),
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
        ("sede=3", "there is no field 'sede'; did you mean seed? Run has: model, data"),
        ("schedule.cohortsize=3", "did you mean cohort_size? Rounds has: cohort_size"),
        ("hierarchy.rounds=3", "switched off"),
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
        ("schedule.weigh=linear", "expected a function such as by_examples"),
        ("training.decay=noised", "expected a function such as constant"),
        ("aggregator=Rounds", "expected a value like ProductDelta(...): one of ACE, Adam"),
        ("aggregator=Rounds()", "expected a value like ProductDelta(...)"),
        ("aggregator=nothing_like_it", "one of ACE, Adam"),
        ("aggregator=Hlora(rank=16)", "did you mean HLoRA?"),
        ("partition=ByCluent", "did you mean ByClient?"),
        ("data=Table", "missing its field 'path'"),
        ("plan.rank=FixedRank('a')", "plan.rank.rank = 'a': expected a whole number"),
        (f"aggregator={'(' * 5000}", "(((..."),
        ("aggregator=HLoRA(rnk=3)", "there is no field 'rnk'; did you mean rank? HLoRA has: rank"),
        ("aggregator=HLoRA(3, rank=3)", "HLoRA has: rank"),
        ("schedule=FedFa(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11)", "too many positional arguments; FedFa has: window"),
        ("aggregator=HetLora()", "did you mean HetLoRA"),
        ("aggregator=Momentum(5)", "aggregator.inner = 5: expected a value like FedIT(...)"),
        ("aggregator=Clip(3)", "aggregator.inner = 3: expected a value like FedIT(...)"),
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


HEAD = "from fedloom import *\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"{HEAD}\nrun = Run('m', Table('x'), partition=Iid())", "line 3: NameError: name 'Iid' is not defined; did you mean IID?"),
        ("from fedloom import HLora", "line 1: ImportError: cannot import name 'HLora' from 'fedloom'; did you mean HLoRA?"),
        ("import fedloom\nfedloom.HLora", "line 2: AttributeError: module 'fedloom' has no attribute 'HLora'; did you mean HLoRA?"),
        ("run = Run('m', 'x')", "line 1: NameError: name 'Run' is not defined; begin the file with `from fedloom import *`"),
        (f"{HEAD}run = Run('m', Table('x'), schedulle=3)", "line 2: TypeError: Run has no field 'schedulle'; did you mean schedule?"),
        (f"{HEAD}def ratio():\n    return 1 / 0\nrun = ratio()", "line 3: ZeroDivisionError: division by zero"),
        (f"{HEAD}def run():\n    return Run('m', Table('x'), seed=seeed)", "line 3: NameError: name 'seeed' is not defined"),
        (f"{HEAD}run = Run('m', Table('x'), partition=IID(0))", "choose a whole number of at least 1 (mine.py, line 2)"),
        ("run = (\n", "line 1: SyntaxError: '(' was never closed"),
        ("raise SystemExit(3)", "line 1: SystemExit: 3"),
        (f"{HEAD}run = [Run('m', Table('x'))]", "its `run` is a list of 1, and a run file holds one Run"),
        (f"{HEAD}run = 3", "its `run` is no Run but of type int"),
        (f"{HEAD}mine = Run('m', Table('x'))", "it defines no `run`; mine is a Run: call it run"),
        (HEAD, "it defines no `run`; end it with `run = Run(...)`"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_python_file_is_told_with_its_line(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(Refused) as caught:
        load_run_file(path)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "told"),
    [("a.yaml", "not YAML"), ("a.ipynb", "fedloom.run"), ("a.json", "not JSON"), ("a.CSV", "fedloom init")],
)
def test_a_file_of_another_kind_is_never_executed(tmp_path: Path, name: str, told: str) -> None:
    path = tmp_path / name
    path.write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\n{RUN_FILE}")
    with pytest.raises(Refused, match=told):
        load_run_file(path)
    assert not (tmp_path / "trace").exists()


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
