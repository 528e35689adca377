"""Makes the files of a job once: texts, model, start, tokens, and the plan of who trains on what, which is fedloom's own.

The plan is taken from a run of fedloom (who was started, with which seed) so that the other systems can replay it.
"""

from __future__ import annotations

import csv
import gzip
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.peers import peer_fedloom
from bench.peers.job import Settings
from fedloom import prepare
from fedloom.core.events import Command, Dispatch, Event
from fedloom.core.seeds import simulated_secret
from fedloom.runs.prepare import PreparedRun
from fedloom.train.demo_model import minilm
from fedloom.train.tokenised import EncodedTexts
from fedloom.train.trainer import PeftTrainer
from tests.support.tiny_models import hush

TINY = Settings("tinybert-20", clients=20, cohort=4, rounds=5, steps=4, batch=16, rate=5e-3)
MRPC = Settings("minilm-mrpc", clients=20, cohort=4, rounds=3, steps=8, batch=8, rate=1e-3)
OWN = replace(MRPC, name="minilm-mrpc-own", same=False)
DROPOUT = replace(MRPC, name="minilm-mrpc-dropout", dropout=0.05)
CLASSES, EXAMPLES, WORDS, LENGTH = 4, 64, 1996, 62
MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
TELLING, SHARE = 50, 0.4
"""Words that tell a class, and the share of a text's words that are drawn from them."""

TESTED = 256


def tiny(folder: Path) -> None:
    """Synthetic texts of four classes, 20 clients of 64 examples, a random BERT of two layers."""
    draw = np.random.default_rng(0)
    rows = []
    for client in range(TINY.clients):
        shares = draw.dirichlet([0.5] * CLASSES)
        labels = draw.choice(CLASSES, EXAMPLES, p=shares)
        rows += [(f"c{client:02}", label, _text(draw, label)) for label in labels]
    _write(folder / "train.tsv", ("client", "label", "text"), rows)
    test = [(f"c{n % TINY.clients:02}", n % CLASSES, _text(draw, n % CLASSES)) for n in range(TESTED)]
    _write(folder / "test.tsv", ("client", "label", "text"), test)
    _tiny_model(folder / "model")
    _describe(folder, TINY, text="text", pair=None, client="client", labels=CLASSES)


def mrpc(folder: Path, source: Path, settings: Settings = MRPC) -> None:
    """MRPC's training pairs and the first of its gold test pairs; all-MiniLM-L6-v2, its dropout set to 0 unless on."""
    for name, most in (("train", None), ("test", TESTED)):
        with gzip.open(source / f"{name}.tsv.gz", "rt", encoding="utf-8", newline="") as file:
            (folder / f"{name}.tsv").write_text("".join(islice(file, most and most + 1)), encoding="utf-8")
    shutil.copytree(minilm(), folder / "model")
    if not settings.dropout:
        config = json.loads((folder / "model" / "config.json").read_text())
        config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        (folder / "model" / "config.json").write_text(json.dumps(config))
    _describe(folder, settings, text="sentence1", pair="sentence2", client=None, labels=2)


def complete(folder: Path) -> None:
    """Adds what follows from the run: tokens, start and plan."""
    about, job = json.loads((folder / "job.json").read_text()), prepare(peer_fedloom.define(folder))
    start = {n.replace(".r8.", ".default."): w.detach().clone() for n, w in _trained(job).items()}
    torch.save(start, folder / "start.pt")
    texts = {"train": job.train_texts, "test": job.test_texts}
    torch.save({name: _columns(encoded) for name, encoded in texts.items()}, folder / "tokens.pt")
    config: Any = job.base.model.peft_config["r8"]
    heads = set(config.modules_to_save or ()) - {"classifier", "score"}  # PEFT adds these itself
    about |= {"heads": sorted(heads), "rounds": _plan(job, about["settings"]["same"])}
    (folder / "job.json").write_text(json.dumps(about))


JOBS: Mapping[str, Callable[[Path, Path], None]] = {
    TINY.name: lambda folder, shared: tiny(folder),
    MRPC.name: lambda folder, shared: mrpc(folder, shared / "data" / "mrpc"),
    OWN.name: lambda folder, shared: mrpc(folder, shared / "data" / "mrpc", OWN),
    DROPOUT.name: lambda folder, shared: mrpc(folder, shared / "data" / "mrpc", DROPOUT),
}


def build(name: str, folder: Path, shared: Path) -> Path:
    """The folder of a job, made if it is not there. Raises FileNotFoundError where the data of the job are missing."""
    if not folder.exists():
        hush()
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = Path(scratch) / name
            made.mkdir()
            JOBS[name](made, shared)
            complete(made)
            made.rename(folder)
    return folder


def _describe(folder: Path, settings: Settings, **more: Any) -> None:
    (folder / "job.json").write_text(json.dumps({"settings": asdict(settings), **more}))


def _text(draw: np.random.Generator, label: int) -> str:
    anywhere = draw.integers(WORDS, size=LENGTH)
    telling = label * TELLING + draw.integers(TELLING, size=LENGTH)
    return " ".join(f"w{word}" for word in np.where(draw.random(LENGTH) < SHARE, telling, anywhere))


def _write(path: Path, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE, lineterminator="\n")
        writer.writerow(head)
        writer.writerows(rows)


def _tiny_model(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    numbers = {word: n for n, word in enumerate((*MARKS, *(f"w{n}" for n in range(WORDS))))}
    tokenizer = Tokenizer(models.WordLevel(numbers, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(mark, numbers[mark]) for mark in MARKS]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    names: dict[str, Any] = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), MARKS, strict=True))
    made: Any = PreTrainedTokenizerFast  # untyped
    made(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(numbers),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=512,
        max_position_embeddings=LENGTH + 2,
        hidden_dropout_prob=0.0,
        initializer_range=0.1,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)


def _trained(job: PreparedRun) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in job.base.model.named_parameters() if weight.requires_grad}


def _columns(encoded: EncodedTexts) -> dict[str, torch.Tensor]:
    """Token ids and segment ids padded to the longest of all, lengths, labels."""
    rows = [torch.tensor(ids) for ids in encoded.ids]
    segments = encoded.extras.get("token_type_ids") or [[0] * len(ids) for ids in encoded.ids]

    def padded(parts: Sequence[torch.Tensor], value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True, padding_value=value)

    return {
        "input_ids": padded(rows, encoded.pad),
        "token_type_ids": padded([torch.tensor(row) for row in segments], 0),
        "lengths": torch.tensor([len(row) for row in rows]),
        "labels": torch.tensor(encoded.labels),
    }


def _plan(job: PreparedRun, same: bool) -> list[list[tuple[str, list[list[int]]]]]:
    """Rounds of (client, batches of example ids), as fedloom starts them; its batches, or shuffled ones."""
    shards, rounds = {shard.client: shard.train for shard in job.shards}, list[list[tuple[str, list[list[int]]]]]()
    training = replace(job.run.training, bucket=same and job.run.training.bucket)
    trainer = PeftTrainer(job.base, job.train_texts, shards, training, partial(simulated_secret, job.run.seed))

    def observe(now: float, event: Event, commands: list[Command]) -> None:
        cohort = [command.task for command in commands if isinstance(command, Dispatch)]
        if cohort:
            rounds.append([(task.client, trainer.batches(task)) for task in cohort])

    with tempfile.TemporaryDirectory() as scratch:
        job.execute(Path(scratch) / "run", [observe])
    return rounds


if __name__ == "__main__":
    build(sys.argv[1], *map(Path, sys.argv[2:]))
