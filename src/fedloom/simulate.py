"""The virtual-clock driver: a heap of events around the pure core. It carries out commands and decides nothing.

Training really happens, at the moment of dispatch; its result arrives when the device and link models say. Ties in time are
broken by the order in which events were made, so a run of one seed is one sequence of events.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from fedloom.errors import Refused
from fedloom.faults import Vanished
from fedloom.presence import Happening, Presence, Switched
from fedloom.server import Server
from fedloom.transfer import answered
from fedloom.types import (
    Cancel,
    ClientId,
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
from fedloom.world import Devices

Evaluator: TypeAlias = Callable[[Model], Mapping[str, float]]
Observer: TypeAlias = Callable[[float, Event, list[Command]], None]


def nothing() -> None:
    """Between two events there is nothing to do."""


@dataclass(slots=True)
class Simulation:
    """One run on the virtual clock.

    `heap` holds events for the server, and what happens to clients (`presence`). `locals` is what stays at each client, `flying` what
    will stay of tasks not yet answered: a task whose answer is refused, cancelled or lost leaves nothing behind, so that client and
    server never disagree on what the client contributed (SCAFFOLD's control variates, residuals of error feedback, private sides).
    `settled` is called between two events, when all commands are carried out: nothing is under way but what stands in the fields.
    """

    server: Server
    trainer: Trainer
    world: Devices
    profiles: Mapping[ClientId, Profile]
    evaluate: Evaluator
    observe: Observer
    seed: int = 0
    presence: Presence = field(default_factory=Presence)
    heap: list[tuple[float, int, Event | Happening]] = field(default_factory=list)
    made: int = 0
    locals: dict[ClientId, Local] = field(default_factory=dict)
    flying: dict[int, Local] = field(default_factory=dict)
    joined: bool = False
    settled: Callable[[], None] = nothing

    def run(self) -> str:
        """Until the server stops; returns its reason. Raises Refused if nothing can ever happen again."""
        for client in () if self.joined else sorted(self.profiles):
            self._step(0.0, Switched(client))
        self.joined = True
        while True:
            self.settled()
            if stop := self._step(*self._next()):
                self._last_scores()
                return stop.reason

    def _step(self, now: float, what: Event | Happening) -> Stop | None:
        stop = None
        for event in self._told(now, what) if isinstance(what, Happening) else (what,):
            stop = self._tell(now, event) or stop
        return stop

    def _told(self, now: float, what: Happening) -> tuple[Event, ...]:
        """What the server hears of it at once."""
        after = self.presence.happens(now, what, self.profiles[what.client], self.server.state)
        for time, event in after.ahead:
            self._push(time, event)
        if after.dropped is not None:
            self._forget({after.dropped}, after.back)
        return after.told

    def _tell(self, now: float, event: Event) -> Stop | None:
        local = self.flying.pop(event.task) if isinstance(event, UpdateArrived) else None
        commands = self.server.handle(now, event)
        if isinstance(event, UpdateArrived) and local and not any(isinstance(c, Reject) for c in commands):
            self.locals[event.client] = local  # what a refused task left behind (moments of NaN, say) is not kept
        self.observe(now, event, commands)
        self._carry_out(now, commands)
        return commands[-1] if commands and isinstance(commands[-1], Stop) else None

    def _last_scores(self) -> None:
        """Evaluations asked for together with the stop are still told."""
        for now, _, event in sorted(self.heap, key=lambda entry: entry[:2]):
            if isinstance(event, Scored):
                self.observe(now, event, self.server.handle(now, event))

    def _next(self) -> tuple[float, Event | Happening]:
        """The earliest event, or the timer when the server wants to look before it."""
        wake = self.server.wake()
        if self.heap and (wake is None or self.heap[0][0] <= wake):
            now, _, event = heapq.heappop(self.heap)
            return now, event
        if wake is None:
            remedy = (
                "nothing is under way and nobody can be started: the federation has no idle client, and none will "
                "come back; give faults.back_after or fewer drop-outs, or longer windows of availability"
            )
            raise Refused("clients", len(self.profiles), remedy)
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

    def _forget(self, dropped: set[int], back: float = 0.0) -> None:
        """Nothing arrives of these tasks, and nothing waits for a time that may be far away. Only who does not hear that his answer
        has become useless sends it all the same, once he is `back`: the server must bear it.
        """
        if not dropped:
            return
        kept, late = list[tuple[float, int, Event | Happening]](), list[tuple[float, UpdateArrived]]()
        for time, order, event in self.heap:
            if not isinstance(event, UpdateArrived | TaskFailed | Vanished) or event.task not in dropped:
                kept.append((time, order, event))
            elif isinstance(event, UpdateArrived) and back < math.inf and self.presence.comes_late(event):
                late.append((max(time, back), event))
            elif isinstance(event, UpdateArrived):
                del self.flying[event.task]
        heapq.heapify(kept)
        self.heap = kept
        for time, event in late:
            self._push(time, event)

    def _train(self, now: float, cohort: list[Task]) -> None:
        work = [(task, self.locals.get(task.client, Local())) for task in cohort]
        for (task, before), trained in zip(work, self.trainer.train(work), strict=True):
            result, local = answered(task, before, *trained)
            timed = self._timed(task, result)
            seconds = timed.metrics["seconds"]
            if task.client in self.presence.out:
                continue  # the server does not know yet that nobody is there
            misfortune = self.presence.befalls(task, seconds)
            if misfortune:
                self._push(now + misfortune[0], misfortune[1])
            if not misfortune or isinstance(misfortune[1], Vanished):
                self.flying[task.id] = local
                self._push(now + seconds, UpdateArrived(task.client, task.id, timed))

    def _timed(self, task: Task, result: Result) -> Result:
        """The result with the virtual seconds that it took, as a real client would report them."""
        turn = self.server.state.dispatched[task.client] - 1
        took = self.world.seconds(task, result, self.profiles[task.client], self.server.shape, self.seed, turn)
        parts = {"seconds_down": took.down, "seconds_train": took.train, "seconds_up": took.up}
        return replace(result, metrics={**result.metrics, "seconds": took.total, **parts})

    def _push(self, time: float, event: Event | Happening) -> None:
        if time == math.inf:
            return  # never
        heapq.heappush(self.heap, (time, self.made, event))
        self.made += 1
