"""How good an adapter is: predictions on encoded texts, and the figures made of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fedloom.lora import Adapter
from fedloom.train import depth
from fedloom.train.base import Base
from fedloom.train.depth import Cache
from fedloom.train.texts import Encoded

BATCH = 64
"""Examples predicted together; sorted by length, so padding is small."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Predictions of some examples: per example the predicted label, the true one and the cross-entropy."""

    predicted: Tensor
    labels: Tensor
    losses: Tensor

    def at(self, indices: Sequence[int]) -> Scores:
        """The scores of these examples alone."""
        chosen = torch.tensor(list(indices), dtype=torch.long)
        return Scores(self.predicted[chosen], self.labels[chosen], self.losses[chosen])

    def figures(self, classes: int) -> dict[str, float]:
        """Accuracy, F1 (of label 1 for two classes, else the mean over classes), mean cross-entropy."""
        counts = torch.zeros(classes, classes, dtype=torch.float64)
        counts.index_put_(
            (self.labels, self.predicted), torch.ones(len(self.labels), dtype=torch.float64), accumulate=True
        )
        hits, wanted, given = counts.diagonal(), counts.sum(1), counts.sum(0)
        f1 = 2 * hits / (wanted + given).clamp_min(1.0)
        present = f1[(wanted + given) > 0]
        return {
            "accuracy": float(hits.sum() / counts.sum()),
            "f1": float(f1[1] if classes == 2 else present.mean()),
            "loss": float(self.losses.double().mean()),
        }


@torch.no_grad()
def score(
    base: Base,
    adapter: Adapter,
    texts: Encoded,
    indices: Sequence[int],
    fold: Adapter | None = None,
    cache: Cache | None = None,
    room: int = 0,
) -> Scores:
    """Predict these examples with the adapter over base and fold; results come in the order of `indices`.

    Where only the top layers are adapted, what comes out below them is kept in `cache` for the next time, if `room` (bytes) holds it.
    """
    base.put(adapter, fold=fold)
    model, place = base.model.eval(), depth.tower(base, [*adapter.factors]) if room else None
    below = depth.features(base, texts, place, indices, fold, cache or Cache(), room) if place else None
    lengths = texts.lengths(indices)
    order = sorted(range(len(indices)), key=lambda i: lengths[i])
    predicted = torch.zeros(len(indices), dtype=torch.long)
    losses = torch.zeros(len(indices))
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        batch = [indices[i] for i in chosen]
        inputs = texts.batch(batch, base.device)
        labels = inputs.pop("labels")
        with place.fed(below.of(batch)) if place and below else nullcontext():
            logits = model(**inputs).logits.float()
        where = torch.tensor(chosen)
        predicted[where] = logits.argmax(1).cpu()
        losses[where] = functional.cross_entropy(logits, labels, reduction="none").cpu()
    return Scores(predicted, torch.tensor([texts.labels[i] for i in indices]), losses)
