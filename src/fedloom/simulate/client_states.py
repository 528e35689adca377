"""What stays at clients between their tasks, and where a simulation keeps it: in memory, or in files while the clients are idle.

A client's state is of two kinds. Private sides and control variates are used in each of its tasks. Optimiser moments and the residual
of error feedback have a number or two for each of the adapter, and mean something in one coordinate system only (`TaskStart.basis`):

- In "product" space a merge rotates the factors. What an answer leaves is dropped with the next version; until then its client may
  train once more on the version that it had.
- Else the coordinates stay, or come back (alternating methods), and the state lasts. It is put into a `StateStore`, and read again
  when its client trains and has a use for it. Without a store it stays in memory.

What is dropped would never have been used, and that follows from events alone: a run has the same bytes in either way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from fedloom.core.events import Cancel, Command, InsideEdge, Publish, Report, Stop
from fedloom.core.types import ClientId, ClientState, Task

_BASIS = re.compile(r"(?P<server>\d+:)?(?P<number>\d+)/")
"""How a server names coordinates (`TaskStart.basis`): the number of its model's, at an edge behind that of the edge's task."""


@dataclass(frozen=True, slots=True)
class StoredState:
    """A client state that was put into a store.

    Fields:
        name: its name there.
        basis: coordinate system of its moments and its residual.
        lasting: whether it also holds what is used in any coordinates: private sides or a control variate.
    """

    name: str
    basis: str
    lasting: bool


KeptState: TypeAlias = ClientState | StoredState
"""A client state as it is kept."""


class StateStore(Protocol):
    """Keeps client states outside the memory."""

    def put(self, state: ClientState, task: int) -> str:
        """Keep the state that this task left, and return its name."""
        ...

    def get(self, name: str) -> ClientState:
        """Return the state of this name. Raises Refused where it is damaged or gone."""
        ...


@dataclass(slots=True)
class ClientStates:
    """The states of all clients between their tasks.

    Fields:
        store: where states are put that last (None: they stay in memory).
        rotates: whether a version may have coordinates of its own ("product" space).
        settled: the state of each client of which an answer was accepted.
        newest: number of the newest coordinates of each server ("": the only one; "N:": the edge that works on task N).
        recent: by server, clients with states that its next version may make useless, each with the task that left it.
    """

    store: StateStore | None = None
    rotates: bool = False
    settled: dict[ClientId, KeptState] = field(default_factory=dict)
    newest: dict[str, float] = field(default_factory=dict)
    recent: dict[str, list[tuple[ClientId, int]]] = field(default_factory=dict)

    def before(self, task: Task) -> ClientState:
        """Return what the client of a task trains with. What it has no use for is not read."""
        kept = self.settled.get(task.client)
        if isinstance(kept, StoredState) and not kept.lasting and kept.basis != task.start.basis:
            return ClientState()
        return self.state_of(task.client)

    def state_of(self, client: ClientId) -> ClientState:
        """Return the state of a client; an empty one if none of its answers was accepted. Raises Refused."""
        kept = self.settled.get(client)
        if isinstance(kept, StoredState):
            assert self.store is not None
            return self.store.get(kept.name)
        return kept or ClientState()

    def keep(self, state: ClientState, task: int) -> KeptState:
        """Return the state that a task left, as it is kept from now on."""
        return self.useful(state) if self._server_of(state) else self._put(state, task)

    def settle(self, client: ClientId, state: KeptState, task: int) -> None:
        """Let the state take effect that an accepted answer to this task left."""
        self.settled[client] = state = self.useful(state)
        if place := self._server_of(state):
            self.recent.setdefault(place[0], []).append((client, task))

    def follow(self, commands: Iterable[Command]) -> None:
        """Drop what is of no use any more after these commands: there is a new version, or an edge has ended its task."""
        for command in commands if self.rotates else ():
            match command:
                case Publish(_, model, _):
                    self._move_on("", model.basis)
                case InsideEdge(_, number, Publish(_, model, _)):
                    self._move_on(f"{number}:", model.basis)
                case InsideEdge(_, number, Report() | Stop() | Cancel()):
                    self._move_on(f"{number}:", math.inf)
                    del self.newest[f"{number}:"]

    def useful(self, state: KeptState) -> KeptState:
        """Return the state without what belongs to coordinates that are gone."""
        place = self._server_of(state)
        return ClientState(state.basis) if place and place[1] < self.newest.get(place[0], 0) else state

    def _move_on(self, server: str, newest: float) -> None:
        """Note the newest coordinates of a server. What is in earlier ones is dropped, and what is in these lasts."""
        self.newest[server] = newest
        for client, task in self.recent.pop(server, ()):
            self.settled[client] = self._put(self.useful(self.settled[client]), task)

    def _put(self, state: KeptState, task: int) -> KeptState:
        """Put a state into the store, if there is one and anything to put."""
        if self.store is None or isinstance(state, StoredState):
            return state
        lasting = state.private is not None or state.control is not None
        if not lasting and not _goes_with_basis(state):
            return state
        return StoredState(self.store.put(state, task), state.basis, lasting)

    def _server_of(self, state: KeptState) -> tuple[str, int] | None:
        """Return the server (as in `newest`) whose next version may make all of a state useless, and the number of its coordinates.

        None: the state lasts, or holds nothing.
        """
        if not self.rotates or isinstance(state, StoredState) or state.private is not None or state.control is not None:
            return None
        found = _BASIS.match(state.basis) if _goes_with_basis(state) else None
        return (found["server"] or "", int(found["number"])) if found else None


def _goes_with_basis(state: ClientState) -> bool:
    """Whether a state holds numbers that mean something in its coordinates only."""
    return bool(state.moments) or state.residual is not None


def stored_names(states: Iterable[KeptState]) -> set[str]:
    """Return the names of those that lie in a store."""
    return {state.name for state in states if isinstance(state, StoredState)}
