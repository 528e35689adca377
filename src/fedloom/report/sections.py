"""What the page says, in order: sections of pictures, tables and code, each with a sentence on how to read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedloom.report import (
    client_tables,
    facts,
    figures,
    figures_clients,
    figures_ranks,
    figures_timeline,
    rank_facts,
    tables,
    timeline,
)
from fedloom.report.client_tables import groups, reasons, tiers
from fedloom.report.numbers import number, short
from fedloom.report.run_log import RunLog
from fedloom.report.tables import Grid


@dataclass(frozen=True, slots=True)
class Part:
    """A picture, a table or a piece of code; `caption` says how to read it, `finding` what is to be seen in it.

    `kind` says how a table is set: numbers or words.
    """

    caption: str
    finding: str = ""
    svg: str = ""
    grid: Grid | None = None
    code: str = ""
    kind: str = "numbers"


@dataclass(frozen=True, slots=True)
class Section:
    """Parts under a heading."""

    title: str
    parts: tuple[Part, ...]


CURVES = """
The same scores of the global model three times: against rounds (or uploads, where a version is no round), against {}
and against bytes sent by clients; dashed lines are baselines. A curve that rises earlier got there with less."""
PERPLEXITY = """
Perplexity is the exponential of the mean loss of a token of the reference answers: how many tokens the model wavers between, as it
were. 1 would be a model that knows the answers by heart; a curve that falls earlier got there with less."""
SAMPLES = """
Test requests, drawn at random; what the model writes by itself, the likeliest token each time, before training and at the end."""
LOSS = """
Training loss is measured on the clients' own examples while they train (of many versions the mean of neighbours is drawn), test
loss on the merged model. A test loss that rises while the training loss still falls is overfitting."""
LOSSES = """
Mean training loss of the merged updates, on the clients' own examples, of many versions as the mean of neighbours; compare it
only between runs with the same data."""
SUMMARY = """
Time and bytes until the run ended; the last two columns, where present, say when each run first reached the accuracy
that all of them reached, and with how many bytes."""
DIFFERENT = "Only what differs is listed; every other setting is the same in all runs."
ENERGY = """
Energy is the squared size of the global model in each of its directions, strongest first; the effective rank counts the
directions that carry it. In a rank collapse the effective rank falls to the smallest client rank: the directions
that only large clients train fade away. Bars: what each merge cut off to keep the server's rank."""
ENERGIES = """
In a rank collapse the share within the smallest client rank climbs to 100 % while the effective rank falls: the
directions that only large clients train fade away. On the right, the share of energy that each merge cut off."""
GIVEN = """
Energy: how much of the global model a client is given to train on. 100 % is all of it; at 0 % and below, what it is given
is no nearer to the model than nothing. A method that cuts gives a low rank less; a share that climbs to 100 % at every
rank while the effective rank above falls is rank collapse and no gain."""
PAID = """
Bytes: the mean of one task, down over all tasks, up over those that were answered."""
SERVED = """
A dot is the final model, as a client of that rank receives it, on that client's own held-out examples; the dash is what
it would reach {}. A line is the mean of the clients, its band one standard error.
Clients differ in more than their rank (speed, data, how often they took part), so a gap need not come from the rank."""
TIERS = """
Slowest tier first, sums over all tasks. What is neither head nor fold is adapter; the time is the mean of receiving,
training and sending together."""
ACTIVITY = """
One row a client{}; white is idle, hatched work was thrown away, and fine vertical lines are merges (where
there are few enough to be told apart)."""
LINKS = """
Down and up are what of a task was not training, divided as its bytes were: the engine's own waiting is in them."""
SITES = """
Sums over all tasks; the time is the mean of receiving, training and sending together; speed and memory are what the
site said of itself."""
WAITING = """
A place is one of the tasks that the schedule lets be under way at once; it waits while it is empty although a client is
idle. Left, the mean number of places over time; right, how much of the run each client was without a task, which in a
federation of more clients than places is also the turn of others."""
GROUPED = """
One row a group, led by an edge: means over the tasks that were merged. Weight is the group's share of examples times local steps,
summed over all its reports; what a schedule makes of it is in its own weights."""
REGROUPED = """
Groups that were made again because the times of clients had drifted apart since they were made; above, clients are counted as they
were grouped at first. A client moves as soon as the edge that it leaves has no task."""
STALENESS = """
How many versions were made while a client trained: an answer improves a model that the server has meanwhile left behind.
Left, over all updates, each where it was merged first; right, over all updates in a version, also those kept from before."""
PARTICIPATION = """
Whose updates made the model. A server that never waits hears fast clients more often; a tier is heard as it should be where its
bar is as high as its share of the clients, or of the examples. Right, a dash is the client's share of the examples."""
PARTICIPATION_ONE = """
Whose updates made the model. A server that never waits hears fast clients more often. A dash is the client's share of the
examples."""
PARTICIPATION_OF = """
Whose updates made the model: a tier is heard as it should be where its bar is as high as its share of the clients, or of the
examples."""
PACES = """
Waiting is a schedule's places that are empty although a client is idle, times how long; staleness is the number of versions
made while a client trained."""
SENDING = """
Answers that the server accepted, and bytes of tasks and answers, so far. The heads of messages, and what was sent again, are not
counted; `fedloom status` tells all that went over the link since the server was started last."""
SPENDING = "Answers that the server accepted, and bytes of all messages, so far."

