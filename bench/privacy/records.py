"""A step with each example clipped and noise added, against a plain step of the same task. Bar: at most 1.1 times its processor time.

MiniLM, rank 8 on all linear layers, batches of 16 texts of 64 tokens, in both the same, through the trainer that runs and sites use:
gradients of each example, clipping, the digest of the sum, noise, AdamW. A and B take turns. Batches drawn by coins cost besides
that they cannot be made of texts of like length; that is in neither of the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from statistics import median

from bench.timing import sample, spread
from fedloom.core.seeds import rng, simulated_secret
from fedloom.core.types import Budget, ClientState, Task, TaskStart
from fedloom.privacy.private import Private
from fedloom.train.base_model import initial_adapter, load_base
from fedloom.train.demo_model import minilm
from fedloom.train.settings import ALL_LINEAR, PLAIN, LoRA, Training
from fedloom.train.tokenised import EncodedTexts
from fedloom.train.trainer import PeftTrainer

ROWS, TOKENS, RANK, LABELS = 16, 64, 8, 4
WORDS = range(1000, 20_000)
"""Token ids that are words."""


def figures(quick: bool) -> Mapping[str, object]:
    """Time tasks of a few steps, in turns."""
    steps, repeats = (2, 3) if quick else (8, 7)
    base = load_base(str(minilm()), LABELS, LoRA(target_modules=ALL_LINEAR), RANK, seed=0, engine=PLAIN)
    draw = rng(0, "texts")
    texts = EncodedTexts(
        tuple(tuple(draw.choices(WORDS, k=TOKENS)) for _ in range(ROWS)), {}, (0, 1, 2, 3) * (ROWS // LABELS), 0, False
    )
    training = Training(batch_size=ROWS, max_length=TOKENS)
    plain = PeftTrainer(base, texts, {"site": tuple(range(ROWS))}, training, partial(simulated_secret, 0))
    private = replace(plain, records=Private(clip=1.0, multiplier=1.0, most_answers=1, unit="record"))
    task = Task(1, "site", 0, TaskStart(initial_adapter(base, RANK), "0"), Budget(RANK, steps), 0.0)
    trainers = {"plain": plain, "private": private}
    times = {name: list[float]() for name in trainers}
    for turn in range(repeats + 1):  # the first does not count
        for name, trainer in trainers.items():
            took = sample(partial(trainer.train, [(task, ClientState())])).cpu / steps
            times[name] += [took] if turn else []
    for name, found in times.items():
        print(f"  {name:8s} CPU ms a step {spread([1e3 * each for each in found])}")
    pairs = zip(times["private"], times["plain"], strict=True)
    return {"dp_step_ratio": round(median(ours / theirs for ours, theirs in pairs), 3)}
