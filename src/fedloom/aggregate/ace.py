"""ACE: every step goes along the mean of all clients' last changes, whichever client answered.

Source: Chang et al., "Mitigating Participation Imbalance Bias in Asynchronous Federated Learning", arXiv 2511.19066, 2025 (ACE):
the server keeps g_i, the last change of client i, and on each arrival u <- u + (g_new - g_i) / N, w <- w + eta u. A client
that answers often then counts no more than one that answers seldom. eta is the schedule's step: `Immediate()` or
`FedAsync`; `Rounds` makes it MIFA (Gu et al., arXiv 2106.04159, 2021). How the schedule weighs the answers of one merge does not
matter where all train the same: every client weighs 1/N. The paper's variant with a limit on delay, ACED, is not here.

As in CA2FL the wrapped method merges other answers than came: each as if it had changed by u where it trained. So a side that
rests, or a direction that nobody present trains, does not move; and u is the mean over the clients that train a direction. What
is kept of a client is its change and not its model, so a merge of models counts as one of changes. Cost and memory: as CA2FL.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import ClassVar

from fedloom.aggregate.fedit import FedIT
from fedloom.aggregate.shared.client_changes import (
    mean_last_change,
    measure_changes,
    remember_changes,
    replace_change,
    require_changes,
    store_memory,
    with_empty_memory,
)
from fedloom.aggregate.shared.wrapper import Wrapper
from fedloom.core.lora import Adapter
from fedloom.core.policies import Aggregator, Merge
from fedloom.core.types import Model


@dataclass(frozen=True, slots=True)
class ACE(Wrapper):
    """Steps of another method along the mean of all clients' last changes.

    Fields:
        inner: the wrapped method; it must add factors.
        clients: size of the federation (N).
    """

    inner: Aggregator = field(default_factory=FedIT)
    clients: int = 20
    wrapper_exempt: ClassVar[Mapping[int, str]] = MappingProxyType(
        {
            1: "the only client who answered so far weighs 1/N, as every other",
            2: "as law 1: absent clients weigh as much as those whose answers are merged",
            8: "as law 1: a client alone on a direction weighs 1/N there while others are not heard of",
        }
    )
    remembers_changes: ClassVar[bool] = True
    not_summed: ClassVar[str] = "it remembers the last change of each client, and a sum tells of none"
    each_once: ClassVar[str] = "every client's last change is in each step already"

    def __post_init__(self) -> None:
        require_changes("ACE", self.inner, self.clients)

    @property
    def exempt(self) -> Mapping[int, str]:
        """Laws broken by the wrapped method, but for law 5 (where changes are added nothing drains away), and by the wrapper."""
        return {law: why for law, why in self.inner.exempt.items() if law != 5} | dict(self.wrapper_exempt)

    def init(self, start: Adapter) -> Model:
        """Return the first model of the wrapped method, with no change of anybody."""
        return with_empty_memory(self.inner.init(start), self.clients)

    def merge(self, model: Model, merge: Merge) -> Model:
        """Put the answers in the place of their clients' last changes, and take a step along the mean of all."""
        changes = measure_changes(model, merge)
        memory = remember_changes(model.memory, changes.values())
        common = mean_last_change(memory)
        moved = {number: replace_change(change, common) for number, change in changes.items()}
        averaged = merge.map_updates(lambda update: moved.get(update.task.id, update))
        after = self.inner.merge(model, replace(averaged, as_delta=True))
        return store_memory(after, model, memory, self.clients)
