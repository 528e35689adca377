"""Attacks by files: run folders and state folders that somebody else made. Each function returns whether the attack succeeded."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import safetensors.torch
import torch
from pydantic import ConfigDict, ValidationError
from rich.console import Console
from transformers import AutoConfig

from fedloom import prepare
from fedloom.cli import main
from fedloom.cli.console import SafeConsole
from fedloom.cli.status import status_view
from fedloom.core import files
from fedloom.core.errors import Refused
from fedloom.core.schema import Malformed
from fedloom.core.text import CONTROL, without_colours
from fedloom.core.types import ClientState
from fedloom.deploy.json_log import JsonLines
from fedloom.deploy.site.answer_journal import RUNS, AnswerJournal, CompletedTask
from fedloom.deploy.site.limits import SiteLimits
from fedloom.runs import checkpoint, resume
from fedloom.runs.checkpoint import FORMAT, HEADER, StoredValues, _digest, read_checkpoint, write_checkpoint
from fedloom.runs.run_file import load_run_file
from fedloom.train.base_model import load_base
from fedloom.train.settings import LoRA
from tests.attacks.attack import Attack, succeeds
from tests.support.folder_runs import stop_at
from tests.support.tiny_models import tiny_encoder

SECONDS = 60
"""After so many seconds a command hangs."""
CODES = (0, 1, 2)
"""Exit codes of a command that ended in order: it did what was asked, found a difference, or refused."""
PRECIOUS = "precious\n" * 10
EVIL = "x\x1b[31m\x1b[2J\x1b]8;;http://evil\x07\u202e\u2066\x9b31m\u200b\u2028\r\x08\x7f\U000e0041[red]\n"
"""A text that clears a screen, links, turns, colours, hides and writes over."""


# A command, in this process ------------------------------------------------------------------------------------------


class Hung(BaseException):
    """A command that did not end."""


def call(*arguments: object) -> tuple[object, str]:
    """Carry out `fedloom ARGUMENTS`; returns its exit code, or the error that passed through it, and what it printed."""
    before, said, code = sys.argv, io.StringIO(), None
    sys.argv = ["fedloom", *map(str, arguments)]
    try:
        with time_limit(), redirect_stdout(said), redirect_stderr(said):
            main.main()
    except SystemExit as ended:
        code = ended.code
    except (Exception, Hung) as error:
        code = f"{type(error).__name__}: {error}"
    finally:
        sys.argv = before
    return code, said.getvalue()


@contextmanager
def time_limit(seconds: int = SECONDS) -> Iterator[None]:
    """Raise Hung in a block that takes longer."""

    def ring(*_: object) -> NoReturn:
        raise Hung(f"no end within {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def in_order(code: object, said: str, *codes: int) -> bool:
    """Whether a command ended with one of these exit codes (default: any of `CODES`), and without a traceback."""
    return code in (codes or CODES) and "Traceback" not in said and (code != 2 or said.count("fedloom: ") == 1)


# What lies in the place of a file ------------------------------------------------------------------------------------

KINDS = ("link", "dangling link", "pipe", "device", "folder", "second name")


def put(kind: str, place: Path, victim: Path) -> None:
    """Put something of this kind in the place of a file or a folder; links lead to the victim."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    match kind:
        case "link":
            place.symlink_to(victim)
        case "dangling link":
            place.symlink_to(victim.with_name("made"))
        case "pipe":
            os.mkfifo(place)
        case "device":
            place.symlink_to("/dev/zero")
        case "folder":
            (place / "inner").mkdir(parents=True)
        case "second name":
            os.link(victim, place)


