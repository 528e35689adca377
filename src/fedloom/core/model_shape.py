"""Cost of a task in FLOP, bytes on the wire and bytes of memory, from the sizes of the model alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a model, enough to estimate a task in FLOP, bytes and memory without the model.

    Fields:
        parameters: frozen weights that take part in matrix products of a forward pass.
        embeddings: frozen weights that are looked up.
        layers: transformer blocks.
        hidden: width of the hidden states.
        modules: (d_out, d_in) of each adapted module.
        dense: parameters that are trained and sent whole (a classification head).
        depths: by name and in the order of `modules`, the depth from which on a module is trained: 1 in the top block, `layers` in
            the lowest, 0 above the blocks, one more than `layers` below them (empty: only the full depth, None, has a cost).
    """

    parameters: int
    embeddings: int
    layers: int
    hidden: int
    modules: tuple[tuple[int, int], ...]
    dense: int
    depths: Mapping[str, int] = field(default_factory=dict)

    def untrained_modules(self, names: Iterable[str], depth: int | None) -> frozenset[str]:
        """Return those of these adapted modules that a client of this depth does not train."""
        return frozenset() if depth is None else frozenset(name for name in names if self.depths[name] > depth)

    def adapter_parameters(self, rank: int, depth: int | None = None) -> int:
        """Return the number of LoRA parameters that are trained at this rank and depth, the dense part not counted."""
        if depth is None:
            return rank * sum(out + inner for out, inner in self.modules)
        pairs = zip(self.modules, self.depths.values(), strict=True)
        return rank * sum(out + inner for (out, inner), lowest in pairs if lowest <= depth)

    def payload(self, rank: int, depth: int | None = None) -> int:
        """Return the bytes of one answer in float32, dense part included."""
        return 4 * (self.adapter_parameters(rank, depth) + self.dense)

    def train_flops(self, tokens: int, rank: int, depth: int | None = None) -> float:
        """Return the FLOP to train on `tokens` (padding not counted) when the top `depth` layers are trained.

        A forward pass is 2 FLOP a weight and token; backward through frozen weights costs the same again, for the trained
        layers only; LoRA factors cost three passes (forward, and two products backward), and those below are in the base.
        """
        share = 1.0 if depth is None else depth / self.layers
        return tokens * (2.0 * self.parameters * (1.0 + share) + 6.0 * self.adapter_parameters(rank, depth))

    def train_memory(self, rank: int, batch_tokens: int, depth: int | None = None) -> float:
        """Return the bytes to train: the float32 base, weights with gradients and two Adam moments, and activations of one batch.

        About 16 hidden-sized float32 activations are kept a token and trained layer (attention and feed-forward, without
        attention maps); an estimate for choosing ranks and depths, not a measurement.
        """
        trained = self.adapter_parameters(rank, depth) + self.dense
        blocks = self.layers if depth is None else depth
        return 4.0 * (self.parameters + self.embeddings) + 16.0 * trained + 64.0 * batch_tokens * self.hidden * blocks
