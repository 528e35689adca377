"""Near-IID groups against random ones: how near, how much less waiting, how fast, and how much of it noise leaves.

    python -m bench.group [--quick]

80, 1,000 and 10,000 clients in groups of ten; 120,000 labels of 4 classes (as AG News) or 10, divided by Dirichlet(0.1) over the
clients; a client's seconds are five steps of its class (30 : 40 : 10 clients, 1 : 2.5 : 6 in speed, 0.5 s the slowest) and 9.6 Mbit
down and up at U(1, 30) Mbit/s. KL is that of a group's labels from all, in nats, mean over groups, always of the true labels;
random is the mean over 20 random groupings of the same sizes. At an epsilon, clients are grouped by what `histogram.noised` lets
them tell. Medians over the seeds (minimum - maximum). Regrouped is after a tenth of the clients became four times slower or faster.
Seconds are wall time on one thread, of 10,000 clients processor time. Fleets above `near_iid.LARGE` are searched by samples: KL and
utility of that search over those of the search of all swaps are told of fleets in which both can run. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any

import torch

from bench.timing import against
from fedloom.core.seeds import rng
from fedloom.data.private_histogram import noised
from fedloom.hierarchy.grouping import Grouping, Groups, Member, NearIID, RandomGroups
from fedloom.hierarchy.near_iid import build_groups, improve_by_swaps, improve_in_pairs, label_divergence
from tests.support.skewed_fleet import fleet

SIZE, DEALS = 10, 20
EPSILONS = (10.0, 1.0, 0.3, 0.1, 0.03)
STATED = 0.3  # the epsilon at which the bar must still be met
BAR = 5.0
LARGE, LARGE_BAR = 10_000, 20.0  # clients, and the processor seconds that they may take
SAMPLED_BAR = 1.1  # KL of the search by samples over that of the search of all swaps
STEPS, PAYLOAD_BITS = 5, 9.6e6


def linked(clients: int, classes: int, seed: int) -> list[Member]:
    """The fleet; seconds are of a round: some steps, and an adapter down and up a link of the client's own."""

    def seconds(one: Member) -> float:
        return STEPS * one.seconds + 2.0 * PAYLOAD_BITS / rng(seed, "link", one.client).uniform(1e6, 3e7)

    return [replace(one, seconds=seconds(one)) for one in fleet(clients, classes, seed)]


def terms(groups: Groups, known: dict[str, Member]) -> tuple[float, float]:
    """Mean KL of the groups from the whole, and mean waiting in seconds."""
    sums = torch.stack([torch.tensor([known[client].labels for client in group]).double().sum(0) for group in groups])
    whole = sums.sum(0)
    times = [[known[client].seconds for client in group] for group in groups]
    return float(label_divergence(sums, (whole / whole.sum()).log()).mean()), fmean(
        max(own) - fmean(own) for own in times
    )


@dataclass(frozen=True, slots=True)
class Case:
    """What one fleet gave."""

    kl: float
    waiting: float
    seconds: float
    at: dict[float, float]
    kept: float
    saved: float


