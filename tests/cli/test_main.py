"""The command line: what it says, what it leaves behind, and one sentence for every mistake."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.cli import console, main
from fedloom.runs.resume import CheckpointWriter
from tests.support.same_bytes import COMPARED
from tests.support.small_disk import crowd, small_disk


@dataclass(frozen=True)
class Said:
    code: int | str | None
    out: str
    err: str


Fedloom = Callable[..., Said]


@pytest.fixture
def fedloom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fedloom:
    """The command, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["fedloom", *map(str, arguments)])
        monkeypatch.setattr(console.out, "width", 200)
        monkeypatch.setattr(console.err, "width", 200)
        with pytest.raises(SystemExit) as stop:
            main.main()
        said = capsys.readouterr()
        return Said(stop.value.code, said.out, said.err)

    return call


def run_file(text: str, encoder: Path, name: str = "mine.py") -> Path:
    head = (
        f"from fedloom import *\nfrom tests.support.tiny_models import tiny_run, toy_rows\nmodel = {str(encoder)!r}\n"
    )
    path = Path(name)
    path.write_text(head + text, encoding="utf-8")
    return path


def one_sentence(said: Said, *parts: str) -> None:
    assert said.code == 2
    assert said.out == ""
    assert said.err.startswith("fedloom: ")
    assert said.err.count("\n") == 1
    assert "Traceback" not in said.err
    for part in parts:
        assert part in said.err


CSV = "text,label\nthe cat,pet\nred,colour\n"

BAD_RUNS = {
    "missing column": (
        "run = tiny_run(model, data=Rows(toy_rows(20), text='title'))",
        ("data.text = 'title'", "no such column", "text, label"),
    ),
    "clients too small": (
        "rows = [dict(r, who='b' if i == 9 else 'a') for i, r in enumerate(toy_rows(40))]\n"
        "run = tiny_run(model, data=Rows(rows, test=rows[:9], client='who'), partition=ByClient(smallest=50))",
        ("partition.smallest = 50", "the largest has 39"),
    ),
    "client without a name": (
        "rows = [dict(r, who=' ' if i == 9 else 'a') for i, r in enumerate(toy_rows(40))]\n"
        "run = tiny_run(model, data=Rows(rows, test=rows[:9], client='who'), partition=ByClient())",
        ("data.client = 'who'", "who is empty in row 10"),
    ),
    "too many clients": ("run = tiny_run(model, partition=IID(10**4))", ("partition.clients = 10000", "at most")),
    "unknown target module": (
        "run = tiny_run(model, lora=LoRA(target_modules=('qurey',)))",
        ("lora.target_modules = 'qurey'", "key, query, value"),
    ),
    "rank 0": ("run = tiny_run(model, plan=Plan(FixedRank(0)))", ("plan.rank.rank = 0", "at least 1")),
    "rank too high": ("run = tiny_run(model, plan=Plan(FixedRank(33)))", ("plan.rank = 33", "at most 32")),
    "unseen label": (
        "run = tiny_run(model, data=Rows(toy_rows(40), test=[{'text': 'a', 'label': 'car'}]))",
        ("data.label = 'label'", "row 1 of the test rows", "none of the 2 known labels", "name all in data.labels"),
    ),
    "corrupt file": ("run = tiny_run(model, data=Table('corrupt.parquet'))", ("data.path = 'corrupt.parquet'",)),
    "corrupt archive": ("run = tiny_run(model, data=Table('corrupt.csv.gz'))", ("data.path = 'corrupt.csv.gz'",)),
    "missing file": ("run = tiny_run(model, data=Table('none.csv'))", ("data.path = 'none.csv'", "no such file")),
    "corrupt model": ("run = tiny_run('broken')", ("model = 'broken'", "transformers cannot load it")),
    "missing model": ("run = tiny_run('./no/model')", ("model = './no/model'", "no such folder")),
    "contradiction of ranks": (
        "run = tiny_run(model, plan=Plan(RandomRank(low=8, high=2)))",
        ("plan.rank.high = 2", "at least plan.rank.low, which is 8"),
    ),
    "over-selection": (
        "run = tiny_run(model, schedule=Rounds(over_selection=0.5))",
        ("schedule.over_selection = 0.5", "1.0 starts just the cohort"),
    ),
    "no run": ("walk = 1", ("FILE = ", "no `run`")),
    "run is no Run": ("run = 3", ("FILE = ", "`run`")),
    "a file that raises": ("raise KeyError('x')", ("FILE = ", "KeyError")),
    "a function that raises": ("def run():\n    raise KeyError('x')", ("FILE = ", "KeyError")),
    "a file that exits": ("raise SystemExit(0)", ("FILE = ", "SystemExit")),
    "a file that is no Python": ("run = = 1", ("FILE = ", "SyntaxError")),
}


