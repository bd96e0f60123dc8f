"""A rank that holds up the others: what each rank finds out about itself, and says of itself."""

from __future__ import annotations

import bisect
import collections
import itertools
import statistics
from collections.abc import Mapping
from typing import NamedTuple

# A rank is slow if its own work takes 10% longer than that of the other ranks, as a mean over the
# latest logged steps: so many, or as many as have so many seconds of its work, since who shares its
# CPUs for moments only is no slow rank. Over 5 or 25 times as many, more noise is averaged out.
SLOWER = 0.1
FEWEST_STEPS, MOST_STEPS = 20, 500
SECONDS = 10.0
# Logged steps of less work are put together, so that MOST_STEPS of them have SECONDS in any case.
SHORTEST = 0.1
MULTIPLES = (1, 5, 25)
STANDARD_ERRORS = 5.0  # of the mean, by which it must differ from 0: ranks differ by chance, too
DELAY = 2.0  # seconds above what is usual, in one update
TIMES_USUAL = 3.0  # as long as usual, at least
OWN_ALONE = ("standstill", "data")  # causes that are no waiting for another rank for certain
CAUSES = {
    "standstill": (
        "its process stood still: it was stopped (SIGSTOP, a debugger), or a library kept Python's "
        "interpreter lock, or there was no CPU or memory for it; look at the other programs and "
        "the memory of that machine, and at dmesg"
    ),
    "data": "it waited for a batch; look at the disk that it reads the training data from",
    "forward_backward": (
        "its forward and backward pass took so much longer than usual; look at the clocks and the "
        "errors of its device, and at other programs on its cores or its device"
    ),
    "optimizer": (
        "its optimizer's step took so much longer than usual; look at the clocks and the errors of "
        "its device, and at other programs on its cores or its device"
    ),
}


class Delay(NamedTuple):
    """seconds: for which a rank held up the others, in one update. cause: of CAUSES."""

    seconds: float
    cause: str


class Pace:
    """How much longer a rank's own work takes than that of the other ranks, over logged steps."""

    def __init__(self) -> None:
        # Of logged steps, or of short ones together: own, others, updates.
        self._steps: collections.deque[tuple[float, float, int]] = collections.deque(
            maxlen=MOST_STEPS
        )
        self._short: list[tuple[float, float, int]] = []  # of less than SHORTEST together

    def logged(self, own: float, others: float, updates: int = 1) -> None:
        """A logged step, in which the latest updates are compared.

        own: seconds of this rank's own work in an update; others: mean of the other ranks.
        """
        self._short.append((own, others, updates))
        work = sum(seconds * count for seconds, _, count in self._short)
        if work < SHORTEST:
            return
        theirs = sum(seconds * count for _, seconds, count in self._short)
        count = sum(count for _, _, count in self._short)
        self._steps.append((work / count, theirs / count, count))
        self._short.clear()

    def excess(self) -> float:
        """The share by which this rank is slower; 0.0 where it is not, or where it may be chance.

        A rank that was very slow in one step is not taken for a slow one: such a step makes the
        standard error as large as the mean. It is a quotient of means: the mean of the steps'
        quotients is above 1 for each of two equal ranks whose steps differ by chance.
        """
        steps = list(self._steps)
        work = itertools.accumulate(own * updates for own, _, updates in reversed(steps))
        fewest = max(FEWEST_STEPS, bisect.bisect_left(list(work), SECONDS) + 1)
        for multiple in MULTIPLES:
            count = multiple * fewest
            if count > len(steps):
                break
            latest = steps[-count:]
            more = [own - others for own, others, _ in latest]
            mean, error = statistics.fmean(more), statistics.stdev(more) / count**0.5
            share = mean / statistics.fmean(others for _, others, _ in latest)
            if share > SLOWER and mean > STANDARD_ERRORS * error:
                return share
        return 0.0

    def text(self, whom: str) -> str:
        """A notice of this rank. whom: it and its host."""
        excess, (_, others, _) = self.excess(), self._steps[-1]
        slower = f"{excess:.0%} slower than" if excess < 1 else f"{1 + excess:.1f} times as slow as"
        return (
            f"{whom} is {slower} the other ranks are on average, over the last "
            f"logged steps ({others * (1 + excess):.4g} s of its own work a step, "
            f"{others:.4g} s there), and all ranks wait for it: look at the clocks and the "
            "temperature of its device, at other programs on its cores or its device, and at how "
            "it reads its data; 'python -m bert_pretraining doctor' shows which cores it has"
        )


def delay_of(
    standstill: float, longest: Mapping[str, float], usual: Mapping[str, float]
) -> Delay | None:
    """For how long a rank held up the others in one update, if that is worth a notice.

    standstill: the longest time, in seconds, in which its process did not run. longest, usual:
    seconds in an update by part of its own work.
    """
    found = [Delay(standstill, "standstill")] if standstill >= DELAY else []
    for part, seconds in longest.items():
        more = seconds - usual[part]
        # A part in which the process stood still took long for that reason.
        if more >= max(DELAY, 2 * standstill) and seconds >= TIMES_USUAL * usual[part]:
            found.append(Delay(more, part))
    return max(found, default=None)


def text_of_delay(delay: Delay, whom: str, first_step: int, last_step: int, ranks: int) -> str:
    """A notice of a delay in these steps. ranks: how many had one there, this one included."""
    many = {1: "", 2: ", and another rank for less"}.get(
        ranks, f", and {ranks - 1} other ranks for less"
    )
    when = f"step {last_step}" if first_step == last_step else f"steps {first_step} to {last_step}"
    return (
        f"{whom} held up all ranks for {delay.seconds:.0f} s in {when}{many}: {CAUSES[delay.cause]}"
    )
