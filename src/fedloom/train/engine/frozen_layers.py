"""Fine-tuning depth: where only the top layers are trained, those below are a fixed feature extractor.

They run without dropout and without a graph, and what they give for an example can be kept: at a depth of one layer in six a step
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

CHUNK = {"cpu": 8}
"""Examples of one client, in order of length, whose activations are computed together; elsewhere 32."""

Kept: TypeAlias = dict[int, Tensor]
"""Activations by example, (tokens, hidden size) each, without padding."""


@dataclass(slots=True)
class Cache:
    """Activations by what they depend on: the fold, the first trained layer, the examples."""

    held: OrderedDict[object, Kept] = field(default_factory=OrderedDict)

    def under(self, key: object) -> Kept:
        """What is kept under this key, to be added to; it is now the latest used."""
        self.held[key] = self.held.pop(key, {})
        return self.held[key]

    def trim(self, limit: int) -> None:
        """Throw away what was not used for longest until the rest is within `limit` bytes."""
        sizes = {key: sum(t.numel() * t.element_size() for t in kept.values()) for key, kept in self.held.items()}
        total = sum(sizes.values())
        while total > limit:
            total -= sizes[self.held.popitem(last=False)[0]]


class _Reached(Exception):
    """Ends a forward pass at the first trained block."""


class _Fed(nn.Module):
    """A block that is given `hidden`, whatever comes to it."""

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
class Tower:
    """The blocks of a transformer, where the model holds them, and the first one that is trained."""

    owner: nn.Module
    name: str
    blocks: Sequence[nn.Module]
    first: int

    @contextmanager
    def fed(self, hidden: Tensor) -> Iterator[None]:
        """Inside, a forward pass begins at the first trained block, with `hidden` (batch, tokens, hidden size).

        No hook: the block may be computed again in the backward pass, outside (`Engine.checkpointing`).
        """
        lowest, *above = self.blocks[self.first :]
        setattr(self.owner, self.name, nn.ModuleList([_Fed(lowest, hidden), *above]))
        try:
            yield
        finally:
            setattr(self.owner, self.name, self.blocks)

    @torch.no_grad()
    def below(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """What the first trained block receives for these inputs, (batch, tokens, hidden size); no graph, of a model in eval mode."""
        found: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            found.append(args[0] if args else named["hidden_states"])
            raise _Reached

        hook = self.blocks[self.first].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            model(**inputs)
        except _Reached:
            pass
        finally:
            hook.remove()
        return found[0]


def tower(base: Base, trained: Collection[str]) -> Tower | None:
    """The blocks, if some of them lie below all the layers that are trained; None if nothing does."""
    found, depths = peft_weights.transformer_blocks(base.model), peft_weights.layer_depths(base.model)
    if found is None or any(name not in depths for name in trained):
        return None
    path, blocks = found
    first = len(blocks) - max(1, *(depths[name] for name in trained), 1)
    owner, _, name = path.rpartition(".")
    holder = base.model.get_base_model().get_submodule(owner)
    return Tower(holder, name, blocks, first) if first > 0 else None  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Features:
    """What the first trained block receives for the examples of one client, computed when first asked for."""

    base: Base
    texts: EncodedTexts
    place: Tower
    order: tuple[int, ...]
    kept: Kept

    def of(self, batch: Sequence[int]) -> Tensor:
        """For a batch, (batch, tokens, hidden size), zero where an example is padded."""
        missing, training = self._missing(batch), self.base.model.training
        if missing:
            self.base.model.eval()  # without dropout
        for chunk in missing:
            inputs = self.texts.batch(chunk, self.base.device)
            inputs.pop("labels")
            rows = self.place.below(self.base.model, inputs)
            for i, row in zip(chunk, rows, strict=True):
                self.kept[i] = row[self.texts.token_span(i, len(row))].clone()
        if missing:
            self.base.model.train(training)
        width, some = max(self.texts.lengths(batch)), self.kept[batch[0]]
        hidden = some.new_zeros(len(batch), width, some.shape[1])
        for row, i in zip(hidden, batch, strict=True):
            row[self.texts.token_span(i, width)] = self.kept[i]
        return hidden

    def _missing(self, batch: Sequence[int]) -> list[Sequence[int]]:
        step = CHUNK.get(self.base.device.type, 32)
        places = {self.order.index(i) // step for i in batch if i not in self.kept}
        return [self.order[at * step : (at + 1) * step] for at in sorted(places)]


def features(
    base: Base, texts: EncodedTexts, place: Tower, shard: Sequence[int], fold: Adapter | None, cache: Cache, room: int
) -> Features:
    """Those of this client over this fold: kept from an earlier task if nothing below has changed and `room` (bytes) holds them."""
    order = tuple(sorted(shard, key=lambda i: (len(texts.ids[i]), i)))
    if 4 * base.shape().hidden * sum(texts.lengths(shard)) > room:
        return Features(base, texts, place, order, {})
    return Features(base, texts, place, order, cache.under((fold and fingerprint(fold), place.first, order)))