AGAIN = "A row can be given again as --set KEY=VALUE."
UNUSED = (
    f" Settings of a simulated world ({', '.join(facts.SIMULATED)}) play no part on real machines and are left out."
)
PARTITION = """
Above, how many examples each client holds; below, the mix of {} among them. The more the columns differ, the
harder the averaging."""


def single(log: RunLog) -> list[Section]:
    """The full report of one run; what was not recorded is left out."""
    chosen = tables.settings(log)
    return _kept(
        (
            facts.measure(log).capitalize(),
            log.scores and Part(CURVES.format(facts.clock(log)), svg=figures.accuracies([log])),
        ),
        ("Perplexity", facts.writes(log) and log.scores and Part(PERPLEXITY, svg=figures.perplexities([log]))),
        ("Answers", log.samples and Part(SAMPLES, grid=tables.samples(log), kind="texts")),
        ("Loss", log.versions and Part(LOSS, svg=figures.losses([log]))),
        ("Rank and energy", facts.spectra(log) and Part(ENERGY, svg=figures.energy(log))),
        ("Rank heterogeneity", _heterogeneity(log)),
        ("Sites", facts.deployed(log) and log.manifest["clients"] and Part(SITES, grid=client_tables.table(log))),
        (
            "Activity",
            log.tasks and Part(_acting(log), svg=figures_clients.activity(log)),
        ),
        ("Waiting", timeline.timed(log) and Part(WAITING, timeline.waited(log), svg=figures_timeline.waiting(log))),
        ("Groups", _groups(log)),
        ("Staleness", _staleness(log)),
        ("Participation", _participation(log)),
        (
            "Uploads and bytes",
            timeline.timed(log)
            and Part(SENDING if facts.deployed(log) else SPENDING, svg=figures_timeline.spending(log)),
        ),
        ("Data", log.manifest["partition"].get("clients") and _partition(log)),
        ("Use the result", log.versions and _load(log)),
        ("Model", log.manifest["model"] and Part("", grid=tables.model(log), kind="words")),
        ("Settings", chosen.rows and Part(AGAIN + (UNUSED if facts.deployed(log) else ""), grid=chosen, kind="words")),
        ("Versions and machine", Part("", grid=tables.environment(log), kind="words")),
    )


def comparison(logs: Sequence[RunLog]) -> list[Section]:
    """Several runs side by side: what they reached and cost, their curves, and the settings in which they differ."""
    collapse = any(facts.spectra(log) for log in logs)
    timed, alike = all(map(timeline.timed, logs)), all(facts.tiers(log) == facts.tiers(logs[0]) for log in logs)
    differ, scored = tables.differences(logs), any(log.scores for log in logs)
    return _kept(
        ("Summary", Part(SUMMARY, grid=tables.runs(logs))),
        ("Different settings", Part(DIFFERENT if differ.rows else "None.", grid=differ, kind="words")),
        (
            facts.measure(*logs).capitalize(),
            scored and Part(CURVES.format(facts.clock(*logs)), svg=figures.accuracies(logs)),
        ),
        ("Perplexity", facts.writes(*logs) and scored and Part(PERPLEXITY, svg=figures.perplexities(logs))),
        ("Loss", any(log.versions for log in logs) and Part(LOSSES, svg=figures.losses(logs))),
        ("Waiting and staleness", timed and Part(PACES, svg=figures_timeline.paces(logs))),
        ("Participation", timed and alike and Part(PARTICIPATION_OF, svg=figures_timeline.participations(logs))),
        ("Rank and energy", collapse and Part(ENERGIES, svg=figures.energies(logs))),
    )


