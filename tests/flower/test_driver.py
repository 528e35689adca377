"""The driver of a deployment under storms: whatever gets lost, comes twice or dies, an answer counts once and a run comes to its end."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import toys
from fedloom import CA2FL, Averaged, DeltaInt8, FedBuff, FedFa, FedIT, Half, Immediate, ProductDelta, Rounds, Scaffold, checkpoint
from fedloom.flower.driver import Deployment, Patience
from fedloom.flower.message import Terms
from fedloom.metrics import Metrics
from fedloom.places import Places
from fedloom.replay import Archive, replay
from fedloom.resume import LOGS, NAME, Keeper, Progress, kept, log, restore
from fedloom.server import Limits, Server, State
from fedloom.trace import Trace
from fedloom.train.settings import PLAIN, LoRA, Training
from fedloom.tree import owners
from fedloom.types import Command, Event, Model
from flower.net import Net, Site, Trouble

TERMS = Terms("storm", "0" * 12, "toy", 2, LoRA(), Training(), PLAIN, 1, 0, ("no", "yes"))
QUICK = Patience(task=60.0, away=15.0, pause=5.0, again=0.5, poll=0.25, look=1.0)
METHODS = [
    (ProductDelta(), Rounds(3), None),
    (FedIT(), FedFa(3), Half()),
    (Averaged(ProductDelta()), Immediate(), DeltaInt8()),
    (CA2FL(FedIT(), 4), FedBuff(2), None),
    (Scaffold(FedIT(), clients=4), Rounds(2, over_selection=1.5), Half()),
]


class Killed(Exception):
    """The server's process is no more."""


@dataclass
class Life:
    """A deployment in a folder, which can be killed and begun again. `deaths` are drawn from its seed."""

    folder: Path
    net: Net
    make: Callable[[], Server]
    patience: Patience = QUICK
    deadly: float = 0.0
    least: int = 1
    starts: int = 0
    running: Deployment = field(init=False)

    def __post_init__(self) -> None:
        self.random = Random(self.net.seed + 1)

    def live(self) -> str:
        """One process: until the run ends. Raises Killed."""
        self.starts += 1
        server, profiles = self.make(), dict[str, Any]()
        stored = checkpoint.load(self.folder / NAME) if (self.folder / NAME).exists() else None
        sizes = {name: stored.about[name] for name in LOGS} if stored else dict.fromkeys(LOGS, 0)
        with ExitStack() as opened:
            logs = [opened.enter_context(log(self.folder / name, size)) for name, size in sizes.items()]
            metrics, progress = Metrics(logs[1], Places(server.schedule.max_in_flight)), Progress()
            watching = [Trace(logs[0]), metrics, Archive.of(self.folder / "updates", server)]
            keeper = Keeper(self.folder, given={"transfer": server.transfer}, seconds=0.0, logs=logs)

            def observe(now: float, event: Event, commands: list[Command]) -> None:
                for one in watching:
                    one(now, event, commands)

            def evaluate(model: Model) -> Mapping[str, float]:
                progress.scores.append({"accuracy": 0.5})
                return progress.scores[-1]

            def settled() -> None:
                self.dies()
                keeper()
                self.dies()

            self.running = running = Deployment(server, self.net, TERMS, profiles, self.least, self.patience, self.net.clock)
            running.evaluate, running.observe, running.settled = evaluate, observe, settled
            keeper.owners = (*owners(server), running, metrics, progress)
            kinds = (State, Deployment, Metrics, Progress)
            hints = {name: hint for kind in kinds for name, hint in kept(kind).items()}
            restore(stored.read(hints, transfer=server.transfer) if stored else {}, keeper.owners)
            send = self.net.send
            self.net.send = lambda node, body: self.dies() or send(node, body)  # type: ignore[assignment,method-assign]
            try:
                return running.run(self.net.pause)
            finally:
                self.net.send = send  # type: ignore[method-assign]

    def dies(self) -> None:
        if self.random.random() < self.deadly:
            raise Killed

    def whole(self) -> str:
        """All its lives."""
        while True:
            try:
                return self.live()
            except Killed:
                self.net.forget()
                self.net.pause(3.0)

    def trace(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / LOGS[0]).read_text().splitlines()]


def accepted(trace: list[dict[str, Any]]) -> list[int]:
    """The tasks whose answers counted, in order."""
    arrived = [line for line in trace if line["event"]["type"] == "UpdateArrived"]
    return [line["event"]["task"] for line in arrived if not any(c["type"] == "Reject" for c in line["commands"])]


def sites(count: int = 4) -> dict[int, Site]:
    return {100 + k: Site(profile, 1.0 + 2.0 * k) for k, profile in enumerate(toys.profiles(count).values())}


TROUBLES = st.builds(Trouble, *[st.sampled_from([0.0, 0.1, 0.3])] * 4)


@pytest.mark.parametrize(("method", "schedule", "codec"), METHODS, ids=lambda one: type(one).__name__)
@given(trouble=TROUBLES, deadly=st.sampled_from([0.0, 0.02, 0.1]), seed=st.integers(0, 10**6))
@settings(max_examples=10, deadline=None, phases=(Phase.reuse, Phase.generate))  # a storm does not shrink
def test_an_answer_counts_once_and_none_is_lost(
    method: Any, schedule: Any, codec: Any, trouble: Trouble, deadly: float, seed: int, tmp_path_factory: Any
) -> None:
    """Whatever happens on the wire and to the server: the run ends, no task counts twice, each is trained once where its
    answer counted, a site keeps what it learnt exactly of the tasks that counted, and the trace replays to the byte.
    """
    folder, net = tmp_path_factory.mktemp("storm"), Net(sites(), trouble, seed)

    def make() -> Server:
        start = toys.adapter(2)
        return toys.server(schedule, method, start=start, limits=Limits(versions=12), transfer=codec)

    life = Life(folder, net, make, deadly=deadly)
    assert life.whole() == "12 versions made"
    counted = accepted(life.trace())
    assert len(counted) == len(set(counted))
    for site in net.sites.values():
        own = site.profile.client
        mine = [task for task in counted if life_of(life, task) == own]
        assert mine == sorted(mine)
        assert [task for task in site.kept if task in mine] == site.kept  # kept of nothing that did not count
        assert set(mine[:-1]) <= set(site.kept)  # and of all that did, but the last, of which no later task has told
        assert all(sum(n for (task, _), n in site.trained.items() if task == number) == 1 for number in mine)
    assert replay(folder, make()).difference == ""


def life_of(life: Life, task: int) -> str:
    return next(
        line["event"]["client"]
        for line in life.trace()
        if line["event"]["type"] == "UpdateArrived" and line["event"]["task"] == task
    )
