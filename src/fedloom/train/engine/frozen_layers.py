"""Fine-tuning depth: where only the top layers are trained, the layers below are a fixed feature extractor.

They run without dropout and without a graph, and their output for an example can be kept: at a depth of one layer in six a step
then costs a small part (HierFedLoRA, arXiv 2503.21213, trains the top d layers). On a CPU each example is computed by itself, so its
output depends on nothing but its tokens and the model: whether it is computed, kept, or read from a folder that other runs filled
(`activation_files`), its bytes are the same.

Where clients train to different depths, what the deeper ones changed is a part of a shallow client's base, and new in each version.
So there are two places: what comes out below all that was changed is kept from version to version, and the blocks from there to the
first trained one are computed again where something in them has changed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from fedloom.core.fingerprint import fingerprint
from fedloom.core.lora import Adapter
from fedloom.train import peft_weights
from fedloom.train.base_model import Base
from fedloom.train.engine.activation_files import ActivationFiles
from fedloom.train.engine.dropout import suspend_training
from fedloom.train.engine.trial_texts import FAILURES, trial_inputs
from fedloom.train.tokenised import EncodedTexts

CHUNK_EXAMPLES = {"cpu": 1}
"""Examples whose activations are computed together: on a CPU one. Elsewhere 32 of one client, in order of length, since a pass of
one example would leave most of an accelerator idle; they do not depend on the batches.
"""

ROUNDING = 1e-5
"""Largest difference, relative to the largest number, that is still rounding."""

Activations: TypeAlias = dict[int, Tensor]
"""Activations by example, (tokens, hidden size) each, without padding."""


@dataclass(slots=True)
class ActivationCache:
    """Activations by what they depend on: changes of the layers below, the first block above, the examples.

    Fields:
        entries: in order of last use, all of one collection of texts.
        files: a folder of activations below all changes (None: there is none).
    """

    entries: OrderedDict[object, Activations] = field(default_factory=OrderedDict)
    files: ActivationFiles | None = None

    def emptied(self) -> ActivationCache:
        """Return an empty one over the same folder, for another collection of texts."""
        return ActivationCache(files=self.files)

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


@dataclass(frozen=True, slots=True)
class BlockForm:
    """Form in which a model calls its blocks.

    Fields:
        rows: axis of the examples in a block's input.
        tokens: axis of the tokens.
        returned: of each block below the trained ones, how many values it returns (0: a tensor by itself).
    """

    rows: int
    tokens: int
    returned: tuple[int, ...]


class _BlockInPlace(nn.Module):
    """Stands in the place of a block; what a model asks of its blocks, for instance their attention, is the block's."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "block" else getattr(self.block, name)


class _SkippedBlock(_BlockInPlace):
    """A block below the trained ones: returns its input in the form of its output."""

    def __init__(self, block: nn.Module, returned: int) -> None:
        super().__init__(block)
        self.returned = returned

    def forward(self, *args: Any, **named: Any) -> Any:
        hidden = _block_input(args, named)
        return (hidden, *[None] * (self.returned - 1)) if self.returned else hidden


class _FirstTrainedBlock(_BlockInPlace):
    """Computes from `hidden`, whatever its input is; `reached` is called before."""

    def __init__(self, block: nn.Module, hidden: Tensor, reached: Callable[[], None]) -> None:
        super().__init__(block)
        self.hidden, self.reached = hidden, reached

    def forward(self, *args: Any, **named: Any) -> Any:
        self.reached()
        if args:
            return self.block(self.hidden, *args[1:], **named)
        return self.block(**{**named, "hidden_states": self.hidden})


