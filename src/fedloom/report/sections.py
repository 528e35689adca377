"""Sections of the report page, in order: pictures, tables and code, each with a sentence on how to read it.

Pictures are functions: they are drawn when the page is rendered, so that its words can be had (and tested) without them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from fedloom.report import (
    facts,
    figures,
    figures_clients,
    figures_timeline,
    label_facts,
    paired_differences,
    rank_facts,
    tables,
    timeline,
)
from fedloom.report.numbers import plural, short, to_float
from fedloom.report.run_log import RunLog
from fedloom.report.tables import Grid


@dataclass(frozen=True, slots=True)
class PageBlock:
    """Block of a section: a picture, table or piece of code, with its text.

    Fields:
        caption: how to read it.
        finding: what is to be seen in it.
        picture: function that draws it and returns an SVG text, with `narrow=True` for a narrow page (default: no picture).
        grid: table (default: none).
        code: Python code (default: none).
        kind: how a table is set, "numbers", "words" or "texts".
    """

    caption: str
    finding: str = ""
    picture: Callable[..., str] | None = None
    grid: Grid | None = None
    code: str = ""
    kind: str = "numbers"


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and the blocks below it."""

    title: str
    blocks: tuple[PageBlock, ...]


CURVES = """
The same scores of the global model three times: against rounds (or uploads, where a version is no round), against {}
and against bytes sent by clients; dashed lines are baselines. A curve that rises earlier got there with less."""
MEASURES = """
On the test examples, named as in scikit-learn. Balanced accuracy is the mean recall of the labels; F1 is the harmonic mean of
precision and recall{}. A model that has learnt nothing but which label is commonest is no better than the first column."""
AREA = """; AUC is the probability that an example of '{}' is ranked above one that is not, 0.5 by chance"""
RECALL = """
Of the test examples of a label, recall is the share that the last model gives this label; of those that it gives the label,
precision is the share that has it.{}"""
CONFUSION = """
One row per label of the test examples, one column per answer of the last model; what is on the diagonal is right."""
CONFUSED = """
The pairs of labels that the last model confuses most often on the test examples."""
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
MEANS = """
Means over runs that differ in their seed only, and in brackets the lowest and the highest of them."""
PAIRED = """
What a setting changes: differences between runs that differ in nothing else and have the same seed. A dot is a pair, the bar the mean
with its 95 % interval (Student's t over the pairs). If the bar includes 0, chance may explain the difference; of twenty bars one
misses by chance. All runs are scored on the same test examples; what another choice of these would change is not in the bar."""
DIFFERENCES = """
The same differences, and those of other figures: mean ± half of the 95 % interval."""
MOST_DRAWN = 12
"""Paired differences that a picture shows; of more, the table alone."""
ENERGY = """
Energy is the squared size of the global model in each of its directions, strongest first; the effective rank counts the
directions that carry it. In a rank collapse the effective rank falls to the smallest client rank: the directions
that only large clients train fade away. Bars: what each merge cut off to keep the server's rank."""
ENERGIES = """
In a rank collapse the share within the smallest client rank climbs to 100 % while the effective rank falls: the
directions that only large clients train fade away. The last panel: the share of energy that each merge cut off."""
RECEIVED = """
Energy: how much of the global model a client receives to train on. 100 % is all of it; at 0 % and below, what it receives
is no nearer to the model than nothing. A method that truncates gives a low rank less; a share that climbs to 100 % at every
rank while the effective rank above falls is rank collapse and no gain."""
TRAFFIC = """
Bytes: the mean of one task, down over all tasks, up over those that were answered."""
ACCURACY_BY_RANK = """
A dot is the final model, as a client of that rank receives it, on that client's own held-out examples; the dash is what
it would reach {}. A line is the mean of the clients, its band one standard error.
Clients differ in more than their rank (speed, data, how often they took part), so a gap need not come from the rank."""
TIERS = """
Slowest tier first, sums over all tasks; the baseline is the mean of {} for its clients. What is neither
head nor fold is adapter; the time is the mean of receiving, training and sending together."""
ACTIVITY = """
One row per client{}; empty is idle, hatched work was thrown away, and fine vertical lines are merges (where
there are few enough to be told apart)."""
LINKS = """
Down and up are what of a task was not training, divided as its bytes were: the engine's own waiting is in them."""
SITES = """
Sums over all tasks; the baseline is that of {}. The time is the mean of receiving, training and sending
together; speed and memory are what the site reported."""
WAITING = """
A slot is one of the tasks that the schedule lets be in flight at once; it waits while it is empty although a client is
idle. First the mean number of slots over time, then how much of the run each client was without a task; in a
federation of more clients than slots, others have their turn meanwhile."""
GROUPED = """
One row per group with its edge: means over the tasks that were merged. Weight is the group's share of examples times local steps,
summed over all its reports; what a schedule makes of it is in its own weights."""
REGROUPED = """
Regroupings: the times of clients had drifted apart since the groups were made; above, clients are counted as they
were grouped at first. A client moves as soon as the edge that it leaves has no task."""
STALENESS = """
How many versions were made while a client trained: an answer improves a model that the server has meanwhile left behind.
First over all updates, each where it was merged first; then over all updates in a version, also those that were merged before."""
PARTICIPATION = """
Whose updates made the model. A server that never waits merges more updates of fast clients; a tier takes part in proportion where
its bar is as high as its share of the clients, or of the examples. By client, a dash is its share of the examples."""
PARTICIPATION_ONE = """
Whose updates made the model. A server that never waits merges more updates of fast clients. A dash is the client's share of the
examples."""
PARTICIPATION_OF = """
Whose updates made the model: a tier takes part in proportion where its bar is as high as its share of the clients, or of the
examples."""
PACES = """
Waiting is a schedule's slots that are empty although a client is idle, times how long; staleness is the number of versions
made while a client trained."""
SET_ASIDE = """
The canary kept {} out of the model{}. Scores are means over the canary examples of the probability of the right answer. A site that
is set aside again and again is worth a question; one that is so once may just have rare data."""
SENDING = """
Answers that the server accepted, and bytes of tasks and answers, so far. The heads of messages, and what was sent again, are not
counted; `fedloom status` shows all that went over the link since the server was started last."""
SPENDING = "Answers that the server accepted, and bytes of all messages, so far."

