"""Masked sums: whether each is that of the plain integers, and what it takes to open one when 30 % of 100 members are lost.

Members are lost half before they send values, half after; in the timed case all before, which costs the group most: it then takes
off each lost member's masks with all its neighbours. The timed vector is the rank-8 adapter of a model of 1B parameters (all linear
layers of Llama-3.2-1B: 5.6 million numbers; `--quick`: 1 million), the time that of the group alone, from the first masked values
to the sum.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from tests.support.masked_sums import masked_sum, play, round_terms, whole_numbers

CASES = tuple((count, share) for count in (3, 10, 50, 100) for share in (0.0, 0.1, 0.3))
QUICK = tuple(case for case in CASES if case[0] <= 10)
NUMBERS, QUICK_NUMBERS = 5_636_096, 1_000_000
MEMBERS, LOST = 100, 30


def figures(quick: bool) -> Mapping[str, object]:
    """Whether all sums are exact, and the processor time to open the large one (s)."""
    exact = all(sum_is_exact(count, share) for count, share in (QUICK if quick else CASES))
    seconds, large_is_exact = opening_seconds(QUICK_NUMBERS if quick else NUMBERS)
    return {"sum_exact": exact and large_is_exact, "lost_thirty_percent_seconds": round(seconds, 2)}


def sum_is_exact(count: int, share: float) -> bool:
    """Whether a sum over so many members is that of the integers of those who are in it, with a share of them lost."""
    terms = round_terms(count, length=1000)
    values, lost = whole_numbers(terms), terms.members[: int(share * count)]
    total, survivors = masked_sum(terms, values, lost_before=lost[::2], lost_after=lost[1::2])
    exact = bool((total == sum(values[one] for one in survivors)).all()) and len(survivors) == count - len(lost[::2])
    print(f"   {count} members, {len(lost)} lost: {'exact' if exact else 'WRONG'}")
    return exact


def opening_seconds(numbers: int) -> tuple[float, bool]:
    """Processor time of the group from the first masked values to the sum (s), and whether the sum is exact."""
    terms = round_terms(MEMBERS, length=numbers)
    group, members, sent = play(terms, {}, "mask")
    want, seconds = torch.zeros(numbers, dtype=torch.int64), 0.0
    for place, name in enumerate(terms.members[LOST:]):
        values = numbers_of(place, numbers)
        masked, want = members[name].mask(sent[name], values), want + values  # type: ignore[arg-type]
        began = time.process_time()
        group.receive(masked)
        seconds += time.process_time() - began
    began, own = time.process_time(), 0.0
    for step in ("agree", "open"):
        for name, message in group.advance().items():
            asked = time.process_time()
            reply = getattr(members[name], step)(message)
            own += time.process_time() - asked
            group.receive(reply)
    group.advance()
    seconds += time.process_time() - began - own
    print(f"   {MEMBERS} members, {LOST} lost, {numbers:,} numbers: {seconds:.1f} s of processor time")
    return seconds, bool((group.total == want).all())


def numbers_of(seed: int, numbers: int) -> torch.Tensor:
    """The values of a member, over the whole range of 16 bits."""
    return torch.randint(-(2**15) + 1, 2**15, (numbers,), generator=torch.Generator().manual_seed(seed))
