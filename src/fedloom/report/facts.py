"""Facts about a run: the numbers a report rests on, each derived once from the log, and what they say in words.

How slots were used over time is in `timeline`, how clients of each rank fare in `rank_facts`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedloom.report.line_table import PARTS, Line, LineTable
from fedloom.report.numbers import format_bytes, format_duration, percent, plural, short, to_float
from fedloom.report.run_log import RunLog

SIMULATED = ("partition", "world", "availability", "faults")
"""Settings that only a simulation has a use for."""


def label(text: object, length: int = 28) -> str:
    """Return a user's text as it fits into a table or a legend: one line, cut to length, no control characters."""
    name = "".join(char for char in " ".join(str(text).split()) if char.isprintable())
    return name if len(name) <= length else name[: length - 1] + "…"


def run_names(logs: Sequence[RunLog]) -> list[str]:
    """Return a distinct name for each run: its own, with the folder's where two share one, numbered where that is not enough.

    Where all runs have the same name, as those of a sweep, the folder's alone.
    """
    names, folders = [str(log.manifest["name"]) for log in logs], [log.folder.resolve().name for log in logs]
    clear = [n if names.count(n) == 1 else f"{n} ({folder})" for n, folder in zip(names, folders, strict=True)]
    clear = folders if len(logs) > 1 == len(set(names)) else clear
    return [label(n if clear.count(n) == 1 else f"{n} #{i}", 48) for i, n in enumerate(clear, 1)]


def nan_mean(values: Iterable[float]) -> float:
    """Mean of the values that were recorded, that is, are not NaN; NaN if none was."""
    if isinstance(values, np.ndarray):
        return float(there.mean()) if len(there := values[~np.isnan(values)]) else math.nan
    recorded = [value for value in values if not math.isnan(value)]
    return sum(recorded) / len(recorded) if recorded else math.nan


def version_count(log: RunLog) -> int:
    """Versions of the global model that the run has made."""
    return int(log.versions[-1]["version"]) if log.versions else 0


def version_noun(*logs: RunLog) -> str:
    """Word for a version: "round" where no client is at work when one is made, else "version"."""
    return "version" if any((log.versions.numbers("outstanding") > 0).any() for log in logs) else "round"


def latest_value(log: RunLog, key: str) -> float:
    """Value of the last version's line, a total where it is cumulative; before the first merge the sum over the tasks."""
    return to_float(log.versions[-1].get(key)) if log.versions else total_of(log.tasks, key)


def elapsed_seconds(log: RunLog) -> float:
    """Time of the last version or answer, in seconds since the start."""
    ends = np.concatenate([log.versions.numbers("time"), log.tasks.numbers("arrived")])
    return float(np.nanmax(ends)) if not np.isnan(ends).all() else 0.0


def is_deployed(*logs: RunLog) -> bool:
    """Whether any of the runs was carried out on real machines."""
    return any(log.manifest.get("deployed") for log in logs)


def time_name(*logs: RunLog) -> str:
    """Name of the runs' time: it is virtual where all of them were simulated."""
    return "time" if is_deployed(*logs) else "virtual time"


def duration_text(log: RunLog, seconds: float) -> str:
    """Return a number of seconds of the run in words."""
    return format_duration(seconds) if is_deployed(log) else f"{short(seconds)} virtual seconds"


def relevant_settings(log: RunLog) -> Line:
    """Settings that play a part in the run: on real machines not those of the simulated world."""
    return {key: value for key, value in log.manifest["run"].items() if not (is_deployed(log) and key in SIMULATED)}


def accuracy(score: Line | None) -> float:
    """Accuracy of a score line; NaN where there is none."""
    return to_float(score.get("accuracy")) if score else math.nan


def perplexity(score: Line | None) -> float:
    """Perplexity of a score line: the exponential of the mean loss of a token; NaN for a model that chooses labels."""
    return to_float(score.get("perplexity")) if score else math.nan


def generates_text(*logs: RunLog) -> bool:
    """Whether the models of all these runs write text, and none chooses a label."""
    return all(log.manifest["model"].get("labels", 0) is None for log in logs)


def score_name(*logs: RunLog) -> str:
    """Name of the score: accuracy of labels, or of the tokens of reference answers, each predicted from the right ones before."""
    return "token accuracy" if generates_text(*logs) else "accuracy"


def baseline_name(log: RunLog) -> str:
    """Name of the baseline of a client's score: what it would reach without any training."""
    return "the model before training" if generates_text(log) else "always answering their commonest label"


def majority_accuracy(log: RunLog) -> float:
    """Test accuracy of always answering the commonest label; NaN where text is written or it is not recorded."""
    return to_float(log.manifest["baselines"].get("majority"))


def majority_answer(log: RunLog, length: int = 28) -> str:
    """Name the majority baseline in words, with its label where that is recorded."""
    name = log.manifest["metrics"].get("majority_label")
    answer = "the commonest label" if name is None else f"'{label(name, length)}'"
    return f"always answering {answer}"


