"""An outer task as the model that an edge begins with, and the model that it ends with as an answer to the task."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fedloom.aggregate.shared.wrapper import Around
from fedloom.core.lora import Adapter, Factor, joined, pad, server_rank, truncate_sum
from fedloom.core.policies import Aggregator, Merge
from fedloom.core.types import Budget, Model, Result, Start, Task


@dataclass(frozen=True, slots=True)
class OneSided(Around):
    """`inner`, but a method that trains its sides in turn stays at that of the outer task: the other has to come back as it was."""

    inner: Aggregator

    def merge(self, model: Model, merge: Merge) -> Model:
        """The wrapped merge; it is nobody else's turn yet."""
        return replace(self.inner.merge(model, merge), phase=model.phase)


def first(aggregator: Aggregator, start: Start) -> Model:
    """The model with which an edge begins what starts so: all that it was sent, also layers that are in the fold alone."""
    model = aggregator.init(start.train)
    if start.fold is not None:
        model = replace(model, fold=joined(start.fold, model.fold))
    return replace(model, phase=phase(aggregator, model, start) or 0)


def narrowed(task: Task, result: Result) -> Task:
    """An outer task as it was answered: without the layers that no member trained."""
    asked, given = task.start.train, result.adapter.factors
    if asked.factors.keys() == given.keys():
        return task
    train = Adapter({name: factor for name, factor in asked.factors.items() if name in given}, asked.dense)
    return replace(task, start=replace(task.start, train=train))


def phase(aggregator: Aggregator, model: Model, start: Start) -> int | None:
    """In which turn the method leaves alone what the outer task wants back as it was; None: in none."""
    budget = Budget(server_rank(start.train), 1)
    for turn in (0, 1):
        if start.rules.kept <= aggregator.start(replace(model, phase=turn), budget, 0).rules.kept:
            return turn
    return None


def reported(start: Start, model: Model) -> tuple[Adapter, float]:
    """The model as an answer to this start, and the share of its energy that had to be cut.

    What an edge folded is put into the adapter, as far as the rank of the task reaches; as long as nothing was, that is the adapter.
    """
    asked, given = start.train.factors, model.adapter.factors
    mine, sent = (fold.factors if fold else {} for fold in (model.fold, start.fold))
    grown = {name for name in asked if mine.get(name) is not sent.get(name)}
    if not grown and all(given[name].rank == factor.rank for name, factor in asked.items()):
        return model.adapter, 0.0
    factors, before, after = {}, 0.0, 0.0
    for name, factor in asked.items():
        terms = [(1.0, given[name])]
        terms += [(sign, fold[name]) for sign, fold in ((1.0, mine), (-1.0, sent)) if name in grown and name in fold]
        kept, energy = truncate_sum(terms, factor.rank)
        factors[name] = pad(kept, factor.rank)
        before, after = before + energy, after + float(kept.up.double().square().sum())
    return Adapter(factors, model.adapter.dense), max(0.0, 1.0 - after / before) if before > 0 else 0.0


def onto(start: Start, given: Adapter) -> Adapter:
    """The nearest answer that has the sides as they were sent that are to come back so: a method may have turned them inside."""
    factors = dict(given.factors)
    for name, asked in start.train.factors.items():
        own = given.factors[name]
        if "down" in start.rules.kept and not own.down.equal(asked.down):
            up = own.up.double() @ (own.down.double() @ torch.linalg.pinv(asked.down.double()))
            factors[name] = Factor(asked.down, up.to(own.up))
        elif "up" in start.rules.kept and not own.up.equal(asked.up):
            down = (torch.linalg.pinv(asked.up.double()) @ own.up.double()) @ own.down.double()
            factors[name] = Factor(down.to(own.down), asked.up)
    return Adapter(factors, given.dense)
