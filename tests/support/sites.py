"""Sites for the tests: a folder with a shard of toy rows and a `site.toml`, and the terms of a run that it can take part in."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fedloom.core.codec import Codec
from fedloom.core.policies import Aggregator
from fedloom.core.seeds import derive, simulated_secret
from fedloom.core.transfer import encode_start
from fedloom.core.types import Budget, Task
from fedloom.data.examples import Examples
from fedloom.deploy.messages.messages import RunTerms
from fedloom.deploy.site.consent import Consents, terms_hash
from fedloom.deploy.site.limits import LOOSEST, toml_value
from fedloom.deploy.site.settings import Site, read_site
from fedloom.deploy.site.worker import SiteWorker
from fedloom.train.base_model import Base, initial_adapter, load_base
from fedloom.train.settings import PLAIN, LoRA, Training
from fedloom.train.tokenised import EncodedTexts
from fedloom.train.tokenised import encode_texts as tokenise
from fedloom.train.trainer import PeftTrainer
from tests.support.tiny_models import toy_answers, toy_rows
from tests.support.tiny_runs import lively

LABELS = ("colour", "pet")
HASH = "0123456789ab"
SEED = 3
SECRET = simulated_secret(SEED, "ward")
"""The secret of `ward` in a simulation of `terms_of()`: a worker that has it answers as that does."""


def terms_of(**more: Any) -> RunTerms:
    """A run of a tiny encoder, called `tiny` at the server."""
    given: dict[str, Any] = {
        "run": "toy", "run_hash": HASH, "model": "/at/the/server/tiny", "rank": 4, "lora": LoRA(dropout=0.1),
        "training": Training(learning_rate=1e-2, batch_size=8, max_length=32), "engine": PLAIN, "threads": 1, "seed": SEED,
        "labels": LABELS,
    }  # fmt: skip
    return RunTerms(**(given | more))


def site_at(
    folder: Path, model: Path, rows: Sequence[Any] | None = None, section: str = "table", more: str = ""
) -> Site:
    """A site `ward` with these rows (by default 40 labelled ones) that allows all but what `more` limits, which is appended."""
    folder.mkdir(parents=True, exist_ok=True)
    given = rows or (toy_rows(40) if section == "table" else toy_answers(40))
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, given)), encoding="utf-8")
    (folder / "site.toml").write_text(
        f'name = "ward"\nserver = "127.0.0.1:8000"\n\n[model]\npath = "{model}"\nname = "/at/the/server/tiny"\n\n'
        f'[{section}]\npath = "rows.jsonl"\n'
    )
    allow_all(folder / "site.toml", more)
    return read_site(folder / "site.toml")


def allow_all(file: Path, more: str = "") -> None:
    """Append `more` to the file of a site, and let it allow all that the limits there do not name; any weights too."""
    text = file.read_text(encoding="utf-8") + more
    sections = tomllib.loads(text)
    given = sections.get("limits", {})
    loosest = LOOSEST.model_dump(include=LOOSEST.model_fields_set - given.keys())
    lines = "".join(f"{name} = {toml_value(value)}\n" for name, value in sorted(loosest.items()))
    text = text.replace("[model]\n", "[model]\nany_weights = true\n")
    text = text.replace("[limits]\n", f"[limits]\n{lines}") if "limits" in sections else f"{text}\n[limits]\n{lines}"
    file.write_text(text, encoding="utf-8")


class Accepting(Consents):
    """The documents of a site whose owner accepts each at once."""

    def why_not(self, terms: RunTerms) -> str:
        if super().why_not(terms):
            self.accept(terms_hash(terms), "a test")
        return ""


def accept(site: Site, terms: RunTerms) -> None:
    """Accept these terms for the site, as its owner does before its worker is started."""
    Accepting(site.folder).why_not(terms)


def accepting(worker: SiteWorker) -> SiteWorker:
    """The same worker, whose owner accepts all terms at once."""
    worker.consents = Accepting(worker.site.folder)
    return worker


def labelled(rows: Sequence[Any]) -> Examples:
    """The same rows as a simulation has them."""
    return Examples(tuple(r["text"] for r in rows), None, tuple(LABELS.index(r["label"]) for r in rows), LABELS, None)


def trainer_of(model: Path, terms: RunTerms) -> PeftTrainer:
    """The simulation's, for a client whose shard is the second half of the run's examples."""
    base = load_base(str(model), 2, terms.lora, terms.rank, derive(terms.seed, "model"), engine=terms.engine)
    texts = tokenise(labelled([*toy_rows(40, 1), *toy_rows(40)]), base.tokenizer, terms.training.token_limit)
    return simulated_trainer(base, texts, tuple(range(40, 80)), terms)


def simulated_trainer(base: Base, texts: EncodedTexts, shard: tuple[int, ...], terms: RunTerms) -> PeftTrainer:
    """The simulation's, with the draws of `ward` under these terms where it has the secret `SECRET`."""
    secret_of = partial(simulated_secret, terms.seed)
    return PeftTrainer(base, texts, {"ward": shard}, terms.training, secret_of, terms.engine, run=terms.run_hash)


def simulated_worker(site: Site, **more: Any) -> SiteWorker:
    """The worker of `ward`, which draws as a simulation of `terms_of()` does."""
    return accepting(SiteWorker(site, secret=SECRET, **more))


def task_of(method: Aggregator, trainer: PeftTrainer, codec: Codec | None, number: int, rank: int = 4) -> Task:
    model = method.init(lively(initial_adapter(trainer.base, 4)))
    start = encode_start(method.start(model, Budget(rank, 3), 7), codec)
    return Task(number, "ward", number, start, Budget(rank, 3), 1.5)
