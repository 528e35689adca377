"""A deployment of toys over a simulated link whose server is killed and restarted (`Life`), and the storms for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from hypothesis import strategies as st

from fedloom.core.events import Command, Event
from fedloom.core.policies import Observer
from fedloom.core.server import Server
from fedloom.core.server_state import State
from fedloom.core.types import Model
from fedloom.deploy.messages.messages import RunTerms
from fedloom.deploy.server.config import Timeouts
from fedloom.deploy.server.driver import Deployment
from fedloom.runs import checkpoint
from fedloom.runs.archive import Archive
from fedloom.runs.metrics import Metrics
from fedloom.runs.resume import CHECKPOINT, LOGS, CheckpointWriter, Progress, open_log, restore_fields, saved_fields
from fedloom.runs.slot_usage import SlotUsage
from fedloom.runs.trace import Trace
from fedloom.train.settings import PLAIN, LoRA, Training
from tests.support.simulated_link import Net, Trouble

TERMS = RunTerms("storm", "0" * 12, "toy", 2, LoRA(), Training(), PLAIN, 1, 0, ("no", "yes"))
QUICK = Timeouts(task=60.0, away=15.0, pause=5.0, retry=0.5, poll=0.25, look=1.0)


class Killed(Exception):
    """The server's process is no more."""


@dataclass
class Life:
    """A deployment in a folder, which can be killed and begun again. `deaths` are drawn from its seed."""

    folder: Path
    net: Net
    make: Callable[[], Server]
    patience: Timeouts = QUICK
    deadly: float = 0.0
    least: int = 1
    starts: int = 0
    over: bool = False
    running: Deployment = field(init=False)

    def __post_init__(self) -> None:
        self.random = Random(self.net.seed + 1)

    def live(self) -> str:
        """One process: until the run ends. Raises Killed."""
        self.starts += 1
        server, profiles = self.make(), dict[str, Any]()
        stored = checkpoint.read_checkpoint(self.folder / CHECKPOINT) if (self.folder / CHECKPOINT).exists() else None
        sizes = {name: stored.about[name] for name in LOGS} if stored else dict.fromkeys(LOGS, 0)
        with ExitStack() as opened:
            logs = [opened.enter_context(open_log(self.folder / name, size)) for name, size in sizes.items()]
            metrics, progress = Metrics(logs[1], SlotUsage(server.max_in_flight)), Progress()
            watching: list[Observer] = [Trace(logs[0]), metrics, Archive.of(self.folder / "updates", server)]
            keeper = CheckpointWriter(self.folder, seconds=0.0, logs=logs)

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

            self.running = running = Deployment(
                server, self.net, TERMS, profiles, self.least, self.patience, self.net.clock, over_regions=self.over
            )
            running.evaluate, running.observe, running.save = evaluate, observe, settled
            running.facts_of = self.net.facts_of
            keeper.owners = (*server.parts_to_save(), running, metrics, progress)
            kinds = (State, Deployment, Metrics, Progress)
            hints = {name: hint for kind in kinds for name, hint in saved_fields(kind).items()}
            restore_fields(stored.read(hints) if stored else {}, keeper.owners)
            send = self.net.send

            def send_or_die(node: int, body: bytes, largest_reply: int) -> str:
                self.dies()
                return send(node, body, largest_reply)

            self.net.send = send_or_die  # type: ignore[method-assign]
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


TROUBLES = st.builds(Trouble, *[st.sampled_from([0.0, 0.1, 0.3])] * 4)


STORM = st.fixed_dictionaries(
    {"trouble": TROUBLES, "deadly": st.sampled_from([0.0, 0.02, 0.1]), "seed": st.integers(0, 10**6)}
)


def turns(running: Deployment, net: Net, seconds: float) -> None:
    for _ in range(round(seconds / 0.25)):
        if running.turn():
            return
        net.pause(0.25)
