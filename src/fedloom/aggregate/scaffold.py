"""SCAFFOLD: each client corrects its gradients by how they differ from everybody's.

Source: Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", arXiv 1910.06378, 2020, Alg.
1: local steps with g - c_i + c, then c <- c + (1/N) sum_i (c_i+ - c_i). The client's c_i+ is the mean of its gradients over
the task (in the spirit of option I), because with AdamW option II's (x - y) / (K eta) is no gradient. The trainer does the
client's part when a start brings a control variate. Traffic is doubled. Cost: one pass over the parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from fedloom.aggregate.fedit import FedIT
from fedloom.aggregate.shared.merge_terms import held_directions, select_directions
from fedloom.aggregate.shared.wrapper import Wrapper, require_factors
from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter, Factor, map_tensors
from fedloom.core.policies import Aggregator, Merge
from fedloom.core.types import Budget, Model, TaskStart

CONTROL = "control"


@dataclass(frozen=True, slots=True)
class Scaffold(Wrapper):
    """Control variates around another method.

    Fields:
        inner: the wrapped method; it must add factors.
        clients: size of the federation (N).
    """

    inner: Aggregator = field(default_factory=FedIT)
    clients: int = 20
    not_summed: ClassVar[str] = "its clients answer with a control variate beside their change"
    each_once: ClassVar[str] = "a client's change of its control variate would be added to everybody's again"

    def __post_init__(self) -> None:
        require_factors("Scaffold", self.inner, "a control variate is a gradient, entry by entry")
        if self.clients < 1:
            raise Refused("aggregator.clients", self.clients, "the number of clients of the federation")

    def init(self, start: Adapter) -> Model:
        """Return the first model of the wrapped method, with a control variate of zero."""
        model = self.inner.init(start)
        return replace(model, memory={**model.memory, CONTROL: map_tensors(torch.zeros_like, model.adapter)})

    def merge(self, model: Model, merge: Merge) -> Model:
        """Return the wrapped merge, with c + (1/N) sum of the clients' changes of their control variates."""
        after, control = self.inner.merge(model, merge), model.memory[CONTROL]
        factors = {}
        for name, factor in control.factors.items():
            down, up = factor.down.clone(), factor.up.clone()
            for _, update in merge.weighted_updates:
                if update.result.control is not None:
                    change = update.result.control.factors[name]
                    held = held_directions(update.task.start, change.rank)
                    down.index_add_(0, held, change.down / self.clients)
                    up.index_add_(1, held, change.up / self.clients)
            factors[name] = Factor(down, up)
        dense = dict(control.dense)
        for name in dense:
            for _, update in merge.weighted_updates:
                if update.result.control is not None:
                    dense[name] = dense[name] + update.result.control.dense[name] / self.clients
        return replace(after, memory={**after.memory, CONTROL: Adapter(factors, dense)})

    def start(self, model: Model, budget: Budget, seed: int) -> TaskStart:
        """Hand out what the wrapped method does, with c in the client's directions."""
        start, control = self.inner.start(model, budget, seed), model.memory[CONTROL]
        factors = {}
        for name, factor in control.factors.items():
            factors[name] = select_directions(factor, held_directions(start, start.train.factors[name].rank))
        return replace(start, control=Adapter(factors, control.dense))
