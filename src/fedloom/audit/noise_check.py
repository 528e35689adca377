"""The noise of a run, made again with canaries in it: is what was accounted also what is there?

The real server of the core merges toy adapters of clients that are canaries: each has a direction of its own, and answers with a
change along it that is far above the clip. What is released is compared with each direction, and with as many that nobody had. All
directions are orthogonal, and nobody else is there: that is the observer that differential privacy assumes, who knows everything but
the noise. So clip, noise, cap, and what a release says that it spent, are tested together (Andrew et al., arXiv 2302.03098, 2023, who
leave the honest clients in). Of records the coins and the noise of a site's steps are made again with canary gradients.

What is not tested: the run's own model and aggregator, which see only what was released; the clipping of gradients in the engine;
that the secret is one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from fedloom.aggregate.fedit import FedIT
from fedloom.audit.epsilon_estimate import estimate_epsilon
from fedloom.audit.findings import NoiseCheck
from fedloom.core.events import ClientJoined, Dispatch, Event, Publish, Release, TimerFired, UpdateArrived
from fedloom.core.limits import Limits
from fedloom.core.lora import Adapter, Factor, from_tensors, named_tensors
from fedloom.core.model_shape import Shape
from fedloom.core.server import Server
from fedloom.core.types import ClientId, Model, Profile, Result, Task
from fedloom.plan.budget import Plan
from fedloom.plan.rank import FixedRank
from fedloom.privacy.accounting import epsilon_of, gaussian_epsilon
from fedloom.privacy.correlated_noise import band_coefficients
from fedloom.privacy.private import Private
from fedloom.privacy.record_draws import RecordDraws, steps_cost
from fedloom.privacy.secret_noise import SecretNoise
from fedloom.runs.private_run import client_event, server_privacy
from fedloom.schedule.rounds import Rounds
from fedloom.schedule.shared.weights import uniform

CANARIES, MOST_ANSWERS, MOST_STEPS = 256, 3, 200
"""Canaries that are put in, and as many that are not; answers of each that are merged, and steps of training, at most."""
RANK, SIDE, HEAD = 4, 60, 160
"""The toy adapter: one layer of SIDE by SIDE, and a head."""
LOUD = 50.0
"""Norm of a canary's change, in clips: a clip that lets more through is seen."""
SMALLEST, LARGEST = 1e-3, 1e3
"""Clips between which the toy adapter's float32 is exact enough."""
CUTS = tuple(0.25 * step for step in range(-4, 25))
"""Where the certified bound cuts scores, in standard deviations of the declared noise."""


def check_client_noise(private: Private, noise: SecretNoise, seed: int, delta: float) -> NoiseCheck:
    """Merge canary clients through a server with this noise, and compare what they show with what its releases say they spent.

    Args:
        private: bounds and noise of the run; of the answers of a client at most `MOST_ANSWERS` are merged.
        noise: where the noise comes from; not the run's own secret, so that nothing of it is used twice.
        seed: of the directions.
        delta: at which epsilons are compared.
    """
    answers = min(private.most_answers, MOST_ANSWERS)
    clip = min(max(private.clip, SMALLEST), LARGEST)  # the noise is in proportion to it
    toy = replace(private, clip=clip, most_answers=answers, budget=None)
    inside, outside = _directions(seed)
    releases, versions = _released(toy, noise, [_unflat(row) for row in inside], seed)
    squares = defaultdict[ClientId, float](float)
    for release in releases:
        for client, mu in release.spent.items():
            squares[client] += mu * mu
    # the ledger of these releases; where a client was merged too often, what it was promised
    mu = min(math.sqrt(max(squares.values())), client_event(toy, len(releases)).mu)
    white, expected = _whitened(toy, releases, versions)
    lengths = toy.multiplier * expected.norm(dim=0)
    scores = [((expected * (white @ side.T)).sum(0) / lengths).tolist() for side in (inside, outside)]
    shown = estimate_epsilon(scores[0], scores[1], delta, CUTS)
    deviation, numbers = _smallest_deviation((white - expected @ inside) / toy.multiplier)
    return NoiseCheck("client", answers, gaussian_epsilon(mu, delta), shown, deviation, numbers)


def check_record_noise(
    private: Private, draws: RecordDraws, rows: int, batch_size: int, steps: int, seed: int, delta: float
) -> NoiseCheck:
    """Make the sums of a site's steps again with canary records, and compare what they show with what the steps are said to cost.

    Raises Refused where the library that composes sampled steps is missing.

    Args:
        private: clip and noise of a step.
        draws: where coins and noise come from; not with the secret of a site.
        rows: records of the site; with `batch_size` they decide how often a canary is in a step.
        batch_size: records that are expected in a step.
        steps: steps of the site in the whole run; at most `MOST_STEPS` are made.
        seed: of the directions.
        delta: at which epsilons are compared.
    """
    steps = min(steps, MOST_STEPS)
    cost = steps_cost(private, rows, batch_size, steps)
    inside, outside = _directions(seed)
    seen, exact = torch.zeros(2, inside.shape[1], dtype=torch.float64)
    for step in range(steps):
        taken = private.clip * inside[draws.batch(step, len(inside), cost.rate)].sum(0)
        exact += taken
        seen += draws.noisy_mean(step, {"canaries": taken}, private, 1.0)["canaries"]
    unit = private.clip * private.multiplier * math.sqrt(steps)
    scores = [(side @ seen / unit).tolist() for side in (inside, outside)]
    shown = estimate_epsilon(scores[0], scores[1], delta, CUTS)
    deviation = float((seen - exact).square().mean().sqrt()) / unit
    return NoiseCheck("record", steps, epsilon_of([cost], delta), shown, deviation, len(seen))


