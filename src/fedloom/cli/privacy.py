"""`fedloom privacy`: what a run promises before it is made, and what it has released so far."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from fedloom.cli.console import out, print_json
from fedloom.cli.options import AsJson, Settings
from fedloom.core.errors import Refused, refuse_damaged
from fedloom.core.files import read_json

if TYPE_CHECKING:
    from fedloom.runs.job import Job
    from fedloom.runs.privacy_plan import UnitPlan

Answer: TypeAlias = dict[str, object]
MOST_UNITS = 12
"""Clients that are listed, those first that spent most."""


def privacy_command(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="FILE|DIR", help="A run file; or a run folder, that of a deployment, or a ledger (.jsonl)."
        ),
    ],
    settings: Settings = None,
    delta: Annotated[
        float | None,
        typer.Option(metavar="X", help="Probability that the bound may fail; by default the budget's, else 1e-5."),
    ] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(metavar="X", help="Compare units at this epsilon; by default the budget's, else 8."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the privacy guarantee of a run file, its noise and what leaves a site; or what a run folder has released.

    A run file is executed, and its data and model are loaded: use only files that you trust. Nothing is trained or written.

    Example: [bold]fedloom privacy experiments/tickets.py --set limits.versions=20[/bold]

    After it: [bold]fedloom privacy runs/mine[/bold]
    """
    if run.is_file() and run.suffix == ".jsonl":
        answer = _show_ledger(run, delta, "")
    elif run.is_dir():
        if settings or epsilon is not None:
            raise Refused("RUN", str(run), "--set and --epsilon are of a run file; what was released is as it is")
        answer = _show_released(run, delta)
    else:
        from fedloom.runs.prepare import prepare
        from fedloom.runs.run_file import load_run_file, override

        answer = _show_plan(prepare(override(load_run_file(run), settings or ())), delta, epsilon)
    if as_json:
        print_json(answer)


def _show_plan(job: Job, delta: float | None, epsilon: float | None) -> Answer:
    """Print what a run promises, what each unit would take, and what leaves a site; return it as values."""
    from fedloom.privacy.correlated_noise import noise_saved
    from fedloom.report.numbers import plural
    from fedloom.runs.privacy_plan import DELTA, EPSILON, client_plan, record_plan, smallest_rows, what_leaves

    private = job.run.privacy
    budget = private.budget if private else None
    delta = delta or (budget[1] if budget else DELTA)
    own = None
    if private is None:
        out.print("This run adds no noise: it has no privacy guarantee.", soft_wrap=True)
    else:
        own = client_plan(job, delta) if private.unit == "client" else record_plan(job, delta)
        whose = "a client" if own.unit == "client" else f"a record of a client with {smallest_rows(job)} rows"
        out.print(f"Guarantee epsilon {own.epsilon:.6g} at delta {delta:g} for {whose}", soft_wrap=True)
        out.print(f"          {_noise_words(own)}\n          Simulated noise protects nobody.", soft_wrap=True)
        if private.noise == "banded":
            saved = noise_saved(job.run.limits.versions, private.most_answers, private.apart)
            out.print(
                f"          Noise in the running model: {saved:.2f} of independent noise of equal privacy",
                soft_wrap=True,
            )
    target = epsilon or (budget[0] if budget else EPSILON)
    clients = len(job.profiles)
    out.print(f"\nTo reach epsilon {target:g} at delta {delta:g} with {plural(clients, 'client')}:", soft_wrap=True)
    plans = (client_plan(job, delta, target), record_plan(job, delta, target))
    for one in plans:
        out.print(f"  {one.unit + 's':8} {_noise_words(one)}", soft_wrap=True)
    less = min(plans, key=lambda one: one.whole)
    out.print(f"  Protecting {less.unit}s takes less noise over the run.", soft_wrap=True)
    if 1 / delta < clients:
        out.print(
            f"  delta is above 1/{clients}: this allows the exposure of one client. Choose a smaller delta.",
            soft_wrap=True,
        )
    out.print("\nWhat leaves a site", soft_wrap=True)
    leaves = dict(what_leaves(job.run))
    for what, how in leaves.items():
        out.print(f"  {what}: {how}", soft_wrap=True)
    return {"delta": delta, "guarantee": own, "at_epsilon": target, "units": plans, "leaves_a_site": leaves}