def contents(folder: Path) -> Mapping[str, bytes | None]:
    """What lies in a folder: each name with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def harm_by_place(kind: str, name: str, folder: Path, command: Sequence[object], victims: Path) -> str:
    """Put something else in the place of `name` in a copy of a folder, and carry out a command on it.

    Returns what harm was done: a victim changed, the command hung or ended in a traceback; "" for none.
    """
    shutil.rmtree(victims, ignore_errors=True)
    (victims / "folder").mkdir(parents=True)
    for path in (victims / "file", victims / "folder" / "1.safetensors", victims / "folder" / "start.safetensors"):
        path.write_text(PRECIOUS)
    whole = (folder / name).is_dir()
    put(kind, folder / name, victims / ("folder" if whole and kind == "link" else "file"))
    before = contents(victims)
    code, said = call(*command)
    if contents(victims) != before:
        return f"{name} ({kind}): a victim was changed by {command[0]}"
    return "" if in_order(code, said) else f"{name} ({kind}): {command[0]} ended with {code}: {said[-300:]}"


def names_in(folder: Path) -> list[str]:
    """The files of a run folder that a run writes and reads, each kind once, and its folders."""
    one = {"updates/1.safetensors", "updates/start.safetensors"}
    found = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*"))]
    return [name for name in found if not name.startswith("updates/") or name in one]


# Forged content ------------------------------------------------------------------------------------------------------

ODD: Sequence[Any] = [
    *(None, True, -1, 0, 10**30, 1e308, -1e308, float("nan"), "nan", "x", "\ud800", EVIL, [], {}, [[]], [0] * 50),
    *({"is": 0}, {"is": 99}, {"given": "x"}, {"type": "Tensor"}, {"type": []}, "cuda", "meta", "float64", "nn"),
    *([10**12], [-1], [2**62, 2**62], [None], {"x": {"y": [1]}}, "2" * 5000),
]
"""What stands in the place of something else."""


def leaves(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to all parts of JSON data."""
    if at:
        yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from leaves(item, (*at, key))


def bent(value: Any, at: tuple[Any, ...], odd: Any, remove: bool = False) -> Any:
    """A copy of JSON data with another thing in one place, or without it."""
    copy = json.loads(json.dumps(value))
    owner = copy
    for key in at[:-1]:
        owner = owner[key]
    if remove:
        del owner[at[-1]]
    else:
        owner[at[-1]] = odd
    return copy


def text_of(stored: StoredValues) -> dict[str, Any]:
    """The JSON of a checkpoint."""
    return {"about": dict(stored.about), "objects": stored.objects, "values": dict(stored.values)}


def seal(path: Path, text: str, numbers: torch.Tensor, form: object = FORMAT) -> Path:
    """Write a checkpoint with this text, under the digest that it should have."""
    data = torch.frombuffer(bytearray(text.encode("utf-8", "surrogatepass")), dtype=torch.uint8)
    parts = {"numbers": numbers.clone(), "text": data}
    path.unlink(missing_ok=True)
    safetensors.torch.save_file(parts, path, {HEADER: json.dumps([form, _digest(parts)])})
    return path


ODD_TEXTS = (
    *(" ", "[]", "1", '"x"', "{}", "null", "[" * 10**5, '{"a":' * 10**5, "9" * 10**6, "NaN", "1e999", "\ufeff{}"),
    *('{"about":{}}', '{"about":{},"objects":{},"values":[]}', '{"about":[],"objects":[1],"values":{"done":1}}'),
    *('{"status":"running","status":"finished"}', '{"kind":"version"}', '{"kind":[]}', "\x00" * 100, "\ud800"),
)
"""What is no JSON, or another than is expected, or too much of it."""


# The terminal --------------------------------------------------------------------------------------------------------


def reaches_terminal(show: Callable[[SafeConsole], None], console: type = SafeConsole) -> bool:
    """Whether what `show` prints moves, colours, links or hides something that is not ours, with and without colour.

    `console` is the class of the terminal: with that of rich (the limit lifted) the attack succeeds.
    """
    for colour in (False, True):
        file = io.StringIO()
        told = {} if console is SafeConsole else {"highlight": False}
        show(console(file=file, force_terminal=colour, color_system="standard" if colour else None, width=200, **told))
        if has_control(file.getvalue(), colour):
            return True
    return False


def has_control(said: str, colour: bool = False) -> bool:
    """Whether a text holds control characters, other than colours where there is colour."""
    return CONTROL.search(without_colours(said) if colour else said) is not None


# The journal of a site -----------------------------------------------------------------------------------------------


