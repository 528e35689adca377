"""`fedloom inspect`: what it says of tables and of summaries, and that no text leaves a client."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from fedloom.core.errors import Refused
from fedloom.data.file_formats import RawTable
from fedloom.data.table import as_examples, guess_columns
from tests.support.command_line import Fedloom

SHARED = Path(__file__).parents[3] / "shared" / "data"


def table(name: str, rows: Sequence[Mapping[str, object]]) -> Path:
    path = Path(name)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def wards(text: str = "message") -> list[dict[str, object]]:
    """Two clients: one with short texts of one label, one with long texts of the other."""
    short = [{"ward": "north", text: "patient Adamson discharged", "category": "out"}] * 60
    return [*short, *[{"ward": "south", text: "patient Brightwater admitted " * 20, "category": "in"}] * 60]


def test_a_table_is_looked_at_as_its_columns_are_named(fedloom: Fedloom) -> None:
    path = table("wards.jsonl", wards())
    code, said = fedloom("inspect", path, "--clients", "ward", "--column", "text=message")
    assert code == 0
    assert "client from “ward”, text from “message”, label from “category” (guessed)" in said
    assert "2 clients, 120 examples: lengths strongly uneven, sizes even, labels strongly uneven." in said
    assert said.count("0.311") == 2  # H(3/4, 1/4) - 1/2, of lengths and of labels
    assert "CLLoRA reports that uneven lengths hardly touch local training" in said
    assert "not for a forecast" in said
    page = Path("inspect.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 4  # two pictures, each for a wide page and for a narrow one
    assert "Adamson" not in page


def test_clients_tell_counts_and_no_words(fedloom: Fedloom) -> None:
    """Federation: each client writes its own summary; joined, they say what the whole table says."""
    rows = wards()
    _, whole = fedloom("inspect", table("all.jsonl", rows), "--clients", "ward", "--column", "text=message")
    for name, own in (("north", rows[:60]), ("south", rows[60:])):
        code, said = fedloom(
            "inspect", table(f"{name}.jsonl", own), "--column", "text=message", "--client-summary", f"{name}.json"
        )
        assert code == 0
        assert "no text is in it" in said
        told = Path(f"{name}.json").read_bytes().lower()
        assert not any(word in told for word in (b"patient", b"adamson", b"brightwater", b"discharged", b"admitted"))
    code, said = fedloom("inspect", "north.json", "south.json")
    assert code == 0
    assert "lengths strongly uneven, sizes even" in said
    assert said[said.index("Axis") : said.index("Labels")] == whole[whole.index("Axis") : whole.index("Labels")]


def test_noise_is_the_clients_own_secret(fedloom: Fedloom) -> None:
    path = table("north.jsonl", wards()[:60])
    told = []
    for _ in range(2):
        arguments = ("--column", "text=message", "--client-summary", "n.json", "--epsilon", "0.5", "--labels", "in,out")
        code, said = fedloom("inspect", path, *arguments)
        assert code == 0
        assert "with noise of epsilon 0.5" in said
        told.append(Path("n.json").read_text())
    assert told[0] != told[1]
    assert set(json.loads(told[0])["labels"]) == {"in", "out"}


def test_without_clients_it_is_one(fedloom: Fedloom) -> None:
    code, said = fedloom("inspect", table("one.jsonl", [{"text": "a b c"}, {"text": "d"}]))
    assert code == 0
    assert "shown as one client" in said
    assert "shows only where there are several" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("none.csv",), "no such file"),
        (("none.json",), "no such file"),
        (("v.jsonl",), "--column text=NAME"),
        (("w.jsonl", "--column", "message"), "WHAT=NAME"),
        (("w.jsonl", "--column", "words=message"), "one of client, text"),
        (("w.jsonl", "--column", "text=other"), "the columns are ward, message, category"),
        (("w.jsonl", "w.jsonl"), "one table"),
        (("w.jsonl", "--epsilon", "1"), "--client-summary FILE"),
        (("w.jsonl", "--column", "text=message", "--client-summary", "x.csv"), ".json"),
        (("w.jsonl", "--column", "text=message", "--client-summary", "x.json", "--labels", "a"), "without --epsilon"),
        (("mine.toml",), "this is a run file"),
        (("broken.json",), "no summary"),
        (("broken.json", "w.jsonl"), "stand alone"),
    ],
)
def test_a_slip_is_one_sentence(fedloom: Fedloom, arguments: tuple[str, ...], says: str) -> None:
    table("w.jsonl", wards())
    table("v.jsonl", wards("entry"))
    Path("broken.json").write_text("{}")
    code, said = fedloom("inspect", *arguments)
    assert code == 2
    assert says in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("header", "roles"),
    [
        ("idx,label,id1,id2,sentence1,sentence2", {"text": "sentence1", "pair": "sentence2", "label": "label"}),
        ("idx,label,sentence", {"text": "sentence", "label": "label"}),
        (
            "client,instruction,context,response,category",
            {"client": "client", "text": "instruction", "pair": "context", "answer": "response", "label": "category"},
        ),
        (
            "client,split,category,instruction,input,output",
            {"client": "client", "text": "instruction", "pair": "input", "answer": "output", "label": "category"},
        ),
        ("idx,label,title,description", {"text": "title", "pair": "description", "label": "label"}),
        ("question,answer", {"text": "question", "answer": "answer"}),
    ],
)
def test_headers_of_known_tables_are_understood(header: str, roles: dict[str, str]) -> None:
    assert guess_columns(RawTable({name: ["x"] for name in header.split(",")}, "here"), {}) == roles


def test_what_is_missing_is_an_empty_text_but_a_client_is_not() -> None:
    raw = RawTable({"text": ["a", None], "client": [3, 3.0], "label": [str(k) for k in range(2)]}, "here")
    assert as_examples(raw, {"text": "text", "client": "client"})[0].texts == ("a", "")
    with pytest.raises(Refused, match="row 2 of here name no client"):
        as_examples(raw._replace(columns={**raw.columns, "client": [3, None]}), {"text": "text", "client": "client"})
    with pytest.raises(Refused, match="no rows"):
        as_examples(RawTable({"text": []}, "here"), {"text": "text"})
    many = RawTable({"text": ["a"] * 300, "label": [str(k) for k in range(300)]}, "here")
    assert "label" not in guess_columns(many, {})


def ugly(path: Path) -> Path:
    """Semicolons and cp1252, an empty cell, a label in two spellings, a rare one, repeated texts with different labels."""
    lines = [f"klagt über Husten {i % 20};{('Müde', 'müde')[i % 3 == 0]};{('1', '1.0', '2')[i % 3]}" for i in range(60)]
    lines[5], lines[7] = ";Müde;2", "neu;selten;1"
    path.write_bytes("\n".join(["text;label;client", *lines]).encode("cp1252"))
    return path


def test_it_says_what_is_doubtful(fedloom: Fedloom) -> None:
    code, said = fedloom("inspect", ugly(Path("ugly.csv")), "--test", "ugly.csv")
    assert code == 0
    for finding in (
        "separator ';', encoding cp1252",
        "1 of 60 cells of the column “text” (text) are empty: row 6.",
        "1 name is written in more than one way in the column 'client'",
        "3 labels; always answering the commonest, “Müde”, is right for 65.0 %",
        "1 of 3 labels have fewer than 8 examples: “selten”.",
        "“Müde”, “müde”. Is that one label?",
        "38 of 60 texts repeat an earlier one",
        "texts have different labels in different rows",
        "60 of 60 test examples are in the training data",
    ):
        assert finding in said
    assert "Husten" not in said


def test_how_to_read_a_table_can_be_said(fedloom: Fedloom) -> None:
    Path("two.csv").write_text("text;x,label;y\na;b,c;d\ne;f,g;h\n")
    code, said = fedloom("inspect", "two.csv")
    assert code == 2
    assert "--read separator=" in said
    assert fedloom("inspect", "two.csv", "--read", "separator=;")[0] == 0
    assert "--read separator=SIGN" in fedloom("inspect", "two.csv", "--read", "separator=tab")[1]
    for wrong in ("separator", "colour=red", "quoted=perhaps"):
        assert fedloom("inspect", "two.csv", "--read", wrong)[0] == 2


def test_an_array_of_rows_is_a_table_and_no_summary(fedloom: Fedloom) -> None:
    Path("rows.json").write_text(json.dumps([{"instruction": "cat", "output": "dog"}] * 2))
    code, said = fedloom("inspect", "rows.json")
    assert code == 0
    assert "answer from “output”" in said


def test_examples_are_shown_as_the_model_reads_them(fedloom: Fedloom, encoder: Path, decoder: Path) -> None:
    table("l.jsonl", [{"text": "red blue", "label": "a"}, {"text": "blue", "label": "b"}])
    code, said = fedloom("inspect", "l.jsonl", "--show", "1")
    assert code == 2
    assert "--model" in said
    code, said = fedloom("inspect", "l.jsonl", "--model", encoder, "--show", "1")
    assert code == 0
    assert "Quality was not measured: " in said, "an encoder predicts no words"
    assert "[CLS]" in said
    assert "[SEP] -> a" in said
    assert "2. (" not in said
    table("a.jsonl", [{"instruction": "red", "answer": "blue"}])
    _, said = fedloom("inspect", "a.jsonl", "--model", decoder, "--show", "1")
    assert ">>" in said
    assert "</s><<" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mrpc/train.tsv.gz", "One client, 4,076 examples"),
        ("sst2/train.tsv.gz", "One client, 67,349 examples"),
        ("dolly/clients.jsonl.gz", "9 clients, 13,381 examples: lengths mildly uneven"),
        ("natural_instructions/clients.jsonl.gz", "160 clients, 47,840 examples: lengths strongly uneven"),
    ],
)
def test_real_tables(fedloom: Fedloom, name: str, says: str) -> None:
    if not (SHARED / name).is_file():
        pytest.skip("the data are not here")
    code, said = fedloom("inspect", SHARED / name)
    assert code == 0
    assert says in said


@pytest.mark.parametrize("layout", ["messages", "conversations", "dialog"])
def test_conversations_are_looked_at_and_shown(fedloom: Fedloom, decoder: Path, layout: str) -> None:
    talk = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}]
    path = table("c.jsonl", [{layout: talk, "user": k % 2} for k in range(4)] + [{layout: talk[:1], "user": 1}])
    code, said = fedloom("inspect", path, "--test", path)
    assert code == 0
    assert f"text from “{layout}” (guessed), client from “user”" in said
    assert "1 of 5 training rows have no answer" in said
    assert "4 of 4 test examples are in the training data" in said
    assert "test rows" not in said
    assert ">>blue </s><<" in fedloom("inspect", path, "--model", decoder, "--show", "1")[1]


@pytest.mark.parametrize("name", ["train", "examples", "text"])
def test_an_object_that_holds_rows_is_a_table_and_no_summary(fedloom: Fedloom, name: str) -> None:
    rows = [{"text": f"word {k}", "label": "ab"[k % 2]} for k in range(4)]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    Path("rows.json").write_text(json.dumps(columns if name == "text" else {name: rows}), encoding="utf-8-sig")
    code, said = fedloom("inspect", "rows.json")
    assert code == 0
    assert "label from “label”" in said


def test_cells_that_are_no_labels_are_not_printed(fedloom: Fedloom) -> None:
    table("ids.jsonl", [{"text": f"word {k}", "label": f"Adamson {k}"} for k in range(30)])
    code, said = fedloom("inspect", "ids.jsonl", "--test", table("t.jsonl", [{"note": "a"}]))
    assert code == 0
    assert "The column 'label' is not taken for labels: 30 different values in 30 rows" in said
    assert "--column label=COLUMN" in said
    assert "t.jsonl has no column “text”: it is not compared." in said
    assert "Adamson" not in said + Path("inspect.html").read_text(encoding="utf-8")