def _noise_words(plan: UnitPlan) -> str:
    where = "a version" if plan.unit == "client" else "a training step"
    sizes = f"noise-to-signal ratio {plan.once:.3g} in {where}, {plan.whole:.3g} over the run"
    return f"multiplier {plan.multiplier:.4g}: {sizes} ({plan.of:,} numbers)"


def _show_released(folder: Path, delta: float | None) -> Answer:
    """Print what a run has released, by its ledger; return it as values."""
    if not (folder / "manifest.json").is_file() and (folder / "run" / "manifest.json").is_file():
        folder = folder / "run"
    if not (folder / "manifest.json").is_file():
        raise Refused("RUN", str(folder), "there is no manifest.json in it; give a run folder, or a run file")
    about = read_json(folder / "manifest.json")
    with refuse_damaged("RUN", str(folder)):
        section, settings = about.get("privacy") or {}, about["run"].get("privacy")
        budget = settings["budget"] if settings else None
    if settings is None:
        out.print("This run added no noise: it has no privacy guarantee, and its versions are exact.", soft_wrap=True)
        return {"noise": None}
    if section.get("unit") == "record" and not (folder / "privacy.jsonl").is_file():
        words = "each site counts for itself, in spent.jsonl in its folder: fedloom privacy FOLDER/spent.jsonl"
        out.print(f"Noise {section.get('noise')}. Records: {words}", soft_wrap=True)
        return {"noise": section.get("noise"), "unit": "record"}
    delta = delta or (budget[1] if budget else None)
    answer = _show_ledger(folder / "privacy.jsonl", delta, str(section.get("noise", "")))
    if section.get("unit") != "record":
        answer |= {"guaranteed_epsilon": _show_promise(about, delta)}
    return answer


def _show_promise(about: Any, delta: float | None) -> float:
    """Print what the run may release at most; return its epsilon."""
    from fedloom.core.schema import Decoder
    from fedloom.privacy.accounting import epsilon_of
    from fedloom.privacy.private import Private
    from fedloom.runs.privacy_plan import DELTA
    from fedloom.runs.private_run import client_event

    with refuse_damaged("RUN", "manifest.json"):
        private = Decoder().read(Private, about["run"]["privacy"])
        event = client_event(private, int(about["run"]["limits"]["versions"]))
    found = epsilon_of([event], delta or DELTA)
    out.print(
        f"Guaranteed at most: epsilon {found:.6g}, with {private.most_answers} answers of a client. This bound holds "
        "for any participation, and may be published. What was spent depends on who answered.",
        soft_wrap=True,
    )
    return found


def _show_ledger(path: Path, delta: float | None, noise: str) -> Answer:
    """Print what a ledger says, by unit; return it as values."""
    from fedloom.privacy.accounting import epsilon_of
    from fedloom.privacy.ledger import largest_epsilon, read_ledger, spent_by_unit
    from fedloom.report.numbers import plural
    from fedloom.runs.privacy_plan import DELTA

    if not path.is_file():
        raise Refused("ledger", str(path), "it is not there, so what was released is not known; put it back")
    delta, entries = delta or DELTA, list(read_ledger(path))
    spent = spent_by_unit(entries)
    unit, most = largest_epsilon(entries, delta)
    if noise:
        out.print(f"Noise {noise}", soft_wrap=True)
    counts = f"{plural(len(entries), 'release')}, {plural(len(spent), 'unit')}"
    out.print(f"{counts}; the most that one has spent: ", end="", soft_wrap=True)
    out.print(f"epsilon {most:.6g} at delta {delta:g}{f' ({unit})' if unit else ''}", soft_wrap=True)
    found = {name: epsilon_of(events, delta) for name, events in spent.items()} if len(spent) <= MOST_UNITS else {}
    for name in sorted(found, key=lambda one: (-found[one], one)):
        count = sum(name in entry.events for entry in entries)
        out.print(f"  {name}: epsilon {found[name]:.6g}, in {plural(count, 'release')}", soft_wrap=True)
    return {
        "noise": noise or None,
        "releases": len(entries),
        "delta": delta,
        "epsilon": most,
        "unit": unit,
        "by_unit": found,
    }
