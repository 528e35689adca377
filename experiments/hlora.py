"""What the three HLoRA experiments (MRPC, QQP, RTE) share: the methods, the federations, the rank policies, the summary.

All-MiniLM-L6-v2, LoRA on query and value, label Dirichlet 0.5, ranks 2/4/8. The full grid (every method, 20 and 100 clients,
three rank policies, three kinds of label skew) is for a machine with an accelerator: `--only '*' --device cuda --workers 4`.
Without `--only` the cells that matter most are run, which two cores can do. All methods of one experiment run at one learning
rate, found with centralised training: tuning each would take days on two cores.

Cells are METHOD, METHOD/mild (label Dirichlet 5), METHOD/mixture (`ClientDirichlet`, the skew of HLoRA's prototype), METHOD/100 (100
clients), METHOD/random and METHOD/by-data (the prototype's rank policies).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean

from grid import Grid, Line, interval, paired, rounds_to

from fedloom import (
    FFA,
    IID,
    ClientDirichlet,
    FedEx,
    FedIT,
    FedPLoRA,
    FedSVD,
    FixedRank,
    FlexLoRA,
    FLoRA,
    FoldedDelta,
    HetLoRA,
    HLoRA,
    LabelDirichlet,
    Limits,
    Plan,
    ProductDelta,
    RaFLoRA,
    RandomRank,
    RankByCapability,
    RankByData,
    RoLoRA,
    Rounds,
    Run,
    Training,
    by_examples,
    uniform,
)
from fedloom.core.policies import Aggregator
from fedloom.data.examples import Source
from fedloom.data.partition import Partition
from fedloom.plan.rank import RankRule
from fedloom.train.demo_model import minilm

DEFAULT = "product-delta"
METHODS: dict[str, Aggregator] = {
    "fedit-padded": FedIT(),
    "hetlora": HetLoRA(),
    "hlora-published": HLoRA(published_alpha=16.0),
    "hlora": HLoRA(),
    "flexlora": FlexLoRA(),
    "raflora": RaFLoRA(),
    "product-delta": ProductDelta(),
    "folded-delta": FoldedDelta(),
    "flora": FLoRA(),
    "ffa": FFA(),
    "rolora": RoLoRA(),
    "fedex": FedEx(),
    "fedplora": FedPLoRA(),
    "fedsvd": FedSVD(),
}
USUAL = (
    "centralised",
    "product-delta/mild",
    "fedit-padded/mild",
    "hlora-published/mild",
    "fedit-r8/mild",
    "hlora/mild",
    "product-delta",
    "fedit-padded",
)
"""What is run without `--only`, in this order."""


@dataclass(frozen=True)
class Study:
    """One data set: its source, the target fixed before the runs, and the size of a run."""

    name: str
    data: Source
    target: float
    client_size: int
    test_limit: int | None = None
    rate: float = 1e-3
    versions: int = 20
    cohort: int = 5
    steps: int = 16
    batch: int = 8
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    usual: tuple[str, ...] = USUAL

    @property
    def by_device(self) -> RankByCapability:
        """Ranks 2, 4 and 8 at half, three tenths and a fifth of the clients."""
        return RankByCapability(ranks=(2, 4, 8), upload_seconds=0.5)

    def run(
        self, seed: int, name: str, aggregator: Aggregator, rank: RankRule, partition: Partition, cohort: int
    ) -> Run:
        """One cell."""
        weigh = uniform if isinstance(aggregator, HetLoRA) else by_examples  # HetLoRA weighs by norms alone
        return Run(
            name=name.replace("/", "-"),
            model=str(minilm()),
            data=self.data,
            partition=partition,
            aggregator=aggregator,
            schedule=Rounds(cohort_size=cohort, weigh=weigh),
            plan=Plan(rank, self.steps),
            training=Training(learning_rate=self.rate, batch_size=self.batch, max_length=128),
            limits=Limits(versions=self.versions, evaluate_every=4),
            test_limit=self.test_limit,
            transfer=None,
            seed=seed,
            engine=None,
        )

    def centralised(self, seed: int) -> Run:
        """All data in one place: as many optimiser steps as the whole federation makes."""
        one = replace(self, steps=self.cohort * self.steps)
        return one.run(seed, "centralised", FedIT(), FixedRank(8), IID(clients=1), 1)

    def cells(self) -> dict[str, partial[Run]]:
        """The whole grid by name."""
        device, cohort = self.by_device, self.cohort
        settings: dict[str, tuple[RankRule, Partition, int]] = {
            "": (device, LabelDirichlet(20, 0.5), cohort),
            "/mild": (device, LabelDirichlet(20, 5.0), cohort),
            "/mixture": (device, ClientDirichlet(20, 0.5, self.client_size), cohort),
            "/100": (device, LabelDirichlet(100, 0.5), 2 * cohort),
            "/random": (RandomRank(2, 8), LabelDirichlet(20, 0.5), cohort),
            "/by-data": (RankByData(8), LabelDirichlet(20, 0.5), cohort),
        }
        found: dict[str, partial[Run]] = {"centralised": partial(self.centralised)}
        for suffix, (rank, partition, size) in settings.items():
            for fixed in (8, 2) if rank is device else ():
                name = f"fedit-r{fixed}{suffix}"
                found[name] = self._cell(name, FedIT(), FixedRank(fixed), partition, size)
            for method, aggregator in METHODS.items():
                name = f"{method}{suffix}"
                found[name] = self._cell(name, aggregator, rank, partition, size)
        return found

    def _cell(
        self, name: str, aggregator: Aggregator, rank: RankRule, partition: Partition, cohort: int
    ) -> partial[Run]:
        return partial(self.run, name=name, aggregator=aggregator, rank=rank, partition=partition, cohort=cohort)

    def grid(self) -> Grid:
        """The experiment for `grid.main`."""
        return Grid(self.name, self.cells(), self.seeds, self.target, start, partial(summary, self), self.usual)


def start(run: Run) -> Run:
    """One version, hardly scored: what two minutes allow."""
    return replace(run, limits=replace(run.limits, versions=1), test_limit=16)


def summary(study: Study, found: Sequence[Line]) -> Line:
    """The figures of the bars, paired over seeds, at label Dirichlet 0.5 and in the milder partition."""
    hard, mild = (figures(found, study.target, suffix) for suffix in ("", "/mild"))
    told = {f"{name}_mild": value for name, value in mild.items()} if mild["seeds"] else {}
    return {"default": DEFAULT, **hard, **told}


def figures(found: Sequence[Line], target: float, suffix: str) -> Line:
    """The default against FedIT and HLoRA as published in one kind of partition."""
    ours = f"{DEFAULT}{suffix}"
    padded, published = (paired(found, ours, f"{other}{suffix}") for other in ("fedit-padded", "hlora-published"))
    ratios = _ratios(found, target, ours, f"fedit-r8{suffix}")
    return {
        "seeds": len({line["seed"] for line in found if line["cell"] == ours}),
        "default_vs_fedit_padded_points": _mean(padded),
        "interval": interval(padded),
        "rounds_ratio_to_target": ratios["rounds"],
        "bytes_ratio": ratios["bytes"],
        "default_vs_hlora_published_points": _mean(published),
        "gap_to_centralised_points": _mean(paired(found, "centralised", ours)),
    }


def _ratios(found: Sequence[Line], target: float, one: str, other: str) -> Mapping[str, float | None]:
    """Rounds to the target, and bytes up and down, one cell over another; None if one never got there."""
    ours = {line["seed"]: line for line in found if line["cell"] == one}
    theirs = {line["seed"]: line for line in found if line["cell"] == other}
    pairs = [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
    rounds = [(rounds_to(a, target), rounds_to(b, target)) for a, b in pairs]
    known = [a / b for a, b in rounds if a and b]
    complete = len(known) == len(pairs)
    return {
        "rounds": _mean(known) if complete else None,
        "bytes": _mean([(a["bytes_up"] + a["bytes_down"]) / (b["bytes_up"] + b["bytes_down"]) for a, b in pairs]),
    }


def _mean(values: Sequence[float]) -> float | None:
    return round(mean(values), 3) if values else None
