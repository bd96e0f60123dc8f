"""Rank reports: small files by which the ranks and the launcher inform each other.

They lie in a folder that the launcher chooses. torchrun alone is not enough: it knows only
success and failure, but exit code 3 (finished without reaching the target) is no failure; it
does not know which rank's error came first, nor whether a rank still makes progress.
"""

from __future__ import annotations

import faulthandler
import functools
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

from bert_pretraining.runtime.files import PARTIAL_SUFFIX, write_whole
from bert_pretraining.runtime.rank_variables import own_rank

FOLDER_VARIABLE = "BERT_PRETRAINING_RANK_REPORTS"
ATTEMPT_VARIABLE = "BERT_PRETRAINING_ATTEMPT"  # 0, or which restart of the ranks this is
STACK_SIGNAL = signal.SIGUSR2
_STOP = "stop"


@dataclass(frozen=True)
class Failure:
    """The error that ended a rank. `detail` is its traceback, empty for a UserError."""

    rank: int
    time: float
    exit_code: int
    message: str
    detail: str


class Heartbeat(NamedTuple):
    """time: of a rank's last progress, in ns since the epoch; None before. updates: how many."""

    time: int | None
    updates: int


# ---- called by a rank


def register(rank: int) -> int | None:
    """Report this rank's process. Returns the signal to end by at once, if there was one."""
    _write(f"process-{rank}.json", {"pid": os.getpid()})
    stop = Path(os.environ[FOLDER_VARIABLE]) / _STOP
    return int(stop.read_text()) if stop.exists() else None


def show_stacks_on_request() -> None:
    """On STACK_SIGNAL from the launcher, write the stacks of all threads to a file.

    faulthandler does it in C, so it works while a thread waits in a library. Without a launcher
    nothing is set up.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        path = Path(folder) / f"stacks-{own_rank()}.txt"
        # faulthandler writes to this file, which stays open until the process ends.
        faulthandler.register(STACK_SIGNAL, file=path.open("w"), all_threads=True)


def is_launched() -> bool:
    """Whether this package's launcher has started this process."""
    return FOLDER_VARIABLE in os.environ


def heartbeat(updates: int = 0) -> None:
    """Report progress: to be called after every step and every evaluation batch.

    From the first call on, the launcher checks this rank for hangs. Takes a few microseconds.

    updates: how many updates have been made since the last call.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        _heartbeat_file(folder, own_rank()).touch(updates)


def record_finish(rank: int, exit_code: int) -> bool:
    """Report this rank's exit code; False if there is no launcher."""
    return _write(f"finish-{rank}.json", {"exit_code": exit_code})


def record_failure(rank: int, exit_code: int, message: str, detail: str = "") -> bool:
    """Report why this rank ends; False if there is no launcher."""
    failure = Failure(rank, time.time(), exit_code, message, detail)
    return _write(f"failure-{rank}.json", asdict(failure))


def leave(exit_code: int) -> NoReturn:
    """End this process without clean-up, in which gloo's threads could abort it.

    They abort when they wait for a rank that is gone, which would look like another failure. A
    rank that has finished first calls `process_group.wait_for_all_to_finish`; a rank that fails
    leaves at once, so that its report is the first. What it leaves behind is whole: logs are
    written line by line and closed before, and a checkpoint that is being written in a thread has
    its name only when it is complete. That one is lost, and the one before it is kept.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


# ---- called by the launcher


def ask_to_stop(folder: Path, signum: int) -> None:
    """Make ranks that register from now on end at once by that signal."""
    _write_in(folder, _STOP, signum)


def read_processes(folder: Path) -> dict[int, int]:
    """Rank -> process id, of the ranks that have registered."""
    return {rank: json.loads(path.read_text())["pid"] for rank, path in _by_rank(folder, "process")}


def read_heartbeats(folder: Path) -> dict[int, Heartbeat]:
    """Rank -> its last heartbeat, of the ranks that made any progress."""
    found = ((rank, path.stat()) for rank, path in _by_rank(folder, "heartbeat"))
    return {rank: Heartbeat(stat.st_mtime_ns, stat.st_atime_ns // 10**9) for rank, stat in found}


def read_stacks(folder: Path) -> dict[int, str]:
    """Rank -> the stacks that faulthandler wrote, of the ranks that have set it up."""
    return {rank: path.read_text(errors="replace") for rank, path in _by_rank(folder, "stacks")}


def finished_ranks(folder: Path) -> set[int]:
    """The ranks that have reported that they finished."""
    return {rank for rank, _ in _by_rank(folder, "finish")}


def read_finish(folder: Path) -> int | None:
    """The exit code that the lowest finished rank of this machine reported."""
    finishes = _by_rank(folder, "finish")
    return json.loads(finishes[0][1].read_text())["exit_code"] if finishes else None


def read_failures(folder: Path) -> list[Failure]:
    """The ranks' failures, earliest first."""
    found = [Failure(**json.loads(path.read_text())) for _, path in _by_rank(folder, "failure")]
    return sorted(found, key=lambda failure: failure.time)


def _by_rank(folder: Path, kind: str) -> list[tuple[int, Path]]:
    paths = (path for path in folder.glob(f"{kind}-*") if path.suffix != PARTIAL_SUFFIX)
    return sorted((int(path.stem.split("-")[1]), path) for path in paths)


class _HeartbeatFile:
    """An empty file: it is written to without space on the disk, in one call of the system.

    The time of its modification is that of the last progress, and the time of its access, in
    seconds since the epoch, is the number of updates.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._updates = path.with_name(path.name + PARTIAL_SUFFIX), 0
        self._path.touch()
        self.touch(0)  # before the launcher can read it
        self._path = self._path.rename(path)

    def touch(self, updates: int) -> None:
        self._updates += updates
        os.utime(self._path, ns=(self._updates * 10**9, time.time_ns()))


@functools.cache
def _heartbeat_file(folder: str, rank: int) -> _HeartbeatFile:
    return _HeartbeatFile(Path(folder) / f"heartbeat-{rank}")


def _write(name: str, content: object) -> bool:
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        _write_in(Path(folder), name, content)
    return bool(folder)


def _write_in(folder: Path, name: str, content: object) -> None:
    write_whole(folder / name, json.dumps(content))
