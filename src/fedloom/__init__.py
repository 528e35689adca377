"""fedloom: federated LoRA fine-tuning in which every client brings what it can, and nobody waits for the slowest.

The names below are the public ones. They are imported when first used, so that the command line starts quickly.
"""

from __future__ import annotations

import gc
from importlib import import_module
from importlib.metadata import version
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
    from fedloom.core.codec import DeltaInt8, Exact, Half
    from fedloom.core.errors import Refused
    from fedloom.core.server import Limits, Server
    from fedloom.data.corrupted import Corrupted
    from fedloom.data.instructions import Instructions
    from fedloom.data.partition import IID, ByClient, ClientDirichlet, LabelDirichlet, QuantityDirichlet, Shards
    from fedloom.data.private_histogram import noised, topics
    from fedloom.data.skew import LengthDirichlet, Mixture, QualityDirichlet, Shuffled, Skew
    from fedloom.data.table import Hub, Rows, Table
    from fedloom.data.text_measures import labels, ones, quality, words
    from fedloom.data.tickets import Tickets
    from fedloom.hierarchy.grouping import ByRegion, BySpeed, Given, Member, NearIID, RandomGroups
    from fedloom.hierarchy.hierarchy import Everybody, Hierarchy
    from fedloom.hierarchy.joint_plan.bandit import Bandit
    from fedloom.hierarchy.joint_plan.best_round_time import BestRoundTime
    from fedloom.hierarchy.joint_plan.gradient_score import GradientScore
    from fedloom.hierarchy.joint_plan.joint_memory import JointMemory
    from fedloom.hierarchy.joint_plan.joint_plan import JointPlan
    from fedloom.hierarchy.joint_plan.loss_rate import LossRate
    from fedloom.hierarchy.joint_plan.time_aligned import TimeAligned
    from fedloom.hierarchy.tree_state import Link
    from fedloom.plan.budget import Plan
    from fedloom.plan.depth import DepthByCapability, DepthByMemory, FixedDepth
    from fedloom.plan.rank import FixedRank, RandomRank, RankByCapability, RankByData
    from fedloom.runs.execute import Outcome
    from fedloom.runs.job import Job
    from fedloom.runs.prepare import prepare
    from fedloom.runs.run import Run
    from fedloom.schedule.fedasync import FedAsync
    from fedloom.schedule.fedbuff import FedBuff
    from fedloom.schedule.fedfa import FedFa
    from fedloom.schedule.immediate import Immediate
    from fedloom.schedule.rounds import Rounds
    from fedloom.schedule.shared.staleness import Constant, Hinge, Polynomial
    from fedloom.schedule.shared.weights import ByQuality, by_examples, by_text, by_tokens, by_work, uniform
    from fedloom.simulate.availability import Availability
    from fedloom.simulate.delays import LARGE_DELAYS, DelayClass, DelayClasses, Delays, ExponentialDelays
    from fedloom.simulate.device_files import AvailabilityFile, DeviceFile, FedScaleDevices
    from fedloom.simulate.devices import Capabilities, Capability, Tier, World
    from fedloom.simulate.faults import Faults
    from fedloom.train.settings import Engine, Generation, LoRA, Training, constant, cosine, linear

__version__ = version("fedloom")

_HOMES = {
    "core.codec": ("DeltaInt8", "Exact", "Half"),
    "core.errors": ("Refused",),
    "core.server": ("Limits", "Server"),
    "data.corrupted": ("Corrupted",),
    "data.instructions": ("Instructions",),
    "data.partition": ("IID", "ByClient", "ClientDirichlet", "LabelDirichlet", "QuantityDirichlet", "Shards"),
    "data.private_histogram": ("noised", "topics"),
    "data.skew": ("LengthDirichlet", "Mixture", "QualityDirichlet", "Shuffled", "Skew"),
    "data.table": ("Hub", "Rows", "Table"),
    "data.text_measures": ("labels", "ones", "quality", "words"),
    "data.tickets": ("Tickets",),
    "hierarchy.grouping": ("ByRegion", "BySpeed", "Given", "Member", "NearIID", "RandomGroups"),
    "hierarchy.hierarchy": ("Everybody", "Hierarchy"),
    "hierarchy.joint_plan.bandit": ("Bandit",),
    "hierarchy.joint_plan.best_round_time": ("BestRoundTime",),
    "hierarchy.joint_plan.gradient_score": ("GradientScore",),
    "hierarchy.joint_plan.joint_memory": ("JointMemory",),
    "hierarchy.joint_plan.joint_plan": ("JointPlan",),
    "hierarchy.joint_plan.loss_rate": ("LossRate",),
    "hierarchy.joint_plan.time_aligned": ("TimeAligned",),
    "hierarchy.tree_state": ("Link",),
    "plan.budget": ("Plan",),
    "plan.depth": ("DepthByCapability", "DepthByMemory", "FixedDepth"),
    "plan.rank": ("FixedRank", "RandomRank", "RankByCapability", "RankByData"),
    "runs.execute": ("Outcome",),
    "runs.job": ("Job",),
    "runs.prepare": ("prepare",),
    "runs.run": ("Run",),
    "schedule.shared.staleness": ("Constant", "Hinge", "Polynomial"),
    "schedule.shared.weights": ("ByQuality", "by_examples", "by_text", "by_tokens", "by_work", "uniform"),
    "simulate.availability": ("Availability",),
    "simulate.delays": ("LARGE_DELAYS", "DelayClass", "DelayClasses", "Delays", "ExponentialDelays"),
    "simulate.device_files": ("AvailabilityFile", "DeviceFile", "FedScaleDevices"),
    "simulate.devices": ("Capabilities", "Capability", "Tier", "World"),
    "simulate.faults": ("Faults",),
    "train.settings": ("Engine", "Generation", "LoRA", "Training", "constant", "cosine", "linear"),
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
    "LossRate",
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
    "BestRoundTime",
    "Plan",
    "JointPlan",
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
    "GradientScore",
    "Server",
    "Shards",
    "Shuffled",
    "Skew",
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
