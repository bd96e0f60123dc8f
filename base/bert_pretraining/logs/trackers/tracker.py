"""What a tracker does: the interface of the classes that write to its package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

Value: TypeAlias = "bool | int | float | str"
STATUSES = ("finished", "failed", "aborted")


@dataclass(frozen=True)
class TrackedRun:
    """A run as trackers name it, and where they keep their files.

    name: of the run's folder. group: of the folder that holds it and the runs beside it.
    folder, output_dir: these two folders. tensorboard_dir: for TensorBoard's files of this run.
    """

    name: str
    group: str
    folder: str
    output_dir: str
    tensorboard_dir: str


class Tracker:
    """Writes one run to a tracker. It lives in a process of its own, see `child.py`.

    The constructor takes no arguments: it sets what keeps the package from the network and from
    telemetry, and imports it. The methods are called in the order in which they stand here, figures
    and texts by step. An exception ends the tracker, and the run goes on without it.
    """

    def start(self, run: TrackedRun, facts: dict[str, Value]) -> None:
        """Training begins. facts: settings, versions, and what is trained on what."""
        raise NotImplementedError

    def figures(self, step: int, values: dict[str, float]) -> None:
        """Figures after `step` updates. A step may come twice, with other figures."""
        raise NotImplementedError

    def text(self, step: int, title: str, text: str) -> None:
        """A notice to people, after `step` updates. title: its kind, in one word."""
        raise NotImplementedError

    def finish(self, step: int, status: str, table: dict[str, Value]) -> None:
        """The run has ended, after `step` updates; everything is to be written.

        status: one of STATUSES. table: the figures of the whole run.
        """
        raise NotImplementedError


def markdown(table: dict[str, Value]) -> str:
    """A table of two columns."""
    rows = [f"| {name} | {value} |" for name, value in table.items()]
    return "\n".join(["| Name | Value |", "|---|---|", *rows])


def numbers(table: dict[str, Value]) -> dict[str, float]:
    """Those values that a curve or a comparison can show; True is 1."""
    return {name: float(value) for name, value in table.items() if not isinstance(value, str)}
