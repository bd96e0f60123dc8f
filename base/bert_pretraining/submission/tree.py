"""A submission's tree: systems/NAME.json, results/NAME/bert/result_*.txt, and what the logs say.

ORG/systems/NAME.json
ORG/benchmarks/bert/implementations/IMPLEMENTATION/...
ORG/results/NAME/bert/result_0.txt to result_9.txt
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bert_pretraining.errors import UserError
from bert_pretraining.logs.reading.events import MLLOG_TOKEN, Event, Fault, read_log

BENCHMARK = "bert"
RESULT_NAME = re.compile(r"result_(\d+)\.txt")


@dataclass(frozen=True)
class ResultLog:
    """The `:::MLLOG` events of one run's log, and the lines that could not be read."""

    path: Path
    events: Sequence[Event]
    faults: Sequence[Fault]

    @cached_property
    def _by_key(self) -> dict[str, list[Event]]:
        found: dict[str, list[Event]] = {}
        for event in self.events:
            found.setdefault(event.key, []).append(event)
        return found

    def all(self, key: str) -> list[Event]:
        """Every event of this key, in the order of the log."""
        return self._by_key.get(key, [])

    def first(self, key: str) -> Event | None:
        return next(iter(self.all(key)), None)

    def last(self, key: str) -> Event | None:
        return next(reversed(self.all(key)), None)

    def value(self, key: str) -> object:
        """The first value of this key, None without it."""
        event = self.first(key)
        return event.value if event else None

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def label(self) -> str:
        """A name that is unique in a series: the file's name, or the last parts of its path."""
        own = RESULT_NAME.fullmatch(self.name)
        return self.name if own else "/".join(self.path.parts[-3:])

    @property
    def status(self) -> str | None:
        """The status of the last `run_stop`, "success" or "aborted"; None without one."""
        stop = self.last("run_stop")
        return str(stop.metadata.get("status")) if stop else None

    @property
    def division(self) -> str | None:
        value = self.value("submission_division")
        return value if isinstance(value, str) else None

    @property
    def global_batch_size(self) -> int | None:
        size = number(self.value("global_batch_size"))
        return int(size) if size is not None and size >= 1 else None

    @property
    def evaluations(self) -> list[tuple[Event, float, float]]:
        """(event, samples, accuracy) of every `eval_accuracy` that has both as numbers."""
        found = [
            (event, number(event.metadata.get("epoch_num")), number(event.value))
            for event in self.all("eval_accuracy")
        ]
        return [entry for entry in found if None not in entry]


@dataclass(frozen=True)
class System:
    """One directory of results/ and the description it needs."""

    name: str
    description: Path  # systems/NAME.json
    folder: Path  # results/NAME/bert

    @property
    def result_paths(self) -> list[Path]:
        """The files named result_NUMBER.txt, by number."""
        found = [path for path in self.folder.glob("*") if RESULT_NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: result_number(path))


def result_number(path: Path) -> int:
    return int(RESULT_NAME.fullmatch(path.name)[1])


def number(value: object) -> float | None:
    """The value if it is a finite number, else None (for true, false, text and null)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if value - value == 0 else None


def read_result(path: Path) -> ResultLog:
    """Read a run's log. Raises UserError if it is missing or not text."""
    log = read_log(path, (MLLOG_TOKEN,))
    return ResultLog(path, log.mllog, log.faults)


def systems(folder: Path) -> list[System]:
    """All systems of a submission. Raises UserError if `folder` is no submission."""
    results = folder / "results"
    if not results.is_dir():
        raise UserError(
            f"{folder} holds no results/",
            "pass the directory ORG of ORG/systems, "
            "ORG/benchmarks and ORG/results ('python -m bert_pretraining submission assemble' "
            "makes one)",
        )
    names = sorted(path.name for path in results.iterdir() if path.is_dir())
    return [
        System(name, folder / "systems" / f"{name}.json", results / name / BENCHMARK)
        for name in names
    ]