SETTINGS = "A row can be set in another run with --set KEY=VALUE."
UNUSED = (
    f" Settings of a simulated world ({', '.join(facts.SIMULATED)}) play no part on real machines and are left out."
)
PARTITION = """
Above, how many examples each client holds; below, the mix of {} among them. The more the columns differ, the
harder the averaging."""


def run_sections(log: RunLog) -> list[Section]:
    """Sections of the report of one run; what was not recorded is left out."""
    settings, deployed = tables.settings_table(log), facts.is_deployed(log)
    sites = deployed and log.manifest["clients"] and _sites_caption(log)
    curves = log.scores and PageBlock(
        CURVES.format(facts.time_name(log)), picture=partial(figures.draw_accuracy, [log])
    )
    perplexity = facts.generates_text(log) and log.scores
    return _present(
        (facts.score_name(log).capitalize(), curves),
        ("Labels", _labels(log)),
        ("Perplexity", perplexity and PageBlock(PERPLEXITY, picture=partial(figures.draw_perplexity, [log]))),
        ("Answers", log.samples and PageBlock(SAMPLES, grid=tables.samples_table(log), kind="texts")),
        ("Loss", log.versions and PageBlock(LOSS, picture=partial(figures.draw_loss, [log]))),
        (
            "Rank and energy",
            facts.versions_with_energy(log) and PageBlock(ENERGY, picture=partial(figures.draw_energy, log)),
        ),
        ("Rank heterogeneity", _rank_heterogeneity(log)),
        ("Sites", sites and PageBlock(sites, grid=tables.site_table(log))),
        (
            "Activity",
            log.tasks and PageBlock(_activity_caption(log), picture=partial(figures_clients.draw_activity, log)),
        ),
        ("Waiting", timeline.records_slot_use(log) and _waiting(log)),
        ("Groups", _groups(log)),
        (
            "Answers set aside",
            log.set_aside and PageBlock(_set_aside_caption(log), grid=tables.set_aside_table(log), kind="words"),
        ),
        ("Staleness", _staleness(log)),
        ("Participation", _participation(log)),
        ("Uploads and bytes", timeline.records_slot_use(log) and _traffic(log)),
        ("Data", log.manifest["partition"].get("clients") and _partition(log)),
        ("Use the result", log.versions and _code(log)),
        ("Model", log.manifest["model"] and PageBlock("", grid=tables.model_table(log), kind="words")),
        ("Settings", settings.rows and PageBlock(SETTINGS + (UNUSED if deployed else ""), grid=settings, kind="words")),
        ("Versions and machine", PageBlock("", grid=tables.environment_table(log), kind="words")),
    )


