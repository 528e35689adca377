"""The tokens of a model as its first block receives them, and how often each stands in the public rows."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from bench.leakage.scene import LENGTH, Scene

COMMON = 0.01
"""A token is rare that stands in fewer than this share of the public rows."""

EVERY = 6
"""The mean over places takes each so-manieth."""


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """What the server knows of tokens before it sees an answer.

    Fields:
        embeddings: the model's module that embeds ids at places.
        vectors: embedding of each token, the mean over places (tokens, width).
        centre: mean embedding of the public rows' tokens (width,).
        whitener: (width, width) in float64; makes the embeddings of public tokens uncorrelated.
        rows: number of public rows with each token (tokens,).
        counts: number of each token in public rows (tokens,).
        rare: ids of rare tokens, without the tokenizer's marks.
        white: whitened vectors of the rare tokens (rare tokens, width), in float64.
    """

    embeddings: nn.Module
    vectors: Tensor
    centre: Tensor
    whitener: Tensor
    rows: Tensor
    counts: Tensor
    rare: Tensor
    white: Tensor

    @torch.no_grad()
    def at(self, place: int) -> Tensor:
        """Return the embedding of every token at this place of a text (tokens, width)."""
        return embed_at(self.embeddings, len(self.rows), place)

    @property
    def never_public(self) -> Tensor:
        """Return a mask of the rare tokens that stand in no public row."""
        return self.rows[self.rare] == 0

    def holds(self, tokens: Collection[int]) -> Tensor:
        """Return a mask of the rare tokens that are among these."""
        return torch.isin(self.rare, torch.tensor(sorted(tokens)))


@lru_cache(maxsize=1)
@torch.no_grad()
def read_vocabulary(scene: Scene) -> Vocabulary:
    """Read the embeddings of the base, and count tokens in the public rows."""
    inner: Any = scene.base.model.get_base_model()
    inner.eval()
    embeddings, size = inner.base_model.embeddings, len(inner.get_input_embeddings().weight)
    places = range(1, LENGTH, EVERY)
    vectors = torch.zeros(())
    for place in places:
        vectors = vectors + embed_at(embeddings, size, place) / len(places)
    ids = [torch.tensor(scene.texts.ids[row]) for row in scene.public]
    seen = torch.cat([embeddings(input_ids=row[None])[0] for row in ids])
    rows, counts = torch.zeros(size), torch.zeros(size)
    for row in ids:
        here = torch.bincount(row, minlength=size)
        rows, counts = rows + (here > 0), counts + here
    common = rows >= COMMON * len(ids)
    common[torch.tensor(scene.base.tokenizer.all_special_ids)] = True
    common |= torch.tensor(
        [word.startswith("[") for word in scene.base.tokenizer.convert_ids_to_tokens([*range(size)])]
    )
    rare = (~common).nonzero().flatten()
    centre, whitener = seen.mean(0), _whitener(seen)
    white = (vectors[rare] - centre).double() @ whitener
    return Vocabulary(embeddings, vectors, centre, whitener, rows, counts, rare, white)


def embed_at(embeddings: nn.Module, size: int, place: int) -> Tensor:
    """Return the embeddings of the first `size` tokens at a place."""
    found: Tensor = embeddings(input_ids=torch.arange(size)[:, None], position_ids=torch.tensor([[place]]))
    return found[:, 0]


def _whitener(vectors: Tensor) -> Tensor:
    covariance = torch.cov(vectors.double().T)
    covariance += 1e-3 * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
    values, directions = torch.linalg.eigh(covariance)
    whitener: Tensor = (directions * values.rsqrt()) @ directions.T
    return whitener
