"""The rendezvous of the launchers of all machines: presence, heartbeats, and why one ends.

It uses the TCP store that torchrun's agent keeps on machine 0 at the master port, so no other
port is needed. The heartbeats are for a network link that is cut: gloo and nccl notice only a
process that ends.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore

from bert_pretraining.errors import EXIT_CRASH, EXIT_USAGE
from bert_pretraining.launch import network
from bert_pretraining.launch.result import AttemptResult
from bert_pretraining.runtime import consistency

HEARTBEAT_INTERVAL = 0.5  # seconds
LONGEST_SILENCE = 20.0  # seconds without a heartbeat after which a machine counts as lost
SECONDS_TO_EXCHANGE = 3.0  # how long a machine that ends waits for the others' reports
FINISHED_HEARTBEAT = b"finished"  # the last heartbeat of a machine whose ranks have finished


@dataclass(frozen=True)
class RendezvousSettings:
    """Where the launchers meet (host, port), which one this is, and how long it waits.

    attempt: 0, or the number of the restart. timeout: seconds to wait for all machines.
    """

    host: str
    port: int
    node: int
    num_nodes: int
    attempt: int
    timeout: float


@dataclass(frozen=True, order=True)
class MachineReport:
    """Why a machine's ranks ended. The least of all machines' reports is the first cause.

    consequence: whether another machine's end may have caused this one.
    """

    consequence: bool
    time: float
    node: int
    text: str
    exit_code: int = EXIT_CRASH


class Heartbeats:
    """When each other machine last sent a new heartbeat, by this machine's monotonic clock."""

    def __init__(self) -> None:
        self._newest: dict[int, tuple[bytes, float]] = {}  # machine -> heartbeat, when it was new
        self._last_round: float | None = None

    def read(self, node: int, heartbeat: bytes, now: float) -> None:
        """The store holds this heartbeat of that machine."""
        if self._newest.get(node, (b"", 0.0))[0] != heartbeat:
            self._newest[node] = (heartbeat, now)

    def round_ended(self, now: float) -> None:
        """The store has answered all questions of one round."""
        self._last_round = now

    def silent(self, seconds: float, now: float) -> list[int]:
        """The machines that have sent heartbeats, but none for `seconds`."""
        if self._last_round is None:
            return []
        if now - self._last_round > seconds:
            return [0]  # the store is on machine 0
        return [
            node
            for node, (heartbeat, since) in self._newest.items()
            if heartbeat != FINISHED_HEARTBEAT and now - since > seconds
        ]


