"""The report page about a run, or about several side by side: a single file without network, script or date."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path

from fedloom.core.errors import Refused, refuse_damaged
from fedloom.core.files import atomic_write
from fedloom.core.text import printable
from fedloom.report import facts, sections, tables
from fedloom.report.paired_differences import best_cell_sentence
from fedloom.report.run_log import RunLog, read_run_log
from fedloom.report.sections import Section

SIMULATION, DEPLOYMENT = "fedloom run FILE --resume FOLDER", "fedloom serve FILE --folder FOLDER --resume"
"""Commands that resume a run."""
STATUS = {
    "finished": "",
    "running": "This run has not finished: what follows is what it has written so far.",
    "killed": f"This run was ended from outside: what follows is incomplete. `{SIMULATION}` goes on with it.",
    "interrupted": "This run was interrupted: what follows is incomplete.",
    "failed": "This run failed: what follows is incomplete.",
}


@dataclass(frozen=True, slots=True)
class Page:
    """Contents of a page; the fields are the variables of its template.

    Fields:
        title: heading.
        sentence: result in one sentence.
        sections: headings with pictures, tables and code.
        version: version of fedloom that wrote the data.
        status: of the run (default: not shown).
        warnings: why the numbers are not final.
        notes: remarks of the run about itself.
        figures: key figures, each as its name, its value, and what to compare it with.
    """

    title: str
    sentence: str
    sections: Sequence[Section]
    version: str
    status: str = ""
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()
    figures: Sequence[tuple[str, str, str]] = ()


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Write the report of one run, or the comparison of several, to `out`; a reader never sees half a page."""
    if not folders:
        raise Refused("run folders", [], "name at least one run folder")
    logs = [read_run_log(Path(folder)) for folder in folders]
    with refuse_damaged("run folder", ", ".join(map(str, folders))):
        text = render_page(runs_page(logs))
    return write_page(text, out)


def write_page(text: str, out: Path) -> Path:
    """Write a page to `out`, whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as draft:
        draft.write_text(text, encoding="utf-8")
    return out


def runs_page(logs: Sequence[RunLog]) -> Page:
    """Contents of the report of one run, or of the comparison of several; nothing is drawn yet."""
    version = str(logs[0].manifest["fedloom"])
    warnings = [warning for log in logs if (warning := warning_text(log, named=len(logs) > 1))]
    if len(logs) > 1:
        title, sections_ = f"{len(logs)} runs compared", sections.comparison_sections(logs)
        sentence = best_cell_sentence(logs) or facts.comparison_sentence(logs)
        return Page(title, sentence, sections_, version, warnings=warnings)
    (log,) = logs
    return Page(
        facts.run_names(logs)[0],
        facts.result_sentence(log),
        sections.run_sections(log),
        version,
        status=str(log.manifest["status"]),
        warnings=warnings,
        notes=log.manifest["notes"],
        figures=tables.key_figures(log),
    )


def render_page(page: Page) -> str:
    """Draw the pictures and fill in the template: the same contents give the same text, without control characters of theirs."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    here = resources.files("fedloom.report")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters["drawn"] = Markup
    template = environment.from_string((here / "page.html.j2").read_text(encoding="utf-8"))
    contents = {field.name: getattr(page, field.name) for field in fields(page)}
    return printable(template.render(css=(here / "page.css").read_text(encoding="utf-8"), **contents))


def warning_text(log: RunLog, *, named: bool) -> str:
    """Warning that the numbers of a run are not its final ones; empty for a finished run."""
    status, reason = str(log.manifest["status"]), str(log.manifest["status_reason"])
    text = STATUS.get(status, f"The status of this run is “{status}”: what follows may be incomplete.")
    text = text.replace(SIMULATION, DEPLOYMENT) if facts.is_deployed(log) else text
    if not text:
        return ""
    prefix = f"{facts.label(log.manifest['name'], 48)}: " if named else ""
    return f"{prefix}{text}{f' Reason: {reason}' if reason else ''}"