def comparison_sections(logs: Sequence[RunLog]) -> list[Section]:
    """Sections of the comparison of several runs: what they reached and cost, their curves, and the settings in which they differ."""
    collapse, scored = any(facts.versions_with_energy(log) for log in logs), any(log.scores for log in logs)
    timed = all(map(timeline.records_slot_use, logs))
    alike = all(facts.clients_by_tier(log) == facts.clients_by_tier(logs[0]) for log in logs)
    differences, perplexity = tables.differences_table(logs), facts.generates_text(*logs) and scored
    curves = scored and PageBlock(CURVES.format(facts.time_name(*logs)), picture=partial(figures.draw_accuracy, logs))
    tiers = PageBlock(PARTICIPATION_OF, picture=partial(figures_timeline.draw_participation_comparison, logs))
    return _present(
        ("Paired differences", _paired_differences(logs)),
        ("Summary", PageBlock(SUMMARY, grid=tables.runs_table(logs))),
        ("Different settings", PageBlock(DIFFERENT if differences.rows else "None.", grid=differences, kind="words")),
        (facts.score_name(*logs).capitalize(), curves),
        ("Perplexity", perplexity and PageBlock(PERPLEXITY, picture=partial(figures.draw_perplexity, logs))),
        ("Loss", any(log.versions for log in logs) and PageBlock(LOSSES, picture=partial(figures.draw_loss, logs))),
        (
            "Waiting and staleness",
            timed and PageBlock(PACES, picture=partial(figures_timeline.draw_pace_comparison, logs)),
        ),
        ("Participation", timed and alike and tiers),
        ("Rank and energy", collapse and PageBlock(ENERGIES, picture=partial(figures.draw_energy_comparison, logs))),
    )


def _present(*rows: tuple[str, object]) -> list[Section]:
    """Sections of those rows whose blocks, one or several, are there; in the place of an absent one there is something false."""
    several = [(title, blocks if isinstance(blocks, tuple) else (blocks,)) for title, blocks in rows]
    present = [(title, tuple(block for block in blocks if isinstance(block, PageBlock))) for title, blocks in several]
    return [Section(title, blocks) for title, blocks in present if blocks]


def _paired_differences(logs: Sequence[RunLog]) -> tuple[object, ...]:
    """Means over seeds, and what each setting changes, where runs differ in one setting at a time."""
    grid = paired_differences.differences_grid(logs)
    if not grid.rows:
        return ()
    figure = paired_differences.compared_figures(logs)[0]
    rows = paired_differences.paired_differences(logs, figure)
    clear = [row.sentence() for row in rows if row.clear] or [f"No difference in {figure.name.lower()} is clear."]
    drawn = partial(figures.draw_paired_differences, rows) if len(rows) <= MOST_DRAWN else None
    return (
        PageBlock(PAIRED, " ".join(clear[:MOST_DRAWN]), picture=drawn),
        PageBlock(DIFFERENCES, grid=grid),
        PageBlock(MEANS, grid=paired_differences.cells_grid(logs)),
    )


def _labels(log: RunLog) -> tuple[object, ...]:
    """Tables of how well labels are told apart at the end."""
    line, names = label_facts.labels_after(log), label_facts.label_names(log)
    if not line:
        return ()
    area = AREA.format(names[1]) if len(names) == 2 else ""
    found = _joined(label_facts.lowest_recall_sentence(log, line), label_facts.absent_labels_sentence(log, line))
    lowest = f" Listed are the {tables.MOST_RECALLS} lowest." if len(names) > tables.MOST_RECALLS else ""
    confused = CONFUSION if len(names) <= tables.MOST_LABELS else CONFUSED
    return (
        PageBlock(MEASURES.format(area), found, grid=tables.measures_table(log, line)),
        PageBlock(RECALL.format(lowest), grid=tables.recall_table(log, line)),
        PageBlock(confused, grid=tables.confusion_table(log, line)),
    )


def _groups(log: RunLog) -> tuple[object, ...]:
    """Tables of the tasks of edges, of changes of groups, and of the reasons for tasks."""
    reasons, regroupings = tables.reasons_table(log), tables.regrouping_table(log)
    return (
        log.edges and PageBlock(GROUPED, grid=tables.group_table(log)),
        regroupings.rows and PageBlock(REGROUPED, grid=regroupings, kind="words"),
        reasons.rows and PageBlock("", grid=reasons, kind="words"),
    )


def _sites_caption(log: RunLog) -> str:
    count, most = len(log.manifest["clients"]), tables.MOST_SITES
    shown = f" Listed are {most} of {count:,}, evenly by name." if count > most else ""
    return SITES.format(facts.baseline_name(log)) + shown


