"""Which columns of a table are what, guessed from their names, for somebody who only wants to look at the data."""

from __future__ import annotations

from collections.abc import Mapping

from fedloom.core.errors import Refused
from fedloom.data.examples import Examples
from fedloom.data.file_formats import Raw

ROLES: Mapping[str, tuple[str, ...]] = {
    "client": ("client", "client_id", "user", "user_id", "site", "hospital", "company", "device"),
    "text": (
        "text",
        "sentence",
        "sentence1",
        "question1",
        "premise",
        "instruction",
        "prompt",
        "request",
        "question",
        "title",
    ),
    "pair": ("sentence2", "question2", "hypothesis", "context", "input", "passage", "description"),
    "answer": ("answer", "response", "output", "completion", "target"),
    "label": ("label", "category", "intent", "class", "topic", "task"),
}
"""What a column can be, and names that say so, the likeliest first."""
MOST_LABELS = 200
"""A column with more values than this is not taken for one of labels, unless the user says so."""


def guessed(raw: Raw, given: Mapping[str, str]) -> dict[str, str]:
    """The column of each role: as `given`, else by its name; a role without one is left out.

    Raises:
        Refused: a role or a column that does not exist, or no column that would be the text.
    """
    have = {name.lower(): name for name in raw.columns}
    for role, name in given.items():
        if role not in ROLES:
            raise Refused("--column", f"{role}={name}", f"say what it is: one of {', '.join(ROLES)}")
        if name not in raw.columns:
            raise Refused("--column", name, f"no such column in {raw.where}; the columns are {', '.join(raw.columns)}")
    found = dict(given)
    for role, names in ROLES.items():
        own = next((have[name] for name in names if name in have and have[name] not in found.values()), None)
        if (
            role not in found
            and own is not None
            and (role != "label" or len(set(map(str, raw.columns[own]))) <= MOST_LABELS)
        ):
            found[role] = own
    if "text" not in found:
        remedy = f"none of {', '.join(raw.columns)} is known to be the text; say which with --column text=NAME"
        raise Refused("DATA", raw.where, remedy)
    return found


def as_examples(raw: Raw, roles: Mapping[str, str]) -> Examples:
    """The rows by these columns; what is missing is an empty text.

    Raises:
        Refused: no rows, or a row without a client.
    """
    columns = {
        role: ["" if value is None else str(value) for value in raw.columns[name]] for role, name in roles.items()
    }
    if not columns["text"]:
        raise Refused("DATA", raw.where, "there are no rows")
    owners = columns.get("client")
    if owners is not None and not all(map(str.strip, owners)):
        row = next(row for row, name in enumerate(owners, 1) if not name.strip())
        raise Refused("--clients", roles["client"], f"row {row} names no client; fill or drop it")
    kinds = columns.get("label", [""] * len(columns["text"]))
    names = tuple(sorted(set(kinds)))
    number = {name: k for k, name in enumerate(names)}
    return Examples(
        texts=tuple(columns["text"]),
        pairs=tuple(columns["pair"]) if "pair" in columns else None,
        labels=tuple(number[kind] for kind in kinds),
        names=names,
        clients=None if owners is None else tuple(owners),
        answers=tuple(columns["answer"]) if "answer" in columns else None,
    )
