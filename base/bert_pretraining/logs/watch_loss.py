"""A loss that jumps: far above what the steps before let expect."""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Iterator

from bert_pretraining.logs.sinks import StepFigures

DEVIATIONS = 5  # standard deviations above the median that no healthy batch has
# Logged steps that are compared with; before there are so many, nothing is said.
WINDOW, MIN_WINDOW = 50, 20
# Fewer sequences differ too much: the mean over so many steps as have these is compared.
MIN_SEQUENCES = 64
# The standard deviation is taken to be at least this: of a mean over n sequences, and as a share of
# the loss. A window of equal losses would have none.
SEQUENCE_DEVIATION, LOSS_SHARE = 1.5, 0.02  # nats; share


class LossJumps:
    """Compares the loss of each logged step with those before.

    Args:
        batch: sequences of a step, over all ranks.
    """

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._before: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self._steps: list[StepFigures] = []  # that are compared next, as one
        self._count = math.ceil(MIN_SEQUENCES / batch)
        self._skipped = 0

    def skipped(self, updates: int) -> None:
        """So many updates in all were skipped; their sequences count in the sample numbers."""
        self._skipped = updates

    def logged(self, figures: StepFigures) -> Iterator[tuple[str, str]]:
        """The kind and a line for each fault after a logged step."""
        if not math.isfinite(figures.values["loss"]):
            return
        self._steps.append(figures)
        if len(self._steps) < self._count:
            return
        steps, self._steps = self._steps, []
        loss = statistics.fmean(step.values["loss"] for step in steps)
        if len(self._before) >= MIN_WINDOW:
            median = statistics.median(self._before)
            deviation = max(
                math.sqrt(statistics.fmean((each - median) ** 2 for each in self._before)),
                SEQUENCE_DEVIATION / math.sqrt(len(steps) * self._batch),
                LOSS_SHARE * median,
            )
            if loss > median + DEVIATIONS * deviation:
                yield "loss_jumped", self._line(steps, loss, median, deviation)
        self._before.append(loss)

    def _line(self, steps: list[StepFigures], loss: float, median: float, deviation: float) -> str:
        first, last = steps[0], steps[-1]
        of = f"at step {last.step:,}"
        compared = f"the median of the {len(self._before)} logged steps before"
        if len(steps) > 1:
            of = f"on average over the {len(steps)} logged steps {first.step:,} to {last.step:,}"
            compared = f"the median of {len(self._before)} such means before"
        # Samples are numbered from 0 in the order in which the ranks take them.
        ends = [step.samples + self._skipped * self._batch for step in (first, last)]
        numbers = f"{ends[0] - self._batch:,} to {ends[1] - 1:,}"
        return (
            f"the loss is {loss:.4g} {of} (learning rate {last.values['learning_rate']:.4g}, "
            f"sample numbers {numbers}), more than {DEVIATIONS} standard deviations of "
            f"{deviation:.2g} above {median:.4g}, {compared}: if it does not come down again, go "
            "on from an earlier checkpoint with a lower --learning_rate; if it does, look for "
            "damaged sequences with 'python -m bert_pretraining data verify'"
        )
