"""What the launchers of all machines tell each other: one heartbeat each, one board for all.

Every launcher writes its own heartbeat, and reads the board. Machine 0 alone reads all heartbeats
and writes the board. So the messages of a launcher do not grow with the number of machines.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields

from bert_pretraining.errors import EXIT_CRASH


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


@dataclass(frozen=True)
class Heartbeat:
    """A machine's sign of life.

    beat: a number that grows with each heartbeat. report: why its ranks ended, if they failed.
    ended: whether its launcher ends now, with a report or since all is told; then it is the last
    heartbeat.
    """

    beat: int
    report: MachineReport | None = None
    ended: bool = False

    def text(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def read(text: bytes | str) -> Heartbeat:
        """The heartbeat that `text` wrote."""
        values = _known(Heartbeat, json.loads(text))
        return Heartbeat(**{**values, "report": _report(values.get("report"))})


@dataclass(frozen=True)
class Arrival:
    """A launcher has come: its machine, and a digest of what must be the same on all machines."""

    node: int
    host: str
    digest: str

    def line(self) -> str:
        return json.dumps(asdict(self)) + "\n"

    @staticmethod
    def read_all(text: bytes) -> list[Arrival]:
        """The arrivals, from their lines."""
        return [Arrival(**_known(Arrival, json.loads(line))) for line in text.splitlines()]


@dataclass(frozen=True)
class Board:
    """What machine 0 tells all machines. Its size does not grow with the number of machines.

    Attributes:
        beat: a number that grows with each round of machine 0.
        here: how many machines have come.
        complete: whether all have come, with the same settings and code.
        absent: the first machines that have not come.
        present: the first machines that have come; empty once all have.
        hosts: the host names of the machines that the board names, as pairs (machine, host).
        difference: how the settings of one machine differ from machine 0's.
        first_cause: the first cause of all failures that have been reported so far.
        lost: the machine that has been silent for too long.
        quiet: machines that are late with a heartbeat, as pairs (machine, seconds of silence).
        ended: whether machine 0's launcher ends now; then it is the last board.
    """

    beat: int = 0
    here: int = 0
    complete: bool = False
    absent: tuple[int, ...] = (0,)
    present: tuple[int, ...] = ()
    hosts: tuple[tuple[int, str], ...] = ()
    difference: str | None = None
    first_cause: MachineReport | None = None
    lost: int | None = None
    quiet: tuple[tuple[int, float], ...] = ()
    ended: bool = False

    def text(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def read(text: bytes | str) -> Board:
        """The board that `text` wrote."""
        values = _known(Board, json.loads(text))
        for name in ("absent", "present"):
            values[name] = tuple(values.get(name, ()))
        for name in ("hosts", "quiet"):
            values[name] = tuple((node, value) for node, value in values.get(name, ()))
        values["first_cause"] = _report(values.get("first_cause"))
        return Board(**values)

    def label(self, node: int) -> str:
        """ "machine 3 (gpu07)", or without the host where the board does not name it."""
        host = dict(self.hosts).get(node)
        return f"machine {node}" if host is None else f"machine {node} ({host})"


def _report(values: dict | None) -> MachineReport | None:
    return None if values is None else MachineReport(**_known(MachineReport, values))


def _known(kind: type, values: dict) -> dict:
    """The fields that this code knows.

    Another machine may run other code, and the message that says so must be readable.
    """
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in values.items() if name in names}
