"""Sweeps of a tiny model: what is missing is run, to the same bytes; a failure takes no other run with it; a kill ends all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import fedloom
from fedloom import FedIT, HLoRA, Limits, Refused, compare, sweep
from fedloom.report.run_log import read_manifest
from tests.support.same_bytes import COMPARED
from tests.support.tiny_models import tiny_run

ROOT = Path(__file__).parents[3]
GRID = {"aggregator": [HLoRA(), FedIT()], "seed": range(2)}
SCRIPT = """
import sys
from pathlib import Path
from fedloom import FedIT, HLoRA, Limits, sweep
from tests.support.tiny_models import settle, tiny_run

settle()
if __name__ == "__main__":
    run = tiny_run(Path(sys.argv[1]), limits=Limits(versions=int(sys.argv[3])))
    sweep(run, {"aggregator": [HLoRA(), FedIT()]}, sys.argv[2], jobs=2, report=False)
"""


def contents(folder: Path) -> dict[str, bytes]:
    """What a sweep has computed, by file."""
    return {f"{run.name}/{name}": (run / name).read_bytes() for run in sorted(folder.glob("*/")) for name in COMPARED}


@pytest.mark.slow
def test_a_sweep_runs_what_is_missing_and_compares_all(encoder: Path, tmp_path: Path) -> None:
    run = tiny_run(encoder, limits=Limits(versions=2))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    found = sweep(run, GRID, whole, progress=False, report=False)
    assert [result.log.manifest["status"] for result in found.results] == ["finished"] * 4
    assert len(list(whole.glob("*/manifest.json"))) == 4
    assert "Paired differences" in (whole / "report.html").read_text()
    rows = found.paired.to_dict("records")
    assert {(row["value"], row["instead_of"], row["pairs"]) for row in rows} == {("FedIT", "HLoRA", 2)}
    table = found.table
    wanted = [
        100
        * (
            table[(table.aggregator == "FedIT") & (table.seed == s)].accuracy.iloc[0]
            - table[(table.aggregator == "HLoRA") & (table.seed == s)].accuracy.iloc[0]
        )
        for s in (0, 1)
    ]
    assert next(row["mean"] for row in rows if row["figure"] == "accuracy") == pytest.approx(sum(wanted) / 2)
    assert "FedIT" in repr(found)
    assert "<table>" in found._repr_html_()
    assert [one.folder for one in compare(whole).results] == [one.folder for one in found.results]

    sweep(run, {**GRID, "seed": [0]}, cut, progress=False, report=False)
    first = {path: path.stat().st_mtime_ns for path in cut.glob("*/metrics.jsonl")}
    sweep(run, GRID, cut, progress=False, report=False)
    assert {path: path.stat().st_mtime_ns for path in first} == first  # what was there was not run again
    assert contents(cut) == contents(whole)
    with pytest.raises(Refused, match=r"limits\.versions: 2 there, 3 here"):
        sweep(tiny_run(encoder, limits=Limits(versions=3)), GRID, whole, progress=False)


@pytest.mark.slow
def test_one_that_fails_takes_no_other_with_it(encoder: Path, tmp_path: Path) -> None:
    run = tiny_run(encoder, limits=Limits(versions=1))
    with pytest.raises(Refused, match=r"1 of 2 runs.*target_modules=nothing: "):
        sweep(run, {"lora.target_modules": [("nothing",), None]}, tmp_path / "s", progress=False, report=False)
    (finished,) = [path.parent for path in (tmp_path / "s").glob("*/manifest.json")]
    assert read_manifest(finished)["status"] == "finished"


def test_a_folder_with_something_else_is_refused(encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(Refused, match="exists already"):
        sweep(tiny_run(encoder), {"seed": [0]}, tmp_path, progress=False)
    with pytest.raises(Refused, match="jobs"):
        sweep(tiny_run(encoder), {"seed": [0]}, tmp_path / "new", jobs=0, progress=False)
    assert not (tmp_path / "new").exists()


def test_settings_that_cannot_be_sent_to_a_process_are_refused(encoder: Path, tmp_path: Path) -> None:
    class Own(FedIT):
        """A method that is defined where no other process can find it."""

    with pytest.raises(Refused, match="use 1 job"):
        sweep(tiny_run(encoder), {"aggregator": [Own()]}, tmp_path / "s", jobs=2, progress=False)


def started(out: Path) -> Iterator[Path]:
    yield from (path.parent for path in out.glob("*/metrics.jsonl") if '"kind":"version"' in path.read_text())


def until(condition: Any, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_one_that_is_killed_ends_its_processes_and_leaves_runs_that_can_go_on(encoder: Path, tmp_path: Path) -> None:
    script, out, versions = tmp_path / "script.py", tmp_path / "sweep", 200
    script.write_text(SCRIPT)
    path = os.pathsep.join([str(Path(fedloom.__file__).parents[1]), str(ROOT)])
    command = [sys.executable, str(script), str(encoder), str(out), str(versions)]
    process = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}, stderr=subprocess.PIPE
    )
    try:
        until(lambda: len(list(started(out))) == 2 or process.poll() is not None)
        assert process.poll() is None
        process.kill()
        process.wait()
        folders = list(started(out))
        until(lambda: all(read_manifest(folder)["status"] != "running" for folder in folders))
    finally:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert [read_manifest(folder)["status"] for folder in folders] == ["interrupted"] * 2
    assert all((folder / "adapter").is_dir() for folder in folders)
    made = [json.loads(text) for text in (folders[0] / "metrics.jsonl").read_text().splitlines()]
    assert max(line["version"] for line in made) < versions
