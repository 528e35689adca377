"""A step of a model that writes: logits of the answers' tokens only, and layers computed again, against logits of all tokens.

    python -m bench.answers [--quick]

A Llama of 6 layers of 256 and 32,000 tokens with random weights, its head tied to the embedding; LoRA rank 8 on query and value,
batches of 8 examples of 128 tokens to read and 32 to write, forward and backward. `all` is transformers' own loss of a batch. Each
way in a fresh process, one thread; memory is the resident set's rise over what stood before the step, at its highest; processor
seconds are of one step, median (minimum - maximum). The last line is one JSON object: `memory_mb.WAY`, `seconds.WAY`, and what
`answers` saves of `all` (`memory`, `time`: how many times less).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from bench.memory import HONEST_MALLOC, extra_peak
from bench.timing import sample, spread
from fedloom.train import loss
from fedloom.train.base_model import Base, initial_adapter, load_base
from fedloom.train.settings import Engine, LoRA
from fedloom.train.tokenised import EncodedTexts
from tests.support.tiny_models import settle, tiny_generator

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "vocab_size": 32_000,
    "max_position_embeddings": 512,
}
READ, WRITTEN, BATCH, RANK = 128, 32, 8, 8
WAYS = {"all": Engine("torch"), "answers": Engine("torch"), "again": Engine("torch", checkpointing=True)}


def texts() -> EncodedTexts:
    """Random tokens."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(4, SHAPE["vocab_size"], (BATCH, READ + WRITTEN), generator=draw).tolist()
    return EncodedTexts(tuple(map(tuple, rows)), {}, (0,) * BATCH, 3, False, (READ,) * BATCH)


def step(base: Base, way: str) -> Callable[[], None]:
    """Forward and backward of one batch."""
    inputs = texts().batch(range(BATCH), base.device)

    def once() -> None:
        found = base.model(**inputs, use_cache=False).loss if way == "all" else loss.mean_loss(base, dict(inputs))
        found.backward()
        base.model.zero_grad(set_to_none=True)

    return once


def measured(folder: Path, way: str, repeats: int) -> tuple[int, list[float]]:
    """In a fresh process: bytes by which the resident set rises in a step, and processor seconds of some."""
    base = load_base(str(folder), None, LoRA(dropout=0.0), RANK, 0, engine=WAYS[way])
    base.put(initial_adapter(base, RANK))
    base.model.train()
    once = step(base, way)
    once()  # what is made at first use
    rise = extra_peak(once)
    return rise, [sample(once).cpu for _ in range(repeats)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.answers")
    parser.add_argument("--quick", action="store_true", help="two repetitions")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    settle()
    if options.one:
        print(json.dumps(measured(Path(options.one[1]), options.one[0], 2 if options.quick else 5)))
        return
    memory, seconds = dict[str, float](), dict[str, float]()
    with tempfile.TemporaryDirectory() as place:
        folder = tiny_generator(Path(place), **SHAPE)
        for way in WAYS:
            command = [sys.executable, "-m", "bench.answers", "--one", way, str(folder)]
            command += ["--quick"] if options.quick else []
            done = subprocess.run(command, env=os.environ | HONEST_MALLOC, capture_output=True, text=True, check=True)
            rise, times = json.loads(done.stdout.splitlines()[-1])
            memory[way], seconds[way] = round(rise / 1e6, 1), round(median(times), 4)
            print(f"  {way:8s} memory MB {memory[way]:8.1f}  CPU ms a step {spread([1e3 * x for x in times])}")
    figures = {"memory_mb": memory, "seconds": seconds}
    gains = {name: round(of["all"] / of["answers"], 2) for name, of in (("memory", memory), ("time", seconds))}
    print(json.dumps(figures | gains))


if __name__ == "__main__":
    main()
