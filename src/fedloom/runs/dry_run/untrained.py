"""A run without its training: the same server, clients, devices, data and clock, and answers that nobody trained.

An answer is what was sent, each trained number moved by one step at random. Which tasks are sent to whom, how large messages are and
how long they take follow from the code that the run itself uses; they are the run's own unless a policy decides by what is learnt.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import TypeAlias

import torch
from torch import Tensor

from fedloom.core.events import Command, Event
from fedloom.core.lora import lay_flat, map_tensors
from fedloom.core.model_shape import Shape
from fedloom.core.policies import Observer, PendingResult
from fedloom.core.types import Budget, ClientId, ClientState, Model, Result, Task
from fedloom.runs.job import Job
from fedloom.runs.metrics import ByteCounts, Metrics
from fedloom.runs.observation import RunObservation
from fedloom.runs.slot_usage import SlotUsage
from fedloom.runs.trace import Trace
from fedloom.simulate.client_presence import Presence
from fedloom.simulate.client_states import ClientStates
from fedloom.simulate.simulation import Simulation
from fedloom.train.objective import most_moved_directions, replace_sides
from fedloom.train.tokenised import EncodedTexts
from fedloom.train.trainer import PeftTrainer
from fedloom.train.workers.worker import TaskGroup

Clock: TypeAlias = Callable[[], float]
"""Seconds since some moment, such as `time.perf_counter`."""


@dataclass(frozen=True, slots=True)
class MemberTask:
    """A task of a pass, without its tensors.

    Fields:
        task: its number.
        client: whose it is.
        budget: rank, depth and steps.
    """

    task: int
    client: ClientId
    budget: Budget


@dataclass(frozen=True, slots=True)
class Pass:
    """Tasks that are trained together; most often one.

    Fields:
        members: the tasks.
        steps: optimiser steps.
        tokens: tokens of a step, padding included, mean over the steps.
    """

    members: tuple[MemberTask, ...]
    steps: int
    tokens: float

    @property
    def depth(self) -> int | None:
        """Trained blocks (None: all)."""
        return self.members[0].budget.depth


@dataclass(frozen=True, slots=True)
class LargestStep:
    """The step of all tasks that needs most memory.

    Fields:
        member: its task.
        batch: its examples.
        memory: what a client needs for it, by `Shape.train_memory` (bytes).
    """

    member: MemberTask
    batch: tuple[int, ...]
    memory: float


@dataclass(slots=True)
class UntrainedClients:
    """Takes the place of a trainer: answers without training, and notes what would have been trained.

    Fields:
        trainer: the one whose place it takes.
        shape: sizes of the model.
        clock: measures `seconds`.
        passes: what would have been trained, in order.
        needs: by client, its step that needs most memory.
        tasks: tasks that were sent.
        tokens: tokens that would have been trained on, padding not counted.
        seconds: spent here, and not in the server.
    """

    trainer: PeftTrainer
    shape: Shape
    clock: Clock
    passes: list[Pass] = field(default_factory=list)
    needs: dict[ClientId, LargestStep] = field(default_factory=dict)
    tasks: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def train(self, work: Sequence[tuple[Task, ClientState]]) -> list[tuple[Result, ClientState]]:
        """Return an answer for each task, in order."""
        return [answer() for answer in self.begin(work, [0.0] * len(work))]

    def begin(self, work: Sequence[tuple[Task, ClientState]], due: Sequence[float]) -> Sequence[PendingResult]:
        """Return one callable per result. As with a trainer, what is never called for is not trained: a task that was cancelled."""
        began = self.clock()
        groups = [(group, cache(partial(self._note, group))) for group in self.trainer.groups(work)]
        self.tasks += len(work)
        self.seconds += self.clock() - began
        return [partial(self._answer, task, note) for group, note in groups for task, _ in group]

    def unchanged_result(self, task: Task) -> Result:
        """Return the result if training changed nothing."""
        began = self.clock()
        result = self.trainer.unchanged_result(task)
        self.seconds += self.clock() - began
        return result

    def _answer(self, task: Task, note: Callable[[], None]) -> tuple[Result, ClientState]:
        began = self.clock()
        note()
        result = self._moved_result(task)
        self.tokens += result.tokens
        self.seconds += self.clock() - began
        return result, ClientState(task.start.basis)

    def _note(self, group: TaskGroup) -> None:
        """Note the tokens of a pass, and each client's largest step."""
        texts, plans = self.trainer.texts, [self.trainer.batches(task) for task, _ in group]
        members = tuple(MemberTask(task.id, task.client, task.budget) for task, _ in group)
        steps = [padded_tokens(texts, batches) for batches in zip(*plans, strict=True)]
        self.passes.append(Pass(members, len(steps), sum(steps) / max(1, len(steps))))
        for member, plan in zip(members, plans, strict=True):
            for batch in plan:
                self._note_largest(member, batch)

    def _note_largest(self, member: MemberTask, batch: Sequence[int]) -> None:
        texts, budget = self.trainer.texts, member.budget
        predicted = sum(map(texts.target_count, batch)) if texts.answer_starts is not None else 0
        memory = self.shape.train_memory(budget.rank, padded_tokens(texts, [batch]), budget.depth, predicted)
        if member.client not in self.needs or memory > self.needs[member.client].memory:
            self.needs[member.client] = LargestStep(member, tuple(batch), memory)

    def _moved_result(self, task: Task) -> Result:
        """Return an answer in which each number that would have been trained differs from what was sent."""
        start, rules = task.start, task.start.rules
        step, draw = self.trainer.training.learning_rate, torch.Generator().manual_seed(task.id)

        def move(sent: Tensor) -> Tensor:
            return sent + step * (2.0 * torch.randint(2, sent.shape, generator=draw) - 1.0)

        moved, sides = map_tensors(move, start.train), rules.unchanged
        if task.budget.steps == 1 and not any(factor.up.any() for factor in start.train.factors.values()):
            sides |= {"down"}  # while `up` is zero, the first step does not move it
        chosen = None
        if rules.select is not None and rules.select < sum(factor.rank for factor in start.train.factors.values()):
            chosen = most_moved_directions(start.train, moved, rules.select)
        sent = replace_sides(moved, start.train, sides, chosen)
        return replace(self.trainer.unchanged_result(task), adapter=lay_flat(sent))


