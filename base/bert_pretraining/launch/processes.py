"""The ranks' processes on this machine: which run, their state, and signals to them."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from bert_pretraining.runtime import process_stat, rank_reports
from bert_pretraining.runtime.process_stat import PARENT, SESSION, STATE

_ENDED = ("", "Z")  # no such process, or ended and not yet waited for by torchrun


@dataclass(frozen=True)
class RankProcesses:
    """The children of this process that have registered as ranks in `folder`."""

    folder: Path

    def living(self) -> dict[int, int]:
        """Rank -> process id, of the ranks that have not ended."""
        processes = rank_reports.read_processes(self.folder)
        return {rank: pid for rank, pid in processes.items() if _state(pid) not in _ENDED}

    def unfinished(self) -> dict[int, int]:
        """Rank -> process id, of the ranks that run and have not reported that they finished."""
        finished = rank_reports.finished_ranks(self.folder)
        return {rank: pid for rank, pid in self.living().items() if rank not in finished}

    def one_has_failed(self) -> bool:
        """Whether a rank has reported a failure, or ended without any report."""
        if rank_reports.read_failures(self.folder):
            return True
        processes = rank_reports.read_processes(self.folder)
        ended = {rank for rank, pid in processes.items() if _state(pid) in _ENDED}
        # Read the reports after the states: a rank reports that it finished before it ends.
        return bool(ended - rank_reports.finished_ranks(self.folder))

    def send(self, signum: int, ranks: Collection[int] | None = None) -> None:
        """Send a signal to every running rank, or to some; not to processes that they started."""
        for rank, pid in self.living().items():
            if ranks is None or rank in ranks:
                _kill(pid, signum)

    def kill(self) -> None:
        """Kill every rank, and the processes that it started."""
        # torchrun gives each rank a session of its own. Its children stay in that session, even
        # after the rank has ended.
        sessions = set(rank_reports.read_processes(self.folder).values())
        for directory in Path("/proc").glob("[0-9]*"):
            _, _, session = _status(int(directory.name))
            if session in sessions:
                _kill(int(directory.name), signal.SIGKILL)

    def states(self) -> dict[int, str]:
        """Rank -> its state letter, of the ranks that have registered."""
        return {rank: self.state(rank) for rank in rank_reports.read_processes(self.folder)}

    def state(self, rank: int) -> str:
        """The state letter of /proc/PID/stat; empty for a rank that is gone."""
        pid = rank_reports.read_processes(self.folder).get(rank)
        return _state(pid) if pid else ""


def _kill(pid: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
        os.kill(pid, signum)


def _state(pid: int) -> str:
    """The state letter of /proc/PID/stat; empty if this process has no such child.

    The check of the parent matters when another process has got the number of an ended rank.
    """
    state, parent, _ = _status(pid)
    return state if parent == os.getpid() else ""


def _status(pid: int) -> tuple[str, int, int]:
    """(state, parent, session) from /proc/PID/stat; ("", 0, 0) if there is no such process."""
    found = process_stat.fields(pid)
    if not found:
        return "", 0, 0
    state, parent, session = (found[at] for at in (STATE, PARENT, SESSION))
    return state, int(parent), int(session)