def _toy_adapter() -> Adapter:
    """An adapter of ones: no direction of it is dead."""
    return Adapter({"layer": Factor(torch.ones(RANK, SIDE), torch.ones(SIDE, RANK))}, {"head": torch.zeros(HEAD)})


def _directions(seed: int) -> tuple[Tensor, Tensor]:
    """Draw orthonormal changes of the toy adapter, (canaries, numbers): those that are put in, and those that are left out."""
    draw, width = torch.Generator().manual_seed(seed), sum(map(torch.Tensor.numel, _tensors().values()))
    basis: Tensor = torch.linalg.qr(torch.randn(width, 2 * CANARIES, generator=draw, dtype=torch.float64)).Q.T
    return basis[:CANARIES], basis[CANARIES:]


def _tensors() -> dict[str, Tensor]:
    return named_tensors(_toy_adapter())


def _flat(adapter: Adapter) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in named_tensors(adapter).values()])


def _unflat(row: Tensor) -> Adapter:
    """Return the change of the toy adapter with these numbers."""
    like = _tensors()
    parts = zip(like, torch.split(row, [tensor.numel() for tensor in like.values()]), strict=True)
    return from_tensors(_toy_adapter(), {name: part.view_as(like[name]) for name, part in parts})


def _released(
    private: Private, noise: SecretNoise, directions: Sequence[Adapter], seed: int
) -> tuple[list[Release], list[Model]]:
    """Merge the canary clients through the server until they may not take part any more; return releases and versions."""
    # one answer more of each than is allowed, if nobody stops it
    limits = Limits(versions=(private.most_answers + 1) * private.apart, evaluate_every=0)
    parts = server_privacy(private, limits, b"")
    assert parts.mechanism is not None
    first = Model(_toy_adapter())
    server = Server(
        first,
        FedIT(),
        Rounds(math.ceil(len(directions) / private.apart), weigh=uniform),
        Plan(FixedRank(RANK), 1),
        shape=Shape(parameters=SIDE * SIDE, embeddings=0, layers=1, hidden=SIDE, modules=((SIDE, SIDE),), dense=HEAD),
        limits=parts.limits,
        seed=seed,
        mechanism=replace(parts.mechanism, noise=noise),
        participation=parts.participation,
    )
    own = {_name(number): direction for number, direction in enumerate(directions)}
    events: list[Event] = [ClientJoined(Profile(client, 1)) for client in own]
    events.append(TimerFired())
    releases, versions = list[Release](), [first]
    while events:
        for command in server.handle(0.0, events.pop(0)):
            match command:
                case Dispatch(task):
                    events.append(
                        UpdateArrived(task.client, task.id, _loud_answer(task, own[task.client], private.clip))
                    )
                case Release():
                    releases.append(command)
                case Publish():
                    versions.append(command.model)
    return releases, versions


def _loud_answer(task: Task, direction: Adapter, clip: float) -> Result:
    sent, moved = named_tensors(task.start.train), named_tensors(direction)
    answer = {name: (tensor.double() + LOUD * clip * moved[name]).to(tensor.dtype) for name, tensor in sent.items()}
    return Result(from_tensors(task.start.train, answer), 1, 0, 1)


def _whitened(private: Private, releases: Sequence[Release], versions: Sequence[Model]) -> tuple[Tensor, Tensor]:
    """Return what was released with independent noise, and how much of each canary is in it, both (versions, ...) in clips.

    What is released is x + D z for independent noise z, D = C^-1 (C the identity for independent noise), so C times it is C x + z. A
    canary's best linear statistic is its inner product with what the canary would have put there, C x: one that was left out is
    looked for where the canary of its number was.
    """
    band = band_coefficients(private.apart) if private.noise == "banded" else (1.0,)
    moved = (_flat(after.adapter) - _flat(before.adapter) for before, after in pairwise(versions))
    unit = torch.stack([step * len(one.shares) / private.clip for step, one in zip(moved, releases, strict=True)])
    count = len(releases)
    matrix = torch.zeros(count, count, dtype=torch.float64)
    for back, coefficient in enumerate(band[:count]):
        matrix += torch.diag(torch.full((count - back,), coefficient, dtype=torch.float64), -back)
    shares = [[one.shares.get(_name(number), 0.0) for number in range(CANARIES)] for one in releases]
    return matrix @ unit, matrix @ torch.tensor(shares, dtype=torch.float64)


def _smallest_deviation(noise: Tensor) -> tuple[float, int]:
    """Return the smallest standard deviation of a tensor's noise (versions, numbers), and how many numbers it was taken from."""
    parts = torch.split(noise, [tensor.numel() for tensor in _tensors().values()], 1)
    return min((float(part.square().mean().sqrt()), part.numel()) for part in parts)


def _name(number: int) -> ClientId:
    return f"canary-{number}"
