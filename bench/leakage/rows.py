"""Was this row trained on?

Clients have random halves of one pool, and each planted text is given to a random half of them. The attacks look at the loss of a
row under the answer: alone, as its fall from the sent model (shift), that less the fall on public rows (margin), and as the log
ratio of two Gaussians fitted on the other clients with and without the row (LiRA; Carlini et al. 2022, arXiv 2112.03570), whose
other clients stand for models that the server trains itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bench.leakage.scene import Observation, Scene, Setting, mean_adapter
from fedloom.audit.membership import Members, Numbers, attack_scores, losses_by_row, membership, presence
from fedloom.audit.statistics import auc, mean_of
from fedloom.core.lora import Adapter
from fedloom.core.seeds import derive
from fedloom.core.types import TaskStart

SCORED, REFERENCE, SUM_COLUMNS, GROUP = 40, 16, 8, 5
"""Rows of the pool that are scored; public rows for the margin; columns tried in sums; answers of a sum."""


def row_losses(scene: Scene, start: TaskStart, adapter: Adapter, rows: Sequence[int]) -> Numbers:
    """Loss of each row under an adapter (rows,)."""
    return losses_by_row(scene.base, scene.texts, adapter, rows, start.scaling, start.fold)


def draw_members(draw: np.random.Generator, clients: int, pool: int, planted: int) -> Members:
    """Give each client half of the pool, and each planted text to half of the clients (clients, pool + planted)."""
    members = np.zeros((clients, pool + planted), bool)
    for client in range(clients):
        members[client, draw.permutation(pool)[: pool // 2]] = True
    for column in range(pool, pool + planted):
        members[draw.permutation(clients)[: clients // 2], column] = True
    return members


def sum_auc(
    scene: Scene, seen: Sequence[Observation], members: Members, rows: Sequence[int], draw: np.random.Generator
) -> float:
    """AUC of the fall in loss under the mean of `GROUP` answers: exactly one client of it has the row, or none. Mean over rows."""
    start, found = seen[0].start, list[float]()
    for row, own in zip(rows, members.T, strict=True):
        have, lack = np.flatnonzero(own), np.flatnonzero(~own)
        if len(have) < 2 or len(lack) < GROUP:
            continue
        groups = [[one, *draw.permutation(lack)[: GROUP - 1]] for one in have]
        groups += [[*draw.permutation(lack)[:GROUP]] for _ in have]
        losses = [-row_losses(scene, start, mean_adapter([seen[k].answer for k in one]), [row])[0] for one in groups]
        found.append(auc(losses[: len(have)], losses[len(have) :]))
    return mean_of(found)


def measure(scene: Scene, setting: Setting, clients: int, sums: bool = False) -> dict[str, float]:
    """Attack an even number of clients; AUC of each attack on ordinary rows and on planted ones, and on sums of five answers."""
    draw = np.random.default_rng(derive(scene.seed, "members"))
    pool = scene.private[: 2 * setting.rows]
    members = draw_members(draw, clients, len(pool), len(scene.canaries))
    everything, start = np.array([*pool, *scene.canaries]), scene.start(setting)
    seen = [scene.observe(start, everything[own].tolist(), setting, "member", k) for k, own in enumerate(members)]
    columns = [*range(min(SCORED, len(pool))), *range(len(pool), len(everything))]
    scored, judged = everything[columns].tolist(), members[:, columns]
    every = [*scored, *scene.public[:REFERENCE]]
    before = row_losses(scene, start, start.train, every)
    after = np.stack([row_losses(scene, start, one.answer, every) for one in seen])
    public_falls = (before - after)[:, len(scored) :].mean(1)
    count, planted = len(scored), len(scene.canaries)
    scores = attack_scores(before[:count], after[:, :count], public_falls, judged)
    ordinary = {name: one[:, :-planted] for name, one in scores.items()}
    canaries = {name: one[:, -planted:] for name, one in scores.items()}
    figures = {f"membership_{name}": each for name, each in membership(ordinary, judged[:, :-planted]).items()}
    figures |= {f"canary_{name}": each for name, each in presence(canaries, judged[:, -planted:]).items()}
    if sums:
        rows, own = scored[:SUM_COLUMNS], judged[:, :SUM_COLUMNS]
        figures["sum_membership"] = sum_auc(scene, seen, own, rows, draw)
        figures["sum_canary"] = sum_auc(scene, seen, judged[:, -planted:], scene.canaries, draw)
    return figures
