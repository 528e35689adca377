"""What a frozen base makes of texts: one row an example, by which topics are told."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedloom.train.base_model import Base
from fedloom.train.tokenised import Encoded

ROWS = 32  # a batch; of similar length


@torch.no_grad()
def embeddings(base: Base, texts: Encoded, indices: Sequence[int]) -> Tensor:
    """The mean over tokens of the last states that all have, without any adapter: (examples, width), float32, row i of `indices[i]`.

    A last layer that is read at one token only (`first_token`) has no others; then it is the one below.
    """
    model, rows = base.model, dict[int, Tensor]()
    order = sorted(indices, key=lambda i: (len(texts.ids[i]), i))
    training = model.training
    model.eval()
    with base.bare():
        for at in range(0, len(order), ROWS):
            batch = order[at : at + ROWS]
            inputs = texts.batch(batch, base.device)
            inputs.pop("labels")
            mask = inputs["attention_mask"][..., None]
            layers = model(**inputs, output_hidden_states=True).hidden_states
            states = next(layer for layer in reversed(layers) if layer.shape[1] == mask.shape[1])
            means = (states.float() * mask).sum(1) / mask.sum(1)
            rows |= dict(zip(batch, means.cpu(), strict=True))
    model.train(training)
    return torch.stack([rows[i] for i in indices]) if indices else torch.empty(0, 0)
