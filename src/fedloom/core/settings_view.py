"""Settings as a person reads them: written as in Python without what is default, as a table, and what each field means.

The meaning of a field is its line under "Fields:" in the docstring of its class, so it is written once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sized
from dataclasses import MISSING, Field, fields, is_dataclass
from html import escape
from inspect import cleandoc
from textwrap import fill
from typing import Any

MOST_ITEMS = 16
"""Items of a tuple or a mapping that are written out."""
TERMINAL, NAME_WIDTH = 80, 13
"""Characters of a line in a terminal, and of those the ones for the name of a field."""
SCALARS = (str, int, float, bool, type(None))
SECTION = re.compile(r"^Fields\b.*:$")
ENTRY = re.compile(r"^ {4}(\w+(?:, \w+)*): (.*)$")


def field_texts(kind: type) -> dict[str, str]:
    """Return what each field of a dataclass means, in the order of its fields; a field without a line is left out.

    A line that names several fields (`up, down: ...`) stands for each of them.
    """
    texts = dict[str, str]()
    for base in reversed(kind.__mro__):
        texts |= _documented(vars(base).get("__doc__") or "")
    return {one.name: texts[one.name] for one in fields(kind) if one.name in texts}


def _documented(docstring: str) -> dict[str, str]:
    """The entries of the section "Fields:" of a docstring."""
    texts, current, inside = dict[str, str](), tuple[str, ...](), False
    for line in cleandoc(docstring).splitlines():
        if SECTION.match(line):
            inside = True
        elif inside and line and not line.startswith(" "):
            inside = False
        elif inside and (entry := ENTRY.match(line)):
            current = tuple(entry[1].split(", "))
            texts |= dict.fromkeys(current, entry[2])
        elif inside and line.strip():
            texts |= {name: f"{texts[name]} {line.strip()}" for name in current}
    return texts


def changed_fields(value: Any) -> dict[str, object]:
    """Return the fields of a dataclass that are not as by default."""
    given = {one.name: (one, getattr(value, one.name)) for one in fields(value) if one.init}
    return {name: content for name, (one, content) in given.items() if not _is_default(one, content)}


def _is_default(field: Field[Any], content: object) -> bool:
    if field.default is MISSING and field.default_factory is MISSING:
        return False
    default = field.default if field.default_factory is MISSING else field.default_factory()
    try:
        return content is default or (type(content) is type(default) and bool(content == default))
    except (TypeError, ValueError):  # a table of numbers compares to a table
        return False


def as_written(value: Any) -> str:
    """Return a value as one would write it in Python, without what is default. Of data it tells how many they are, and none of them.

    >>> as_written((2, 0.5, "a", None)), as_written([{"text": "a patient's"}])
    ("(2, 0.5, 'a', None)", '<list of 1>')
    """
    if is_dataclass(value) and not isinstance(value, type):
        given = ", ".join(f"{name}={as_written(content)}" for name, content in changed_fields(value).items())
        return f"{type(value).__name__}({given})"
    match value:
        case _ if hasattr(value, "__fspath__"):
            return repr(str(value))
        case _ if type(value) in SCALARS:
            return repr(value)
        case tuple():
            items = [as_written(item) for item in value[:MOST_ITEMS]] + ["..."] * (len(value) > MOST_ITEMS)
            return f"({', '.join(items)}{',' * (len(value) == 1)})"
        case Mapping() if len(value) <= MOST_ITEMS and all(type(item) in SCALARS for item in value.values()):
            return repr(dict(value))
        case _ if hasattr(value, "__name__"):
            return str(value.__name__)
        case Sized():
            return f"<{type(value).__name__} of {len(value)}>"
    return f"<{type(value).__name__}>"


def settings_text(value: Any) -> str:
    """Return settings as a table for a terminal: what was set, a field a line, then what is as by default."""
    given, below = changed_fields(value), " " * (NAME_WIDTH + 2)
    rows = [
        fill(as_written(content), TERMINAL, initial_indent=f"  {name:{NAME_WIDTH}s}", subsequent_indent=below)
        for name, content in given.items()
    ]
    defaults = fill(f"By default: {_defaults(value)}", TERMINAL, initial_indent="  ", subsequent_indent="  ")
    return "\n".join([type(value).__name__, *rows, defaults])


def settings_html(value: Any) -> str:
    """Return the same for a notebook; a field tells what it means when the pointer rests on it."""
    texts, left = field_texts(type(value)), 'style="text-align:left"'
    rows = "".join(
        f'<tr><th {left} title="{escape(texts.get(name, ""))}">{name}</th>'
        f"<td {left}><code>{escape(as_written(content))}</code></td></tr>"
        for name, content in changed_fields(value).items()
    )
    defaults = f"<details><summary>By default</summary><code>{escape(_defaults(value))}</code></details>"
    return f"<b>{type(value).__name__}</b><table>{rows}</table>{defaults}"


def _defaults(value: Any) -> str:
    given = changed_fields(value)
    names = [one.name for one in fields(value) if one.init and one.name not in given]
    return ", ".join(f"{name}={as_written(getattr(value, name))}" for name in names)
