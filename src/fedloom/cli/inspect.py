"""`fedloom inspect`: what is doubtful about a table, and how much clients' texts differ, before anything is trained.

It reads a table, or the summaries of clients whose texts must not leave them.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from fedloom.cli.console import out, print_json
from fedloom.cli.options import AsJson, ClientColumn, Columns, Reading, file_format, named_columns
from fedloom.core.errors import Refused

if TYPE_CHECKING:
    from fedloom.data.client_summary import Summary
    from fedloom.data.delimited import FileFormat
    from fedloom.data.examples import Examples
    from fedloom.data.raw_table import RawTable

JUDGED, FEWEST, LONGEST = 300, 8, 128
"""Examples that a model judges: over all clients, at least of each one; and how many tokens of an example it reads."""
LENGTHS = (64, 128, 256, 512, 1024, 2048)
"""Values of `max_length` for which is said how many examples would be cut."""
LEARNT = (">>", "<<")
"""What stands around the tokens that a model learns to write."""
WORDS = ("Axis", "Client", "In words", "Commonest labels")
"""Columns of words, the others are of numbers."""


def inspect_command(  # noqa: PLR0913  # they are its options
    data: Annotated[
        list[Path],
        typer.Argument(
            metavar="DATA...",
            help="A table (CSV, JSON, Excel, Parquet, Arrow, a database with --read query=...), or clients' summaries (.json).",
        ),
    ],
    clients: ClientColumn = None,
    columns: Columns = None,
    read: Reading = None,
    test: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The test examples: says which of them are in DATA, too.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A model that counts tokens; a language model also judges quality."),
    ] = None,
    show: Annotated[
        int, typer.Option(metavar="N", help="Print the first N examples as the model reads them (with --model).")
    ] = 0,
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
        typer.Option(
            metavar="X", help="Add noise to the summary: differential privacy of this epsilon for one example."
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...", help="With --epsilon: all labels that may occur (default: labels are left out)."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a table before training: how it was read, empty cells, repeated texts, rare labels, what would be truncated.

    Then show how much clients differ in lengths, quality, sizes and labels, and what that may cause. Nothing is trained.

    Where texts must not leave a client, each client runs [bold]fedloom inspect DATA --client-summary NAME.json[/bold]. It writes
    counts and no text. Whoever has all summaries runs [bold]fedloom inspect *.json[/bold].

    Example: [bold]fedloom inspect tickets.csv --clients company --column text=message[/bold]

    As the model reads them: [bold]fedloom inspect tickets.csv --model models/encoder --show 3[/bold]
    """
    from fedloom.data.client_summary import parse_summary
    from fedloom.report.numbers import plural

    if client_summary is None and (epsilon is not None or labels is not None):
        raise Refused("--epsilon", epsilon, "noise and labels belong to a summary; add --client-summary FILE")
    if show and model is None:
        raise Refused("--show", show, "name the model that would read the examples with --model")
    if data[0].suffix in (".toml", ".py"):
        raise Refused("DATA", str(data[0]), "this is a run file; name its table, or see `fedloom run FILE --dry-run`")
    files = [path for path in data if path.suffix == ".json" and not _is_table(path)]
    if files:
        if len(files) < len(data) or clients or columns or model or client_summary:
            raise Refused("DATA", str(files[0]), "summaries stand alone: neither tables nor settings beside them")
        notes = [f"Read the summaries of {plural(len(files), 'client')}; no text was needed."]
        _show([parse_summary(_text(path), str(path)) for path in files], "Federation", notes, page, as_json)
        return
    if len(data) > 1:
        raise Refused("DATA", str(data[1]), "give one table, or several summaries (.json)")
    found = _load(data[0], test, named_columns(clients, columns or []), file_format(read or []))
    examples, notes = found.examples, [*found.notes, *_findings(found)]
    if model is not None:
        notes += _length_notes(examples, model)
    for note in notes:
        out.print(note, soft_wrap=True)
    if show and model is not None:
        _show_examples(examples.take(range(min(show, len(examples)))), model)
    if client_summary is not None:
        _write_summary(examples, client_summary, model, epsilon, [] if labels is None else labels.split(","))
        if as_json:
            print_json({"summary": client_summary, "notes": notes})
        return
    parts = _parts(examples, data[0].name)
    judged, note = _judged(examples, model, max(FEWEST, JUDGED // len(parts)))
    notes.append(note)
    out.print(note, soft_wrap=True)
    summaries = [_summary(name, part, model, judged) for name, part in parts.items()]
    _show(summaries, data[0].name, notes, page, as_json)


# The table ----------------------------------------------------------------------------------------------------------------


class _InspectedTable(NamedTuple):
    """A table, its test rows if there are any, the column of each role, the examples of both, and notes on how it was read."""

    raw: RawTable
    roles: Mapping[str, str]
    examples: Examples
    tested: Examples | None
    notes: list[str]


def _is_table(path: Path) -> bool:
    """Whether a JSON file holds rows, and no summary of a client."""
    try:
        whole = json.loads(_text(path))
    except ValueError:  # a row a line
        return True
    return not isinstance(whole, dict) or (
        "lengths" not in whole and any(isinstance(part, list | dict) for part in whole.values())
    )


def _load(path: Path, test: Path | None, named: Mapping[str, str], how: FileFormat) -> _InspectedTable:
    """Read a table and make examples of it; the notes say how it was read, and what each column was taken for."""
    from fedloom.data.file_formats import read_table_file, read_tables
    from fedloom.data.instructions import conversation_columns
    from fedloom.data.table import guess_columns

    try:
        raw, tested = read_tables(str(path), how)
        tested = read_table_file(test, how) if test is not None else tested
        conversations = conversation_columns(raw)
        roles = guess_columns(raw, {"text": conversations[0], **named} if len(conversations) == 1 else named)
    except Refused as error:
        raise Refused(error.field, error.value, error.remedy.replace("--set data.", "--read ")) from error
    used = ", ".join(f"{role} from “{name}”{'' if role in named else ' (guessed)'}" for role, name in roles.items())
    notes = [f"Read {path.name}: {used}.", *raw.notes]
    if "client" not in roles:
        notes.append("No column names clients: all of it is shown as one client. Name one with --clients COLUMN.")
    examples, spelled = _examples(raw, roles)
    if "label" not in roles and not examples.answers:
        notes.append("No column was taken for labels. Name it with --column label=NAME.")
    have = {role: name for role, name in roles.items() if tested is not None and name in tested.columns}
    if tested is not None and "text" not in have:
        spelled = [*spelled, f"{tested.where} has no column “{roles['text']}”: it is not compared."]
    both = None if tested is None or "text" not in have else _examples(tested, have)[0]
    spelled = [note.replace("--set data.label=", "--column label=") for note in spelled]
    return _InspectedTable(raw, roles, examples, both, [*notes, *spelled])


def _examples(raw: RawTable, roles: Mapping[str, str]) -> tuple[Examples, Sequence[str]]:
    """Make examples of labelled texts, of requests with answers, or of conversations, and notes on them."""
    from fedloom.data.instructions import Instructions, conversation_columns
    from fedloom.data.table import as_examples

    if roles["text"] not in conversation_columns(raw):
        return as_examples(raw, roles)
    rows = raw._replace(notes=())
    source = Instructions(
        rows, rows, messages=roles["text"], client=roles.get("client"), kind=roles.get("label"), missing="drop"
    )
    split = source.load(0)  # nothing is set aside where test rows are given; they are the same rows
    return split.train, [note for note in split.notes if " test rows " not in note]


def _findings(found: _InspectedTable) -> list[str]:
    """Say what is doubtful about the examples."""
    from fedloom.data import data_checks

    return [
        *data_checks.missing_sentences(found.raw, found.roles),
        *data_checks.label_sentences(found.examples),
        *data_checks.repeat_sentences(found.examples),
        *(data_checks.overlap_sentences(found.examples, found.tested) if found.tested else ()),
    ]


def _length_notes(examples: Examples, model: str) -> list[str]:
    """Say how long examples are in tokens, and how many would be cut at which `max_length`."""
    from fedloom.train.pretrained import load_tokenizer
    from fedloom.train.tokenised import encode_texts

    tokenizer = load_tokenizer(model)
    ids = encode_texts(examples, tokenizer, 10**6).ids
    lengths, unknown = [*map(len, ids)], tokenizer.unk_token_id
    longest, middle = max(lengths), sorted(lengths)[len(lengths) // 2]
    cut = [(most, sum(length > most for length in lengths)) for most in LENGTHS]
    said = ", ".join(f"{count} at {most}" for most, count in cut if count) or f"none at {LENGTHS[0]}"
    lines = [f"The longest example has {longest} tokens, the median is {middle}. Cut at max_length: {said}."]
    if longest > tokenizer.model_max_length:
        over = sum(length > tokenizer.model_max_length for length in lengths)
        lines.append(f"{over} examples are longer than the {tokenizer.model_max_length} tokens that the model reads.")
    if foreign := sum(row.count(unknown) for row in ids if unknown is not None):
        share = 100 * foreign / sum(lengths)
        lines.append(f"{share:.1f} % of all tokens are unknown to the tokenizer ({tokenizer.unk_token}).")
    return lines


def _show_examples(examples: Examples, model: str) -> None:
    """Print examples as the model reads them: with its special tokens, and marks around what it learns to write."""
    from fedloom.train.pretrained import load_tokenizer
    from fedloom.train.tokenised import IGNORED, encode_texts

    tokenizer = load_tokenizer(model)
    texts = encode_texts(examples, tokenizer, min(max(LENGTHS), tokenizer.model_max_length))
    legend = f"{LEARNT[0]} {LEARNT[1]} stand around what is learnt" if examples.answers else "then the label, if known"
    out.print(f"\nAs the model {Path(model).name} reads them, special tokens included ({legend}):", style="bold")
    for number, ids in enumerate(texts.ids):
        targets = [IGNORED] * len(ids) if texts.answer_starts is None else texts.targets(number)
        spans = []
        for learnt, span in groupby(zip(ids, targets, strict=True), lambda token: token[1] != IGNORED):
            text = str(tokenizer.decode([token for token, _ in span], skip_special_tokens=False))
            spans.append(f"{LEARNT[0]}{text}{LEARNT[1]}" if learnt else text)
        name = "" if examples.answers else examples.names[examples.labels[number]]
        label = f"  -> {name}" if name else ""
        out.print(f"{number + 1}. ({len(ids)} tokens) {''.join(spans)}{label}", soft_wrap=True)


# Clients ------------------------------------------------------------------------------------------------------------------


def _parts(examples: Examples, name: str) -> Mapping[str, Examples]:
    from fedloom.data.partition import ByClient

    if examples.clients is None:
        return {name: examples}
    return {client: examples.take(part) for client, part in ByClient().split(examples, 0).items()}


def _judged(examples: Examples, model: str | None, most: int) -> tuple[int, str]:
    """Return how many examples of each client the model judges, at `most` and 0 where it cannot, and a note on that."""
    if model is None:
        return 0, "Quality was not measured: name a language model with --model."
    from fedloom.train.text_features import quality_scores

    try:
        quality_scores(examples.take(range(1)), model, LONGEST)
    except Refused as error:  # an encoder without the head of a language model, which counts tokens all the same
        return 0, f"Quality was not measured: {error.remedy}."
    return most, f"{Path(model).name} judges at most {most} examples of each client."


def _summary(name: str, examples: Examples, model: str | None, judged: int = JUDGED) -> Summary:
    """Summarise one client; its tokens are counted with the model, which judges so many of its examples."""
    from fedloom.data.client_summary import summarise

    if model is None:
        return summarise(name, examples)
    from fedloom.core.seeds import rng
    from fedloom.train.text_features import Tokens, quality_scores

    counted = summarise(name, examples, Tokens(model), f"tokens of {Path(model).name}")
    if not judged:
        return counted
    some = examples.take(sorted(rng(0, "judged", name).sample(range(len(examples)), min(judged, len(examples)))))
    seen = summarise(name, replace(some, quality=quality_scores(some, model, LONGEST)))
    return replace(counted, quality=seen.quality)


def _write_summary(
    examples: Examples, target: Path, model: str | None, epsilon: float | None, labels: Sequence[str]
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
        soft_wrap=True,
    )


def _show(summaries: Sequence[Summary], name: str, notes: Sequence[str], page: Path, as_json: bool) -> None:
    """Print the summaries, and write them as a page."""
    from fedloom.cli.tables import rich_table
    from fedloom.data.heterogeneity import measure_heterogeneity
    from fedloom.report import heterogeneity_page

    measured = measure_heterogeneity(summaries) if len(summaries) > 1 else None
    out.print(f"\n{heterogeneity_page.heterogeneity_sentence(summaries, measured)}\n", style="bold")
    if measured is not None:
        out.print(rich_table(heterogeneity_page.axis_table(measured), WORDS))
    out.print(rich_table(heterogeneity_page.client_table(summaries, 10), WORDS))
    likely = heterogeneity_page.expected_effects(measured) if measured is not None else []
    for how, text in likely:
        out.print(f"{how} {text}")
    if likely:
        out.print(" ".join(heterogeneity_page.HEDGE.split()), style="dim")
    written = heterogeneity_page.write_heterogeneity_report(summaries, measured, name, notes, page)
    out.print(f"\nPage     {written}", soft_wrap=True)
    if as_json:
        print_json({"page": written, "notes": notes, "unevenness": measured, "clients": summaries})


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused("DATA", str(path), "there is no such file, or it is not text") from error
