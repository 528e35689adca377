"""Which labels has a client, and in which shares? The bias of the head moves towards them; no shadow client is needed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bench.leakage.scene import Scene, Setting
from fedloom.audit.labels import bias_change, correlation, label_shares
from fedloom.audit.statistics import mean_of
from fedloom.core.seeds import derive

CONCENTRATION = 0.5
"""Of the Dirichlet distribution of a client's label shares."""


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
        seen = scene.observe(start, shard, setting, "labels", k)
        change = bias_change(seen.start.train, seen.answer, count)
        assert change is not None
        shares = label_shares(labels, shard, count)
        found.append(correlation(change, shares))
        priors.append(correlation(public, shares))
        right.append(float(change.argmax() == shares.argmax()))
    return {"correlation": mean_of(found), "prior": mean_of(priors), "largest_right": mean_of(right)}
