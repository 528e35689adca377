"""Meaning of a cell, whatever format it came from: a text, the name of a label or client, or nothing.

One rule of identity holds for labels and clients. Texts are stripped of blanks, also invisible ones, and brought to one form of
Unicode (NFC). A whole number is the same written 1, 1.0 or "1"; one with leading zeros is a code and stays as it is. `True`,
`TRUE` and "true" are the word true, which is no number.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from math import isfinite
from typing import NamedTuple

from fedloom.core.errors import Refused
from fedloom.core.text import has_surrogate
from fedloom.data.raw_table import RawTable, row_count, strip_blanks

WHOLE = re.compile(r"([-+\u2212]?)(0|[1-9][0-9]*)(?:\.0*|,00?)?")
"""A whole number, also as a column of decimal numbers or a spreadsheet writes it; not 007, nor 1,000."""
NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:[.,][0-9]*)?|[.,][0-9]+)(?:[eE][+-]?[0-9]+)?")
FRACTION = re.compile(r"[+-]?[0-9]*[.,][0-9]*[1-9][0-9]*|.*[eE]-[0-9]+")
SCIENTIFIC = re.compile(r"([-+]?)([0-9])(?:\.([0-9]*))?[eE]([-+]?[0-9]{1,2})")
"""A number as numpy and others write it by default, such as 1.000e+00."""
ROUNDED = re.compile(r"[+-]?[0-9]+(?:[.,][0-9]+)?[eE]\+[0-9]+")
"""A long number as a spreadsheet shows it: its last digits are lost."""
COLUMN_NAME = re.compile(r"(?!.* .* .* )[\w .()/%#&-]{1,40}")
"""What names of columns look like: up to three words, and no sentence."""
MOST_LISTED = 30
"""Names of columns that a message lists at most."""
LARGEST_EXACT = 2**53
"""Whole numbers from here on are not all different as floating numbers of 64 bits."""
FEWEST_ROWS = 20
"""Rows from which on a label of a single row is noted."""
LISTING = (";", ",", "|")
"""What people write between several labels in one cell."""
MOST_CLASSES = 20
"""A column with more values than this, and more than half as many as rows, is not taken for one of labels."""


class Identities(NamedTuple):
    """Identities of the cells of a column of labels or clients, and notes on names that are written in several ways."""

    values: list[str]
    notes: list[str]


def identity(value: object) -> str:
    """Return what a label or client is called that a cell holds.

    >>> [identity(value) for value in (1, 1.0, "1", "1.0 ", "+1", "1.0e+00", "-0", "007", True, "TRUE", "yes\\u200b", 2.5)]
    ['1', '1', '1', '1', '1', '1', '0', '007', 'true', 'true', 'yes', '2.5']
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float | Decimal) and isfinite(value) and value % 1 == 0:
        return str(int(value))
    text = unicodedata.normalize("NFC", strip_blanks(str(value)))
    if text in ("True", "TRUE", "False", "FALSE"):
        return text.lower()
    if (found := SCIENTIFIC.fullmatch(text)) is not None and int(found[4]) <= len(found[3] or ""):
        text = f"{Decimal(text):f}"  # all its digits are there
    whole = WHOLE.fullmatch(text)
    return text if whole is None else "0" if whole[2] == "0" else whole[1].strip("+").replace("\u2212", "-") + whole[2]


def is_missing(value: object) -> bool:
    """Whether a cell holds nothing, or blanks only. The words null, NA and nan are words."""
    return value is None or (isinstance(value, str) and not strip_blanks(value))


def by_number(value: str) -> tuple[float, str]:
    """Sort key: numbers by size, before words by letter."""
    return (float(value.replace(",", ".")) if NUMBER.fullmatch(value) else float("inf")), value


# Columns --------------------------------------------------------------------------------------------------------------------


def check_columns(raw: RawTable, names: Mapping[str, Sequence[str]]) -> None:
    """Raise Refused where there are no rows, or where a field names a column that is not there."""
    if not row_count(raw):
        raise Refused("data.path", raw.where, "there are no rows")
    for field, columns in names.items():
        for name in columns:
            if name not in raw.columns:
                raise Refused(f"data.{field}", name, f"no such column in {raw.where}; {describe_columns(raw)}")


def describe_columns(raw: RawTable) -> str:
    """Say which columns there are, unless the first row may be data or a remark: no value of a cell is ever shown."""
    names = list(raw.columns)
    if raw.advice is None:
        shown = [name for name in names if COLUMN_NAME.fullmatch(name)][:MOST_LISTED]
        parts = [f"the columns are {', '.join(shown)}"] if shown else []
        if len(shown) < len(names):
            parts.append(f"{len(names) - len(shown)} columns have names that are not shown")
        return "; ".join(parts)
    advice = f"; {raw.advice}" if raw.advice else ""
    if any(NUMBER.fullmatch(name) or name in raw.columns[name] for name in names):
        return "its first row looks like data, not like names of columns: write a row of names above it, such as text,label"
    if len(names) < 2 or not all(COLUMN_NAME.fullmatch(name) for name in names):
        return f"the names of its columns ({len(names)}) have to stand in its first row, such as text,label{advice}"
    more = f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    return f"the columns are {', '.join(names[:MOST_LISTED])}{more}{advice}"


