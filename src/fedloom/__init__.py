"""fedloom: federated LoRA fine-tuning in which every client brings what it can, and nobody waits for the slowest.

The names below are the public ones. They are imported when first used, so that the command line starts quickly.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedloom.aggregate.fedit import FedIT
    from fedloom.aggregate.hlora import HLoRA
    from fedloom.aggregate.product_delta import ProductDelta
    from fedloom.aggregate.raflora import RaFLoRA
    from fedloom.data.load import Hub, Rows, Table
    from fedloom.data.partition import IID, ByClient, LabelDirichlet, QuantityDirichlet, Shards
    from fedloom.data.tickets import Tickets
    from fedloom.errors import Refused
    from fedloom.job import Job, Outcome, prepare
    from fedloom.plan.budget import Plan
    from fedloom.plan.rank import FixedRank, RandomRank, RankByCapability, RankByData
    from fedloom.run import Run
    from fedloom.schedule.rounds import Rounds
    from fedloom.schedule.weights import by_examples, by_tokens, uniform
    from fedloom.server import Limits, Server
    from fedloom.train.settings import LoRA, Training, constant, cosine, linear
    from fedloom.world import Tier, World

__version__ = "0.1.0"

_HOMES = {
    "aggregate.fedit": ("FedIT",),
    "aggregate.hlora": ("HLoRA",),
    "aggregate.product_delta": ("ProductDelta",),
    "aggregate.raflora": ("RaFLoRA",),
    "data.load": ("Hub", "Rows", "Table"),
    "data.partition": ("IID", "ByClient", "LabelDirichlet", "QuantityDirichlet", "Shards"),
    "data.tickets": ("Tickets",),
    "errors": ("Refused",),
    "job": ("Job", "Outcome", "prepare"),
    "plan.budget": ("Plan",),
    "plan.rank": ("FixedRank", "RandomRank", "RankByCapability", "RankByData"),
    "run": ("Run",),
    "schedule.rounds": ("Rounds",),
    "schedule.weights": ("by_examples", "by_tokens", "uniform"),
    "server": ("Limits", "Server"),
    "train.settings": ("LoRA", "Training", "constant", "cosine", "linear"),
    "world": ("Tier", "World"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "IID",
    "ByClient",
    "FedIT",
    "FixedRank",
    "HLoRA",
    "Hub",
    "Job",
    "LabelDirichlet",
    "Limits",
    "LoRA",
    "Outcome",
    "Plan",
    "ProductDelta",
    "QuantityDirichlet",
    "RaFLoRA",
    "RandomRank",
    "RankByCapability",
    "RankByData",
    "Refused",
    "Rounds",
    "Rows",
    "Run",
    "Server",
    "Shards",
    "Table",
    "Tickets",
    "Tier",
    "Training",
    "World",
    "by_examples",
    "by_tokens",
    "constant",
    "cosine",
    "linear",
    "prepare",
    "uniform",
]


def __getattr__(name: str) -> object:
    """Import a public name from where it lives."""
    if name not in _HOME:
        raise AttributeError(f"module 'fedloom' has no attribute {name!r}")
    return getattr(import_module(f"fedloom.{_HOME[name]}"), name)
