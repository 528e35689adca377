"""Counts of predictions by true and by predicted label, and the metrics that follow from them.

Metrics are named and defined as the scorers of scikit-learn: `accuracy`, `balanced_accuracy`, `f1` (two labels: of the second one),
`f1_macro`, `roc_auc`. What is undefined (the recall of a label without examples) is None and not 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Confusion:
    """Confusion matrix of some predictions.

    Fields:
        counts: examples by true label (row) and predicted label (column).
        roc_auc: area under the ROC curve of the second of two labels (None: undefined, or another number of labels).
    """

    counts: tuple[tuple[int, ...], ...]
    roc_auc: float | None = None

    @property
    def true(self) -> list[int]:
        """Examples of each label."""
        return [sum(row) for row in self.counts]

    @property
    def predicted(self) -> list[int]:
        """Predictions of each label."""
        return [sum(column) for column in zip(*self.counts, strict=True)]

    @property
    def hits(self) -> list[int]:
        """Right predictions of each label."""
        return [row[label] for label, row in enumerate(self.counts)]

    def accuracy(self) -> float:
        """Return the share of right predictions; 0 without predictions."""
        return sum(self.hits) / max(1, sum(self.true))

    def recall(self) -> list[float | None]:
        """Return for each label the share of its examples that are predicted as such; None for a label without examples."""
        return [hits / true if true else None for hits, true in zip(self.hits, self.true, strict=True)]

    def precision(self) -> list[float | None]:
        """Return for each label the share of its predictions that are right; None for a label that is never predicted."""
        return [hits / given if given else None for hits, given in zip(self.hits, self.predicted, strict=True)]

    def f1(self) -> list[float | None]:
        """Return for each label the harmonic mean of precision and recall; None for one neither present nor predicted."""
        rows = zip(self.hits, self.true, self.predicted, strict=True)
        return [2 * hits / (true + given) if true + given else None for hits, true, given in rows]

    def f1_metrics(self) -> dict[str, float]:
        """Return `f1`, that of the second label, of two labels; of others `f1_macro`, the mean over labels present or predicted."""
        f1 = self.f1()
        return {"f1": f1[1] or 0.0} if len(f1) == 2 else {"f1_macro": _mean(f1)}

    def metrics(self) -> dict[str, object]:
        """Return everything that the counts say, as values of JSON; lists have an entry for each label."""
        return {
            "examples": sum(self.true),
            "accuracy": self.accuracy(),
            "balanced_accuracy": _mean(self.recall()),
            **self.f1_metrics(),
            "f1_macro": _mean(self.f1()),
            **({"roc_auc": self.roc_auc} if len(self.counts) == 2 else {}),
            "recall_by_label": self.recall(),
            "precision_by_label": self.precision(),
            "f1_by_label": self.f1(),
            "confusion": [list(row) for row in self.counts],
        }


def constant_answer(examples: Sequence[int], label: int) -> Confusion:
    """Return the counts of always answering one label, given how many examples each has."""
    counts = [[count if column == label else 0 for column in range(len(examples))] for count in examples]
    return Confusion(tuple(map(tuple, counts)), 0.5 if len(examples) == 2 and all(examples) else None)


def commonest_label(labels: Sequence[int]) -> int:
    """Return the commonest label, of several the smallest: the answer that is right most often without any training."""
    counts = Counter(labels)
    return min(counts, key=lambda label: (-counts[label], label))


def _mean(shares: Sequence[float | None]) -> float:
    """Mean of the shares that are defined; 0 where none is."""
    defined = [share for share in shares if share is not None]
    return sum(defined) / len(defined) if defined else 0.0
