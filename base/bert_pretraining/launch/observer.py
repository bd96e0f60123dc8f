"""Machine 0's judgement of all machines, from their arrivals and heartbeats. Pure."""

from __future__ import annotations

from collections.abc import Hashable

from bert_pretraining.launch.board import Arrival, Board, Heartbeat, MachineReport

LONGEST_SILENCE = 20.0  # seconds without a heartbeat after which a machine counts as lost
LATE = 1.0  # seconds of silence after which the board names a machine as quiet
LONGEST_LOOK = 2.0  # seconds; what passes beyond it between two looks counts as a pause
_NAMED = 8  # how many machines the board names at most for one reason


class Silence:
    """For how long machines have sent nothing new, without the pauses of this process itself.

    A pause (SIGSTOP, a suspended machine) shows as a long time between two looks. After it, nothing
    new may lie in the store, and no other machine is to blame.
    """

    def __init__(self) -> None:
        self._watched = 0.0  # seconds
        self._looked_at: float | None = None
        self._heard: dict[int, tuple[Hashable, float]] = {}  # machine -> what, when

    def look(self, now: float) -> None:
        """Time passes. now: monotonic, in seconds."""
        if self._looked_at is not None:
            self._watched += min(max(now - self._looked_at, 0.0), LONGEST_LOOK)
        self._looked_at = now

    def hear(self, node: int, sent: Hashable) -> None:
        """This is the newest that the machine has sent; the same as before is no news."""
        if node not in self._heard or self._heard[node][0] != sent:
            self._heard[node] = (sent, self._watched)

    def forget(self, node: int) -> None:
        """The machine has said that it will send nothing more."""
        self._heard.pop(node, None)

    def of(self, node: int) -> float:
        """Seconds of the machine's silence; 0 if it was never heard."""
        return self._watched - self._heard[node][1] if node in self._heard else 0.0

    def longest(self, seconds: float) -> list[int]:
        """The machines that are silent for more than `seconds`, the most silent first."""
        late = [node for node in self._heard if self.of(node) > seconds]
        return sorted(late, key=lambda node: (-self.of(node), node))


class Observer:
    """What machine 0 knows of all machines."""

    def __init__(self, num_nodes: int, digest: str) -> None:
        """digest: of what must be the same on all machines, as it is on machine 0."""
        self._num_nodes, self._digest = num_nodes, digest
        self._hosts: dict[int, str] = {}
        self._differing: dict[int, str | None] = {}  # machine -> the difference, once it is known
        self._reports: dict[int, MachineReport] = {}
        self._silence = Silence()
        self._lost: int | None = None
        self._beat = 0

    @property
    def nodes(self) -> list[int]:
        """The machines that have come."""
        return sorted(self._hosts)

    @property
    def complete(self) -> bool:
        """Whether all machines have come, with the same settings and code."""
        return len(self._hosts) == self._num_nodes and not self._differing

    def arrive(self, arrival: Arrival) -> None:
        """A machine has come. Of two with one number the first counts."""
        if arrival.node not in self._hosts:
            self._hosts[arrival.node] = arrival.host
            if arrival.digest != self._digest:
                self._differing[arrival.node] = None

    def unexplained(self) -> int | None:
        """The first machine whose settings or code differ, if it is not known how; or None."""
        if not self._differing:
            return None
        first = min(self._differing)
        return first if self._differing[first] is None else None

    def explain(self, node: int, difference: str | None) -> None:
        """How the machine differs from machine 0; None if it does not after all."""
        if difference is None:
            del self._differing[node]
        else:
            self._differing[node] = difference

    def label(self, node: int) -> str:
        return Board(hosts=tuple(self._hosts.items())).label(node)

    def hear(self, node: int, heartbeat: Heartbeat) -> None:
        """The newest heartbeat of a machine, machine 0 among them."""
        if heartbeat.report is not None:
            self._reports[node] = heartbeat.report
        if heartbeat.ended or heartbeat.report is not None:
            self._silence.forget(node)
        else:
            self._silence.hear(node, heartbeat.beat)

    def look(self, now: float) -> None:
        """A round begins. now: monotonic, in seconds."""
        self._silence.look(now)

    def board(self, ended: bool = False) -> Board:
        """The judgement after a round. ended: whether machine 0's launcher ends now."""
        silent = self._silence.longest(LONGEST_SILENCE)
        if silent and self._lost is None and not self._reports:
            self._lost = silent[0]
        quiet = self._silence.longest(LATE)[:_NAMED]
        first = min(self._reports.values(), default=None)
        everyone = len(self._hosts) == self._num_nodes
        absent = [] if everyone else [n for n in range(self._num_nodes) if n not in self._hosts]
        present = [] if everyone else self.nodes[:_NAMED]
        named = {*present, *quiet, self._lost, first.node if first else None}
        self._beat += 1
        return Board(
            beat=self._beat,
            here=len(self._hosts),
            complete=self.complete,
            absent=tuple(absent[:_NAMED]),
            present=tuple(present),
            hosts=tuple((node, host) for node, host in self._hosts.items() if node in named),
            difference=self._difference(),
            first_cause=first,
            lost=self._lost,
            quiet=tuple((node, round(self._silence.of(node), 1)) for node in quiet),
            ended=ended,
        )

    def _difference(self) -> str | None:
        return self._differing[min(self._differing)] if self._differing else None
