"""Ranks that live and make no progress: notice them, and show where each stands."""

from __future__ import annotations

import re
import time

from bert_pretraining.errors import EXIT_CRASH
from bert_pretraining.launch.processes import RankProcesses
from bert_pretraining.launch.report import Ending
from bert_pretraining.runtime import rank_reports

# A longer pause between two looks means that this process was stopped too (by the batch
# system, by a suspended machine): then nobody can have made progress.
LONGEST_PAUSE = 10.0
SECONDS_TO_ANSWER = 3.0


class Watch:
    """When each rank was last seen to make progress."""

    def __init__(self, ranks: RankProcesses, timeout: float) -> None:
        """timeout: seconds; 0 watches nothing."""
        self._ranks = ranks
        self._timeout = timeout
        self._seen: dict[int, tuple[int, float]] = {}  # rank -> heartbeat, when it was new
        self._looked = time.monotonic()

    def look(self, now: float) -> Ending | None:
        """None while all is well; else the end of the ranks, with their stacks.

        now: seconds, monotonic. Ranks are watched from their first heartbeat on.
        """
        if now - self._looked > LONGEST_PAUSE:
            self._seen.clear()
        self._looked = now
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
        # All wait for the slowest, whose last sign of progress is the oldest.
        first = min(silent, key=lambda rank: beats[rank])
        return self._describe(first, silent[first])

    def _describe(self, first: int, seconds: float) -> Ending:
        stacks = ask_for_stacks(self._ranks)
        blocks = []
        for rank in sorted(stacks):
            state = self._ranks.state(rank)
            note = f" ({state})" if state else ""
            text = stacks[rank].strip() or "gave no answer"
            blocks.append(f"---- rank {rank}{note}\n{text}\n")
        place = innermost(stacks.get(first, ""))
        what = self._ranks.state(first) or (f"in {place}" if place else "")
        return Ending(
            EXIT_CRASH,
            f"rank {first} made no progress for {seconds:.0f} s{f', {what}' if what else ''}; all "
            "ranks were ended, their stacks are above; --hang_timeout SECONDS sets the patience",
            "Stacks of all ranks, innermost call first:\n" + "".join(blocks),
            rank=first,
        )


def ask_for_stacks(ranks: RankProcesses) -> dict[int, str]:
    """Every living rank's stacks; empty for one that does not answer in time."""
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
    """ "FILE:LINE function" of the main thread's innermost call, in what faulthandler wrote.

    It writes the thread that took the signal, which is the main one, as the current one.
    """
    current = stacks.rpartition("Current thread")[2]
    found = re.search(r'File "([^"]+)", line (\d+) in (\S+)', current)
    return f"{found[1]}:{found[2]} {found[3]}" if found else ""
