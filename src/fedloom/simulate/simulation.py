"""The virtual-clock driver: a heap of events around the pure core. It carries out commands and decides nothing.

Training really happens; its result arrives when the device and link models say, and is waited for when the clock comes to the
first moment at which it can (`ahead`). Ties in time are broken by the order in which events were made, those of a task at its
dispatch, so a run of one seed is one sequence of events, whenever its training ended.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from fedloom.core.errors import Refused
from fedloom.core.events import (
    Cancel,
    Command,
    Dispatch,
    Evaluate,
    Event,
    Reject,
    Scored,
    Stop,
    TaskFailed,
    TimerFired,
    UpdateArrived,
)
from fedloom.core.policies import Evaluator, Observer, Trainer, nothing
from fedloom.core.server import Server
from fedloom.core.transfer import answered
from fedloom.core.types import ClientId, Local, Profile, Result, Task
from fedloom.hierarchy.tree import Tree
from fedloom.simulate.client_presence import Happening, Presence, Switched
from fedloom.simulate.devices import Devices
from fedloom.simulate.faults import Vanished
from fedloom.simulate.lookahead import Pending, begun, overlaps


@dataclass(slots=True)
class Simulation:
    """One run on the virtual clock.

    `heap` holds events for the server, and what happens to clients (`presence`); `pending` tasks whose answers are not known yet,
    each at the first moment at which something of it can happen. `locals` is what stays at each client, `flying` what
    will stay of tasks not yet answered: a task whose answer is refused, cancelled or lost leaves nothing behind, so that client and
    server never disagree on what the client contributed (SCAFFOLD's control variates, residuals of error feedback, private sides).
    `settled` is called between two events, when all commands are carried out: nothing is under way but what stands in the fields,
    and after `drain` nothing but plain values.
    """

    server: Server | Tree
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
    pending: list[tuple[float, int, Pending]] = field(default_factory=list)

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
        if isinstance(event, UpdateArrived) and local and Reject not in map(type, commands):
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
        while self.pending and self.pending[0][0] <= min(
            math.inf if wake is None else wake, self.heap[0][0] if self.heap else math.inf
        ):
            self.drain(self.pending[0][0])
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
        if cohort := [command.task for command in commands if isinstance(command, Dispatch)]:
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
        kept, late = list[tuple[float, int, Event | Happening]](), list[tuple[int, float, UpdateArrived | Pending]]()
        for time, order, event in self.heap:
            if not isinstance(event, UpdateArrived | TaskFailed | Vanished) or event.task not in dropped:
                kept.append((time, order, event))
            elif isinstance(event, UpdateArrived) and self._comes_late(event.client, event.task, back):
                late.append((order, max(time, back), event))
            elif isinstance(event, UpdateArrived):
                del self.flying[event.task]
        waiting = [entry for entry in self.pending if entry[2].task.id not in dropped]
        for time, order, one in self.pending if len(waiting) < len(self.pending) else ():
            if one.task.id in dropped and self._comes_late(one.task.client, one.task.id, back):
                late.append((order, max(time, back), replace(one, back=back)))
        self.heap, self.pending = kept, waiting
        heapq.heapify(self.heap)
        heapq.heapify(self.pending)
        for _, time, what in sorted(late, key=lambda entry: entry[0]):
            if isinstance(what, Pending):
                self._wait(time, what)
            else:
                self._push(time, what)

    def _comes_late(self, client: ClientId, task: int, back: float) -> bool:
        return back < math.inf and self.presence.comes_late(client, task)

    def _train(self, now: float, cohort: list[Task]) -> None:
        """Have it trained, and wait for what can happen at once."""
        work, times = [], []
        for task in cohort:
            turn = self.server.state.dispatched[task.client] - 1
            least = self._least(task, turn)
            work.append((task, self.locals.get(task.client) or Local()))
            times.append((now + self._first(task, least), turn, least))
        answers = begun(self.trainer, work, [due for due, _, _ in times])
        for (task, before), (due, turn, least), answer in zip(work, times, answers, strict=True):
            if task.client not in self.presence.out:  # else the server does not know yet that nobody is there
                self._wait(due, Pending(task, before, turn, least, answer))
        self.drain(now)

    def drain(self, until: float = math.inf) -> None:
        """Wait for the answers of which something can happen until then; it changes nothing that happens."""
        while self.pending and self.pending[0][0] <= until:
            _, order, one = heapq.heappop(self.pending)
            self._known(order, one)

    def _known(self, order: int, one: Pending) -> None:
        """Put on the heap what happens of a task, now that its answer is there."""
        task, (result, local) = one.task, answered(one.task, one.before, *one.answer())
        timed = self._timed(task, result, one.turn)
        seconds = timed.metrics["seconds"]
        if not seconds >= one.least:
            told = f"{type(self.world).__name__} says that task {task.id} takes {seconds} s, but at least {one.least} s"
            raise RuntimeError(f"{told} if nothing is sent: time would run backwards")
        misfortune = self.presence.befalls(task, seconds)
        if misfortune and one.back is None:
            self._push(task.sent + misfortune[0], misfortune[1], order)
        if not misfortune or isinstance(misfortune[1], Vanished):
            self.flying[task.id] = local
            arrives = max(task.sent + seconds, one.back or 0.0)
            self._push(arrives, UpdateArrived(task.client, task.id, timed), order + 1)

    def _least(self, task: Task, turn: int) -> float:
        """The seconds that a task takes if training changes nothing and so little is sent; 0 if the trainer cannot foresee it."""
        if not overlaps(self.trainer):
            return 0.0
        seconds: float = self._timed(task, self.trainer.least(task), turn).metrics["seconds"]
        return seconds

    def _first(self, task: Task, least: float) -> float:
        """The least seconds to its first event: a task that takes longer fails or is cut off no earlier."""
        misfortune = self.presence.befalls(task, least)
        return min(misfortune[0], least) if misfortune else least

    def _timed(self, task: Task, result: Result, turn: int) -> Result:
        """The result with the virtual seconds that it took, as a real client would report them."""
        took = self.world.seconds(task, result, self.profiles[task.client], self.server.shape, self.seed, turn)
        parts = {"seconds_down": took.down, "seconds_train": took.train, "seconds_up": took.up}
        return replace(result, metrics={**result.metrics, "seconds": took.total, **parts})

    def _wait(self, time: float, one: Pending) -> None:
        """From this moment on; two numbers are kept for its events."""
        heapq.heappush(self.pending, (time, self.made, one))
        self.made += 2

    def _push(self, time: float, event: Event | Happening, order: int | None = None) -> None:
        if time == math.inf:
            return  # never
        heapq.heappush(self.heap, (time, self.made if order is None else order, event))
        self.made += order is None
