"""`fedloom privacy`: what a run promises before it is made, and what it has released so far."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedloom.cli.console import out
from fedloom.core.errors import Refused, refuse_damaged
from fedloom.core.files import read_json

if TYPE_CHECKING:
    from fedloom.runs.job import Job
    from fedloom.runs.privacy_plan import UnitPlan

MOST_UNITS = 12
"""Clients that are listed, those first that spent most."""


def privacy_command(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A run file; or a run folder, that of a deployment, or a ledger (.jsonl)."),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Replace a field of the run of a run file; may be repeated."),
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option(metavar="DELTA", help="Probability that the bound may fail; by default the budget's, else 1e-5."),
    ] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(metavar="EPSILON", help="Compare units at this epsilon; by default the budget's, else 8."),
    ] = None,
) -> None:
    """Say what a run file promises, how large its noise is and what leaves a site; or, of a run folder, what was released.

    A run file is executed, and its data and model are loaded: use only files that you trust. Nothing is trained or written.

    Example: [bold]fedloom privacy experiments/tickets.py --set limits.versions=20[/bold]

    After it: [bold]fedloom privacy runs/mine[/bold]
    """
    if run.is_file() and run.suffix == ".jsonl":
        _show_ledger(run, delta, "")
    elif run.is_dir():
        if settings or epsilon is not None:
            raise Refused("RUN", str(run), "--set and --epsilon are of a run file; what was released is as it is")
        _show_released(run, delta)
    else:
        from fedloom.runs.prepare import prepare
        from fedloom.runs.run_file import load_run_file, override

        _show_plan(prepare(override(load_run_file(run), settings or ())), delta, epsilon)


def _show_plan(job: Job, delta: float | None, epsilon: float | None) -> None:
    """Print what a run promises, what each unit would take, and what leaves a site."""
    from fedloom.privacy.correlated_noise import noise_saved
    from fedloom.runs.privacy_plan import DELTA, EPSILON, client_plan, record_plan, smallest_rows, what_leaves

    private = job.run.privacy
    budget = private.budget if private else None
    delta = delta or (budget[1] if budget else DELTA)
    if private is None:
        out.print("This run adds no noise: nothing is promised.", soft_wrap=True)
    else:
        own = client_plan(job, delta) if private.unit == "client" else record_plan(job, delta)
        whose = "a client" if own.unit == "client" else f"a record of a client with {smallest_rows(job)} rows"
        out.print(f"Promised  epsilon {own.epsilon:.6g} at delta {delta:g} for {whose}", soft_wrap=True)
        out.print(f"          {_noise_words(own)}\n          Simulated here, noise protects nobody.", soft_wrap=True)
        if private.noise == "banded":
            saved = noise_saved(job.run.limits.versions, private.most_answers, private.apart)
            out.print(
                f"          Noise in the running model: {saved:.2f} of independent noise of equal privacy",
                soft_wrap=True,
            )
    target = epsilon or (budget[0] if budget else EPSILON)
    clients = len(job.profiles)
    out.print(f"\nAt epsilon {target:g}, delta {delta:g}, with {clients} clients:", soft_wrap=True)
    plans = (client_plan(job, delta, target), record_plan(job, delta, target))
    for one in plans:
        out.print(f"  {one.unit + 's':8} {_noise_words(one)}", soft_wrap=True)
    less = min(plans, key=lambda one: one.whole)
    out.print(f"  Less noise over the run: protecting {less.unit}s.", soft_wrap=True)
    if 1 / delta < clients:
        out.print(f"  delta is above 1/{clients}: it allows that one client is exposed. Take it below.", soft_wrap=True)
    out.print("\nWhat leaves a site", soft_wrap=True)
    for what, how in what_leaves(job.run):
        out.print(f"  {what}: {how}", soft_wrap=True)


def _noise_words(plan: UnitPlan) -> str:
    where = "a version" if plan.unit == "client" else "a step of training"
    sizes = f"noise over signal {plan.once:.3g} in {where}, {plan.whole:.3g} over the run"
    return f"multiplier {plan.multiplier:.4g}: {sizes} ({plan.of:,} numbers)"


def _show_released(folder: Path, delta: float | None) -> None:
    """Print what a run has released, by its ledger."""
    if not (folder / "manifest.json").is_file() and (folder / "run" / "manifest.json").is_file():
        folder = folder / "run"
    if not (folder / "manifest.json").is_file():
        raise Refused("RUN", str(folder), "there is no manifest.json in it; give a run folder, or a run file")
    about = read_json(folder / "manifest.json")
    with refuse_damaged("RUN", str(folder)):
        section, settings = about.get("privacy") or {}, about["run"].get("privacy")
        budget = settings["budget"] if settings else None
    if settings is None:
        return out.print("This run added no noise, and nothing was accounted: its versions are exact.", soft_wrap=True)
    if section.get("unit") == "record" and not (folder / "privacy.jsonl").is_file():
        words = "each site counts for itself, in spent.jsonl in its folder: fedloom privacy FOLDER/spent.jsonl"
        return out.print(f"Noise {section.get('noise')}. Records: {words}", soft_wrap=True)
    _show_ledger(folder / "privacy.jsonl", delta or (budget[1] if budget else None), str(section.get("noise", "")))
    if section.get("unit") != "record":
        _show_promise(about, delta or (budget[1] if budget else None))


def _show_promise(about: Any, delta: float | None) -> None:
    """Print what the run may release at most."""
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
        f"Promised at most: epsilon {found:.6g}, with {private.most_answers} answers of a client. That bound holds whoever took "
        "part how often, and is what may be published; what was spent depends on who answered.",
        soft_wrap=True,
    )


def _show_ledger(path: Path, delta: float | None, noise: str) -> None:
    """Print what a ledger says, by unit."""
    from fedloom.privacy.accounting import epsilon_of
    from fedloom.privacy.ledger import largest_epsilon, read_ledger, spent_by_unit
    from fedloom.runs.privacy_plan import DELTA

    if not path.is_file():
        raise Refused("ledger", str(path), "it is not there, so what was released is not known; put it back")
    delta, entries = delta or DELTA, list(read_ledger(path))
    spent = spent_by_unit(entries)
    unit, most = largest_epsilon(entries, delta)
    if noise:
        out.print(f"Noise {noise}", soft_wrap=True)
    out.print(f"{len(entries)} releases, {len(spent)} units; the most that one has spent: ", end="", soft_wrap=True)
    out.print(f"epsilon {most:.6g} at delta {delta:g}{f' ({unit})' if unit else ''}", soft_wrap=True)
    found = {name: epsilon_of(events, delta) for name, events in spent.items()} if len(spent) <= MOST_UNITS else {}
    for name in sorted(found, key=lambda one: (-found[one], one)):
        count = sum(name in entry.events for entry in entries)
        out.print(f"  {name}: epsilon {found[name]:.6g}, in {count} releases", soft_wrap=True)
