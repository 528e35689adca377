"""One page that says everything about a run, or compares several: a single file without network, script or date."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from fedloom.core.errors import Refused
from fedloom.report import facts, sections, tables
from fedloom.report.run_log import RunLog, read

SIMULATION, DEPLOYMENT = "fedloom run FILE --resume FOLDER", "fedloom serve FILE --folder FOLDER --resume"
"""What goes on with a run."""
STATUS = {
    "finished": "",
    "running": "This run has not finished: what follows is what it has written so far.",
    "killed": f"This run was ended from outside: what follows is incomplete. `{SIMULATION}` goes on with it.",
    "interrupted": "This run was interrupted: what follows is incomplete.",
    "failed": "This run failed: what follows is incomplete.",
}


def write(folders: Sequence[Path], out: Path) -> Path:
    """Writes the report of one run, or the comparison of several, to `out`; a reader never sees half a page."""
    if not folders:
        raise Refused("run folders", [], "name at least one run folder")
    return deliver(page([read(Path(folder)) for folder in folders]), out)


def deliver(text: str, out: Path) -> Path:
    """Puts a page where it belongs, whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)
    return out


def page(logs: Sequence[RunLog]) -> str:
    """The page as text: the same runs give the same text."""
    one = logs[0] if len(logs) == 1 else None
    return render(
        title=facts.names(logs)[0] if one else f"{len(logs)} runs compared",
        status=str(one.manifest["status"]) if one else "",
        sentence=facts.sentence(one) if one else facts.verdict(logs),
        warnings=[warning for log in logs if (warning := _warning(log, named=one is None))],
        notes=one.manifest["notes"] if one else [],
        figures=tables.key_figures(one) if one else (),
        sections=sections.single(one) if one else sections.comparison(logs),
        version=logs[0].manifest["fedloom"],
    )


def render(**told: object) -> str:
    """The page that says this; the template's words are the arguments."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    here = resources.files("fedloom.report")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters["drawn"] = Markup
    template = environment.from_string((here / "page.html.j2").read_text(encoding="utf-8"))
    return template.render(css=(here / "page.css").read_text(encoding="utf-8"), **told)


def _warning(log: RunLog, *, named: bool) -> str:
    """Why the numbers of a run are not its final ones; empty for a finished run."""
    status, reason = str(log.manifest["status"]), str(log.manifest["status_reason"])
    text = STATUS.get(status, f"The status of this run is “{status}”: what follows may be incomplete.")
    text = text.replace(SIMULATION, DEPLOYMENT) if facts.deployed(log) else text
    if not text:
        return ""
    who = f"{facts.label(log.manifest['name'], 48)}: " if named else ""
    return f"{who}{text}{f' Reason: {reason}' if reason else ''}"
