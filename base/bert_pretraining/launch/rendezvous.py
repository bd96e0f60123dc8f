"""The launchers of a job's machines: they meet, tell each other that they live, and why they end.

Over the store that torchrun's agent on machine 0 keeps at the master port, so that no other
port is needed. gloo and nccl notice a process that ends, but not a link that is cut.
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
from bert_pretraining.launch.report import Ending
from bert_pretraining.runtime import consistency

EVERY = 0.5  # seconds between two signs of life
LONGEST_SILENCE = 20.0
SECONDS_TO_HEAR = 3.0  # how long a machine that ends waits for what others have to say
_FINISHED = b"finished"  # the last sign of life of a machine that has done its part


@dataclass(frozen=True)
class Meeting:
    """Where and when a job's launchers meet. `timeout`: seconds to wait for all of them."""

    host: str
    port: int
    node: int
    num_nodes: int
    attempt: int
    timeout: float


@dataclass(frozen=True, order=True)
class Report:
    """Why a machine's ranks ended. The least of all reports is the cause of the others.

    follows: whether it may be the consequence of another machine's end.
    """

    follows: bool
    time: float
    node: int
    text: str
    exit_code: int = EXIT_CRASH


class Neighbours(threading.Thread):
    """This machine's side. The thread may block in the store for ever; nobody waits for it."""

    def __init__(self, meeting: Meeting, described: Mapping[str, str]) -> None:
        """described: what must be the same on all machines, see `agreement`."""
        super().__init__(name="neighbours", daemon=True)
        self._meeting, self._described = meeting, described
        self._began = time.monotonic()
        self._connected = self._closed = self._finished = False
        self._mine: Report | None = None
        self._twin: str | None = None  # the host of another launcher with this machine's number
        self._hosts: dict[int, str] = {}
        self._difference: str | None = None
        self._reports: dict[int, Report] = {}
        self._heard: dict[int, tuple[bytes, float]] = {}  # machine -> sign of life, when new
        self._last_round: float | None = None

    def run(self) -> None:
        """Until the store is gone, or `close`."""
        at = self._meeting
        try:
            store = TCPStore(
                at.host, at.port, None, at.node == 0, timedelta(seconds=at.timeout + 60),
                wait_for_workers=False,
                multi_tenant=True,  # on machine 0 the agent and this share one server
            )  # fmt: skip
            mine = PrefixStore(f"launchers/{at.attempt}", store)
            self._connected = True
            if self._introduce(mine):
                while not self._closed:
                    self._round(mine)
                    time.sleep(EVERY)
                if self._finished:
                    mine.set(f"alive/{at.node}", _FINISHED)
        except RuntimeError:
            return  # the silence that follows is what `fault` reports

    def close(self, finished: bool) -> None:
        """End the thread, if it does not block, and with it this side of the store."""
        self._finished, self._closed = finished, True
        self.join(4 * EVERY)

    @property
    def met(self) -> bool:
        """Whether all machines have come, and were given the same."""
        return len(self._hosts) == self._meeting.num_nodes and self._difference is None

    def awaited(self) -> str:
        """For a notice: who has not come yet."""
        at = self._meeting
        absent = [node for node in range(at.num_nodes) if node not in self._hosts]
        names = ", ".join(str(node) for node in absent) if self._connected else "0"
        return f"machine {names} of {at.num_nodes}, at {at.host} port {at.port}"

    def fault(self, now: float) -> Ending | None:
        """Why the ranks here should end: another machine's report, its silence or absence.

        now: seconds, monotonic. Silence counts from the first contact on.
        """
        if self._reports:
            return self._of_another(min(self._reports.values()))
        at = self._meeting
        if self._twin is not None:
            return Ending(
                EXIT_USAGE,
                f"another launcher, on {self._twin}, is --node_rank {at.node} of the job at "
                f"{at.host} port {at.port} already: give each machine its own --node_rank",
                node=at.node,
            )
        if self._difference is not None:
            return Ending(EXIT_USAGE, self._difference)
        if not self.met and now - self._began > at.timeout:
            return Ending(EXIT_CRASH, self._absence())
        silent = self._silent_for(LONGEST_SILENCE, now)
        if not silent:
            return None
        return Ending(
            EXIT_CRASH,
            f"{self._called(silent[0])} has not been heard of for {LONGEST_SILENCE:.0f} s: look at "
            f"it, and at the network to port {at.port} of {at.host}; all ranks here were ended",
        )

    def conclude(self, follows: bool, ending: Ending) -> Ending | None:
        """Tell the others how this machine ended; another's ending if that is the first cause."""
        mine = Report(follows, time.time(), self._meeting.node, ending.message, ending.exit_code)
        self._mine = mine
        self.linger()
        first = min([mine, *self._reports.values()])
        if first is not mine:
            return self._of_another(first)
        gone = self._silent_for(SECONDS_TO_HEAR * 0.8, time.monotonic()) if follows else []
        if not gone:
            return None
        return Ending(
            ending.exit_code,
            f"{self._called(gone[0])} is gone without a word: it, its network or its launcher",
            node=gone[0],
        )

    def linger(self) -> None:
        """Leave the others the time to hear, and to say, why they end."""
        if self._hosts.keys() - {self._meeting.node}:
            time.sleep(SECONDS_TO_HEAR)

    def wait_for_all(self, seconds: float) -> None:
        """Until all have come, or for so long."""
        deadline = time.monotonic() + seconds
        while len(self._hosts) < self._meeting.num_nodes and time.monotonic() < deadline:
            time.sleep(EVERY / 5)

    def _silent_for(self, seconds: float, now: float) -> list[int]:
        """Machines that were heard of, but not for so long."""
        if self._last_round is None:
            return []
        if now - self._last_round > seconds:
            return [0]  # which keeps the store
        return [
            node
            for node, (beat, since) in self._heard.items()
            if beat != _FINISHED and now - since > seconds
        ]

    def _called(self, node: int) -> str:
        return f"machine {node} ({self._hosts[node]})" if node in self._hosts else f"machine {node}"

    def _of_another(self, report: Report) -> Ending:
        return Ending(
            report.exit_code,
            f"{self._called(report.node)} ended: {report.text}",
            by_signal=report.exit_code > 128,
            node=report.node,
        )

    def _absence(self) -> str:
        at = self._meeting
        where = f"{at.host} port {at.port} (--master_addr, --master_port)"
        if not self._connected:
            why = network.connection_fault(at.host, at.port)
            return (
                f"machine 0 did not answer at {where} for {at.timeout:g} s{f' ({why})' * bool(why)}"
                ": start the same command there with --node_rank 0, see that the address is "
                "machine 0's and that no firewall blocks the port, or pass --rendezvous_timeout"
            )
        absent = next(node for node in range(at.num_nodes) if node not in self._hosts)
        present = ", ".join(self._called(node) for node in sorted(self._hosts))
        return (
            f"machine {absent} did not come to {where} within {at.timeout:g} s; here are "
            f"{present}: start the same command there with --node_rank {absent}, see that it "
            "reaches that address, or pass --rendezvous_timeout"
        )

    def _introduce(self, store: PrefixStore) -> bool:
        """Say who is here, unless another has this machine's number already."""
        node, host = self._meeting.node, socket.gethostname()
        if store.add(f"launchers_of/{node}", 1) > 1:
            self._twin = json.loads(store.get(f"here/{node}"))["host"]
            return False
        store.set(f"here/{node}", json.dumps({"host": host, "described": self._described}))
        return True

    def _round(self, store: PrefixStore) -> None:
        at = self._meeting
        store.set(f"alive/{at.node}", str(time.monotonic()))
        if self._mine is not None:
            store.set(f"report/{at.node}", json.dumps(asdict(self._mine)))
        if not self.met:
            self._look_who_is_here(store)
        for node in range(at.num_nodes):
            if node == at.node:
                continue
            if store.check([f"alive/{node}"]):
                beat = store.get(f"alive/{node}")
                if self._heard.get(node, (b"", 0.0))[0] != beat:
                    self._heard[node] = (beat, time.monotonic())
            if store.check([f"report/{node}"]):
                self._reports[node] = Report(**json.loads(store.get(f"report/{node}")))
        self._last_round = time.monotonic()

    def _look_who_is_here(self, store: PrefixStore) -> None:
        nodes = range(self._meeting.num_nodes)
        here = [node for node in nodes if store.check([f"here/{node}"])]
        said = {node: json.loads(store.get(f"here/{node}")) for node in here}
        hosts = {node: answer["host"] for node, answer in said.items()}
        described = [(f"machine {node} ({hosts[node]})", said[node]["described"]) for node in said]
        self._difference = consistency.difference(described)
        self._hosts = hosts
