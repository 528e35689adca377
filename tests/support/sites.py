"""Sites for the tests: a folder with a shard of toy rows and a `site.toml`, and the terms of a run that it can take part in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedloom.core.codec import Codec
from fedloom.core.policies import Aggregator
from fedloom.core.seeds import derive
from fedloom.core.transfer import encode_start
from fedloom.core.types import Budget, Task
from fedloom.data.examples import Examples
from fedloom.deploy.messages.messages import RunTerms
from fedloom.deploy.site.settings import Site, read_site
from fedloom.train.base_model import initial_adapter, load_base
from fedloom.train.settings import PLAIN, LoRA, Training
from fedloom.train.tokenised import encode_texts as tokenise
from fedloom.train.trainer import PeftTrainer
from tests.support.tiny_models import toy_answers, toy_rows
from tests.support.tiny_runs import lively

LABELS = ("colour", "pet")
HASH = "0123456789ab"


def terms_of(**more: Any) -> RunTerms:
    """A run of a tiny encoder, called `tiny` at the server."""
    given: dict[str, Any] = {
        "run": "toy", "run_hash": HASH, "model": "/at/the/server/tiny", "rank": 4, "lora": LoRA(dropout=0.1),
        "training": Training(learning_rate=1e-2, batch_size=8, max_length=32), "engine": PLAIN, "threads": 1, "seed": 3,
        "labels": LABELS,
    }  # fmt: skip
    return RunTerms(**(given | more))


def site_at(
    folder: Path, model: Path, rows: Sequence[Any] | None = None, section: str = "table", more: str = ""
) -> Site:
    """A site `ward` with these rows (by default 40 labelled ones); `more` is appended to its file."""
    folder.mkdir(parents=True, exist_ok=True)
    given = rows or (toy_rows(40) if section == "table" else toy_answers(40))
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, given)), encoding="utf-8")
    (folder / "site.toml").write_text(
        f'name = "ward"\nserver = "127.0.0.1:8000"\n\n[model]\npath = "{model}"\nname = "/at/the/server/tiny"\n\n'
        f'[{section}]\npath = "rows.jsonl"\n{more}'
    )
    return read_site(folder / "site.toml")


def labelled(rows: Sequence[Any]) -> Examples:
    """The same rows as a simulation has them."""
    return Examples(tuple(r["text"] for r in rows), None, tuple(LABELS.index(r["label"]) for r in rows), LABELS, None)


def trainer_of(model: Path, terms: RunTerms) -> PeftTrainer:
    """The simulation's, for a client whose shard is the second half of the run's examples."""
    base = load_base(str(model), 2, terms.lora, terms.rank, derive(terms.seed, "model"), engine=terms.engine)
    texts = tokenise(labelled([*toy_rows(40, 1), *toy_rows(40)]), base.tokenizer, terms.training.token_limit)
    return PeftTrainer(base, texts, {"ward": tuple(range(40, 80))}, terms.training, terms.engine)


def task_of(method: Aggregator, trainer: PeftTrainer, codec: Codec | None, number: int, rank: int = 4) -> Task:
    model = method.init(lively(initial_adapter(trainer.base, 4)))
    start = encode_start(method.start(model, Budget(rank, 3), 7), codec)
    return Task(number, "ward", number, start, Budget(rank, 3), 100 + number, 1.5)
