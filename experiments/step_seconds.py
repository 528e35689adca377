"""What a step of the language model takes at each depth, with kept activations: the times of `hierfedlora_llm.py`'s devices.

    OMP_NUM_THREADS=1 python experiments/step_seconds.py

One client of the experiment, whose activations are there already; tasks of a pass over its texts, depths taking turns; processor
seconds of one thread, median. `between` is what a block's forward pass adds to a step of depth 1, where the lowest adapted block has
changed below it since its last task. The last line is one JSON object.
"""

from __future__ import annotations

import json
from functools import partial
from statistics import median
from time import process_time

import torch
from hierfedlora_llm import BATCH, BLOCKS, ENGINE, MODULES, TEXTS
from text_pools import TOLD_LENGTH, TOPICS_TOLD

from fedloom import LoRA, Training
from fedloom.core.lora import Adapter, Factor
from fedloom.core.partial_depth import fold_layers
from fedloom.core.seeds import simulated_secret
from fedloom.core.types import Budget, ClientState, Task, TaskStart
from fedloom.train.base_model import initial_adapter, load_base
from fedloom.train.demo_model import smollm2
from fedloom.train.tokenised import encode_texts
from fedloom.train.trainer import PeftTrainer

RANK, REPEATS, STEPS = 8, 3, TEXTS // BATCH


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    base = load_base(str(smollm2()), None, LoRA(MODULES), RANK, 0, "cpu", ENGINE, ())
    texts = encode_texts(TOPICS_TOLD.load(0).train.take(range(TEXTS)), base.tokenizer, TOLD_LENGTH)
    born, shape = initial_adapter(base, RANK), base.shape()

    def task(depth: int, learnt: float = 0.0) -> Task:
        """Of this depth; `learnt` is what the lowest adapted block has in each number of `up`."""
        factors = {
            name: Factor(one.down, one.up + learnt) if shape.depths[name] == BLOCKS else one
            for name, one in born.factors.items()
        }
        start = fold_layers(TaskStart(Adapter(factors), "0"), shape.untrained_modules(factors, depth))
        return Task(depth, "c", 0, start, Budget(RANK, STEPS, depth), 0.0)

    training = Training(batch_size=BATCH, max_length=TOLD_LENGTH)
    shards = {"c": tuple(range(TEXTS))}
    trainer = PeftTrainer(base, texts, shards, training, partial(simulated_secret, 0), ENGINE)
    tasks = [(str(depth), depth, False) for depth in range(1, BLOCKS + 1)] + [("changed", 1, True)]
    found: dict[str, list[float]] = {name: [] for name, *_ in tasks}
    for turn in range(REPEATS + 1):
        for name, depth, changed in tasks:
            one = task(depth, 1e-3 * (turn + 1) if changed else 0.0)
            began = process_time()
            trainer.train([(one, ClientState())])
            if turn:  # the first one computes what is kept
                found[name].append((process_time() - began) / STEPS)
    steps = {name: round(median(own), 4) for name, own in found.items()}
    tokens = round(BATCH * sum(texts.lengths(range(TEXTS))) / TEXTS)
    between = round((steps.pop("changed") - steps["1"]) / (BLOCKS - 1), 4)
    print(json.dumps({"tokens": tokens, "steps": steps, "between": between}))


if __name__ == "__main__":
    main()