@dataclass(frozen=True, slots=True)
class LayerSplit:
    """A transformer split below its lowest trained block.

    Blocks keep their places, also those that are skipped: a model chooses masks and rotary embeddings by them.

    Fields:
        model: the whole model.
        owner: the module that holds the blocks.
        name: its attribute for them.
        blocks: all blocks.
        first: index of the lowest trained one.
        form: how the blocks are called (None: a pass cannot begin at the first trained block).
    """

    model: nn.Module
    owner: nn.Module
    name: str
    blocks: Sequence[nn.Module]
    first: int
    form: BlockForm | None = None

    @contextmanager
    def starting_from(self, hidden: Tensor) -> Iterator[None]:
        """Make a forward pass inside the block begin at the first trained block, with `hidden` (batch, tokens, hidden size).

        No hook: the block may be computed again in the backward pass, outside (`Engine.checkpointing`).
        """
        form = cast(BlockForm, self.form)
        entry = hidden.movedim((0, 1), (form.rows, form.tokens))
        skipped = [_SkippedBlock(*pair) for pair in zip(self.blocks[: self.first], form.returned, strict=True)]
        lowest, *above = self.blocks[self.first :]
        with self._dropout_above() as reached:
            blocks = nn.ModuleList([*skipped, _FirstTrainedBlock(lowest, entry, reached), *above])
            setattr(self.owner, self.name, blocks)
            try:
                yield
            finally:
                setattr(self.owner, self.name, self.blocks)

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Leave a forward pass inside the block as it is, but for dropout below the first trained block, which is off."""
        with self._dropout_above() as reached:
            hook = self.blocks[self.first].register_forward_pre_hook(lambda *_: reached())
            try:
                yield
            finally:
                hook.remove()

    @contextmanager
    def _dropout_above(self) -> Iterator[Callable[[], None]]:
        """Put the model in eval mode; what is yielded puts it back, and is to be called at the first trained block."""
        reached = suspend_training(self.model)
        try:
            yield reached
        finally:
            reached()

    @torch.no_grad()
    def frozen_output(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the input of the first trained block, (batch, tokens, hidden size); without a graph, of a model in eval mode."""
        form, found = cast(BlockForm, self.form), list[Tensor]()

        def stop(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            found.append(_block_input(args, named))
            raise _TrainedBlockReached

        hook = self.blocks[self.first].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.model(**inputs)
        except _TrainedBlockReached:
            pass
        finally:
            hook.remove()
        return found[0].movedim((form.rows, form.tokens), (0, 1))


@dataclass(frozen=True, slots=True)
class _Trace:
    """A forward pass.

    Fields:
        logits: its result.
        early: layers outside of the blocks that were called before the first trained block, of those that were looked for.
        entries: inputs of the first trained block.
        calls: the blocks, in the order of their calls.
        outputs: what they returned.
    """

    logits: Tensor
    early: list[nn.Module] = field(default_factory=list)
    entries: list[Tensor] = field(default_factory=list)
    calls: list[nn.Module] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)

    def last(self, form: BlockForm) -> Tensor:
        """Output of the last block, (batch, tokens, hidden size)."""
        output = self.outputs[-1]
        hidden = cast(Tensor, output[0] if isinstance(output, tuple | list) else output)
        return hidden.movedim((form.rows, form.tokens), (0, 1))


