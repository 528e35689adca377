"""Gradients of single examples in one pass, each cut to a largest norm: the data's part of a step of DP-SGD.

Source: Abadi et al., "Deep Learning with Differential Privacy", arXiv 1607.00133, Alg. 1. Each example of a batch is a member of a
common pass (`batched_clients`): the adapter stands once for each, as a view, so its gradient comes back once for each, (examples,
r, d) a factor. With low rank these are small, and the pass costs what a plain one costs.

What one example adds must depend on no other. Whether a model keeps its examples apart is tried on it (`tells_examples_apart`): one
that normalises over the batch, routes tokens by what others leave free, or reads padding does not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.train import loss, peft_weights
from fedloom.train.base_model import Base
from fedloom.train.engine.batched_clients import gradients_of, rounding, same_gradients, stacked_layers, trial_adapters
from fedloom.train.engine.trial_texts import FAILURES, LENGTHS, trial_texts
from fedloom.train.objective import Weights

TRIAL_SEED = 0
"""Seed of the dropout in the two passes whose losses are compared."""


@dataclass(frozen=True, slots=True)
class ExamplePass:
    """The adapter whose gradients are taken.

    Fields:
        base: the model, with the adapter in `slot`.
        slot: the slot.
        weights: all its parameters, by the names of `slot_parameters`.
        trained: names of those that are trained.
        scaling: alpha / r of the adapter.
    """

    base: Base
    slot: str
    weights: Weights
    trained: Collection[str]
    scaling: float

    def gradients(self, losses_of: Callable[[Sequence[int]], Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
        """Return the gradient of each example's own loss, (rows, ...) for each trained parameter.

        Args:
            losses_of: computes the losses (rows,) of examples; called once, inside the pass.
            rows: the examples, at least one.
        """
        each = {name: weight.detach().expand(len(rows), *weight.shape) for name, weight in self.weights.items()}
        trained = {name: each[name].requires_grad_(True) for name in self.trained}
        with stacked_layers(self.base, self.slot, each, [self.scaling] * len(rows)):
            return gradients_of(losses_of(rows), trained)

    def clipped_sum(
        self, losses_of: Callable[[Sequence[int]], Tensor], batch: Sequence[int], clip: float, most: int
    ) -> dict[str, Tensor]:
        """Return the sum over a batch, which may be empty, of gradients that were each cut to the norm `clip`.

        A batch that was drawn by coins has no largest size; memory has, so `most` examples are in one pass. The sum is the same.
        """
        total = {name: torch.zeros(self.weights[name].shape, dtype=torch.float64) for name in self.trained}
        for rows in passes(batch, most):
            for name, part in clipped_sum(self.gradients(losses_of, rows), clip).items():
                total[name] += part
        return total


def clipped_sum(gradients: Mapping[str, Tensor], clip: float) -> dict[str, Tensor]:
    """Return the sum over examples of their gradients, each cut to the norm `clip` over all its tensors, in float64 on the CPU.

    A gradient that is not finite counts as none.
    """
    rows = [gradient.flatten(1) for gradient in gradients.values()]
    norms = torch.stack([torch.linalg.vector_norm(row, dim=1, dtype=_widest(row)) for row in rows]).norm(dim=0)
    finite = norms.isfinite()
    shares = (clip / norms[finite]).clamp(max=1.0)
    return {
        name: (shares @ row[finite].to(shares.dtype)).reshape(gradient.shape[1:]).cpu().double()
        for (name, gradient), row in zip(gradients.items(), rows, strict=True)
    }


def _widest(tensor: Tensor) -> torch.dtype:
    """Return float64, or float32 where the device has none."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def passes(batch: Sequence[int], most: int) -> list[Sequence[int]]:
    """Divide a batch, which may be empty, into passes of nearly equal size of at most `most` examples."""
    count = -(-len(batch) // most)
    return [batch[len(batch) * k // count : len(batch) * (k + 1) // count] for k in range(count)]


def tells_examples_apart(base: Base) -> bool:
    """Whether each example's gradient can be had in a common pass, and depends on no other example. Tried once on the model."""
    if "examples" not in base.trials:
        base.trials["examples"] = _try_examples(base)
    return bool(base.trials["examples"])


def _try_examples(base: Base) -> bool:
    """Compare gradients in one pass with those of single examples; and losses, with dropout, beside two different examples."""
    texts = trial_texts(base.model.get_base_model(), base.tokenizer, base.labels, copies=2)
    rows, exchanged = [*range(len(LENGTHS))], [len(LENGTHS), *range(1, len(LENGTHS))]
    try:
        with trial_adapters(base, 1) as (slot, (adapter,)):
            base.put(adapter, fold=base.fold)
            weights = peft_weights.slot_parameters(base.model, slot)

            def losses_of(chosen: Sequence[int]) -> Tensor:
                return loss.example_losses(base, texts.batch(chosen, base.device))

            together = ExamplePass(base, slot, weights, [*weights], base.lora.scaling).gradients(losses_of, rows)
            for k, row in enumerate(rows):
                for weight in weights.values():
                    weight.requires_grad_(True)
                alone = gradients_of(losses_of([row]), weights)
                if not same_gradients({name: g[k] for name, g in together.items()}, alone, rounding(base)):
                    return False
            base.model.train()
            found = [_losses_with_dropout(losses_of, some) for some in (rows, exchanged)]
            return torch.allclose(found[0][1:], found[1][1:], rtol=rounding(base), atol=rounding(base))
    except FAILURES:
        return False


def _losses_with_dropout(losses_of: Callable[[Sequence[int]], Tensor], rows: Sequence[int]) -> Tensor:
    """Return the losses of these texts; of two choices of the same lengths, dropout drops the same."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(TRIAL_SEED)
        return losses_of(rows)
