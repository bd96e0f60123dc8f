"""How an attempt ended, and why: the message of the rank that failed first."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bert_pretraining.errors import EXIT_CRASH, EXIT_USAGE
from bert_pretraining.runtime import rank_reports


@dataclass(frozen=True)
class AttemptResult:
    """How one attempt (one start of all ranks of this machine) ended.

    Attributes:
        message: the error, one line; empty if the ranks finished.
        detail: what is printed above the message, a traceback say.
        rank: the rank that failed.
        by_signal: whether a signal to the launcher ended the attempt.
        node: the machine that reported the error; None if it happened here.
        is_certain: whether the cause is known to be on this machine.
    """

    exit_code: int
    message: str = ""
    detail: str = ""
    rank: int | None = None
    by_signal: bool = False
    node: int | None = None
    is_certain: bool = False

    @property
    def may_restart(self) -> bool:
        """Whether a restart can help: after a crash, but not after bad input or a signal."""
        return self.message != "" and self.exit_code != EXIT_USAGE and not self.by_signal

    def text(self, log_paths: dict[int, Path]) -> str:
        """The error for the terminal, with the path of the rank's log at its end."""
        log = log_paths.get(self.rank) if self.rank is not None else None
        after = f" (log of rank {self.rank}: {log})" if log else ""
        return f"{self.detail}Error: {self.message}{after}"


def explain(
    folder: Path,
    exit_codes: dict[int, int],
    ended: frozenset[int] = frozenset(),
    waited_for: Mapping[int, str] | None = None,
) -> AttemptResult:
    """Which rank failed first, why, and the exit code for it.

    A rank that died without a report is the cause of the connections that the others lost. If
    there is none, the earliest report is the cause.

    Args:
        folder: of the rank reports.
        exit_codes: of the ranks that failed; negative for those that a signal ended.
        ended: ranks that the launcher itself killed; they are not the cause.
        waited_for: ranks for which another rank may have waited in vain, until it failed, with
            the evidence, such as "is stopped (state T)".
    """
    failures = rank_reports.read_failures(folder)
    explained = {failure.rank for failure in failures} | ended
    silent = [(rank, code) for rank, code in sorted(exit_codes.items()) if rank not in explained]
    if failures:
        # After a failure, torchrun ends the other ranks by SIGTERM, and a rank that loses a
        # connection may abort.
        consequences = (-signal.SIGTERM, -signal.SIGABRT)
        silent = [(rank, code) for rank, code in silent if code not in consequences]
    # Without any report, the cause is a rank that torchrun did not end by SIGTERM.
    silent.sort(key=lambda item: item[1] == -signal.SIGTERM)
    if silent:
        rank, code = silent[0]
        how = f"ended with exit code {code}"
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += " (by a user, or because memory ran out)"
        return AttemptResult(EXIT_CRASH, f"rank {rank} {how}; all ranks were ended", rank=rank)
    if not failures:
        raise RuntimeError(f"ranks failed, but none is the cause: exit codes {exit_codes}")
    first = failures[0]
    message = f"rank {first.rank}: {first.message}" if first.detail else first.message
    others = {rank: why for rank, why in (waited_for or {}).items() if rank != first.rank}
    if others and timed_out(first):
        guilty = ", ".join(f"rank {rank} {why}" for rank, why in others.items())
        detail = f"{first.detail}Rank {first.rank} ended: {first.message}\n"
        message = f"{guilty}; rank {first.rank} waited in vain, and all ranks were ended"
        return AttemptResult(first.exit_code, message, detail, min(others))
    return AttemptResult(first.exit_code, message, first.detail, first.rank)


def timed_out(failure: rank_reports.Failure) -> bool:
    """Whether the rank failed since it had waited too long for another one."""
    return re.search(r"timed[- ]?out|timeout", failure.message, re.IGNORECASE) is not None