def drop_missing(raw: RawTable, names: Mapping[str, Sequence[str]], missing: str) -> RawTable:
    """Return the rows in which every field has a value, in at least one of its columns.

    Raises:
        Refused: there are others, and `missing` is not "drop". It counts all of them.
    """
    empty = {
        field: [
            index
            for index, cells in enumerate(zip(*(raw.columns[name] for name in columns), strict=True))
            if all(map(is_missing, cells))
        ]
        for field, columns in names.items()
    }
    empty = {field: indices for field, indices in empty.items() if indices}
    if not empty:
        return raw
    counts = [f"{'+'.join(names[field])} is empty in {raw.rows(indices)}" for field, indices in empty.items()]
    size, gone = row_count(raw), {index for indices in empty.values() for index in indices}
    if missing != "drop":
        field = next(iter(empty))
        remedy = 'fill the cells, or leave these rows out with --set data.missing=drop (missing = "drop" in a site\'s settings)'
        raise Refused(
            f"data.{field}",
            "+".join(names[field]),
            f"{len(gone)} of the {size} rows of {raw.where} lack a value ({'; '.join(counts)}); {remedy}",
        )
    note = f"{len(gone)} of {size} rows of {raw.where} lack a value and are left out ({'; '.join(counts)})."
    if len(gone) == size:
        raise Refused("data.path", raw.where, f"none of its {size} rows has all values ({'; '.join(counts)})")
    rest = raw.select(index for index in range(size) if index not in gone)
    return rest._replace(notes=(*raw.notes, note))


def column_texts(raw: RawTable, field: str, names: Sequence[str]) -> tuple[str, ...]:
    """Return the texts of a column, or of several joined by ". "; numbers as they are written. Empty cells are left out.

    Raises:
        Refused: cells that are no text, such as lists.
    """
    each = [_as_texts(raw, field, name) for name in names]
    return tuple(". ".join(part for part in parts if strip_blanks(part)) for parts in zip(*each, strict=True))


def _as_texts(raw: RawTable, field: str, name: str) -> list[str]:
    cells = raw.columns[name]
    _refuse_types(raw, field, name, "not text")
    return [cell if isinstance(cell, str) else "" if cell is None else identity(cell) for cell in cells]


def _refuse_types(raw: RawTable, field: str, name: str, expected: str) -> None:
    """Raise Refused for cells that are neither text nor number."""
    plain = str | int | float | Decimal | None
    if wrong := [index for index, cell in enumerate(raw.columns[name]) if not isinstance(cell, plain)]:
        kind = type(raw.columns[name][wrong[0]]).__name__
        raise Refused(f"data.{field}", name, f"{raw.rows(wrong)} of {raw.where}: a value of type {kind}, {expected}")


def column_identities(raw: RawTable, field: str, name: str) -> Identities:
    """Return what each cell of a column of labels or clients stands for, with notes on names that are written in several ways.

    No cell may be missing (`drop_missing`). No note and no message shows a cell.

    Raises:
        Refused: cells that are no word and no number, and numbers that lost their last digits on the way.
    """
    _refuse_types(raw, field, name, "not a word or a number")
    cells = raw.columns[name]
    if rounded := [index for index, cell in enumerate(cells) if _lost_digits(cell)]:
        reason = "a number without end, or whose last digits are lost (as in spreadsheets and decimal columns)"
        raise Refused(f"data.{field}", name, f"{raw.rows(rounded)} of {raw.where}: {reason}; write the column as text")
    values = [identity(cell) for cell in cells]
    if broken := [index for index, value in enumerate(values) if has_surrogate(value)]:
        raise Refused(
            f"data.{field}",
            name,
            f"{raw.rows(broken)} of {raw.where}: half of a character (a lone surrogate); mend the cells",
        )
    return Identities(values, [*_spelling_notes(raw, name, values), *_likeness_notes(raw, name, values)])


def _lost_digits(cell: object) -> bool:
    if isinstance(cell, float):
        return abs(cell) >= LARGEST_EXACT
    if isinstance(cell, Decimal):
        return cell.is_infinite()
    if not isinstance(cell, str):
        return False
    text = strip_blanks(cell)
    return bool(ROUNDED.fullmatch(identity(text))) or (
        text.endswith(".0") and WHOLE.fullmatch(text) is not None and abs(float(text)) >= LARGEST_EXACT
    )


