"""The Run value: an experiment, whole, as one printable value."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedloom.aggregate.product_delta import ProductDelta
from fedloom.core.codec import Codec, Half
from fedloom.core.errors import Refused
from fedloom.core.policies import Aggregator, Schedule
from fedloom.core.server import Limits
from fedloom.data.examples import Source
from fedloom.data.partition import LabelDirichlet, Partition
from fedloom.hierarchy.hierarchy import Hierarchy
from fedloom.plan.budget import Plan
from fedloom.plan.rank import RankByCapability
from fedloom.schedule.rounds import Rounds
from fedloom.simulate.availability import Windows
from fedloom.simulate.devices import Devices, World
from fedloom.simulate.faults import Faults
from fedloom.train.settings import Engine, Generation, LoRA, Training


@dataclass(frozen=True, slots=True)
class Run:
    """An experiment as one value; printing it is the manifest.

    `model` is a hub name or a local folder, `data` where examples come from, `partition` how they are divided over clients.
    `aggregator` says HOW adapters are added, `schedule` WHEN and by whom, `plan` how much each client does, `world` how fast
    its devices are, `availability` when they can be reached (None: always), `faults` what goes wrong with their tasks (None:
    nothing). `hierarchy` puts clients into groups with an edge each, which are the clients of `schedule` then (None: there are no
    groups). `transfer` is how adapters travel: `Half()`, `DeltaInt8()`, or None, which is `Exact()`. `held_out` is the share
    of each client's examples on which its own accuracy is measured (0: not at all), `test_limit` how many test examples score a
    version (None: all). `threads` is for torch, `engine` how training is computed (None: plain torch, one client after the other):
    both are a part of the last digits and therefore of the run. `generation` is, where the data have answers to write, how many
    are written at the end (None: `Generation()`).
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
    transfer: Codec | None = field(default_factory=Half)
    limits: Limits = field(default_factory=Limits)
    held_out: float = 0.2
    test_limit: int | None = None
    seed: int = 0
    device: str = "cpu"
    threads: int = 1
    engine: Engine | None = field(default_factory=Engine)
    generation: Generation | None = None

    def __post_init__(self) -> None:
        if self.test_limit is not None and self.test_limit < 1:
            raise Refused("test_limit", self.test_limit, "score on at least 1 example, or None for all")
        if self.threads < 1:
            raise Refused("threads", self.threads, "torch needs at least 1 thread")
        if not self.name or "/" in self.name:
            raise Refused("name", self.name, "it names the run folder: at least one letter and no slash")
