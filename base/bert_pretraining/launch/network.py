"""Which network interface leads to machine 0. Linux; nothing is sent."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

_GET_ADDRESS = 0x8915  # SIOCGIFADDR of <linux/sockios.h>
_SOMEWHERE_ELSE = "192.0.2.1"  # TEST-NET-1 of RFC 5737: the default route leads there


def interface_to(host: str) -> str | None:
    """The interface that this machine talks to `host` by; None if that cannot be told.

    Where a host's own name means 127.0.1.1, as many systems have it in /etc/hosts, others
    cannot reach it there: the default route's interface is taken instead.
    """
    address = address_towards(host)
    if address is None:
        return None
    if ipaddress.ip_address(address).is_loopback and not _is_loopback(host):
        address = address_towards(_SOMEWHERE_ELSE) or address
    return _interfaces().get(address)


def address_towards(host: str) -> str | None:
    """This machine's address, as `host` would see it; None where no route leads there."""
    with contextlib.suppress(OSError):
        for family, kind, _, _, target in socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
                probe.connect(target)  # of a datagram socket: only chooses the route
                return str(probe.getsockname()[0]).partition("%")[0]
    return None


def connection_fault(host: str, port: int) -> str:
    """Why nobody answers there, in the system's words; empty if somebody does."""
    try:
        socket.create_connection((host, port), timeout=3).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def is_here(host: str) -> bool:
    """Whether `host` is a name or an address of this machine."""
    with contextlib.suppress(OSError):
        for family, kind, _, _, target in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
                probe.bind(target)
                return True
    return False


def is_known(host: str) -> bool:
    """Whether `host` is an address, or a name that this machine can look up."""
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    """Whether the user wrote a loopback address: then all "machines" are this one."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _interfaces() -> dict[str, str]:
    """Address -> interface; every loopback address of IPv4 is lo's."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):  # it has no address
                answer = fcntl.ioctl(probe.fileno(), _GET_ADDRESS, request)
                found[socket.inet_ntoa(answer[20:24])] = name
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, *_, name = line.split()
            found[str(ipaddress.IPv6Address(int(digits, 16)))] = name
    return found
