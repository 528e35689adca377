"""Whether the settings of a run fit its data and its model, which only a run that is made ready knows."""

from __future__ import annotations

from fedloom.core.errors import Refused
from fedloom.core.partial_depth import need_own_layers
from fedloom.core.policies import layers
from fedloom.core.seeds import rng
from fedloom.core.types import Budget, Model
from fedloom.data.examples import Split
from fedloom.plan.depth import check_blocks
from fedloom.runs.run import Run
from fedloom.train.base_model import Base, check_rank


def labels(run: Run, split: Split) -> int | None:
    """How many labels the model chooses from; None: it writes answers. Raises Refused for `generation` where there are none."""
    if split.train.answers is not None:
        return None
    if run.generation:
        raise Refused("generation", run.generation, "the data have labels and no answers to write; leave it out")
    return len(split.train.names)


def check_aggregator(run: Run, base: Base, clients: int | None) -> None:
    """Raise Refused for a rank that the model is too small for, or another number of clients than there are (None: not known yet)."""
    for layer in layers(run.aggregator):
        check_rank(base, "aggregator.rank", getattr(layer, "rank", None) or run.plan.rank.largest)
        if clients is not None and getattr(layer, "clients", clients) != clients:
            raise Refused(
                "aggregator.clients",
                getattr(layer, "clients", 0),
                f"give clients={clients}, the size of the federation",
            )


def check_depth(run: Run, base: Base, model: Model) -> None:
    """Raise Refused for a depth that the model does not have, or a method that cannot have clients of different depth."""
    if run.plan.depth is not None:
        check_blocks(run.plan.depth, base.shape())
        need_own_layers(run.aggregator, run.aggregator.start(model, Budget(1, 1), 0).rules)


def tested(size: int, limit: int | None, seed: int) -> tuple[int, ...]:
    """At most `limit` of `size` test examples, drawn from the seed, in their order."""
    if limit is None or limit >= size:
        return tuple(range(size))
    return tuple(sorted(rng(seed, "test").sample(range(size), limit)))