def journal_forgets(folder: Path, by: float = 3600.0) -> bool:
    """Fill a journal with runs and tasks, turn the clock back by so many seconds, and ask for the answer that was just given."""
    journal = AnswerJournal(folder)
    for number in range(RUNS):
        for task in range(1, 8 if number == 0 else 2):
            journal.record(f"{number:012x}", task, _done(task), 0)
    for path in folder.rglob("*"):
        stamp = path.stat().st_mtime + by
        os.utime(path, (stamp, stamp))
    journal.record("f" * 12, 1, _done(1), 0)
    journal.record("0" * 12, 8, _done(8), 7)
    return journal.find("f" * 12, 1) is None or journal.find("0" * 12, 8) is None


def open_to_others(folder: Path) -> list[str]:
    """What other users of the machine may read or enter of a journal that is written with umask 0."""
    before = os.umask(0)
    try:
        AnswerJournal(folder / "state" / "journal").record("a" * 12, 1, _done(1), 0)
    finally:
        os.umask(before)
    return [str(path) for path in (folder / "state").rglob("*") if path.stat().st_mode & 0o077]


def _done(number: int) -> CompletedTask:
    digest = hashlib.sha256(str(number).encode()).hexdigest()
    return CompletedTask(digest, torch.zeros(4, dtype=torch.uint8), ClientState())


# The list ------------------------------------------------------------------------------------------------------------


def runs_at(place: Path, encoder: Path) -> Path:
    """Write a run file, a run that was interrupted, and a finished one, with all files that a run can have."""
    text = f"from fedloom import *\nfrom tests.support.tiny_models import tiny_run\nrun = tiny_run({str(encoder)!r}, held_out=0.2)\n"
    (place / "run.py").write_text(text)
    run = load_run_file(place / "run.py")
    for name, observers in (("interrupted", [stop_at(KeyboardInterrupt, 2)]), ("finished", [])):
        with suppress(KeyboardInterrupt):
            prepare(run).execute(place / name, observers, checkpoint_seconds=0, keep_updates=True)
    return place


def overwritten_by_a_link(folder: Path, lifted: bool) -> bool:
    """A run folder whose `trace.jsonl` is a link: `--resume` writes what lies behind it. Lifted: files are opened as usual."""
    runs = runs_at(folder, tiny_encoder(folder / "model"))
    run = runs / "interrupted"
    if lifted:
        (run / "checkpoint.safetensors").unlink()
    command = ["run", runs / "run.py", "--resume", run, "--no-report"]
    opened = (lambda path, mode="rb": open(path, mode)) if lifted else files.open_regular  # noqa: SIM115
    with patch.object(resume, "open_regular", opened), patch.object(files, "open_regular", opened):
        harm = harm_by_place("link", "trace.jsonl", run, command, folder / "victims")
    assert not harm or "a victim was changed" in harm, harm
    return bool(harm)


def _stored(folder: Path) -> tuple[Path, StoredValues]:
    path = folder / "one.safetensors"
    write_checkpoint(path, {"done": CompletedTask("d", torch.arange(4.0), ClientState())})
    return path, read_checkpoint(path)


def _read_error(path: Path) -> Exception | None:
    """What reading this checkpoint raises."""
    try:
        read_checkpoint(path).read({"done": CompletedTask})
    except Exception as error:
        return error
    return None


def forged_checkpoint(folder: Path, lifted: bool) -> bool:
    """A checkpoint with other things in every place: it ends in a traceback. Lifted: what reading raises is not looked at."""
    path, stored = _stored(folder)
    text = text_of(stored)
    with patch.object(checkpoint, "UNREADABLE", () if lifted else checkpoint.UNREADABLE):  # type: ignore[attr-defined]
        for at in leaves(text):
            for odd in ODD:
                seal(path, json.dumps(bent(text, at, odd)), stored.numbers)
                if not isinstance(_read_error(path), Malformed | None):
                    return True
    return False


def tensor_of_nothing(folder: Path, lifted: bool) -> bool:
    """A tensor of 10^12 numbers with a stride of 0: what is computed with it fills the memory. Lifted: any size is taken."""
    path, stored = _stored(folder)
    text = text_of(stored)
    (at,) = (at for at in leaves(text) if at[-1:] == ("shape",))
    forged = bent(bent(text, at, [10**12]), (*at[:-1], "stride"), [0])
    seal(path, json.dumps(forged), stored.numbers)
    with patch.object(checkpoint, "LARGEST_VIEW", 2**62 if lifted else checkpoint.LARGEST_VIEW):
        error = _read_error(path)
    assert error is None or "much larger than its memory" in str(error), error
    return error is None


