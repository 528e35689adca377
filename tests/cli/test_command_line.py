"""What all commands have in common: help, `--json`, `-v` and `-q`, completion, nearest names, and how they end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import typer

from fedloom.cli import console, main
from fedloom.cli.exit_codes import MEANINGS, ExitCode
from fedloom.cli.stop_signals import StopSignals
from fedloom.core.errors import Refused, Terminated

DOCS = Path(__file__).parents[2] / "docs" / "command-line.md"
WORDS = """
FILE DIR FILE|DIR DIR|FILE FILE|TEXT DATA DATA... DIR... NAME PUB HASH COLUMN WORKERS TRACKER [classify|instruct|deploy]
N X MB SECONDS PORT [HOST:]PORT FIELD=VALUE FIELD=VALUES WHAT=NAME WHAT=VALUE A,B,..."""
METAVARS = set(WORDS.split())
"""All that stands for a value in the help: one word for one thing."""
SILENT = {
    *("join", "worker", "serve", "region", "up", "watch", "chat", "demo", "init", "shards"),
    *("keys new", "keys renew", "keys site", "keys add", "keys remove", "site new-split", "site accept"),
}
"""Commands that do something, and whose answer is what they wrote: they need no `--json`."""


def commands(group: Any = None, path: str = "") -> Iterator[tuple[str, Any]]:
    """Each command, with the words that call it."""
    for name, command in (group or typer.main.get_command(main.app)).commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{path}{name} ")
        else:
            yield path + name, command


def options_of(command: Any) -> Iterator[Any]:
    return (one for one in command.params if one.name not in ("help", "install_completion", "show_completion"))


def call(*arguments: str) -> int:
    """The command in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["fedloom", *arguments])
        with pytest.raises(SystemExit) as stop:
            main.main()
    return int(stop.value.code or 0)


ALL = dict(commands())


@pytest.mark.parametrize("name", ALL)
def test_every_argument_is_explained_and_named_as_everywhere(name: str) -> None:
    assert ALL[name].help
    flags = {flag for one in options_of(ALL[name]) for flag in one.opts}
    assert {"-v", "-q"} <= flags
    assert name in SILENT or "--json" in flags
    for one in options_of(ALL[name]):
        assert one.help, f"{name}: {one.name} has no help"
        assert one.help.strip()[-1] in ".)", f"{name}: {one.name} is no sentence"
        shown = one.metavar or one.make_metavar(ctx=typer.Context(ALL[name]))
        assert getattr(one, "is_flag", False) or shown in METAVARS, f"{name}: {one.name} takes {shown}"


def test_no_command_is_left_out_of_what_is_silent() -> None:
    assert set(ALL) >= SILENT


@pytest.mark.slow
def test_help_fits_eighty_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    for name in ("", "run", "inspect", "serve", "keys add", "site log"):
        assert call(*name.split(), "-h") == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "FILE" in text
    assert "PATH" not in text


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == ExitCode.DONE
    assert re.fullmatch(r"fedloom \d+\.\d+\S*\n", capsys.readouterr().out)


@pytest.mark.parametrize("typed", [("rnu",), ("keys", "lst"), ("run", "x.py", "--ouput", "a")])
def test_a_near_name_is_offered_once(typed: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*typed) == ExitCode.REFUSED
    assert capsys.readouterr().err.lower().count("did you mean") == 1


def test_the_exit_codes_are_documented() -> None:
    text = DOCS.read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\d+) \| (.+?) \|$", text, re.MULTILINE))
    assert rows == {str(int(code)): meaning for code, meaning in MEANINGS.items()}
    assert set(MEANINGS) == set(ExitCode)


