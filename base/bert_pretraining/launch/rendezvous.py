"""The rendezvous of the launchers of all machines: presence, heartbeats, and why one ends.

It uses the TCP store that torchrun's agent keeps on machine 0 at the master port, so no other
port is needed. The heartbeats are for a network link that is cut: gloo and nccl notice only a
process that ends. `board` has what is exchanged, `observer` how machine 0 judges.
"""

from __future__ import annotations

import hashlib
import json
import random
import socket
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore

from bert_pretraining.errors import EXIT_CRASH, EXIT_USAGE
from bert_pretraining.launch import network
from bert_pretraining.launch.board import Arrival, Board, Heartbeat, MachineReport
from bert_pretraining.launch.observer import LONGEST_SILENCE, Observer, Silence
from bert_pretraining.launch.result import AttemptResult
from bert_pretraining.runtime import consistency

HEARTBEAT_INTERVAL = 0.5  # seconds
SECONDS_TO_EXCHANGE = 3.0  # how long a machine that ends waits for the others' reports
SHORTEST_INTERVAL = 0.1  # seconds between two rounds until all have met: a start should be quick,
SECONDS_A_MACHINE = 0.001  # but the more machines meet, the less often each one asks
WAIT = 0.1  # seconds between two looks of the main thread at what this one has read


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


