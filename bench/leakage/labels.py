"""Which labels has a client, and in which shares? The bias of the head moves towards them; no shadow client is needed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bench.leakage.scene import Observation, Scene, Setting
from bench.leakage.statistics import mean_of
from fedloom.core.seeds import derive

CONCENTRATION = 0.5
"""Of the Dirichlet distribution of a client's label shares."""

Numbers = NDArray[np.float64]


def bias_change(seen: Observation, labels: int) -> Numbers:
    """By how much the bias of the last layer moved (labels,)."""
    (name,) = (name for name, tensor in seen.answer.dense.items() if tensor.shape == (labels,))
    change = seen.answer.dense[name] - seen.start.train.dense[name]
    return np.asarray(change.double().numpy())


def label_shares(labels: Sequence[int], rows: Sequence[int], count: int) -> Numbers:
    """Share of each of `count` labels among some rows."""
    return np.bincount([labels[row] for row in rows], minlength=count) / len(rows)


def correlation(one: Numbers, other: Numbers) -> float:
    """Pearson's; 0 where one of them is constant."""
    if not (np.ptp(one) and np.ptp(other)):
        return 0.0
    return float(np.corrcoef(one, other)[0, 1])


def draw_skewed(draw: np.random.Generator, labels: Sequence[int], rows: Sequence[int], count: int) -> list[int]:
    """Draw `count` of these rows, the shares of their labels by a Dirichlet distribution, as far as each label lasts."""
    classes = sorted({labels[row] for row in rows})
    left = {one: [row for row in draw.permutation(rows).tolist() if labels[row] == one] for one in classes}
    wanted = draw.choice(classes, count, p=draw.dirichlet([CONCENTRATION] * len(classes)))
    return [left[one].pop() for one in wanted.tolist() if left[one]]


def measure(scene: Scene, setting: Setting, targets: int) -> dict[str, float]:
    """Attack clients with skewed labels: mean correlation of bias and shares, and how often the largest label is right.

    `prior` is the correlation of the public rows' shares with theirs.
    """
    draw, start = np.random.default_rng(derive(scene.seed, "labels")), scene.start(setting)
    labels, count = scene.texts.labels, scene.base.labels or 0
    public, found, priors, right = (
        label_shares(labels, scene.public, count),
        list[float](),
        list[float](),
        list[float](),
    )
    for k in range(targets):
        shard = draw_skewed(draw, labels, scene.private, setting.rows)
        change = bias_change(scene.observe(start, shard, setting, "labels", k), count)
        shares = label_shares(labels, shard, count)
        found.append(correlation(change, shares))
        priors.append(correlation(public, shares))
        right.append(float(change.argmax() == shares.argmax()))
    return {"correlation": mean_of(found), "prior": mean_of(priors), "largest_right": mean_of(right)}
