"""Find ranks that run but make no progress, and show the stacks of all ranks."""

from __future__ import annotations

import re
import time

from bert_pretraining.errors import EXIT_CRASH
from bert_pretraining.launch.processes import RankProcesses
from bert_pretraining.launch.result import AttemptResult
from bert_pretraining.runtime import rank_reports

# A longer pause between two checks means that this process was stopped too (the batch system
# suspended the job, or the machine slept). The ranks could make no progress meanwhile.
LONGEST_PAUSE = 10.0
SECONDS_TO_ANSWER = 3.0  # for a rank to write its stacks


class HangDetector:
    """Remembers when each rank last made progress."""

    def __init__(self, ranks: RankProcesses, timeout: float) -> None:
        """timeout: seconds without progress that count as a hang; 0: never."""
        self._ranks = ranks
        self._timeout = timeout
        self._seen: dict[int, tuple[int, float]] = {}  # rank -> heartbeat, when it was new
        self._checked = time.monotonic()

    def check(self, now: float) -> AttemptResult | None:
        """The result to end the ranks with if one of them hangs; None otherwise.

        A rank is watched from its first heartbeat on. now: monotonic time in seconds.
        """
        if now - self._checked > LONGEST_PAUSE:
            self._seen.clear()
        self._checked = now
        unfinished = self._ranks.unfinished()
        beats = rank_reports.read_heartbeats(self._ranks.folder)
        for rank, beat in beats.items():
            if rank not in self._seen or self._seen[rank][0] != beat:
                self._seen[rank] = (beat, now)
        silent = {
            rank: now - since
            for rank, (_, since) in self._seen.items()
            if rank in unfinished and now - since > self._timeout
        }
        if not silent or not self._timeout:
            return None
        # The other ranks wait for the one that stopped first: its heartbeat is the oldest.
        first = min(silent, key=lambda rank: beats[rank])
        return self._describe(first, silent[first])

    def _describe(self, first: int, seconds: float) -> AttemptResult:
        stacks = ask_for_stacks(self._ranks)
        blocks = []
        for rank in sorted(stacks):
            state = self._ranks.state(rank)
            note = f" ({state})" if state else ""
            text = stacks[rank].strip() or "gave no answer"
            blocks.append(f"---- rank {rank}{note}\n{text}\n")
        place = innermost(stacks.get(first, ""))
        what = self._ranks.state(first) or (f"in {place}" if place else "")
        return AttemptResult(
            EXIT_CRASH,
            f"rank {first} made no progress for {seconds:.0f} s{f', {what}' if what else ''}; all "
            "ranks were ended, and their stacks are above; if steps may take this long, pass a "
            "longer --hang_timeout SECONDS",
            "Stacks of all ranks, innermost call first:\n" + "".join(blocks),
            rank=first,
        )


def ask_for_stacks(ranks: RankProcesses) -> dict[int, str]:
    """The stacks of every running rank; empty for a rank that does not answer in time."""
    living = ranks.living()
    able = rank_reports.read_stacks(ranks.folder).keys() & living.keys()
    ranks.send(rank_reports.STACK_SIGNAL, able)
    deadline = time.monotonic() + SECONDS_TO_ANSWER
    before: dict[int, str] = {}
    while time.monotonic() < deadline:
        time.sleep(0.2)
        stacks = rank_reports.read_stacks(ranks.folder)
        if stacks == before and all(stacks[rank] for rank in able):
            break
        before = stacks
    return {rank: before.get(rank, "") for rank in living}


def innermost(stacks: str) -> str:
    """The main thread's innermost call, as "FILE:LINE function", in faulthandler's text.

    faulthandler calls the thread that got the signal, the main one, the current thread.
    """
    current = stacks.rpartition("Current thread")[2]
    found = re.search(r'File "([^"]+)", line (\d+) in (\S+)', current)
    return f"{found[1]}:{found[2]} {found[3]}" if found else ""
