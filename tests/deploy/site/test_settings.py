"""`site.toml`: what it may say, what is said of a slip, and which files it reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedloom.core.errors import Refused
from fedloom.deploy.site.limits import LOOSEST, SiteLimits
from fedloom.deploy.site.settings import Site, read_site
from tests.support.tiny_models import toy_answers, toy_rows

LEAST = 'name = "ward"\nserver = "s:1"\n[model]\npath = "there"\n[table]\npath = "rows.jsonl"\n'


def told(folder: Path, text: str) -> Site:
    (folder / "site.toml").write_text(text, encoding="utf-8")
    return read_site(folder / "site.toml")


def test_the_least_that_a_site_says(tmp_path: Path) -> None:
    site = told(tmp_path, LEAST)
    assert (site.name, site.ca, site.key, site.limits) == ("ward", None, None, SiteLimits())
    assert site.folder == tmp_path / "state"
    assert site.socket == tmp_path / "state" / "worker.sock"


def test_a_region_has_the_limits_that_its_file_names(tmp_path: Path) -> None:
    region = LEAST.partition("[table]")[0].replace("[model]", "region = true\n[model]")
    assert told(tmp_path, region).limits == LOOSEST
    assert told(tmp_path, region + "[limits]\nrank = 4\n").limits == LOOSEST.model_copy(update={"rank": 4})


def test_paths_are_told_from_the_folder_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    site = told(tmp_path, 'ca = "ca.crt"\nkey = "/abs/key"\nfolder = "x/y"\n' + LEAST)
    assert (site.ca, site.key, site.folder) == (tmp_path / "ca.crt", Path("/abs/key"), tmp_path / "x" / "y")
    assert site.model.path == str(tmp_path / "there")
    assert told(tmp_path, LEAST.replace("there", "some/encoder")).model.path == "some/encoder", "a hub's name stays"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name = ", "it is not TOML"),
        (LEAST.replace('name = "ward"\n', ""), "name = '': field required"),
        (LEAST + "colour = 1\n", "table.colour = 1: extra inputs are not permitted; docs/site.md lists all fields"),
        (LEAST + "[limits]\nrank = 0\n", "limits.rank = 0"),
        (LEAST + "[limits]\nrank = 'many'\n", "limits.rank = 'many'"),
        (LEAST + "[limits]\nruns = []\n", "limits.runs"),
        (LEAST + "[limits]\nhours = 'at night'\n", "limits.hours = 'at night'"),
        (LEAST + "[limits]\nhours = '24:59-24:59'\n", "limits.hours = '24:59-24:59'"),
        (LEAST + "[limits]\nmegabytes = inf\n", "limits.megabytes = inf"),
        (LEAST + "[speed]\nflops = inf\n", "speed.flops = inf"),
        (LEAST + "[terms]\naccepted = ['6f0c']\n", "terms.accepted.0 = '6f0c'"),
        (LEAST + "[speed]\nflops = -1\n", "speed.flops = -1"),
        (LEAST + "[instructions]\npath = 'x'\n", r"give either a section \[table\] or a section \[instructions\]"),
        (LEAST.partition("[table]")[0], r"give either a section \[table\] or a section \[instructions\]"),
    ],
)
def test_a_slip_is_told_with_the_field_and_a_remedy(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        told(tmp_path, text)


def test_a_site_reads_a_file_as_a_run_does_and_logs_what_it_leaves_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Semicolons, cp1252, 1 and 1.0, and a row without a label: the same code, the same identity of labels."""
    content = "text;label\nmüde;1.0\nOhne Befund, entlassen;\nÖdem;0\n"
    (tmp_path / "rows.csv").write_text(content, encoding="cp1252")
    asked = 'path = "rows.csv"\nmissing = "drop"'
    with caplog.at_level("INFO", "fedloom"):
        examples = told(tmp_path, LEAST.replace('path = "rows.jsonl"', asked)).examples(("0", "1"))
    assert (examples.texts, examples.labels) == (("müde", "Ödem"), (1, 0))
    assert "rows.csv: separator ';', encoding cp1252." in caplog.messages
    assert any(message.startswith("1 of 3 rows of rows.csv lack a value") for message in caplog.messages)
    given = 'path = "rows.csv"\nseparator = ";"\nencoding = "cp1252"\nquoted = true'
    with pytest.raises(Refused, match=r"1 of the 3 rows of rows\.csv lack a value") as refused:
        told(tmp_path, LEAST.replace('path = "rows.jsonl"', given)).examples(("0", "1"))
    assert not any(word in str(refused.value) + caplog.text for word in ("müde", "Befund", "Ödem"))


