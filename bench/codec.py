"""Float16 of the change against float16 of the values: how far from a run over an exact wire each ends, in as many bytes.

    python -m bench.codec [--quick]

Ten clients, each with a matrix of its own to approximate by gradient descent at rank 8 of 48, and the mean of their changes of
products as a server merges it: starts rounded, answers packed and unpacked, lifted, merged, truncated, with the package's own code.
Six regimes: rounds at a constant and at a falling rate, small rates, a small step of the server, and windows in which every answer
makes a version. The error is the Frobenius distance of the last product from that of the same run over float32, relative to it.
`--quick` makes a fifth of the versions. The last line is one JSON object; `half_change_vs_half_error` is the largest of the regimes,
under 1 where the change is the better of the two everywhere; `bytes_equal` is about the first regime, where every row moves. Where
changes are small `Half` sends fewer rows: those whose change it would round away.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedloom.aggregate.product_delta import ProductDelta
from fedloom.core.codec import Codec, Exact, Half, HalfChange
from fedloom.core.lora import Adapter, Factor, truncate
from fedloom.core.message_size import upload_size
from fedloom.core.policies import Merge
from fedloom.core.transfer import encode_answer, encode_start, lift_answer
from fedloom.core.types import Budget, ClientState, Model, Result, Task, Update
from tests.support.tiny_models import settle

CLIENTS, SIZE, RANK, STEPS = 10, 48, 8, 4
METHOD, LAYER = ProductDelta(), "layer"
CODECS: tuple[Codec, ...] = (Half(), HalfChange())
Rate = Callable[[float], float]
"""The learning rate after this share of the versions."""


def always(rate: float) -> Rate:
    """One rate."""
    return lambda done: rate


def falling(done: float) -> float:
    """From 0.02 to a thousandth of it."""
    return float(0.02 * 10 ** (-3 * done))


@dataclass(frozen=True, slots=True)
class Regime:
    """How fast clients learn, how far the server goes, and whether it waits for all of them."""

    name: str
    rate: Rate
    versions: int
    step: float = 1.0
    window: bool = False


REGIMES = (
    Regime("rounds, rate 0.02", always(0.02), 300),
    Regime("rounds, rate 0.02 to 2e-5", falling, 300),
    Regime("rounds, rate 2e-4", always(2e-4), 1000),
    Regime("rounds, rate 1e-3, server step 0.05", always(1e-3), 1000, step=0.05),
    Regime("window of ten, rate 0.02 to 2e-5", falling, 1000, window=True),
    Regime("window of ten, rate 2e-4", always(2e-4), 2000, window=True),
)


@dataclass(slots=True)
class Federation:
    """The clients' matrices, the model, and the bytes that clients sent."""

    targets: Sequence[Tensor]
    model: Model
    codec: Codec
    tasks: int = 0
    window: list[Update] = field(default_factory=list)
    bytes_up: int = 0

    def answer(self, client: int, rate: float) -> Update:
        """One client's answer as the server keeps it."""
        self.tasks += 1
        budget = Budget(RANK, STEPS)
        exact = METHOD.start(self.model, budget, self.tasks)
        task = Task(self.tasks, f"c{client}", 0, encode_start(exact, self.codec), budget, 0.0)
        result = Result(trained(task.start.train, self.targets[client], rate), 1, 1, STEPS)
        result, _ = encode_answer(task, ClientState(), result, ClientState())
        self.bytes_up += upload_size(task, result).total
        update = Update(task, result, self.model)
        return lift_answer(update, exact.train) if self.codec.halved else update

    def merge(self, regime: Regime, done: int) -> None:
        """Make the next version: a round of all, or the next client's answer into the window."""
        rate = regime.rate(done / regime.versions)
        clients = [done % CLIENTS] if regime.window else range(CLIENTS)
        fresh = [self.answer(client, rate) for client in clients]
        self.window = [*self.window, *fresh][-CLIENTS:]
        parts = tuple((1 / len(self.window), update) for update in self.window)
        self.model = METHOD.merge(self.model, Merge(parts, step=regime.step, as_delta=not regime.window))


def trained(start: Adapter, target: Tensor, rate: float) -> Adapter:
    """Some steps of gradient descent on half the squared distance to the target."""
    up, down = start.factors[LAYER].up, start.factors[LAYER].down
    for _ in range(STEPS):
        error = up @ down - target
        up, down = up - rate * error @ down.T, down - rate * up.T @ error
    return Adapter({LAYER: Factor(down, up)})


def federation(codec: Codec) -> Federation:
    """The same clients and first model for every codec."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    common = normal(SIZE, 6) @ normal(6, SIZE) / SIZE**0.5
    targets = [common + 0.3 * normal(SIZE, SIZE) / SIZE**0.5 for _ in range(CLIENTS)]
    first = truncate(Factor(normal(RANK, SIZE) / SIZE**0.5, 0.3 * normal(SIZE, RANK)), RANK)
    return Federation(targets, Model(Adapter({LAYER: first})), codec)


def ended(regime: Regime, codec: Codec) -> tuple[Tensor, int]:
    """The last product of a run, in float64, and the bytes up."""
    found = federation(codec)
    for done in range(regime.versions):
        found.merge(regime, done)
    factor = found.model.adapter.factors[LAYER]
    return factor.up.double() @ factor.down.double(), found.bytes_up


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="bench.codec", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a fifth of the versions")
    quick = parser.parse_args().quick
    settle()
    print("distance of the end from that over an exact wire, relative\n")
    rows, ratios = list[dict[str, object]](), list[float]()
    for regime in REGIMES:
        if quick:
            regime = Regime(regime.name, regime.rate, regime.versions // 5, regime.step, regime.window)
        exact, _ = ended(regime, Exact())
        (half, sent), (change, as_much) = (ended(regime, codec) for codec in CODECS)
        errors = [float((one - exact).norm() / exact.norm()) for one in (half, change)]
        ratios.append(errors[1] / errors[0])
        figures = {"half": errors[0], "half_change": errors[1], "bytes_half": sent, "bytes_half_change": as_much}
        rows.append({"regime": regime.name, **figures})
        print(
            f"  {regime.name:38s} Half {errors[0]:.1e}   HalfChange {errors[1]:.1e}   {1 / ratios[-1]:.0f}x", flush=True
        )
    same = rows[0]["bytes_half"] == rows[0]["bytes_half_change"]
    print(json.dumps({"half_change_vs_half_error": max(ratios), "bytes_equal": same, "regimes": rows}))


if __name__ == "__main__":
    main()
