"""Local training of a cohort against a plain PEFT loop: the same clients, examples, steps and optimiser, exact float32.

    python -m bench.train [--quick]

A BERT of the mini shape (4 layers of 256) with random weights, real MRPC pairs (without that data: lengths drawn like theirs), 8
clients of 64 pairs, one pass in batches of 16, LoRA rank 8 on query and value, AdamW, no dropout. The PEFT loop loads a client's
adapter, makes its optimiser, trains and reads the adapter back, on examples tokenised beforehand: once padded to 128, once to the
longest of each batch. One thread; processor seconds of the process (wall seconds beside), interleaved A B C A B C, median
(minimum - maximum). Then the same on all-MiniLM-L6-v2 with dropout on in both, the model's own (0.1) and the adapters' (0.05), two
clients; a small Llama (6 layers of 256) on instructions, adapters on all linear layers, one client; one trained layer of six (6
layers of 384) with its activations kept and computed anew, gradients of several clients in one pass against one after the other, and
two local workers against one (`python -m bench.workers`). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.timing import Time, sample, spread
from bench.workers import workers2
from fedloom.core.lora import Adapter
from fedloom.core.seeds import rng, simulated_secret
from fedloom.core.types import Budget, ClientState, Result, Task, TaskStart
from fedloom.train.base_model import Base, initial_adapter, load_base
from fedloom.train.settings import Engine, LoRA, Training
from fedloom.train.tokenised import EncodedTexts
from fedloom.train.trainer import PeftTrainer
from tests.support.tiny_models import hush, settle, tiny_generator

MRPC = Path(__file__).parents[2] / "shared" / "data" / "mrpc" / "train.tsv.gz"
CLIENTS, SHARD, BATCH, RANK, LONGEST = 8, 64, 16, 8, 128
MINI, SIX = {"hidden": 256, "layers": 4, "heads": 4}, {"hidden": 384, "layers": 6, "heads": 6}
LLAMA = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 768,
    "max_position_embeddings": 512,
}
"""The Llama of `experiments/small_llama.py`."""
BARS = {
    "vs_peft_padded": 2.5,
    "vs_peft_dynamic": 1.4,
    "vs_peft_dynamic_dropout_on": 1.9,
    "llama_vs_peft_dynamic": 1.6,
    "depth1_cached": 2.5,
    "workers2": 1.7,
}
ERROR = 1e-5
"""The largest relative error of a gradient that is rounding."""

Loop = Callable[[int], object]


def model_folder(hidden: int, layers: int, heads: int) -> Path:
    """A BERT with random weights, MiniLM's tokenizer and no dropout."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    from fedloom.train.demo_model import minilm

    hush()
    folder = Path(tempfile.mkdtemp())
    AutoTokenizer.from_pretrained(minilm()).save_pretrained(folder)
    torch.manual_seed(0)
    made: Any = BertConfig  # untyped
    config = made(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def texts_of(base: Base, count: int) -> EncodedTexts:
    """Pairs of MRPC as token ids, or random ids of lengths like theirs (log-normal, mean 53)."""
    if MRPC.exists():
        from fedloom import Table
        from fedloom.train.tokenised import encode_texts

        examples = Table(MRPC, text="sentence1", pair="sentence2").load(0).train
        every = encode_texts(examples, base.tokenizer, LONGEST)
        extras = {name: rows[:count] for name, rows in every.extras.items()}
        return replace(every, ids=every.ids[:count], extras=extras, labels=every.labels[:count])
    draw = random.Random(0)
    lengths = [min(LONGEST, max(20, round(draw.lognormvariate(3.94, 0.25)))) for _ in range(count)]
    ids = tuple(tuple(draw.randrange(1000, 30000) for _ in range(n)) for n in lengths)
    return EncodedTexts(ids, {}, tuple(draw.randrange(2) for _ in ids), 0, False)


def peft_loop(folder: Path, texts: EncodedTexts, padded: bool, dropout: float = 0.0) -> Loop:
    """The cohort as people train it today; `dropout` of the adapters' inputs, and whatever the model has of its own."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    config = LoraConfig(
        task_type="SEQ_CLS", r=RANK, lora_alpha=2 * RANK, lora_dropout=dropout, target_modules=["query", "value"]
    )
    return steps_of(get_peft_model(base, config), texts, padded, SHARD, BATCH)


def steps_of(model: Any, texts: EncodedTexts, padded: bool, shard: int, size: int) -> Loop:
    """Training of clients of `shard` examples each in batches of `size`, with PEFT's adapter in the model."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    model.train()
    state = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    trained = [p for p in model.parameters() if p.requires_grad]

    def loop(clients: int) -> list[Mapping[str, Any]]:
        done = list[Mapping[str, Any]]()
        for client in range(clients):
            set_peft_model_state_dict(model, state)
            optimiser = torch.optim.AdamW(trained, lr=5e-4, weight_decay=0.0)
            order = list(range(client * shard, (client + 1) * shard))
            rng(0, "peft", client).shuffle(order)
            for first in range(0, shard, size):
                loss = model(**inputs(texts, order[first : first + size], padded)).loss
                optimiser.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimiser.step()
            done.append({name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()})
        return done

    return loop


def inputs(texts: EncodedTexts, batch: Sequence[int], padded: bool) -> dict[str, torch.Tensor]:
    """A batch padded to its longest, or to `LONGEST`."""
    made = texts.batch(batch, torch.device("cpu"))
    more = LONGEST - made["input_ids"].shape[1] if padded else 0
    return {name: rows if name == "labels" else torch.nn.functional.pad(rows, (0, more)) for name, rows in made.items()}


def trainer_of(base: Base, texts: EncodedTexts, engine: Engine) -> PeftTrainer:
    """The clients with `SHARD` examples each."""
    shards = {str(k): tuple(range(k * SHARD, (k + 1) * SHARD)) for k in range(CLIENTS)}
    return PeftTrainer(base, texts, shards, Training(batch_size=BATCH), partial(simulated_secret, 0), engine)


def cohort(start: Adapter, clients: int, steps: int) -> list[tuple[Task, ClientState]]:
    """A task for each client."""
    tasks = [Task(k + 1, str(k), 0, TaskStart(start, "0"), Budget(RANK, steps), 0.0) for k in range(clients)]
    return [(task, ClientState()) for task in tasks]


def interleaved(loops: Mapping[str, Loop], clients: int, repeats: int) -> dict[str, list[Time]]:
    """A B C A B C, after one client of each that does not count."""
    for loop in loops.values():
        loop(1)
    rounds = [{name: sample(partial(loop, clients)) for name, loop in loops.items()} for _ in range(repeats)]
    return {name: [one[name] for one in rounds] for name in loops}


def print_times(title: str, times: Mapping[str, Sequence[Time]]) -> dict[str, float]:
    """Print a block of the table; medians in processor seconds."""
    print(f"\n{title}")
    for name, own in times.items():
        print(f"  {name:26s} CPU s {spread([t.cpu for t in own])}   wall s {spread([t.wall for t in own])}")
    return {name: median(t.cpu for t in own) for name, own in times.items()}


def against_peft(folder: Path, base: Base, texts: EncodedTexts, repeats: int) -> dict[str, float]:
    """A cohort of eight through both."""
    trainer = trainer_of(base, texts, Engine())
    work = cohort(initial_adapter(base, RANK), CLIENTS, SHARD // BATCH)
    loops: dict[str, Loop] = {
        "PEFT loop, padded to 128": peft_loop(folder, texts, True),
        "PEFT loop, dynamic padding": peft_loop(folder, texts, False),
        "fedloom": lambda clients: trainer.train(work[:clients]),
    }
    found = print_times(
        f"{CLIENTS} clients, {SHARD // BATCH} steps of {BATCH} pairs", interleaved(loops, CLIENTS, repeats)
    )
    padded, dynamic, ours = found.values()
    return {"vs_peft_padded": padded / ours, "vs_peft_dynamic": dynamic / ours}


def with_dropout(repeats: int) -> dict[str, float]:
    """Two clients on all-MiniLM-L6-v2 as it comes, through both."""
    from fedloom.train.demo_model import minilm

    folder, clients = minilm(), 2
    base = load_base(str(folder), 2, LoRA(), RANK, 0, engine=Engine())
    texts = texts_of(base, clients * SHARD)
    trainer, work = trainer_of(base, texts, Engine()), cohort(initial_adapter(base, RANK), clients, SHARD // BATCH)
    loops: dict[str, Loop] = {
        "PEFT loop, dynamic padding": peft_loop(folder, texts, False, LoRA().dropout),
        "fedloom": lambda count: trainer.train(work[:count]),
    }
    found = print_times(
        f"{clients} clients on MiniLM, dropout on, {SHARD // BATCH} steps of {BATCH} pairs",
        interleaved(loops, clients, repeats),
    )
    return {"vs_peft_dynamic_dropout_on": found["PEFT loop, dynamic padding"] / found["fedloom"]}


def writing(repeats: int) -> dict[str, float]:
    """One client on a small Llama with random weights, adapters on all its linear layers, through both."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder, shard, size = tiny_generator(Path(tempfile.mkdtemp()), **LLAMA), 24, 8
    lora = LoRA(target_modules="all-linear", dropout=0.0)
    base = load_base(str(folder), None, lora, RANK, 0, engine=Engine())
    texts, training = instructions(shard), Training(batch_size=size)
    trainer = PeftTrainer(base, texts, {"0": tuple(range(shard))}, training, partial(simulated_secret, 0), Engine())
    everywhere = replace(trainer, base=load_base(str(folder), None, lora, RANK, 0, engine=Engine(answer_tokens=False)))
    work = cohort(initial_adapter(base, RANK), 1, shard // size)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules="all-linear"
    )
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    loops: dict[str, Loop] = {
        "PEFT loop, dynamic padding": steps_of(get_peft_model(model, config), texts, False, shard, size),
        "fedloom": lambda count: trainer.train(work[:count]),
        "fedloom, all tokens in the last block": lambda count: everywhere.train(work[:count]),
    }
    title = f"a small Llama, LoRA on all linear layers, {shard // size} steps of {size} instructions"
    found = print_times(title, interleaved(loops, 1, repeats + 1))
    return {
        "llama_vs_peft_dynamic": found["PEFT loop, dynamic padding"] / found["fedloom"],
        "answer_tokens": found["fedloom, all tokens in the last block"] / found["fedloom"],
    }


def instructions(count: int) -> EncodedTexts:
    """Random ids of lengths like those of instructions (log-normal, mean 92), the last 4 to 19 of them the answer."""
    draw = random.Random(0)
    lengths = [min(256, max(24, round(draw.lognormvariate(4.4, 0.5)))) for _ in range(count)]
    ids = tuple(tuple(draw.randrange(10, LLAMA["vocab_size"]) for _ in range(n)) for n in lengths)
    return EncodedTexts(ids, {}, (0,) * count, 3, False, tuple(n - draw.randrange(4, 20) for n in lengths))


def shallow(repeats: int) -> dict[str, float]:
    """One trained layer of six; four passes over a client's examples."""
    base = load_base(str(model_folder(**SIX)), 2, LoRA(dropout=0.0), RANK, 0, engine=Engine())
    texts, whole = texts_of(base, SHARD), initial_adapter(base, RANK)
    top = Adapter({n: f for n, f in whole.factors.items() if ".layer.5." in n}, whole.dense)
    work = cohort(top, 1, SHARD // BATCH)
    kept, anew = trainer_of(base, texts, Engine()), trainer_of(base, texts, Engine(cache=0))
    first = {"first pass, keeping": [sample(lambda: kept.train(work))]}
    loops: dict[str, Loop] = {"kept": lambda _: kept.train(work), "computed anew": lambda _: anew.train(work)}
    found = print_times("one trained layer of six, a pass over 64 pairs", first | interleaved(loops, 1, repeats))
    return {"depth1_cached": found["computed anew"] / found["kept"]}


def gradient_error(base: Base, texts: EncodedTexts) -> float:
    """The largest relative difference between gradients of clients in one pass and one after the other.

    After one step AdamW's first moment is a tenth of the gradient.
    """
    start = initial_adapter(base, RANK)
    moved = (
        trainer_of(base, texts, Engine(together=1)).train(cohort(start, 1, 4))[0][0].adapter
    )  # `up` is zero at first
    work = cohort(moved, CLIENTS, 1)
    alone, common = (trainer_of(base, texts, Engine(together=n)).train(work) for n in (1, CLIENTS))
    return max(error(one, other) for one, other in zip(alone, common, strict=True))


def error(one: tuple[Result, ClientState], other: tuple[Result, ClientState]) -> float:
    """The largest over the tensors: difference over size."""
    pairs = [(m["exp_avg"], other[1].moments[name]["exp_avg"]) for name, m in one[1].moments.items()]
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.train")
    parser.add_argument("--quick", action="store_true", help="two repetitions, within two minutes")
    options = parser.parse_args()
    settle()
    repeats = 2 if options.quick else 7
    folder = model_folder(**MINI)
    base = load_base(str(folder), 2, LoRA(dropout=0.0), RANK, 0, engine=Engine())
    texts = texts_of(base, CLIENTS * SHARD)
    print(
        f"frozen layers: {base.computation['kernel']}; lengths: {'MRPC' if MRPC.exists() else 'drawn like those of MRPC'}"
    )
    figures = against_peft(folder, base, texts, repeats) | with_dropout(repeats) | writing(repeats) | shallow(repeats)
    workers = workers2(*(2, 4) if options.quick else (7, 10))
    figures |= {"workers2": workers["speedup"], "workers2_cpu": workers["speedup_cpu"]}
    worst = gradient_error(base, texts)
    print()
    for name, bar in BARS.items():
        print(f"  {name:26s} {figures[name]:7.2f}  (bar {bar}: {'met' if figures[name] >= bar else 'MISSED'})")
    print(f"  {'max_gradient_error':26s} {worst:7.0e}  (bar {ERROR:.0e}: {'met' if worst <= ERROR else 'MISSED'})")
    print(json.dumps({**{name: round(value, 3) for name, value in figures.items()}, "max_gradient_error": worst}))


if __name__ == "__main__":
    main()
