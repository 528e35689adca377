"""Each client's own part of a run's data as a site of its own, so that what was simulated can be repeated on real processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from fedloom.core.files import create_folder
from fedloom.core.text import without_surrogates
from fedloom.data.examples import Examples
from fedloom.runs.run import Run

ROWS = "rows.jsonl"


def export_sites(run: Run, folder: Path) -> list[Path]:
    """A folder for each client with its examples, in their order, and a `site.toml`; returns these files.

    A site holds the same of them out as its client did. Raises Refused if there is something at `folder` already.
    """
    split = run.data.load(run.seed)
    parts = run.partition.split(split.train, run.seed)
    create_folder(folder)
    return [_site(run, client, split.train.take(part), folder / _plain(client)) for client, part in parts.items()]


def _plain(name: str) -> str:
    """A name that a folder can have, whatever the data call their clients; most stay as they are."""
    return quote(name, safe=" ").replace(".", "%2E")


def _site(run: Run, name: str, examples: Examples, folder: Path) -> Path:
    folder.mkdir()
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _rows(examples))
    (folder / ROWS).write_text(without_surrogates(text), encoding="utf-8")
    file = folder / "site.toml"
    file.write_text(_settings(run, name, examples), encoding="utf-8")
    return file


def _rows(examples: Examples) -> Iterator[dict[str, object]]:
    for i, text in enumerate(examples.texts):
        beside = None if examples.pairs is None else examples.pairs[i]
        if examples.answers is None:
            pair = {} if beside is None else {"pair": beside}
            yield {"text": text, **pair, "label": examples.names[examples.labels[i]]}
        elif examples.before is not None:
            turns = [turn._asdict() for turn in examples.before[i]]
            turns += [{"role": "user", "content": text}, {"role": "assistant", "content": examples.answers[i]}]
            yield {"messages": turns}
        else:
            context = {} if beside is None else {"context": beside}
            yield {"instruction": text, **context, "answer": examples.answers[i]}


def _settings(run: Run, name: str, examples: Examples) -> str:
    """The site's file, for a server on this machine."""
    section = ["[table]" if examples.answers is None else "[instructions]", f"path = {json.dumps(ROWS)}"]
    if examples.answers is None:
        section += ['pair = "pair"'] if examples.pairs is not None else []
    elif examples.before is not None:
        section += ['messages = "messages"']
    else:
        section += ['context = "context"'] if examples.pairs is not None else []
    path = str(Path(run.model).resolve()) if Path(run.model).exists() else run.model
    lines = [
        f"name = {_text(name)}",
        'server = "127.0.0.1:8080"',
        'ca = "ca.crt"  # whom this site trusts, and how it is known: see `fedloom keys`; not looked at by `join --insecure`',
        f"key = {_text(name + '.key')}",
        "",
        "[model]",
        f"path = {_text(path)}",
        f"name = {_text(run.model)}",
        "",
        *section,
    ]
    return "\n".join(lines) + "\n"


def _text(value: str) -> str:
    """A text in TOML, which has JSON's."""
    return json.dumps(value, ensure_ascii=False)