def majority_clause(log: RunLog, score: Line) -> str:
    """Clause that compares a score with the majority baseline; empty where there is none."""
    base = majority_accuracy(log)
    gap, doubt = accuracy(score) - base, sampling_error(score)
    if math.isnan(gap):
        return ""
    verdict = ", which is more" if gap < -doubt else ", no different within the sampling error" if gap <= doubt else ""
    return f"; {majority_answer(log)} would give {percent(base)}{verdict}"


def final_score(log: RunLog) -> Line | None:
    """Score line of the last version that was scored."""
    return log.scores[-1] if log.scores else None


def initial_score(log: RunLog) -> Line | None:
    """Score line of the model before training, version 0."""
    return next((score for score in log.scores if score.get("version") == 0), None)


def best_accuracy(log: RunLog) -> float:
    """Highest accuracy of any version that was scored."""
    return max((a for a in map(accuracy, log.scores) if not math.isnan(a)), default=math.nan)


def sampling_error(score: Line | None) -> float:
    """Sampling error of a score (95 %): how far another draw of as many test examples would move it by chance."""
    if score and "accuracy_error" in score:  # of tokens, which are not drawn one by one
        return 1.96 * to_float(score["accuracy_error"])
    share, count = accuracy(score), to_float(score.get("examples")) if score else math.nan
    return 1.96 * math.sqrt(max(0.0, share * (1 - share)) / count) if count > 0 else math.nan


def values_at_scores(log: RunLog, scores: Iterable[Line], key: str) -> list[float]:
    """Value under `key` of the version line that belongs to each score; 0 at version 0, when nothing has been spent."""
    order = np.argsort(made := log.versions.numbers("version"), kind="stable")
    versions, values = [0.0, *made[order]], [0.0, *log.versions.numbers(key)[order]]
    wanted = [to_float(score.get("version")) for score in scores]
    places = (np.searchsorted(versions, wanted, side="right") - 1).tolist()
    pairs = zip(places, wanted, strict=True)
    return [float(values[place]) if place >= 0 and versions[place] == version else math.nan for place, version in pairs]


def value_at_version(log: RunLog, version: object, key: str) -> float:
    """Value under `key` of the line of one version; 0 at version 0."""
    return values_at_scores(log, [{"version": version}], key)[0]


def first_reaching(log: RunLog, target: float) -> Line | None:
    """Score line of the first trained version at or above the target; version 0 does not count, since it took no time."""
    return next((score for score in log.scores if score.get("version") and accuracy(score) >= target), None)


def worst_client(log: RunLog) -> Line | None:
    """Score line of the client with the lowest accuracy at the end."""
    return lowest_accuracy(log.clients)


def lowest_accuracy(scores: Iterable[Line]) -> Line | None:
    """Score line with the lowest accuracy; None if no accuracy is recorded."""
    return min((score for score in scores if not math.isnan(accuracy(score))), key=accuracy, default=None)


def worst_client_text(log: RunLog, line: Line) -> str:
    """Name of the client of this score with its tier (on real machines there are none), its baseline, and how many gave no score."""
    name, base, lacking = label(line["client"]), to_float(line.get("base_accuracy")), len(log.unscored)
    parts = [name if is_deployed(log) else f"{name} ({label(line.get('tier'))})"]
    if not math.isnan(base):
        parts.append(f"{percent(base)} {'before training' if generates_text(log) else 'by its commonest label'}")
    if lacking:
        parts.append(f"{lacking} of {len(log.clients) + lacking} gave no score")
    return "; ".join(parts)


def client_ranks(log: RunLog) -> list[int]:
    """Ranks that clients trained at, or could have trained at where no task was recorded; sorted."""
    possible = log.manifest["model"].get("lora_parameters_by_rank", {})
    return ranks_of(log.tasks, log.clients) or sorted(map(int, possible))


def effective_rank(energy: Sequence[float]) -> float:
    """Number of directions that carry the energy: the exponential of its entropy, 1 when one direction has it all.

    >>> effective_rank([0.5, 0.5, 0.0]), effective_rank([0.2, 0.2])
    (2.0, 2.0)
    """
    shares = [share / sum(energy) for share in energy if share > 0]
    return round(math.exp(-sum(share * math.log(share) for share in shares)), 6)


def energy_within_smallest_rank(log: RunLog, version: Line) -> float:
    """Share of a version's energy in the directions that the smallest client rank has; 1 in a rank collapse."""
    ranks = client_ranks(log)
    return sum(version["energy"][: ranks[0]]) if ranks else 1.0


def versions_with_energy(log: RunLog) -> LineTable:
    """Lines of the versions with an energy: a server whose product is always zero (FedSA) has none."""
    places, energies = log.versions.words("energy")
    return log.versions.select(np.isin(places, [place for place, energy in enumerate(energies) if any(energy or ())]))


