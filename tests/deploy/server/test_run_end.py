"""The end of a run is announced to all who are connected, and nobody is waited for longer than is said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fedloom.core.schema import Malformed
from fedloom.core.types import Profile
from fedloom.deploy.messages.messages import RunEnded, decode_request, encode_request
from fedloom.deploy.server.driver import Deployment
from fedloom.deploy.server.run_end import announce_end
from tests.support.deployed_processes import QUICK, TERMS
from tests.support.simulated_link import Net, Site

ANY: Any = None


def announced(net: Net, end: float = 30.0) -> Deployment:
    running = Deployment(ANY, net, TERMS, {}, timeouts=replace(QUICK, end=end), clock=net.clock)
    announce_end(running, "3 versions made", net.pause)
    return running


def test_each_connected_site_hears_why_the_run_has_ended() -> None:
    net = Net({number: Site(Profile(f"c{number}", 10)) for number in range(5)})
    running = announced(net)
    assert {site.ended for site in net.sites.values()} == {"3 versions made"}
    assert net.time < 5.0, "nobody is waited for who has replied"
    assert running.traffic.sent == 5


def test_a_site_that_does_not_reply_delays_the_end_by_no_more_than_its_time() -> None:
    net = Net({0: Site(Profile("c0", 10)), 1: Site(Profile("c1", 10))})
    net.free[1] = 1000.0  # it trains
    announced(net, end=7.0)
    assert net.sites[0].ended
    assert 7.0 <= net.time < 8.0


def test_without_sites_there_is_nothing_to_wait_for() -> None:
    net = Net({})
    announced(net)
    assert net.time == 0.0


def test_a_reason_is_as_short_as_that_of_a_refusal() -> None:
    whole = RunEnded(TERMS, 2, "9 versions made")
    assert decode_request(encode_request(whole), 10**6) == whole
    with pytest.raises(Malformed, match="reason"):
        decode_request(encode_request(replace(whole, reason="x" * 10**5)), 10**6)
