"""Reading tables, hub data sets and rows: what comes out, and one clear sentence for everything that cannot be read."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedloom.core.errors import Refused
from fedloom.data.table import Hub, Rows, Table

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


def test_tsv_keeps_quotation_marks_and_csv_takes_them_off(write: Write) -> None:
    tsv = write("a.tsv", 'text\tlabel\n"Stop, he said\t0\nfine\t1\n"x\t0\ny\t1\n')
    assert '"Stop, he said' in Table(tsv, test=tsv).load(0).train.texts
    assert (
        Table(write("b.tsv", 'text\tlabel\n"a\tb"\t0\nc\t1\n'), quoted=True, test=tsv).load(0).train.texts[0] == "a\tb"
    )
    csv = write("a.csv", 'text,label\n"Stop, he\nsaid",0\nNA,1\n')
    assert Table(csv, test=csv).load(0).train.texts == ("Stop, he\nsaid", "NA")


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
    ("a.xlsx", "x", "use a .csv, .tsv, .jsonl or .parquet file"),
    ("a.csv", "", "the file is empty"),
    ("a.jsonl", "\n\n", "the file is empty"),
    ("a.csv", "text,label\n", "there are no rows"),
    ("a.csv", "text,label\nx,0\ny\nz,1\n", "Expected 2 columns, got 1"),
    ("a.tsv", "text\tlabel\nx\t0\ny\t1\t2\n", "Expected 2 columns, got 3"),
    ("a.csv", "text,text,label\nx,y,0\n", "rename the repeated column in text, text, label"),
    ("a.csv", b"text,label\n\xff\xfe,0\nx,1\n", "cannot be read"),
    ("a.jsonl", '{"text": "x", "label": 0}\n{"text": ', "a line is not JSON"),
    ("a.jsonl", "[1]\n", "row 1 is [1]; give one object of columns per row"),
    ("a.jsonl", b"\xff\xfe\n", "cannot be read"),
    ("a.parquet", b"PAR1 no parquet", "cannot be read"),
    ("a.csv", "title,label\nx,0\n", "a.csv; the columns are title, label"),
    ("a.csv", "text,class\nx,0\n", "data.label = 'label'"),
    ("a.csv", "text,label\nx,0\n ,1\n", "the text in row 2 of "),
    ("a.csv", "text,label\nx,0\ny,\n", "row 2 of "),
    ("a.csv", "text,label\nx,0\ny,0\n", "there is one label only (0)"),
    ("a.jsonl", '{"text": "x", "label": 0}\n{"label": 1}\n', "the value in row 2 of "),
    ("a.jsonl", '{"text": "x", "label": 0}\n{"text": 5, "label": 1}\n', "not text"),
    ("a.jsonl", '{"text": "x", "label": 0.5}\n', "a label is a word or a whole number"),
    ("a.jsonl", '{"text": "x", "label": NaN}\n', "is missing"),
    ("a.jsonl", '{"text": "x", "label": [1]}\n', "a label is a word or a whole number"),
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


def test_a_missing_file_a_folder_and_a_broken_gzip_are_refused(tmp_path: Path, write: Write) -> None:
    with pytest.raises(Refused, match="there is no such file"):
        Table(tmp_path / "none.csv").load(0)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(Refused, match="cannot be read"):
        Table(tmp_path / "folder.csv").load(0)
    whole = gzip.compress(_jsonl().encode())
    flipped = whole[:20] + bytes([whole[20] ^ 255]) + whole[21:]
    for content in (b"no gzip", whole[:-30], whole[:-4] + b"beef", flipped):
        path = tmp_path / "broken.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(Refused, match="cannot be read"):
            Table(path).load(0)


def test_an_unknown_label_names_column_row_value_and_remedy(write: Write) -> None:
    train, test = write("a.csv", "text,y\na,0\nb,1\n"), write("b.csv", "text,y\na,0\nb,7\n")
    with pytest.raises(Refused, match=r"data\.label = 'y': row 2 of .*b\.csv holds '7', known are 0, 1; name all"):
        Table(train, label="y", test=test).load(0)
    with pytest.raises(Refused, match=r"row 2 of .*a\.csv holds '1', known are 0, 2"):
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
