"""What every system is given: the same base model and start, the same tokens, and who trains on which batches when.

Imported inside the peers' environments, so it needs torch, transformers and peft alone. `build.py` writes the files.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

Batch = dict[str, Tensor]
State = dict[str, Tensor]
Report = dict[str, Any]

TEST_BATCH = 64


@dataclass(frozen=True)
class Settings:
    """The numbers of a job; `steps` of `batch` examples make one task, LoRA has rank `rank` and alpha/r `scaling`.

    `same`: the other systems get fedloom's batches, which are of similar length; else shuffled ones, as a data loader makes them.
    `dropout` of the adapters' inputs; above 0 the model has its own too, and each system drops other numbers.
    """

    name: str
    clients: int
    cohort: int
    rounds: int
    steps: int
    batch: int
    rate: float
    rank: int = 8
    scaling: float = 2.0
    clip: float = 1.0
    same: bool = True
    dropout: float = 0.0


@dataclass(frozen=True)
class Task:
    """One client's part in a round: the ids of its examples, batch by batch."""

    client: str
    batches: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Work:
    """A job as its folder describes it. `train` and `test` hold padded columns, the lengths and the labels."""

    settings: Settings
    folder: Path
    labels: int
    heads: tuple[str, ...]
    rounds: tuple[tuple[Task, ...], ...]
    train: Mapping[str, Tensor]
    test: Mapping[str, Tensor]

    @property
    def tasks(self) -> tuple[Task, ...]:
        """All tasks in the order in which they are trained."""
        return tuple(task for cohort in self.rounds for task in cohort)


def read(folder: Path) -> Work:
    """The job that `build.py` left in a folder."""
    torch.set_num_threads(1)
    about = json.loads((folder / "job.json").read_text())
    columns = torch.load(folder / "tokens.pt", weights_only=True)
    rounds = tuple(
        tuple(Task(client, tuple(map(tuple, batches))) for client, batches in cohort) for cohort in about["rounds"]
    )
    return Work(
        settings=Settings(**about["settings"]),
        folder=folder,
        labels=about["labels"],
        heads=tuple(about["heads"]),
        rounds=rounds,
        train=columns["train"],
        test=columns["test"],
    )


def load_model(work: Work) -> nn.Module:
    """The base with its adapter and head, at the start that all systems share."""
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    settings = work.settings
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=settings.rank,
        lora_alpha=int(settings.scaling * settings.rank),
        lora_dropout=settings.dropout,
        modules_to_save=list(work.heads),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForSequenceClassification.from_pretrained(
            work.folder / "model", num_labels=work.labels, dtype=torch.float32
        )
        model: nn.Module = get_peft_model(base, config)
    put(model, torch.load(work.folder / "start.pt", weights_only=True))
    return model.train()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def get(model: nn.Module) -> State:
    """A copy of them."""
    return {name: weight.detach().clone() for name, weight in trained(model).items()}


@torch.no_grad()
def put(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set all of them."""
    weights = trained(model)
    if weights.keys() != state.keys():
        raise KeyError(f"the states differ in {sorted(weights.keys() ^ state.keys())}")
    for name, weight in weights.items():
        weight.copy_(state[name])


def take(columns: Mapping[str, Tensor], ids: Sequence[int]) -> Batch:
    """These examples as inputs of the model, cut to the longest of them."""
    at = torch.tensor(ids)
    lengths = columns["lengths"][at]
    width = int(lengths.max())
    inputs = {name: columns[name][at, :width] for name in ("input_ids", "token_type_ids")}
    inputs["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
    return inputs | {"labels": columns["labels"][at]}


def optimiser(weights: Sequence[nn.Parameter] | Any, lr: float) -> torch.optim.AdamW:
    """AdamW without decay over what is trained; new for every task."""
    return torch.optim.AdamW([w for w in weights if w.requires_grad], lr=lr, weight_decay=0.0)


def train(model: nn.Module, work: Work, task: Task) -> list[float]:
    """One task as anyone would write it by hand; returns the loss of each step."""
    weights, losses = list(trained(model).values()), []
    steps = optimiser(weights, work.settings.rate)
    for ids in task.batches:
        loss = model(**take(work.train, ids)).loss
        losses.append(float(loss.detach()))
        steps.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, work.settings.clip)
        steps.step()
    return losses


@torch.no_grad()
def score(model: nn.Module, work: Work) -> dict[str, float]:
    """Accuracy and mean cross-entropy on the test examples, sorted by length so that little is padded."""
    model.eval()
    order = work.test["lengths"].argsort().tolist()
    hits, loss = 0, 0.0
    for first in range(0, len(order), TEST_BATCH):
        batch = take(work.test, order[first : first + TEST_BATCH])
        labels = batch.pop("labels")
        logits = model(**batch).logits
        hits += int((logits.argmax(1) == labels).sum())
        loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
    model.train()
    return {"accuracy": hits / len(order), "test_loss": loss / len(order)}


def by_round(work: Work, losses: Sequence[float]) -> list[float]:
    """The mean training loss of each round, from the losses of all steps in order."""
    each = work.settings.cohort * work.settings.steps
    if len(losses) != each * work.settings.rounds:
        raise ValueError(f"{len(losses)} steps were made, not {each * work.settings.rounds}")
    return [sum(losses[i : i + each]) / each for i in range(0, len(losses), each)]
