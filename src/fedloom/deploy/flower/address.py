"""Addresses of a deployment: how they are written, and listening at one so that no other program can."""

from __future__ import annotations

import errno
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address

from fedloom.core.errors import Refused

HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_.])?")
BACKLOG = 100
"""Connections that may wait to be accepted, as many as asyncio has."""
REASONS = {
    errno.EADDRINUSE: "another program listens there; end it, or choose another port",
    errno.EADDRNOTAVAIL: "this machine has no such address; give one of its own, or the port alone",
    errno.EACCES: "this user may not listen there; choose a port above 1023",
    errno.EAFNOSUPPORT: "this machine has no addresses of that kind",
}


@dataclass(frozen=True, slots=True)
class Address:
    """Address at which a server listens, or is reached.

    Fields:
        host: name or address, an IPv6 address without brackets; 0.0.0.0 stands for all IPv4 addresses of a machine, :: for all of
            both kinds.
        port: 1 to 65535.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(field: str, text: str, host: str = "") -> Address:
    """Read HOST:PORT, [IPV6]:PORT, or a port alone where there is a `host` to go with it. Raises Refused with this field."""
    found = re.fullmatch(r"(?:(\[[^\[\]]*\]|[^\[\]:]*):)?([0-9]{1,5})", text.strip(), re.ASCII)
    given = found[1] or host if found else ""
    name = given.removeprefix("[").removesuffix("]")
    if found is None or not 1 <= int(found[2]) <= 65535 or not _is_host(name, v6="[" in given):
        alone = " or a port alone," if host else ""
        raise Refused(field, text, f"give HOST:PORT,{alone} for instance 10.0.0.5:8080 or [::1]:8080, ports 1 to 65535")
    return Address(name, int(found[2]))


def _is_host(name: str, v6: bool) -> bool:
    try:
        return isinstance(ip_address(name), IPv6Address) == (v6 or ":" in name)
    except ValueError:
        return not v6 and HOST.fullmatch(name) is not None and not re.fullmatch(r"[0-9.]*", name)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, seen from itself."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def listen_at(field: str, address: Address) -> Iterator[list[socket.socket]]:
    """Listen at an address until the end of the block, at each that its host name stands for.

    Who connects waits until somebody accepts: the sockets can be handed to a process that is started later, and again.

    Raises:
        Refused: it cannot be listened at, with the reason.
    """
    with ExitStack() as opened:
        try:
            sockets = [opened.enter_context(one) for one in _opened(address)]
        except OSError as error:
            unknown = isinstance(error, socket.gaierror)
            reason = "this machine knows no such host" if unknown else REASONS.get(error.errno or 0, str(error))
            raise Refused(field, str(address), reason) from error
        yield sockets


def _opened(address: Address) -> Iterator[socket.socket]:
    every = address.host == "::" and socket.has_dualstack_ipv6()
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for family, place in dict.fromkeys((one[0], one[4]) for one in found):
        yield socket.create_server(place, family=family, backlog=BACKLOG, dualstack_ipv6=every)