def test_rows_come_from_a_database_by_a_query(tmp_path: Path) -> None:
    import duckdb

    with duckdb.connect(str(tmp_path / "ward.duckdb")) as database:
        database.execute("create table notes as select 'note ' || i as note, i % 2 as kind from range(8) t(i)")
    asked = 'path = "ward.duckdb"\nquery = "select note as text, kind as label from notes"'
    examples = told(tmp_path, LEAST.replace('path = "rows.jsonl"', asked)).examples(("0", "1"))
    assert examples.texts == tuple(f"note {i}" for i in range(8))
    assert examples.labels == (0, 1) * 4


def test_the_address_of_a_database_is_no_path(tmp_path: Path) -> None:
    place = "postgresql://ward@db/notes"
    site = told(tmp_path, LEAST.replace("rows.jsonl", place))
    assert site.table is not None
    assert site.table.path == place
    with pytest.raises(Refused, match="a database needs a query"):
        site.examples(("0", "1"))


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    """As editors of Windows write it."""
    path = tmp_path / "site.toml"
    path.write_text(LEAST.replace("ward", "w\u00e4rd"), encoding="utf-8-sig")
    assert read_site(path).name == "w\u00e4rd"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "cp1252"])
def test_settings_in_another_encoding_are_refused_in_one_sentence(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "site.toml"
    path.write_text(f"# caf\u00e9\n{LEAST}", encoding=encoding)
    with pytest.raises(Refused, match=r"^--config = .*(UTF-8|not TOML)"):
        read_site(path)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="cannot be read"):
        read_site(tmp_path / "site.toml")


@pytest.mark.parametrize(
    ("hours", "awake", "asleep"),
    [(None, (0, 12, 23.9), ()), ("20:00-06:00", (20, 23.9, 0, 5.9), (6, 12, 19.9)), ("9:30-17:00", (9.5, 16.9), (9.4, 17)),
     ("00:00-24:00", (0, 23.99), ())],
)  # fmt: skip
def test_a_site_works_at_its_hours(hours: str | None, awake: Any, asleep: Any) -> None:
    limits = SiteLimits(hours=hours)
    assert all(map(limits.awake, awake))
    assert not any(map(limits.awake, asleep))


# Data ----------------------------------------------------------------------------------------------------------------


def labelled(folder: Path, more: str, labels: tuple[str, ...], rows: list[dict[str, Any]] | None = None) -> Any:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows or toy_rows(6))))
    return told(folder, LEAST + more).examples(labels)


def test_all_rows_are_trained_on_in_their_order_under_the_run_s_labels(tmp_path: Path) -> None:
    rows = toy_rows(6)
    for labels in (("pet", "colour"), ("colour", "pet"), ("colour", "other", "pet")):
        examples = labelled(tmp_path, "", labels)
        assert examples.texts == tuple(row["text"] for row in rows)
        assert [examples.names[label] for label in examples.labels] == [row["label"] for row in rows]
        assert examples.names == labels


def test_a_site_may_hold_one_label_only(tmp_path: Path) -> None:
    examples = labelled(tmp_path, "", ("colour", "pet"), [row for row in toy_rows(6) if row["label"] == "pet"])
    assert examples.labels == (1, 1, 1)


def test_values_of_the_data_can_have_other_names_in_the_run(tmp_path: Path) -> None:
    rows = [{"text": f"word {k}", "label": k % 2} for k in range(4)]
    for more in ('labels = ["0", "1"]\n', '[table.labels]\n"1" = "yes"\n"0" = "no"\n'):
        examples = labelled(tmp_path, more, ("no", "yes"), rows)
        assert (examples.names, examples.labels) == (("no", "yes"), (0, 1, 0, 1))


@pytest.mark.parametrize(
    "more", ['labels = ["pet"]\n', 'labels = ["a", "b", "c"]\n', '[table.labels]\npet = "x"\ncolour = "y"\n']
)
def test_labels_that_are_not_the_run_s_are_refused(tmp_path: Path, more: str) -> None:
    with pytest.raises(Refused, match=r"table\.labels.*the labels of the run are colour, pet"):
        labelled(tmp_path, more, ("colour", "pet"))


def test_answers_are_read_and_rows_without_one_left_out(tmp_path: Path) -> None:
    rows = [*toy_answers(4), {"instruction": "say nothing", "answer": ""}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    site = told(tmp_path, LEAST.replace("[table]", "[instructions]"))
    assert site.examples(None).answers == tuple(row["answer"] for row in rows[:4])
    with pytest.raises(Refused, match="these data have answers"):
        site.examples(("a", "b"))


def test_what_is_wrong_with_the_data_is_told_in_the_words_of_the_settings(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("text,a;label,b\nx,0;1,y\n")
    with pytest.raises(
        Refused, match=r"^table\.separator = None: .* rows of data\.csv; say which with table\.separator=','"
    ):
        told(tmp_path, LEAST.replace("rows.jsonl", "data.csv")).examples(("0", "1"))
    with pytest.raises(Refused, match="single quotes"):
        told(tmp_path, LEAST.replace("rows.jsonl", r"C:\Users\x.csv"))