def test_a_slip_in_who_trains_is_told_before_anything_is_loaded(fedloom: Fedloom) -> None:
    one_sentence(fedloom("run", "no-such-file.py", "--workers", "two"), "workers = 'two'", "a number from 1, or ray")


@pytest.mark.slow
def test_a_run_with_processes_says_so(fedloom: Fedloom, encoder: Path) -> None:
    said = fedloom("run", run_file("run = tiny_run(model)", encoder), "--workers", 2, "--out", "here")
    assert said.code == 0
    assert json.loads(Path("here/manifest.json").read_text())["workers"] == "2"


@pytest.mark.parametrize("mistake", BAD_RUNS)
def test_a_mistake_in_a_run_file_is_one_sentence_and_leaves_nothing(
    fedloom: Fedloom, encoder: Path, mistake: str
) -> None:
    Path("corrupt.parquet").write_bytes(b"PAR1 but no more")
    Path("corrupt.csv.gz").write_bytes(b"\x1f\x8bjunk")
    shutil.copytree(encoder, "broken")
    Path("broken", "model.safetensors").write_bytes(b"junk" * 9)
    text, parts = BAD_RUNS[mistake]
    path = run_file(text, encoder)
    before = sorted(Path.cwd().rglob("*"))
    one_sentence(fedloom("run", path, "--out", "out"), *parts)
    assert sorted(p for p in Path.cwd().rglob("*") if "__pycache__" not in p.parts) == before


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--set", "schedule.cohort=3"), ("--set = 'schedule.cohort'", "Rounds has: cohort_size")),
        (("--set", "seed"), ("--set = 'seed'", "field=value")),
        (("--set", "seed=x"), ("seed = 'x'", "a whole number")),
        (("--set", "aggregator=FixedRank(2)"), ("aggregator = 'FixedRank(2)'", "ProductDelta")),
        (("--set", "schedule.over_selection=0.5"), ("schedule.over_selection = 0.5",)),
        (("--seed", "x"), ("--seed",)),
        (("--nonsense",), ("--nonsense",)),
    ],
)
def test_a_mistake_in_an_option_is_one_sentence(
    fedloom: Fedloom, encoder: Path, arguments: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    path = run_file("run = tiny_run(model)", encoder)
    one_sentence(fedloom("run", path, "--out", "out", *arguments), *parts)
    assert not Path("out").exists()


def test_a_missing_run_file_is_one_sentence(fedloom: Fedloom) -> None:
    one_sentence(fedloom("run", "none.py"), "FILE = 'none.py'", "no such file")


def test_an_unknown_command_is_one_sentence(fedloom: Fedloom) -> None:
    one_sentence(fedloom("fly"), "fly")


def test_an_existing_out_is_never_written_to(fedloom: Fedloom, encoder: Path) -> None:
    path = run_file("run = tiny_run(model)", encoder)
    Path("out").mkdir()
    Path("out", "mine").write_text("x")
    one_sentence(fedloom("run", path, "--out", "out"), "--out = 'out'", "exists already")
    assert [p.name for p in Path("out").iterdir()] == ["mine"]


@pytest.mark.parametrize("command", [(), ("demo",), ("run",), ("report",), ("export",), ("replay",)])
def test_every_command_explains_itself(fedloom: Fedloom, command: tuple[str, ...]) -> None:
    said = fedloom(*command, "--help")
    assert said.code == 0
    assert "Usage" in said.out


def test_a_run_file_is_carried_out_with_its_fields_replaced(fedloom: Fedloom, encoder: Path) -> None:
    path = run_file("run = tiny_run(model, name='mine')", encoder)
    said = fedloom("run", path, "--set", "limits.versions=1", "--set", "aggregator=HLoRA()", "--seed", "9")
    assert said.code == 0, said.err
    about = json.loads(Path("runs/mine-001/manifest.json").read_text(encoding="utf-8"))
    assert (about["seed"], about["run"]["limits"]["versions"], about["run"]["aggregator"]["type"]) == (9, 1, "HLoRA")
    assert "runs/mine-001/report.html" in said.out
    assert "Traceback" not in said.err


def test_a_run_may_be_a_function(fedloom: Fedloom, encoder: Path) -> None:
    path = run_file("def run():\n    return tiny_run(model, limits=Limits(versions=1))", encoder)
    assert fedloom("run", path, "--out", "out").code == 0


def test_ctrl_c_is_said_in_one_sentence(fedloom: Fedloom, encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedloom.runs.job.Job.score", interrupted)
    said = fedloom("run", run_file("run = tiny_run(model)", encoder), "--out", "out")
    assert said.code == 130
    assert said.err.endswith("fedloom: interrupted. Saved to out; continue with: fedloom run mine.py --resume out\n")
    assert "Traceback" not in said.err
    assert json.loads(Path("out/manifest.json").read_text(encoding="utf-8"))["status"] == "interrupted"


def test_an_interrupted_run_says_how_to_go_on_and_does(
    fedloom: Fedloom, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the last checkpoint, with a bar that begins there, and refused once it is finished."""
    path = run_file("run = tiny_run(model)", encoder)
    options = ("--set", "limits.versions=2", "--keep-updates", "--no-report")
    assert fedloom("run", path, *options, "--out", "alone").code == 0
    with monkeypatch.context() as patched:
        patched.setattr(CheckpointWriter, "__call__", CheckpointWriter.write)  # half a minute is long
        patched.setattr("fedloom.runs.progress.progress_observer", lambda *_: _interrupting)
        said = fedloom("run", path, *options, "--out", "my runs/out")
    assert said.code == 130
    command = f"fedloom run mine.py {' '.join(options)} --resume 'my runs/out'"
    assert f"Saved to my runs/out; continue with: {command}\n" in said.err
    said = fedloom(*shlex.split(command)[1:])
    assert said.code == 0, said.err
    assert "Resumed  at version 1" in said.out
    for name in COMPARED:
        assert Path("my runs/out", name).read_bytes() == Path("alone", name).read_bytes(), name
    one_sentence(
        fedloom(*shlex.split(command)[1:]), "--resume = 'my runs/out'", "its run is finished (2 versions made)"
    )
    one_sentence(fedloom("run", path, "--resume", "alone", "--out", "x"), "--out = 'x'", "give --resume alone")
    one_sentence(fedloom("run", path, "--resume", "nowhere"), "run folder = 'nowhere'")


@pytest.mark.slow
def test_a_finished_run_is_made_longer_and_another_begins_from_its_adapter(fedloom: Fedloom, encoder: Path) -> None:
    """The latest one of its name, or the one that is named."""
    path = run_file("run = tiny_run(model)", encoder)
    short, plain = ("--set", "limits.versions=1"), "--no-report"
    assert fedloom("run", path, "--set", "limits.versions=3", plain, "--out", "alone").code == 0
    one_sentence(fedloom("run", path, *short, "--more", "2"), "--more = 2", "there is no run run-001 in runs/")
    assert fedloom("run", path, *short, plain).code == 0
    said = fedloom("run", path, *short, plain, "--more", "2")
    assert said.code == 0, said.err
    assert "Resumed " in said.out
    for name in ("trace.jsonl", "metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert Path("runs/run-001", name).read_bytes() == Path("alone", name).read_bytes(), name
    one_sentence(
        fedloom("run", path, *short, "--more", "2", "--out", "x"), "--out = 'x'", "continues in its own folder"
    )
    said = fedloom("run", path, *short, plain, "--set", "start=runs/run-001", "--out", "next")
    assert said.code == 0, said.err
    assert "version 0 is this adapter" in " ".join(said.out.split())


def _interrupting(now: float, event: object, commands: list[Any]) -> None:
    if any(type(command).__name__ == "Publish" and command.version == 2 for command in commands):
        raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs")
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_when_there_is_room(
    fedloom: Fedloom, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is full; the kernel says so."""
    path = run_file("run = tiny_run(model)", encoder)
    options = ("--set", "limits.versions=3", "--keep-updates", "--no-report")
    assert fedloom("run", path, *options, "--out", "alone").code == 0
    with small_disk(Path("disk"), 4), monkeypatch.context() as patched:
        patched.setattr(CheckpointWriter, "__call__", CheckpointWriter.write)
        patched.setattr("fedloom.runs.progress.progress_observer", lambda *_: _filling)
        said = fedloom("run", path, *options, "--out", "disk/out")
        assert said.code == 2
        assert "Traceback" not in said.err
        command = f"fedloom run mine.py {' '.join(options)} --resume disk/out"
        assert said.err.endswith(f"could not be written. Make room. Saved to disk/out; continue with: {command}\n")
        assert re.search(r"\nfedloom: the disk is full: disk/out/\S+ could not be written", said.err)
        assert not list(Path("disk/out").glob("*.draft*"))
        Path("disk/ballast").unlink()
        patched.undo()
        said = fedloom(*shlex.split(command)[1:])
        assert said.code == 0, said.err
        for name in COMPARED:
            assert Path("disk/out", name).read_bytes() == Path("alone", name).read_bytes(), name


def _filling(now: float, event: object, commands: list[Any]) -> None:
    if any(type(command).__name__ == "Publish" and command.version == 2 for command in commands):
        crowd(Path("disk"), 0)


def test_a_recorded_run_is_replayed_and_a_changed_line_is_found(fedloom: Fedloom, encoder: Path) -> None:
    path = run_file("run = tiny_run(model, limits=Limits(versions=1))", encoder)
    assert fedloom("run", path, "--out", "out", "--keep-updates", "--no-report").code == 0
    events = Path("out/trace.jsonl").read_bytes().count(b"\n")
    for place in ("out", "out/trace.jsonl"):
        said = fedloom("replay", place)
        assert (said.code, said.out) == (0, f"{events} events gave the same bytes\n"), said.err
    text = Path("out/trace.jsonl").read_text(encoding="utf-8")
    Path("out/trace.jsonl").write_text(text.replace('"Publish","version":1', '"Publish","version":7'), encoding="utf-8")
    said = fedloom("replay", "out")
    assert said.code == 1
    assert "commands[0].version: 7 there, 1 here" in said.out
    assert fedloom("run", path, "--out", "bare", "--no-report").code == 0
    one_sentence(fedloom("replay", "bare"), "replay = 'bare'", "fedloom run FILE --keep-updates")
    one_sentence(fedloom("replay", "nowhere"), "replay = 'nowhere'")


def test_a_rollback_without_answers_or_without_a_wish_is_a_sentence(fedloom: Fedloom) -> None:
    Path("bare").mkdir()
    one_sentence(fedloom("rollback", "bare"), "rollback = 'bare'", "exactly one of --to VERSION, --without SITE")
    one_sentence(fedloom("rollback", "bare", "--to", "1"), "replay = 'bare'", "no trace.jsonl")


@pytest.mark.slow
def test_report_writes_one_page_for_one_run_and_a_comparison_for_two(fedloom: Fedloom, finished: Path) -> None:
    one, two = shutil.copytree(finished, "one"), shutil.copytree(finished, "two")
    Path("one/report.html").unlink()
    said = fedloom("report", one)
    assert said.code == 0
    assert "finished" in Path("one/report.html").read_text(encoding="utf-8")
    assert "finished" in said.out
    said = fedloom("report", one, two)
    assert said.code == 0
    assert "2 runs compared" in Path("report.html").read_text(encoding="utf-8")
    one_sentence(fedloom("report", one, two), "--out = 'report.html'", "name another file")
    assert fedloom("report", one, two, "--out", "other.html").code == 0


def test_report_of_what_is_no_run_is_one_sentence(fedloom: Fedloom) -> None:
    one_sentence(fedloom("report", "nowhere"), "run folder = 'nowhere'")
    Path("torn").mkdir()
    Path("torn/manifest.json").write_text("{torn")
    one_sentence(fedloom("report", "torn"), "torn/manifest.json", "not JSON")


def test_export_writes_an_adapter_for_a_client_or_a_rank_and_a_merged_model(fedloom: Fedloom, finished: Path) -> None:
    shutil.copytree(finished, "done")
    lines = [json.loads(line) for line in Path("done/metrics.jsonl").read_text().splitlines()]
    ranks = {line["client"]: line["rank"] for line in lines if line["kind"] == "client"}
    client = min(ranks, key=lambda name: (ranks[name], name))
    for arguments, place, rank in (
        (("--client", client), Path("done", f"adapter-{client}"), ranks[client]),
        (("--rank", 3), Path("done/adapter-r3"), 3),
        (("--rank", 1, "--out", "elsewhere"), Path("elsewhere"), 1),
    ):
        said = fedloom("export", "done", *arguments)
        assert said.code == 0, said.err
        assert str(place) in said.out
        assert json.loads((place / "adapter_config.json").read_text())["r"] == rank
    said = fedloom("export", "done", "--merged")
    assert (said.code, said.err) == (0, "")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in Path("done/merged").iterdir()}
    one_sentence(fedloom("export", "done", "--merged"), "exists already")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((), ("exactly one of",)),
        (("--rank", 2, "--merged"), ("exactly one of",)),
        (("--rank", 2, "--client", "c00"), ("exactly one of",)),
        (("--rank", 0), ("rank = 0", "choose 1 to 8")),
        (("--rank", 9), ("rank = 9", "choose 1 to 8")),
        (("--client", "zoe"), ("client = 'zoe'", "c00")),
    ],
)
def test_a_contradiction_in_an_export_is_one_sentence(
    fedloom: Fedloom, finished: Path, arguments: tuple[object, ...], parts: tuple[str, ...]
) -> None:
    before = sorted(finished.iterdir())
    one_sentence(fedloom("export", finished, *arguments), *parts)
    assert sorted(finished.iterdir()) == before


