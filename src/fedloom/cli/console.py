"""The door to the terminal: everything that a command prints passes here, whoever wrote it.

A name of a site, a reason for a refusal, a label, a path, a library's error: any of them may hold characters that move the cursor,
colour or clear a screen, turn the direction of a line, or are not seen. They are printed as escapes, such as `\\x1b`. Nor are the
marks of rich (`[red]`, `[link=...]`, `:smile:`) read in any text: what is to be coloured is a `Text` of rich. Colours and cursor
movements of our own are styles, and are not text.
"""

from __future__ import annotations

import codecs
import json
import math
import shutil
import sys
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from datetime import datetime
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from fedloom.core.schema import jsonable
from fedloom.core.text import printable

ESCAPED = "fedloom.escaped"
"""Name of the error handler for letters that the encoding of a terminal lacks."""
PLAIN_MARKS = str.maketrans(
    {"\u00a0": " ", "\u2013": "-", "\u2026": "...", "\u00b1": "+-", "\u00d7": "x", "\u2192": "->"}
)


class SafeConsole(Console):
    """A console of rich that takes text as it stands, with escapes for control characters."""

    def __init__(self, **settings: Any) -> None:
        """With the settings of rich's console, such as stderr=True."""
        super().__init__(markup=False, emoji=False, highlight=False, **settings)
        self.verbose = False

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments of something to print, their texts made printable."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)


out = SafeConsole()
"""What a command answers, on stdout; nothing where the answer is JSON (`print_json`)."""
notes = SafeConsole()
"""What is said beside it: on stdout, on stderr where the answer is JSON, and not at all with `-q`."""
err = SafeConsole(stderr=True)
"""Errors and progress, on stderr; `err.verbose` (`-v`) asks for tracebacks."""


def reset_consoles() -> None:
    """Begin a command as if there were none before: without `-q`, `-v` and `--json`."""
    out.quiet = notes.quiet = notes.stderr = err.verbose = False


def complain(text: str, style: str = "bold red") -> None:
    """Print an error as one line."""
    err.print(Text.assemble(("fedloom:", style), f" {text}"), soft_wrap=True)


def print_traceback(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """Print an error that nobody has expected, for `sys.excepthook`; its message may repeat what somebody sent."""
    sys.stderr.write(printable("".join(traceback.format_exception(kind, error, where))))


def command_name() -> str:
    """Return what a user types to start this program again, for commands that are suggested."""
    name = Path(sys.argv[0])
    if name.name == "__main__.py":
        return "python -m fedloom"
    found = shutil.which(name.name)
    return name.name if found and Path(found).resolve() == name.resolve() else str(name)


def print_json(value: object) -> None:
    """Print the answer of a command as one line of JSON in ASCII, with keys in order; numbers that JSON lacks are null."""
    sys.stdout.write(json.dumps(_plain(value), sort_keys=True, allow_nan=False, default=jsonable) + "\n")


def _plain(value: object) -> object:
    """Return what JSON has for a value: dataclasses are objects, paths are texts, numbers that are not finite are None."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def print_now(line: str) -> None:
    """Print one line of what goes on, with the time of day."""
    out.print(Text.assemble((f"{datetime.now():%H:%M:%S}", "dim"), f" {printable(line, lines=False)}"), soft_wrap=True)


def write_any_text(stream: object) -> None:
    """Let a stream take any text: where it is not in UTF-8, as ASCII with escapes, which every terminal and every reader of a file
    shows alike; where it is, with escapes for what no text holds.
    """
    if isinstance(stream, TextIOWrapper):
        codecs.register_error(ESCAPED, _escape_letters)
        encoding = None if stream.encoding.lower().startswith("utf") else "ascii"
        stream.reconfigure(encoding=encoding, errors=ESCAPED)


def _escape_letters(error: UnicodeError) -> tuple[str, int]:
    """Spell marks of punctuation plainly, and escape all else."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end].translate(PLAIN_MARKS)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end