def _spelling_notes(raw: RawTable, name: str, values: Sequence[str]) -> Iterator[str]:
    """Note names that stand there in several ways, such as 1 and 1.0."""
    spellings = defaultdict[str, dict[tuple[bool, str], int]](dict)
    for index, (value, cell) in enumerate(zip(values, raw.columns[name], strict=True)):
        spellings[value].setdefault((isinstance(cell, str), str(cell)), index)
    several = [sorted(ways.values()) for ways in spellings.values() if len(ways) > 1]
    if several:
        yield (
            f"{_names(len(several), 'is', 'are')} written in more than one way in the column {name!r} of {raw.where} "
            f"(such as 1 and 1.0, or with a blank at the end; first in {raw.rows(several[0])}): each counts as one."
        )


def _likeness_notes(raw: RawTable, name: str, values: Sequence[str]) -> Iterator[str]:
    """Note different names that differ in case, inner blanks or leading zeros only."""
    alike = defaultdict[str, dict[str, int]](dict)
    for index, value in enumerate(values):
        if not value:  # `fedloom inspect` leaves empty cells in
            continue
        folded = " ".join(value.casefold().split())
        alike[folded.lstrip("0") or "0"].setdefault(value, index)
    several = [sorted(group.values()) for group in alike.values() if len(group) > 1]
    if several:
        yield (
            f"{_names(sum(map(len, several)), 'is', 'are')} told apart by case, inner blanks or leading zeros only in the column "
            f"{name!r} of {raw.where} (first in {raw.rows(several[0])}): they count as different."
        )


def _names(count: int, one: str, many: str) -> str:
    return f"1 name {one}" if count == 1 else f"{count} names {many}"


def check_classes(raw: RawTable, field: str, name: str, values: Sequence[str]) -> None:
    """Raise Refused where a column does not look like one of classes: numbers with fractions, numbers among words, or values that
    hardly ever repeat.
    """
    named = "or name each class, as in --set \"data.labels=('low', 'high')\""
    fractions = [index for index, value in enumerate(values) if FRACTION.fullmatch(value)]
    if fractions and all(map(NUMBER.fullmatch, values)):
        remedy = (
            f"{raw.rows(fractions)} of {raw.where}: a number with a fraction is a score, not a class (a label is a word or a whole "
            f"number); choose another column with --set data.{field}=COLUMN, {named}"
        )
        raise Refused(f"data.{field}", name, remedy)
    numbers = [index for index, value in enumerate(values) if NUMBER.fullmatch(value)]
    if numbers and len(numbers) < len(values):
        words = sorted(set(range(len(values))) - set(numbers))
        few = min(numbers, words, key=len)
        kinds = ("numbers", "words") if few is numbers else ("words", "numbers")
        remedy = f"{raw.rows(few)} of {raw.where}: {kinds[0]} among {kinds[1]}; write all labels in one way, {named}"
        raise Refused(f"data.{field}", name, remedy)
    different = len(set(values))
    if different > MOST_CLASSES and different > len(values) / 2:
        remedy = f"{different} different values in {len(values)} rows of {raw.where} are no classes; choose another column with"
        raise Refused(f"data.{field}", name, f"{remedy} --set data.{field}=COLUMN, {named}")


def class_notes(raw: RawTable, name: str, values: Sequence[str]) -> Iterator[str]:
    """Note what may be no classes: many numbers, labels of a single row, and labels that are several others in one cell."""
    different = set(values)
    if len(different) > MOST_CLASSES and all(map(NUMBER.fullmatch, different)):
        yield (
            f"{len(different)} numbers in the column {name!r} of {raw.where} are taken for as many classes; "
            "if they are scores or ids, choose another column with data.label."
        )
    counts = Counter(values)
    single = [index for index, value in enumerate(values) if counts[value] == 1]
    if single and len(values) >= FEWEST_ROWS:
        yield (
            f"{len(single)} of {len(different)} labels in the column {name!r} of {raw.where} have a single row "
            f"({raw.rows(single)}): misspelt, or no label?"
        )
    for sign in LISTING:
        several = [{part.strip() for part in value.split(sign)} for value in different if sign in value]
        uses = Counter(part for parts in [*several, *({value} for value in different)] for part in parts)
        if several and all("" not in parts and max(map(uses.__getitem__, parts)) > 1 for parts in several):
            yield (
                f"{_names(len(several), 'has', 'have')} {sign!r} between other names in the column {name!r} of {raw.where}: "
                "each combination counts as a class of its own, as an example has one label."
            )


def refuse_unknown(raw: RawTable, field: str, name: str, values: Sequence[str], known: Iterable[str]) -> None:
    """Raise Refused where values of a column are not among the known ones; it counts the rows of all of them."""
    names = set(known)
    if unknown := [index for index, value in enumerate(values) if value not in names]:
        remedy = f"{raw.rows(unknown)} of {raw.where}: none of the {len(names)} known labels; name all in data.labels"
        raise Refused(f"data.{field}", name, remedy)
