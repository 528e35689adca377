"""The numbers a report rests on, each derived once from the log so that pictures, tables and sentences agree."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from fedloom.report.numbers import lasting, number, percent, plural, short, size
from fedloom.report.run_log import Line, RunLog

SIMULATED = ("partition", "world", "availability", "faults")
"""Settings that only a simulation has a use for."""


def label(text: object, length: int = 28) -> str:
    """A user's text as it fits into a table or a legend: one line, cut to length, no control characters."""
    name = "".join(char for char in " ".join(str(text).split()) if char.isprintable())
    return name if len(name) <= length else name[: length - 1] + "…"


def names(logs: Sequence[RunLog]) -> list[str]:
    """One distinct name a run: its own, with the folder's where two share one, numbered where that is not enough."""
    own = [str(log.manifest["name"]) for log in logs]
    clear = [n if own.count(n) == 1 else f"{n} ({log.folder.name})" for n, log in zip(own, logs, strict=True)]
    return [label(n if clear.count(n) == 1 else f"{n} #{i}", 48) for i, n in enumerate(clear, 1)]


def mean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def rounds(log: RunLog) -> int:
    return int(log.versions[-1]["version"]) if log.versions else 0


def noun(*logs: RunLog) -> str:
    """What a version is called: a round, where nobody is at work when one is made."""
    return "version" if any(line.get("outstanding") for log in logs for line in log.versions) else "round"


def last(log: RunLog, key: str) -> float:
    """The last version's value, a total where it is cumulative; before the first merge, what the tasks say."""
    return number(log.versions[-1].get(key)) if log.versions else sum(number(task.get(key)) for task in log.tasks)


def elapsed(log: RunLog) -> float:
    ends = [line.get(key) for lines, key in ((log.versions, "time"), (log.tasks, "arrived")) for line in lines]
    return max((t for t in map(number, ends) if not math.isnan(t)), default=0.0)


def deployed(*logs: RunLog) -> bool:
    """Whether any of them was carried out on real machines."""
    return any(log.manifest.get("deployed") for log in logs)


def clock(*logs: RunLog) -> str:
    """What their time is called."""
    return "time" if deployed(*logs) else "virtual time"


def took(log: RunLog, seconds: float) -> str:
    """So many seconds of the run, in words."""
    return lasting(seconds) if deployed(log) else f"{short(seconds)} virtual seconds"


def chosen(log: RunLog) -> Line:
    """The settings that say something about the run: on real machines not those of the simulated world."""
    return {key: value for key, value in log.manifest["run"].items() if not (deployed(log) and key in SIMULATED)}


def accuracy(score: Line | None) -> float:
    return number(score.get("accuracy")) if score else math.nan


def perplexity(score: Line | None) -> float:
    """How many words a model that writes wavers between, as it were; of one that chooses labels, not-a-number."""
    return number(score.get("perplexity")) if score else math.nan


def writes(*logs: RunLog) -> bool:
    """Whether all the models write text, and none chooses a label."""
    return all(log.manifest["model"].get("labels", 0) is None for log in logs)


def measure(*logs: RunLog) -> str:
    """What the scores are the accuracy of: labels, or the tokens of reference answers, each predicted from the right ones before."""
    return "token accuracy" if writes(*logs) else "accuracy"


def baseline(log: RunLog) -> str:
    """What a client's score is held against."""
    return "the model before training" if writes(log) else "always answering their commonest label"


def final(log: RunLog) -> Line | None:
    return log.scores[-1] if log.scores else None


def first(log: RunLog) -> Line | None:
    return next((score for score in log.scores if score.get("version") == 0), None)


def best(log: RunLog) -> float:
    return max((a for a in map(accuracy, log.scores) if not math.isnan(a)), default=math.nan)


def margin(score: Line | None) -> float:
    """The sampling error of a score (95 %): how far another draw of as many test examples would move it by chance."""
    if score and "accuracy_error" in score:  # of tokens, which are not drawn one by one
        return 1.96 * number(score["accuracy_error"])
    share, count = accuracy(score), number(score.get("examples")) if score else math.nan
    return 1.96 * math.sqrt(max(0.0, share * (1 - share)) / count) if count > 0 else math.nan


def spent(log: RunLog, scores: Iterable[Line], key: str) -> list[float]:
    """What the version line of each score says, nothing having been spent at version 0."""
    told = {0: 0.0} | {line["version"]: number(line.get(key)) for line in log.versions}
    return [told.get(score.get("version"), math.nan) for score in scores]


def at_version(log: RunLog, version: object, key: str) -> float:
    """The same for one version."""
    return spent(log, [{"version": version}], key)[0]


def first_reaching(log: RunLog, target: float) -> Line | None:
    """The first score of a trained model at or above the target: what the start happens to reach took no time."""
    return next((score for score in log.scores if score.get("version") and accuracy(score) >= target), None)


