"""Which network interface leads to machine 0, on Linux. No packet is sent to find out."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

_GET_ADDRESS = 0x8915  # SIOCGIFADDR of <linux/sockios.h>
LOCAL_ADDRESS = "127.0.0.1"
TEST_NET_ADDRESS = "192.0.2.1"  # RFC 5737: in no network, so the default route leads there


def interface_to(host: str) -> str | None:
    """The interface by which this machine reaches `host`; None if it is unknown.

    On many systems /etc/hosts maps the host's own name to 127.0.1.1, where other machines cannot
    reach it. Then the interface of the default route is taken.
    """
    address = address_towards(host)
    if address is None:
        return None
    if ipaddress.ip_address(address).is_loopback and not _is_loopback(host):
        address = address_towards(TEST_NET_ADDRESS) or address
    return interfaces().get(address)


def address_towards(host: str) -> str | None:
    """This machine's address as `host` sees it; None if no route leads to `host`."""
    with contextlib.suppress(OSError):
        for family, kind, _, _, target in socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
                probe.connect(target)  # for a datagram socket this only chooses the route
                return str(probe.getsockname()[0]).partition("%")[0]
    return None


def connection_fault(host: str, port: int) -> str:
    """The system's error for a connection to this port; empty if it succeeds."""
    try:
        socket.create_connection((host, port), timeout=3).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def loopback_fault() -> str:
    """Why a process of this machine cannot reach another one at 127.0.0.1; empty if it can."""
    with socket.socket() as server:
        try:
            server.bind((LOCAL_ADDRESS, 0))
            server.listen()
        except OSError as error:
            return error.strerror or str(error)
        return connection_fault(LOCAL_ADDRESS, server.getsockname()[1])


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
    """Whether `host` itself is a loopback address: then all "machines" are this one."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def interfaces() -> dict[str, str]:
    """Address -> interface, for IPv4 and IPv6."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):  # this interface has no address
                answer = fcntl.ioctl(probe.fileno(), _GET_ADDRESS, request)
                found[socket.inet_ntoa(answer[20:24])] = name
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, *_, name = line.split()
            found[str(ipaddress.IPv6Address(int(digits, 16)))] = name
    return found
