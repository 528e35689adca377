"""AG News on a small encoder: what does it cost that nobody sees a single answer?

    python experiments/summed_groups.py [--quick [--cell NAME]] [--summary] [--workers N]

The federation of `agnews.py` (20 clients, label Dirichlet 0.5, ranks 2/4/8 by device, the learning rates that were best there) in two
groups of ten that all take part in each version. `seen` groups merge the answers of their members, who weigh alike; `summed` groups
sum whole numbers of 16 bits, and methods that add products take the product of mean factors for the mean of products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import mean

from agnews import MIXED, RATES, TARGET, federated, start
from grid import Grid, Line, interval, main, paired

from fedloom import Hierarchy, RandomGroups, Rounds, Run, Secure, uniform

GROUPS = RandomGroups(2)
HOW = {
    "seen": Hierarchy(GROUPS, rounds=1, schedule=Rounds(cohort_size=10, weigh=uniform)),
    "summed": Hierarchy(GROUPS, rounds=1, secure=Secure(least=3)),
}
METHODS = ("product-delta", "hlora", "raflora", "ffa", "fedsvd", "fedit-padded")


def grouped(method: str, how: str, seed: int) -> Run:
    """One cell."""
    schedule = Rounds(cohort_size=2)
    made = {"aggregator": MIXED[method], "hierarchy": HOW[how], "schedule": schedule}
    return federated(seed, f"{method}-{how}", RATES[method], **made)


CELLS: dict[str, Callable[[int], Run]] = {
    f"{method}-{how}": partial(grouped, method, how) for method in METHODS for how in HOW
}


def summary(found: Sequence[Line]) -> Line:
    """Paired differences of summed to seen groups, in points, with 95 % intervals."""
    gaps = {method: paired(found, f"{method}-summed", f"{method}-seen") for method in METHODS}
    return {
        "seeds": len({line["seed"] for line in found}),
        **{f"{method}_points": [round(mean(one), 2), interval(one)] for method, one in gaps.items() if one},
    }


GRID = Grid("summed_groups", CELLS, (0, 1, 2), TARGET, start, summary)

if __name__ == "__main__":
    main(GRID)
