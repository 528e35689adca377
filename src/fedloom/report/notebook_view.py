"""What a notebook shows of the clients and of the result of a run: small tables, and pictures that follow the colours of the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fedloom.report import facts
from fedloom.report.label_facts import f1, f1_name
from fedloom.report.numbers import format_bytes, percent, plural, short
from fedloom.report.run_log import RunLog
from fedloom.report.style import KINDS, SERIES, thinned

WIDE, HIGH = 320, 90
"""Size of the picture of a score (pixels)."""
MARGIN = 8
PALETTE = (*SERIES[:6], *KINDS[5:7], KINDS[8])
"""Colours of labels that stand out from white and from black."""
MOST_CLIENTS = 20
"""Clients that a notebook lists; the largest and the smallest of more."""


# Clients of a job ----------------------------------------------------------------------------------------------------------


def partition_html(statistics: Mapping[str, Any]) -> str:
    """Return the clients of `fedloom.data.partition.partition_statistics` with their examples, and a bar for the labels of each."""
    clients, names = statistics["clients"], [str(name) for name in statistics["label_names"]]
    order = sorted(clients, key=lambda name: (-clients[name]["examples"], name))
    half = MOST_CLIENTS // 2
    shown = order if len(order) <= MOST_CLIENTS else [*order[:half], *order[-half:]]
    rows = "".join(
        f'<tr><td style="text-align:left">{escape(str(name))}</td><td>{clients[name]["examples"]:,}</td>'
        f"<td>{clients[name]['held_out']:,}</td><td>{_label_bar(clients[name]['labels'], names)}</td></tr>"
        for name in shown
    )
    left = f"<p>{len(order) - len(shown)} more clients are between these.</p>" if len(shown) < len(order) else ""
    keys = " ".join(
        f'<span style="color:{PALETTE[at % len(PALETTE)]}">&#9632;</span>&nbsp;{escape(facts.label(name))}'
        for at, name in enumerate(names[: len(PALETTE)])
    )
    more = f" and {len(names) - len(PALETTE)} more" if len(names) > len(PALETTE) else ""
    measures = f"label divergence {statistics['label_js']:.3f} bits, size variation {statistics['size_cv']:.2f}"
    head = "<tr><th>client</th><th>train</th><th>held out</th><th>labels</th></tr>"
    return f"<p>{plural(len(order), 'client')}; {measures}</p><table>{head}{rows}</table>{left}<p>{keys}{more}</p>"


def _label_bar(counts: Sequence[int], names: Sequence[str]) -> str:
    """A bar divided by the counts of labels."""
    whole, at, parts = max(1, sum(counts)), 0.0, []
    for place, count in enumerate(counts):
        width = 160.0 * count / whole
        title = f"<title>{escape(facts.label(names[place]))}: {count}</title>"
        parts.append(
            f'<rect x="{at:.1f}" width="{width:.1f}" height="12" fill="{PALETTE[place % len(PALETTE)]}">{title}</rect>'
        )
        at += width
    told = ", ".join(f"{facts.label(name)} {count}" for name, count in zip(names, counts, strict=True) if count)
    return f'<svg width="160" height="12" role="img" aria-label="{escape(told)}">{"".join(parts)}</svg>'


# A result ------------------------------------------------------------------------------------------------------------------


def result_words(log: RunLog) -> str:
    """Return a run's state and result in a few words."""
    score, base = facts.final_score(log), facts.majority_accuracy(log)
    words = [str(log.manifest["status"]), plural(facts.version_count(log), facts.version_noun(log))]
    if score is not None:
        words.append(f"{facts.score_name(log)} {percent(facts.accuracy(score))}")
        if not math.isnan(base):
            words[-1] += f" (majority {percent(base)})"
        if not math.isnan(perplexity := facts.perplexity(score)):
            words.append(f"perplexity {short(perplexity)}")
    if not math.isnan(sent := facts.latest_value(log, "bytes_up")):
        words.append(f"{format_bytes(sent)} up")
    return ", ".join(words).replace("\u00a0", " ")


def result_html(log: RunLog) -> str:
    """Return a run's result for a notebook: one sentence, the score by version, a few figures, where the report is."""
    figures = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th><td style="text-align:left">{escape(value)}</td></tr>'
        for name, value in _figures(log)
    )
    page = log.folder / "report.html"
    report = f"<p>Report: <code>{escape(str(page))}</code></p>" if page.is_file() else ""
    sentence = f"<p>{escape(facts.result_sentence(log))}</p>"
    return f"<b>{escape(facts.run_names([log])[0])}</b>{sentence}{score_svg(log)}<table>{figures}</table>{report}"


def _figures(log: RunLog) -> list[tuple[str, str]]:
    score, worst = facts.final_score(log), facts.worst_client(log)
    rows = [("Status", str(log.manifest["status"]))]
    if score is not None and not math.isnan(f1(score)):
        rows.append((f1_name(log), percent(f1(score))))
    if worst is not None:
        rows.append(("Worst client", f"{percent(facts.accuracy(worst))}, {facts.worst_client_text(log, worst)}"))
    rows.append(("Clients", f"{len(log.manifest['clients']):,}"))
    rows.append(("Time", facts.duration_text(log, facts.elapsed_seconds(log))))
    for name, key in (("Sent up", "bytes_up"), ("Sent down", "bytes_down")):
        if not math.isnan(sent := facts.latest_value(log, key)):
            rows.append((name, format_bytes(sent)))
    return rows


def score_svg(log: RunLog) -> str:
    """Draw the score by version, with the majority as a dashed line; empty with fewer than two scores.

    Lines and words take the colour of the text around them, so the picture can be read on light and dark pages.
    """
    writes = facts.generates_text(log)
    value = facts.perplexity if writes else facts.accuracy
    points = [(float(line["version"]), value(line)) for line in log.scores if not math.isnan(value(line))]
    if len(points) < 2:
        return ""
    base = math.nan if writes else facts.majority_accuracy(log)
    heights = [score for _, score in points] + ([] if math.isnan(base) else [base])
    low, high, last = min(heights), max(heights), points[-1][0]

    def place(version: float, score: float) -> str:
        x = MARGIN + (WIDE - 2 * MARGIN) * (version - points[0][0]) / max(1.0, last - points[0][0])
        return f"{x:.1f},{MARGIN + (HIGH - 2 * MARGIN) * (high - score) / ((high - low) or 1.0):.1f}"

    line = " ".join(place(*point) for point in thinned(points))
    name = "Perplexity" if writes else facts.score_name(log).capitalize()
    shown = short if writes else percent
    told = f"{name} by {facts.version_noun(log)}: from {shown(points[0][1])} to {shown(points[-1][1])}"
    dashes = 'stroke="currentColor" stroke-opacity="0.6" stroke-dasharray="4 3"'
    left, right = place(points[0][0], base), place(last, base)
    level = "" if math.isnan(base) else f'<polyline points="{left} {right}" {dashes}/>'
    below = told if math.isnan(base) else f"{told}; dashed: majority, {percent(base)}"
    return (
        f'<svg viewBox="0 0 {WIDE} {HIGH}" width="{WIDE}" height="{HIGH}" fill="none" role="img" aria-label="{escape(told)}">'
        f'{level}<polyline points="{line}" stroke="{SERIES[5]}" stroke-width="2"/></svg><br><small>{escape(below)}</small>'
    )
