"""Reading tables, hub data sets and rows: what comes out, and one clear sentence for everything that cannot be read."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.tables import write_workbook
from fedloom.core.errors import Refused
from fedloom.data.examples import Examples, Source
from fedloom.data.table import Hub, Rows, Table
from fedloom.runs.run_file import override
from tests.support.storms import one_in, tries
from tests.support.tiny_runs import tiny_run

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
ROWS = [{"text": f"text {i}, with a comma", "label": "yes" if i % 2 else "no", "who": f"u{i % 3}"} for i in range(20)]
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes text or bytes to a file of the given name, gzipped if the name says so."""

    def put(name: str, content: str | bytes) -> Path:
        raw = content.encode() if isinstance(content, str) else content
        path = tmp_path / name
        path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
        return path

    return put


def _delimited(delimiter: str, quote: str) -> str:
    lines = [f"{quote}{row['text']}{quote}{delimiter}{row['label']}{delimiter}{row['who']}" for row in ROWS]
    return "\n".join([delimiter.join(("text", "label", "who")), *lines, ""])


def _jsonl() -> str:
    return "\n".join(json.dumps(row) for row in ROWS)


def _parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return bytes(sink.getvalue())


@pytest.mark.parametrize("zipped", ["", ".gz"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet", ".CSV"])
def test_every_format_gives_the_same_split(write: Write, suffix: str, zipped: str) -> None:
    contents = {".csv": _delimited(",", '"'), ".tsv": _delimited("\t", ""), ".jsonl": _jsonl(), ".parquet": _parquet()}
    path = write(f"rows{suffix}{zipped}", contents[suffix.lower()])
    split = Table(path, client="who").load(3)
    assert split == Rows(ROWS, client="who").load(3)
    assert split.train.names == ("no", "yes")
    assert (len(split.train), len(split.test)) == (16, 4)
    assert split.test.labels.count(0) == split.test.labels.count(1) == 2
    assert set(split.train.texts).isdisjoint(split.test.texts)
    assert split.train.clients is not None
    assert set(split.train.clients) == {"u0", "u1", "u2"}


def test_the_test_share_follows_the_seed() -> None:
    assert Rows(ROWS).load(1) == Rows(ROWS).load(1) != Rows(ROWS).load(2)


def test_a_function_of_rows_can_be_loaded_again() -> None:
    source = Rows(lambda: iter(ROWS))
    assert source.load(1) == source.load(1)


@pytest.mark.parametrize("kind", one_in(3, ["csv", "tsv", "json", "xlsx", "jsonl", "parquet", "feather", "pandas"]))
@tries(100)
@given(
    st.lists(
        st.tuples(
            st.text(st.sampled_from("ab 1é;"), min_size=1, max_size=4).filter(str.strip) | st.integers(0, 99),
            st.sampled_from([1, 2, 10]) | st.sampled_from(["1", "2.0", " 10"]),
            st.sampled_from(["A", "a ", "7", "7.0", 7]),
        ),
        min_size=3,
        max_size=9,
    )
)
def test_what_a_cell_means_does_not_depend_on_the_format(kind: str, rows: list[tuple[Any, ...]]) -> None:
    """The law of the data: whole numbers may be numbers or text, and each format gives the same examples."""
    named = [dict(zip(("text", "label", "ward"), row, strict=True)) for row in rows]
    wanted = outcome(Rows(named, named, client="ward"))
    with TemporaryDirectory() as folder:
        assert outcome(written_as(kind, named, Path(folder))) == wanted


def outcome(source: Source) -> Examples | str:
    """The training examples of a source, or the field that is refused."""
    try:
        return source.load(0).train
    except Refused as error:
        return error.field


def written_as(kind: str, rows: list[dict[str, Any]], folder: Path) -> Source:
    """A source that reads these rows from a file, or a frame, of this kind. Columns of a file of columns are all text."""
    text = [{name: str(value) for name, value in row.items()} for row in rows]
    path = folder / f"rows.{kind}"
    if kind == "pandas":
        frame = pytest.importorskip("pandas").DataFrame(rows)
        return Rows(frame, frame, client="ward")
    if kind == "xlsx":
        path = write_workbook([tuple(row.values()) for row in text], folder).rename(path)
    elif kind in ("parquet", "feather"):
        write_table = pq.write_table if kind == "parquet" else feather.write_feather
        write_table(pa.Table.from_pylist(text), str(path))
    elif kind in ("csv", "tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="," if kind == "csv" else "\t")
            writer.writerows([list(rows[0]), *(row.values() for row in rows)])
    else:
        path.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    return Table(path, path, client="ward")


CANARY = "qzx"
CELL = st.sampled_from(
    [f"{CANARY} a", f"{CANARY}, b", f'"{CANARY}', f"{CANARY}\n", "", " ", "1", "1.0", "0.5", "1e+20"]
)
DAMAGE = st.tuples(st.integers(0, 400), st.sampled_from([b"", b'"', b",", b"\n", b"\xff", b"\x00", b"\x81", b"{"]))


@pytest.mark.parametrize("suffix", one_in(3, ["csv", "tsv", "txt", "jsonl", "json", "parquet", "xlsx"]))
@tries(200)
@given(st.lists(st.tuples(CELL, CELL, CELL), min_size=1, max_size=6), st.lists(DAMAGE, max_size=2), st.booleans())
def test_no_refusal_and_no_note_repeats_a_cell(
    suffix: str, rows: list[tuple[str, str, str]], damage: list[tuple[int, bytes]], dropped: bool
) -> None:
    """Whatever stands in a file and however it is damaged: it is read, or refused in a sentence, and no cell is shown."""
    with TemporaryDirectory() as folder:
        path = damaged_file(suffix, rows, damage, Path(folder))
        try:
            said = "".join(Table(path, path, client="ward", missing="drop" if dropped else "refuse").load(0).notes)
        except Refused as error:
            said = str(error)
    assert CANARY not in said


def damaged_file(suffix: str, rows: list[tuple[str, ...]], damage: list[tuple[int, bytes]], folder: Path) -> Path:
    """A file of rows with some bytes put in."""
    path, names = folder / f"rows.{suffix}", ("text", "label", "ward")
    named = [dict(zip(names, row, strict=True)) for row in rows]
    if suffix == "xlsx":
        path = write_workbook(rows, folder).rename(path)
    elif suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(named), path)
    elif suffix.startswith("json"):
        path.write_text(json.dumps(named) if suffix == "json" else "\n".join(map(json.dumps, named)))
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter="\t" if suffix == "tsv" else ",").writerows([names, *rows])
    content = path.read_bytes()
    for place, extra in damage:
        content = content[:place] + extra + content[place:]
    path.write_bytes(content)
    return path


def test_remedies_can_be_typed_as_they_are_said(write: Write) -> None:
    run = tiny_run("model", data=Table(write("a.csv", "id,score;x\n1,0.5;2\n2,1;2\n3,;1\n"), text="id", label="score"))
    run = override(run, ["data.separator=','", "data.label=score;x", "data.missing=drop", "data.test_share=0.4"])
    assert isinstance(run.data, Table)
    assert (run.data.separator, run.data.missing) == (",", "drop")
    scores = write("b.csv", "text,score\na,0.5\nb,1\nc,0.5\nd,1.0\n")
    run = override(
        tiny_run("model", data=Table(scores)), ["data.label=score", "data.labels=('0.5', '1')", "data.test_share=0.5"]
    )
    assert run.data.load(0).train.names == ("0.5", "1")


@tries(100)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.floats(0.05, 0.5), st.integers(0, 99))
def test_test_rows_are_drawn_within_clients(sizes: list[int], share: float, seed: int) -> None:
    rows = [{"text": f"{k} {i}", "label": i % 2, "who": f"u{k}"} for k, size in enumerate(sizes) for i in range(size)]
    if max(sizes) * share < 1 or sum(sizes) < 9:  # nothing may be left to draw
        return
    split = Rows(rows, client="who", test_share=share).load(seed)
    assert split == Rows(rows, client="who", test_share=share).load(seed)
    train, test = Counter(split.train.clients or ()), Counter(split.test.clients or ())
    assert {name: train[name] + test[name] for name in train | test} == {f"u{k}": n for k, n in enumerate(sizes)}
    assert set(split.train.labels) == {0, 1}
    if max(sizes) > 1 and sum(test[f"u{k}"] for k, n in enumerate(sizes) if n > 1):
        assert all(train[f"u{k}"] for k in range(len(sizes)))
        assert not any(test[f"u{k}"] for k, size in enumerate(sizes) if size == 1)
        assert all(test[f"u{k}"] <= share * size + 1 for k, size in enumerate(sizes))


