"""Loaded tiny models and trainers for the tests of training. Imports transformers: tests of toys use `tiny_models` or `toys`."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.core.lora import Adapter, Factor
from fedloom.core.seeds import simulated_secret
from fedloom.core.types import Budget, Task, TaskStart
from fedloom.data.examples import Examples
from fedloom.train.base_model import Base, load_base
from fedloom.train.settings import PLAIN, Engine, LoRA, Training
from fedloom.train.tokenised import EncodedTexts, encode_texts
from fedloom.train.trainer import PeftTrainer
from tests.support.tiny_models import tiny_run, toy_answers, toy_rows

__all__ = [
    "answered",
    "base_of",
    "examples",
    "frozen",
    "lively",
    "logits",
    "same",
    "still",
    "task_of",
    "tiny_run",
    "toy_rows",
    "trainer_of",
    "writer_of",
    "writing_trainer",
]


def still(base: Base) -> Base:
    """Without dropout, whose draws are others."""
    for module in base.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return base


def examples(count: int = 60) -> Examples:
    rows = toy_rows(count)
    names = ("colour", "pet")
    return Examples(tuple(r["text"] for r in rows), None, tuple(names.index(r["label"]) for r in rows), names, None)


def base_of(model: Path, rank: int = 4, **lora: Any) -> Base:
    return load_base(str(model), 2, LoRA(**({"dropout": 0.0} | lora)), rank, seed=3)


def writer_of(model: Path, rank: int = 4, engine: Engine = PLAIN, **lora: Any) -> Base:
    return load_base(str(model), None, LoRA(**({"dropout": 0.0} | lora)), rank, seed=3, engine=engine)


def answered(base: Base, count: int = 60, left: bool = False) -> EncodedTexts:
    """Requests with their answers and an end mark."""
    tokenizer, ids, begins = base.tokenizer, [], []
    for row in toy_answers(count):
        request, answer = (
            tokenizer(row[name], add_special_tokens=False)["input_ids"] for name in ("instruction", "answer")
        )
        ids.append((1, *request, *answer, 2))
        begins.append(1 + len(request))
    return EncodedTexts(tuple(ids), {}, (0,) * count, tokenizer.pad_token_id, left, tuple(begins))


def writing_trainer(base: Base, count: int = 60, **training: Any) -> PeftTrainer:
    """Two clients, `a` with the first half of the examples and `b` with the second."""
    shards = {"a": tuple(range(count // 2)), "b": tuple(range(count // 2, count))}
    return PeftTrainer(
        base,
        answered(base, count),
        shards,
        Training(**({"learning_rate": 1e-2} | training)),
        partial(simulated_secret, 0),
    )


def trainer_of(base: Base, count: int = 60, **training: Any) -> PeftTrainer:
    """Two clients, `a` with the first half of the examples and `b` with the second."""
    texts = encode_texts(examples(count), base.tokenizer, 32)
    half = count // 2
    shards = {"a": tuple(range(half)), "b": tuple(range(half, count))}
    return PeftTrainer(
        base, texts, shards, Training(**({"learning_rate": 1e-2} | training)), partial(simulated_secret, 0)
    )


def task_of(start: Adapter, client: str = "a", steps: int = 3, number: int = 1, basis: str = "0") -> Task:
    rank = next(iter(start.factors.values())).rank
    return Task(number, client, 0, TaskStart(start, basis), Budget(rank, steps), sent=0.0)


def lively(adapter: Adapter, seed: int = 0) -> Adapter:
    """The same shapes, with entries that do something."""
    draw = torch.Generator().manual_seed(seed)

    def random(like: Tensor) -> Tensor:
        drawn: Tensor = torch.randn(like.shape, generator=draw) / like.shape[-1] ** 0.5
        return drawn

    factors = {name: Factor(random(f.down), random(f.up)) for name, f in adapter.factors.items()}
    return Adapter(factors, {name: random(tensor) for name, tensor in adapter.dense.items()})


@torch.no_grad()
def logits(base: Base, adapter: Adapter, texts: EncodedTexts, scaling: float | None = None) -> Tensor:
    base.put(adapter, scaling)
    inputs = texts.batch(range(len(texts.ids)), base.device)
    inputs.pop("labels")
    found: Tensor = base.model.eval()(**inputs).logits
    return found


def frozen(base: Base) -> dict[str, Tensor]:
    """A copy of everything that no training may change."""
    kept = {n: p for n, p in base.model.named_parameters() if "lora_" not in n and ".modules_to_save." not in n}
    return copy.deepcopy({name: parameter.detach() for name, parameter in kept.items()})


def same(one: Adapter, other: Adapter) -> bool:
    """To the bit."""
    pairs = [(f.down, other.factors[n].down) for n, f in one.factors.items()]
    pairs += [(f.up, other.factors[n].up) for n, f in one.factors.items()]
    pairs += [(tensor, other.dense[n]) for n, tensor in one.dense.items()]
    assert one.factors.keys() == other.factors.keys()
    assert one.dense.keys() == other.dense.keys()
    return all(torch.equal(a, b) for a, b in pairs)
