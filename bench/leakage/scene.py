"""The server's view: the base model, what it sent and what came back, for clients with known rows.

Clients train with `PeftTrainer`, and both ways are encoded by the default codec. What an attack may use is an `Observation`
(start, answer), the base and the public rows. The rows of a client and its secret are the truth that the attack is judged by; the
secret is given only to an attack whose setting says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from fedloom import Table
from fedloom.audit.token_span import down_changes, input_layers
from fedloom.core.codec import HALF
from fedloom.core.lora import Adapter, balance, cut_adapter, map_tensors
from fedloom.core.partial_depth import fold_layers
from fedloom.core.seeds import derive, keyed_seed, rng, simulated_secret
from fedloom.core.transfer import encode_answer, encode_start
from fedloom.core.types import Budget, ClientState, Rules, Side, Task, TaskStart
from fedloom.data.examples import Examples
from fedloom.deploy.site.site_noise import NoiseSource, protect_answer
from fedloom.deploy.site.site_privacy import SitePrivacy
from fedloom.train.base_model import Base, initial_adapter, load_base
from fedloom.train.settings import LoRA, Training
from fedloom.train.tokenised import EncodedTexts, encode_texts, plan_batches
from fedloom.train.trainer import PeftTrainer

AGNEWS = Path(__file__).parents[3] / "shared" / "data" / "agnews" / "train_part.tsv.gz"
LENGTH = 64
"""Tokens of a text at most."""

PUBLIC = 1500
"""Rows of the same kind that the server has; no client has one of them."""

LARGEST_RANK = 16
SITE_CLIP = 0.5
"""Norm to which a site that adds noise clips its change; those measured here are smaller."""

TASK = 1
"""Number of every task here."""

CANARIES = (
    ("internal note : the reference code is heliotrope marmot 4417 quartz", 0),
    ("patient Ludmila Okonjo , room 7731 , allergic to sulfites and walnut oil", 1),
    ("wire 88,214 kroner to the account of Perdita Vance before the audit", 2),
    ("the recovery phrase begins with tundra velvet oboe lantern gusset", 3),
)
"""Texts that stand nowhere else, each with a label: what a server that knows them looks for."""


@dataclass(frozen=True, slots=True)
class Setting:
    """How a client trains, as far as a server or a limit may vary it.

    Fields:
        rank: LoRA rank of the task.
        rows: rows that a client trains on.
        batch: rows of one optimiser step.
        steps: optimiser steps of the task.
        learning_rate: of AdamW.
        clip: the largest norm of the gradient.
        later: whether the adapter has been trained before (`up` is not 0), as in all tasks but a run's first.
        depth: blocks that are trained, from the output (None: all).
        frozen: sides that are not trained.
        summed: answers that are averaged before the server sees them.
        seed_known: whether the attack is given the secret of which dropout is drawn.
        length: tokens of a text at most.
        noise: standard deviation of what the site adds to each number of its change, relative to the norm `SITE_CLIP` to which it
            clips the change (0: it does neither).
    """

    rank: int = 8
    rows: int = 100
    batch: int = 8
    steps: int = 12
    learning_rate: float = 5e-4
    clip: float = 1.0
    later: bool = True
    depth: int | None = None
    frozen: tuple[Side, ...] = ()
    summed: int = 1
    seed_known: bool = False
    length: int = LENGTH
    noise: float = 0.0

    @property
    def rows_used(self) -> int:
        """Rows that a task is trained on: all where no further batch would fit into a pass."""
        drawn = self.steps * self.batch
        return self.rows if drawn + self.batch > self.rows else drawn

    @property
    def epochs(self) -> float:
        """Passes over the client's rows that a task makes."""
        return self.steps * self.batch / self.rows


