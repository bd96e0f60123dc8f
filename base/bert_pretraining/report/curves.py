"""From points of runs to the numbers that a panel draws, without matplotlib."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bert_pretraining.logs.reading.runs import EvaluationPoint, Run, TrainingPoint

SAMPLES, SECONDS = "samples", "seconds"


@dataclass(frozen=True)
class Curve:
    """x: (N,) float64, not decreasing, in samples or seconds; y: (N,) float64."""

    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class Scale:
    """The unit of an axis: numbers are divided by `divisor`; the label names the unit."""

    divisor: float
    label: str


def curve(points: Sequence[EvaluationPoint | TrainingPoint], across: str, figure: str) -> Curve:
    """One figure of the points against `across`, without the points that lack either."""
    pairs = [(getattr(point, across), getattr(point, figure)) for point in points]
    known = sorted(pair for pair in pairs if None not in pair)
    array = np.asarray(known, np.float64).reshape(-1, 2)
    return Curve(array[:, 0], array[:, 1])


def throughput(run: Run, across: str) -> tuple[Curve, bool]:
    """Sequences a second, and whether the log states them.

    A log without it has times and samples of evaluations: what went through between two of
    them, the evaluation included, is drawn at the later one.
    """
    logged = curve(run.training, across, "sequences_per_second")
    if len(logged):
        return logged, True
    timed = [point for point in run.evaluations if None not in (point.seconds, point.samples)]
    rates = [
        (
            getattr(after, across),
            (after.samples - before.samples) / (after.seconds - before.seconds),
        )
        for before, after in itertools.pairwise(timed)
        if after.seconds > before.seconds
    ]
    array = np.asarray(rates, np.float64).reshape(-1, 2)
    return Curve(array[:, 0], array[:, 1]), False


def median(curves: Sequence[Curve], finished_count: bool) -> Curve:
    """The median at every x of any curve, as long as at least half of the curves have values.

    Between its points a curve is taken as straight.

    Args:
        finished_count: a curve that has ended counts with its last value. That is for
            accuracies and losses: to leave finished runs out would look like a setback.
    """
    curves = [each for each in curves if len(each)]
    if not curves:
        return Curve(np.empty(0), np.empty(0))
    first = max(each.x[0] for each in curves)
    last = np.sort([each.x[-1] for each in curves])[len(curves) // 2]
    x = np.unique(np.concatenate([each.x for each in curves]))
    x = x[(x >= first) & (x <= last)]
    right = None if finished_count else np.nan
    values = [np.interp(x, each.x, each.y, right=right) for each in curves]
    return Curve(x, np.nanmedian(np.asarray(values), axis=0))


def sample_scale(largest: float) -> Scale:
    """Sequences in ones, thousands or millions."""
    if largest >= 2e6:
        return Scale(1e6, "Sequences trained (millions)")
    if largest >= 2e3:
        return Scale(1e3, "Sequences trained (thousands)")
    return Scale(1.0, "Sequences trained")


def time_scale(largest: float) -> Scale:
    """Seconds, minutes or hours since the clock's start."""
    if largest >= 3 * 3600:
        return Scale(3600.0, "Time since run start (hours)")
    if largest >= 10 * 60:
        return Scale(60.0, "Time since run start (minutes)")
    return Scale(1.0, "Time since run start (seconds)")