def worst(log: RunLog) -> Line | None:
    known = [client for client in log.clients if not math.isnan(accuracy(client))]
    return min(known, key=accuracy, default=None)


def whose(log: RunLog, line: Line) -> str:
    """The client of this score, with its tier, or beside how many sites gave none."""
    name, lacking = label(line["client"]), len(log.unscored)
    if not deployed(log):
        return f"{name} ({label(line.get('tier'))})"
    return f"{name}; {lacking} of {len(log.clients) + lacking} gave no score" if lacking else name


def client_ranks(log: RunLog) -> list[int]:
    """The ranks that clients trained at, or could have where no task was recorded."""
    used = {int(line["rank"]) for line in (*log.tasks, *log.clients)}
    return sorted(used or map(int, log.manifest["model"].get("lora_parameters_by_rank", {})))


def effective_rank(energy: Sequence[float]) -> float:
    """How many of these directions carry the energy: the exponential of its entropy, 1 when one direction has it all.

    >>> effective_rank([0.5, 0.5, 0.0]), effective_rank([0.2, 0.2])
    (2.0, 2.0)
    """
    shares = [share / sum(energy) for share in energy if share > 0]
    return round(math.exp(-sum(share * math.log(share) for share in shares)), 6)


def spectra(log: RunLog) -> list[Line]:
    """The versions with an energy: a server whose product is always zero (FedSA) has none."""
    return [line for line in log.versions if any(line.get("energy") or ())]


def tiers(log: RunLog) -> dict[str, list[str]]:
    """The clients of every tier, slowest tier first."""
    groups: dict[str, list[str]] = {}
    known: Mapping[str, Line] = log.manifest["clients"]
    for client in sorted(known):
        groups.setdefault(str(known[client].get("tier", "default")), []).append(client)

    def speed(tier: str) -> tuple[float, str]:
        return mean(number(known[client].get("flops")) for client in groups[tier]), tier

    return {tier: groups[tier] for tier in sorted(groups, key=speed)}


def sentence(log: RunLog) -> str:
    """The result of a run in plain words."""
    score, begin, done, what = final(log), accuracy(first(log)), rounds(log), noun(log)
    if score is None:
        used = f"After {plural(done, what)}" if done else f"The run ended before its first {what};"
        return f"{used} no {measure(log)} was measured."
    shown = f"{'predicts' if writes(log) else 'classifies'} {_shown(score)}"
    if score.get("version") == 0:
        return f"The untrained model {shown}; no trained version was scored ({plural(done, what)} done)."
    who = plural(len(log.manifest["clients"]), "region" if "regions" in log.manifest else "site")
    used = took(log, number(score.get("time"))) + (f", {who}" if deployed(log) else "")
    uploads = at_version(log, score.get("version"), "uploads")
    used += f", {plural(int(uploads), 'upload')}" if uploads > 0 else ""
    sent = f"{size(at_version(log, score.get('version'), 'bytes_up'))} up"
    real = " on real machines" if deployed(log) else ""
    text = f"After {plural(int(score['version']), what)}{real} ({used}, {sent}) the model {shown}"
    before = perplexity(first(log))
    text += "" if math.isnan(begin) else f"; it started at {percent(begin)}"
    text += "" if math.isnan(before) else f" and {short(before)}"
    ranks = client_ranks(log)
    text += f"; the largest client rank is {ranks[-1]}." if ranks else "."
    return text if score["version"] == done else f"{text} {what.capitalize()} {done} was not scored."


def _shown(score: Line) -> str:
    count = f"{int(number(score.get('examples'))):,}"
    if "perplexity" not in score:
        return f"{percent(accuracy(score))} of the {count} test examples correctly"
    asked = f"{int(number(score.get('tokens'))):,} tokens of {count} test answers correctly"
    return f"{percent(accuracy(score))} of the {asked}, at a perplexity of {short(perplexity(score))}"


def verdict(logs: Sequence[RunLog]) -> str:
    """The result of a comparison in plain words, with the doubt that one test set leaves."""
    scored = [(accuracy(final(log)), name, log) for log, name in zip(logs, names(logs), strict=True) if log.scores]
    if len(scored) < 2:
        return f"Of {len(logs)} runs, {len(scored)} measured an accuracy: there is nothing to compare yet."
    ordered = sorted(scored, key=lambda item: (-item[0], item[1]))
    (high, leader, log), (low, trailer, _) = ordered[0], ordered[-1]
    gap = f"{100 * (high - low):.1f} points above the lowest, {trailer} ({percent(low)})"
    doubt = f"one score alone is uncertain by ± {100 * margin(final(log)):.1f} points (95 %, choice of test examples)"
    return f"Of {plural(len(logs), 'run')}, {leader} ends highest with {percent(high)}, {gap}; {doubt}."
