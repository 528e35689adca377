"""fedloom: federated LoRA fine-tuning in which every client brings what it can, and nobody waits for the slowest.

The names below are the public ones. They are imported when first used, so that the command line starts quickly.
"""

from __future__ import annotations

import gc
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedloom.aggregate.ace import ACE
    from fedloom.aggregate.adam import Adam
    from fedloom.aggregate.averaged import Averaged
    from fedloom.aggregate.ca2fl import CA2FL
    from fedloom.aggregate.clip import Clip
    from fedloom.aggregate.fadas import FADAS
    from fedloom.aggregate.fedex import FedEx
    from fedloom.aggregate.fedit import FedIT
    from fedloom.aggregate.fedplora import FedPLoRA
    from fedloom.aggregate.fedsa import FedSA
    from fedloom.aggregate.fedsvd import FedSVD
    from fedloom.aggregate.ffa import FFA
    from fedloom.aggregate.flexlora import FlexLoRA
    from fedloom.aggregate.flora import FLoRA
    from fedloom.aggregate.folded_delta import FoldedDelta
    from fedloom.aggregate.hetlora import HetLoRA
    from fedloom.aggregate.hlora import HLoRA
    from fedloom.aggregate.lora_a2 import LoRAA2
    from fedloom.aggregate.momentum import Momentum
    from fedloom.aggregate.noise import Noise
    from fedloom.aggregate.product_delta import ProductDelta
    from fedloom.aggregate.raflora import RaFLoRA
    from fedloom.aggregate.rolora import RoLoRA
    from fedloom.aggregate.scaffold import Scaffold
    from fedloom.availability import Availability
    from fedloom.codec import DeltaInt8, Exact, Half
    from fedloom.data.axes import LengthDirichlet, Mixture, QualityDirichlet, Shuffled, Skew
    from fedloom.data.context import labels, ones, quality, words
    from fedloom.data.corrupted import Corrupted
    from fedloom.data.instructions import Instructions
    from fedloom.data.load import Hub, Rows, Table
    from fedloom.data.mixture import ClientDirichlet
    from fedloom.data.partition import IID, ByClient, LabelDirichlet, QuantityDirichlet, Shards
    from fedloom.data.tickets import Tickets
    from fedloom.delays import LARGE_DELAYS, DelayClass, DelayClasses, Delays, ExponentialDelays
    from fedloom.devicefile import AvailabilityFile, DeviceFile, FedScaleDevices
    from fedloom.errors import Refused
    from fedloom.faults import Faults
    from fedloom.group import ByRegion, BySpeed, Given, Member, NearIID, RandomGroups
    from fedloom.hierarchy import Everybody, Hierarchy
    from fedloom.histogram import noised, topics
    from fedloom.job import Job, Outcome, prepare
    from fedloom.plan.budget import Plan
    from fedloom.plan.depth import DepthByCapability, DepthByMemory, FixedDepth
    from fedloom.plan.earned import Earned
    from fedloom.plan.grouped import Planned
    from fedloom.plan.joint import Bandit, JointMemory, Scored, TimeAligned
    from fedloom.plan.paced import Paced
    from fedloom.plan.rank import FixedRank, RandomRank, RankByCapability, RankByData
    from fedloom.run import Run
    from fedloom.schedule.fedasync import FedAsync
    from fedloom.schedule.fedbuff import FedBuff
    from fedloom.schedule.fedfa import FedFa
    from fedloom.schedule.immediate import Immediate
    from fedloom.schedule.rounds import Rounds
    from fedloom.schedule.staleness import Constant, Hinge, Polynomial
    from fedloom.schedule.weights import ByQuality, by_examples, by_text, by_tokens, by_work, uniform
    from fedloom.server import Limits, Server
    from fedloom.study import Study
    from fedloom.train.settings import Engine, Generation, LoRA, Training, constant, cosine, linear
    from fedloom.treestate import Link
    from fedloom.world import Capabilities, Capability, Tier, World

__version__ = "0.1.0"

