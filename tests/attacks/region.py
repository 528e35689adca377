"""Malicious sites and regions against a server: who they are, whom they lead, what they tell. Nothing is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

from fedloom import Hierarchy, Limits, Rounds
from fedloom.core.events import EdgeJoined, Reject
from fedloom.core.types import Profile
from fedloom.deploy.link import RawReply
from fedloom.deploy.messages import answer
from fedloom.deploy.messages.messages import Welcome, decode_reply, encode_reply
from fedloom.deploy.server.driver import Deployment
from fedloom.deploy.server.key_facts import KeyFacts, no_facts
from fedloom.deploy.server.reply_events import MAX_REPLY, REGION
from fedloom.deploy.server.status import Status
from tests.attacks.attack import Attack, succeeds
from tests.support import toys
from tests.support.deployed_processes import QUICK, TERMS, turns
from tests.support.simulated_link import Net, Site

NORTH, SOUTH = (Profile(name, 20, 1e4, 1e5, 1e5, tier=REGION) for name in ("north", "south"))
MEMBERS = (Profile("c0", 10, 1e4, 1e4, 1e4), Profile("c1", 10, 1e4, 1e4, 1e4))


class Impostor(Net):
    """A link over which each site's key has the name `key`, whatever the site says."""

    key: str | None = "c9"

    def nodes(self) -> dict[int, str | None]:
        """The node numbers, with the names of their keys."""
        return dict.fromkeys(self.sites, self.key)


def joined(net: Net, facts_of: Callable[[str], KeyFacts] = no_facts) -> Deployment:
    """A server of these sites, some seconds after its start; `facts_of` is what its operator says of each key."""
    server = toys.server(Rounds(len(net.sites)), limits=Limits(versions=50), start=toys.adapter(2))
    running = Deployment(server, net, TERMS, {}, len(net.sites), QUICK, net.clock, facts_of=facts_of)
    turns(running, net, 5)
    return running


def site_as_region(folder: Path, lifted: bool) -> bool:
    """A site's key, used as a region. Lifted: the operator added the key as one of a region."""
    running = joined(Net({7: Site(replace(NORTH, client="c0"))}), lambda name: KeyFacts(region=lifted))
    if not running.clients:
        assert "its key is that of a site" in running.nodes.reachable[7].why
    return bool(running.clients)


def region_as_site(folder: Path, lifted: bool) -> bool:
    """A region's key, used as a site's, so that its members are nobody's. Lifted: the key is one of a site."""
    running = joined(Net({7: Site(Profile("c0", 5))}), lambda name: KeyFacts(region=not lifted))
    if not running.clients:
        assert "its key is that of a region" in running.nodes.reachable[7].why
    return bool(running.clients)


def another_name(folder: Path, lifted: bool) -> bool:
    """A site says that it is another one. Lifted: the server has no keys."""
    net = Impostor({7: Site(Profile("c0", 5))})
    net.key = None if lifted else "c9"
    running = joined(net)
    if not running.clients:
        assert "its key is that of 'c9'" in running.nodes.reachable[7].why
    return bool(running.clients)


def weight_by_word(folder: Path, lifted: bool) -> bool:
    """A site registers 10^12 examples. Lifted: the operator's file says that it has so many."""
    net = Net({k: Site(Profile(f"c{k}", 10 if k else 10**12)) for k in range(4)})
    running = joined(net, lambda name: KeyFacts(examples=10**12 if lifted and name == "c0" else None))
    counted = Status(folder, running, Limits(versions=50)).snapshot()["clients"]["c0"]["counted"]
    assert isinstance(counted, int)
    return counted > 30


def joins(edge: Profile, members: tuple[Profile, ...], why: str) -> Callable[[Path, bool], bool]:
    """A second region with these members, after `north`. It is refused for this reason. Lifted: edges are part of this process."""

    def run(folder: Path, lifted: bool) -> bool:
        flat = toys.server(Rounds(2), start=toys.fresh(4), limits=Limits(versions=5))
        server = Hierarchy().over_regions(flat, 2)
        server.trusted = lifted
        assert server.handle(0.0, EdgeJoined(NORTH, MEMBERS)) == []
        commands = server.handle(0.0, EdgeJoined(edge, members))
        refused = [one for one in commands if isinstance(one, Reject)]
        assert all(why in one.reason for one in refused)
        return not refused

    return run


def members_without_end(folder: Path, lifted: bool) -> bool:
    """A region that makes up ten thousand sites. Lifted: their number is not looked at."""
    members = tuple(Profile(f"c{k}", 10) for k in range(10_000))
    body = encode_reply(Welcome(NORTH, 1, members=members))
    with patch("fedloom.deploy.messages.checks.MAX_MEMBERS", 10**6 if lifted else 1000):
        return succeeds(lambda: decode_reply(body, MAX_REPLY, {}), "members")


def names_of_metrics(folder: Path, lifted: bool) -> bool:
    """An answer with ninety metrics whose names are 80 kB: they would stand in the trace for ever. Lifted: names are free."""
    task = toys.make_task(toys.adapter(2), 2)
    metrics = {f"{k}".ljust(80_000, "x"): 0.0 for k in range(90)}
    body = answer.encode_result(task, toys.make_result(toys.changed(task.start, 1), metrics=metrics))
    with patch.object(answer, "check_metrics", (lambda metrics: None) if lifted else answer.check_metrics):
        decode = partial(answer.decode_result, body, MAX_REPLY, {task.id: task})
        return succeeds(decode, "is none of the metrics")


def number_of_another_task(folder: Path, lifted: bool) -> bool:
    """A site answers the task of another one, which is slow. Lifted: it is its own task that it answers."""
    net = Net({k: Site(Profile(f"c{k}", 10), seconds=1e6) for k in range(2)})
    running = joined(net)
    owner = "c0" if lifted else "c1"
    (task,) = (task for task in running.tasks.values() if task.client == owner)
    forged = answer.encode_result(task, toys.make_result(toys.changed(task.start, 1)))
    (message,) = (name for name, sent in running.nodes.in_flight.items() if sent.node == 0)
    net.heap = [(net.time, 0, RawReply(message, 0, forged))]
    turns(running, net, 5)
    return running.accepted.get(owner) == task.id


def _attacks() -> Iterator[Attack]:
    yield Attack("a site uses its key as a region's", site_as_region, in_gate=True)
    yield Attack("a region uses its key as a site's", region_as_site)
    yield Attack("a site says that it is another one", another_name)
    yield Attack("a site registers 10^12 examples", weight_by_word)
    yield Attack("two regions lead the same site", joins(SOUTH, MEMBERS, "'c0' is a site of 'north'"), in_gate=True)
    yield Attack("a region leads another region", joins(SOUTH, (Profile("north", 1),), "'north' is a client here"))
    yield Attack("a region names a site twice", joins(SOUTH, (Profile("d", 1), Profile("d", 1)), "names a site twice"))
    yield Attack("a site is a region's and a client too", joins(Profile("c0", 9), (), "'c0' is a site of 'north'"))
    yield Attack("a region makes up ten thousand sites", members_without_end)
    yield Attack("names of metrics fill the trace", names_of_metrics, in_gate=True)
    yield Attack("a site answers the task of another", number_of_another_task)


ATTACKS = tuple(_attacks())
