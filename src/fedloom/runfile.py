"""The Run value of a Python file."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from fedloom.errors import Refused
from fedloom.run import Run


def run_of(file: Path) -> Run:
    """The value `run` of the file, which is executed. Raises Refused if it stops or has none."""
    if not file.is_file():
        raise Refused("FILE", str(file), "there is no such file; give a Python file with a value `run = Run(...)`")
    sys.path.insert(0, str(file.parent.resolve()))  # as `python FILE` would
    try:
        value = runpy.run_path(str(file)).get("run")
        value = value() if callable(value) else value
    except (Refused, KeyboardInterrupt):
        raise
    except (Exception, SystemExit) as error:
        raise Refused("FILE", str(file), f"it stopped with {type(error).__name__}: {error}") from error
    if not isinstance(value, Run):
        raise Refused("FILE", str(file), "it defines no `run`; end it with `run = Run(...)`")
    return value