def test_an_export_of_what_is_torn_is_one_sentence(fedloom: Fedloom, finished: Path) -> None:
    one_sentence(fedloom("export", "nowhere", "--merged"), "run folder = 'nowhere'")
    shutil.copytree(finished, "torn")
    Path("torn/adapter/adapter_model.safetensors").write_bytes(b"junk")
    one_sentence(fedloom("export", "torn", "--merged"), "run folder = 'torn/adapter'", "is damaged")
    Path("torn/manifest.json").write_text("{}")
    one_sentence(fedloom("export", "torn", "--rank", 1), "run folder = 'torn'", "cannot be read")
    assert not Path("torn/merged").exists()


@given(st.text(), st.sampled_from(["cp1252", "ascii", "latin-1", "cp437", "shift-jis", "utf-8", "utf-16"]))
def test_any_text_goes_to_any_terminal(text: str, encoding: str) -> None:
    """In UTF-8 as it is, elsewhere in ASCII: readers of a redirected file take it for UTF-8 or for whatever they are used to."""
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding=encoding, newline="")
    console.write_any_text(stream)
    stream.write(text)
    stream.flush()
    if encoding.startswith("utf"):
        proper = not any("\ud800" <= letter <= "\udfff" for letter in text)
        assert not proper or written.getvalue().decode(encoding) == text
    else:
        assert not text.isascii() or written.getvalue().decode("ascii") == text
        assert written.getvalue().isascii()


