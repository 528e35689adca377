"""Cost of a task in FLOP, bytes on the wire and bytes of memory, from the sizes of the model alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

ANSWER_SHARE = 0.5
"""Share of a text's tokens that are predicted, where nobody says how many: rather too many than too few, since memory has an end."""


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
        vocabulary: logits of a predicted token (0: labels are predicted, and their logits are few).
    """

    parameters: int
    embeddings: int
    layers: int
    hidden: int
    modules: tuple[tuple[int, int], ...]
    dense: int
    depths: Mapping[str, int] = field(default_factory=dict)
    vocabulary: int = 0

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

    def train_memory(
        self, rank: int, batch_tokens: float, depth: int | None = None, answer_tokens: float | None = None
    ) -> float:
        """Return the bytes to train: the base, what is trained with its optimiser, activations and logits of one batch.

        The base is float32. A trained number has a gradient and two Adam moments beside it. A token keeps about 16 hidden-sized
        float32 activations in each trained block (attention and feed-forward, without attention maps). A predicted token has a
        logit for each word of the vocabulary, its log-probability and its gradient: at a low depth they are most of all.
        An estimate for choosing ranks and depths, not a measurement.

        Args:
            rank: LoRA rank.
            batch_tokens: tokens of the batch, padding included.
            depth: trained blocks (None: all).
            answer_tokens: those of them that are predicted (None: `ANSWER_SHARE` of them).
        """
        trained = self.adapter_parameters(rank, depth) + self.dense
        blocks = self.layers if depth is None else depth
        predicted = ANSWER_SHARE * batch_tokens if answer_tokens is None else answer_tokens
        activations = 64.0 * batch_tokens * self.hidden * blocks + 12.0 * predicted * self.vocabulary
        return 4.0 * (self.parameters + self.embeddings) + 16.0 * trained + activations