def test_clients_that_a_choice_leaves_without_examples_are_counted() -> None:
    rows = [{"text": str(i), "label": i % 2, "who": i} for i in range(20)]
    assert Rows(rows, client="who").load(0).notes == (
        "4 client(s) of the data are left without a training example, by the test share or data.limit.",
    )
    assert "16 client(s)" in Rows(rows, rows, client="who", limit=4).load(0).notes[0]
    assert Rows(rows, rows, client="who").load(0).notes == ()


def test_data_that_bring_their_test_rows_are_divided_as_they_say(tmp_path: Path) -> None:
    path = tmp_path / "both.json"
    path.write_text(json.dumps({"train": ROWS, "test": ROWS[:3]}))
    assert Table(path).load(0) == Rows({"train": ROWS, "test": ROWS[:3]}).load(0) == Rows(ROWS, ROWS[:3]).load(0)


def test_labels_of_classes_are_given_by_name_or_by_number() -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    for labels, names in ((None, ("neg", "pos")), (("pos", "neg"), ("pos", "neg")), ({"0": "x", "1": "y"}, ("x", "y"))):
        train = Rows(data, data, labels=labels).load(0).train
        assert (train.names, train.names[train.labels[0]]) == (names, {"neg": "pos", "pos": "pos", "x": "y"}[names[0]])


