"""`fedloom predict`: the labels, or the answers, that the model of a run gives to new texts."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedloom.cli.console import out, print_json
from fedloom.cli.options import AsJson, RunFolder
from fedloom.core.errors import Refused
from fedloom.core.files import atomic_write

if TYPE_CHECKING:
    from fedloom.runs.run_result import RunResult

SHOWN = 5
"""Labels of one text that are printed."""
TEXT_FIELDS, PAIR_FIELDS = ("text", "instruction"), ("pair", "context")
"""Fields of a source that name the columns of a text, and of what belongs to it."""


def predict_command(
    folder: RunFolder,
    given: Annotated[
        str,
        typer.Argument(
            metavar="FILE|TEXT", help="A table of texts (CSV, JSON, Excel, Parquet), or one text in quotes."
        ),
    ],
    columns: Annotated[
        list[str] | None,
        typer.Option("--column", metavar="WHAT=NAME", help="Say what a column is: text or pair; may be repeated."),
    ] = None,
    target: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The CSV file to write; by default it is printed.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Predict with the model of a run: the label of each text, or the answer where the model writes.

    Columns are those that the run was trained on where the table has them. The output has the number of each row, its label and how
    probable it is, or its answer; the texts are not repeated.

    Example: [bold]fedloom predict runs/mine new-tickets.csv --out labels.csv[/bold]

    One text: [bold]fedloom predict runs/mine "My parcel has not arrived"[/bold]
    """
    from fedloom.runs.run_result import open_result

    if target is not None and target.exists():
        raise Refused("--out", str(target), "it exists already; name another file")
    result = open_result(folder)
    path = Path(given)
    if path.is_file() or path.is_dir() or _looks_like_path(given):
        numbers, texts = read_texts(path, result.log.manifest["run"].get("data", {}), columns or [])
    else:
        numbers, texts = [1], [given]
    rows = [{"row": number, **found} for number, found in zip(numbers, _predicted(result, texts), strict=True)]
    if as_json:
        print_json({"predictions": rows})
    elif target is not None:
        with atomic_write(target) as draft:
            draft.write_text(_as_csv(rows), encoding="utf-8")
        out.print(f"{len(rows):,} predictions  {target}", soft_wrap=True)
    elif texts == [given]:
        for line in _one_text(result, given):
            out.print(line, soft_wrap=True)
    else:
        out.print(_as_csv(rows), soft_wrap=True, end="")


def _looks_like_path(given: str) -> bool:
    from fedloom.data.file_formats import SUFFIXES

    return not any(map(str.isspace, given)) and Path(given).suffix.lower() in SUFFIXES


def read_texts(path: Path, source: Mapping[str, Any], columns: Sequence[str]) -> tuple[list[int], list[Any]]:
    """Return the numbers of a table's rows, and their texts or pairs of texts.

    Args:
        path: the table.
        source: the settings of the data that the run was trained on.
        columns: what columns are, each as "text=NAME".

    Raises:
        Refused: no column of texts, or none of the second texts that the run was trained with.
    """
    from fedloom.data.cells import check_columns, column_texts, describe_columns
    from fedloom.data.file_formats import read_table_file
    from fedloom.data.raw_table import row_count
    from fedloom.data.table import guess_columns

    if not path.exists():
        raise Refused("FILE", str(path), "there is no such file; put a text with blanks into quotes")
    raw, chosen = read_table_file(path), dict[str, str]()
    for column in columns:
        role, equals, name = column.partition("=")
        if role not in ("text", "pair") or not equals:
            raise Refused("--column", column, "write text=NAME or pair=NAME")
        chosen[role] = name
    found = {role: [name] for role, name in chosen.items()}
    for role, names in (("text", TEXT_FIELDS), ("pair", PAIR_FIELDS)):
        trained = next((_columns(source[name]) for name in names if source.get(name)), [])
        if role not in found and trained and set(trained) <= set(raw.columns):
            found[role] = trained
        elif role not in found and role == "pair" and trained and source.get("pair"):
            remedy = f"the run was trained on pairs, and {raw.where} has no such column; {describe_columns(raw)}"
            raise Refused("--column", "+".join(trained), f"{remedy}; say which with --column pair=NAME")
    if "text" not in found:
        found["text"] = [guess_columns(raw, chosen)["text"]]
    check_columns(raw, found)
    texts, pairs = (column_texts(raw, role, found[role]) if role in found else None for role in ("text", "pair"))
    rows = list(texts or ()) if pairs is None else list(zip(texts or (), pairs, strict=True))
    return [raw.number(index) for index in range(row_count(raw))], rows


def _columns(names: Any) -> list[str]:
    return names.split("+") if isinstance(names, str) else list(names)


def _predicted(result: RunResult, texts: Sequence[Any]) -> list[dict[str, object]]:
    """What the model says to each text."""
    if result.writes:
        return [{"answer": answer} for answer in result.generate(texts)]
    found = result.predict_proba(texts)
    rows = found if isinstance(found, list) else found.to_dict("records")
    best = [max(row, key=row.__getitem__) for row in rows]
    return [{"label": label, "probability": round(row[label], 6)} for label, row in zip(best, rows, strict=True)]


def _one_text(result: RunResult, text: str) -> list[str]:
    if result.writes:
        return result.generate(text)
    found = result.predict_proba(text)
    (row,) = found if isinstance(found, list) else found.to_dict("records")
    ordered = sorted(row.items(), key=lambda item: -item[1])[:SHOWN]
    width = max(len(label) for label, _ in ordered)
    return [f"{label:{width}s}  {100 * share:5.1f} %" for label, share in ordered]


def _as_csv(rows: Sequence[Mapping[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [*rows[0]] if rows else ["row"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
