"""Who starts next: idle clients drawn at random, in a time that does not depend on how many there are."""

from __future__ import annotations

from fedloom.seeds import derive
from fedloom.types import ClientId, Fleet


def draw(fleet: Fleet, count: int) -> list[ClientId]:
    """`count` different idle clients (all, if there are fewer), every choice equally likely. Cost: O(count).

    A Fisher-Yates shuffle of the row of idle clients that ends after `count` steps and notes only what it moved. The k-th
    draw is named after the number that the task will have, so that a client who starts alone is drawn like one of many.
    """
    size, moved, chosen = len(fleet.idle), dict[int, int](), list[ClientId]()
    for k in range(min(count, size)):
        place = k + derive(fleet.seed, "draw", fleet.tasks + k) % (size - k)
        chosen.append(fleet.idle.at(moved.get(place, place)))
        moved[place] = moved.get(k, k)
    return chosen


def refill(fleet: Fleet, places: int, uploader_goes_on: bool) -> list[ClientId]:
    """An idle client for each of `places` that is free: drawn at random, or the last one to answer before the others.

    Where no more clients are there than places, both are the same: the one who answered is the only one idle.
    """
    free = places - len(fleet.busy)
    drawn = draw(fleet, free)
    latest = fleet.latest
    if not uploader_goes_on or not drawn or latest is None or latest not in fleet.idle or latest in drawn:
        return drawn
    return [latest, *drawn[:-1]]
