"""What the page says, in order: sections of pictures, tables and code, each with a sentence on how to read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedloom.report import figures, figures_clients, tables
from fedloom.report.read import RunLog
from fedloom.report.tables import Grid
from fedloom.report.words import number, short


@dataclass(frozen=True, slots=True)
class Part:
    """A picture, a table or a piece of code, with its caption; `kind` says how a table is set: numbers or words."""

    caption: str
    svg: str = ""
    grid: Grid | None = None
    code: str = ""
    kind: str = "numbers"


@dataclass(frozen=True, slots=True)
class Section:
    """A part under its heading."""

    title: str
    part: Part


CURVES = """
The same scores of the global model three times: against rounds, against virtual time and against bytes sent by
clients; dashed lines are baselines. A curve that rises earlier got there with less."""
LOSS = """
Training loss is measured on the clients' own examples while they train, test loss on the merged model. A test loss
that rises while the training loss still falls is overfitting."""
LOSSES = """
Mean training loss of the merged updates, on the clients' own examples; compare it only between runs with the same
data."""
SUMMARY = """
Time and bytes until the run ended; the last two columns, where present, say when each run first reached the accuracy
that all of them reached, and with how many bytes."""
DIFFERENT = "Only what differs is listed; every other setting is the same in all runs."
ENERGY = """
Energy is the squared size of the adapter in each of its directions, strongest first; the effective rank counts the
directions that carry it. In a rank collapse the orange line (drawn where clients have less than the server's rank)
climbs to 100 % and the effective rank falls to the smallest client rank: the directions that only large clients
train fade away. Bars: what each merge cut off to keep the server's rank."""
ENERGIES = """
In a rank collapse the share within the smallest client rank climbs to 100 % while the effective rank falls: the
directions that only large clients train fade away. On the right, the share of energy that each merge cut off."""
CLIENTS = """
A dot is the final model, cut to that client's own rank, on its own held-out examples; the dash is its baseline. Dots
at or below their dash gained nothing; the line across a tier is its mean."""
TIERS = """
Slowest tier first. Traffic is split into adapter and head by their parameter counts; the time is the mean of
receiving, training and sending together."""
ACTIVITY = """
One row a client, slowest tier on top; white is idle, fine vertical lines are merges, hatched work was cancelled,
rejected or lost."""
PARTITION = """
Above, how many examples each client holds; below, the mix of labels among them. The more the columns differ, the
harder the averaging."""


def single(log: RunLog) -> list[Section]:
    """The full report of one run; what was not recorded is left out."""
    collapse = any(line.get("energy") for line in log.versions)
    by_tier, chosen = tables.tiers(log), tables.settings(log)
    return _kept(
        ("Accuracy", log.scores and Part(CURVES, figures.accuracies([log]))),
        ("Loss", log.versions and Part(LOSS, figures.losses([log]))),
        ("Rank and energy", collapse and Part(ENERGY, figures.energy(log))),
        ("Clients", log.clients and Part(CLIENTS, figures_clients.clients(log))),
        ("Tiers", by_tier.rows and Part(TIERS, grid=by_tier)),
        ("Activity", log.tasks and Part(ACTIVITY, figures_clients.activity(log))),
        ("Data", log.manifest["partition"].get("clients") and _partition(log)),
        ("Use the result", log.versions and _load(log)),
        ("Model", log.manifest["model"] and Part("", grid=tables.model(log), kind="words")),
        ("Settings", chosen.rows and Part("A row can be given again as --set KEY=VALUE.", grid=chosen, kind="words")),
        ("Versions and machine", Part("", grid=tables.environment(log), kind="words")),
    )


def comparison(logs: Sequence[RunLog]) -> list[Section]:
    """Several runs side by side: what they reached and cost, their curves, and the settings in which they differ."""
    collapse = any(line.get("energy") for log in logs for line in log.versions)
    differ = tables.differences(logs)
    return _kept(
        ("Summary", Part(SUMMARY, grid=tables.runs(logs))),
        ("Different settings", Part(DIFFERENT if differ.rows else "None.", grid=differ, kind="words")),
        ("Accuracy", any(log.scores for log in logs) and Part(CURVES, figures.accuracies(logs))),
        ("Loss", any(log.versions for log in logs) and Part(LOSSES, figures.losses(logs))),
        ("Rank and energy", collapse and Part(ENERGIES, figures.energies(logs))),
    )


def _kept(*found: tuple[str, object]) -> list[Section]:
    return [Section(title, part) for title, part in found if isinstance(part, Part)]


def _partition(log: RunLog) -> Part:
    told = log.manifest["partition"]
    mixes, sizes = (short(number(told.get(name))) for name in ("label_js", "size_cv"))
    measured = f"Distance of the label mixes (Jensen-Shannon): {mixes}; variation of the sizes: {sizes}; 0 is alike."
    return Part(f"{PARTITION} {measured}", figures_clients.partition(log))


def _load(log: RunLog) -> Part:
    model = log.manifest["model"]
    labels = model.get("labels", len(log.manifest["partition"].get("label_names", [])))
    code = f"""from peft import PeftModel
from transformers import AutoModelForSequenceClassification

base = AutoModelForSequenceClassification.from_pretrained({str(model.get("name", "MODEL"))!r}, num_labels={labels})
model = PeftModel.from_pretrained(base, {str(log.folder / "adapter")!r})"""
    return Part("Loads the adapter and the head of this run onto its base model.", code=code)