def measured(clients: int, classes: int, seed: int) -> Case:
    """One fleet, grouped by what is true and by what is told."""
    everyone = linked(clients, classes, seed)
    known = {member.client: member for member in everyone}
    how, chance = NearIID(clients // SIZE), RandomGroups(clients // SIZE)
    far, wait = (
        fmean(column) for column in zip(*(terms(chance(everyone, deal), known) for deal in range(DEALS)), strict=True)
    )
    begun = time.perf_counter()
    groups = how(everyone, seed)
    seconds = time.perf_counter() - begun
    ours, waited = terms(groups, known)
    at = {epsilon: far / terms(noisy_groups(how, everyone, epsilon, seed), known)[0] for epsilon in EPSILONS}
    return Case(far / ours, wait / waited, seconds, at, *again(how, groups, everyone, seed))


def again(how: NearIID, groups: Groups, everyone: Sequence[Member], seed: int) -> tuple[float, float]:
    """After a tenth of the clients became four times slower or faster: who stayed, and the share of new groups' saving in waiting."""
    draw = rng(seed, "drift")
    now = [
        replace(one, seconds=one.seconds * draw.choice((0.25, 4.0))) if draw.random() < 0.1 else one for one in everyone
    ]
    after, known = how.regrouped(groups, now, seed), {one.client: one for one in now}
    stayed = sum(len(set(old) & set(new)) for old, new in zip(groups, after, strict=True))
    old, kept, fresh = (terms(one, known)[1] for one in (groups, after, how(now, seed)))
    return stayed / len(now), (old - kept) / (old - fresh)


def noisy_groups(how: Grouping, everyone: Sequence[Member], epsilon: float, seed: int) -> Groups:
    """Groups by noisy histograms."""
    noisy = [replace(one, labels=noised(one.labels, epsilon, seed, one.client)) for one in everyone]
    return how(noisy, seed)


def row(clients: int, classes: int, seeds: range) -> dict[str, Any]:
    """Print a line of the table, and return its figures."""
    cases = [measured(clients, classes, seed) for seed in seeds]

    def spread(values: Sequence[float]) -> str:
        return f"{median(values):.3g} ({min(values):.3g} - {max(values):.3g})"

    kl = median(case.kl for case in cases)
    at = {epsilon: median(case.at[epsilon] for case in cases) for epsilon in EPSILONS}
    print(f"\n{clients} clients, {classes} classes, {clients // SIZE} groups of {SIZE}, {len(cases)} seeds")
    print(f"  KL, random over ours       {spread([case.kl for case in cases])}{against(kl, BAR)}")
    print(f"  waiting, random over ours  {spread([case.waiting for case in cases])}")
    print(f"  seconds                    {spread([case.seconds for case in cases])}")
    print(f"  regrouped: clients kept    {spread([case.kept for case in cases])}")
    print(f"  regrouped: waiting saved   {spread([case.saved for case in cases])} of what new groups save")
    for epsilon in EPSILONS:
        bar = against(at[epsilon], BAR) if epsilon == STATED else ""
        print(f"  KL ratio at epsilon {epsilon:<6g} {spread([case.at[epsilon] for case in cases])}{bar}", flush=True)
    return {
        "clients": clients,
        "classes": classes,
        "groups": clients // SIZE,
        "kl_ratio_random_over_ours": round(kl, 2),
        "seconds": round(median(case.seconds for case in cases), 3),
        "waiting_ratio_random_over_ours": round(median(case.waiting for case in cases), 3),
        "kept_when_regrouped": round(median(case.kept for case in cases), 3),
        "saved_when_regrouped": round(median(case.saved for case in cases), 3),
        "epsilon": STATED,
        "kl_ratio_at_epsilon": round(at[STATED], 2),
        "kl_ratio_by_epsilon": {f"{epsilon:g}": round(ratio, 2) for epsilon, ratio in at.items()},
    }


def large_row(groups: int, classes: int) -> dict[str, Any]:
    """Print and return what a large fleet takes, and how near its groups are."""
    everyone = linked(LARGE, classes, 0)
    known = {member.client: member for member in everyone}
    begun = time.process_time()
    found = NearIID(groups)(everyone, 0)
    seconds = time.process_time() - begun
    deals = [terms(RandomGroups(groups)(everyone, deal), known) for deal in range(3)]
    far, wait = (fmean(column) for column in zip(*deals, strict=True))
    ours, waited = terms(found, known)
    print(f"\n{LARGE} clients, {classes} classes, {groups} groups")
    print(f"  KL, random over ours       {far / ours:.3g}{against(far / ours, BAR)}")
    print(f"  waiting, random over ours  {wait / waited:.3g}")
    print(f"  processor seconds          {seconds:.3g} (at most {LARGE_BAR:g})", flush=True)
    return {
        "clients": LARGE,
        "classes": classes,
        "groups": groups,
        "cpu_seconds": round(seconds, 2),
        "kl_ratio_random_over_ours": round(far / ours, 2),
        "waiting_ratio_random_over_ours": round(wait / waited, 3),
    }


def sampled_row(clients: int, classes: int) -> dict[str, Any]:
    """Print and return the search by samples over the search of all swaps, from the same groups."""
    fleet = NearIID(clients // SIZE)._fleet(linked(clients, classes, 0), 0)
    begun = build_groups(fleet)
    swapped, sampled = improve_by_swaps(fleet, begun), improve_in_pairs(fleet, begun, 0)
    near = float(fleet.terms(sampled)[1].sum() / fleet.terms(swapped)[1].sum())
    utility = float(fleet.group_utility(sampled).sum() / fleet.group_utility(swapped).sum())
    print(f"\n{clients} clients, {classes} classes, by samples over all swaps")
    print(f"  KL {near:.3f} (at most {SAMPLED_BAR:g}), utility {utility:.3f}", flush=True)
    return {"clients": clients, "classes": classes, "kl": round(near, 3), "utility": round(utility, 3)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="bench.group", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed for 1,000 clients, three for 80; three minutes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = {80: range(3), 1_000: range(1)} if options.quick else {80: range(10), 1_000: range(5)}
    cases = [row(clients, classes, own) for clients, own in seeds.items() for classes in (4, 10)]
    large = [large_row(groups, classes) for groups, classes in ((LARGE // SIZE, 4), (LARGE // SIZE, 10), (8, 4))]
    both = [
        sampled_row(clients, classes)
        for clients in ((1_000,) if options.quick else (1_000, 2_000))
        for classes in (4, 10)
    ]
    print(json.dumps({"cases": cases, "large": large, "sampled_over_all_swaps": both}))


if __name__ == "__main__":
    main()
