"""`fedloom chat`: a conversation with the model of a run, in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from fedloom.cli.console import err, notes, out
from fedloom.cli.options import RunFolder
from fedloom.core.errors import Refused

END, ANEW = ("/quit", "/exit"), "/new"
"""Lines that end the conversation, or begin another one."""
CONTINUED = "\\"
"""End of a line that goes on in the next one."""
LONGEST_ANSWER = 128
"""Tokens of an answer where no other number is given."""


def chat_command(
    folder: RunFolder,
    tokens: Annotated[
        int, typer.Option("--tokens", metavar="N", help="The largest number of tokens of one answer.")
    ] = LONGEST_ANSWER,
) -> None:
    """Talk to the model of a run that writes text.

    Each line is a message; one that ends with a backslash goes on in the next line. [bold]/new[/bold] begins another conversation,
    [bold]/quit[/bold] or Ctrl-D ends. Answers are always the likeliest words, so the same messages get the same answers.

    Example: [bold]fedloom chat runs/demo-001[/bold]

    Without a terminal: [bold]echo "Write the headline." | fedloom chat runs/demo-001[/bold]
    """
    from fedloom.runs.run_result import open_result

    result, said = open_result(folder), list[dict[str, str]]()
    if not result.writes:
        raise Refused("run folder", str(folder), "its model chooses labels; use fedloom predict")
    _ = result.adapter  # loaded now: what is wrong with the folder is said before the first message
    notes.print("Type a message. /new begins another conversation, /quit ends.")
    for message in messages():
        if message == ANEW:
            said.clear()
            continue
        said.append({"role": "user", "content": message})
        (answer,) = result.generate([said], tokens, on_text=lambda piece: out.print(piece, end="", soft_wrap=True))
        said.append({"role": "assistant", "content": answer})
        out.print("\n" if answer else "(no answer)\n")


def messages() -> Iterator[str]:
    """Yield what the user types, message by message, until the end of the input or `/quit`; nothing of blanks alone."""
    parts = list[str]()
    while True:
        if sys.stdin.isatty():
            err.print("... " if parts else "> ", end="")
        line = sys.stdin.readline()
        text = line.rstrip("\n")
        if text.endswith(CONTINUED):
            parts.append(text.removesuffix(CONTINUED))
            continue
        message, parts = "\n".join([*parts, text]).strip(), []
        if message in END:
            return
        if message:
            yield message
        if not line:
            return
