"""Which rank holds up the others, looked for at log lines, where the ranks exchange figures anyway.

Each rank finds out what it has to say of itself. What is exchanged does not grow with the number of
ranks: a few numbers, and the line of one rank where it has something to say.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from bert_pretraining.logs.sinks import OWN_PARTS, Work
from bert_pretraining.logs.watch_ranks import OWN_ALONE, Delay, Pace, delay_of, text_of_delay
from bert_pretraining.runtime import agreement
from bert_pretraining.runtime.process_group import Ranks
from bert_pretraining.runtime.standstill import Standstill
from bert_pretraining.training.step_clock import StepClock, Tally

MOST_DELAYS = 20  # that are told in a run


class HeldUp:
    """Names a rank that is slow, or that held up the others once.

    A slow rank is named once; a delay of a rank only if it is twice as long as all that were told
    of it before. One rank has nobody that waits for it.

    Args:
        notice: called with the kind and the line, with the same ones on every rank.
        optimizer_waits: whether the ranks wait for each other in the optimizer's step. Then it
            takes equally long on all of them, and tells nothing of one.
    """

    def __init__(
        self,
        clock: StepClock,
        ranks: Ranks,
        notice: Callable[[str, str], None],
        optimizer_waits: bool = False,
    ) -> None:
        self._clock, self._ranks, self._notice = clock, ranks, notice
        self._parts = [part for part in OWN_PARTS if part != "optimizer" or not optimizer_waits]
        self._whom = f"rank {ranks.rank} ({socket.gethostname()})"
        self._pace, self._standstill = Pace(), Standstill()
        self._is_named = False
        self._longest_told = 0.0  # seconds, of this rank's delays
        self._delays_left = MOST_DELAYS
        self._has_begun = False

    def begin(self) -> None:
        """Training begins."""
        if self._ranks.world_size > 1:
            self._standstill.start()

    def end(self) -> None:
        """Training is over, or has failed: no thread is left behind."""
        self._standstill.stop()

    def logged(self, step: int, tally: Tally, work: Work) -> None:
        """A log line after `step` updates; every rank must call this.

        tally, work: what this rank, and all ranks, did since the last call.
        """
        size = self._ranks.world_size
        if size == 1 or not tally.updates:
            return
        excess = self._excess(tally, work)
        delay = self._delay() or Delay(0.0, "")
        told_before = 2 * self._longest_told
        new = delay.seconds if self._delays_left and delay.seconds >= told_before else 0.0
        alone = delay.cause in OWN_ALONE
        values = [excess, alone * delay.seconds, alone * new, (not alone) * new]
        most, who, count = agreement.largest_of(values, self._ranks.device)
        if most[0] > 0:
            self._is_named |= who[0] == self._ranks.rank
            text = self._pace.text(self._whom) if who[0] == self._ranks.rank else ""
            self._notice("straggler", agreement.from_rank(who[0], text))
        # A rank that stands still makes the others wait, on some backends in these parts.
        which = 3 if most[3] > 2 * most[1] else 2
        # In the first steps all ranks take long at once: they compile, and memory is new.
        first_steps, self._has_begun = not self._has_begun, True
        if most[which] > 0 and not (first_steps and count[which] > size / 2):
            self._delays_left -= 1
            text = ""
            if who[which] == self._ranks.rank:
                self._longest_told = delay.seconds
                first = step - tally.updates + 1
                text = text_of_delay(delay, self._whom, first, step, count[which])
            self._notice("rank_delayed", agreement.from_rank(who[which], text))

    def _excess(self, tally: Tally, work: Work) -> float:
        """By which this rank is slower than the others; 0.0 too where it was named before."""
        if work.seconds is None:
            return 0.0
        own = sum(tally.seconds[part] for part in self._parts) / tally.updates
        mean, size = sum(work.seconds[part] for part in self._parts), self._ranks.world_size
        others = (size * mean - own) / (size - 1)
        if others > 0:
            self._pace.logged(own, others, tally.updates)
        return 0.0 if self._is_named else self._pace.excess()

    def _delay(self) -> Delay | None:
        longest = self._clock.take_longest()
        updates = self._clock.whole.updates - 1
        if updates < 1 or not self._clock.measures:
            return delay_of(self._standstill.take(), {}, {})
        seconds = {part: self._clock.whole.seconds[part] for part in self._parts}
        usual = {part: (seconds[part] - longest[part]) / updates for part in self._parts}
        return delay_of(self._standstill.take(), {p: longest[p] for p in self._parts}, usual)
