"""The settings of local training as plain values; importing them costs nothing, which keeps the command line quick."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from fedloom.core.errors import Refused


@dataclass(frozen=True, slots=True)
class LoRA:
    """How the base is adapted.

    `target_modules` follows PEFT: names of layers, a regular expression, "all-linear", or None for PEFT's own choice for the
    architecture, usually query and value.
    `scaling` is alpha/r, the same for every rank: with a fixed alpha the same adapter would be a different function on each
    client. 2.0 is PEFT's common lora_alpha = 2 r.
    """

    target_modules: tuple[str, ...] | str | None = None
    scaling: float = 2.0
    dropout: float = 0.05

    def __post_init__(self) -> None:
        if self.scaling <= 0:
            raise Refused("lora.scaling", self.scaling, "alpha/r is positive; 2.0 is lora_alpha = 2 r")
        if not 0 <= self.dropout < 1:
            raise Refused("lora.dropout", self.dropout, "a probability of at least 0 and below 1")


@dataclass(frozen=True, slots=True)
class Generation:
    """What a run that generates text writes with its final model: answers to so many test examples, and how long they may be.

    An answer ends with the model's end mark, after `max_new_tokens`, or where the model can read no further.
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
    """How training is computed: this changes its time and the last digits, never the method.

    `kernel` computes frozen linear layers in exact float32: "torch", "onednn" (up to 1.7 times faster on some processors), or
    "fastest", which is measured when a run is prepared and written in its manifest. With `first_token` the last layer of an encoder
    whose head reads only the first token computes only that. `together` is the most clients that train in one pass (1: one after
    the other, None: what pays, tiny steps on a CPU and most on a GPU). `cache` is how many bytes of activations to keep of the layers
    below the trained ones. `bfloat16` keeps the frozen linear layers in bfloat16: half the memory, and faster where the hardware
    has it, but no longer exact. `four_bit` keeps them in 4 bits (QLoRA): an eighth of the memory, on an NVIDIA GPU with
    bitsandbytes. `checkpointing` keeps only what goes into each layer and computes the rest again in the backward pass: a third
    more time for a fraction of the activations, with the same gradients.
    """

    kernel: str = "fastest"
    first_token: bool = True
    together: int | None = None
    cache: int = 2_000_000_000
    bfloat16: bool = False
    checkpointing: bool = False
    four_bit: bool = False

    def __post_init__(self) -> None:
        if self.kernel not in ("fastest", "torch", "onednn"):
            raise Refused("engine.kernel", self.kernel, "choose fastest, torch or onednn")
        if self.together is not None and self.together < 1:
            raise Refused("engine.together", self.together, "at least 1 client in a pass, or None for what pays")
        if self.cache < 0:
            raise Refused("engine.cache", self.cache, "bytes of activations to keep, 0 for none")
        if self.four_bit and self.bfloat16:
            raise Refused("engine.bfloat16", True, "choose one: layers in 4 bits, or in bfloat16")


PLAIN = Engine("torch", first_token=False, together=1, cache=0)
"""One client after the other through torch alone."""

Decay: TypeAlias = Callable[[float], float]
"""Share of the task done (0 to 1) -> share of the learning rate."""


def constant(done: float) -> float:
    """The learning rate stays."""
    return 1.0


def linear(done: float) -> float:
    """Falls to 0 in a straight line, as the Hugging Face Trainer does inside every local call."""
    return 1.0 - done


def cosine(done: float) -> float:
    """Falls to 0 along half a cosine."""
    return 0.5 * (1.0 + math.cos(math.pi * done))


@dataclass(frozen=True, slots=True)
class Training:
    """Local training with AdamW. `warmup` is the share of a task's steps in which the learning rate rises from 0.

    `keep_moments` carries Adam's moments over to the client's next task while its factors keep their basis; after a merge
    that rotated them (HLoRA, raFLoRA) they are always dropped. `proximal` is FedProx's mu: the loss gains
    proximal / 2 * |change|^2, which keeps a client near what it was sent. (SCAFFOLD is a wrapper: `Scaffold(inner=FedIT())`.)
    `bucket` puts texts of like length into a batch, to save padding; `stratified`, which goes before it, texts of all the client's
    lengths into each.
    """

    learning_rate: float = 5e-4
    batch_size: int = 16
    max_length: int = 128
    weight_decay: float = 0.0
    warmup: float = 0.0
    decay: Decay = constant
    clip: float = 1.0
    bucket: bool = True
    keep_moments: bool = True
    proximal: float = 0.0
    stratified: bool = False

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise Refused("training.learning_rate", self.learning_rate, "give a positive number, for instance 5e-4")
        if self.batch_size < 1:
            raise Refused("training.batch_size", self.batch_size, "a batch holds at least 1 example")
        if self.max_length < 4:
            raise Refused("training.max_length", self.max_length, "a text needs at least 4 tokens, its marks included")
        if not 0 <= self.warmup < 1:
            raise Refused("training.warmup", self.warmup, "the share of steps to warm up in, at least 0 and below 1")
        if self.weight_decay < 0:
            raise Refused("training.weight_decay", self.weight_decay, "give 0 or more")
        if self.proximal < 0:
            raise Refused("training.proximal", self.proximal, "mu of FedProx, 0 (off) or more; 0.01 is usual")
        if self.clip <= 0:
            raise Refused("training.clip", self.clip, "the largest gradient norm, a positive number")

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of optimiser step `step` (from 0) of `steps`."""
        warm = math.ceil(self.warmup * steps)
        if step < warm:
            return self.learning_rate * (step + 1) / (warm + 1)
        return self.learning_rate * self.decay((step - warm) / max(1, steps - warm))
