"""Plausible run folders, made up: slow and fast clients, curves that saturate, energy that decays."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from fedloom.train.confusion import Confusion

HEAD = 4 * 4000
TIERS = {"phone": (2, 1e9, 1e6), "laptop": (4, 1e10, 1e7), "server": (8, 1e11, 1e8)}
LABELS = ["abbreviation", "entity", "description", "human", "location", "number"]
STOPPED: dict[str, dict[str, Any]] = {
    "cancelled": {"seconds": None, "bytes_up": 0, "bytes_up_dense": 0},
    "lost": {"seconds": None, "arrived": None, "bytes_up": 0, "bytes_up_dense": 0},
}


def write_run(
    folder: Path,
    name: str = "demo",
    clients: int | list[str] = 8,
    rounds: int = 12,
    *,
    seed: int = 0,
    status: str = "finished",
    labels: list[str] = LABELS,
    collapse: float = 1.0,
) -> Path:
    """A run folder; `rounds` 0 and status "interrupted" give one that was stopped before its first merge."""
    dice = random.Random(seed)
    who = [f"c{i:02d}" for i in range(clients)] if isinstance(clients, int) else clients
    tier = {client: list(TIERS)[min(2, int(3 * dice.random() ** 1.3))] for client in who}
    part = {client: _part(dice, len(labels)) for client in who}
    lines = list(_history(dice, tier, rounds, collapse, scored=status != "interrupted"))
    if status == "finished":
        counted = {0: guesses(len(labels), 1), rounds: guesses(len(labels), 5)}
        lines += [{"kind": "labels", "version": version, **one.metrics()} for version, one in counted.items()]
        lines += [_end(dice, client, tier[client], part[client]["held_out"]) for client in who]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(_manifest(name, seed, status, tier, part, labels)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def guesses(labels: int, right: int) -> Confusion:
    """Predictions of 10, 20, 30, ... examples of the labels: `right` tenths are right, the others taken for the next label."""
    rows = [[0] * labels for _ in range(labels)]
    for k, row in enumerate(rows):
        row[k] += right * (k + 1)
        row[(k + 1) % labels] += (10 - right) * (k + 1)
    return Confusion(tuple(map(tuple, rows)), right / 10 if labels == 2 else None)


def _part(dice: random.Random, labels: int) -> dict[str, Any]:
    weights = [dice.gammavariate(0.4, 1) + 1e-6 for _ in range(labels)]
    total = int(40 + 300 * dice.random() ** 2)
    counts = [int(total * weight / sum(weights)) for weight in weights]
    return {"examples": sum(counts), "held_out": max(4, sum(counts) // 5), "labels": counts, "mean_words": 9.5}


def _task(dice: random.Random, number: int, client: str, tier: str, version: int, sent: float) -> dict[str, Any]:
    rank, flops, bps = TIERS[tier]
    payload = HEAD + 4 * 1200 * rank
    seconds = {"down": 8 * payload / bps, "train": 3e10 / flops * (0.6 + dice.random()), "up": 16 * payload / bps}
    status = "merged" if dice.random() < 0.9 else dice.choice(["cancelled", "rejected", *STOPPED])
    return {
        "kind": "task", "id": number, "client": client, "version": version, "rank": rank, "sent": sent,
        "arrived": sent + sum(seconds.values()), "seconds": seconds, "loss": 1.8 * math.exp(-version / 5) + 0.2,
        "tokens": 900, "steps": 8, "bytes_up": payload, "bytes_down": payload, "bytes_up_dense": HEAD,
        "bytes_down_dense": HEAD, "bytes_down_fold": 0, "kept": 1 - 0.3 / rank if version and rank < 8 else 1.0 if version else None,
        "status": status, "reason": "" if status == "merged" else "late",
    } | STOPPED.get(status, {})  # fmt: skip


def _history(dice: random.Random, tier: dict[str, str], rounds: int, collapse: float, *, scored: bool) -> Any:
    time, up, number = 0.0, 0.0, 0
    if scored:
        yield _score(dice, 0, 0.0, collapse)
    for version in range(1, max(1, rounds) + 1):
        chosen = dice.sample(sorted(tier), max(2, len(tier) // 2)) if len(tier) > 3 else sorted(tier)
        tasks = [_task(dice, number + i, client, tier[client], version - 1, time) for i, client in enumerate(chosen)]
        number += len(tasks)
        yield from tasks
        if not rounds:
            return
        time = max(task["arrived"] or time for task in tasks) + 1
        up += sum(task["bytes_up"] for task in tasks)
        weight = [math.exp(-i * (0.25 + collapse * version / 25)) for i in range(8)]
        yield {
            "kind": "version", "version": version, "time": time, "loss": 1.8 * math.exp(-version / 5) + 0.1,
            "updates": len(tasks), "cancelled": 0, "rejected": 0, "bytes_up": up, "bytes_down": up * 1.1,
            "bytes_up_dense": up * 0.7, "bytes_down_dense": up * 0.7, "energy": [w / sum(weight) for w in weight],
            "discarded": 0.05 / version, "ranks": {"2": 3, "8": 2},
        }  # fmt: skip
        if scored:
            yield _score(dice, version, time, collapse)


def _score(dice: random.Random, version: int, time: float, speed: float) -> dict[str, Any]:
    accuracy = 0.167 + 0.7 * (1 - math.exp(-version / (3 + speed))) + 0.02 * (dice.random() - 0.5) * (version > 0)
    loss = 1.9 - 1.5 * accuracy
    return {
        "kind": "score",
        "version": version,
        "time": time,
        "accuracy": accuracy,
        "f1": accuracy,
        "loss": loss,
        "examples": 600,
    }


def _end(dice: random.Random, client: str, tier: str, held_out: int) -> dict[str, Any]:
    rank = TIERS[tier][0]
    accuracy = min(1.0, 0.7 + 0.02 * rank + dice.gauss(0, 0.08))
    base = 0.2 + 0.5 * dice.random()
    return {
        "kind": "client", "client": client, "tier": tier, "rank": rank, "held_out": held_out,
        "accuracy": accuracy, "base_accuracy": base, "loss": 0.5,
    }  # fmt: skip


def _manifest(
    name: str, seed: int, status: str, tier: dict[str, str], part: dict[str, Any], labels: list[str]
) -> dict[str, Any]:
    links = {
        c: {"tier": t, "flops": TIERS[t][1], "up_bps": TIERS[t][2] / 2, "down_bps": TIERS[t][2]}
        for c, t in tier.items()
    }
    return {
        "fedloom": "0.1.0", "name": name, "status": status, "seed": seed, "run_hash": "ab12cd34",
        "status_reason": "stopped by the user (Ctrl-C)" if status == "interrupted" else "",
        "run": {
            "type": "Run", "rounds": 12, "schedule": {"type": "Synchronous", "per_round": 4, "deadline": None},
            "merge": {"type": "FullSpace", "rank": 8, "by_examples": True},
            "train": {"type": "AdamW", "lr": 0.003 + seed / 1000, "targets": ["query", "value"]},
            "fleet": [{"type": "Tier", "name": n, "rank": r, "flops": f} for n, (r, f, _) in TIERS.items()],
        },
        "versions": {"torch": "2.6.0", "transformers": "4.50.0", "peft": "0.15.0"},
        "machine": {"cpu": "AMD EPYC", "cores": 2, "python": "3.11.7"},
        "model": {
            "name": "google/bert_uncased_L-2_H-128_A-2", "parameters": 4386178, "adapted_modules": ["query", "value"],
            "lora_parameters_by_rank": {"2": 2048, "4": 4096, "8": 8192}, "dense_parameters": 17286,
        },
        "partition": {"clients": part, "label_names": labels, "label_js": 0.31, "size_cv": 0.55},
        "clients": {c: {**link, "memory": 8e9, "examples": part[c]["examples"]} for c, link in links.items()},
        "baselines": {"majority": 0.23}, "metrics": {"majority_label": labels[0], "majority_of": "training examples"},
        "notes": ["The adapter of the smallest tier has 2 of 8 directions."],
    }  # fmt: skip
