"""The page of an audit, for a data protection officer: who could learn what, how sure that is, and what was not measured.

One HTML file as the report's, which loads nothing, and a JSON file of the same figures beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

from fedloom.audit.findings import ADVERSARIES, Adversary, Attack, AuditReport, Finding, NoiseCheck, Unmeasured
from fedloom.core.errors import Refused
from fedloom.core.files import write_json
from fedloom.core.schema import jsonable
from fedloom.report.numbers import NONE, plural
from fedloom.report.page import Page, render_page, write_page
from fedloom.report.sections import PageBlock, Section
from fedloom.report.tables import Grid

ASKED: Mapping[Attack, tuple[str, str, str]] = {
    "labels": (
        "Which labels has a client, in which shares?",
        "Where labels are sensitive (a diagnosis, a complaint), their shares are.",
        "Noise at the sites, or sums of several clients. Noise on label counts alone does not help.",
    ),
    "membership": (
        "Was a row that the attacker knows already trained on?",
        "It tells that somebody was among the patients, customers or employees of a client.",
        "Fewer passes over the rows; noise at the sites (for the server too), or at the server (for members and readers).",
    ),
    "shadow adapters": (
        "The same, by an attacker who trains adapters itself on rows of which some are the client's.",
        "The strongest of the attacks on membership that are tried here: its figure is the one to go by.",
        "As for membership.",
    ),
    "words": (
        "Which words stood in a client's texts, and where?",
        "Names, places or diagnoses may be told without the text around them.",
        "More rows in a step and in a task, a lower rank, noise at the sites.",
    ),
}
"""By attack: what it asks, what that means for a person, and what helps against it."""
TELLS: Mapping[Attack, str] = {
    "labels": "the labels of a client",
    "membership": "which rows were trained on",
    "shadow adapters": "which rows were trained on",
    "words": "words of a client's texts",
}
PROTECTED = {
    "client": "all that one client contributes, against readers and members, and not against the server",
    "record": "one record, against everybody else, the server too",
}
SEES: Mapping[Adversary, str] = {
    "server": "follows the protocol, and looks at each answer, all versions, and what the model is",
    "member": "takes part, and looks at each version that it is sent",
    "reader": "has the published model; the run folder says besides who took part, and without privacy their losses",
}
READING = """
Each row is one attack that was carried out. The area under the ROC curve is the chance that a row that was trained on looks more so
than one that was not: 0.5 is guessing, 1 is certainty. Chance is what the same attack gives without the answer, or with somebody
else's. Nothing was measurable where chance lies within the interval; slightly, partly and clearly are the way from chance to
certainty: below a fifth, below a half, and more. Of twenty such rows one may be off by chance. A member can do whatever a reader
can, and the server whatever a member can."""
LIMITS = """
These are some attacks, carried out with little effort; others may find more. Not tried: a server that breaks the protocol, several
answers of one client together, attackers with a language model, members who work together. Only an epsilon is a bound on what any
attack can find, and it holds for what it names: a client's whole contribution, or one record. The page holds no text, no label and no
name of a person: areas, shares, ranks and counts."""
NOISE = """
Canaries are changes that the audit puts in on purpose, of clients or records that do not exist, to look for them in what comes out.
They are merged by the same server code with the same settings of noise, on a toy model. The estimate is what an observer who knows
all but the noise can show with them: in a sound run it lies around the accounted epsilon, as often above it as below. It is a fault
where even the lower end, which one sound run in ten thousand passes, lies above. The certified bound needs no assumption, and so few
canaries cannot show more than about 4 of any epsilon: that it is small says little."""


def write_audit(report: AuditReport, page: Path) -> tuple[Path, Path]:
    """Write the page, and the figures as JSON beside it; return both paths. Raises Refused for a page that is called .json."""
    data = page.with_suffix(".json")
    if data == page:
        raise Refused("--out", str(page), "that is where the figures go; name the page, as audit.html")
    text = render_page(audit_page(report))
    page.parent.mkdir(parents=True, exist_ok=True)
    write_json(data, figures_of(report))
    return write_page(text, page), data


def figures_of(report: AuditReport) -> dict[str, object]:
    """Return all figures as plain data: what the page says, for machines."""
    data: dict[str, object] = jsonable(report)
    data["outcomes"] = [
        {**jsonable(one), "verdict": one.verdict if isinstance(one, Finding) else "not measured"}
        for one in report.outcomes
    ]
    if report.noise is not None:
        data["noise"] = {**jsonable(report.noise), "sound": report.noise.sound}
    return {"fedloom": version("fedloom"), **data}


def audit_page(report: AuditReport) -> Page:
    """Contents of the page."""
    found = report.noise
    faults = (
        [] if found is None or found.sound else [f"The noise is less than what was accounted. {noise_sentence(found)}"]
    )
    return Page(
        title=f"Audit of {report.name}",
        sentence=audit_sentence(report),
        sections=[Section(title, blocks) for title, blocks in _sections(report)],
        version=version("fedloom"),
        warnings=faults,
        notes=report.notes,
        figures=tuple(_tiles(report)),
    )


def audit_sentence(report: AuditReport) -> str:
    """Return the result in a few words: what each adversary could learn at most, and what bounds it."""
    parts = []
    for adversary, name in ADVERSARIES.items():
        worst = report.worst(adversary)
        if worst is not None:
            parts.append(f"{name} can tell {TELLS[worst.attack]} ({worst.verdict}).")
        elif report.findings(adversary):
            parts.append(f"{name} learnt nothing measurable.")
        else:
            parts.append(f"What {_lower(name)} can tell was not measured.")
    if report.epsilon is None:
        return " ".join([*parts, "No bound holds for stronger attacks: the run adds no noise."])
    shown = f"epsilon {_epsilon(report.epsilon)} at delta {report.delta:g} for {PROTECTED[report.unit]}"
    return " ".join([*parts, f"Accounted: {shown}."])


def noise_sentence(found: NoiseCheck) -> str:
    """Return in one sentence what the canaries show beside what was accounted."""
    shown = found.shown
    interval = f"95 % interval {shown.low:.2f} to {shown.high:.2f}"
    return (
        f"Of {plural(found.releases, 'noisy sum')} epsilon {found.accounted:.2f} is accounted; {shown.canaries} canaries show "
        f"{shown.estimate:.2f} ({interval}; at least {shown.certified:.2f} for certain), and the noise has "
        f"{100 * found.deviation:.0f} % of the declared deviation."
    )


# The parts of it ---------------------------------------------------------------------------------------------------------


def _lower(name: str) -> str:
    return name[0].lower() + name[1:]


def _tiles(report: AuditReport) -> Iterator[tuple[str, str, str]]:
    for adversary, name in ADVERSARIES.items():
        worst = report.worst(adversary)
        if worst is not None:
            beside = f"{worst.attack}: {worst.value:.2f}, by chance {worst.chance:.2f}"
            yield name, worst.verdict, beside
        else:
            measured = report.findings(adversary)
            yield name, "nothing" if measured else NONE, "that could be measured" if measured else "not measured"
    if report.epsilon is not None:
        yield "Epsilon", _epsilon(report.epsilon), f"accounted, of one {report.unit}, delta {report.delta:g}"


def _epsilon(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "no bound"


def _sections(report: AuditReport) -> Iterator[tuple[str, tuple[PageBlock, ...]]]:
    findings = [one for one in report.outcomes if isinstance(one, Finding)]
    gaps = [one for one in report.outcomes if isinstance(one, Unmeasured)]
    about = (("Who", "Sees"), *((name, SEES[adversary]) for adversary, name in ADVERSARIES.items()))
    yield "Who is looking", (PageBlock("", grid=Grid(about[0], about[1:]), kind="texts"),)
    if findings:
        yield "Who could learn what", (PageBlock(READING, grid=_finding_table(findings)),)
        asked = [(attack.capitalize(), *ASKED[attack]) for attack in dict.fromkeys(one.attack for one in findings)]
        head = ("Attack", "What it asks", "What that means", "What helps")
        yield "What the attacks are", (PageBlock("", grid=Grid(head, tuple(asked)), kind="texts"),)
    if report.noise is not None:
        yield "The noise", (PageBlock(NOISE, noise_sentence(report.noise)), *_guess_block(report))
    if gaps:
        rows = tuple((ADVERSARIES[one.adversary], one.attack, one.reason) for one in gaps)
        untried = PageBlock(
            "That these were not tried does not say that they fail.",
            grid=Grid(("Who", "Attack", "Why"), rows),
            kind="texts",
        )
        yield "What was not measured", (untried,)
    yield "What this page does not say", (PageBlock(LIMITS),)


def _finding_table(findings: list[Finding]) -> Grid:
    head = ("Who", "Attack", "Learnt", "Figure", "By chance", "95 % interval", "What the figure is")
    rows = [
        (
            ADVERSARIES[one.adversary],
            one.attack,
            one.verdict,
            f"{one.value:.2f}",
            f"{one.chance:.2f}",
            f"{one.low:.2f} to {one.high:.2f}",
            f"{one.measure}: {one.trials}",
        )
        for adversary in ADVERSARIES
        for one in findings
        if one.adversary == adversary
    ]
    return Grid(head, tuple(rows))


def _guess_block(report: AuditReport) -> tuple[PageBlock, ...]:
    found = report.guesses
    if found is None:
        return ()
    text = (
        f"From single answers the server guessed of {found.guesses:,} of {found.rows:,} rows whether they were trained on, and was "
        f"right about {found.right:,} (half of them by chance). That certifies an epsilon of at least {found.certified:.2f} for a "
        "record, with 95 % confidence (Steinke et al. 2023)."
    )
    return (PageBlock("", text),)