def test_a_label_that_is_named_twice_is_refused() -> None:
    with pytest.raises(Refused, match=r"data\.labels = '1': it is named twice"):
        Rows(ROWS, ROWS, labels={"1": "yes", "1.0": "no"}).load(0)


def test_tsv_keeps_quotation_marks_and_csv_takes_them_off(write: Write) -> None:
    tsv = write("a.tsv", 'text\tlabel\n"Stop, he said\t0\nfine\t1\n"x\t0\ny\t1\n')
    assert '"Stop, he said' in Table(tsv, test=tsv).load(0).train.texts
    enclosed = write("b.tsv", 'text\tlabel\n"a\tb"\t0\nc\t1\n')
    assert Table(enclosed, test=enclosed, quoted=True).load(0).train.texts[0] == "a\tb"
    assert Table(enclosed, test=enclosed).load(0).notes == ("b.tsv: quotation marks enclose cells.",)
    quoted = write("a.csv", 'text,label\n"Stop, he\nsaid",0\nNA,1\n')
    assert Table(quoted, test=quoted).load(0).train.texts == ("Stop, he\nsaid", "NA")


def test_joined_columns_and_other_names_in_the_test_file(write: Write) -> None:
    train = write("a.csv", "text,label\nx,0\ny,1\n")
    test = write("b.csv", "title,description,label\nT,D,1\n,E,0\n")
    assert Table(train, test=test, test_text="title+description").load(0).test.texts == ("T. D", "E")
    assert Table(train, test=test, test_text=("title", "description")).load(0).test.texts == ("T. D", "E")


