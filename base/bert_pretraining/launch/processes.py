"""The ranks' processes on this machine: which are there, signals to them, their state."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from bert_pretraining.runtime import rank_reports

_ENDED = ("", "Z")  # gone, or waiting for torchrun to take notice
_STATES = {"T": "stopped by a signal", "t": "held by a debugger", "D": "waiting for a device"}


@dataclass(frozen=True)
class RankProcesses:
    """The ranks that have registered in `folder`, as far as they are this process's children."""

    folder: Path

    def living(self) -> dict[int, int]:
        """Rank -> process id, of those that have not ended."""
        processes = rank_reports.read_processes(self.folder)
        return {rank: pid for rank, pid in processes.items() if _state(pid) not in _ENDED}

    def unfinished(self) -> dict[int, int]:
        """Rank -> process id, of those that live and have not finished."""
        finished = rank_reports.finished_ranks(self.folder)
        return {rank: pid for rank, pid in self.living().items() if rank not in finished}

    def one_has_failed(self) -> bool:
        """Whether a rank has recorded a failure, or ended without a word."""
        if rank_reports.read_failures(self.folder):
            return True
        processes = rank_reports.read_processes(self.folder)
        ended = {rank for rank, pid in processes.items() if _state(pid) in _ENDED}
        # Read after that: a rank says that it finished before it ends.
        return bool(ended - rank_reports.finished_ranks(self.folder))

    def send(self, signum: int, ranks: Collection[int] | None = None) -> None:
        """A signal to every living rank, or to some; not to what they started."""
        for rank, pid in self.living().items():
            if ranks is None or rank in ranks:
                _kill(pid, signum)

    def kill(self) -> None:
        """End every rank and whatever it started, at once."""
        # torchrun gives each rank a session, which its children stay in when it has ended.
        sessions = set(rank_reports.read_processes(self.folder).values())
        for directory in Path("/proc").glob("[0-9]*"):
            _, _, session = _status(int(directory.name))
            if session in sessions:
                _kill(int(directory.name), signal.SIGKILL)

    def state(self, rank: int) -> str:
        """ "stopped by a signal" and the like; empty for a rank that runs or waits as usual."""
        pid = rank_reports.read_processes(self.folder).get(rank)
        return _STATES.get(_state(pid), "") if pid else ""


def _kill(pid: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended by itself meanwhile
        os.kill(pid, signum)


def _state(pid: int) -> str:
    """The letter of /proc/PID/stat; empty if there is no such child of this process.

    A number that another process got since is not taken for the rank's.
    """
    state, parent, _ = _status(pid)
    return state if parent == os.getpid() else ""


def _status(pid: int) -> tuple[str, int, int]:
    """State, parent and session, as /proc/PID/stat has them; ("", 0, 0) for no process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "", 0, 0
    # The name, in parentheses, may itself hold anything.
    state, parent, _, session, *_ = stat.rpartition(")")[2].split()
    return state, int(parent), int(session)
