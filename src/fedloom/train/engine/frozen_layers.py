"""Fine-tuning depth: where only the top layers are trained, the layers below are a fixed feature extractor.

They run without dropout and without a graph, and their output for an example can be kept: at a depth of one layer in six a step
then costs a small part (HierFedLoRA, arXiv 2503.21213, trains the top d layers). They are computed in small
groups of like length that do not depend on the batches, so that a hit and a miss give the same bytes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fedloom.core.fingerprint import fingerprint
from fedloom.core.lora import Adapter
from fedloom.train import peft_weights
from fedloom.train.base_model import Base
from fedloom.train.tokenised import EncodedTexts

CHUNK_EXAMPLES = {"cpu": 8}
"""Examples of one client, in order of length, whose activations are computed together; elsewhere 32."""

Activations: TypeAlias = dict[int, Tensor]
"""Activations by example, (tokens, hidden size) each, without padding."""


@dataclass(slots=True)
class ActivationCache:
    """Activations by what they depend on: the fold, the first trained layer, the examples. `entries` are in order of last use."""

    entries: OrderedDict[object, Activations] = field(default_factory=OrderedDict)

    def entry(self, key: object) -> Activations:
        """Return the activations under this key, to which the caller adds; they are now the latest used."""
        self.entries[key] = self.entries.pop(key, {})
        return self.entries[key]

    def trim(self, limit: int) -> None:
        """Remove the least recently used activations until the rest is within `limit` bytes."""
        sizes = {
            key: sum(t.numel() * t.element_size() for t in stored.values()) for key, stored in self.entries.items()
        }
        total = sum(sizes.values())
        while total > limit:
            total -= sizes[self.entries.popitem(last=False)[0]]


class _TrainedBlockReached(Exception):
    """Ends a forward pass at the first trained block."""


class _BlockWithInput(nn.Module):
    """A block that computes from `hidden`, whatever its input is."""

    def __init__(self, block: nn.Module, hidden: Tensor) -> None:
        super().__init__()
        self.block, self.hidden = block, hidden

    def __getattr__(self, name: str) -> Any:
        """A model may ask its blocks what they are, for instance which attention they have."""
        return super().__getattr__(name) if name in ("block", "hidden") else getattr(self.block, name)

    def forward(self, *args: Any, **named: Any) -> Any:
        if args:
            return self.block(self.hidden, *args[1:], **named)
        return self.block(**{**named, "hidden_states": self.hidden})


@dataclass(frozen=True, slots=True)
class LayerSplit:
    """A transformer split below its lowest trained block.

    Fields:
        owner: the module that holds the blocks.
        name: its attribute for them.
        blocks: all blocks.
        first: index of the lowest trained one.
    """

    owner: nn.Module
    name: str
    blocks: Sequence[nn.Module]
    first: int

    @contextmanager
    def starting_from(self, hidden: Tensor) -> Iterator[None]:
        """Make a forward pass inside the block begin at the first trained block, with `hidden` (batch, tokens, hidden size).

        No hook: the block may be computed again in the backward pass, outside (`Engine.checkpointing`).
        """
        lowest, *above = self.blocks[self.first :]
        setattr(self.owner, self.name, nn.ModuleList([_BlockWithInput(lowest, hidden), *above]))
        try:
            yield
        finally:
            setattr(self.owner, self.name, self.blocks)

    @torch.no_grad()
    def frozen_output(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the input of the first trained block, (batch, tokens, hidden size); without a graph, of a model in eval mode."""
        found: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            found.append(args[0] if args else named["hidden_states"])
            raise _TrainedBlockReached

        hook = self.blocks[self.first].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            model(**inputs)
        except _TrainedBlockReached:
            pass
        finally:
            hook.remove()
        return found[0]


def split_layers(base: Base, trained: Collection[str]) -> LayerSplit | None:
    """Split the blocks below the trained layers; None if no block lies below all of them."""
    found, depths = peft_weights.transformer_blocks(base.model), peft_weights.layer_depths(base.model)
    if found is None or any(name not in depths for name in trained):
        return None
    path, blocks = found
    first = len(blocks) - max(1, *(depths[name] for name in trained), 1)
    owner, _, name = path.rpartition(".")
    holder = base.model.get_base_model().get_submodule(owner)
    return LayerSplit(holder, name, blocks, first) if first > 0 else None  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class FrozenFeatures:
    """Inputs of the first trained block for the examples of one client, computed at first use.

    Fields:
        base: the model.
        texts: all examples.
        split: where the trained blocks begin.
        order: the client's examples by length; neighbours are computed together.
        stored: the inputs computed so far.
    """

    base: Base
    texts: EncodedTexts
    split: LayerSplit
    order: tuple[int, ...]
    stored: Activations

    def for_batch(self, batch: Sequence[int]) -> Tensor:
        """Return the inputs for a batch, (batch, tokens, hidden size), zero where an example is padded."""
        missing, training = self._missing(batch), self.base.model.training
        if missing:
            self.base.model.eval()  # without dropout
        for chunk in missing:
            inputs = self.texts.batch(chunk, self.base.device)
            inputs.pop("labels")
            rows = self.split.frozen_output(self.base.model, inputs)
            for i, row in zip(chunk, rows, strict=True):
                self.stored[i] = row[self.texts.token_span(i, len(row))].clone()
        if missing:
            self.base.model.train(training)
        width, some = max(self.texts.lengths(batch)), self.stored[batch[0]]
        hidden = some.new_zeros(len(batch), width, some.shape[1])
        for row, i in zip(hidden, batch, strict=True):
            row[self.texts.token_span(i, width)] = self.stored[i]
        return hidden

    def _missing(self, batch: Sequence[int]) -> list[Sequence[int]]:
        step = CHUNK_EXAMPLES.get(self.base.device.type, 32)
        places = {self.order.index(i) // step for i in batch if i not in self.stored}
        return [self.order[at * step : (at + 1) * step] for at in sorted(places)]


def frozen_features(
    base: Base,
    texts: EncodedTexts,
    split: LayerSplit,
    shard: Sequence[int],
    fold: Adapter | None,
    cache: ActivationCache,
    room: int,
) -> FrozenFeatures:
    """Make the features of this client over this fold; they are kept from task to task if `room` (bytes) holds them."""
    order = tuple(sorted(shard, key=lambda i: (len(texts.ids[i]), i)))
    if 4 * base.shape().hidden * sum(texts.lengths(shard)) > room:
        return FrozenFeatures(base, texts, split, order, {})
    return FrozenFeatures(base, texts, split, order, cache.entry((fold and fingerprint(fold), split.first, order)))
