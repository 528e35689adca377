"""Run files that are written for tables: what they hold is found, and the run divides it."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from bench.tables import FILES, ROWS, Write, rows_of
from fedloom import IID, ByClient, FixedDepth, Instructions, LabelDirichlet, Refused, Run, Table
from fedloom.data.delimited import FOUND, FileFormat
from fedloom.data.examples import Split
from fedloom.deploy.site.export_sites import needed_limits, site_template
from fedloom.deploy.site.settings import read_site
from fedloom.runs.run_template import ModelChoice, TableFacts, examine_table, run_file_text, site_fields
from fedloom.runs.toml_run import parse_run

SLOW = {"saved data set"}


def written(facts: TableFacts, sites: bool = False, top_blocks: int | None = None) -> Run:
    return parse_run(run_file_text(facts, "mine", ModelChoice("m", 1e-3, top_blocks), sites, ["Heading"]))


def table(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def labelled(count: int, **more: Any) -> list[dict[str, Any]]:
    return [
        {"message": f"text {k}", "category": "ab"[k % 2], **{n: f(k) for n, f in more.items()}} for k in range(count)
    ]


@pytest.mark.parametrize(
    ("name", "write"), [pytest.param(*one, marks=[pytest.mark.slow] if one[0] in SLOW else []) for one in FILES.items()]
)
def test_the_run_file_of_an_ugly_table_has_all_its_rows_and_a_part_for_each_client(
    name: str, write: Write, tmp_path: Path
) -> None:
    facts = examine_table(str(write(ROWS, tmp_path)), {}, FOUND)
    run = written(facts)
    split = run.data.load(run.seed)
    assert sorted(rows_of(split) + rows_of(Split(split.test, split.train))) == sorted(ROWS)
    assert {*run.partition.split(split.train, run.seed)} == {"7", "12"}
    assert isinstance(run.data, Instructions if name == "ShareGPT" else Table)
    assert facts.gaps == (3 if name == "missing cells" else 0)


def test_what_the_data_do_not_have_is_made_up(tmp_path: Path) -> None:
    few, many = (written(examine_table(table(tmp_path, labelled(size)), {}, FOUND)).partition for size in (20, 400))
    assert few == IID(2)
    assert many == LabelDirichlet(8, alpha=1.0)
    owned = table(tmp_path, labelled(60, ward=lambda k: k % 3))
    assert written(examine_table(owned, {}, FOUND)).partition == ByClient()
    single = table(tmp_path, labelled(60, user_id=str))  # whoever wrote one text is no client
    assert written(examine_table(single, {}, FOUND)).partition == IID(2)
    assert written(examine_table(single, {"client": "user_id"}, FOUND)).partition == ByClient()


def test_the_task_follows_from_the_columns_unless_it_is_given(tmp_path: Path) -> None:
    asked = [{"question": f"q{k}", "context": "", "answer": f"a{k}", "topic": "xy"[k % 2]} for k in range(60)]
    path = table(tmp_path, asked)
    labels = examine_table(path, {}, FOUND)
    assert (labels.writes, labels.settings["label"], labels.rows) == (False, "topic", 60)
    assert "pair" not in labels.settings, "a second text that is often empty would cost rows"
    answers = examine_table(path, {}, FOUND, writes=True)
    assert answers.settings["instruction"] == "question"
    assert answers.settings["kind"] == "topic"
    assert answers.gaps == 0, "a request needs no context"
    assert written(answers).data.load(0).train.answers
    assert written(answers, top_blocks=2).plan.depth == FixedDepth(2)
    for writes, lacking, told in ((True, "answer", "fedloom init classify"), (False, "topic", "fedloom init instruct")):
        path = table(tmp_path, [{name: cell for name, cell in row.items() if name != lacking} for row in asked])
        with pytest.raises(Refused, match=told):
            examine_table(path, {}, FOUND, writes)


def test_columns_without_telling_names_are_guessed_by_what_they_hold_if_only_one_fits(tmp_path: Path) -> None:
    notes = [{"Nr": k, "Befund": f"Der Patient klagt über Husten, {k}. Tag", "Kode": "ab"[k % 2]} for k in range(60)]
    facts = examine_table(table(tmp_path, notes), {}, FOUND)
    assert facts.guessed == {"text": "Befund", "label": "Kode"}
    several = [{**row, "Brief": row["Befund"][::-1]} for row in notes]
    with pytest.raises(Refused, match="no column is known to be the text"):
        examine_table(table(tmp_path, several), {}, FOUND)
    assert examine_table(table(tmp_path, several), {"text": "Brief"}, FOUND).guessed == {"label": "Kode"}
    coded = [{**row, "Ort": "xyz"[row["Nr"] % 3]} for row in notes]
    with pytest.raises(Refused, match="no column is known to be the label"):
        examine_table(table(tmp_path, coded), {}, FOUND)


def test_a_way_of_reading_that_is_given_is_in_the_file(tmp_path: Path) -> None:
    lines = ["text;label", *(f"a, b {k};{k % 2}" for k in range(60))]
    (tmp_path / "a.csv").write_text("\n".join(lines), encoding="utf-16")
    facts = examine_table(str(tmp_path / "a.csv"), {}, FileFormat(separator=";", encoding="utf-16"))
    assert written(facts).data == Table(
        str(tmp_path / "a.csv"), separator=";", encoding="utf-16", test_share=0.2, text="text", label="label"
    )


def test_names_of_a_file_and_of_columns_stay_names(tmp_path: Path) -> None:
    """Whoever wrote the table cannot add a line to the run file, or to the settings of a site."""
    odd = 'text\n[data]\nquery = \'x\'"""\x7f\\\N{GRINNING FACE}'
    facts = examine_table(
        table(tmp_path, [{odd: f"text {k}", "label": "ab"[k % 2]} for k in range(40)]), {"text": odd}, FOUND
    )
    text = run_file_text(facts, odd, ModelChoice(odd, 1e-3, None), False, [f"Run file for {odd}"])
    run = parse_run(text)
    assert isinstance(run.data, Table)
    assert (run.name, run.model, run.data.text, run.data.query) == (odd, odd, odd, None)
    (tmp_path / "site.toml").write_text(site_template(run, facts.split.train, site_fields(facts)), encoding="utf-8")
    settings = tomllib.loads((tmp_path / "site.toml").read_text(encoding="utf-8"))
    assert (settings["model"]["name"], settings["table"]["text"]) == (odd, odd)


def test_a_table_that_no_run_can_use_is_refused(tmp_path: Path) -> None:
    path = table(tmp_path, [{"text": f"t{k}", "label": "one"} for k in range(30)])
    with pytest.raises(Refused, match="all rows have the same label"):
        examine_table(path, {}, FOUND)


@pytest.mark.parametrize("writes", [False, True])
def test_sites_of_a_deployment_need_no_looser_limits_than_the_default(tmp_path: Path, writes: bool) -> None:
    rows = [{"instruction": f"q{k}", "answer": f"a{k}"} for k in range(600)] if writes else labelled(600)
    facts = examine_table(table(tmp_path, rows), {}, FOUND)
    run = written(facts, sites=True)
    labels = None if writes else facts.split.train.names
    assert needed_limits(run, 600, labels) == {}
    (tmp_path / "site.toml").write_text(site_template(run, facts.split.train, site_fields(facts)))
    site = read_site(tmp_path / "site.toml")
    data = site.instructions if writes else site.table
    assert data is not None
    assert data.path == str(tmp_path / "my-table.csv")
    assert site.model.name == run.model
