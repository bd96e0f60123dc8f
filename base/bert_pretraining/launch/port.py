"""The rendezvous port: whether it is free, and which process holds it."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

from bert_pretraining.errors import UserError

_LISTEN = "0A"  # TCP_LISTEN of <net/tcp_states.h>, as /proc/net/tcp writes it


def free_port(wanted: int) -> int:
    """`wanted`, or any free port for 0. UserError with the holder's name if it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", wanted))
            return probe.getsockname()[1]
        except OverflowError as error:
            raise UserError(
                f"--master_port {wanted} cannot be used ({error})", "choose a port from 1 to 65535"
            ) from error
        except OSError as error:
            holder = port_holder(wanted)
            held = f": {holder} holds it" if holder else ""
            raise UserError(
                f"--master_port {wanted} cannot be used ({error.strerror}{held})",
                "choose another port; on one machine, leave --master_port out",
            ) from error


def port_holder(port: int, proc: Path = Path("/proc")) -> str | None:
    """ "NAME (process PID)" of the process that listens on a TCP port; None if unknown.

    The sockets of other users' processes cannot be read.
    """
    sockets = _listening_sockets(port, proc)
    # glob skips folders that it may not list: those of other users and of ended processes.
    for link in proc.glob("[0-9]*/fd/*") if sockets else ():
        with contextlib.suppress(OSError):  # the socket was closed meanwhile
            if str(link.readlink()) in sockets:
                process = link.parents[1]
                return f"{(process / 'comm').read_text().strip()} (process {process.name})"
    return None


def _listening_sockets(port: int, proc: Path) -> set[str]:
    """ "socket:[INODE]" of the sockets that listen on the port."""
    sockets = set()
    for table in ("net/tcp", "net/tcp6"):
        try:
            lines = (proc / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                sockets.add(f"socket:[{fields[9]}]")
    return sockets
