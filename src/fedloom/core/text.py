"""Text for messages, files and tokenizers: a library's error in one line, some of many names, no halves of characters."""

from __future__ import annotations

import re
from collections.abc import Sequence

LONGEST_REASON = 160
"""Characters of a library's error that a message repeats."""
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
SURROGATE = re.compile("[\ud800-\udfff]")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without colours; the name of its class where the message is empty.

    >>> first_line(OSError("\\n\\x1b[31mno such file\\x1b[0m\\nsecond line")), first_line(KeyError())
    ('no such file', 'KeyError')
    """
    return _lines(error)[0][:LONGEST_REASON]


def last_line(error: BaseException) -> str:
    """Return the last line of an error's message, where PEFT and torch say which layer it is about."""
    return _lines(error)[-1][:LONGEST_REASON]


def _lines(error: BaseException) -> list[str]:
    lines = map(str.strip, without_colours(str(error)).splitlines())
    return [line for line in lines if line] or [type(error).__name__]


def without_colours(text: str) -> str:
    """Return a text without the codes by which libraries colour it in a terminal."""
    return COLOUR.sub("", text)


def list_some(names: Sequence[str], most: int) -> str:
    """Return the first of these names, at most so many, and how many more there are.

    >>> list_some(["query", "key", "value"], 2)
    'query, key and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def has_surrogate(text: str) -> bool:
    """Whether a text holds half of a character (a lone surrogate): JSON allows it, Unicode, files and tokenizers do not."""
    return SURROGATE.search(text) is not None


def without_surrogates(text: str) -> str:
    """Return a text with a replacement character for each half of one.

    >>> without_surrogates("half an emoji: \\ud83d") == "half an emoji: \N{REPLACEMENT CHARACTER}"
    True
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
