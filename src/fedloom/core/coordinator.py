"""Interface between a driver and what it drives: a server, or a tree of servers that looks like one.

A driver delivers events in order of time and carries out commands. It imports this protocol and neither `Server` nor anything of the
hierarchy; `server.Server` and the servers of `hierarchy` implement it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from fedloom.core.events import Command, Event
from fedloom.core.model_shape import Shape
from fedloom.core.policies import Fleet
from fedloom.core.types import ClientId, Model, Profile, Task


class StateView(Protocol):
    """State of a coordinator as drivers and observers read it. `State` has all of it; a tree shows its edges' states as one."""

    @property
    def model(self) -> Model:
        """The global model."""
        ...

    @property
    def first(self) -> Model:
        """The model of version 0."""
        ...

    @property
    def now(self) -> float:
        """The time of the last event (s)."""
        ...

    @property
    def version(self) -> int:
        """The number of the global version."""
        ...

    @property
    def stopped(self) -> bool:
        """Whether the run is over."""
        ...

    @property
    def failures(self) -> int:
        """Tasks that failed in a row."""
        ...

    @property
    def busy(self) -> Mapping[int, Task]:
        """Outstanding tasks of clients, by number."""
        ...

    @property
    def idle(self) -> Mapping[ClientId, Profile]:
        """Clients without a task."""
        ...

    @property
    def resting(self) -> Mapping[ClientId, Profile]:
        """Clients without a task that may not be given one now."""
        ...

    @property
    def working(self) -> Mapping[ClientId, tuple[Profile, int]]:
        """Clients with a task, and its number."""
        ...

    @property
    def registered(self) -> Mapping[ClientId, int]:
        """Examples with which each client joined."""
        ...

    @property
    def dispatched(self) -> Mapping[ClientId, int]:
        """Tasks sent to each client so far."""
        ...

    @property
    def pruned(self) -> Mapping[ClientId, int]:
        """The rank to which a client pruned itself."""
        ...


class Coordinator(Protocol):
    """Whatever a driver drives: a flat server, a tree of servers, the root over remote edges, or the edge of a region.

    A driver delivers events in order of time, carries out the commands, and asks `wake` when to come again. It needs to know nothing
    of what stands behind this protocol.
    """

    @property
    def state(self) -> StateView:
        """The state as far as a driver may read it."""
        ...

    @property
    def shape(self) -> Shape:
        """Sizes of the model."""
        ...

    @property
    def max_in_flight(self) -> int:
        """The most clients that may be at work at once."""
        ...

    @property
    def edges(self) -> tuple[ClientId, ...]:
        """Edges that are part of this process, in the order of their blocks of task numbers; empty without any."""
        ...

    def handle(self, now: float, event: Event) -> list[Command]:
        """Return what to do about `event`, in the order in which it is to be done."""
        ...

    def wake(self) -> float | None:
        """Return the latest time at which to call `handle` again; None: not before another event."""
        ...

    def fleet(self) -> Fleet:
        """Return the view that policies get."""
        ...

    def parts_to_save(self) -> tuple[object, ...]:
        """Return the objects whose fields a checkpoint saves, and restores in place."""
        ...

    def manifest_sections(self) -> dict[str, Any]:
        """Return what only the coordinator can tell a manifest: the groups of clients, and by what they are compared."""
        ...
