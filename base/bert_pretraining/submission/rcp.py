"""Reference convergence points (RCP): the least number of samples of a run in the closed division.

MLPerf's reference was trained about twenty times at some batch sizes; each gives a mean
and a standard deviation of the samples it took to the target. A submission whose mean is
significantly lower (one-sided t-test, p = 0.05) fails; one that is lower, but not
significantly, passes and its score is multiplied by RCP mean / its own mean.

The runs come from `rcps_bert.json` of the installed mlperf-logging, and the rules follow
its rcp_checker, to which the tests hold them.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np

from bert_pretraining.errors import UserError
from bert_pretraining.runtime.words import plural
from bert_pretraining.submission.rulesets import (
    DEFAULT_RULESET,
    DROPPED_RUNS,
    RUNS,
    missing,
    mlperf_directory,
    require_ruleset,
)

P_VALUE = 0.05
EXACT, INTERPOLATED, SMALLEST, MISSING = "exact", "interpolated", "smallest", "missing"
# rcp_checker takes two series of ten for the number of runs behind an interpolated point.
INTERPOLATED_RUNS = 2 * RUNS


@dataclass(frozen=True)
class ReferencePoint:
    """The reference's runs at one batch size. All figures but `runs` are in samples."""

    global_batch_size: float
    mean_samples: float  # without the fastest and the slowest run
    standard_deviation: float  # of all runs, over their number (not one less)
    runs: int  # that the mean is of


@dataclass(frozen=True)
class ConvergencePoint:
    """The requirement of a ruleset for one global batch size.

    basis: "exact" (the reference was run at it), "interpolated" (between
        `reference_batch_sizes`), "smallest" (below all of them: compared with the
        smallest) or "missing" (above all: fails, and the other figures are None).
    mean_samples, standard_deviation: samples (sequences) to the target.
    reference_runs: number of runs that the t-test takes for the reference.
    """

    global_batch_size: int
    ruleset: str
    basis: str
    reference_batch_sizes: tuple[int, ...]
    mean_samples: float | None
    standard_deviation: float | None
    reference_runs: int | None

    def least_mean(self, runs: int = RUNS) -> float | None:
        """The least mean of samples with which `runs` runs pass, fastest and slowest left out.

        The mean at which the one-sided t-test of two samples with equal variance gives
        p = 0.05. None if the point is missing. Raises UserError for fewer than 3 runs.
        """
        counted = runs - DROPPED_RUNS
        if counted < 1:
            raise UserError(
                f"{runs} {plural(runs, 'run')} {plural(runs, 'is')} too few: the fastest and the "
                "slowest are dropped",
                "give 3 or more",
            )
        if self.mean_samples is None:
            return None
        error = self.standard_deviation * math.sqrt(1 / self.reference_runs + 1 / counted)
        return self.mean_samples + error * _student_t(self.reference_runs + counted - 2)

    def passes(self, mean_samples: float, runs: int = RUNS) -> bool:
        """Whether a submission with this mean passes."""
        least = self.least_mean(runs)
        return least is not None and mean_samples >= least

    def scale_factor(self, mean_samples: float) -> float:
        """The factor of the score: RCP mean / mean if that is above 1, else 1."""
        if self.mean_samples is None:
            return 1.0
        return max(1.0, self.mean_samples / mean_samples)

    def describe(self) -> str:
        """The basis as text."""
        points = " and ".join(f"{size:,}" for size in self.reference_batch_sizes)
        return {
            EXACT: f"the reference was run at {points}",
            INTERPOLATED: f"interpolated between {points}",
            SMALLEST: f"below all reference points: compared with the smallest, {points}",
            MISSING: f"no reference point: the largest is {points}; the closed division fails",
        }[self.basis]


def convergence_point(global_batch_size: int, ruleset: str = DEFAULT_RULESET) -> ConvergencePoint:
    """The reference convergence point of a batch size, in sequences an update.

    Raises UserError for a batch size below 1, a ruleset without BERT, or a machine without
    mlperf-logging.
    """
    if global_batch_size < 1:
        raise UserError(f"--global_batch_size {global_batch_size} is less than 1", "pass 1 or more")
    points = prune(reference_points(ruleset))
    below = [point for point in points if point.global_batch_size <= global_batch_size]
    above = [point for point in points if point.global_batch_size > global_batch_size]
    if below and below[-1].global_batch_size == global_batch_size:
        return _point(global_batch_size, ruleset, EXACT, [below[-1]], below[-1])
    if below and above:
        pair = [below[-1], above[0]]
        return _point(
            global_batch_size, ruleset, INTERPOLATED, pair, _between(*pair, global_batch_size)
        )
    if above:
        return _point(global_batch_size, ruleset, SMALLEST, [above[0]], above[0])
    return _point(global_batch_size, ruleset, MISSING, [below[-1]], None)


def reference_points(ruleset: str = DEFAULT_RULESET) -> list[ReferencePoint]:
    """Every batch size that the reference was run at, smallest first, before pruning."""
    folder = mlperf_directory() / "rcp_checker" / f"training_{require_ruleset(ruleset)}"
    records = json.loads((folder / "rcps_bert.json").read_text(encoding="utf-8")).values()
    points = []
    for record in records:
        samples = np.sort(np.asarray(record["Epochs to converge"], dtype=np.float64))
        counted = samples[1:-1]
        points.append(
            ReferencePoint(record["BS"], float(counted.mean()), float(samples.std()), len(counted))
        )
    return sorted(points, key=lambda point: point.global_batch_size)


def prune(points: list[ReferencePoint]) -> list[ReferencePoint]:
    """The points, without each that took more samples than the points beside it suggest.

    First remove all points with a smaller batch size than the fastest point. Then go from small to
    large batch sizes and remove each point above the line between the points before and after it.
    As in rcp_checker, this is one pass. It does not compute the convex envelope.
    """
    fastest = min(points, key=lambda point: point.mean_samples)
    kept = [point for point in points if point.global_batch_size >= fastest.global_batch_size]
    index = 1
    while index < len(kept) - 1:
        line = _between(kept[index - 1], kept[index + 1], kept[index].global_batch_size)
        if kept[index].mean_samples > line.mean_samples:
            del kept[index]
        else:
            index += 1
    return kept


def _between(low: ReferencePoint, high: ReferencePoint, batch_size: float) -> ReferencePoint:
    """Mean and standard deviation, linear in the batch size."""
    sizes = [low.global_batch_size, high.global_batch_size]
    mean = np.interp(batch_size, sizes, [low.mean_samples, high.mean_samples])
    deviation = np.interp(batch_size, sizes, [low.standard_deviation, high.standard_deviation])
    return ReferencePoint(batch_size, float(mean), float(deviation), INTERPOLATED_RUNS)


def _point(
    batch_size: int,
    ruleset: str,
    basis: str,
    behind: list[ReferencePoint],
    figures: ReferencePoint | None,
) -> ConvergencePoint:
    return ConvergencePoint(
        batch_size,
        ruleset,
        basis,
        tuple(int(point.global_batch_size) for point in behind),
        figures and figures.mean_samples,
        figures and figures.standard_deviation,
        figures and figures.runs,
    )


def _student_t(degrees_of_freedom: int) -> float:
    """The 5 percent quantile of Student's t distribution: below 0."""
    try:
        from scipy.special import stdtrit
    except ModuleNotFoundError as error:
        raise missing(error.name or "scipy") from error
    return float(stdtrit(degrees_of_freedom, P_VALUE))
