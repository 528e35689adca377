"""Local training on an accelerator: clients an hour and clients a device, one client after the other against several in one pass.

    python -m bench.gpu [--quick] [--device cuda] [--shapes NAME ...]

Models of the shapes of Qwen2.5-0.5B and Llama-3.2-1B with random weights, made on the device: nothing is loaded from anywhere. The
whole model in bfloat16, adapters in float32 at rank 16 on all linear layers. A client trains 10 steps of 4 texts, of lengths like
those of instructions (log-normal, mean 245 tokens, at most 512). `one`: clients one after the other; `stacked`: as many in one pass
as the engine chooses. A first round does not count. Wall seconds up to the last adapter on the host. `clients_a_device`: how many
fit beside one base by memory, from the peak of one. A merge of ten answers, exact, once on the device and once on the host. Where
there is no accelerator it says so, measures nothing and ends with 0. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedloom.core.lora import Adapter, truncate_sum
from fedloom.core.seeds import simulated_secret
from fedloom.core.types import Budget, ClientState, Task, TaskStart
from fedloom.train.base_model import Base, initial_adapter, load_base
from fedloom.train.peft_weights import copy_adapter
from fedloom.train.settings import Engine, LoRA, Training
from fedloom.train.tokenised import EncodedTexts
from fedloom.train.trainer import PeftTrainer
from tests.support.tiny_models import settle, tiny_generator

SHAPES: Mapping[str, Mapping[str, int]] = {
    "0.5B": {
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
    },
    "1B": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 1024,
    },
    "tiny": {"vocab_size": 64},
}
"""Shapes of models; "tiny" shows on any machine that the bench runs."""
RANK, BATCH, ANSWERS = 16, 4, 10


@dataclass(frozen=True, slots=True)
class Clients:
    """So many clients with the same number of texts, and their training.

    Fields:
        base: the model.
        texts: all their texts.
        count: number of clients.
        steps: of a task.
    """

    base: Base
    texts: EncodedTexts
    count: int
    steps: int

    def train(self, together: int | None, count: int) -> list[Adapter]:
        """Train the first `count` clients, as many in a pass as said (None: as the engine chooses)."""
        engine, rows = Engine(bfloat16=True, together=together), len(self.texts.ids) // self.count
        shards = {str(k): tuple(range(k * rows, (k + 1) * rows)) for k in range(self.count)}
        secret_of = partial(simulated_secret, 0)
        trainer = PeftTrainer(self.base, self.texts, shards, Training(batch_size=BATCH), secret_of, engine)
        start, budget = TaskStart(initial_adapter(self.base, RANK), "0"), Budget(RANK, self.steps)
        work = [(Task(k + 1, str(k), 0, start, budget, 0.0), ClientState()) for k in range(count)]
        return [result.adapter for result, _ in trainer.train(work)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, and as the last line one JSON object."""
    parser = argparse.ArgumentParser(prog="bench.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="8 clients instead of 32")
    parser.add_argument("--device", default="cuda", help="where to train (default: cuda)")
    parser.add_argument("--shapes", nargs="*", choices=[*SHAPES], default=["0.5B", "1B"], help="which models")
    given = parser.parse_args(arguments)
    settle()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("no accelerator: nothing was measured")
        print(json.dumps({"accelerator": None}))
        return
    name = torch.cuda.get_device_name() if given.device == "cuda" else given.device
    found = {shape: figures(shape, torch.device(given.device), 8 if given.quick else 32) for shape in given.shapes}
    print(json.dumps({"accelerator": name, **found}))


def figures(shape: str, device: torch.device, count: int) -> dict[str, float | None]:
    """Measure one model."""
    with tempfile.TemporaryDirectory() as folder:
        loading, base = seconds(device, partial(load, Path(folder), shape, device))
    clients = Clients(base, texts_of(SHAPES[shape]["vocab_size"], count * 10), count, 10)
    found: dict[str, float | None] = {"load_seconds": loading, "base_gb": memory(device)}
    peaks = dict[str, float | None]()
    answers = list[Adapter]()
    for way, together in (("one", 1), ("stacked", None)):
        clients.train(together, 1 if way == "one" else count)  # kernels are chosen at first use
        forget_peak(device)
        spent, answers = seconds(device, partial(clients.train, together, count))
        peaks[way] = peak(device)
        found |= {f"clients_an_hour_{way}": 3600 * count / spent, f"peak_gb_{way}": peaks[way]}
    found["clients_a_device"] = room(device, found["base_gb"], peaks["one"])
    found |= merge_seconds(answers[:ANSWERS], device)
    print(f"\n{shape} on {device}, {count} clients, 10 steps of {BATCH} texts")
    for name, value in found.items():
        print(f"  {name:26s} {'-' if value is None else format(value, '12.2f')}")
    return {name: value if value is None else round(value, 3) for name, value in found.items()}


def load(folder: Path, shape: str, device: torch.device) -> Base:
    """A Llama with random weights, written in bfloat16 and loaded as a checkpoint is."""
    tiny_generator(folder, **(SHAPES["tiny"] if shape != "tiny" else SHAPES[shape]))  # brings the tokenizer
    if shape != "tiny":
        from transformers import LlamaConfig, LlamaForCausalLM

        made: Any = LlamaConfig  # untyped
        with device:
            model = LlamaForCausalLM(made(**SHAPES[shape], tie_word_embeddings=True, pad_token_id=3, eos_token_id=2))
        model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
        del model
    lora = LoRA(target_modules="all-linear", dropout=0.0)
    return load_base(str(folder), None, lora, RANK, 0, str(device), Engine(bfloat16=True))


def texts_of(words: int, count: int) -> EncodedTexts:
    """Random ids; the last quarter of each text is its answer."""
    draw = random.Random(0)
    lengths = [min(512, max(32, round(draw.lognormvariate(5.4, 0.5)))) for _ in range(count)]
    if words < 1000:  # the tiny model reads no more
        lengths = [min(48, n) for n in lengths]
    ids = tuple(tuple(draw.randrange(10, words) for _ in range(n)) for n in lengths)
    return EncodedTexts(ids, {}, (0,) * count, 3, False, tuple(n - n // 4 for n in lengths))


def merge_seconds(answers: Sequence[Adapter], device: torch.device) -> dict[str, float | None]:
    """Seconds of an exact merge of these answers layer by layer, where they were trained and on the host."""
    there = [copy_adapter(answer, device) for answer in answers]

    def merge(adapters: Sequence[Adapter]) -> None:
        for name in adapters[0].factors:
            truncate_sum([(1 / len(adapters), adapter.factors[name]) for adapter in adapters], RANK)

    merge(there)
    return {
        "merge_seconds_device": seconds(device, partial(merge, there))[0],
        "merge_seconds_host": seconds(torch.device("cpu"), partial(merge, answers))[0],
    }


def seconds(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    """Wall seconds of `work` until the device has done all of it, and what it returns."""
    wait(device)
    begin = time.perf_counter()
    found = work()
    wait(device)
    return time.perf_counter() - begin, found


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def memory(device: torch.device) -> float | None:
    """Gigabytes in use."""
    return torch.cuda.memory_allocated() / 1e9 if device.type == "cuda" else None


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak(device: torch.device) -> float | None:
    """Gigabytes in use at the most since `forget_peak`."""
    return torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None


def room(device: torch.device, base: float | None, one: float | None) -> float | None:
    """How many clients fit beside one base by the memory that one client takes."""
    if base is None or one is None:
        return None
    whole = torch.cuda.get_device_properties(device).total_memory / 1e9
    return float((whole - base) // max(one - base, 1e-3))


if __name__ == "__main__":
    main()
