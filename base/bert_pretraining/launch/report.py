"""Why a launch failed, in the words of the rank that failed first."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

from bert_pretraining.errors import EXIT_CRASH, EXIT_USAGE
from bert_pretraining.runtime import rank_reports


@dataclass(frozen=True)
class Ending:
    """How an attempt ended. `detail`: what comes above the last line; `rank`: whose error.

    node: the machine that has said so, which no other machine needs to be told.
    """

    exit_code: int
    message: str = ""
    detail: str = ""
    rank: int | None = None
    by_signal: bool = False
    node: int | None = None

    @property
    def may_restart(self) -> bool:
        """A crash may pass by itself; bad input, and what the user ended, does not."""
        return self.message != "" and self.exit_code != EXIT_USAGE and not self.by_signal

    def text(self, log_paths: dict[int, Path]) -> str:
        """For the end of the screen: the error, and its rank's log last."""
        log = log_paths.get(self.rank) if self.rank is not None else None
        after = f" (log of rank {self.rank}: {log})" if log else ""
        return f"{self.detail}Error: {self.message}{after}"


def explain(
    folder: Path, exit_codes: dict[int, int], ended: frozenset[int] = frozenset()
) -> Ending:
    """Which rank failed first and why, and the exit code that fits.

    exit_codes: of the ranks that failed; negative for those that a signal ended. ended:
    ranks that the launcher itself killed, whose ends explain nothing. A rank that died
    without a word explains the others' lost connections; else the earliest record does.
    """
    failures = rank_reports.read_failures(folder)
    told = {failure.rank for failure in failures} | ended
    silent = [(rank, code) for rank, code in sorted(exit_codes.items()) if rank not in told]
    if failures:
        # torchrun ends the others with SIGTERM, and lost connections may abort them.
        consequences = (-signal.SIGTERM, -signal.SIGABRT)
        silent = [(rank, code) for rank, code in silent if code not in consequences]
    # Without any record, a rank that torchrun did not end itself comes first.
    silent.sort(key=lambda item: item[1] == -signal.SIGTERM)
    if silent:
        rank, code = silent[0]
        how = f"ended with exit code {code}"
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += " (by hand, or for want of memory)"
        return Ending(EXIT_CRASH, f"rank {rank} {how}; all ranks were ended", rank=rank)
    if not failures:
        raise RuntimeError(f"ranks failed without a cause: {exit_codes}")
    first = failures[0]
    message = f"rank {first.rank}: {first.message}" if first.detail else first.message
    return Ending(first.exit_code, message, first.detail, first.rank)
