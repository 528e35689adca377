"""Run files in TOML: a `Run` from text that executes nothing, so that one may take it from somebody else."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any, cast

from fedloom.core.errors import Refused
from fedloom.runs.field_values import read_data
from fedloom.runs.run import Run

LARGEST = 2**20
"""Bytes of a TOML file that is read."""
MOST_DOTS = 1000
"""Dots in a line of it: the time that `tomllib` takes for a dotted key grows with their square."""


def read_toml_run(file: Path) -> Run:
    """Read the run that a TOML file describes; its keys are the fields of `Run`.

    Raises Refused with the field, its value and what it should be.
    """
    try:
        return _run_of(read_toml(file, "FILE"))
    except Refused as error:
        place = "" if str(file) in str(error.value) else f" (in {file.name})"
        raise Refused(error.field, error.value, f"{error.remedy}{place}") from error
    except RecursionError as error:
        raise Refused("FILE", str(file), "its tables are nested too deeply") from error


def parse_run(text: str) -> Run:
    """Return the run that a text in TOML describes. Raises Refused."""
    return _run_of(tomllib.loads(text))


def _run_of(tables: dict[str, Any]) -> Run:
    return cast(Run, read_data(tables, Run, None, ""))


def read_toml(path: Path, field: str, hint: str = "") -> dict[str, Any]:
    """Read the tables of a TOML file in UTF-8, with or without a byte order mark.

    Raises Refused for this field, with the `hint` where there is no such file.
    """
    text = ""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        text = content.decode("utf-8-sig")  # editors of Windows put a mark in front
        if len(content) > LARGEST or any(line.count(".") > MOST_DOTS for line in text.splitlines()):
            raise Refused(field, str(path), f"it has more than {LARGEST:,} bytes, or {MOST_DOTS:,} dots in a line")
        return tomllib.loads(text.replace("\r\n", "\n"))
    except OSError as error:
        raise Refused(field, str(path), f"it cannot be read ({error.strerror}){hint}") from error
    except UnicodeDecodeError as error:
        raise Refused(field, str(path), "it is not a text in UTF-8; save it again in that encoding") from error
    except RecursionError as error:
        raise Refused(field, str(path), "its lists are nested too deeply") from error
    except Refused:
        raise
    except ValueError as error:  # not TOML, or a number of too many digits
        windows = "; a path of Windows stands in single quotes" if "\\" in text else ""
        raise Refused(field, str(path), f"it is not TOML: {error}{windows}") from error


def toml_text(value: object) -> str:
    """Return a text, a list of texts or a switch as TOML has it: as JSON does, but for one character.

    >>> toml_text("a\\x7f\\n"), toml_text(["é", "b"])
    ('"a\\\\u007f\\\\n"', '["é", "b"]')
    """
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