def test_pairs_are_read_beside_the_texts(write: Write) -> None:
    path = write("a.csv", "a,b,label\nx,X,0\ny,Y,1\n")
    assert Table(path, text="a", pair="b", test=path).load(0).train.pairs == ("X", "Y")


@pytest.mark.parametrize(
    ("labels", "names", "first"),
    [
        (None, ("2", "10"), 1),
        (("10", "2"), ("10", "2"), 0),
        ({"2": "bad", "10": "good"}, ("bad", "good"), 1),
    ],
)
def test_label_maps(labels: Any, names: tuple[str, ...], first: int) -> None:
    rows: list[dict[str, object]] = [{"text": "x", "label": 10}, {"text": "y", "label": 2.0}]
    train = Rows(rows, rows, labels=labels).load(0).train
    assert train.names == names
    assert train.labels[0] == first


def test_a_limit_keeps_a_random_part_of_the_training_examples() -> None:
    split = Rows(ROWS, ROWS, limit=7).load(0)
    assert (len(split.train), len(split.test)) == (7, 20)
    assert split.train != Rows(ROWS, ROWS, limit=7).load(1).train


BAD_FILES = [
    ("a.csv", "text,label\n", "there are no rows"),
    ("a.csv", "title,label\nx,0\n", "a.csv; the columns are title, label"),
    ("a.csv", "text,class\nx,0\n", "data.label = 'label'"),
    ("a.csv", "x,0\ny,1\nz,0\n", "its first row looks like data"),
    ("a.csv", "text,label\nx,0\n ,1\n", "1 of the 2 rows of a.csv lack a value (text is empty in row 2)"),
    ("a.csv", "text,label\nx,0\ny,\n", "1 of the 2 rows of a.csv lack a value (label is empty in row 2)"),
    ("a.csv", "text,label\nx,0\ny,0\n", "all rows have the same label"),
    ("a.jsonl", '{"text": "x", "label": 0}\n{"label": 1}\n', "1 of the 2 rows of a.jsonl lack a value (text"),
    (
        "a.jsonl",
        '{"text": "x", "label": 0}\n{"text": [5], "label": 1}\n',
        "row 2 of a.jsonl: a value of type list, not text",
    ),
    ("a.jsonl", '{"text": "x", "label": 0.5}\n', "a label is a word or a whole number"),
    ("a.jsonl", '{"text": "x", "label": NaN}\n', "lack a value (label is empty in row 1)"),
    ("a.jsonl", '{"text": "x", "label": [1]}\n', "not a word or a number"),
    ("a.csv", "text,label\nx,0\ny,1\n", "too few of the 2 examples"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_a_file_that_cannot_be_used_is_refused_in_one_sentence(
    write: Write, name: str, content: str | bytes, message: str
) -> None:
    path = write(name, content)
    with pytest.raises(Refused) as refused:
        Table(path).load(0)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_unknown_labels_are_counted_and_not_shown(write: Write) -> None:
    train, test = write("a.csv", "text,y\na,0\nb,1\n"), write("b.csv", "text,y\na,0\nb,7\nc,7\n")
    with pytest.raises(
        Refused, match=r"data\.label = 'y': rows 2 and 3 of b\.csv: none of the 2 known labels; name all"
    ):
        Table(train, label="y", test=test).load(0)
    with pytest.raises(Refused, match=r"row 2 of a\.csv: none of the 2 known labels"):
        Table(train, label="y", labels=("0", "2")).load(0)


def test_a_missing_column_is_named_in_rows_too() -> None:
    with pytest.raises(
        Refused, match=r"data\.client = 'whom': no such column in the rows; the columns are text, label"
    ):
        Rows(ROWS, client="whom").load(0)


def test_test_data_need_not_name_clients(write: Write) -> None:
    train, test = write("a.csv", "text,label,who\na,0,u\nb,1,v\n"), write("b.csv", "text,label\nc,0\nd,1\n")
    split = Table(train, client="who", test=test).load(0)
    assert (split.train.clients, split.test.clients) == (("u", "v"), None)
    assert Table(train, client="who", test=train).load(0).test.clients == ("u", "v")
    with pytest.raises(Refused, match=r"data\.client = 'who': no such column in .*b\.csv"):
        Table(test, client="who", test=train).load(0)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(Refused, match=r'data\.missing = \'skip\': choose "refuse" or "drop"'):
        Rows(ROWS, missing="skip")  # type: ignore[arg-type]
    for share in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(Refused, match="test_share"):
            Table("a.csv", test_share=share)
    with pytest.raises(Refused, match="limit"):
        Rows([], limit=0)


class TestHub:
    """The hub itself stays out of the tests: `datasets.load_dataset` is replaced."""

    def test_splits_and_the_names_of_class_labels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        datasets = pytest.importorskip("datasets")
        features = datasets.Features({"s": datasets.Value("string"), "y": datasets.ClassLabel(names=["neg", "pos"])})
        asked = []

        def fetch(name: str, config: str | None, split: str) -> Any:
            asked.append((name, config, split))
            return datasets.Dataset.from_dict({"s": ["a", "b"], "y": [1, 0]}, features=features)

        monkeypatch.setattr(datasets, "load_dataset", fetch)
        split = Hub("glue", "sst2", test="validation", text="s", label="y").load(0)
        assert asked == [("glue", "sst2", "train"), ("glue", "sst2", "validation")]
        assert (split.train.names, split.train.labels) == (("neg", "pos"), (1, 0))

    def test_no_network_and_unknown_names_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        datasets = pytest.importorskip("datasets")

        def fetch(*_: Any, **__: Any) -> Any:
            raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub\nand more")

        monkeypatch.setattr(datasets, "load_dataset", fetch)
        with pytest.raises(Refused, match=r"data\.name = 'nobody/nothing': cannot load split 'train' \(Couldn't reach"):
            Hub("nobody/nothing").load(0)


SHARED_TABLES = [
    ("sst2/dev.tsv.gz", {"text": "sentence"}, 872),
    ("rte/dev.tsv.gz", {"text": "sentence1", "pair": "sentence2"}, 277),
    ("mrpc/test.tsv.gz", {"text": "sentence1", "pair": "sentence2"}, 1725),
    (
        "agnews/test.tsv.gz",
        {"text": "title+description", "labels": {"0": "World", "1": "Sports", "2": "B", "3": "S"}},
        7600,
    ),
    ("dolly/clients.jsonl.gz", {"text": "instruction+context", "label": "category", "client": "client"}, 13381),
]


@pytest.mark.parametrize(("name", "layout", "rows"), SHARED_TABLES)
def test_real_tables(name: str, layout: dict[str, Any], rows: int) -> None:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"the real data set {path} is not on this machine")
    split = Table(path, **layout).load(0)
    assert len(split.train) + len(split.test) == rows
    assert abs(len(split.test) / rows - 0.2) < 0.01


def test_ag_news_with_a_test_file_of_other_columns() -> None:
    folder = SHARED / "agnews"
    if not folder.exists():
        pytest.skip(f"the real data set {folder} is not on this machine")
    split = Table(folder / "train_part.tsv.gz", test=folder / "test.tsv.gz", test_text="title+description").load(0)
    assert (len(split.train), len(split.test), split.train.names) == (4991, 7600, ("0", "1", "2", "3"))


def test_test_rows_may_have_the_numbers_of_the_classes() -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    data = datasets.Dataset.from_dict({"text": list("abcd"), "label": [1, 0, 1, 0]}, features=features)
    test = Rows(data, test=[{"text": "e", "label": 1}, {"text": "f", "label": "neg"}]).load(0).test
    assert (test.names, test.labels) == (("neg", "pos"), (1, 0))
    with pytest.raises(Refused, match="row 1 of the test rows"):
        Rows(data, test=[{"text": "e", "label": 2}]).load(0)
