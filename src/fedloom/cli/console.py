"""The door to the terminal: everything that a command prints passes here, whoever wrote it.

A name of a site, a reason for a refusal, a label, a path, a library's error: any of them may hold characters that move the cursor,
colour or clear a screen, turn the direction of a line, or are not seen. They are printed as escapes, such as `\\x1b`. Nor are the
marks of rich (`[red]`, `[link=...]`, `:smile:`) read in any text: what is to be coloured is a `Text` of rich. Colours and cursor
movements of our own are styles, and are not text.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from fedloom.core.text import printable


class SafeConsole(Console):
    """A console of rich that takes text as it stands, with escapes for control characters."""

    def __init__(self, **settings: Any) -> None:
        """With the settings of rich's console, such as stderr=True."""
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments of something to print, their texts made printable."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)


out = SafeConsole()
err = SafeConsole(stderr=True)


def print_traceback(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """Print an error that nobody has expected, for `sys.excepthook`; its message may repeat what somebody sent."""
    sys.stderr.write(printable("".join(traceback.format_exception(kind, error, where))))
