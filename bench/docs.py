"""The site of docs: its reference is written from the code, and the whole is built with every warning an error.

    python -m bench.docs [--quick]

Writes `docs/reference/` from the public names, the settings of a site and the commands of the command line; then builds the site
into `build/docs/site`. With `--quick` it writes nothing and says which pages of the reference are out of date. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import typer.main
from pydantic import BaseModel

import fedloom
from fedloom.cli.main import app
from fedloom.core.settings_view import as_written, field_texts
from fedloom.deploy.site.settings import Site
from fedloom.runs.public_names import all_names

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"
CONFIG = ROOT / "zensical.toml"
BUILD = ROOT / "build" / "docs"
SITE = BUILD / "site"
MADE = "<!-- Made by: python -m bench.docs -->\n\n"
ROOMS = {
    "runs": ("Runs and results", "Start a run, read its result, compare several."),
    "train": ("Training", "Which layers get an adapter, how clients train, and how it is computed."),
    "data": ("Data", "Where examples come from, and how they are divided over simulated clients."),
    "aggregate": ("Aggregators", "How the answers of clients become the next global model."),
    "schedule": ("Schedules", "When a new version is made, who trains next, and what an answer weighs."),
    "plan": ("Plans", "How much each client does: rank, depth, steps."),
    "hierarchy": ("Groups", "Groups of clients, each behind an edge server."),
    "simulate": ("Devices", "Simulated devices, links, delays, availability and faults."),
    "privacy": ("Privacy", "Noise and bounds."),
    "core": ("Server", "The server, its limits, and how numbers travel."),
}
"""Title and first sentence of each page, in the order of the menu."""
SECTION = re.compile(r"(Fields|Args|Raises|Returns|Attributes)(?:, besides [^:]*)?:\s*")
MARKUP = ((re.compile(r"\[bold\](.*?)\[/bold\]"), r"`\1`"), (re.compile(r"\[/?[a-z ]+\]"), ""))


def sections(doc: str) -> tuple[str, dict[str, dict[str, str]]]:
    """Return the text of a docstring before its first section, and each section's entries by name."""
    text, found, name, entry = list[str](), dict[str, dict[str, str]](), "", ""
    for line in doc.splitlines():
        if heading := SECTION.fullmatch(line):
            name, entry = heading[1], ""
            found[name] = {}
        elif not name or (line and not line.startswith(" ")):
            name = ""
            text.append(line)
        elif start := re.match(r" {4}(\*{0,2}[\w.`]+): (.*)", line):
            entry = start[1].strip("`")
            found[name][entry] = start[2]
        elif line.strip() and entry:
            found[name][entry] += f" {line.strip()}"
    return "\n".join(text).strip(), found


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield f"| {' | '.join(heads)} |"
    yield f"|{'|'.join('---' for _ in heads)}|"
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"


def fields_of(value: Any) -> Mapping[str, tuple[str, str]]:
    """Return type and default of each field of a class, as they are written."""
    if isinstance(value, type) and issubclass(value, BaseModel):
        return {
            name: (_kind(value.__annotations__.get(name, "")), _default(field.get_default(call_default_factory=True)))
            for name, field in value.model_fields.items()
        }
    if not dataclasses.is_dataclass(value):
        return {}
    return {
        field.name: (
            _kind(field.type),
            "" if field.default is dataclasses.MISSING else _default(field.default),
        )
        for field in dataclasses.fields(value)
        if field.init
    }


def _kind(annotation: object) -> str:
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    inner = re.sub(r"Annotated.([^,]*), .*", r"\1", text)
    return f"`{inner.replace(' | ', ' or ')}`"


def _default(value: object) -> str:
    plain = isinstance(value, str | int | float | bool | tuple) or value is None
    return f"`{as_written(value)}`" if plain and "PydanticUndefined" not in repr(value) else ""


def entry(name: str, value: Any, level: int = 2) -> Iterator[str]:
    """Yield the lines on one public name: its signature, its meaning, a line a field."""
    text, found = sections(inspect.getdoc(value) or "")
    yield f"{'#' * level} {name}\n"
    if inspect.isfunction(value):
        signature = re.sub(r"(: |-> )'([^']+)'", r"\1\2", str(inspect.signature(value)))  # annotations are texts
        yield f"```python\n{name}{signature}\n```\n"
    elif not isinstance(value, type):
        yield f"A value of `{type(value).__name__}`.\n"
    yield f"{text}\n"
    known, described = fields_of(value), found.get("Fields") or found.get("Args") or {}
    if isinstance(value, type) and dataclasses.is_dataclass(value):
        described = field_texts(value)  # those of its bases too
    names = [*known, *(one for one in described if one not in known)]
    if names and isinstance(value, type):
        rows = [[f"`{one}`", *known.get(one, ("", "")), described.get(one, "")] for one in names]
        yield from table(("field", "type", "default", "meaning"), rows)
        yield ""
    elif described:
        yield from table(("argument", "meaning"), [[f"`{one}`", text] for one, text in described.items()])
        yield ""
    if raised := found.get("Raises"):
        yield "Raises: " + "; ".join(f"`{one}`: {text}" for one, text in raised.items()) + "\n"


def python_pages() -> dict[str, str]:
    """Return a page for each room that has public names."""
    by_room = defaultdict[str, list[str]](list)
    for name in all_names():
        value = getattr(fedloom, name)
        module = getattr(value, "__module__", None) or type(value).__module__
        by_room[module.split(".")[1]].append(name)
    pages = {}
    for room, names in by_room.items():
        title, first = ROOMS[room]
        lines = [f"# {title}\n", f"{first} All names can be imported from `fedloom`.\n"]
        for name in sorted(names, key=lambda one: (one[0].islower(), one.lower())):
            lines += entry(name, getattr(fedloom, name))
        pages[f"{room}.md"] = "\n".join(lines)
    return pages