def _kept(*found: tuple[str, object]) -> list[Section]:
    rows = [(title, part if isinstance(part, tuple) else (part,)) for title, part in found]
    kept = [(title, tuple(part for part in parts if isinstance(part, Part))) for title, parts in rows]
    return [Section(title, parts) for title, parts in kept if parts]


def _groups(log: RunLog) -> tuple[object, ...]:
    """What each edge did, and why."""
    why = reasons(log)
    again = client_tables.regroupings(log)
    return (
        log.edges and Part(GROUPED, grid=groups(log)),
        again.rows and Part(REGROUPED, grid=again, kind="words"),
        why.rows and Part("", grid=why, kind="words"),
    )


def _heterogeneity(log: RunLog) -> tuple[object, ...]:
    """What each rank is given and pays, how it is served, and the same by tier as a table."""
    used, by_tier = rank_facts.used(log), tiers(log)
    before = "without any training" if facts.writes(log) else "by always answering its commonest label"
    one = f"There is only one rank: every client trains at rank {used[0]}." if len(used) == 1 else ""
    shares, paid = rank_facts.kept(log), rank_facts.paid(log)
    served = " ".join(text for text in (rank_facts.served(log), rank_facts.missing(log)) if text)
    given = " ".join(text for text in (one, rank_facts.received(log), paid, rank_facts.rounded(log)) if text)
    return (
        (paid or shares)
        and Part(f"{GIVEN if shares else ''}{PAID if paid else ''}", given, svg=figures_ranks.handed(log)),
        log.clients and Part(SERVED.format(before), served, svg=figures_ranks.clients(log)),
        not log.clients and served and Part("", served),
        by_tier.rows and not facts.deployed(log) and Part(TIERS, grid=by_tier),
    )


def _acting(log: RunLog) -> str:
    return ACTIVITY.format("") + LINKS if facts.deployed(log) else ACTIVITY.format(", slowest tier on top")


def _staleness(log: RunLog) -> object:
    """A picture where something was stale."""
    counts = timeline.staleness(log)
    svg = figures_timeline.staleness(log) if any(counts) and timeline.timed(log) else ""
    return counts and Part(STALENESS if svg else "", timeline.stale(log), svg=svg)


def _participation(log: RunLog) -> object:
    rows, caption = timeline.parts(log), PARTICIPATION if len(facts.tiers(log)) > 1 else PARTICIPATION_ONE
    return any(row.updates > 0 for row in rows) and Part(
        caption, timeline.took_part(rows, log), svg=figures_timeline.participation(log)
    )


def _partition(log: RunLog) -> Part:
    told = log.manifest["partition"]
    mixes, sizes = (short(number(told.get(name))) for name in ("label_js", "size_cv"))
    measured = f"Distance of the label mixes (Jensen-Shannon): {mixes}; variation of the sizes: {sizes}; 0 is alike."
    mix = "kinds of task" if facts.writes(log) else "labels"
    return Part(f"{PARTITION.format(mix)} {measured}", svg=figures_clients.partition(told))


def _load(log: RunLog) -> Part:
    model = log.manifest["model"]
    labels = model.get("labels", len(log.manifest["partition"].get("label_names", [])))
    kind, more = ("CausalLM", "") if facts.writes(log) else ("SequenceClassification", f", num_labels={labels}")
    code = f"""from peft import PeftModel
from transformers import AutoModelFor{kind}

base = AutoModelFor{kind}.from_pretrained({str(model.get("name", "MODEL"))!r}{more})
model = PeftModel.from_pretrained(base, {str(log.folder / "adapter")!r})"""
    head = "" if facts.writes(log) else " and the head"
    return Part(f"Loads the adapter{head} of this run onto its base model.", code=code)
