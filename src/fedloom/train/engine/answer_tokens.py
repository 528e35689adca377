"""The last block of a model that writes, computed only where a token is to be predicted.

Logits are made where an answer is (`loss.answer_logits`). What the last block computes at other tokens is read by nobody, but for
what attention there reads of all tokens: keys and values. So its other linear layers compute the tokens of answers alone, forward
and backward, and the rest of their output is zero. Losses and gradients are those of the plain model, to rounding. Which layers
these are is tried on the model: of each, whether the block's output where it is read stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from fedloom.train import peft_weights
from fedloom.train.engine.trial_texts import FAILURES, trial_inputs

LARGEST_SHARE = 0.75
"""Of all tokens, how many may be read for their layers to compute them alone: with more, gathering takes what it saves."""

ROUNDING = {torch.float32: 1e-5}
"""Largest relative difference that is still rounding, by type; in others 0.03."""


@contextmanager
def computed_at(layers: Sequence[nn.Module], row: Tensor, column: Tensor, shape: tuple[int, int]) -> Iterator[None]:
    """Make linear layers compute these tokens alone inside the block, and put out zeros for the others.

    Args:
        layers: each gets (rows, tokens, d); what has another shape is computed whole.
        row: the example of each token (tokens read,).
        column: its place in the example (tokens read,).
        shape: rows and tokens of the batch.
    """
    changed = layers if 0 < len(row) <= LARGEST_SHARE * shape[0] * shape[1] else ()
    places = row * shape[1] + column
    for layer in changed:
        layer.forward = partial(_forward_at, layer.forward, places, shape)
    try:
        yield
    finally:
        for layer in changed:
            del layer.forward  # the class's own is left


def _forward_at(
    forward: Callable[..., Tensor], places: Tensor, shape: tuple[int, int], x: Tensor, *args: Any, **named: Any
) -> Tensor:
    if x.ndim != 3 or x.shape[:2] != shape:
        return forward(x, *args, **named)
    found = forward(x.flatten(0, 1).index_select(0, places), *args, **named)
    whole = found.new_zeros(shape[0] * shape[1], found.shape[1]).index_copy(0, places, found)
    return whole.view(*shape, found.shape[1])


@torch.no_grad()
def find_layers(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> tuple[nn.Module, ...]:
    """Return the linear layers of the last block whose output at a token is read there alone; none where that cannot be tried."""
    blocks, training = peft_weights.transformer_blocks(model), model.training
    if blocks is None:
        return ()
    model.eval()
    try:
        return _try_layers(model, blocks[1][-1], trial_inputs(model.get_base_model(), tokenizer))
    except FAILURES:
        return ()
    finally:
        model.train(training)


def _try_layers(model: PeftModel, block: nn.Module, inputs: dict[str, Tensor]) -> tuple[nn.Module, ...]:
    """Leave out one layer after the other where nobody should read it, then all that may be at once."""
    calls, mask = list[tuple[tuple[Any, ...], dict[str, Any]]](), inputs["attention_mask"].bool()
    shape = cast(tuple[int, int], tuple(mask.shape))
    row = torch.arange(shape[0], device=mask.device)
    column = shape[1] - 1 - mask.flip(1).int().argmax(1)  # the last token of a text, which attends to all

    def see(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.append((args, named))

    hook = block.register_forward_pre_hook(see, with_kwargs=True)
    try:
        plain = model(**inputs, use_cache=False).logits
    finally:
        hook.remove()
    ((args, named),) = calls

    def read_of_block() -> Tensor:
        output = block(*args, **named)
        hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
        return hidden[row, column]

    expected, found = read_of_block(), list[nn.Module]()
    for layer in _outermost(block):
        with computed_at([layer], row, column, shape):
            if _close(read_of_block(), expected):
                found.append(layer)
    with computed_at(found, row, column, shape):
        same = _close(model(**inputs, use_cache=False).logits[row, column], plain[row, column])
    return tuple(found) if same else ()


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the linear layers, an adapted one as a whole."""
    for child in module.children():
        if isinstance(child, LoraLayer | nn.Linear | Conv1D):
            yield child
        else:
            yield from _outermost(child)


def _close(one: Tensor, other: Tensor) -> bool:
    error = ROUNDING.get(other.dtype, 0.03)
    return one.shape == other.shape and float((one - other).abs().max()) <= error * float(other.abs().max())