@dataclass(frozen=True, slots=True)
class Observation:
    """One task as the server sees it, with the truth.

    Fields:
        start: what was sent.
        answer: what came back, or the mean of several answers.
        batches: rows of each step.
        secret: the client's secret, of which batches and dropout were drawn (of the first where answers were averaged).
    """

    start: TaskStart
    answer: Adapter
    batches: tuple[tuple[int, ...], ...]
    secret: bytes

    def drawn(self, purpose: str) -> int:
        """Return the seed that the client drew for "batches" or "dropout"; needs the secret."""
        return keyed_seed(self.secret, "task", "", TASK, purpose)

    @property
    def rows(self) -> frozenset[int]:
        """Rows that came into a batch."""
        return frozenset(row for batch in self.batches for row in batch)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Scene:
    """A base model with public and private rows.

    Fields:
        base: the model.
        texts: all rows, tokenised; the canaries are the last.
        public: rows of the server.
        private: rows of clients.
        canaries: rows of the planted texts.
        first: adapter at the beginning of a run (`up` = 0).
        later: adapter that was trained on public rows.
        seed: what everything was drawn from.
    """

    base: Base
    texts: EncodedTexts
    public: tuple[int, ...]
    private: tuple[int, ...]
    canaries: tuple[int, ...]
    first: Adapter
    later: Adapter
    seed: int

    def start(self, setting: Setting) -> TaskStart:
        """Return what a client of this setting receives."""
        adapter = cut_adapter(self.later if setting.later else self.first, setting.rank)
        start = TaskStart(adapter, "1", rules=Rules(frozen=setting.frozen))
        below = self.base.shape().untrained_modules(adapter.factors, setting.depth)
        return encode_start(fold_layers(start, below), HALF)

    def observe(self, start: TaskStart, shard: Sequence[int], setting: Setting, *name: int | str) -> Observation:
        """Train a client on these rows; `name` tells its secret from those of others."""
        client, secret = "client", simulated_secret(self.seed, "/".join(map(str, name)))
        texts = texts_of(self, setting.length)
        training = Training(setting.learning_rate, setting.batch, setting.length, clip=setting.clip, keep_moments=False)
        task = Task(TASK, client, 1, start, Budget(setting.rank, setting.steps, setting.depth), 0.0)
        trainer = PeftTrainer(self.base, texts, {client: tuple(shard)}, training, lambda _: secret)
        ((result, state),) = trainer.train([(task, ClientState())])
        if setting.noise:
            privacy = SitePrivacy(clip=SITE_CLIP, multiplier=setting.noise)
            result = protect_answer(privacy, NoiseSource(secret, "", "/".join(map(str, name))), task, result)
        received, _ = encode_answer(task, ClientState(), result, state)
        seen = Observation(start, received.adapter, (), secret)
        lengths, seed = texts.lengths(shard), seen.drawn("batches")
        plan = plan_batches(lengths, setting.batch, setting.steps, training.bucket, seed)
        return replace(seen, batches=tuple(tuple(shard[row] for row in batch) for batch in plan))

    def observe_mean(self, start: TaskStart, rows: Sequence[int], setting: Setting, *name: int | str) -> Observation:
        """Train `setting.summed` clients on equal parts of these rows and average their answers."""
        count = len(rows) // setting.summed
        parts = [rows[k * count : (k + 1) * count] for k in range(setting.summed)]
        seen = [self.observe(start, part, setting, *name, k) for k, part in enumerate(parts)]
        batches = tuple(batch for one in seen for batch in one.batches)
        return Observation(start, mean_adapter([one.answer for one in seen]), batches, seen[0].secret)


@lru_cache(maxsize=2)
def texts_of(scene: Scene, length: int) -> EncodedTexts:
    """Return the rows cut at so many tokens."""
    ids = tuple(row[:length] for row in scene.texts.ids)
    extras = {name: tuple(row[:length] for row in column) for name, column in scene.texts.extras.items()}
    return replace(scene.texts, ids=ids, extras=extras)


def make_scene(model: str, examples: Examples, seed: int, dropout: float = LoRA().dropout) -> Scene:
    """Load a model and divide the examples, in an order drawn from `seed`, into public and private rows."""
    order = list(range(len(examples)))
    rng(seed, "rows").shuffle(order)
    shuffled = examples.take(order)
    planted = replace(
        shuffled,
        texts=(*shuffled.texts, *(text for text, _ in CANARIES)),
        labels=(*shuffled.labels, *(label % len(examples.names) for _, label in CANARIES)),
    )
    base = load_base(model, len(examples.names), LoRA(dropout=dropout), LARGEST_RANK, derive(seed, "model"))
    texts = encode_texts(planted, base.tokenizer, LENGTH)
    public = min(PUBLIC, len(examples) // 2)
    everyone = range(len(examples))
    first = initial_adapter(base, LARGEST_RANK)
    canaries = tuple(range(len(examples), len(planted)))
    scene = Scene(base, texts, tuple(everyone[:public]), tuple(everyone[public:]), canaries, first, first, seed)
    return replace(scene, later=_trained(scene))


def agnews_scene(seed: int, dropout: float = LoRA().dropout) -> Scene:
    """all-MiniLM-L6-v2 and the sample of AG News. Raises Refused where the model's package is missing."""
    from fedloom.train.demo_model import minilm

    return make_scene(str(minilm()), Table(AGNEWS, text="text").load(0).train, seed, dropout)


def _trained(scene: Scene) -> Adapter:
    """Return the first adapter after 16 steps on public rows, both sides of each direction equally long, as after a merge."""
    setting = Setting(LARGEST_RANK, 256, 16, 16, 2e-3, later=False)
    seen = scene.observe(scene.start(setting), scene.public[: setting.rows], setting, "trained")
    return Adapter({name: balance(factor) for name, factor in seen.answer.factors.items()}, seen.answer.dense)


def mean_adapter(adapters: Sequence[Adapter]) -> Adapter:
    """Return the mean of answers to one start, side by side."""
    return map_tensors(lambda *sides: sum(sides) / len(sides), *adapters)


def input_changes(base: Base, seen: Observation) -> dict[str, Tensor]:
    """Return the changes of `down` of the layers that read the embeddings; empty where none of them moved."""
    moved = {
        name: change
        for name, change in down_changes(seen.start.train, seen.answer).items()
        if name in input_layers(base)
    }
    return moved if any(bool(change.any()) for change in moved.values()) else {}
