"""Which labels has a client, and in which shares? The bias of the head moves towards them, whatever else is trained.

The gradient of the bias of a label is the mean chance that the model gives it, less its share in the batch. So a change of the bias
tells the shares without a shadow model or any public row. Noise on the label histogram alone protects nothing while the head is sent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedloom.audit.exchanges import AuditScene
from fedloom.audit.findings import ADVERSARIES, Adversary, Finding, Outcome, Unmeasured
from fedloom.audit.statistics import mean_of, share_interval
from fedloom.core.lora import Adapter
from fedloom.core.types import ClientId, Task

FEWEST = 3
"""Answers that it takes to tell what one has of its own."""

Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LabelGuesses:
    """How well changes of the bias tell label shares, over several answers.

    Fields:
        correlations: of each answer, the correlation of its change with the shares of its own labels.
        by_chance: mean correlation with the shares of another answer's labels.
        right: answers whose most over-represented label is guessed.
        right_by_chance: share of guesses that fit another answer.
    """

    correlations: tuple[float, ...]
    by_chance: float
    right: int
    right_by_chance: float


def bias_change(start: Adapter, answer: Adapter, labels: int) -> Numbers | None:
    """Return by how much the bias of the last layer moved (labels,); None where the head has none, or two tensors of this shape."""
    found = [name for name, tensor in answer.dense.items() if tensor.shape == (labels,) and name in start.dense]
    if len(found) != 1:
        return None
    change = answer.dense[found[0]].double() - start.dense[found[0]].double()
    return np.asarray(change.cpu().numpy())


def label_shares(labels: Sequence[int], rows: Sequence[int], count: int) -> Numbers:
    """Share of each of `count` labels among some rows."""
    return np.bincount([labels[row] for row in rows], minlength=count) / len(rows)


def correlation(one: Numbers, other: Numbers) -> float:
    """Pearson's; 0 where one of them is constant."""
    if not (np.ptp(one) and np.ptp(other)):
        return 0.0
    return float(np.corrcoef(one, other)[0, 1])


def guess_labels(
    changes: Sequence[Numbers], shares: Sequence[Numbers], owners: Sequence[str], starts: Sequence[int]
) -> LabelGuesses:
    """Compare each change of the bias (labels,) with the label shares of the rows behind it, both less what is common.

    What all that began at one version have in common is taken off: it tells nothing of one of them. Chance is what the changes say of
    the rows of other owners. Raises ValueError for fewer than three answers, or for those of one owner alone.

    Args:
        changes: of each answer.
        shares: of the labels of its rows.
        owners: whose it is.
        starts: version that it began at.
    """
    others = np.not_equal.outer(np.asarray(owners), np.asarray(owners))
    if len(changes) < FEWEST or not others.any():
        raise ValueError(f"it takes {FEWEST} answers, and two owners, to tell what one has of its own")
    moved, owned = _less_common(changes, starts), _less_common(shares, starts)
    table = np.array([[correlation(one, other) for other in owned] for one in moved])
    fits = moved.argmax(1)[:, None] == owned.argmax(1)[None]
    return LabelGuesses(
        tuple(np.diag(table).tolist()),
        float(table[others].mean()),
        int(np.diag(fits).sum()),
        float(fits[others].mean()),
    )


def _less_common(values: Sequence[Numbers], starts: Sequence[int]) -> Numbers:
    """Return the values (answers, labels) less their mean over those of one start."""
    found, at = np.array(values, float), np.asarray(starts)
    for start in np.unique(at):
        found[at == start] -= found[at == start].mean(0)
    return found


# The attacks on a run ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Moved:
    """A change of the head that somebody sees: before, after, the rows behind it, whose they are, and at which version it began."""

    before: Adapter
    after: Adapter
    rows: Sequence[int]
    owner: str
    start: int = 0


def label_outcomes(scene: AuditScene) -> Iterator[Outcome]:
    """Tell the label shares of a client from its answer, and those of the clients of a version from that version."""
    if scene.base.labels is None:
        none = "the model writes text: there are no labels"
        yield from (Unmeasured(adversary, "labels", none) for adversary in ADVERSARIES)
        return
    answers = [
        _Moved(one.task.start.train, one.answer, _rows_used(scene, one.task), one.task.client, one.task.version)
        for one in scene.seen.heads
        if one.task.client in scene.trainer.shards
    ]
    starts = Counter(one.start for one in answers)
    # where answers began together they are compared with each other; where none did, all are
    together = [one for one in answers if starts[one.start] > 1] or [replace(one, start=0) for one in answers]
    versions = [
        _Moved(step.before.adapter, step.after.adapter, _rows_of(scene, step.clients), str(number))
        for number, step in enumerate(scene.known_steps())
    ]
    yield _label_outcome(scene, "server", "answers", together)
    yield _label_outcome(scene, "member", "versions", versions)
    alone = "one model tells label shares of all clients together, and not those of one client"
    yield Unmeasured("reader", "labels", alone)


def _rows_used(scene: AuditScene, task: Task) -> list[int]:
    return [row for batch in scene.trainer.batches(task) for row in batch]


def _rows_of(scene: AuditScene, clients: Sequence[ClientId]) -> list[int]:
    return [row for client in clients for row in scene.trainer.shards[client]]


def _label_outcome(scene: AuditScene, adversary: Adversary, noun: str, seen: Sequence[_Moved]) -> Outcome:
    labels, count = scene.texts.labels, scene.base.labels or 0
    changes = [(bias_change(one.before, one.after, count), one) for one in seen if one.rows]
    usable = [
        (change, label_shares(labels, one.rows, count), one.owner, one.start)
        for change, one in changes
        if change is not None
    ]
    if len(usable) < FEWEST or len({owner for _, _, owner, _ in usable}) == 1:
        none = f"it takes {FEWEST} {noun} with a head that has a bias, and {len(usable)} were there to be looked at"
        return Unmeasured(adversary, "labels", none)
    moved, shares, owners, starts = zip(*usable, strict=True)
    if not np.ptp(np.array(shares), axis=0).any():
        return Unmeasured(adversary, "labels", f"all {noun} have the same clients, or the same shares")
    found = guess_labels(moved, shares, owners, starts)
    low, high = share_interval(found.right, len(usable))
    measure = f"share of {noun} whose most over-represented label is guessed"
    trials = f"{len(usable)} {noun}, mean correlation with the shares {mean_of(found.correlations):.2f}"
    return Finding(adversary, "labels", measure, found.right / len(usable), found.right_by_chance, low, high, trials)
