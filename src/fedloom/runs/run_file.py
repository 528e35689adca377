"""Run files, in TOML or in Python, and `--set`, which replaces single fields of their run."""

from __future__ import annotations

import builtins
import re
import runpy
import sys
from collections.abc import Iterable, Mapping, Sequence
from inspect import isfunction
from pathlib import Path
from traceback import walk_tb
from typing import Any

from fedloom.core.errors import Refused
from fedloom.core.schema import RENAMED
from fedloom.core.text import did_you_mean, first_line
from fedloom.data.file_formats import SUFFIXES
from fedloom.runs.field_values import is_public, replace_text
from fedloom.runs.public_names import all_names, public_name
from fedloom.runs.run import Run
from fedloom.runs.toml_run import read_toml_run

OTHER_FORMATS: Mapping[str, str] = {
    **dict.fromkeys(
        (".yaml", ".yml"), "a run file is TOML (.toml) or Python (.py), not YAML; `fedloom init` writes one"
    ),
    ".ipynb": "a notebook is no run file; call fedloom.run(run) in it, or copy the cell that makes `run` into a .py file",
    **dict.fromkeys(SUFFIXES, "this is a table and no run file; `fedloom init` writes a run file for it"),
    ".json": "a run file is TOML (.toml) or Python (.py), not JSON; of a table `fedloom init` writes one",
}
"""What to do with a file of another kind, by the end of its name."""
IMPORT = re.compile(r"cannot import name '(\w+)' from 'fedloom'")
IMPORT_PLACE = re.compile(r" \([^()]*\.py\)$")
"""Where Python says that a module lies from which a name cannot be imported."""


def override(run: Run, settings: Sequence[str]) -> Run:
    """Return the run with each `path=value` applied in order.

    A value is a Python literal (`12`, `0.5`, `None`, `(2,4,8)`), a public fedloom name (`linear`), a class with its defaults
    (`HLoRA`), a value made of one (`HLoRA(rank=16)`), or, where text is expected, the text as it stands. Raises Refused for an
    unknown field or a value of a wrong kind.
    """
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path.strip():
            raise Refused("--set", setting, "write field=value, for instance schedule.cohort_size=5")
        run = replace_text(run, path.strip(), text.strip())
    return run


def load_run_file(file: Path) -> Run:
    """Return the run of a file: of its fields in TOML, or the value `run` of a Python file, which is executed.

    Raises Refused if it is no run file, if it stops with an error, or if it has no such value.
    """
    if not file.is_file():
        raise Refused("FILE", str(file), "there is no such file; `fedloom init DATA` writes a run file for a table")
    suffix = file.suffix.lower()
    if suffix == ".toml":
        return read_toml_run(file)
    if suffix in OTHER_FORMATS:
        raise Refused("FILE", str(file), OTHER_FORMATS[suffix])
    return _python_run(file)


# Python ---------------------------------------------------------------------------------------------------------------


def _python_run(file: Path) -> Run:
    sys.path.insert(0, str(file.parent.resolve()))  # as `python FILE` would
    names: Mapping[str, Any] = {}
    try:
        names = runpy.run_path(str(file), init_globals=_older_names(file))
        value = names.get("run")
        if str(getattr(value, "__module__", "")).startswith("fedloom.") and isfunction(value):
            value = None  # what `from fedloom import *` brings
        value = value() if callable(value) else value
    except Refused as error:
        line = _line_of(error, file)
        raise Refused(
            error.field, error.value, error.remedy + (f" ({file.name}, line {line})" if line else "")
        ) from error
    except (Exception, SystemExit) as error:
        raise Refused("FILE", str(file), _why_stopped(error, file)) from error
    if not isinstance(value, Run):
        raise Refused("FILE", str(file), _why_no_run(value, names))
    return value


def _why_stopped(error: BaseException, file: Path) -> str:
    """Say with what a run file stopped, in which line, and which name was probably meant."""
    if isinstance(error, SyntaxError) and re.search("unicode error|null bytes", str(error)):
        return "it is not a text in UTF-8; save it again in that encoding"
    line, text = _line_of(error, file), error.msg if isinstance(error, SyntaxError) else first_line(error)
    name, names = _unknown_name(error)
    advice = "" if "did you mean" in text.lower() else did_you_mean(name, names)
    if isinstance(error, NameError) and is_public(name):
        advice = "begin the file with `from fedloom import *`"
    where = f"line {line}: " if line else "it stopped with "
    return f"{where}{type(error).__name__}: {IMPORT_PLACE.sub('', text)}{'; ' if advice else ''}{advice}"


def _line_of(error: BaseException, file: Path) -> int | None:
    """Return the line of the file that an error came from, or the last of its lines on the way there; None: from elsewhere."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return error.lineno
    lines = [line for frame, line in walk_tb(error.__traceback__) if frame.f_code.co_filename == str(file)]
    return lines[-1] if lines else None


def _unknown_name(error: BaseException) -> tuple[str, Iterable[str]]:
    """Return the name that an error is about, and those that are there."""
    match error:
        case ImportError() if found := IMPORT.match(str(error)):
            return found[1], all_names()
        case NameError():
            frames = [frame for frame, _ in walk_tb(error.__traceback__)]
            return str(error.name), [*all_names(), *(frames[-1].f_globals if frames else ()), *dir(builtins)]
        case AttributeError():
            return str(error.name), dir(error.obj)
    return "", ()


def _why_no_run(value: object, names: Mapping[str, Any]) -> str:
    """Say what a file has in the place of `run`."""
    if isinstance(value, list | tuple):
        return f"its `run` is a {type(value).__name__} of {len(value)}, and a run file holds one Run; for several see `fedloom sweep`"
    if value is not None:
        return f"its `run` is no Run but of type {type(value).__name__}; end the file with `run = Run(...)`"
    others = [name for name, other in names.items() if isinstance(other, Run)]
    if others:
        return f"it defines no `run`; {others[-1]} is a Run: call it run"
    return "it defines no `run`; end it with `run = Run(...)`"


def _older_names(file: Path) -> dict[str, Any]:
    """Return the policies that a run file calls by an earlier name: `from fedloom import *` brings the names of today only."""
    words = set(re.findall(r"\w+", file.read_text(encoding="utf-8", errors="replace")))
    return {name: public_name(name) for name in RENAMED if name in words}
