"""Which word stands at which place of a client's rows?

For each place of a row every token of the vocabulary is tried: its embedding at that place, times the dropout mask where the seed of
the task is known. Two scores are computed, and the better one counts: the energy of the rows of `down` in its direction (cosine, the
mean embedding taken off), and the share of the vector inside the span of these rows, which is 1 for the right token where the step
was linear and the row has no more tokens than all these layers have rows (Petrov et al., "DAGER", arXiv 2405.15586, 2024). The
figure is the place of the right token among all, 1 the best. The attack is given the number of rows of each step, their lengths
and their order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from bench.leakage.scene import Observation, Scene, Setting, input_changes, texts_of
from bench.leakage.vocabulary import Vocabulary, read_vocabulary
from fedloom.audit.statistics import mean_of
from fedloom.audit.token_span import input_layers, span_basis
from fedloom.train.base_model import Base

EVERY = 4
"""Of clients with many rows every so-manieth place is tried: one place costs as much for one row as for a hundred."""

TINY = 1e-30

Masks = Mapping[str, Tensor]
"""By layer, what each number of its input is multiplied by: (rows, tokens, width) of a step, or (width,) of a place."""


@dataclass(frozen=True, slots=True, eq=False)
class PlacedToken:
    """The truth: a token at a place, and the dropout masks there (None: not known)."""

    place: int
    token: int
    masks: Masks | None


def find_places(
    vocabulary: Vocabulary, answers: Sequence[Mapping[str, Tensor]], tokens: Sequence[Sequence[PlacedToken]]
) -> list[dict[str, list[int]]]:
    """Return for each answer (changes of `down` by layer) and score the place of the right token, for each of its `tokens`."""
    found: list[dict[str, list[int]]] = [{"energy": [], "span": []} for _ in answers]
    for place in sorted({one.place for own in tokens for one in own}):
        vectors = vocabulary.at(place)
        squares = vectors.square()
        for changes, own, places in zip(answers, tokens, found, strict=True):
            here = [one for one in own if one.place == place]
            known = any(one.masks for one in here)
            same = {} if known else scores_of(vocabulary, changes, vectors, squares, None)
            for one in here:
                for name, score in (same or scores_of(vocabulary, changes, vectors, squares, one.masks)).items():
                    places[name].append(1 + int((score > score[one.token]).sum()))
    return found


def scores_of(
    vocabulary: Vocabulary, changes: Mapping[str, Tensor], vectors: Tensor, squares: Tensor, masks: Masks | None
) -> dict[str, Tensor]:
    """Return both scores (tokens,) of every token at a place, whose `vectors` and `squares` are (tokens, width)."""
    energy, share = torch.zeros(len(vectors)), torch.zeros(len(vectors))
    ones = torch.ones(vectors.shape[1])
    for name, change in changes.items():
        mask = ones if masks is None else masks[name]
        rows = mask * change / change.norm(dim=1, keepdim=True).clamp_min(TINY)
        energy += (vectors @ rows.T - rows @ vocabulary.centre).square().sum(1)
    names = [*changes]
    together = masks is None or all(masks[name].equal(masks[names[0]]) for name in names)
    for group in [names] if together else [[name] for name in names]:
        mask = ones if masks is None else masks[group[0]]
        basis = span_basis([changes[name] for name in group])
        share += (vectors @ (mask * basis).T).square().sum(1) / (squares @ mask).clamp_min(TINY)
    centred = (vocabulary.vectors - vocabulary.centre).square().sum(1)
    return {"energy": energy / centred, "span": share}


@torch.no_grad()
def dropout_masks(base: Base, seen: Observation, shapes: Sequence[tuple[int, int]]) -> list[Masks]:
    """Return the masks of the first block's inputs in each step of a task with this seed: a function of seed and shapes alone."""
    slot = base.put(seen.start.train, seen.start.scaling, seen.start.fold)
    model: Any = base.model.get_base_model()
    caught = dict[str, Tensor]()

    def catch(_: nn.Module, __: object, output: Tensor, name: str) -> None:
        caught[name] = (output != 0).float()

    dropouts = {name: model.get_submodule(name).lora_dropout[slot] for name in input_layers(base)}
    hooks = [one.register_forward_hook(partial(catch, name=name)) for name, one in dropouts.items()]
    masks = list[Masks]()
    base.model.train()
    with torch.random.fork_rng():
        torch.manual_seed(seen.drawn("dropout"))
        for shape in shapes:
            base.model(input_ids=torch.full(shape, len(hooks)), attention_mask=torch.ones(shape, dtype=torch.long))
            masks.append({**caught})
    base.model.eval()
    for hook in hooks:
        hook.remove()
    return masks


def placed_tokens(scene: Scene, seen: Observation, setting: Setting) -> list[PlacedToken]:
    """Return the truth: tokens of all rows of all steps, without marks, with their masks where the seed is known.

    Of many rows only every `EVERY`-th place is taken.
    """
    every = 1 if setting.rows == 1 else EVERY
    ids, marks = texts_of(scene, setting.length).ids, {*scene.base.tokenizer.all_special_ids}
    shapes = [(len(batch), max(len(ids[row]) for row in batch)) for batch in seen.batches]
    masks = dropout_masks(scene.base, seen, shapes) if setting.seed_known else [None] * len(shapes)
    return [
        PlacedToken(place, token, step and {name: mask[k, place] for name, mask in step.items()})
        for batch, step in zip(seen.batches, masks, strict=True)
        for k, row in enumerate(batch)
        for place, token in enumerate(ids[row])
        if token not in marks and place % every == 1 % every
    ]


def measure(scene: Scene, setting: Setting, targets: int) -> dict[str, float]:
    """Attack some clients; the median place of the right token over all their tokens, and the share of tokens at place 1."""
    vocabulary, start = read_vocabulary(scene), scene.start(setting)
    rows = scene.private
    if setting.rows == 1:  # the shortest texts, which are the easiest
        rows = tuple(sorted(rows, key=lambda row: len(scene.texts.ids[row])))
    seen = [
        scene.observe(start, rows[k * setting.rows : (k + 1) * setting.rows], setting, "place", k)
        for k in range(targets)
    ]
    tokens = [placed_tokens(scene, one, setting) for one in seen]
    found = find_places(vocabulary, [input_changes(scene.base, one) for one in seen], tokens)
    figures = {f"median_{name}": mean_of([median(own[name]) for own in found]) for name in found[0]}
    figures |= {
        f"exact_{name}": mean_of([float(place == 1) for own in found for place in own[name]]) for name in found[0]
    }
    best = min(found[0], key=lambda name: figures[f"median_{name}"])
    best_of = {"median_place": figures[f"median_{best}"], "exact": figures[f"exact_{best}"]}
    return figures | best_of | {"tokens": sum(map(len, tokens)), "vocabulary": len(vocabulary.rows)}
