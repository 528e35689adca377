"""A storm of malformed answers on a server with outstanding tasks: what was let in, what raised, what changed its state."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

from fedloom.core.codec import Codec, DeltaInt8, Exact, Half, HalfChange
from fedloom.core.events import Reject, UpdateArrived
from fedloom.core.schema import Malformed
from fedloom.core.server import Server
from fedloom.deploy.messages import answer as wire
from tests.support.malformed_files import BYTES_LIMIT, FILES
from tests.support.malformed_results import RESULTS, Thrown
from tests.support.scene import COHORT_OF_SIX, Scene, fingerprint, scene

CODECS: tuple[Codec, ...] = (Exact(), Half(), HalfChange(), DeltaInt8())


@dataclass(slots=True)
class Verdicts:
    """What became of the malformed answers, by kind."""

    tried: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    raised: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def show(self) -> None:
        """A line a kind, with one of the reasons that were given."""
        for kind, tried in self.tried.items():
            odd = [f"{n[kind]} {w}" for n, w in ((self.accepted, "ACCEPTED"), (self.raised, "RAISED")) if n[kind]]
            odd += [f"{self.changed[kind]} CHANGED THE STATE"] if self.changed[kind] else []
            print(f"  {kind:26s} {tried:5d}  {', '.join(odd) or 'refused'}: {self.examples.get(kind, '')[:90]}")

    def figures(self) -> dict[str, int]:
        """The sums over all kinds."""
        every = {"malformed_tried": self.tried, "malformed_accepted": self.accepted, "malformed_raised": self.raised}
        return {name: counter.total() for name, counter in {**every, "state_changed": self.changed}.items()}


def throw(server: Server, thrown: Thrown) -> str:
    """The reason of the refusal; empty if there was none. Raises what the server or the decoder raises."""
    if isinstance(thrown, bytes):
        try:
            client, task, result = wire.decode_result(thrown, BYTES_LIMIT, server.state.busy)
        except Malformed as error:
            return str(error)
        thrown = UpdateArrived(client, task, result)
    commands = server.handle(1.0, thrown)
    return commands[0].reason if len(commands) == 1 and isinstance(commands[0], Reject) else ""


def malformed(count: int, seed: int = 0) -> Verdicts:
    """Throw `count` malformed answers, kind by kind in turn, a third in each codec; then see that good ones are still welcome."""
    verdicts = Verdicts()
    share, rest = divmod(count, len(CODECS))
    for k, codec in enumerate(CODECS):
        _storm(share + (k < rest), seed, codec, verdicts)
    return verdicts


def _storm(count: int, seed: int, codec: Codec, verdicts: Verdicts) -> None:
    kinds, place = {**RESULTS, **FILES}, scene(codec)
    known = fingerprint(place.server.state)
    if known.startswith("none"):
        raise RuntimeError(f"a change of the state would not be seen; its fingerprint is {known}")
    for number in range(count):
        kind = list(kinds)[number % len(kinds)]
        thrown = kinds[kind](random.Random(f"{seed}/{number}"), place)
        verdicts.tried[kind] += 1
        try:
            reason = throw(place.server, thrown)
        except Exception as error:
            verdicts.raised[kind] += 1
            verdicts.examples[kind] = f"{type(error).__name__}: {error}"
        else:
            verdicts.accepted[kind] += not reason
            verdicts.examples.setdefault(kind, reason)
        if fingerprint(place.server.state) != known:
            verdicts.changed[kind] += 1
            place = scene(codec)
    _still_open(place)


def _still_open(place: Scene) -> None:
    """Every outstanding task takes its good answer, alternately as a `Result` and as bytes, until the round is full."""
    for number, task in enumerate(place.open[: COHORT_OF_SIX - 1]):
        answer = UpdateArrived(task.client, task.id, place.good(task))
        reason = throw(place.server, wire.encode_result(task, place.good(task)) if number % 2 else answer)
        if reason:
            raise RuntimeError(f"a well-formed answer to task {task.id} was refused: {reason}")
    if place.server.state.version != 2:
        raise RuntimeError("a round of good answers did not make the second version")
