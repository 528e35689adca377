"""Settings of local training as plain values: `LoRA`, `Training`, `Engine`, `Generation`, and the decays of the learning rate.

Nothing heavy is imported here (neither torch nor transformers), so that the command line can check a run file quickly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from fedloom.core.errors import Refused
from fedloom.core.rate_by_rank import RateByRank, rate_bounds


@dataclass(frozen=True, slots=True)
class LoRA:
    """Low-rank adapter: which layers of the base model get one, and how it is scaled.

    The scaling is the same for every rank: with a fixed alpha the same adapter would be a different function on each client.

    Fields:
        target_modules: names of layers, a regular expression, or "all-linear", as in PEFT (default None: PEFT's choice for the
            architecture, usually query and value; where it has none, the linear layers of the transformer blocks).
        scaling: alpha / r (default 2.0, which is PEFT's common lora_alpha = 2 r).
        dropout: probability of dropping an input of an adapter while training, at least 0 and below 1 (default 0.05).
    """

    target_modules: tuple[str, ...] | str | None = None
    scaling: float = 2.0
    dropout: float = 0.05

    def __post_init__(self) -> None:
        if self.scaling <= 0:
            raise Refused("lora.scaling", self.scaling, "alpha/r is positive; 2.0 is lora_alpha = 2 r")
        if not 0 <= self.dropout < 1:
            raise Refused("lora.dropout", self.dropout, "a probability of at least 0 and below 1")


def largest_step(learning_rate: float, scaling: float, rates: RateByRank | None = None) -> float:
    """Return how far one AdamW step moves a number of an adapter, `up` with its scaling in it, at most on average over a tensor.

    Where the learning rate follows the rank, by `rates`, it is that of rank 1.
    """
    return learning_rate * max(1.0, scaling) * rate_bounds(rates, 1)[1]


@dataclass(frozen=True, slots=True)
class Generation:
    """Answers that a run which generates text writes with its final model, as samples for the report.

    An answer ends with the model's end mark, after `max_new_tokens`, or where the model can read no further.

    Fields:
        examples: number of test examples that are answered (default 8; 0: none).
        max_new_tokens: largest number of tokens of one answer (default 64).
    """

    examples: int = 8
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        if self.examples < 0:
            raise Refused("generation.examples", self.examples, "how many test examples to answer, 0 for none")
        if self.max_new_tokens < 1:
            raise Refused("generation.max_new_tokens", self.max_new_tokens, "an answer holds at least 1 token")


@dataclass(frozen=True, slots=True)
class Engine:
    """Ways to compute training. They change time, memory and the last digits of the results, never the method.

    Fields:
        kernel: how frozen linear layers are computed in float32 (default "fastest"). "torch" is the plain way. "fused" is the same,
            but a layer and its adapter are one node of the graph, on a GPU too. "onednn" is fused, and up to 1.7 times faster on some
            processors. "fastest" measures them when a run is prepared, and writes the best in its manifest.
        first_token: in an encoder's last layer compute only the first token, if the head reads no other (default True).
        answer_tokens: in the last block of a model that writes compute only the tokens that predict an answer's, keys and values
            aside (default True). With `checkpointing` all are computed.
        together: largest number of clients that train in one pass (1: one after the other). The default None chooses by size: small
            steps on a CPU, most steps on a GPU. Always 1, with a note, where a model does not keep clients apart (DeBERTa, XLNet).
        cache: largest size of cached activations from below the trained layers (bytes; default 2e9; 0: none, each step is a plain
            pass). It is 0, with a note, for a model whose blocks pass on more than hidden states (T5) or read padding.
        cache_dir: folder in which activations below all trained layers are kept for other runs too (default None: none). It changes
            no byte of a run. Activations tell much of the texts: only its owner can enter it. A site of a deployment has none.
        cache_dir_bytes: largest size of what is kept there (bytes; default 2e10). Then nothing more is written, with a warning.
        bfloat16: keep the frozen linear layers in bfloat16, on a GPU the whole model except trained adapters and heads (default
            False). It takes half the memory, is faster where the hardware has it, and no longer exact. None: on a CPU that has
            instructions for it, unless single records are protected; found when a run is prepared. Refused where a model has no such
            layer.
        checkpointing: keep only the input of each layer and compute the rest again in the backward pass (default False). It takes a
            third more time and a fraction of the activations, with the same gradients.
        four_bit: keep the frozen linear layers in 4 bits (QLoRA): an eighth of the memory; needs an NVIDIA GPU and bitsandbytes
            (default False).
        byte_dropout: on a CPU draw what dropout drops as random bytes, a tenth of torch's time for it (default True). Probabilities
            are rounded to 1/256, where that moves them by less than a fiftieth.
    """

    kernel: str = "fastest"
    first_token: bool = True
    together: int | None = None
    cache: int = 2_000_000_000
    cache_dir: str | None = None
    cache_dir_bytes: int = 20_000_000_000
    bfloat16: bool | None = False
    checkpointing: bool = False
    four_bit: bool = False
    byte_dropout: bool = True
    answer_tokens: bool = True

    def __post_init__(self) -> None:
        if self.kernel not in ("fastest", "torch", "fused", "onednn"):
            raise Refused("engine.kernel", self.kernel, "choose fastest, torch, fused or onednn")
        if self.together is not None and self.together < 1:
            raise Refused("engine.together", self.together, "at least 1 client in a pass, or None for what pays")
        if self.cache < 0:
            raise Refused("engine.cache", self.cache, "bytes of activations to keep, 0 for none")
        if isinstance(self.cache_dir, Path):
            object.__setattr__(self, "cache_dir", str(self.cache_dir))
        if self.cache_dir is not None and not self.cache:
            raise Refused(
                "engine.cache_dir", self.cache_dir, "with engine.cache = 0 no activations are used; leave one out"
            )
        if self.cache_dir_bytes < 1:
            raise Refused("engine.cache_dir_bytes", self.cache_dir_bytes, "bytes of activations to keep in cache_dir")
        if self.four_bit and self.bfloat16:
            raise Refused("engine.bfloat16", True, "choose one: layers in 4 bits, or in bfloat16")


PLAIN = Engine("torch", first_token=False, together=1, cache=0, byte_dropout=False, answer_tokens=False)
"""The engine without tricks: one client after the other, through torch alone."""

ALL_LINEAR = "all-linear"
"""PEFT's word for every linear layer but the head, as `LoRA.target_modules`."""

SHORTEST_TEXT = 4
"""The least that `Training.max_length` may be: a text with its marks."""

LARGEST_LOSS = 100.0
"""Loss at which perplexity is capped: a larger one tells nothing, and the exponential would soon be too large for a number."""

TRIAL_SHARE = 5
"""A client that must choose its directions spends one step in `TRIAL_SHARE` on the trial (LoRA-A2: one epoch of six)."""


def trial_steps(steps: int) -> int:
    """Return how many of the steps of a task choose its directions, where they are chosen; what these train is thrown away."""
    return max(1, steps // TRIAL_SHARE)


Decay: TypeAlias = Callable[[float], float]
"""Function of the fraction of steps done (0 to 1) that returns the fraction of the learning rate that is used."""


def constant(done: float) -> float:
    """Keep the learning rate as it is."""
    return 1.0


def linear(done: float) -> float:
    """Let the learning rate fall to 0 in a straight line, as the Hugging Face Trainer does inside every local call."""
    return 1.0 - done


def cosine(done: float) -> float:
    """Let the learning rate fall to 0 along half a cosine."""
    return 0.5 * (1.0 + math.cos(math.pi * done))


@dataclass(frozen=True, slots=True)
class Training:
    """Local training of a client with AdamW. (SCAFFOLD is not a setting but a wrapper: `Scaffold(inner=FedIT())`.)

    Fields:
        learning_rate: the largest learning rate of a task (default 5e-4).
        batch_size: examples in one optimiser step, or all that the client has where these are fewer (default 16).
        max_length: largest number of tokens of a text, special tokens included; the rest is cut. The default None is enough for the
            longest text of the run, at most 1024 and what the model reads; `prepare` fills it in. In a deployment, where the texts
            lie elsewhere, it is that limit.
        weight_decay: AdamW's decoupled weight decay (default 0).
        warmup: share of a task's steps in which the learning rate rises from 0, at least 0 and below 1 (default 0).
        decay: how the learning rate falls after the warm-up: `constant`, `linear`, `cosine`, or a function of the fraction of
            steps done (default `constant`).
        clip: the largest norm of the gradient (default 1).
        bucket: put texts of similar length into one batch, which saves padding (default True).
        keep_moments: carry Adam's moments over to the client's next task while its factors keep their basis (default True). After a
            merge that rotated them (HLoRA, raFLoRA) the moments are always dropped.
        proximal: mu of FedProx: the loss gains proximal / 2 * |change|^2, which keeps a client near what it received (default 0:
            off).
        stratified: put texts of all lengths of the client into each batch; overrides `bucket` (default False).
        base_dropout: train with the dropout of the base model and its head (default None: yes for classification, no for generation,
            as is the custom). `LoRA.dropout` is independent of it.
    """

    learning_rate: float = 5e-4
    batch_size: int = 16
    max_length: int | None = None
    weight_decay: float = 0.0
    warmup: float = 0.0
    decay: Decay = field(default_factory=lambda: constant)  # so that help() shows no address of a function
    clip: float = 1.0
    bucket: bool = True
    keep_moments: bool = True
    proximal: float = 0.0
    stratified: bool = False
    base_dropout: bool | None = None

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise Refused("training.learning_rate", self.learning_rate, "give a positive number, for instance 5e-4")
        if self.batch_size < 1:
            raise Refused("training.batch_size", self.batch_size, "a batch holds at least 1 example")
        if self.max_length is not None and self.max_length < SHORTEST_TEXT:
            remedy = f"a text needs at least {SHORTEST_TEXT} tokens, its marks included"
            raise Refused("training.max_length", self.max_length, remedy)
        if not 0 <= self.warmup < 1:
            raise Refused("training.warmup", self.warmup, "the share of steps to warm up in, at least 0 and below 1")
        if self.weight_decay < 0:
            raise Refused("training.weight_decay", self.weight_decay, "give 0 or more")
        if self.proximal < 0:
            raise Refused("training.proximal", self.proximal, "mu of FedProx, 0 (off) or more; 0.01 is usual")
        if self.clip <= 0:
            raise Refused("training.clip", self.clip, "the largest gradient norm, a positive number")

    def has_base_dropout(self, labels: int | None) -> bool:
        """Whether a model that predicts one of so many labels, or with None writes text, trains with its own dropout."""
        return labels is not None if self.base_dropout is None else self.base_dropout

    @property
    def token_limit(self) -> int:
        """`max_length` of a run that was prepared. Raises Refused where nobody has filled it in."""
        if self.max_length is None:
            raise Refused(
                "training.max_length",
                None,
                "it follows from the data and the model: use the run that `prepare` returns",
            )
        return self.max_length

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of optimiser step `step` (from 0) of `steps`."""
        warm = math.ceil(self.warmup * steps)
        if step < warm:
            return self.learning_rate * (step + 1) / (warm + 1)
        return self.learning_rate * self.decay((step - warm) / max(1, steps - warm))
