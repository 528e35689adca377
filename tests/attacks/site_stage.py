"""A site with rows of its own and the default limits, and a server that has the same base model: where its attacks are tried."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fedloom.core.lora import Adapter
from fedloom.core.seeds import derive
from fedloom.core.types import Budget, Task, TaskStart
from fedloom.deploy.messages.messages import (
    EvaluateRequest,
    EvaluateResult,
    JoinRequest,
    Refusal,
    RunTerms,
    TaskRequest,
    decode_evaluation,
    decode_reply,
    encode_request,
)
from fedloom.deploy.site.settings import read_site
from fedloom.deploy.site.worker import SiteWorker
from fedloom.train.base_model import Base, initial_adapter, load_base
from fedloom.train.settings import PLAIN, LoRA, Training
from tests.support.sites import LABELS, accepting, allow_all
from tests.support.tiny_models import tiny_encoder, toy_rows

ROWS = 240
SECRET = b"of a site: thirty-two bytes long."
STEPS = 15
"""Of an honest task: 120 rows."""
QKV = ("query", "key", "value")
LARGE = 10**9


@dataclass(slots=True)
class Stage:
    """A site with rows of its own, and a server that has the same base model.

    Fields:
        worker: the site's.
        rows: its rows.
        model: the base model's folder.
        weights: the base model's fingerprint.
        number: of the last task.
    """

    worker: SiteWorker
    rows: Sequence[dict[str, str]]
    model: Path
    weights: str
    number: int = 0

    def terms(self, **more: Any) -> RunTerms:
        """An ordinary run, within the default limits."""
        given: dict[str, Any] = {
            "run": "toy", "run_hash": "0123456789ab", "model": "m", "rank": 8, "lora": LoRA(dropout=0.0, target_modules=QKV),
            "training": Training(learning_rate=1e-3, batch_size=8, max_length=32), "engine": PLAIN, "threads": 1, "seed": 1,
            "labels": LABELS, "weights": self.weights, "held_out": 0.5, "steps": STEPS, "evaluations": 1,
        }  # fmt: skip
        return RunTerms(**(given | more))

    def first(self, terms: RunTerms) -> Adapter:
        """The adapter with which the server lets a run begin."""
        return initial_adapter(base_of(self.model, terms.lora, min(terms.rank, 64), terms.seed), min(terms.rank, 64))

    def join(self, terms: RunTerms) -> Any:
        """Offer a run; returns the site's reply."""
        return decode_reply(self.worker.answer(encode_request(JoinRequest(terms, 1))), LARGE, {})

    def task(
        self, terms: RunTerms, start: TaskStart, steps: int, rank: int | None = None, depth: int | None = None
    ) -> Any:
        """Send a task; returns the answer or the refusal."""
        self.number += 1
        task = Task(self.number, "ward", 0, start, Budget(rank or terms.rank, steps, depth), 0.0)
        reply = decode_reply(self.worker.answer(encode_request(TaskRequest(terms, 1, task, 0))), LARGE, {task.id: task})
        return reply[2] if isinstance(reply, tuple) else reply

    def evaluate(self, terms: RunTerms, start: Adapter) -> EvaluateResult | Refusal:
        """Ask for an evaluation; returns the result or the refusal."""
        request = EvaluateRequest(terms, 1, "ward", TaskStart(start, "x"), 0)
        told = decode_evaluation(self.worker.answer(encode_request(request)), LARGE, request)
        assert isinstance(told, EvaluateResult | Refusal)
        return told


@cache
def base_of(model: Path, lora: LoRA, rank: int, seed: int) -> Base:
    """The server's own copy of the base model."""
    return load_base(str(model), len(LABELS), lora, rank, derive(seed, "model"), "cpu", PLAIN, LABELS)


def stage_at(folder: Path, lifted: bool, limits: str = "", rows: int = ROWS, privacy: str = "") -> Stage:
    """A site with the default limits, or with the loosest; `limits` are lines that hold in both."""
    model = tiny_encoder(
        folder / "model", hidden_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )  # without dropout, which only makes the attacks harder
    given = toy_rows(rows)
    place = folder / "ward"
    place.mkdir()
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, given)), encoding="utf-8")
    (place / "site.toml").write_text(
        f'name = "ward"\nserver = "127.0.0.1:8000"\n[model]\npath = "{model}"\nname = "m"\n[table]\npath = "rows.jsonl"\n'
        f"[speed]\nflops = 1e9\n{privacy}"
    )
    section = f"\n[limits]\n{limits}" if limits else ""
    if lifted:
        allow_all(place / "site.toml", section)
    else:
        with (place / "site.toml").open("a") as file:
            file.write(section)
    weights = base_of(model, LoRA(dropout=0.0, target_modules=QKV), 8, 1).fingerprint()
    return Stage(accepting(SiteWorker(read_site(place / "site.toml"), secret=SECRET)), given, model, weights)


def obeyed(told: Any, limit: str = "") -> bool:
    """Whether a site did what it was told. Where it did not, then for the sake of this limit ("": of any)."""
    if isinstance(told, Refusal):
        assert f"[limits] {limit}" in told.reason, told.reason
    return not isinstance(told, Refusal)
