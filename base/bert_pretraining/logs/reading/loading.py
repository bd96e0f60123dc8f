"""Reading runs from log files and folders, of this package or of others.

A run is a file (an MLPerf log, a PerfLog, or the output on the terminal with both) or a folder
with `mllog.txt` and `perflog.txt`, as this package writes it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from bert_pretraining.errors import UserError
from bert_pretraining.logs.reading.events import Event, read_log
from bert_pretraining.logs.reading.run_of_events import reduce_run
from bert_pretraining.logs.reading.runs import Run
from bert_pretraining.runtime.files import real

RUN_FILES = ("mllog.txt", "perflog.txt")
MAX_DEPTH = 4  # ORGANIZATION/results/SYSTEM/bert/result_0.txt


def load_runs(paths: Sequence[str | Path]) -> list[Run]:
    """One run for each file or folder of a run. Of another folder, all runs in it.

    Raises:
        UserError: a path is missing, is no log of BERT, or holds several runs.
    """
    found: dict[Path, list[Path]] = {}
    for path in paths:
        for run, files in _logs_of(Path(path)):
            found.setdefault(run, files)
    names = _distinct_names(list(found))
    return [
        _load_run(run, name, files) for name, (run, files) in zip(names, found.items(), strict=True)
    ]


def _logs_of(path: Path) -> list[tuple[Path, list[Path]]]:
    """Each run at `path`: its file or folder, and its log files."""
    if not path.is_dir():
        return [(path, [path])]
    runs = _runs_in(path, MAX_DEPTH)
    if not runs:
        raise UserError(
            f"{path}: holds neither {' nor '.join(RUN_FILES)} nor result_*.txt, and nor do the "
            "folders in it",
            "pass log files or a run's folder",
        )
    return runs


def _runs_in(folder: Path, depth: int) -> list[tuple[Path, list[Path]]]:
    """The runs of a folder: the folder itself, or those in it, as in a series or a submission."""
    files = [folder / name for name in RUN_FILES if (folder / name).is_file()]
    if files:
        return [(folder, files)]
    try:
        entries = sorted(folder.iterdir(), key=_natural)
        inside = [entry for entry in entries if depth and entry.is_dir()]
    except OSError as error:
        raise UserError(f"cannot read {folder} ({error.strerror})", "pass a log") from error
    runs = [run for entry in inside for run in _runs_in(entry, depth - 1)]
    results = [entry for entry in entries if re.fullmatch(r"result_\d+\.txt", entry.name)]
    return runs + [(entry, [entry]) for entry in results]


def _natural(path: Path) -> list[object]:
    """A sort key that puts result_2 before result_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _distinct_names(runs: list[Path]) -> list[str]:
    """A name for each run: as many of the last parts of its path as make all names differ.

    Parts that are equal in all names are left out, except the last. A single mllog.txt has
    the name of its folder.
    """
    parts = []
    for run in map(real, runs):
        folder = run.parent.parts
        parts.append(folder if run.name in RUN_FILES else (*folder, run.stem))
    for count in range(1, max(map(len, parts), default=1)):
        tails = [each[-count:] for each in parts]
        if len(set(tails)) == len(tails):
            shared = [len(set(column)) == 1 for column in zip(*tails, strict=False)]
            return [
                "/".join(
                    part
                    for index, part in enumerate(tail)
                    if index == len(tail) - 1 or not shared[index]
                )
                for tail in tails
            ]
    return [str(run) for run in runs]


def _load_run(path: Path, name: str, files: list[Path]) -> Run:
    logs = [read_log(file) for file in files]
    mllog = [event for log in logs for event in log.mllog]
    perflog = _one_rank([event for log in logs for event in log.perflog])
    if not mllog and not perflog:
        raise UserError(f"{path}: no :::MLLOG and no [PerfLog] line", "pass a run's log")
    _require_one_run(path, mllog, "run_start", "run_stop")
    _require_one_run(path, perflog, "TRAIN_BEGIN", "TRAIN_END")
    return reduce_run(path, name, logs, mllog, perflog)


def _one_rank(events: list[Event]) -> list[Event]:
    """The events of the lowest rank. The other ranks log the same."""
    ranks = [event.metadata.get("rank") or 0 for event in events]
    return [event for event, rank in zip(events, ranks, strict=True) if rank == min(ranks)]


def _require_one_run(path: Path, events: list[Event], start: str, stop: str) -> None:
    stopped = None
    for event in events:
        if event.key == start and stopped is not None:
            raise UserError(
                f"{path}: holds several runs ({start} in line {event.line} after {stop} in line "
                f"{stopped})",
                "give each run a file of its own",
            )
        if event.key == stop:
            stopped = event.line