class Ran:
    """Something whose unpickling writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, bytes]]:
        return write_bytes, (str(self.path), b"ran")


def write_bytes(path: str, data: bytes) -> None:
    """Write a file."""
    Path(path).write_bytes(data)


def code_in_weights(folder: Path, lifted: bool) -> bool:
    """A model folder with pickled weights that hold code. Lifted: torch is told to run what it finds."""
    model = tiny_encoder(folder / "model")
    (model / "model.safetensors").unlink()
    torch.save({"bert.embeddings.word_embeddings.weight": Ran(folder / "ran")}, model / "pytorch_model.bin")
    if lifted:
        torch.load(model / "pytorch_model.bin", weights_only=False)
    else:
        with suppress(Refused):
            load_base(str(model), 2, LoRA(), 2, 1)
    return (folder / "ran").exists()


def code_of_a_model(folder: Path, lifted: bool) -> bool:
    """A model folder that names code of its own. Lifted: transformers is told to trust it."""
    model = tiny_encoder(folder / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps(config | {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}})
    )
    (model / "own.py").write_text(f"import os\nos.mkdir({str(folder / 'ran')!r})\n")
    if lifted:
        with suppress(Exception):
            AutoConfig.from_pretrained(model, trust_remote_code=True)
    else:
        with suppress(Refused):
            load_base(str(model), 2, LoRA(), 2, 1)
    return (folder / "ran").exists()


class Unbounded(SiteLimits):
    """Limits as they were: any number is one."""

    model_config = ConfigDict(allow_inf_nan=True)
    megabytes: float = 512.0


def infinite_limit(folder: Path, lifted: bool) -> bool:
    """A file of a site with `megabytes = inf`, which ends in a traceback. Lifted: any number is one."""
    kind = Unbounded if lifted else SiteLimits
    if not succeeds(lambda: kind.model_validate({"megabytes": math.inf}), "megabytes", ValidationError):
        return False
    return not succeeds(lambda: kind.model_validate({"megabytes": math.inf}).bytes, "infinity", OverflowError)


def controlled_terminal(folder: Path, lifted: bool) -> bool:
    """A site's reason with control characters, in `fedloom status`. Lifted: it is shown by rich as it is."""
    client = {"reached": True, "answers": 1, "task": None, "since": None, "rank": 2, "stale": None, "why": EVIL}
    zeros = dict.fromkeys(("version", "versions", "seconds", "incarnation", "at", "accepted", "rejected", "failed"), 1)
    traffic = {"bytes_down": 1, "bytes_up": 1, "resent": 0}
    texts = {
        "run": EVIL,
        "state": EVIL,
        "waits": EVIL,
        "scores": {EVIL: 0.5},
        "set_aside": {EVIL: EVIL},
        "clients": {EVIL: client},
    }
    status = zeros | texts | {"mean_staleness": None, "traffic": traffic, "ended": EVIL, "calls_refused": {EVIL: 1}}
    return reaches_terminal(lambda console: console.print(status_view(status, 1.0)), Console if lifted else SafeConsole)


def controlled_log(folder: Path, lifted: bool) -> bool:
    """A site's reason with control characters, in a log that is read at a terminal. Lifted: the log is plain text."""
    form = logging.Formatter("%(message)s") if lifted else JsonLines()
    return has_control(form.format(logging.LogRecord("fedloom", logging.WARNING, "", 1, EVIL, None, None)))


def _attacks() -> Iterator[Attack]:
    yield Attack("a link in a run folder overwrites another file", overwritten_by_a_link)
    yield Attack("a forged checkpoint ends in a traceback", forged_checkpoint)
    yield Attack("a forged tensor is larger than any memory", tensor_of_nothing, in_gate=True)
    yield Attack("code in pickled weights is run", code_in_weights)
    yield Attack("code of a model is run", code_of_a_model)
    yield Attack("an infinite limit in site.toml", infinite_limit)
    yield Attack("control characters reach the terminal", controlled_terminal)
    yield Attack("control characters reach a log", controlled_log)


ATTACKS = tuple(_attacks())
