"""Addresses: what is read is what is listened at, and nothing else can listen there; the rest is refused in one sentence."""

from __future__ import annotations

import socket
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.errors import Refused
from fedloom.deploy.flower.address import Address, is_loopback, listen_at, parse_address
from fedloom.deploy.flower.supervisor import free_port, is_listening
from tests.support.storms import tries

HOSTS = st.sampled_from(["localhost", "a", "ward-7.example.org", "site_1", "x9"]) | st.ip_addresses().map(str)
BAD = [
    "",
    "8080",
    "host",
    "host:0",
    "host:65536",
    "host:\u0661",
    "::1:8080",
    "[::1]",
    "[1.2.3.4]:80",
    "1.2.3:80",
    "https://host:80",
    "host:80/",
    "a b:80",
    "-a:80",
    "[host]:80",
    "[]:80",
    ":80",
    "user@host:80",
]
LOCAL = ["127.0.0.1", "localhost", "0.0.0.0", "::1", "::"]


def ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@tries(60)
@given(HOSTS, st.integers(1, 65535))
def test_an_address_reads_as_it_is_written(host: str, port: int) -> None:
    address = Address(host, port)
    assert parse_address("--port", str(address)) == address
    assert parse_address("--port", f"{port}", host) == address
    assert str(address).startswith("[") == (":" in host)


@tries(300)
@given(st.text(st.sampled_from(":[].%0159afx-/@ \u00b2\u0665"), max_size=14) | st.text(max_size=8))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    try:
        address = parse_address("server", text)
    except Refused:
        return
    assert 1 <= address.port <= 65535
    assert parse_address("server", str(address)) == address
    if ":" in address.host:
        assert ip_address(address.host).version == 6


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(Refused, match=r"give HOST:PORT"):
        parse_address("--port", text)


@pytest.mark.parametrize("host", LOCAL)
def test_nobody_else_can_listen_where_we_listen(host: str) -> None:
    if ":" in host and not ipv6():
        pytest.skip("this machine has no IPv6")
    address = Address(host, free_port())
    with listen_at("--port", address):
        assert is_listening("::1" if host == "::1" else "127.0.0.1", address.port), ":: stands for both kinds"
        with pytest.raises(Refused, match=r"another program listens there") as told, listen_at("--port", address):
            pass
        assert str(address) in str(told.value)
    with listen_at("--port", address):
        pass


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "nowhere.invalid"])
def test_a_host_that_is_not_of_this_machine_is_refused(host: str) -> None:
    with pytest.raises(Refused, match=r"this machine (has no|knows no)"), listen_at("--port", Address(host, 8080)):
        pass


def test_this_machine_from_itself() -> None:
    assert all(map(is_loopback, ["localhost", "127.0.0.1", "127.1.2.3", "::1"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "10.0.0.5", "fed.example.org", ""]))
