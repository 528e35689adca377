"""Facts about labels: how well each is recognised at the end of a run, and what its F1 is about."""

from __future__ import annotations

import math

from fedloom.core.text import list_some
from fedloom.report.facts import label
from fedloom.report.line_table import Line
from fedloom.report.numbers import percent, plural, to_float
from fedloom.report.run_log import RunLog
from fedloom.train.confusion import Confusion, constant_answer

SHOWN = 6
"""Labels that a sentence lists by name."""


def label_names(log: RunLog) -> list[str]:
    """Names of the labels that the model chooses from; empty where it writes text or none are recorded."""
    names = log.manifest["partition"].get("label_names", [])
    return [] if log.manifest["model"].get("labels", 0) is None else [label(name) for name in names]


def f1_name(*logs: RunLog) -> str:
    """Name of the F1 of these runs: of two labels that of the second, of more the mean over the labels."""
    names = {f"F1 of '{names[1]}'" if len(names) == 2 else "Macro F1" for names in map(label_names, logs)}
    return names.pop() if len(names) == 1 else "F1"


def f1(score: Line | None) -> float:
    """F1 of a score line, under either of its names (earlier runs have one name for both); NaN where there is none."""
    return to_float(score.get("f1", score.get("f1_macro"))) if score else math.nan


def labels_before(log: RunLog) -> Line | None:
    """Line on how well the model before training tells labels apart; None where it was not scored."""
    return next((line for line in log.labels if line.get("version") == 0), None)


def labels_after(log: RunLog) -> Line | None:
    """Line on how well the last version that was scored tells labels apart; None if only the untrained model was."""
    return next((line for line in reversed(log.labels) if line.get("version") != 0), None)


def counts_of(line: Line) -> Confusion:
    """Confusion matrix of such a line."""
    return Confusion(tuple(map(tuple, line["confusion"])), line.get("roc_auc"))


def majority_counts(log: RunLog, line: Line) -> Confusion | None:
    """Confusion matrix of always answering the commonest label on the examples of such a line; None where it is not recorded."""
    names, name = log.manifest["partition"].get("label_names", []), log.manifest["metrics"].get("majority_label")
    return constant_answer(counts_of(line).true, names.index(name)) if name in names else None


def absent_labels_sentence(log: RunLog, line: Line) -> str:
    """Sentence on the labels that no test example has; empty where all are there."""
    rows = zip(label_names(log), counts_of(line).true, strict=False)
    absent = [f"'{name}'" for name, examples in rows if not examples]
    if not absent:
        return ""
    area = " Without examples of both labels there is no AUC." if "roc_auc" in line else ""
    return f"No test example has the label {list_some(absent, SHOWN)}: its recall is not measured.{area}"


def lowest_recall_sentence(log: RunLog, line: Line) -> str:
    """Sentence on the label that is recognised least; empty where fewer than two have test examples."""
    rows = zip(counts_of(line).recall(), counts_of(line).true, label_names(log), strict=False)
    known = [(share, examples, name) for share, examples, name in rows if share is not None]
    if len(known) < 2:
        return ""
    share, examples, name = min(known, key=lambda row: (row[0], -row[1]))
    return f"The label recognised least is '{name}': {percent(share)} of its {plural(examples, 'test example')}."


def confused_labels(log: RunLog, line: Line) -> list[tuple[str, str, int]]:
    """Pairs of a label and one that it was taken for, with the number of times, most often first."""
    names = label_names(log)
    cells = [
        (names[true], names[given], int(count))
        for true, row in enumerate(line["confusion"][: len(names)])
        for given, count in enumerate(row[: len(names)])
        if count and true != given
    ]
    return sorted(cells, key=lambda cell: -cell[2])
