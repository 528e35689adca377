"""An edge in the place of a server, for the driver of a deployment."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from fedloom.core.events import ClientJoined, Command, Event, Reject, Report, Stop, TaskReceived
from fedloom.core.model_shape import Shape
from fedloom.core.policies import BudgetRule, Fleet
from fedloom.core.server import State
from fedloom.core.types import ClientId, GroupHistory, Profile, Task
from fedloom.hierarchy.edge import Edge, EdgeState
from fedloom.hierarchy.root_server import why_unplanned


@dataclass(slots=True)
class RegionServer:
    """An edge in the place of a server, as the driver sees it: it never stops, and how a task ended is put down in `done`.

    `plan` is that of the groups, if it learns: a site that it has nothing for is not let join. `mark` names what was asked from
    above, `begun` is when (seconds of the region).
    """

    rebuilt: ClassVar[frozenset[str]] = frozenset({"edge", "plan", "ended"})
    edge: Edge
    edge_state: EdgeState
    plan: BudgetRule | None = None
    digest: str = ""
    started: float = 0.0
    ended: tuple[Task, Report | Stop] | None = None

    @property
    def state(self) -> State:
        """The server's inside the edge."""
        return self.edge_state.server

    @property
    def shape(self) -> Shape:
        """Sizes of the model."""
        return self.edge.server.shape

    @property
    def max_in_flight(self) -> int:
        """The most sites that may be at work at once."""
        return self.edge.server.max_in_flight

    @property
    def edges(self) -> tuple[ClientId, ...]:
        """Nobody: sites hang on this edge alone."""
        return ()

    def parts_to_save(self) -> tuple[RegionServer]:
        """Return itself: its fields beside `rebuilt` are saved."""
        return (self,)

    def manifest_sections(self) -> dict[str, Any]:
        """Return nothing: a region writes no manifest of its own."""
        return {}

    def handle(self, now: float, event: Event) -> list[Command]:
        """As the edge does; that it gives its task up, for a new one too, stops nobody else."""
        self.edge.state = self.edge_state
        if isinstance(event, ClientJoined) and (reason := self._unfit(event.profile)):
            return [Reject(event.profile.client, 0, reason)]
        replaces = isinstance(event, TaskReceived) and self.state.outer is not None
        dropped = self.edge.drop_task(now) if replaces else []
        outer = event.task if isinstance(event, TaskReceived) else self.state.outer
        commands = [*dropped, *self.edge.handle(now, event)]
        for command in commands:
            if isinstance(command, Report | Stop) and outer is not None:
                self.ended = outer, command
        return [command for command in commands if not isinstance(command, Stop)]

    def wake(self) -> float | None:
        """When the edge wants to look."""
        return self.edge_state.due

    def fleet(self) -> Fleet:
        """What the server inside knows, whatever task the edge has."""
        self.edge.server.state = self.state  # also one that was restored
        return replace(self.edge.server.fleet(), outer=None)

    def _unfit(self, site: Profile) -> str | None:
        """Why the plan of the groups has nothing for one with this site in it."""
        alone = GroupHistory(site, (replace(site, most=None),))
        return self.plan and why_unplanned(self.plan, self.edge.server.fleet(), alone)
