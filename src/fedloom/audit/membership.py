"""Was this row trained on? The loss of a row that was trained on falls more than that of one that was not.

Four scores of a row: its loss alone, its fall from the model that was sent (shift), that less the fall on rows of nobody (margin),
and the log ratio of two Gaussians fitted on the falls under other adapters, some trained with the row and some without (LiRA; Carlini
et al. 2022, arXiv 2112.03570). The other adapters are those of other clients, or shadow adapters that the attacker trains itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from fedloom.audit.epsilon_estimate import guessed_epsilon
from fedloom.audit.exchanges import AuditScene, Exchange
from fedloom.audit.findings import ADVERSARIES, Adversary, Attack, Finding, Outcome, RowGuesses, Unmeasured
from fedloom.audit.statistics import auc, auc_interval, mean_of
from fedloom.core.lora import Adapter
from fedloom.core.seeds import rng
from fedloom.core.types import ClientState, Model
from fedloom.train import loss
from fedloom.train.base_model import Base
from fedloom.train.engine.frozen_layers import ActivationCache
from fedloom.train.tokenised import EncodedTexts

ROWS_TOGETHER = 16
"""Rows of one pass through the model."""
SCORED_CLIENTS, SHADOWED_CLIENTS, SHADOWS = 12, 3, 8
"""Clients whose rows are scored; clients that are attacked with shadow adapters, and shadows of each."""

Numbers = NDArray[np.float64]
Members = NDArray[np.bool_]


@torch.no_grad()
def losses_by_row(
    base: Base,
    texts: EncodedTexts,
    adapter: Adapter,
    rows: Sequence[int],
    scaling: float | None = None,
    fold: Adapter | None = None,
) -> Numbers:
    """Loss of each row under an adapter (rows,)."""
    base.put(adapter, scaling, fold)
    base.model.eval()
    order, found = sorted(rows, key=lambda row: len(texts.ids[row])), dict[int, float]()
    for low in range(0, len(order), ROWS_TOGETHER):
        part = order[low : low + ROWS_TOGETHER]
        values = loss.example_losses(base, texts.batch(part, base.device)).double()
        found |= dict(zip(part, values.tolist(), strict=True))
    return np.array([found[row] for row in rows])


def log_ratios(falls: Numbers, members: Members) -> Numbers:
    """LiRA: for each client and row (clients, rows) the log ratio of two Gaussians, fitted on the falls of all other clients."""
    found = np.zeros_like(falls)
    for client, row in np.ndindex(*falls.shape):
        others = np.arange(len(falls)) != client
        with_row, without = falls[others & members[:, row], row], falls[others & ~members[:, row], row]
        if min(len(with_row), len(without)) < 2:
            continue
        spread = (with_row.var() * len(with_row) + without.var() * len(without)) / (
            len(with_row) + len(without)
        ) + 1e-12
        near = (falls[client, row] - without.mean()) ** 2 - (falls[client, row] - with_row.mean()) ** 2
        found[client, row] = near / (2 * spread)
    return found


def attack_scores(before: Numbers, after: Numbers, public_falls: Numbers, members: Members) -> dict[str, Numbers]:
    """Scores (clients, rows) by attack, from losses before (rows,) and after (clients, rows), and falls on public rows (clients,)."""
    falls = before - after
    return {
        "loss": -after,
        "shift": falls,
        "margin": falls - public_falls[:, None],
        "lira": log_ratios(falls, members),
    }


def membership(scores: Mapping[str, Numbers], members: Members) -> dict[str, float]:
    """AUC of each attack over all pairs of client and row."""
    return {name: auc(one[members], one[~members]) for name, one in scores.items()}


def presence(scores: Mapping[str, Numbers], members: Members) -> dict[str, float]:
    """Mean over the columns of the AUC of each attack between clients with and without the row."""
    return {
        name: mean_of([auc(one[own, k], one[~own, k]) for k, own in enumerate(members.T)])
        for name, one in scores.items()
        if name in ("shift", "margin")
    }


# The attacks on a run ----------------------------------------------------------------------------------------------------


def membership_outcomes(scene: AuditScene) -> Iterator[Outcome]:
    """Tell rows that clients trained on from rows that they left out: by the published model, by all versions, by each answer."""
    parts = {client: scene.sampled_rows(client) for client in scene.took_part[:SCORED_CLIENTS]}
    parts = {client: both for client, both in parts.items() if all(both)}
    if not parts:
        none = "no client left rows out of training (held_out=0), so there is nothing to compare with"
        yield from (Unmeasured(adversary, "membership", none) for adversary in ADVERSARIES)
        return
    inside = [row for trained, _ in parts.values() for row in trained]
    outside = [row for _, others in parts.values() for row in others]
    after, before = (_model_losses(scene, model, inside + outside) for model in (scene.last, scene.seen.first))
    falls, count = before - after, len(inside)
    yield _area("reader", "membership", -after[:count], -after[count:], len(parts))
    yield _area("member", "membership", falls[:count], falls[count:], len(parts))
    exchanges = [scene.seen.latest[client] for client in parts if client in scene.seen.latest]
    if not exchanges:
        yield Unmeasured("server", "membership", "no answer of a single client was there to be looked at")
        return
    shifts = [_row_shifts(scene, one, *parts[one.task.client]) for one in exchanges]
    trained, others = (np.concatenate(side) for side in zip(*shifts, strict=True))
    yield _area("server", "membership", trained, others, len(exchanges))


def shadow_outcomes(scene: AuditScene) -> Iterator[Outcome]:
    """Attack answers with shadow adapters: the server knows the candidate rows, and trains on random halves of them itself."""
    apart = "each shadow of a published model would be a run of its own"
    yield Unmeasured("member", "shadow adapters", apart)
    yield Unmeasured("reader", "shadow adapters", apart)
    exchanges = [scene.seen.latest[client] for client in scene.took_part if client in scene.seen.latest]
    exchanges = [one for one in exchanges if all(scene.sampled_rows(one.task.client))][:SHADOWED_CLIENTS]
    if not exchanges:
        yield Unmeasured("server", "shadow adapters", "no answer of a single client was there to be looked at")
        return
    trained, others = (
        np.concatenate(side) for side in zip(*[_shadow_ratios(scene, one) for one in exchanges], strict=True)
    )
    yield _area("server", "shadow adapters", trained, others, len(exchanges))


def row_guesses(scene: AuditScene, delta: float) -> RowGuesses | None:
    """Guess of each client which of its rows were trained on: the quarter that fell most was, the quarter that fell least was not.

    None where no answer is there. Each row must have been trained on by a fair coin of its own.
    """
    rows = guesses = right = 0
    for client in scene.took_part[:SCORED_CLIENTS]:
        if client not in scene.seen.latest:
            continue
        trained, others = _row_shifts(scene, scene.seen.latest[client], *scene.sampled_rows(client))
        scores, members = np.concatenate([trained, others]), np.arange(len(trained) + len(others)) < len(trained)
        order, quarter = np.argsort(scores, kind="stable"), len(scores) // 4
        rows, guesses = rows + len(scores), guesses + 2 * quarter
        right += int((~members[order[:quarter]]).sum() + members[order[len(order) - quarter :]].sum())
    return RowGuesses(rows, guesses, right, guessed_epsilon(rows, guesses, right, delta)) if guesses else None


def _area(adversary: Adversary, attack: Attack, trained: Numbers, others: Numbers, clients: int) -> Finding:
    area = auc(trained, others)
    low, high = auc_interval(area, len(trained), len(others))
    trials = f"{len(trained)} rows trained on, {len(others)} left out, of {clients} clients"
    return Finding(adversary, attack, "area under the ROC curve", area, 0.5, low, high, trials)


def _model_losses(scene: AuditScene, model: Model, rows: Sequence[int]) -> Numbers:
    return losses_by_row(scene.base, scene.texts, model.adapter, rows, fold=model.fold)


def _row_shifts(
    scene: AuditScene, exchange: Exchange, trained: Sequence[int], others: Sequence[int]
) -> tuple[Numbers, Numbers]:
    """Return by how much the losses of both kinds of rows fell from what was sent to what came back."""
    start, rows = exchange.task.start, [*trained, *others]
    before, after = (
        losses_by_row(scene.base, scene.texts, adapter, rows, start.scaling, start.fold)
        for adapter in (start.train, exchange.answer)
    )
    falls = before - after
    return falls[: len(trained)], falls[len(trained) :]


def _shadow_ratios(scene: AuditScene, exchange: Exchange) -> tuple[Numbers, Numbers]:
    """Return LiRA's scores of both kinds of rows, from the answer and from shadow adapters that started where it did."""
    task, start = exchange.task, exchange.task.start
    trained, others = scene.sampled_rows(task.client)
    rows, pool = [*trained, *others], [*scene.trainer.shards[task.client], *scene.left_out[task.client]]
    adapters, members = [exchange.answer], [[True] * len(trained) + [False] * len(others)]
    for number in range(SHADOWS):
        half = rng(scene.seed, "shadow", task.client, number).sample(pool, max(1, len(pool) // 2))
        shards, name = {task.client: tuple(half)}, f"shadow {number}"
        shadow = replace(scene.trainer, shards=shards, run=name, cache=ActivationCache())
        ((result, _),) = shadow.train([(task, ClientState())])
        adapters.append(result.adapter)
        members.append([row in half for row in rows])
    falls = -np.stack(
        [losses_by_row(scene.base, scene.texts, one, rows, start.scaling, start.fold) for one in adapters]
    )
    ratios = log_ratios(falls, np.array(members))[0]
    return ratios[: len(trained)], ratios[len(trained) :]