def test_marks_are_spelt_plainly() -> None:
    stream = io.TextIOWrapper(written := io.BytesIO(), encoding="cp1252")
    console.write_any_text(stream)
    stream.write("50.0\u00a0% \u00b1 2 \u2026 \u2013 \u05db")
    stream.flush()
    assert written.getvalue() == rb"50.0 % +- 2 ... - \u05db"


@pytest.mark.slow
def test_a_run_with_labels_of_another_script_goes_through_in_any_terminal(tmp_path: Path, encoder: Path) -> None:
    rows = "Rows([{'text': 'my cat', 'label': '\u05db\u05df' if i % 2 else 'n\u00e3o'} for i in range(60)])"
    text = f"from fedloom import *\nfrom tests.support.tiny_models import tiny_run\nrun = tiny_run({str(encoder)!r}, "
    (tmp_path / "\u05db.py").write_text(f"{text}data={rows}, limits=Limits(versions=1))\n", encoding="utf-8")
    env = {**os.environ, "PYTHONUTF8": "0", "PYTHONPATH": str(Path.cwd())}

    def call(module: str, encoding: str, out: str) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", module, "run", "\u05db.py", "--no-report", "--out", out]
        given = env | {"PYTHONIOENCODING": encoding}
        return subprocess.run(command, cwd=tmp_path, env=given, capture_output=True, check=False)

    done = call("fedloom", "cp1252", "\u05dc\u05d0")
    assert done.returncode == 0, done.stderr
    assert r"\u05db\u05df" in done.stdout.decode("ascii")
    again = call("fedloom.cli", "ascii", "\u05dc\u05d0")
    assert (again.returncode, again.stderr.count(b"\n")) == (2, 1), "there is such a folder already"


@pytest.mark.slow
def test_the_module_runs_as_a_process_and_a_mistake_has_no_traceback(tmp_path: Path) -> None:
    code = "import sys; from fedloom.cli.main import main; sys.argv = ['fedloom', 'run', 'none.py']; main()"
    env = {**os.environ, "PYTHONPATH": str(Path(main.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fedloom: ")
    assert list(tmp_path.iterdir()) == []