def _traced(split: LayerSplit, inputs: Mapping[str, Tensor], outside: Sequence[nn.Module] = ()) -> _Trace:
    trace = _Trace(torch.empty(0))

    def call(layer: nn.Module, _: Any) -> None:
        if not trace.entries:
            trace.early.append(layer)

    def enter(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        trace.entries.append(_block_input(args, named))

    def leave(block: nn.Module, _: Any, output: Any) -> None:
        trace.calls.append(block)
        trace.outputs.append(output)

    with ExitStack() as hooks:
        hooks.callback(split.blocks[split.first].register_forward_pre_hook(enter, with_kwargs=True).remove)
        for layer in outside:
            hooks.callback(layer.register_forward_pre_hook(call).remove)
        for block in split.blocks:
            hooks.callback(block.register_forward_hook(leave).remove)
        return replace(trace, logits=split.model(**inputs).logits)


def _block_input(args: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    return cast(Tensor, args[0] if args else named["hidden_states"])


def _close(one: Tensor, other: Tensor, mask: Tensor) -> bool:
    """Whether two tensors are equal to rounding; with a row and a token for each of `mask`, where it is set."""
    if one.shape[:2] == mask.shape:
        one, other = one[mask.bool()], other[mask.bool()]
    return one.shape == other.shape and float((one - other).abs().max()) <= ROUNDING * float(other.abs().max())


def lowest_trained(base: Base, trained: Collection[str]) -> int:
    """Return the index of the lowest block that holds one of these layers, 0 where layers lie below or the blocks are not known."""
    found, depths = peft_weights.transformer_blocks(base.model), peft_weights.layer_depths(base.model)
    if found is None or any(name not in depths for name in trained):
        return 0
    return max(0, len(found[1]) - max(1, *(depths[name] for name in trained), 1))


def split_layers(base: Base, trained: Collection[str]) -> LayerSplit | None:
    """Split the blocks below the trained layers; None if no block lies below all of them."""
    first = lowest_trained(base, trained)
    return split_at(base, first) if first else None


def split_top(base: Base, depth: int) -> LayerSplit | None:
    """Split below the top `depth` blocks; None where that is all of them, or the blocks are not known."""
    found = peft_weights.transformer_blocks(base.model)
    return split_at(base, len(found[1]) - depth) if found and depth < len(found[1]) else None


def split_at(base: Base, first: int) -> LayerSplit:
    """Split the blocks below the one at this index. Whether a pass can begin there is tried on the model, once."""
    path, blocks = cast(tuple[str, nn.ModuleList], peft_weights.transformer_blocks(base.model))
    owner, _, name = path.rpartition(".")
    split = LayerSplit(base.model, base.model.get_base_model().get_submodule(owner), name, blocks, first)  # type: ignore[arg-type]
    trial = f"pass from block {first}"
    if trial not in base.trials:
        base.trials[trial] = _form_of(base, split)
    return replace(split, form=cast(BlockForm | None, base.trials[trial]))


def keeps_activations(base: Base, least: int, most: int | None) -> bool:
    """Whether a pass can begin at the first trained block at every depth from `least` to `most` (None: all blocks)."""
    found = peft_weights.transformer_blocks(base.model)
    count = len(found[1]) if found else 0
    places = range(max(1, count - (count if most is None else most)), count - least + 1)
    return all(split_at(base, first).form for first in places)


@torch.no_grad()
def _form_of(base: Base, split: LayerSplit) -> BlockForm | None:
    """Return how the blocks are called; None where a pass from the first trained one is not what the plain model computes.

    So it is where a block below hands on more than its output (keys, a position bias), which a later block would miss, where padded
    tokens are read, and where a layer that is trained at every depth comes before the blocks.
    """
    inputs, training = trial_inputs(base.model.get_base_model(), base.tokenizer), base.model.training
    layers = peft_weights.lora_layers(base.model)
    above: list[Any] = [layers[name] for name, depth in peft_weights.layer_depths(base.model).items() if not depth]
    rows, tokens = inputs["input_ids"].shape
    base.model.eval()
    try:
        plain = _traced(split, inputs, above)
        sizes = [*plain.entries[0].shape]
        if {sizes.count(rows), sizes.count(tokens)} != {1} or plain.calls != list(split.blocks) or plain.early:
            return None
        returned = tuple(len(out) if isinstance(out, tuple | list) else 0 for out in plain.outputs[: split.first])
        form = BlockForm(sizes.index(rows), sizes.index(tokens), returned)
        split = replace(split, form=form)
        hidden = split.frozen_output(inputs)
        padded = ~inputs["attention_mask"].bool().reshape(rows, tokens, *[1] * (hidden.ndim - 2))
        with split.starting_from(hidden.masked_fill(padded, 0)):  # as kept activations are
            short = _traced(split, inputs)
        pairs = [(short.logits, plain.logits), (short.last(form), plain.last(form))]
        return form if all(_close(*pair, inputs["attention_mask"]) for pair in pairs) else None
    except FAILURES:
        return None
    finally:
        base.model.train(training)


@dataclass(frozen=True, slots=True)
class FrozenFeatures:
    """Inputs of the first trained block for the examples of one client, computed at first use.

    Fields:
        base: the model.
        texts: all examples.
        split: where the trained blocks begin.
        order: the client's examples by length; neighbours are computed together.
        stored: the inputs computed so far.
        below: the inputs of a lower block, from which these are computed (None: from the texts).
        files: where they may be found, and are kept (None: nowhere).
    """

    base: Base
    texts: EncodedTexts
    split: LayerSplit
    order: tuple[int, ...]
    stored: Activations
    below: FrozenFeatures | None = None
    files: ActivationFiles | None = None

    def for_batch(self, batch: Sequence[int]) -> Tensor:
        """Return the inputs for a batch, (batch, tokens, hidden size), zero where an example is padded."""
        missing = self._missing(batch)
        back = suspend_training(self.base.model) if missing else None
        for chunk in missing:
            rows = self.files.read(self.split.first, self.texts, chunk) if self.files else None
            if rows is None:
                rows = self._computed(chunk)
                if self.files:
                    self.files.write(self.split.first, self.texts, chunk, rows)
            self.stored.update(zip(chunk, (row.to(self.base.device) for row in rows), strict=True))
        if back:
            back()
        width, some = max(self.texts.lengths(batch)), self.stored[batch[0]]
        hidden = some.new_zeros(len(batch), width, *some.shape[1:])
        for row, i in zip(hidden, batch, strict=True):
            row[self.texts.token_span(i, width)] = self.stored[i]
        return hidden

    def starting_from(self, batch: Sequence[int]) -> AbstractContextManager[None]:
        """Make a forward pass of this batch, inside the block, begin at the first trained block."""
        return self.split.starting_from(self.for_batch(batch))

    def _computed(self, chunk: Sequence[int]) -> list[Tensor]:
        """Compute the inputs for these examples, (tokens, hidden size) each; of a model in eval mode."""
        inputs = self.texts.batch(chunk, self.base.device)
        inputs.pop("labels")
        below = self.below or self._nearest_kept(chunk)
        with below.starting_from(chunk) if below else nullcontext():
            rows = self.split.frozen_output(inputs)
        return [row[self.texts.token_span(i, len(row))].clone() for i, row in zip(chunk, rows, strict=True)]

    def _nearest_kept(self, chunk: Sequence[int]) -> FrozenFeatures | None:
        """Return the inputs of the nearest lower block that a file has of this text; the way from there is the same, to the byte."""
        if self.files is None or len(chunk) > 1:  # of several texts, what is padded differs
            return None
        lower = self.files.nearest_below(self.split.first, self.texts, chunk)
        split = split_at(self.base, lower) if lower else None
        return replace(self, split=split, order=tuple(chunk), stored={}) if split and split.form else None

    def _missing(self, batch: Sequence[int]) -> list[Sequence[int]]:
        step = CHUNK_EXAMPLES.get(self.base.device.type, 32)
        places = {self.order.index(i) // step for i in batch if i not in self.stored}
        return [self.order[at * step : (at + 1) * step] for at in sorted(places)]


def frozen_features(
    base: Base,
    texts: EncodedTexts,
    split: LayerSplit,
    shard: Sequence[int],
    changes: Sequence[Adapter | None],
    cache: ActivationCache,
    room: int,
) -> FrozenFeatures:
    """Make the features of these examples; they are kept from task to task if `room` (bytes) holds them.

    `changes` are the adapters that are added to the base in this pass, folds too. They are looked for below the split. Where there
    are none, features are read from the cache's folder, and kept there, whatever `room` is.
    """
    order = tuple(sorted(shard, key=lambda i: (len(texts.ids[i]), i)))
    changed = [found for change in changes if change and (found := _below(base, split, change)).factors]
    lowest = lowest_trained(base, [name for change in changed for name in change.factors]) if changed else 0
    under, below = split_at(base, lowest) if lowest else None, None
    if under and under.form:
        below = frozen_features(base, texts, under, shard, (), cache, room)
    key, files = (tuple(map(fingerprint, changed)), split.first, order), None if changed else cache.files
    stored = cache.entry(key) if 4 * base.hidden * sum(texts.lengths(shard)) <= room else {}
    return FrozenFeatures(base, texts, split, order, stored, below, files)


def _below(base: Base, split: LayerSplit, change: Adapter) -> Adapter:
    """Return what an adapter adds to layers below the first trained block."""
    depths, trained = peft_weights.layer_depths(base.model), len(split.blocks) - split.first
    factors = {name: factor for name, factor in change.factors.items() if depths[name] > trained}
    return Adapter({name: factors[name] for name in changed_layers(Adapter(factors))})


def changed_layers(adapter: Adapter) -> list[str]:
    """Return the layers to which an adapter adds something: not those whose `up` is zero, as in a LoRA at its beginning."""
    return [name for name, factor in adapter.factors.items() if bool(factor.up.any())]
