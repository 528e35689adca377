"""CA2FL: each answer is corrected by how its client's last change differed from everybody's.

Source: Wang et al., "Tackling the Data Heterogeneity in Asynchronous Federated Learning with Cached Update Calibration", ICLR
2024, Alg. 1: the server caches h_i, the last change of client i, with h = (1/N) sum_i h_i over all clients;
v = h + sum_k p_k (Delta_k - h_k), w <- w + eta v, h_k <- Delta_k. Fast clients fill the buffer more often; here those that are
missing in it count by what they did last. The weights p_k and eta are the schedule's: the paper is `FedBuff(discount=Constant())`.

Written answer by answer, sum_k p_k (Delta_k - h_k + h), the rule needs to know nothing of the wrapped method: it merges
corrected answers. Each is corrected on the directions and sides that its client trained and nowhere else, and h is the mean over the
clients that train a direction, so that neither mixed ranks nor frozen, private or alternating sides count as a change of zero.
In a merge of models each client's model is moved by h - h_k, which is the same where all started from the server's model. An answer
from before the basis was drawn anew is merged as it is. Cost: a few passes over the answers; memory of one adapter per client.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

from fedloom.aggregate.fedit import FedIT
from fedloom.aggregate.shared.client_changes import (
    last_change,
    mean_last_change,
    measure_changes,
    remember_changes,
    replace_change,
    require_changes,
    store_memory,
    with_empty_memory,
)
from fedloom.aggregate.shared.wrapper import Wrapper
from fedloom.core.lora import Adapter, map_tensors
from fedloom.core.policies import Aggregator, Merge
from fedloom.core.types import Model, Update


@dataclass(frozen=True, slots=True)
class CA2FL(Wrapper):
    """Another method, on answers corrected by cached changes.

    Fields:
        inner: the wrapped method; it must add factors.
        clients: size of the federation (N).
    """

    inner: Aggregator = field(default_factory=FedIT)
    clients: int = 20
    wrapper_exempt: ClassVar[Mapping[int, str]] = MappingProxyType(
        {1: "what absent clients changed last moves the model, although everybody present agrees"}
    )
    remembers_changes: ClassVar[bool] = True
    not_summed: ClassVar[str] = "it remembers the last change of each client, and a sum tells of none"
    each_once: ClassVar[str] = "an answer's correction, by the change that its client made before, holds once"

    def __post_init__(self) -> None:
        require_changes("CA2FL", self.inner, self.clients)

    def init(self, start: Adapter) -> Model:
        """Return the first model of the wrapped method, with no change of anybody."""
        return with_empty_memory(self.inner.init(start), self.clients)

    def merge(self, model: Model, merge: Merge) -> Model:
        """Return the wrapped merge of Delta_k - h_k + h, after which h_k is Delta_k."""
        changes, common = measure_changes(model, merge), mean_last_change(model.memory)

        def corrected(update: Update) -> Update:
            change = changes.get(update.task.id)
            if change is None:
                return update
            last = last_change(model.memory, change)
            return replace_change(
                change, map_tensors(lambda d, o, h: d.double() - o.double() + h, change.by, last, common)
            )

        after = self.inner.merge(model, merge.map_updates(corrected))
        return store_memory(after, model, remember_changes(model.memory, changes.values()), self.clients)
