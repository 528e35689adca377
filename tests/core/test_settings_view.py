"""Settings as people read them: what is not default, what a field means, and no datum of anybody."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any
from xml.etree import ElementTree

import pytest

import fedloom
from fedloom import ByClient, FedBuff, HLoRA, Instructions, Limits, Plan, RankByData, Rows, Run, Table, linear
from fedloom.core.settings_view import as_written, changed_fields, field_texts, settings_html, settings_text
from fedloom.runs.public_names import all_names, public_name

CANARY = "Adamson was discharged"
ROWS = [{"text": CANARY, "label": "out"}] * 9
SET = Run(
    "models/encoder",
    Table("notes.csv", text=("title", "body"), labels={"0": "in", "1": "out"}),
    aggregator=HLoRA(rank=16),
    schedule=FedBuff(buffer_size=3),
    plan=Plan(RankByData(rank_max=6), local_steps=3),
    training=fedloom.Training(learning_rate=1e-3, decay=linear),
    limits=Limits(versions=7),
    transfer=None,
    seed=3,
)


@pytest.mark.parametrize("value", [SET, SET.data, SET.plan, HLoRA(), Limits(), ByClient(smallest=2)])
def test_what_is_written_gives_the_value_again(value: Any) -> None:
    names = {name: public_name(name) for name in all_names()}
    assert eval(as_written(value), names) == value
    assert eval(repr(SET), names) == SET


@pytest.mark.parametrize("name", [f.name for f in fields(Run) if f.name not in ("model", "data")])
def test_a_field_is_shown_if_and_only_if_it_is_not_as_by_default(name: str) -> None:
    plain = Run("m", Table("notes.csv"))
    assert changed_fields(plain).keys() == {"model", "data"}
    given = name in changed_fields(SET)
    assert given == (getattr(SET, name) != getattr(plain, name))
    above, _, below = str(SET).partition("By default:")
    assert (f"\n  {name} " in above, f"{name}=" in " ".join(below.split())) == (given, not given)


@pytest.mark.parametrize(
    "data",
    [
        Rows(ROWS),
        Rows({"text": [CANARY] * 9, "label": ["out"] * 9}),
        Rows(lambda: ROWS),
        Instructions([{"instruction": CANARY, "answer": CANARY}] * 9),
    ],
)
def test_no_way_to_show_a_run_shows_its_data(data: Any) -> None:
    run = Run("m", data)
    for shown in (repr(run), str(run), settings_html(run), repr(data), as_written((data, [CANARY]))):
        assert CANARY not in shown
    assert "of 9>" in repr(run) or "lambda" in repr(run) or "of 2>" in repr(run)


def test_a_table_in_the_terminal_fits_and_that_of_a_notebook_is_well_formed_whatever_the_values_are() -> None:
    run = replace(SET, name="<script>&", start="&amp;" * 40)
    assert all(len(line) <= 80 for line in settings_text(replace(SET, model="m")).splitlines())
    tree = ElementTree.fromstring(f"<div>{settings_html(run)}</div>")
    assert not tree.findall(".//script")
    titles = {row.findtext("th"): row.find("th").get("title") for row in tree.iter("tr")}  # type: ignore[union-attr]
    assert titles == {name: field_texts(Run)[name] for name in changed_fields(run)}


@pytest.mark.parametrize("name", all_names())
def test_each_field_of_a_public_class_says_what_it_is(name: str) -> None:
    value = public_name(name)
    if isinstance(value, type) and is_dataclass(value):
        texts = field_texts(value)
        assert [one.name for one in fields(value) if one.init and not texts.get(one.name)] == []


def test_the_text_of_a_field_may_take_several_lines_stand_for_several_fields_and_come_from_a_base() -> None:
    @dataclass
    class Base:
        """A base.

        Fields:
            up, down: both
                of them.

        Behind: nothing.
        """

        up: int
        down: int

    @dataclass
    class Own(Base):
        """Own.

        Fields, besides those of `Base`:
            down: its own: with a colon.
            more: a third.
        """

        more: int
        silent: int

    assert field_texts(Own) == {"up": "both of them.", "down": "its own: with a colon.", "more": "a third."}
