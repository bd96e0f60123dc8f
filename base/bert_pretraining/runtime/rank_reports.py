"""What ranks and launcher tell each other: small files in a folder that the launcher names.

torchrun knows only success and failure of its children; exit code 3 (finished without
reaching the target) is no failure, and the first failure's own words are worth more than
the last one's. It also does not know whether a rank still makes progress.
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
from typing import NoReturn

from bert_pretraining.runtime.files import UNFINISHED, write_whole

FOLDER_VARIABLE = "BERT_PRETRAINING_OUTCOME"
ATTEMPT_VARIABLE = "BERT_PRETRAINING_ATTEMPT"  # 0, or which restart of the ranks this is
STACK_SIGNAL = signal.SIGUSR2
_STOP = "stop"


@dataclass(frozen=True)
class Failure:
    """One rank's end by an error. `detail` is a traceback, or empty for a UserError."""

    rank: int
    time: float
    exit_code: int
    message: str
    detail: str


# ---- what a rank says


def register(rank: int) -> int | None:
    """Tell the launcher this rank's process; the signal by which to end at once, if any."""
    _write(f"process-{rank}.json", {"pid": os.getpid()})
    stop = Path(os.environ[FOLDER_VARIABLE]) / _STOP
    return int(stop.read_text()) if stop.exists() else None


def show_stacks_on_request() -> None:
    """Let the launcher have this process write the stacks of all its threads.

    In C, so that it also works while a thread waits in a library. No launcher: nothing.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        path = Path(folder) / f"stacks-{_rank()}.txt"
        # The file stays open as long as the process lives: faulthandler writes to it.
        faulthandler.register(STACK_SIGNAL, file=path.open("w"), all_threads=True)


def heartbeat() -> None:
    """Say that this rank makes progress: call it once a step and once an evaluation batch.

    With its first call, the launcher starts to watch this rank. A few microseconds.
    """
    path = _heartbeat_path()
    if path is not None:
        os.utime(path)


def record_finish(rank: int, exit_code: int) -> bool:
    """Tell the launcher, if there is one, what this rank earned."""
    return _write(f"finish-{rank}.json", {"exit_code": exit_code})


def record_failure(rank: int, exit_code: int, message: str, detail: str = "") -> bool:
    """Tell the launcher why this rank ends; False if nobody launched it."""
    failure = Failure(rank, time.time(), exit_code, message, detail)
    return _write(f"failure-{rank}.json", asdict(failure))


def leave(exit_code: int) -> NoReturn:
    """End a rank without clean-up: gloo's threads may wait for ranks that are gone, and abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


# ---- what the launcher reads


def ask_to_stop(folder: Path, signum: int) -> None:
    """Have ranks that register from now on end at once, as if by that signal."""
    _write_in(folder, _STOP, signum)


def read_processes(folder: Path) -> dict[int, int]:
    """Rank -> process id, of the ranks that registered."""
    return {rank: json.loads(path.read_text())["pid"] for rank, path in _by_rank(folder, "process")}


def read_heartbeats(folder: Path) -> dict[int, int]:
    """Rank -> when it last made progress, in ns since the epoch; of those that ever did."""
    return {rank: path.stat().st_mtime_ns for rank, path in _by_rank(folder, "heartbeat")}


def read_stacks(folder: Path) -> dict[int, str]:
    """Rank -> what faulthandler wrote, of the ranks that can be asked."""
    return {rank: path.read_text(errors="replace") for rank, path in _by_rank(folder, "stacks")}


def finished_ranks(folder: Path) -> set[int]:
    """The ranks that finished."""
    return {rank for rank, _ in _by_rank(folder, "finish")}


def read_finish(folder: Path) -> int | None:
    """The exit code of the lowest rank here that finished."""
    finishes = _by_rank(folder, "finish")
    return json.loads(finishes[0][1].read_text())["exit_code"] if finishes else None


def read_failures(folder: Path) -> list[Failure]:
    """The ranks' failures, earliest first."""
    found = [Failure(**json.loads(path.read_text())) for _, path in _by_rank(folder, "failure")]
    return sorted(found, key=lambda failure: failure.time)


def _by_rank(folder: Path, kind: str) -> list[tuple[int, Path]]:
    paths = (path for path in folder.glob(f"{kind}-*") if path.suffix != UNFINISHED)
    return sorted((int(path.stem.split("-")[1]), path) for path in paths)


@functools.cache
def _heartbeat_path() -> Path | None:
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return None
    path = Path(folder) / f"heartbeat-{_rank()}"
    path.touch()
    return path


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _write(name: str, content: object) -> bool:
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        _write_in(Path(folder), name, content)
    return bool(folder)


def _write_in(folder: Path, name: str, content: object) -> None:
    write_whole(folder / name, json.dumps(content))
