"""Which rarer words stand in a client's rows?

The gradient of `down` in the first block is a sum of the embeddings that it read, so its rows point towards tokens that were there.
The attack takes the energy of these rows in the direction of each token and joins it with how frequent the token is in public
rows, by a logistic rule that is fitted on shadow clients: public rows on which the server trains itself. The prior is the same rule
without the answer; only what the attack has over it was learnt from the client.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from bench.leakage.scene import Observation, Scene, Setting, input_changes, texts_of
from bench.leakage.statistics import fit_logistic
from bench.leakage.vocabulary import Vocabulary, read_vocabulary
from fedloom.audit.statistics import auc, mean_of
from fedloom.audit.token_span import span_basis

TOP, MORE = 10, 50
"""Guesses that are judged: the surest ten, and the surest fifty."""

TINY = 1e-30


def prior_features(vocabulary: Vocabulary) -> Tensor:
    """What is known of each rare token without an answer (tokens, 4)."""
    vectors = (vocabulary.vectors[vocabulary.rare] - vocabulary.centre).double()
    counts = vocabulary.counts[vocabulary.rare].double()
    white = vocabulary.white.norm(dim=1).log()
    return torch.stack([(counts + 0.3).log(), (counts == 0).double(), white, vectors.norm(dim=1).log()], 1)


def answer_features(vocabulary: Vocabulary, changes: Mapping[str, Tensor]) -> Tensor:
    """Energy of the rows of `changes` (rank, width) in the direction of each rare token, in logarithms (tokens, 5).

    The sum and the largest over the rows, of the cosine with the mean embedding taken off; the sum after whitening; and the energy
    inside the span of all rows, of the embedding and of what is left without the mean. Source of the span: Petrov et al., "DAGER",
    arXiv 2405.15586, 2024.
    """
    vectors = vocabulary.vectors[vocabulary.rare] - vocabulary.centre
    rows = torch.cat([change / change.norm(dim=1, keepdim=True).clamp_min(TINY) for change in changes.values()])
    plain = (vectors @ rows.T).square() / vectors.square().sum(1, keepdim=True)
    white = vocabulary.white.float()
    turned = torch.cat([change.double() @ vocabulary.whitener for change in changes.values()])
    turned = (turned / turned.norm(dim=1, keepdim=True).clamp_min(TINY)).float()
    energy = (white / white.norm(dim=1, keepdim=True) @ turned.T).square().sum(1)
    basis = span_basis(changes.values())
    inside = (vocabulary.vectors[vocabulary.rare] @ basis.T).square().sum(1)
    centred = (vectors @ basis.T).square().sum(1) / vectors.square().sum(1)
    columns = (plain.sum(1), plain.max(1).values, energy, inside, centred)
    return torch.stack([column.clamp_min(TINY).log().double() for column in columns], 1)


def judge(scores: Tensor, own: Tensor, vocabulary: Vocabulary) -> dict[str, float]:
    """Judge the scores of rare tokens by a mask of those that the client has."""
    order, never = scores.argsort(descending=True, stable=True), vocabulary.never_public
    unseen = scores[never].argsort(descending=True, stable=True)
    return {
        "top_10": float(own[order[:TOP]].float().mean()),
        "top_50": float(own[order[:MORE]].float().mean()),
        "never_public_top_10": float(own[never][unseen[:TOP]].float().mean()),
        "auc": auc(scores[own].numpy(), scores[~own].numpy()),
    }


def measure(scene: Scene, setting: Setting, shadows: int, targets: int) -> dict[str, float]:
    """Attack some clients; the mean of each figure over them, with that of the prior under `prior_...`."""
    vocabulary, start = read_vocabulary(scene), scene.start(setting)
    prior, size = prior_features(vocabulary), setting.rows * setting.summed

    def owned(seen: Observation) -> Tensor:
        return vocabulary.holds({token for row in seen.rows for token in texts_of(scene, setting.length).ids[row]})

    def observed(rows: Sequence[int], count: int, name: str) -> list[Observation]:
        spans = [(k * size) % max(1, len(rows) - size + 1) for k in range(count)]
        return [scene.observe_mean(start, rows[low : low + size], setting, name, k) for k, low in enumerate(spans)]

    known, unknown = observed(scene.public, shadows, "shadow"), observed(scene.private, targets, "target")
    moved = [input_changes(scene.base, seen) for seen in (*known, *unknown)]
    truths = [owned(seen) for seen in known]
    rule_alone = fit_logistic(torch.cat([prior] * shadows), torch.cat(truths))
    rule: Callable[[Tensor], Tensor] = rule_alone
    inputs = [prior] * len(moved)
    if all(moved):
        inputs = [torch.cat([prior, answer_features(vocabulary, changes)], 1) for changes in moved]
        rule = fit_logistic(torch.cat(inputs[:shadows]), torch.cat(truths))
    with_answer = [
        judge(rule(one), owned(seen), vocabulary) for one, seen in zip(inputs[shadows:], unknown, strict=True)
    ]
    alone = [judge(rule_alone(prior), owned(seen), vocabulary) for seen in unknown]
    figures = {name: mean_of([one[name] for one in with_answer]) for name in with_answer[0]}
    figures |= {f"prior_{name}": mean_of([one[name] for one in alone]) for name in alone[0]}
    rows = mean_of([len(seen.rows) for seen in unknown])
    return figures | {
        "over_prior": figures["top_10"] - figures["prior_top_10"],
        "rows_used": rows,
        "moved": float(all(moved)),
    }