def padded_tokens(texts: EncodedTexts, batches: Sequence[Sequence[int]]) -> int:
    """Return the tokens of a step that takes these batches, one for each client, padding included."""
    rows = max((len(batch) for batch in batches), default=0)
    longest = max((length for batch in batches for length in texts.lengths(batch)), default=0)
    return len(batches) * rows * longest


@dataclass(frozen=True, slots=True)
class UntrainedRun:
    """What happened in a run without its training.

    Fields:
        clients: what was answered in the place of clients.
        versions: versions made.
        now: the virtual time (s).
        traffic: bytes sent.
        scored: how often a version would have been scored.
        checked: how often a canary would have been.
        server_seconds: time that the server, its clock and its logs took.
        share: of the run that this is (1: all of it).
    """

    clients: UntrainedClients
    versions: int
    now: float
    traffic: ByteCounts
    scored: int
    checked: int
    server_seconds: float
    share: float


class _TimeIsUp(Exception):
    """Ends a run that takes too long without its training, too."""


def run_untrained(job: Job, trainer: PeftTrainer, patience: float, clock: Clock) -> UntrainedRun:
    """Carry out a job without training and scoring; nothing is written, and the job's server is at its end afterwards.

    `trainer` says how tasks would be trained. After `patience` seconds it ends early, at the first version then.
    """
    clients, shown, counts = UntrainedClients(trainer, job.server.shape, clock), [0.0], [0, 0]
    began = clock()

    def evaluate(_: Model) -> Mapping[str, float]:
        counts[0] += 1
        return {}

    def check(_: Model) -> tuple[float, ...]:
        counts[1] += 1
        return (1.0,) * len(job.canaries)

    def observe(now: float, event: Event, commands: list[Command]) -> None:
        shown[0] = now
        for observer in observers:
            observer(now, event, commands)

    def after_step() -> None:
        if clock() - began > patience and job.server.state.version:
            raise _TimeIsUp

    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        metrics = Metrics(nowhere, SlotUsage(job.server.max_in_flight), RunObservation(job.server.edges))
        observers: list[Observer] = [Trace(nowhere, job.secret), metrics]
        simulation = Simulation(
            job.server,
            clients,
            job.devices,
            job.profiles,
            evaluate,
            observe,
            check=check,
            seed=job.run.seed,
            presence=Presence(job.stays, job.run.faults, job.run.seed),
            client_states=ClientStates(rotates=job.run.aggregator.space == "product"),
            measured=not job.secret,
            after_step=after_step,
        )
        share = 1.0
        try:
            job.check_failures(simulation.run())
        except _TimeIsUp:
            limits, version = job.run.limits, job.server.state.version
            share = max(version / limits.versions, shown[0] / limits.seconds if limits.seconds else 0.0)
            under_way = metrics.observation.sent  # as if the version were the last
            clients.tasks -= len(under_way)
            metrics.traffic.down -= sum(metrics.sent[number].size.total for number in under_way)
    server_seconds = clock() - began - clients.seconds
    return UntrainedRun(
        clients=clients,
        versions=job.server.state.version,
        now=shown[0],
        traffic=metrics.traffic,
        scored=counts[0],
        checked=counts[1],
        server_seconds=server_seconds,
        share=min(1.0, share),
    )


def assumptions_of(job: Job) -> tuple[str, ...]:
    """Return what a run decides by what its clients learn, and was assumed instead: sentences."""
    run, found = job.run, list[str]()
    rules, groups = run.aggregator.start(job.server.state.model, Budget(1, 1), 0).rules, run.hierarchy
    if run.canary is not None:
        found.append("Every version passes its canary.")
    if rules.pruning is not None:
        found.append("No client prunes its rank.")
    if rules.select is not None:
        found.append("Clients choose the directions that they train at random.")
    if groups is not None and groups.plan is not None:
        found.append("The plan of the groups sees no losses.")
    return tuple(found)
