"""Makes the project's own small causal language model, on which the experiments that write text start.

A Llama of 6 million parameters with a byte-level BPE tokenizer of 4,096 tokens and a chat template, trained from nothing for some
twenty minutes on one core, on the text of clients that the experiments leave out (`generation_data.py`). It knows the form of a
task and the English of short answers, and little else: enough for fine-tuning to have something to improve. It is made here and
not shipped: the data's terms are those of its many sources, and anybody can make it again.

python experiments/small_llama.py [--minutes 20 | --steps N] [--out FOLDER] [--seed N]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from generation_data import MODEL, base_rows, natural_instructions
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedloom.core.seeds import derive, rng
from fedloom.data.examples import Examples
from fedloom.train.tokenised import IGNORED, EncodedTexts, encode_texts

PAD, BEGIN, END = "<|pad|>", "<|begin|>", "<|end|>"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKS = [PAD, BEGIN, END, "<|system|>", "<|user|>", "<|assistant|>"]
VOCABULARY, LENGTH, ROWS = 4096, 256, 6
"""Tokens that there are, in a row, and rows in a batch."""

RATE, WARMUP = 2e-3, 0.05
TRIED = 600
"""Examples of which the loss is told."""


def tokenizer_of(examples: Examples) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer for these texts, each of them counted once."""
    texts = sorted({*examples.texts, *(examples.pairs or ()), *(examples.answers or ())})
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(  # type: ignore[call-arg]
        vocab_size=VOCABULARY, special_tokens=MARKS, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    kind: Any = PreTrainedTokenizerFast  # untyped
    tokenizer: PreTrainedTokenizerFast = kind(
        tokenizer_object=made, pad_token=PAD, bos_token=BEGIN, eos_token=END, additional_special_tokens=MARKS[3:]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def model_of(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Random weights."""
    torch.manual_seed(derive(seed, "small llama"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def batches(texts: EncodedTexts, seed: int) -> Iterator[Tensor]:
    """Packed rows without end: all examples one after the other in a new order each time, cut at `LENGTH`."""
    epoch = 0
    while True:
        order = rng(seed, "small llama", epoch).sample(range(len(texts.ids)), len(texts.ids))
        stream = torch.tensor([token for i in order for token in texts.ids[i]])
        rows = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
        yield from rows[: len(rows) // ROWS * ROWS].view(-1, ROWS, LENGTH)
        epoch += 1


def train(
    model: LlamaForCausalLM, texts: EncodedTexts, seed: int, minutes: float, steps: int | None
) -> dict[str, float]:
    """AdamW at a rate that rises and falls to 0 in a straight line, in bfloat16 where that keeps the sums in float32.

    Without `steps` as many as `minutes` hold at the pace of the first ones. The loss is that of all tokens, not of answers alone.
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    supply, begun, done, mean = batches(texts, seed), time.perf_counter(), 0, math.log(VOCABULARY)
    model.train()
    columns = (
        "{task.description}",
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        shown = bar.add_task("training", total=steps)
        while steps is None or done < steps:
            share = done / steps if steps else 0.0
            rate = RATE * min((share + 1e-3) / WARMUP, (1 - share) / (1 - WARMUP))
            for group in optimiser.param_groups:
                group["lr"] = rate
            batch = next(supply)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            done, mean = done + 1, 0.98 * mean + 0.02 * loss.item()
            bar.update(shown, completed=done, total=steps, description=f"training, loss {mean:.3f}")
            if done == 10 and steps is None:
                steps = max(20, round(minutes * 60 / (time.perf_counter() - begun) * done))
    seconds = time.perf_counter() - begun
    return {"steps": done, "tokens": done * ROWS * LENGTH, "seconds": round(seconds), "loss": round(mean, 4)}


@torch.no_grad()
def loss_of(model: LlamaForCausalLM, texts: EncodedTexts) -> float:
    """Mean cross-entropy of an answer's token, over all answers' tokens."""
    total, count = 0.0, 0
    model.train(False)
    for start in range(0, len(texts.ids), 32):
        inputs = texts.batch(range(start, min(start + 32, len(texts.ids))), torch.device("cpu"))
        labels = inputs.pop("labels")[:, 1:]
        logits = model(**inputs).logits[:, :-1].float()
        total += float(
            nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORED)
        )
        count += int((labels != IGNORED).sum())
    return total / count


def unigram(seen: EncodedTexts, texts: EncodedTexts) -> float:
    """The same of the frequencies of answers' tokens, with one more of each."""
    counts = Counter(
        token for ids, begin in zip(seen.ids, seen.answer_starts or (), strict=True) for token in ids[begin:]
    )
    size = counts.total() + VOCABULARY
    tokens = [token for ids, begin in zip(texts.ids, texts.answer_starts or (), strict=True) for token in ids[begin:]]
    return sum(math.log(size / (counts[token] + 1)) for token in tokens) / len(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the small Llama of the experiments that write text.")
    parser.add_argument("--minutes", type=float, default=20.0, help="how long to train (default 20)")
    parser.add_argument(
        "--steps", type=int, help="or how many steps: the same steps on the same machine, the same model"
    )
    parser.add_argument("--out", type=Path, default=MODEL, help=f"folder of the model (default {MODEL})")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    base, other = natural_instructions(base_rows).load(given.seed), natural_instructions().load(given.seed)
    tokenizer = tokenizer_of(base.train)
    texts = encode_texts(base.train, tokenizer, LENGTH)
    tried = {
        "clients of its own": encode_texts(sample(base.test, given.seed), tokenizer, LENGTH),
        "federated clients": encode_texts(sample(other.test, given.seed), tokenizer, LENGTH),
    }
    model = model_of(tokenizer, given.seed)
    tokens, parameters = sum(map(len, texts.ids)), sum(p.numel() for p in model.parameters())
    print(f"{len(texts.ids)} examples, {tokens} tokens, {parameters} parameters")
    before = {name: loss_of(model, some) for name, some in tried.items()}
    trained = train(model, texts, given.seed, given.minutes, given.steps)
    after = {name: loss_of(model, some) for name, some in tried.items()}
    for name, some in tried.items():
        figures = (("before", before[name]), ("unigram", unigram(texts, some)), ("after", after[name]))
        said = ", ".join(f"{when} {loss:.3f} (perplexity {math.exp(loss):.1f})" for when, loss in figures)
        print(f"answers of {name}: {said}")
    model.save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)
    made = {"parameters": parameters, "seed": given.seed, **trained, "answers": after}
    (given.out / "made.json").write_text(json.dumps(made, indent=1) + "\n")
    print(json.dumps(made))


def sample(examples: Examples, seed: int) -> Examples:
    """`TRIED` random ones."""
    return examples.take(sorted(rng(seed, "small llama", "tried").sample(range(len(examples)), TRIED)))


if __name__ == "__main__":
    main()