def _set_aside_caption(log: RunLog) -> str:
    count = len(log.set_aside)
    shown = f"; the table has the latest {tables.MOST_SET_ASIDE}" if count > tables.MOST_SET_ASIDE else ""
    return SET_ASIDE.format(plural(count, "answer"), shown)


def _rank_heterogeneity(log: RunLog) -> tuple[object, ...]:
    """Pictures of what each rank receives, costs and reaches, and the same by tier as a table."""
    ranks, by_tier = rank_facts.ranks_used(log), tables.tier_table(log)
    before = "without any training" if facts.generates_text(log) else "by always answering its commonest label"
    single = f"There is only one rank: every client trains at rank {ranks[0]}." if len(ranks) == 1 else ""
    shares, traffic = rank_facts.received_energy(log), rank_facts.traffic_sentence(log)
    accuracy = _joined(rank_facts.accuracy_by_rank_sentence(log), rank_facts.unscored_sentence(log))
    tasks = _joined(single, rank_facts.received_sentence(log), traffic, rank_facts.rounding_sentence(log))
    caption = f"{RECEIVED if shares else ''}{TRAFFIC if traffic else ''}"
    clients = partial(figures_clients.draw_client_accuracy, log)
    return (
        (traffic or shares) and PageBlock(caption, tasks, picture=partial(figures_clients.draw_received, log)),
        log.clients and PageBlock(ACCURACY_BY_RANK.format(before), accuracy, picture=clients),
        not log.clients and accuracy and PageBlock("", accuracy),
        by_tier.rows and not facts.is_deployed(log) and PageBlock(TIERS.format(facts.baseline_name(log)), grid=by_tier),
    )


def _joined(*sentences: str) -> str:
    return " ".join(filter(None, sentences))


def _activity_caption(log: RunLog) -> str:
    return ACTIVITY.format("") + LINKS if facts.is_deployed(log) else ACTIVITY.format(", slowest tier on top")


def _waiting(log: RunLog) -> PageBlock:
    return PageBlock(WAITING, timeline.waiting_sentence(log), picture=partial(figures_timeline.draw_waiting, log))


def _traffic(log: RunLog) -> PageBlock:
    caption = SENDING if facts.is_deployed(log) else SPENDING
    return PageBlock(caption, picture=partial(figures_timeline.draw_traffic, log))


def _staleness(log: RunLog) -> object:
    """A sentence, and a picture where something was stale."""
    counts, sentence = timeline.staleness_counts(log), timeline.staleness_sentence(log)
    if any(counts) and timeline.records_slot_use(log):
        return PageBlock(STALENESS, sentence, picture=partial(figures_timeline.draw_staleness, log))
    return counts and PageBlock("", sentence)


def _participation(log: RunLog) -> object:
    """A picture and a sentence, where any update was merged."""
    rows, caption = (
        timeline.client_shares(log),
        PARTICIPATION if len(facts.clients_by_tier(log)) > 1 else PARTICIPATION_ONE,
    )
    if not any(row.updates > 0 for row in rows):
        return None
    sentence = timeline.participation_sentence(rows, log)
    return PageBlock(caption, sentence, picture=partial(figures_timeline.draw_participation, log))


def _partition(log: RunLog) -> PageBlock:
    statistics = log.manifest["partition"]
    mixes, sizes = (short(to_float(statistics.get(name))) for name in ("label_js", "size_cv"))
    measured = f"Distance of the label mixes (Jensen-Shannon): {mixes}; variation of the sizes: {sizes}; 0 is alike."
    mix = "kinds of task" if facts.generates_text(log) else "labels"
    picture = partial(figures_clients.draw_partition, statistics)
    return PageBlock(f"{PARTITION.format(mix)} {measured}", picture=picture)


def _code(log: RunLog) -> PageBlock:
    model = log.manifest["model"]
    labels = model.get("labels", len(log.manifest["partition"].get("label_names", [])))
    kind, more = ("CausalLM", "") if facts.generates_text(log) else ("SequenceClassification", f", num_labels={labels}")
    code = f"""from peft import PeftModel
from transformers import AutoModelFor{kind}

base = AutoModelFor{kind}.from_pretrained({str(model.get("name", "MODEL"))!r}{more})
model = PeftModel.from_pretrained(base, {str(log.folder / "adapter")!r})"""
    head = "" if facts.generates_text(log) else " and the head"
    return PageBlock(f"Loads the adapter{head} of this run onto its base model.", code=code)
