"""The `Run`: the settings of an experiment as one printable value. Everything else follows from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import date as day
from pathlib import Path

from fedloom.aggregate.product_delta import ProductDelta
from fedloom.core.canary import Canary
from fedloom.core.codec import Codec, HalfChange, Summed
from fedloom.core.errors import Refused
from fedloom.core.limits import Limits
from fedloom.core.policies import Aggregator, Schedule
from fedloom.core.settings_view import as_written, settings_html, settings_text
from fedloom.data.examples import Source
from fedloom.data.partition import LabelDirichlet, Partition
from fedloom.hierarchy.hierarchy import Hierarchy
from fedloom.plan.budget import Plan
from fedloom.plan.rank import RankByCapability
from fedloom.privacy.private import Private
from fedloom.schedule.rounds import Rounds
from fedloom.simulate.availability import Windows
from fedloom.simulate.devices import Devices, World
from fedloom.simulate.faults import Faults
from fedloom.train.settings import Engine, Generation, LoRA, Training

MOST_THREADS = 1024
"""Threads of torch."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run: all settings of an experiment as one value. Printing it is the manifest.

    Fields:
        model: base model, by its name on the Hugging Face hub or a local folder.
        data: where examples come from (`Table`, `Hub`, `Rows`, `Instructions`, `Tickets`).
        name: name of the run folder (default "run").
        partition: how the examples are divided over clients (default `LabelDirichlet()`).
        aggregator: how updates are merged into the next version (default `ProductDelta()`: changes are added exactly).
        schedule: when updates are merged, and which clients start (default `Rounds()`: synchronous rounds).
        plan: how much each client does: rank, steps, depth (default `Plan(RankByCapability())`: the rank by its
            device).
        lora: which layers get an adapter, and its scaling (default `LoRA()`).
        training: local training: learning rate, batch size, lengths (default `Training()`).
        world: the simulated devices, and how long a task takes them (default `World()`: phones, laptops, workstations).
        availability: when clients can be reached (default None: always).
        faults: what goes wrong with tasks (default None: nothing).
        hierarchy: groups of clients with an edge server each; the edges are then the clients of `schedule` (default None:
            no groups).
        transfer: how numbers travel: `HalfChange()`, `Half()`, `DeltaInt8()`, `Exact()` (default `HalfChange()`: 16 bits;
            None: `Exact()`).
        limits: when the run ends, and how often a version is scored (default `Limits()`: 10 versions, each scored).
        canary: score that a version must keep on examples of the server before it is published (default None: each version is
            published). Answers that make it worse are set aside.
        privacy: noise, and how often a client may take part (default None: neither). They bound and count what a version reveals
            about a client or a record.
        held_out: share of each client's examples kept for its own evaluation, not trained on (at least 0, below 1; default 0.2; 0:
            none).
        test_limit: test examples used to score a version (default None: all).
        seed: seed of every random draw; the same seed gives the same bytes (default 0).
        device: where torch computes: "cpu", "cuda", "cuda:1", "mps" (default "auto": an NVIDIA or AMD GPU if there is one, else the
            CPU). `prepare` fills it in, and a run that is resumed keeps it.
        threads: threads of torch; they change the last digits, and therefore belong to the run (default None: OMP_NUM_THREADS, or by
            cores, which local workers share, at most 8; `prepare` fills it in. In a deployment, where cores differ: 1).
        engine: how training is computed; it changes the last digits too (default `Engine()`: the fastest way; None: plain torch,
            one client after the other).
        generation: settings of the sample answers written at the end, for data with answers (default None: `Generation()`).
        start: adapter that the run begins from: a run folder, or a LoRA folder of PEFT, of any rank (default None: the run begins
            untrained).
        date: the date that a chat template writes which reads the clock, as "2026-01-31" (default None: "2026-01-01", on any day).
        compress_trace: whether `trace.jsonl` is written as gzip, some seven times smaller (in a deployment two); what it holds is the
            same (default False).
    """

    model: str
    data: Source
    name: str = "run"
    partition: Partition = field(default_factory=LabelDirichlet)
    aggregator: Aggregator = field(default_factory=ProductDelta)
    schedule: Schedule = field(default_factory=Rounds)
    plan: Plan = field(default_factory=lambda: Plan(RankByCapability()))
    lora: LoRA = field(default_factory=LoRA)
    training: Training = field(default_factory=Training)
    world: Devices = field(default_factory=World)
    availability: Windows | None = None
    faults: Faults | None = None
    hierarchy: Hierarchy | None = None
    transfer: Codec | None = field(default_factory=HalfChange)
    limits: Limits = field(default_factory=Limits)
    canary: Canary | None = None
    privacy: Private | None = None
    held_out: float = 0.2
    test_limit: int | None = None
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    engine: Engine | None = field(default_factory=Engine)
    generation: Generation | None = None
    start: str | None = None
    date: str | None = None
    compress_trace: bool = False

    def __post_init__(self) -> None:
        for name in ("model", "start"):
            if isinstance(path := getattr(self, name), Path):
                object.__setattr__(self, name, str(path))
        check_source(self.data)
        if self.test_limit is not None and self.test_limit < 1:
            raise Refused("test_limit", self.test_limit, "score on at least 1 example, or None for all")
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise Refused(
                "threads", self.threads, f"torch needs at least 1 thread, and here takes at most {MOST_THREADS}"
            )
        if not self.name or "/" in self.name:
            raise Refused("name", self.name, "it names the run folder: at least one letter and no slash")
        if self.date is not None:
            check_date(self.date)
        if isinstance(self.transfer, Summed):
            raise Refused("transfer", "Summed", "answers are summed in groups: hierarchy=Hierarchy(secure=Secure())")

    def __repr__(self) -> str:
        """Return it as Python, without what is as by default."""
        return as_written(self)

    def __str__(self) -> str:
        """Return it as a table."""
        return settings_text(self)

    def _repr_html_(self) -> str:
        return settings_html(self)


def check_source(data: object) -> None:
    """Raise Refused for a path or for data without a source around them; what the data hold is not in the message."""
    if isinstance(data, str | Path):
        raise Refused("data", str(data), "say what its columns are: data=Table(PATH, text=..., label=...)")
    if data is not None and not hasattr(data, "load"):
        raise Refused("data", f"a {type(data).__name__}", "put it into a source: data=Rows(DATA, text=..., label=...)")


def check_date(date: str) -> None:
    """Raise Refused for what is no date as 2026-01-31."""
    try:
        right = day.fromisoformat(date).isoformat() == date
    except (TypeError, ValueError):
        right = False
    if not right:
        raise Refused("date", date, "write a date as 2026-01-31: year, month, day")