def was_merged(tasks: LineTable) -> NDArray[np.bool_]:
    """Tell of which tasks the update was merged."""
    return tasks.matches("status", ["merged"])


def merged_count(tasks: LineTable) -> int:
    """Tasks whose update was merged."""
    return int(was_merged(tasks).sum())


def ranks_of(tasks: LineTable, clients: Iterable[Line] = ()) -> list[int]:
    """Ranks of these tasks and scores, sorted."""
    found = tasks.numbers("rank")
    return sorted({*np.unique(found[~np.isnan(found)]).astype(int).tolist(), *(int(line["rank"]) for line in clients)})


def mean_task_seconds(tasks: LineTable) -> float:
    """Mean time of receiving, training and sending together, of the tasks that were answered."""
    parts = np.stack([tasks.numbers("seconds", part) for part in PARTS])
    return nan_mean(np.nansum(parts, axis=0)[~np.isnan(parts).all(axis=0)])


def total_of(tasks: LineTable, key: str) -> float:
    """Sum over the tasks of a number, such as `bytes_up`; NaN where one of them does not tell it."""
    return float(tasks.numbers(key).sum())


def clients_by_tier(log: RunLog) -> dict[str, list[str]]:
    """Names of the clients of every tier, slowest tier first."""
    groups: dict[str, list[str]] = {}
    profiles: Mapping[str, Line] = log.manifest["clients"]
    for client in sorted(profiles):
        groups.setdefault(str(profiles[client].get("tier", "default")), []).append(client)

    def speed(tier: str) -> tuple[float, str]:
        return nan_mean(to_float(profiles[client].get("flops")) for client in groups[tier]), tier

    return {tier: groups[tier] for tier in sorted(groups, key=speed)}


def result_sentence(log: RunLog) -> str:
    """Result of a run in plain words."""
    score, begin, done, what = final_score(log), accuracy(initial_score(log)), version_count(log), version_noun(log)
    if score is None:
        used = f"After {plural(done, what)}" if done else f"The run ended before its first {what};"
        return f"{used} no {score_name(log)} was measured."
    shown = f"{'predicts' if generates_text(log) else 'classifies'} {_shown(score)}"
    if score.get("version") == 0:
        beside = majority_clause(log, score)
        return f"The untrained model {shown}{beside}; no trained version was scored ({plural(done, what)} done)."
    who = plural(len(log.manifest["clients"]), "region" if "regions" in log.manifest else "site")
    used = duration_text(log, to_float(score.get("time"))) + (f", {who}" if is_deployed(log) else "")
    uploads = value_at_version(log, score.get("version"), "uploads")
    used += f", {plural(int(uploads), 'upload')}" if uploads > 0 else ""
    sent = f"{format_bytes(value_at_version(log, score.get('version'), 'bytes_up'))} up"
    real = " on real machines" if is_deployed(log) else ""
    text = f"After {plural(int(score['version']), what)}{real} ({used}, {sent}) the model {shown}"
    before = perplexity(initial_score(log))
    text += "" if math.isnan(begin) else f"; it started at {percent(begin)}"
    text += "" if math.isnan(before) else f" and {short(before)}"
    text += majority_clause(log, score)
    ranks = client_ranks(log)
    text += f"; the largest client rank is {ranks[-1]}." if ranks else "."
    return text if score["version"] == done else f"{text} {what.capitalize()} {done} was not scored."


def _shown(score: Line) -> str:
    count = f"{int(to_float(score.get('examples'))):,}"
    if "perplexity" not in score:
        return f"{percent(accuracy(score))} of the {count} test examples correctly"
    tokens = f"{int(to_float(score.get('tokens'))):,} tokens of {count} test answers correctly"
    return f"{percent(accuracy(score))} of the {tokens}, at a perplexity of {short(perplexity(score))}"


def comparison_sentence(logs: Sequence[RunLog]) -> str:
    """Result of a comparison in plain words, with the sampling error of one test set."""
    scored = [
        (accuracy(final_score(log)), name, log) for log, name in zip(logs, run_names(logs), strict=True) if log.scores
    ]
    if len(scored) < 2:
        return f"Of {len(logs)} runs, {len(scored)} measured an accuracy: there is nothing to compare yet."
    ordered = sorted(scored, key=lambda item: (-item[0], item[1]))
    (high, leader, log), (low, trailer, _) = ordered[0], ordered[-1]
    gap = f"{100 * (high - low):.1f} points above the lowest, {trailer} ({percent(low)})"
    ends = f"{leader} ends highest with {percent(high)}, {gap}"
    if percent(high) == percent(low):
        ends = f"all end with {percent(high)}"
    doubt = f"one score alone is uncertain by ± {100 * sampling_error(final_score(log)):.1f} points (95 %, choice of test examples)"
    text = f"Of {plural(len(logs), 'run')}, {ends}; {doubt}"
    return f"{text}{majority_clause(log, log.scores[-1])}."
