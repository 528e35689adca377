"""Groups by topics where there are no labels, measured by labels that the grouping never saw.

    PYTHONPATH=. python experiments/group_topics.py

Texts as mean-pooled embeddings of all-MiniLM-L6-v2, none of it tuned, 48 tokens each; topics are counted by `histogram.topics`,
groups are made of them (waiting not weighed), and what is measured is the KL of a group's true labels from all, against 20 random
groupings of the same sizes; the best that there is to have are groups made of those labels. Two federations: 2,400 texts of AG News
(4 classes) divided over 80 clients by Dirichlet(0.1), groups of ten; and 160 clients of Natural Instructions (FlexLoRA's split) with
one task each, 12 texts a client, by the 46 categories of tasks, groups of ten. Three seeds: median (minimum - maximum). Needs
`../shared/data`; about two minutes on a core. The last line is one JSON object.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median

import torch
from torch import Tensor

from fedloom.data.examples import Examples
from fedloom.data.partition import LabelDirichlet
from fedloom.data.private_histogram import topics
from fedloom.hierarchy.grouping import Groups, Member, NearIID, RandomGroups
from fedloom.hierarchy.near_iid import label_divergence
from fedloom.train.demo_model import minilm
from tests.support.tiny_models import hush

DATA = Path(__file__).parents[2] / "shared" / "data"
TEXTS, TOKENS, SIZE, DEALS, SEEDS = 12, 48, 10, 20, range(3)
NEWS, CLIENTS = 2_400, 80
COUNTS = (4, 8, 32, 64)
Texts = dict[str, list[tuple[str, str]]]  # of each client, with their true labels


def instructions() -> Texts:
    """Some training texts of each client of Natural Instructions, with the category of its task."""
    found = Texts()
    with gzip.open(DATA / "natural_instructions" / "clients.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            own = found.setdefault(str(row["client"]), [])
            if row["split"] == "train" and len(own) < TEXTS:
                category = row["category"].rsplit(" ", 1)[0]  # the task's number is behind it
                own.append((f"{row['input']} {row['instruction']}", category))
    return found


def news() -> Texts:
    """Texts of AG News with skewed labels."""
    with gzip.open(DATA / "agnews" / "train_part.tsv.gz", "rt", encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))[:NEWS]
    labels, texts = tuple(int(row["label"]) for row in rows), tuple(row["text"] for row in rows)
    split = LabelDirichlet(CLIENTS, 0.1).split(Examples(texts, None, labels, tuple("0123"), None), 0)
    return {client: [(texts[index], str(labels[index])) for index in own] for client, own in split.items()}


def embedded(texts: Sequence[str]) -> Tensor:
    """Mean-pooled states of the last layer, (texts, width)."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(minilm()), AutoModel.from_pretrained(minilm())
    rows = []
    with torch.inference_mode():
        for begin in range(0, len(texts), 64):
            batch = tokenizer(
                list(texts[begin : begin + 64]), padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
            )
            states, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
            rows.append((states * mask).sum(1) / mask.sum(1))
    return torch.cat(rows).clone()


def far(groups: Groups, truth: dict[str, Member]) -> float:
    """Mean KL of the groups' categories from all, in nats."""
    sums = torch.stack([torch.tensor([truth[client].labels for client in group]).double().sum(0) for group in groups])
    whole = sums.sum(0)
    return float(label_divergence(sums, (whole / whole.sum()).log()).mean())


def case(name: str, texts: Texts) -> list[dict[str, float | str]]:
    """Print and return what topics give, by how many there are."""
    kinds = sorted({label for own in texts.values() for _, label in own})
    truth = {client: Member(client, len(own), 1.0, counted(own, kinds)) for client, own in texts.items()}
    rows = embedded([text for own in texts.values() for text, _ in own])
    points = dict(zip(texts, torch.split(rows, [len(own) for own in texts.values()]), strict=True))  # type: ignore[no-untyped-call]
    members, how = list(truth.values()), NearIID(len(truth) // SIZE, waiting=0.0)
    chance = fmean(far(RandomGroups(how.groups)(members, deal), truth) for deal in range(DEALS))
    best = chance / far(how(members, 0), truth)
    print(
        f"{name}: {len(truth)} clients, {len(kinds)} labels; random groups {chance:.3f} nats; by labels {best:.2f} times lower"
    )
    found: list[dict[str, float | str]] = [{"data": name, "by_labels": round(best, 3)}]
    for count in COUNTS:
        ratios = []
        for seed in SEEDS:
            counts = topics(points, count, seed)
            told = [replace(one, labels=counts[one.client]) for one in members]
            ratios.append(chance / far(how(told, seed), truth))
        print(
            f"  {count:3d} topics: {median(ratios):.2f} times lower ({min(ratios):.2f} - {max(ratios):.2f})", flush=True
        )
        found.append({"data": name, "topics": count, "kl_ratio_random_over_ours": round(median(ratios), 3)})
    return found


def counted(own: Sequence[tuple[str, str]], kinds: Sequence[str]) -> tuple[float, ...]:
    """A histogram of the true labels."""
    return tuple(float(sum(label == kind for _, label in own)) for kind in kinds)


def table() -> list[dict[str, float | str]]:
    """Both federations."""
    hush()
    return [*case("AG News", news()), *case("Natural Instructions", instructions())]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({"topics": table()}))
