"""Text for messages, files and tokenizers: a library's error in one line, some of many names, the nearest, no halves of characters.

And text from others: what a terminal may show of it, and JSON of which nothing unexpected comes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from typing import Any

LONGEST_REASON = 160
"""Characters of a library's error that a message repeats."""
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
SURROGATE = re.compile("[\ud800-\udfff]")
CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\u3164\ufeff\uffa0\ufff0-\ufffb\U000e0000-\U000e0fff\ud800-\udfff]"
)
"""Characters that do something to a terminal, turn the direction of what follows, or cannot be seen: those of Unicode's class of
ignorable ones without the joiners U+200C and U+200D and the variants of emoji, which some languages need."""
BREAKS = re.compile("[\t\n]")
LONGEST_NUMBER = 40
"""Digits of a whole number in JSON that is read."""
LIKENESS = 0.7
"""Share of letters from which on a name may be another one that was mistyped, as `difflib` counts them."""
SHORTEST_PART = 3
"""Letters from which on a part of a name is near to it."""
AS_NEAR = 0.1
"""How much less alike than the nearest name another one may be to be offered beside it."""


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


def nearest_names(name: str, names: Iterable[str], most: int = 3, likeness: float = LIKENESS) -> list[str]:
    """Return at most so many names that this one may be a slip for, the nearest first; capitals and underscores do not count.

    A part of a name is near to it.

    >>> nearest_names("HLora", ["HLoRA", "FLoRA", "Rounds"]), nearest_names("size", ["batch_size", "weigh"])
    (['HLoRA'], ['batch_size'])
    """

    def plain(text: str) -> str:
        return text.casefold().replace("_", "").replace("-", "")

    given, shares = plain(name), dict[str, float]()
    matcher = SequenceMatcher(b=given)
    for other in names:
        matcher.set_seq1(plain(other))
        part = len(given) >= SHORTEST_PART and given in plain(other)
        shares[other] = max(matcher.ratio(), likeness if part else 0.0)
    least = max(likeness, max(shares.values(), default=0.0) - AS_NEAR)
    near = sorted((other for other in shares if shares[other] >= least), key=lambda other: (-shares[other], other))
    return near[:1] if near and plain(near[0]) == given else near[:most]


def did_you_mean(name: str, names: Iterable[str], likeness: float = LIKENESS) -> str:
    """Return the question whether one of the nearest names was meant; empty where none is near.

    >>> did_you_mean("HLora", ["HLoRA", "Rounds"]), did_you_mean("xyz", ["HLoRA"])
    ('did you mean HLoRA?', '')
    """
    near = nearest_names(name, names, likeness=likeness)
    return f"did you mean {' or '.join(near)}?" if near else ""


def has_surrogate(text: str) -> bool:
    """Whether a text holds half of a character (a lone surrogate): JSON allows it, Unicode, files and tokenizers do not."""
    return SURROGATE.search(text) is not None


def without_surrogates(text: str) -> str:
    """Return a text with a replacement character for each half of one.

    >>> without_surrogates("half an emoji: \\ud83d") == "half an emoji: \N{REPLACEMENT CHARACTER}"
    True
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def printable(text: str, lines: bool = True) -> str:
    """Return a text as a terminal may show it, with escapes for control characters and others that are not seen.

    `lines` keeps tabs and ends of lines; without it they are escaped too, for a text of others inside a line of ours. JSON stays
    the same JSON.

    >>> printable("ward-7\\x1b[2J"), printable("\\u202etxt.exe"), printable("one\\nline", lines=False)
    ('ward-7\\\\x1b[2J', '\\\\u202etxt.exe', 'one\\\\x0aline')
    """
    text = CONTROL.sub(_escape, text)
    return text if lines else BREAKS.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x20:
        return f"\\x{code:02x}"
    if code < 0x10000:
        return f"\\u{code:04x}"
    return "".join(f"\\u{half:04x}" for half in (0xD7C0 + (code >> 10), 0xDC00 + (code & 0x3FF)))


def parse_json(text: bytes | str) -> Any:
    """The data in a JSON text that may come from anybody: in UTF-8, a name once in an object, numbers finite and of some length.

    Raises ValueError, whatever the text is; it tells nothing of the data.
    """
    try:
        return _STRICT.decode(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ValueError("it is not in UTF-8") from error


def _object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) != len(items):
        raise ValueError("it has a name twice in an object")
    return found


def _whole(text: str) -> int:
    if len(text) > LONGEST_NUMBER:
        raise ValueError("it has a number of too many digits")
    return int(text)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError("it has a number that is not finite")
    return number


_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_int=_whole, parse_float=_finite, parse_constant=_finite)
