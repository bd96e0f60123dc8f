"""The launchers of a job's machines: they tell each other that they live, and why they end.

Over the store that torchrun's agent on machine 0 keeps at the master port, so that no other
port is needed. gloo and nccl notice a process that ends, but not a link that is cut.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict, dataclass
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore

EVERY = 1.0  # seconds between two signs of life
LONGEST_SILENCE = 30.0
SECONDS_TO_HEAR = 3.0  # how long a machine that ends waits for what others have to say


@dataclass(frozen=True, order=True)
class Report:
    """Why a machine's ranks ended. The least of all reports is the cause of the others.

    follows: whether it may be the consequence of another machine's end.
    """

    follows: bool
    time: float
    node: int
    text: str


class Neighbours(threading.Thread):
    """This machine's side. The thread may block in the store for ever; nobody waits for it."""

    def __init__(self, host: str, port: int, node: int, num_nodes: int, attempt: int) -> None:
        super().__init__(name="neighbours", daemon=True)
        self._host, self._port, self._attempt = host, port, attempt
        self._node, self._num_nodes = node, num_nodes
        self._closed = False
        self._mine: Report | None = None
        self._reports: dict[int, Report] = {}
        self._heard: dict[int, tuple[bytes, float]] = {}  # machine -> sign of life, when new
        self._last_round: float | None = None

    def run(self) -> None:
        """Until the store is gone, or `close`."""
        try:
            store = TCPStore(
                self._host, self._port, None, self._node == 0, timedelta(minutes=15),
                wait_for_workers=False,
                multi_tenant=True,  # on machine 0 the agent and this share one server
            )  # fmt: skip
            mine = PrefixStore(f"launchers/{self._attempt}", store)
            while not self._closed:
                self._round(mine)
                time.sleep(EVERY)
        except RuntimeError:
            return  # the silence that follows is what `fault` reports

    def close(self) -> None:
        """End the thread, if it does not block, and with it this side of the store."""
        self._closed = True
        self.join(2 * EVERY)

    def fault(self, now: float) -> str | None:
        """Why the ranks here should end: another machine's report, or its silence.

        now: seconds, monotonic. Silence counts from the first contact on.
        """
        if self._reports:
            first = min(self._reports.values())
            return f"machine {first.node} ended: {first.text}"
        if self._last_round is None:
            return None
        silent = [node for node, (_, at) in self._heard.items() if now - at > LONGEST_SILENCE]
        if now - self._last_round > LONGEST_SILENCE:
            silent = [0]
        if not silent:
            return None
        return (
            f"machine {silent[0]} has not been heard of for {LONGEST_SILENCE:.0f} s: look at it, "
            f"and at the network to port {self._port} of {self._host}"
        )

    def conclude(self, follows: bool, text: str) -> Report:
        """Tell the others why this machine's ranks ended; the first cause of all that is known."""
        self._mine = Report(follows, time.time(), self._node, text)
        time.sleep(SECONDS_TO_HEAR)
        return min([self._mine, *self._reports.values()])

    def _round(self, store: PrefixStore) -> None:
        store.set(f"alive/{self._node}", str(time.monotonic()))
        if self._mine is not None:
            store.set(f"report/{self._node}", json.dumps(asdict(self._mine)))
        for node in range(self._num_nodes):
            if node == self._node:
                continue
            if store.check([f"alive/{node}"]):
                beat = store.get(f"alive/{node}")
                if self._heard.get(node, (b"", 0.0))[0] != beat:
                    self._heard[node] = (beat, time.monotonic())
            if store.check([f"report/{node}"]):
                self._reports[node] = Report(**json.loads(store.get(f"report/{node}")))
        self._last_round = time.monotonic()