def site_page() -> str:
    """Return the page of `site.toml`."""
    lines = [
        "# site.toml\n",
        "The settings of a site, section by section. [The site's side](../site.md) explains them.\n",
    ]
    lines += entry("site.toml", Site)
    for name, field in Site.model_fields.items():
        kinds = [kind for kind in (field.annotation, *getattr(field.annotation, "__args__", ())) if kind is not None]
        models = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        for model in models:
            lines += entry(f"[{name}]", model)
    return "\n".join(lines)


def command_page() -> str:
    """Return the page of all commands."""
    lines = ["# Command line\n", "Every command, as `--help` has it. `fedloom --help` lists them.\n"]
    for path, command in _commands("fedloom", typer.main.get_command(app)):
        lines += [f"## {path}\n", _plain(inspect.cleandoc(command.help or "")) + "\n"]
        rows = []
        for parameter in command.params:
            record = parameter.to_info_dict()
            names = ", ".join(f"`{one}`" for one in (*parameter.opts, *parameter.secondary_opts))
            label = f"`{parameter.metavar or parameter.name}`" if isinstance(parameter, click.Argument) else names
            rows.append([label, _plain(record.get("help") or getattr(parameter, "help", "") or "")])
        if rows:
            lines += [*table(("option", "meaning"), rows), ""]
    return "\n".join(lines)


def _commands(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    below = getattr(command, "commands", None)
    if below is None:
        yield path, command
        return
    for name, inner in below.items():
        if not inner.hidden:
            yield from _commands(f"{path} {name}", inner)


def _plain(text: str) -> str:
    for pattern, replacement in MARKUP:
        text = pattern.sub(replacement, text)
    return text


def pages() -> dict[str, str]:
    """Return all pages of the reference by file name."""
    found = {**python_pages(), "site-toml.md": site_page(), "command-line.md": command_page()}
    return {name: MADE + re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n" for name, text in found.items()}


def out_of_date(made: Mapping[str, str]) -> list[str]:
    """Return the pages whose file is not what the code says now, or that the code has no longer."""
    there = {path.name: path.read_text(encoding="utf-8") for path in REFERENCE.glob("*.md")}
    return sorted(name for name in {*made, *there} if made.get(name) != there.get(name) and name != "index.md")


def stage() -> None:
    """Lay the pages out as they lie in the repository, so that links are right there and on the site; the README comes first."""
    shutil.rmtree(BUILD, ignore_errors=True)
    pages = BUILD / "pages"
    shutil.copytree(ROOT / "docs", pages / "docs", ignore=shutil.ignore_patterns("LOG.md"))
    shutil.copytree(ROOT / "notebooks", pages / "notebooks")
    for path in ROOT.glob("notebooks/*.ipynb"):
        (pages / "notebooks" / f"{path.stem}.md").write_text(notebook_page(path), encoding="utf-8")
    for path in (*ROOT.glob("*.md"), *ROOT.glob("experiments/*.md")):
        copy = pages / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        text = path.read_text(encoding="utf-8")
        (copy.with_name("index.md") if path.name == "README.md" else copy).write_text(text, encoding="utf-8")
    decisions = pages / "docs" / "decisions"
    titles = {
        path.name: path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for path in decisions.glob("*.md")
    }
    listed = "\n".join(f"- [{title}]({name})" for name, title in sorted(titles.items()))
    (decisions / "all.md").write_text(f"# Decisions\n\nWhy things are as they are, one record each.\n\n{listed}\n")
    shutil.copyfile(CONFIG, BUILD / CONFIG.name)


def notebook_page(path: Path) -> str:
    """Return the page of a notebook: its texts, its code, and what that showed when it was run."""
    parts = [f"[Download this notebook]({path.name})"]
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        else:
            parts += [f"```python\n{source}\n```", *map(_shown, cell["outputs"])]
    parts[0], parts[1] = parts[1], parts[0]  # the heading comes first
    return "\n\n".join(filter(None, parts)) + "\n"


def _shown(output: Mapping[str, Any]) -> str:
    """Return an output of a cell as Markdown."""
    data = output.get("data", {})
    if page := "".join(data.get("text/html", ())):
        page = re.sub(r"<style.*?</style>", "", page, flags=re.DOTALL).replace(' border="1" class="dataframe"', "")
        return "\n".join(line for line in page.splitlines() if line.strip())  # a blank line would end it
    text = "".join(data.get("text/plain", output.get("text", ())))
    return f"```text\n{text.rstrip()}\n```" if text else ""


def build() -> tuple[int, str]:
    """Build the site; return the number of warnings and what was said."""
    stage()
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=BUILD)
    said = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
    found = re.search(r"(\d+) issues? found", said)
    return (int(found[1]) if found else int(done.returncode != 0)), said


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.docs")
    parser.add_argument("--quick", action="store_true", help="write nothing; say what is out of date")
    options = parser.parse_args()
    made = pages()
    if not options.quick:
        REFERENCE.mkdir(parents=True, exist_ok=True)
        for name in out_of_date(made):
            (REFERENCE / name).unlink(missing_ok=True)
            if name in made:
                (REFERENCE / name).write_text(made[name], encoding="utf-8")
    old = out_of_date(made)
    warnings, said = build()
    if warnings:
        print(said)
    for name in old:
        print(f"docs/reference/{name} is out of date: python -m bench.docs")
    print(json.dumps({"docs_warnings": warnings, "pages": len(list(SITE.rglob("*.html"))), "out_of_date": len(old)}))


if __name__ == "__main__":
    main()
