"""Draw of the clients that start next, in a time that does not depend on how many there are."""

from __future__ import annotations

from fedloom.core.policies import Fleet
from fedloom.core.seeds import derive
from fedloom.core.types import ClientId


def draw_idle(fleet: Fleet, count: int, stream: str = "draw", first: int | None = None) -> list[ClientId]:
    """Return `count` different idle clients (all, if there are fewer), every choice equally likely. Cost: O(count).

    A Fisher-Yates shuffle of the row of idle clients that ends after `count` steps and notes only what it moved. The k-th
    draw is number `first` + k of its stream: that of the task that will be made, so that a client who starts alone is drawn like
    one of many.
    """
    size, moved, chosen = len(fleet.idle), dict[int, int](), list[ClientId]()
    first = fleet.tasks if first is None else first
    for k in range(min(count, size)):
        place = k + derive(fleet.seed, stream, first + k) % (size - k)
        chosen.append(fleet.idle.at(moved.get(place, place)))
        moved[place] = moved.get(k, k)
    return chosen


def draw_least_worked(fleet: Fleet, count: int, choices: int) -> list[ClientId]:
    """Draw `choices` times as many idle clients at random; return the `count` that will have worked the fewest seconds after a task.

    So clients get equal time and not equal numbers of tasks: a slot is not held by slow ones most of the time, and each brings what
    it can. A client's next task is taken to last as long as those that it ended did on average; one that has ended none comes first.
    With 1 choice this is `draw_idle`. A few are enough for nearly equal shares (Mitzenmacher, "The Power of Two Choices in Randomized
    Load Balancing", 2001), so nothing has to be sorted but they. Cost: O(count * choices).
    """
    if choices == 1:
        return draw_idle(fleet, count)
    drawn = draw_idle(fleet, count * choices, "least worked", fleet.tasks * choices)

    def seconds(client: ClientId) -> float:
        worked = fleet.work_seconds.get(client, 0.0)
        return worked + worked / max(1, fleet.dispatched.get(client, 0))

    return sorted(drawn, key=seconds)[: max(0, count)]


def refill(fleet: Fleet, slots: int, uploader_goes_on: bool) -> list[ClientId]:
    """Return an idle client for each free slot: drawn at random, or the last one to answer before the others.

    Where there are no more clients than slots, both are the same: the one that answered is the only one idle.
    """
    free = slots - len(fleet.busy)
    drawn = draw_idle(fleet, free)
    latest = fleet.latest
    if not uploader_goes_on or not drawn or latest is None or latest not in fleet.idle or latest in drawn:
        return drawn
    return [latest, *drawn[:-1]]
