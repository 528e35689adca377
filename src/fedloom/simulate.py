"""The virtual-clock driver: a heap of events around the pure core. It carries out commands and decides nothing.

Training really happens, at the moment of dispatch; its result arrives when the device and link models say. Ties in time are
broken by the order in which events were made, so a run of one seed is one sequence of events.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from fedloom.server import Server
from fedloom.transfer import answered
from fedloom.types import (
    Cancel,
    ClientId,
    ClientJoined,
    Command,
    Dispatch,
    Evaluate,
    Event,
    Local,
    Model,
    Profile,
    Reject,
    Result,
    Scored,
    Stop,
    Task,
    TaskFailed,
    TimerFired,
    Trainer,
    UpdateArrived,
)
from fedloom.world import World

Evaluator: TypeAlias = Callable[[Model], Mapping[str, float]]
Observer: TypeAlias = Callable[[float, Event, list[Command]], None]


def nothing() -> None:
    """Between two events there is nothing to do."""


@dataclass(slots=True)
class Simulation:
    """One run on the virtual clock. `locals` is what stays at each client, `flying` the moments of tasks not yet answered.

    `settled` is called between two events, when all commands are carried out: nothing is under way but what stands in the fields.
    """

    server: Server
    trainer: Trainer
    world: World
    profiles: Mapping[ClientId, Profile]
    evaluate: Evaluator
    observe: Observer
    seed: int = 0
    heap: list[tuple[float, int, Event]] = field(default_factory=list)
    made: int = 0
    locals: dict[ClientId, Local] = field(default_factory=dict)
    flying: dict[int, Local] = field(default_factory=dict)
    joined: bool = False
    settled: Callable[[], None] = nothing

    def run(self) -> str:
        """Until the server stops; returns its reason. Raises RuntimeError if nothing can ever happen again."""
        for client in () if self.joined else sorted(self.profiles):
            joined = ClientJoined(self.profiles[client])
            self.observe(0.0, joined, self.server.handle(0.0, joined))
        self.joined = True
        while True:
            self.settled()
            now, event = self._next()
            local = self.flying.pop(event.task) if isinstance(event, UpdateArrived) else None
            commands = self.server.handle(now, event)
            if isinstance(event, UpdateArrived) and local and not any(isinstance(c, Reject) for c in commands):
                self.locals[event.client] = local  # what a refused task left behind (moments of NaN, say) is not kept
            self.observe(now, event, commands)
            self._carry_out(now, commands)
            if commands and isinstance(commands[-1], Stop):
                self._last_scores()
                return commands[-1].reason

    def _last_scores(self) -> None:
        """Evaluations asked for together with the stop are still told."""
        for now, _, event in sorted(self.heap, key=lambda entry: entry[:2]):
            if isinstance(event, Scored):
                self.observe(now, event, self.server.handle(now, event))

    def _next(self) -> tuple[float, Event]:
        """The earliest event, or the timer when the server wants to look before it."""
        wake = self.server.wake()
        if self.heap and (wake is None or self.heap[0][0] <= wake):
            now, _, event = heapq.heappop(self.heap)
            return now, event
        if wake is None:
            raise RuntimeError("nothing is under way and nobody can be started: the federation has no idle client")
        return wake, TimerFired()

    def _carry_out(self, now: float, commands: Iterable[Command]) -> None:
        self._forget({command.task for command in commands if isinstance(command, Cancel)})
        cohort = [command.task for command in commands if isinstance(command, Dispatch)]
        if cohort:
            self._train(now, cohort)
        for command in commands:
            match command:
                case Evaluate(version, model):
                    self._push(now, Scored(version, self.evaluate(model)))
                case Reject(client, number, reason) if number in self.server.state.busy:
                    self._push(now, TaskFailed(client, number, reason))

    def _forget(self, cancelled: set[int]) -> None:
        """These clients stopped: nothing arrives, and nothing waits for a time that may be far away."""
        if not cancelled:
            return
        self.heap = [
            entry for entry in self.heap if not isinstance(entry[2], UpdateArrived) or entry[2].task not in cancelled
        ]
        heapq.heapify(self.heap)
        for number in cancelled:
            self.flying.pop(number, None)

    def _train(self, now: float, cohort: list[Task]) -> None:
        work = [(task, self.locals.get(task.client, Local())) for task in cohort]
        for (task, before), trained in zip(work, self.trainer.train(work), strict=True):
            result, local = answered(task, before, *trained)
            timed = self._timed(task, result)
            self.flying[task.id] = local
            self._push(now + timed.metrics["seconds"], UpdateArrived(task.client, task.id, timed))

    def _timed(self, task: Task, result: Result) -> Result:
        """The result with the virtual seconds that it took, as a real client would report them."""
        took = self.world.seconds(task, result, self.profiles[task.client], self.server.shape, self.seed)
        parts = {"seconds_down": took.down, "seconds_train": took.train, "seconds_up": took.up}
        return replace(result, metrics={**result.metrics, "seconds": took.total, **parts})

    def _push(self, time: float, event: Event) -> None:
        heapq.heappush(self.heap, (time, self.made, event))
        self.made += 1
