"""Device and link models: who the simulated clients are, and how many virtual seconds a task takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from fedloom.core import message_size
from fedloom.core.errors import Refused
from fedloom.core.model_shape import Shape
from fedloom.core.seeds import rng
from fedloom.core.types import ClientId, Profile, Result, Task

MOST_JITTER = 10
"""Largest standard deviation of the logarithm of a time."""


@dataclass(frozen=True, slots=True)
class Seconds:
    """Virtual seconds of a task: on the link down, in training, on the link up."""

    down: float
    train: float
    up: float

    @property
    def total(self) -> float:
        """Seconds from dispatch to arrival."""
        return self.down + self.train + self.up


class Devices(Protocol):
    """Device model of a run (`Run.world`): which devices the clients have, and how long a task takes them."""

    def profiles(self, examples: Mapping[ClientId, int], seed: int) -> tuple[Profile, ...]:
        """Return a device for each client, given its number of examples. Must not depend on the order of the clients."""
        ...

    def seconds(self, task: Task, result: Result, profile: Profile, shape: Shape, seed: int, turn: int = 0) -> Seconds:
        """Return how long this task takes this client, whose `turn`-th task it is (from 0): a function of its arguments alone.

        It is called before training too, with an answer that changed nothing, and must return no more then than for the real one:
        the simulation waits for the real answer at that moment (lookahead, see `simulation`).
        """
        ...


def check_positive(field: str, name: str, **numbers: float) -> None:
    """Raise Refused for the first of these numbers of `name` that is not positive."""
    for which, number in numbers.items():
        if not number > 0:
            raise Refused(f"{field}.{which}", number, f"{name} needs a positive number")


@dataclass(frozen=True, slots=True)
class Tier:
    """A class of devices.

    Fields:
        name: the tier, as profiles and reports name it.
        share: of the federation, relative to the other tiers.
        flops: sustained speed of training (FLOP/s).
        up_bps, down_bps: speed of the links (bits/s).
        memory: of the device (bytes).
    """

    name: str
    share: float
    flops: float
    up_bps: float
    down_bps: float
    memory: float

    def __post_init__(self) -> None:
        speeds = {"flops": self.flops, "up_bps": self.up_bps, "down_bps": self.down_bps, "memory": self.memory}
        check_positive("world.tiers", f"tier {self.name}", share=self.share, **speeds)


PHONE = Tier("phone", 0.5, flops=5e9, up_bps=2e6, down_bps=1e7, memory=1e9)
LAPTOP = Tier("laptop", 0.3, flops=3e10, up_bps=4e6, down_bps=2e7, memory=8e9)
WORKSTATION = Tier("workstation", 0.2, flops=1e11, up_bps=1e8, down_bps=1e8, memory=3.2e10)


@dataclass(frozen=True, slots=True)
class World:
    """Tiers of devices.

    Fields:
        tiers: the classes of devices (half phones, a third laptops, the rest workstations).
        jitter: standard deviation of the logarithm of each task's training time (0.2; 0: none).
    """

    tiers: tuple[Tier, ...] = (PHONE, LAPTOP, WORKSTATION)
    jitter: float = 0.2

    def __post_init__(self) -> None:
        if not self.tiers:
            raise Refused("world.tiers", self.tiers, "name at least one tier of devices")
        check_jitter(self.jitter)

    def profiles(self, examples: Mapping[ClientId, int], seed: int) -> tuple[Profile, ...]:
        """Return a device for each client: tiers by their shares (largest remainder first), dealt in seeded random order."""
        clients = sorted(examples)
        tiers = apportion(self.tiers, len(clients))
        rng(seed, "tiers").shuffle(tiers)
        return tuple(
            Profile(client, examples[client], tier.flops, tier.up_bps, tier.down_bps, tier.memory, tier.name)
            for client, tier in zip(clients, tiers, strict=True)
        )

    def seconds(self, task: Task, result: Result, profile: Profile, shape: Shape, seed: int, turn: int = 0) -> Seconds:
        """Return the seconds of download, training and upload: bytes over links, FLOP over speed."""
        return task_seconds(task, result, profile, shape, jitter_factor(task, self.jitter, seed))


@dataclass(frozen=True, slots=True)
class Capability:
    """A class of devices behind one wireless network.

    Fields:
        name: the class, as profiles and reports name it.
        share: of the federation, relative to the other classes.
        flops: speed in the fastest mode (FLOP/s).
        memory: of the device (bytes).
    """

    name: str
    share: float
    flops: float
    memory: float

    def __post_init__(self) -> None:
        check_positive("world.classes", self.name, share=self.share, flops=self.flops, memory=self.memory)


WEAK = Capability("weak", 0.375, flops=1e11, memory=8e9)
MIDDLE = Capability("middle", 0.5, flops=2.5e11, memory=1.2e10)
STRONG = Capability("strong", 0.125, flops=6e11, memory=3.2e10)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Devices whose power and network change all the time: of 80, 30 are weak, 40 middle (2.5 x), 10 strong (6 x).

    The server's profile has the full speed and the mean bandwidth. Source: the simulation profile for HierFedLoRA (2025), after the
    platforms of the same group; the speeds in FLOP/s and the modes are our choice.

    Fields:
        classes: the classes of devices.
        low_bps, high_bps: the bandwidth, the same both ways, is uniform between these and drawn anew for each task (bits/s).
        modes: shares of the full speed, as a power saver sets them; a device works in one of them.
        mode_tasks: after so many of its tasks a device's mode is drawn anew.
    """

    classes: tuple[Capability, ...] = (WEAK, MIDDLE, STRONG)
    low_bps: float = 1e6
    high_bps: float = 3e7
    modes: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    mode_tasks: int = 20

    def __post_init__(self) -> None:
        if not self.classes:
            raise Refused("world.classes", self.classes, "name at least one class of devices")
        if not 0 < self.low_bps <= self.high_bps:
            raise Refused("world.low_bps", self.low_bps, f"positive, and at most high_bps, which is {self.high_bps:g}")
        if not self.modes or not all(0 < mode <= 1 for mode in self.modes):
            raise Refused("world.modes", self.modes, "shares of the full speed, each above 0 and at most 1")
        if self.mode_tasks < 1:
            raise Refused("world.mode_tasks", self.mode_tasks, "a mode lasts for at least 1 task")

    def profiles(self, examples: Mapping[ClientId, int], seed: int) -> tuple[Profile, ...]:
        """Return a device for each client: classes by their shares, dealt in seeded random order."""
        clients, mean = sorted(examples), (self.low_bps + self.high_bps) / 2
        classes = apportion(self.classes, len(clients))
        rng(seed, "classes").shuffle(classes)
        return tuple(
            Profile(client, examples[client], own.flops, mean, mean, own.memory, own.name)
            for client, own in zip(clients, classes, strict=True)
        )

    def seconds(self, task: Task, result: Result, profile: Profile, shape: Shape, seed: int, turn: int = 0) -> Seconds:
        """Return bytes over the bandwidth of this task and FLOP over the speed of the mode of this turn."""
        mode = rng(seed, "mode", task.client, turn // self.mode_tasks).choice(self.modes)
        bps = rng(seed, "bandwidth", task.client, task.id).uniform(self.low_bps, self.high_bps)
        return task_seconds(task, result, replace(profile, up_bps=bps, down_bps=bps), shape, 1.0 / mode)


@dataclass(frozen=True, slots=True)
class FasterLinks:
    """The devices of `inner` with links that are `times` as fast: to an edge that is nearer than the server."""

    inner: Devices
    times: float

    def profiles(self, examples: Mapping[ClientId, int], seed: int) -> tuple[Profile, ...]:
        """Return the same devices with faster links."""
        far = self.inner.profiles(examples, seed)
        return tuple(replace(one, up_bps=one.up_bps * self.times, down_bps=one.down_bps * self.times) for one in far)

    def seconds(self, task: Task, result: Result, profile: Profile, shape: Shape, seed: int, turn: int = 0) -> Seconds:
        """Return the same seconds of training; messages take a part of the time, whatever the link is at that moment."""
        far = replace(profile, up_bps=profile.up_bps / self.times, down_bps=profile.down_bps / self.times)
        took = self.inner.seconds(task, result, far, shape, seed, turn)
        return Seconds(took.down / self.times, took.train, took.up / self.times)


def check_jitter(jitter: float) -> None:
    """Raise Refused for a spread of times that no device has, and exp of it no float."""
    if not 0 <= jitter <= MOST_JITTER:
        remedy = f"0 means that a task always takes the same time, {MOST_JITTER} is more than any device has"
        raise Refused("world.jitter", jitter, remedy)


def jitter_factor(task: Task, jitter: float, seed: int) -> float:
    """Return how many times longer than usual this task is trained: log-normal with this deviation of the logarithm."""
    return rng(seed, "seconds", task.client, task.id).lognormvariate(0.0, jitter) if jitter else 1.0


def task_seconds(task: Task, result: Result, profile: Profile, shape: Shape, slower: float = 1.0) -> Seconds:
    """Return bytes over links and FLOP over speed, with training `slower` times as long."""
    train = slower * shape.train_flops(result.tokens, task.budget.rank, task.budget.depth) / profile.flops
    down, up = message_size.download_size(task.start).total, message_size.upload_size(task, result).total
    return Seconds(8.0 * down / profile.down_bps, train, 8.0 * up / profile.up_bps)


class _Shared(Protocol):
    @property
    def share(self) -> float: ...


T = TypeVar("T", bound=_Shared)


def apportion(classes: Sequence[T], clients: int) -> list[T]:
    """Return a class for each of so many clients, by their shares (largest remainder first), in order of class."""
    whole = sum(one.share for one in classes)
    exact = [clients * one.share / whole for one in classes]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: clients - sum(counts)]:
        counts[i] += 1
    return [one for one, count in zip(classes, counts, strict=True) for _ in range(count)]
