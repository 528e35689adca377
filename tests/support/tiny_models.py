"""Tiny models with random weights, their tokenizers, rows and a run of them, made on the spot: no network, no data."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

RANKS = (2, 4, 8)

PETS = ("cat", "dog", "bird", "fish", "horse", "sheep")
COLOURS = ("red", "green", "blue", "yellow", "black", "white")
FILLERS = ("the", "a", "is", "was", "my", "your", "near", "under", "here", "there", "now", "then", "very", "quite")
WORDS = PETS + COLOURS + FILLERS
SIZES: Mapping[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


def tiny_encoder(folder: Path, **sizes: Any) -> Path:
    """A BERT of 25 thousand parameters or other `sizes`, without a head, and its tokenizer: [CLS] words [SEP], padded right."""
    from transformers import BertConfig, BertModel

    marks = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    names: dict[str, Any] = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    save_word_tokenizer(folder, marks, names, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")
    config = {"vocab_size": len(marks + WORDS), "pad_token_id": 0, **SIZES, **sizes}
    return save_random_model(folder, BertModel, BertConfig(**config))


def tiny_decoder(folder: Path, **sizes: Any) -> Path:
    """A Llama of 19 thousand parameters or other `sizes`, without a head; its tokenizer, as Llama's, has no token to pad with."""
    from transformers import LlamaConfig, LlamaModel

    marks = ("<unk>", "<s>", "</s>")
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    save_word_tokenizer(folder, marks, names, "<s> $A", "<s> $A $B")
    config = {"vocab_size": len(marks + WORDS), "num_key_value_heads": 2, "pad_token_id": None, **SIZES, **sizes}
    return save_random_model(folder, LlamaModel, LlamaConfig(bos_token_id=1, eos_token_id=2, **config))


def tiny_generator(folder: Path, **sizes: Any) -> Path:
    """The same Llama with a head that writes, tied to its embedding, and a token to pad with; its requests are plain texts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    marks = ("<unk>", "<s>", "</s>", "<pad>")
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    save_word_tokenizer(folder, marks, names, "<s> $A", "<s> $A $B")
    config = {"vocab_size": len(marks + WORDS), "num_key_value_heads": 2, "tie_word_embeddings": True, **SIZES, **sizes}
    return save_random_model(
        folder, LlamaForCausalLM, LlamaConfig(bos_token_id=1, eos_token_id=2, pad_token_id=3, **config)
    )


def toy_answers(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Requests that speak of a pet or of a colour; the answer says which, and that word twice."""
    topics = {"pet": PETS, "colour": COLOURS}
    rows = []
    for row in toy_rows(count, seed):
        word = next(word for word in row["text"].split() if word in topics[row["label"]])
        rows.append({"instruction": row["text"], "answer": f"the {word} is {word}", "kind": row["label"]})
    return rows


def toy_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Sentences of 3 to 12 words that speak of a pet or of a colour; which of the two is the label."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        label, topic = (("pet", PETS), ("colour", COLOURS))[number % 2]
        words = draw.choices(FILLERS, k=draw.randint(2, 11))
        words.insert(draw.randint(0, len(words)), draw.choice(topic))
        rows.append({"text": " ".join(words), "label": label})
    return rows


def save_word_tokenizer(folder: Path, marks: Sequence[str], names: Mapping[str, Any], single: str, pair: str) -> None:
    """Write a tokenizer of `marks` and `WORDS`: their names in transformers, and what it puts around one text and a pair."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    numbers = {word: number for number, word in enumerate((*marks, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(numbers, names["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(mark, numbers[mark]) for mark in marks]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    made: Any = PreTrainedTokenizerFast  # untyped
    made(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def save_random_model(folder: Path, made: Callable[[Any], Any], config: Any) -> Path:
    """Write the model that `made` makes of a configuration; its weights are always the same."""
    hush()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made(config).save_pretrained(folder)
    return folder


def hush() -> None:
    """A head that is not in the checkpoint is what we expect, and the bars of a tiny model are noise."""
    from transformers.utils import logging

    talk: Any = logging  # untyped
    talk.disable_progress_bar()
    talk.set_verbosity_error()


def settle() -> None:
    """For a process of our own: one thread, and no word of a warning that is not ours to mend."""
    torch.set_num_threads(1)
    # peft asks transformers for `is_gradient_checkpointing`
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)


def tiny_run(model: Path, **more: Any) -> Any:
    """A run of three rounds, six clients and ranks 2, 4 and 8 on a tiny model, at a rate that moves it visibly."""
    from fedloom import IID, Engine, Limits, Plan, RankByCapability, Rounds, Rows, Run, Training

    given: dict[str, Any] = {
        "data": Rows(toy_rows(240)),
        "partition": IID(6),
        "schedule": Rounds(cohort_size=4),
        "plan": Plan(RankByCapability(ranks=RANKS, upload_seconds=0.02), local_steps=4),
        "training": Training(learning_rate=1e-2),
        "limits": Limits(versions=3),
        "engine": Engine(kernel="torch"),  # a kernel that is measured may be another one in the next run
        "device": "cpu",
        "threads": 1,
    }
    return Run(model=str(model), **(given | more))