class Rendezvous(threading.Thread):
    """This machine's part in the rendezvous, in a thread that may block in the store for ever."""

    def __init__(self, settings: RendezvousSettings, described: Mapping[str, str]) -> None:
        """described: what must be the same on all machines, see `runtime.consistency`."""
        super().__init__(name="rendezvous", daemon=True)
        self._settings, self._described = settings, described
        self._host = socket.gethostname()
        self._began = time.monotonic()
        self._connected = self._closed = False
        self._broken = ""  # the traceback of an error in this code, which ended the thread
        self._at_once = threading.Event()  # there is something to tell before the next round is due
        self._mine: MachineReport | None = None
        self._duplicate: str | None = None  # another launcher's host, same node_rank
        self._board = Board()
        self._silence = Silence()  # of machine 0, whose boards this machine reads
        self._observer = Observer(settings.num_nodes, self._digest())  # used on machine 0 alone

    def run(self) -> None:
        """Exchange heartbeats and reports until `close`, or until the store is gone."""
        try:
            shared = PrefixStore(f"launchers/{self._settings.attempt}", self._connect())
            self._connected = True
            if not self._introduce(shared):
                return
            exchange = self._observe if self._settings.node == 0 else self._take_part
            beat = 0
            while True:
                last = self._closed
                beat += 1
                exchange(shared, Heartbeat(beat, self._mine, last))
                if last:
                    return
                self._at_once.wait(self._interval())
                self._at_once.clear()
        except RuntimeError:
            return  # the store is gone; `fault` will report that machine 0 is silent
        except Exception:
            self._broken = traceback.format_exc()  # `fault` will tell

    def close(self) -> None:
        """Say that this launcher ends. End the thread, unless it blocks, and its connection."""
        self._closed = True
        self._at_once.set()
        self.join(4 * HEARTBEAT_INTERVAL)

    @property
    def complete(self) -> bool:
        """Whether all machines are here, with the same settings and code."""
        return self._board.complete

    def awaited(self) -> str:
        """The machines that are not here yet, for a notice to the user."""
        at, board = self._settings, self._board
        known = at.num_nodes - board.here if board.here else 1  # without a board, machine 0 alone
        names = _named([str(node) for node in board.absent], known)
        return f"machine {names} of {at.num_nodes}, at {at.host} port {at.port}"

    def fault(self, now: float) -> AttemptResult | None:
        """Why the ranks here must end: another machine ended, is lost or did not come; or None.

        A machine can be lost only after its first heartbeat. now: monotonic time in seconds; ask
        several times a second, since what passes between two calls may be a pause of this process.
        """
        at, board = self._settings, self._board
        self._silence.look(now)
        if self._broken:
            return AttemptResult(
                EXIT_CRASH,
                f"the rendezvous on machine {at.node} ({self._host}) failed, see above; check that "
                "all machines have the same version of this package",
                self._broken,
                is_certain=True,
            )
        if self._duplicate is not None:
            return AttemptResult(
                EXIT_USAGE,
                f"another launcher, on {self._duplicate}, is --node_rank {at.node} of the job at "
                f"{at.host} port {at.port} already; give each machine its own --node_rank",
                node=at.node,
            )
        if board.difference is not None:
            return AttemptResult(EXIT_USAGE, f"{board.difference}; {consistency.FIX}")
        if board.first_cause is not None and board.lost is None:
            return self._result_of(board.first_cause)
        if not board.complete and now - self._began > at.timeout:
            return AttemptResult(EXIT_CRASH, self._absence())
        lost = board.lost
        if lost is None and 0 in self._silent(LONGEST_SILENCE):
            lost = 0
        if lost is None:
            return None
        return AttemptResult(
            EXIT_CRASH,
            f"{board.label(lost)} has not been heard of for {LONGEST_SILENCE:.0f} s, so all "
            "ranks here were ended; check that machine, and the network to "
            f"{at.host} port {at.port}",
        )

    def conclude(self, consequence: bool, result: AttemptResult) -> AttemptResult | None:
        """Report this machine's result; return another machine's if that is the first cause."""
        mine = MachineReport(
            consequence, time.time(), self._settings.node, result.message, result.exit_code
        )
        self._mine = mine
        self._at_once.set()
        self._linger()
        first = min([mine, *filter(None, [self._board.first_cause])])
        gone = self._gone(first)
        return gone if gone is not None or first.node == mine.node else self._result_of(first)

    def settle(self, result: AttemptResult) -> AttemptResult:
        """Another machine's result, or the first cause that is known a little later."""
        self._linger()
        first = self._board.first_cause
        if first is None or result.node == self._settings.node:
            return result
        return self._gone(first) or self._result_of(first)

    def _gone(self, first: MachineReport) -> AttemptResult | None:
        """The result where the first report is a consequence, and its cause reported nothing."""
        gone = self._silent(SECONDS_TO_EXCHANGE * 0.8) if first.consequence else []
        if not gone:
            return None
        return AttemptResult(
            first.exit_code,
            f"{self._board.label(gone[0])} is gone without a report; check its network and its "
            "launcher",
            node=gone[0],
        )

    def _linger(self) -> None:
        """Give the other machines the time to read this machine's report and to write theirs."""
        if self._board.here > 1:
            self._wait(lambda: False, SECONDS_TO_EXCHANGE)

    def wait_for_all(self, seconds: float) -> None:
        """Wait until all machines are here, at most `seconds`."""
        self._wait(lambda: self._board.here == self._settings.num_nodes, seconds)

    def _wait(self, over: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not over() and time.monotonic() < deadline:
            time.sleep(WAIT)
            self._silence.look(time.monotonic())

    def _silent(self, seconds: float) -> list[int]:
        """The machines that have been silent for more than `seconds`; machine 0 has the store."""
        board = self._board
        since_board = 0.0 if board.ended else self._silence.of(0)
        if since_board > seconds:
            return [0]
        return [node for node, silent in board.quiet if silent + since_board > seconds]

    def _result_of(self, report: MachineReport) -> AttemptResult:
        return AttemptResult(
            report.exit_code,
            f"{self._board.label(report.node)} ended: {report.text}",
            by_signal=report.exit_code > 128,
            node=report.node,
        )

    def _absence(self) -> str:
        at, board = self._settings, self._board
        where = f"{at.host} port {at.port} (--master_addr, --master_port)"
        if not self._connected:
            why = network.connection_fault(at.host, at.port)
            return (
                f"machine 0 did not answer at {where} for {at.timeout:g} s{f' ({why})' * bool(why)}"
                "; start the same command there with --node_rank 0, check that the address is "
                "machine 0's and that no firewall blocks the port, or pass --rendezvous_timeout"
            )
        present = [board.label(node) for node in board.present]
        here = _named(present or [f"machine {at.node} ({self._host})"], board.here)
        return (
            f"machine {board.absent[0]} did not come to {where} within {at.timeout:g} s; here are "
            f"{here}; start the same command there with --node_rank {board.absent[0]}, check that "
            "it reaches that address, or pass --rendezvous_timeout"
        )

    def _digest(self) -> str:
        text = json.dumps(dict(self._described), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _interval(self) -> float:
        """Seconds until the next round; not the same on all machines, lest all ask at once."""
        until_met = max(SHORTEST_INTERVAL, SECONDS_A_MACHINE * self._settings.num_nodes)
        usual = HEARTBEAT_INTERVAL if self.complete else min(until_met, HEARTBEAT_INTERVAL)
        return usual * random.uniform(0.8, 1.2)

    def _connect(self) -> TCPStore:
        """The store of machine 0, once it has answered.

        A port forwarder (of a container, of a tunnel) takes a connection before machine 0 is up,
        and drops it then: PyTorch 2.4.1 counts that as connected, and fails at the first message.
        """
        at = self._settings
        while True:
            try:
                store = TCPStore(
                    at.host, at.port, None, at.node == 0, timedelta(seconds=at.timeout + 60),
                    wait_for_workers=False,
                    multi_tenant=True,  # on machine 0 the agent and this thread share one server
                )  # fmt: skip
                store.check(["an answer"])
                return store
            except RuntimeError:
                if at.node == 0 or self._closed:
                    raise
            self._at_once.wait(HEARTBEAT_INTERVAL)

    def _introduce(self, store: PrefixStore) -> bool:
        """Register this machine; False if another launcher has its number already.

        The first heartbeat comes before the arrival, so that a launcher that ends in between is
        either absent or seen to be silent.
        """
        node = self._settings.node
        own = json.dumps({"host": self._host, "launcher": uuid.uuid4().hex})
        first = store.compare_set(f"launcher_of/{node}", "", own).decode()
        if first != own:
            self._duplicate = json.loads(first)["host"]
            return False
        store.set(f"described/{node}", json.dumps(dict(self._described)))
        store.set(f"alive/{node}", Heartbeat(0).text())
        store.append("arrivals", Arrival(node, self._host, self._digest()).line())
        return True

    def _take_part(self, store: PrefixStore, heartbeat: Heartbeat) -> None:
        """A round of any other machine than machine 0: two messages."""
        store.set(f"alive/{self._settings.node}", heartbeat.text())
        self._read(Board.read(store.get("board")))

    def _observe(self, store: PrefixStore, heartbeat: Heartbeat) -> None:
        """A round of machine 0: two messages, and until all have come two or three more."""
        observer = self._observer
        observer.look(time.monotonic())
        if not observer.complete:
            for arrival in Arrival.read_all(store.get("arrivals")):
                observer.arrive(arrival)
            while (node := observer.unexplained()) is not None:
                theirs = json.loads(store.get(f"described/{node}"))
                places = [(observer.label(0), self._described), (observer.label(node), theirs)]
                observer.explain(node, consistency.difference(places))
        observer.hear(0, heartbeat)
        others = [node for node in observer.nodes if node != 0]
        if others:
            sent = store.multi_get([f"alive/{node}" for node in others])
            for node, text in zip(others, sent, strict=True):
                observer.hear(node, Heartbeat.read(text))
        board = observer.board(heartbeat.ended)
        store.set("board", board.text())
        self._read(board)

    def _read(self, board: Board) -> None:
        self._silence.hear(0, board.beat)
        self._board = board


def _named(names: list[str], of: int) -> str:
    """The names, and how many more there are of `of` in all."""
    more = of - len(names)
    return ", ".join(names) + (f" and {more} more" if more > 0 else "")