_HOMES = {
    "availability": ("Availability",),
    "codec": ("DeltaInt8", "Exact", "Half"),
    "data.axes": ("LengthDirichlet", "Mixture", "QualityDirichlet", "Shuffled", "Skew"),
    "data.context": ("labels", "ones", "quality", "words"),
    "data.corrupted": ("Corrupted",),
    "data.instructions": ("Instructions",),
    "data.load": ("Hub", "Rows", "Table"),
    "data.mixture": ("ClientDirichlet",),
    "data.partition": ("IID", "ByClient", "LabelDirichlet", "QuantityDirichlet", "Shards"),
    "data.tickets": ("Tickets",),
    "delays": ("LARGE_DELAYS", "DelayClass", "DelayClasses", "Delays", "ExponentialDelays"),
    "devicefile": ("AvailabilityFile", "DeviceFile", "FedScaleDevices"),
    "errors": ("Refused",),
    "faults": ("Faults",),
    "group": ("ByRegion", "BySpeed", "Given", "Member", "NearIID", "RandomGroups"),
    "hierarchy": ("Everybody", "Hierarchy"),
    "histogram": ("noised", "topics"),
    "job": ("Job", "Outcome", "prepare"),
    "plan.budget": ("Plan",),
    "plan.depth": ("DepthByCapability", "DepthByMemory", "FixedDepth"),
    "plan.earned": ("Earned",),
    "plan.grouped": ("Planned",),
    "plan.paced": ("Paced",),
    "plan.joint": ("Bandit", "JointMemory", "Scored", "TimeAligned"),
    "plan.rank": ("FixedRank", "RandomRank", "RankByCapability", "RankByData"),
    "run": ("Run",),
    "schedule.staleness": ("Constant", "Hinge", "Polynomial"),
    "schedule.weights": ("ByQuality", "by_examples", "by_text", "by_tokens", "by_work", "uniform"),
    "server": ("Limits", "Server"),
    "study": ("Study",),
    "train.settings": ("Engine", "Generation", "LoRA", "Training", "constant", "cosine", "linear"),
    "treestate": ("Link",),
    "world": ("Capabilities", "Capability", "Tier", "World"),
}
_POLICIES = ("aggregate", "schedule")
"""Folders with one method a file: a public class in them is found by looking, so that a new file needs no line here."""
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ACE",
    "CA2FL",
    "FADAS",
    "FFA",
    "IID",
    "LARGE_DELAYS",
    "Adam",
    "Availability",
    "AvailabilityFile",
    "Averaged",
    "Bandit",
    "ByClient",
    "ByQuality",
    "ByRegion",
    "BySpeed",
    "Capabilities",
    "Capability",
    "ClientDirichlet",
    "Clip",
    "Constant",
    "Corrupted",
    "DelayClass",
    "DelayClasses",
    "Delays",
    "DeltaInt8",
    "DepthByCapability",
    "DepthByMemory",
    "DeviceFile",
    "Earned",
    "Engine",
    "Everybody",
    "Exact",
    "ExponentialDelays",
    "FLoRA",
    "Faults",
    "FedAsync",
    "FedBuff",
    "FedEx",
    "FedFa",
    "FedIT",
    "FedPLoRA",
    "FedSA",
    "FedSVD",
    "FedScaleDevices",
    "FixedDepth",
    "FixedRank",
    "FlexLoRA",
    "FoldedDelta",
    "Generation",
    "Given",
    "HLoRA",
    "Half",
    "HetLoRA",
    "Hierarchy",
    "Hinge",
    "Hub",
    "Immediate",
    "Instructions",
    "Job",
    "JointMemory",
    "LabelDirichlet",
    "LengthDirichlet",
    "Limits",
    "Link",
    "LoRA",
    "LoRAA2",
    "Member",
    "Mixture",
    "Momentum",
    "NearIID",
    "Noise",
    "Outcome",
    "Paced",
    "Plan",
    "Planned",
    "Polynomial",
    "ProductDelta",
    "QualityDirichlet",
    "QuantityDirichlet",
    "RaFLoRA",
    "RandomGroups",
    "RandomRank",
    "RankByCapability",
    "RankByData",
    "Refused",
    "RoLoRA",
    "Rounds",
    "Rows",
    "Run",
    "Scaffold",
    "Scored",
    "Server",
    "Shards",
    "Shuffled",
    "Skew",
    "Study",
    "Table",
    "Tickets",
    "Tier",
    "TimeAligned",
    "Training",
    "World",
    "by_examples",
    "by_text",
    "by_tokens",
    "by_work",
    "constant",
    "cosine",
    "labels",
    "linear",
    "noised",
    "ones",
    "prepare",
    "quality",
    "topics",
    "uniform",
    "words",
]


def __getattr__(name: str) -> Any:
    """Import a public name from where it lives."""
    if name in _HOME:
        return getattr(_imported(f"fedloom.{_HOME[name]}"), name)
    if name[0].isupper():
        for folder in _POLICIES:
            for module in iter_modules(import_module(f"fedloom.{folder}").__path__):
                home = f"fedloom.{folder}.{module.name}"
                found = getattr(import_module(home), name, None)
                if isinstance(found, type) and found.__module__ == home:
                    return found
    raise AttributeError(f"module 'fedloom' has no attribute {name!r}")


def _imported(name: str) -> Any:
    """The module. No garbage is collected on the way: torch and transformers make a million objects that all stay."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        return import_module(name)
    finally:
        if collecting:
            gc.enable()
