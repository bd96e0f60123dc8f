"""Find ranks that run but make no progress, and show the stacks of all ranks."""

from __future__ import annotations

import socket
import sys
import time

from bert_pretraining.errors import EXIT_CRASH
from bert_pretraining.launch.hang_verdict import RankView, Verdict, judge
from bert_pretraining.launch.processes import RankProcesses
from bert_pretraining.launch.result import AttemptResult
from bert_pretraining.runtime import rank_reports

# A longer pause between two checks means that this process was stopped too (the batch system
# suspended the job, or the machine slept). The ranks could make no progress meanwhile.
LONGEST_PAUSE = 10.0
SECONDS_TO_ANSWER = 3.0  # for a rank to write its stacks
# With several machines: how long a launcher whose ranks all wait lets another one speak first.
SECONDS_FOR_OTHERS = 10.0
SECONDS_BETWEEN_LOOKS = 5.0  # at the stacks, while a rank that others wait for goes on


class HangDetector:
    """Remembers when each rank last made progress."""

    def __init__(
        self,
        ranks: RankProcesses,
        timeout: float,
        on_cpu: bool,
        several_machines: bool,
        crowding: str | None = None,
    ) -> None:
        """timeout: seconds without progress that count as a hang; 0: never.

        on_cpu: whether the ranks compute on the CPU. crowding: what to say of too many of them.
        """
        self._ranks = ranks
        self._timeout = timeout
        self._on_cpu, self._several_machines = on_cpu, several_machines
        self._crowding = crowding
        self._seen: dict[int, tuple[int, float]] = {}  # rank -> heartbeat, when it was new
        self._checked = time.monotonic()
        self._found_at: float | None = None  # when a hang was found whose cause is not certain
        self._look_at = 0.0  # not before this time

    def check(self, now: float) -> AttemptResult | None:
        """The result to end the ranks with if one of them hangs; None otherwise.

        A hang is looked for from the first heartbeat of any rank on. now: monotonic seconds.
        """
        self.look_at_the_clock(now)
        unfinished = self._ranks.unfinished()
        beats = rank_reports.read_heartbeats(self._ranks.folder)
        for rank, beat in beats.items():
            if rank not in self._seen or self._seen[rank][0] != beat.time:
                self._seen[rank] = (beat.time, now)
        silent = {
            rank: now - since
            for rank, (_, since) in self._seen.items()
            if rank in unfinished and now - since > self._timeout
        }
        if not silent or not self._timeout:
            self._found_at, self._look_at = None, 0.0
            return None
        if now < self._look_at:
            return None
        states, stacks = self._examine()
        views = {
            rank: RankView(
                state,
                stacks.get(rank),
                beats[rank].updates if rank in beats else 0,
                beats[rank].time if rank in beats else None,
                rank not in silent and rank in beats,
            )
            for rank, state in states.items()
        }
        verdict = judge(views, self._on_cpu)
        if verdict is None:  # the ranks that are silent wait for one that goes on
            self._look_at = now + SECONDS_BETWEEN_LOOKS
            return None
        if not verdict.certain and self._several_machines and self._found_at is None:
            self._found_at = now
            self._look_at = now + SECONDS_FOR_OTHERS
            return None
        return self._describe(verdict, max(silent.values()), states, stacks)

    def look_at_the_clock(self, now: float) -> None:
        """Say so where this process itself stood still: other machines may have given it up.

        now: monotonic seconds; to be called all the time.
        """
        pause = now - self._checked
        self._checked = now
        if pause > LONGEST_PAUSE:
            self._seen.clear()
            crowded = f" ({self._crowding})" if self._crowding else ""
            print(
                f"Notice: the launcher on {socket.gethostname()} stood still for {pause:.0f} s: it "
                "was stopped (SIGSTOP, a debugger), or the machine was suspended or had no CPU or "
                f"memory for it{crowded}",
                file=sys.stderr, flush=True,
            )  # fmt: skip

    def waited_for(self) -> dict[int, str]:
        """The ranks that hold up the others now, with the evidence; {} unless that is certain.

        For a rank that has failed since it waited too long, perhaps before the first heartbeat.
        """
        states, stacks = self._examine()
        views = {rank: RankView(state, stacks.get(rank), 0, None) for rank, state in states.items()}
        verdict = judge(views, self._on_cpu) if views else None
        return verdict.evidence if verdict is not None and verdict.certain else {}

    def _examine(self) -> tuple[dict[int, str], dict[int, str]]:
        """The state letter of each rank that has not finished, and what it answers, if it can."""
        states = {rank: self._ranks.state(rank) for rank in self._ranks.unfinished()}
        stacks = ask_for_stacks(self._ranks)
        # A rank that reads a disk is in state D for moments, too.
        return {
            rank: both(state, self._ranks.state(rank)) for rank, state in states.items()
        }, stacks

    def _describe(
        self, verdict: Verdict, seconds: float, states: dict[int, str], stacks: dict[int, str]
    ) -> AttemptResult:
        blocks = []
        for rank, state in sorted(states.items()):
            text = (stacks.get(rank) or "gave no answer").strip()
            blocks.append(f"---- rank {rank} (state {state})\n{text}\n")
        guilty = sorted(verdict.evidence)
        return AttemptResult(
            EXIT_CRASH,
            f"{_named(guilty)} made no progress for {seconds:.0f} s: {verdict}; all "
            "ranks were ended, and their stacks are above; if steps may take this long, pass a "
            "longer --hang_timeout SECONDS",
            "Stacks of all ranks, innermost call first:\n" + "".join(blocks),
            rank=guilty[0],
            is_certain=verdict.certain,
        )


def both(before: str, after: str) -> str:
    """The state letter, R ("runs") if it has changed meanwhile, unless the process has ended."""
    return after if after in (before, "", "Z") else "R"


def _named(ranks: list[int]) -> str:
    """ "rank 1", "ranks 1 and 3", "ranks 1, 3 and 5"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def ask_for_stacks(ranks: RankProcesses) -> dict[int, str]:
    """The stacks of every running rank that has set it up; empty if it does not answer in time."""
    living = ranks.living()
    earlier = rank_reports.read_stacks(ranks.folder)
    able = earlier.keys() & living.keys()
    ranks.send(rank_reports.STACK_SIGNAL, able)
    deadline = time.monotonic() + SECONDS_TO_ANSWER
    answers: dict[int, str] = {}
    while time.monotonic() < deadline:
        time.sleep(0.2)
        whole = rank_reports.read_stacks(ranks.folder)
        before, answers = answers, {rank: whole[rank][len(earlier[rank]) :] for rank in able}
        if answers == before and all(answers.values()):
            break
    return answers