def test_a_bug_is_a_traceback_and_a_mistake_is_one_with_v_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("report", "nowhere") == ExitCode.REFUSED
    assert capsys.readouterr().err.count("\n") == 1
    assert call("-v", "report", "nowhere") == ExitCode.REFUSED
    assert "Traceback" in capsys.readouterr().err
    assert call("report", "nowhere", "--verbose") == ExitCode.REFUSED
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setattr("fedloom.report.run_log.run_folders", lambda _: 1 // 0)
    assert call("report", "nowhere") == ExitCode.BUG
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.slow
def test_json_is_all_that_stdout_gets(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").write_text("text,label,ward\n" + "the cat,pet,a\nred,colour,b\n" * 20)
    for arguments, field in (
        (("report", str(finished), "--out", "page.html"), "runs"),
        (("inspect", "table.csv", "--clients", "ward"), "clients"),
        (("privacy", str(finished)), "noise"),
        (("export", str(finished), "--rank", "2", "--out", "adapter"), "folder"),
    ):
        assert call(*arguments, "--json") == ExitCode.DONE
        answer = json.loads(capsys.readouterr().out)
        assert field in answer, arguments
    assert call("report", str(finished), "--out", "other.html") == ExitCode.DONE
    assert "Accuracy" in capsys.readouterr().out


def test_json_has_no_number_that_json_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json({"a": float("nan"), "b": [Path("x"), float("inf"), (1, 2.5)], "c": ["\x1b\u05db"] * 2})
    text = capsys.readouterr().out
    assert text.isascii()
    assert json.loads(text) == {"a": None, "b": ["x", None, [1, 2.5]], "c": ["\x1b\u05db"] * 2}


@pytest.mark.slow
def test_completion_names_commands_and_options() -> None:
    """As a shell asks for it: by an environment variable."""
    for words, found in (("fedloom re", "report"), ("fedloom export --ra", "--rank"), ("fedloom keys ", "renew")):
        env = {**os.environ, "_FEDLOOM_COMPLETE": "complete_bash", "COMP_WORDS": words}
        env["COMP_CWORD"] = str(len(words.split(" ")) - 1)
        ran = subprocess.run([sys.executable, "-m", "fedloom"], env=env, capture_output=True, text=True, check=False)
        assert found in ran.stdout.split()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_also_where_a_library_swallows_it(number: signal.Signals) -> None:
    stops = StopSignals()
    before = signal.getsignal(number)
    with stops.caught(), suppress(KeyboardInterrupt):
        os.kill(os.getpid(), number)
        time.sleep(10)
    assert stops.exit_code(ImportError()) == 128 + number
    assert signal.getsignal(number) is before
    assert StopSignals().exit_code(ImportError()) is None
    assert StopSignals().exit_code(Terminated()) == ExitCode.TERMINATED


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals and pipes of POSIX")
def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m fedloom --help | head -c 1; exit ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) in [(ExitCode.BROKEN_PIPE, ""), (ExitCode.DONE, "")]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_sigterm_ends_a_run_in_order(tmp_path: Path, encoder: Path) -> None:
    """With an adapter, a manifest that says so, the command that continues, and the exit code of the signal."""
    (tmp_path / "mine.py").write_text(
        f"from fedloom import *\nfrom tests.support.tiny_models import tiny_run\n"
        f"run = tiny_run({str(encoder)!r}, limits=Limits(versions=10**5))\n"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fedloom", "run", "mine.py", "--out", "out", "--no-report", "-q"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        try:
            until = time.monotonic() + 240
            while not (out / "metrics.jsonl").exists() or '"version":2' not in (out / "metrics.jsonl").read_text():
                assert run.poll() is None
                assert time.monotonic() < until
                time.sleep(0.1)
            run.terminate()
            said = run.communicate(timeout=120)
        finally:
            run.kill()  # a run that did not end would be waited for without end
    assert run.returncode == ExitCode.TERMINATED
    assert said[0] == ""
    assert (
        said[1].splitlines()[-1].startswith("fedloom: interrupted. Saved to out; continue with: python -m fedloom run")
    )
    about = json.loads((out / "manifest.json").read_text())
    assert (about["status"], about["status_reason"]) == ("interrupted", "stopped by SIGTERM")
    assert (out / "adapter" / "adapter_model.safetensors").exists()


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedloom.core.files import require_vacant

    (tmp_path / "notes.csv").write_text("x")
    with pytest.raises(Refused, match=r"notes\.csv is not a folder"):
        require_vacant(tmp_path / "notes.csv" / "x" / "y")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(Refused, match="you may not write"):
        require_vacant(tmp_path / "x" / "y")