class Rendezvous(threading.Thread):
    """This machine's part in the rendezvous, in a thread that may block in the store for ever."""

    def __init__(self, settings: RendezvousSettings, described: Mapping[str, str]) -> None:
        """described: what must be the same on all machines, see `runtime.consistency`."""
        super().__init__(name="rendezvous", daemon=True)
        self._settings, self._described = settings, described
        self._began = time.monotonic()
        self._connected = self._closed = self._finished = False
        self._mine: MachineReport | None = None
        self._duplicate: str | None = None  # another launcher's host, same node_rank
        self._hosts: dict[int, str] = {}
        self._difference: str | None = None
        self._reports: dict[int, MachineReport] = {}
        self._heartbeats = Heartbeats()

    def run(self) -> None:
        """Exchange heartbeats and reports until `close`, or until the store is gone."""
        at = self._settings
        try:
            store = TCPStore(
                at.host, at.port, None, at.node == 0, timedelta(seconds=at.timeout + 60),
                wait_for_workers=False,
                multi_tenant=True,  # on machine 0 the agent and this thread share one server
            )  # fmt: skip
            mine = PrefixStore(f"launchers/{at.attempt}", store)
            self._connected = True
            if self._introduce(mine):
                while not self._closed:
                    self._round(mine)
                    time.sleep(HEARTBEAT_INTERVAL)
                if self._finished:
                    mine.set(f"alive/{at.node}", FINISHED_HEARTBEAT)
        except RuntimeError:
            return  # the store is gone; `fault` will report missing heartbeats

    def close(self, finished: bool) -> None:
        """End the thread, unless it blocks, and with it this machine's connection to the store."""
        self._finished, self._closed = finished, True
        self.join(4 * HEARTBEAT_INTERVAL)

    @property
    def complete(self) -> bool:
        """Whether all machines are here, with the same settings and code."""
        return len(self._hosts) == self._settings.num_nodes and self._difference is None

    def awaited(self) -> str:
        """The machines that are not here yet, for a notice to the user."""
        at = self._settings
        absent = [node for node in range(at.num_nodes) if node not in self._hosts]
        names = ", ".join(str(node) for node in absent) if self._connected else "0"
        return f"machine {names} of {at.num_nodes}, at {at.host} port {at.port}"

    def fault(self, now: float) -> AttemptResult | None:
        """Why the ranks here must end: another machine ended, is lost or did not come; or None.

        A machine can be lost only after its first heartbeat. now: monotonic time in seconds.
        """
        if self._reports:
            return self._result_of(min(self._reports.values()))
        at = self._settings
        if self._duplicate is not None:
            return AttemptResult(
                EXIT_USAGE,
                f"another launcher, on {self._duplicate}, is --node_rank {at.node} of the job at "
                f"{at.host} port {at.port} already; give each machine its own --node_rank",
                node=at.node,
            )
        if self._difference is not None:
            return AttemptResult(EXIT_USAGE, f"{self._difference}; {consistency.FIX}")
        if not self.complete and now - self._began > at.timeout:
            return AttemptResult(EXIT_CRASH, self._absence())
        silent = self._heartbeats.silent(LONGEST_SILENCE, now)
        if not silent:
            return None
        return AttemptResult(
            EXIT_CRASH,
            f"{self._label(silent[0])} has not been heard of for {LONGEST_SILENCE:.0f} s, so all "
            "ranks here were ended; check that machine, and the network to "
            f"{at.host} port {at.port}",
        )

    def conclude(self, consequence: bool, result: AttemptResult) -> AttemptResult | None:
        """Report this machine's result; return another machine's if that is the first cause."""
        mine = MachineReport(
            consequence, time.time(), self._settings.node, result.message, result.exit_code
        )
        self._mine = mine
        self.linger()
        first = min([mine, *self._reports.values()])
        if first is not mine:
            return self._result_of(first)
        gone = (
            self._heartbeats.silent(SECONDS_TO_EXCHANGE * 0.8, time.monotonic())
            if consequence
            else []
        )
        if not gone:
            return None
        return AttemptResult(
            result.exit_code,
            f"{self._label(gone[0])} is gone without a report; check its network and its launcher",
            node=gone[0],
        )

    def linger(self) -> None:
        """Give the other machines the time to read this machine's report and to write theirs."""
        if self._hosts.keys() - {self._settings.node}:
            time.sleep(SECONDS_TO_EXCHANGE)

    def wait_for_all(self, seconds: float) -> None:
        """Wait until all machines are here, at most `seconds`."""
        deadline = time.monotonic() + seconds
        while len(self._hosts) < self._settings.num_nodes and time.monotonic() < deadline:
            time.sleep(HEARTBEAT_INTERVAL / 5)

    def _label(self, node: int) -> str:
        return f"machine {node} ({self._hosts[node]})" if node in self._hosts else f"machine {node}"

    def _result_of(self, report: MachineReport) -> AttemptResult:
        return AttemptResult(
            report.exit_code,
            f"{self._label(report.node)} ended: {report.text}",
            by_signal=report.exit_code > 128,
            node=report.node,
        )

    def _absence(self) -> str:
        at = self._settings
        where = f"{at.host} port {at.port} (--master_addr, --master_port)"
        if not self._connected:
            why = network.connection_fault(at.host, at.port)
            return (
                f"machine 0 did not answer at {where} for {at.timeout:g} s{f' ({why})' * bool(why)}"
                "; start the same command there with --node_rank 0, check that the address is "
                "machine 0's and that no firewall blocks the port, or pass --rendezvous_timeout"
            )
        absent = next(node for node in range(at.num_nodes) if node not in self._hosts)
        present = ", ".join(self._label(node) for node in sorted(self._hosts))
        return (
            f"machine {absent} did not come to {where} within {at.timeout:g} s; here are "
            f"{present}; start the same command there with --node_rank {absent}, check that it "
            "reaches that address, or pass --rendezvous_timeout"
        )

    def _introduce(self, store: PrefixStore) -> bool:
        """Register this machine; False if another launcher has its number already."""
        node, host = self._settings.node, socket.gethostname()
        if store.add(f"launchers_of/{node}", 1) > 1:
            self._duplicate = json.loads(store.get(f"here/{node}"))["host"]
            return False
        store.set(f"here/{node}", json.dumps({"host": host, "described": self._described}))
        return True

    def _round(self, store: PrefixStore) -> None:
        at = self._settings
        store.set(f"alive/{at.node}", str(time.monotonic()))
        if self._mine is not None:
            store.set(f"report/{at.node}", json.dumps(asdict(self._mine)))
        if not self.complete:
            self._read_presence(store)
        for node in range(at.num_nodes):
            if node == at.node:
                continue
            if store.check([f"alive/{node}"]):
                self._heartbeats.read(node, store.get(f"alive/{node}"), time.monotonic())
            if store.check([f"report/{node}"]):
                self._reports[node] = MachineReport(**json.loads(store.get(f"report/{node}")))
        self._heartbeats.round_ended(time.monotonic())

    def _read_presence(self, store: PrefixStore) -> None:
        nodes = range(self._settings.num_nodes)
        here = [node for node in nodes if store.check([f"here/{node}"])]
        said = {node: json.loads(store.get(f"here/{node}")) for node in here}
        hosts = {node: answer["host"] for node, answer in said.items()}
        described = [(f"machine {node} ({hosts[node]})", said[node]["described"]) for node in said]
        self._difference = consistency.difference(described)
        self._hosts = hosts
