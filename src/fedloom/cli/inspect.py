"""`fedloom inspect`: how heterogeneous the texts of clients are, before training, from the texts or from clients' summaries."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedloom.core.errors import Refused

if TYPE_CHECKING:
    from fedloom.data.client_summary import Summary
    from fedloom.data.examples import Examples

JUDGED, FEWEST, LONGEST = 300, 8, 128
"""Examples that a model judges: over all clients, at least of each one; and how many tokens of an example it reads."""
WORDS = ("Axis", "Client", "In words", "Commonest labels")
"""Columns of words, the others are of numbers."""


def inspect_command(
    data: Annotated[
        list[Path],
        typer.Argument(
            metavar="DATA...", help="A table (.csv, .tsv, .jsonl, .parquet, also .gz), or clients' summaries (.json)."
        ),
    ],
    clients: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="The column that names the client of each row.")
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--column", metavar="WHAT=NAME", help="Say what a column is: text, pair, answer or label; may be repeated."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="A language model that counts tokens and judges quality.")
    ] = None,
    page: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="The page to write; an older one is replaced.")
    ] = Path("inspect.html"),
    client_summary: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the summary of one client (.json), named as the file, and nothing else."
        ),
    ] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(metavar="E", help="Add noise to the summary: E-differential privacy for one example."),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...", help="With --epsilon: all labels that may occur (default: labels are left out)."
        ),
    ] = None,
) -> None:
    """Show how much clients' texts differ in length, quality, amount and label, and what that may do. Nothing is trained.

    Where texts must not leave a client, each client runs [bold]fedloom inspect DATA --client-summary NAME.json[/bold], which writes
    counts and no text, and whoever has all summaries runs [bold]fedloom inspect *.json[/bold].

    Example: [bold]fedloom inspect tickets.csv --clients company --column text=message[/bold]
    """
    from fedloom.data.client_summary import parse_summary

    out = Console(highlight=False)
    if client_summary is None and (epsilon is not None or labels is not None):
        raise Refused("--epsilon", epsilon, "noise and labels belong to a summary; add --client-summary FILE")
    files = [path for path in data if path.suffix == ".json"]
    if files:
        if len(files) < len(data) or clients or columns or model or client_summary:
            raise Refused("DATA", str(files[0]), "summaries stand alone: neither tables nor settings beside them")
        notes = [f"Read {len(files)} summaries; no text was needed."]
        _show(out, [parse_summary(_text(path), str(path)) for path in files], "Federation", notes, page)
        return
    if len(data) > 1:
        raise Refused("DATA", str(data[1]), "give one table, or several summaries (.json)")
    examples, notes = _load(data[0], clients, columns or [])
    for note in notes:
        out.print(note, markup=False, soft_wrap=True)
    if client_summary is not None:
        _write_summary(out, examples, client_summary, model, epsilon, [] if labels is None else labels.split(","))
        return
    parts = _parts(examples, data[0].name)
    judged = max(FEWEST, JUDGED // len(parts))
    unmeasured = "Quality was not measured: name a language model with --model."
    notes.append(
        unmeasured if model is None else f"{Path(model).name} judges at most {judged} examples of each client."
    )
    out.print(notes[-1], markup=False, soft_wrap=True)
    summaries = [_summary(name, part, model, judged) for name, part in parts.items()]
    _show(out, summaries, data[0].name, notes, page)


def _load(path: Path, clients: str | None, columns: Sequence[str]) -> tuple[Examples, list[str]]:
    """Read the examples of a table; also returns notes that say what each column was taken for."""
    from fedloom.data.file_formats import read_table_file
    from fedloom.data.table import as_examples, guess_columns

    named = {} if clients is None else {"client": clients}
    for setting in columns:
        role, equals, name = setting.partition("=")
        if not equals:
            raise Refused("--column", setting, "write it as WHAT=NAME, such as text=message")
        named[role] = name
    raw = read_table_file(path, None)
    roles = guess_columns(raw, named)
    used = ", ".join(f"{role} from “{name}”{'' if role in named else ' (guessed)'}" for role, name in roles.items())
    notes = [f"Read {path.name}: {used}."]
    if "client" not in roles:
        notes.append("No column names clients: all of it is shown as one client. Name one with --clients COLUMN.")
    return as_examples(raw, roles), notes


def _parts(examples: Examples, name: str) -> Mapping[str, Examples]:
    from fedloom.data.partition import ByClient

    if examples.clients is None:
        return {name: examples}
    return {client: examples.take(part) for client, part in ByClient().split(examples, 0).items()}


def _summary(name: str, examples: Examples, model: str | None, judged: int = JUDGED) -> Summary:
    from fedloom.data.client_summary import summarise

    if model is None:
        return summarise(name, examples)
    from fedloom.core.seeds import rng
    from fedloom.train.text_features import Tokens, quality_scores

    some = examples.take(sorted(rng(0, "judged", name).sample(range(len(examples)), min(judged, len(examples)))))
    seen = summarise(name, replace(some, quality=quality_scores(some, model, LONGEST)))
    return replace(summarise(name, examples, Tokens(model), f"tokens of {Path(model).name}"), quality=seen.quality)


def _write_summary(
    out: Console, examples: Examples, target: Path, model: str | None, epsilon: float | None, labels: Sequence[str]
) -> None:
    """Write the summary of one client."""
    from fedloom.data.client_summary import encode_summary, private_summary

    if target.suffix != ".json":
        raise Refused("--client-summary", str(target), "end its name with .json")
    if labels and epsilon is None:
        raise Refused("--labels", ",".join(labels), "without --epsilon the client's own labels are told; leave it out")
    summary = _summary(target.stem, examples, model)
    if epsilon is not None:
        summary = private_summary(summary, epsilon, secrets.randbits(63), labels)
    target.write_text(encode_summary(summary) + "\n", encoding="utf-8")
    named = f"{len(summary.labels)} labels by name" if summary.labels else "no labels"
    noise = f", with noise of epsilon {epsilon:g}" if epsilon is not None else ""
    out.print(
        f"\nSummary  {target}: client “{target.stem}”, counts of lengths{' and quality' if summary.quality else ''}, {named}{noise}; "
        "no text is in it. Whoever has those of several clients runs fedloom inspect *.json",
        markup=False,
        soft_wrap=True,
    )


def _show(out: Console, summaries: Sequence[Summary], name: str, notes: Sequence[str], page: Path) -> None:
    """Print the summaries, and write them as a page."""
    from fedloom.cli.tables import rich_table
    from fedloom.data.heterogeneity import measure_heterogeneity
    from fedloom.report import heterogeneity_page

    measured = measure_heterogeneity(summaries) if len(summaries) > 1 else None
    out.print(f"\n{heterogeneity_page.heterogeneity_sentence(summaries, measured)}\n", style="bold", markup=False)
    if measured is not None:
        out.print(rich_table(heterogeneity_page.axis_table(measured), WORDS))
    out.print(rich_table(heterogeneity_page.client_table(summaries, 10), WORDS))
    likely = heterogeneity_page.expected_effects(measured) if measured is not None else []
    for how, text in likely:
        out.print(f"{how} {text}", markup=False)
    if likely:
        out.print(" ".join(heterogeneity_page.HEDGE.split()), markup=False, style="dim")
    out.print(
        f"\nPage     {heterogeneity_page.write_heterogeneity_report(summaries, measured, name, notes, page)}",
        markup=False,
        soft_wrap=True,
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused("DATA", str(path), "there is no such file, or it is not text") from error
