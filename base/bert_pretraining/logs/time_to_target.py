"""When the target will be reached, as far as the evaluations tell."""

from __future__ import annotations

import math
from collections.abc import Sequence

FITTED = 4  # the evaluations that a line is drawn through
AGREEING = 4  # estimates in a row, the latest included, that must agree
WITHIN = 2  # they agree if the longest time left is at most so many times the shortest
UNCERTAIN = 0.15  # the slope's standard error is at most this share of the slope
FARTHEST = 3  # times the sequences trained so far: a line of four points does not reach farther

Evaluations = Sequence[tuple[int, float]]


def samples_at_target(evaluations: Evaluations, target: float, end: int) -> int | None:
    """The evaluation that will find the target reached, in trained sequences.

    Args:
        evaluations: (trained sequences, accuracy) of each so far, in order, without the start's.
        target: the accuracy to reach.
        end: the run ends after so many sequences.

    Two straight lines are fitted by least squares to the latest FITTED evaluations: accuracy over
    the sequences, and accuracy over their logarithm. The first reaches the target too early where
    the curve bends down, the second too late where it does not. So the estimate is the geometric
    mean of both, and the result is the next evaluation after it, at the interval of the latest two.

    Returns None while the estimate is uncertain:
    - the slope's standard error, see `_uncertainty`, is large: noise, a
      plateau, a fall;
    - the latest AGREEING estimates, each made after another evaluation, differ: the curve bends;
    - the target is far away, or lies beyond `end`.

    How wrong it is: of MLPerf Training v4.0's 217 BERT runs that logged their evaluations, 188 got
    an estimate, at 15% of the evaluations. Of the estimates 93% were right to one evaluation or to
    a factor of 1.5 in the time left; the worst was wrong by a factor of 3. Of 13 mini runs with an
    evaluation every 25 steps, 11 got an estimate, at 9% of the evaluations; 75% were that right,
    and the worst was wrong by a factor of 2.
    """
    known = [(samples, accuracy) for samples, accuracy in evaluations if samples > 0]
    if len(known) < FITTED + AGREEING - 1 or known[-1][1] >= target:
        return None
    if _uncertainty(known[-FITTED:]) > UNCERTAIN:
        return None
    made = [_reached(known[: len(known) - ago], target) for ago in range(AGREEING)]
    since, _ = known[-AGREEING]  # the oldest of these estimates was made then
    left = [reached - since for reached in made]
    if min(left) <= 0 or max(left) > WITHIN * min(left):
        return None
    (before, _), (now, _) = known[-2:]
    if made[0] > FARTHEST * now:
        return None
    # Less a little: an evaluation at the very number counts, whatever its rounding.
    evaluations_left = max(1, math.ceil((made[0] - now) / (now - before) - 1e-6))
    found = now + evaluations_left * (now - before)
    return found if found <= end else None


def _reached(evaluations: Evaluations, target: float) -> float:
    """When the lines through the latest evaluations have the target; infinite if they fall."""
    latest = evaluations[-FITTED:]
    accuracies = [accuracy for _, accuracy in latest]
    over_samples = _crossing([samples for samples, _ in latest], accuracies, target)
    over_logarithm = _crossing([math.log(samples) for samples, _ in latest], accuracies, target)
    if not 0 < over_samples < math.inf:
        return math.inf
    exponent = (math.log(over_samples) + over_logarithm) / 2
    return math.exp(exponent) if exponent < math.log(FARTHEST * latest[-1][0]) else math.inf


def _crossing(x: Sequence[float], y: Sequence[float], height: float) -> float:
    """Where the line of least squares through the points has this height; infinite if it falls."""
    mean_x, mean_y, slope, _ = _line(x, y)
    return mean_x + (height - mean_y) / slope if slope > 0 else math.inf


def _uncertainty(evaluations: Evaluations) -> float:
    """The standard error of the slope over the sequences, as a share of it; infinite if it falls.

    It is sqrt(s2 / sum((x - mean(x))^2)), with s2 the residuals' sum of squares over n - 2: the
    formula of simple linear regression, as in every textbook of statistics.
    """
    x, y = [samples for samples, _ in evaluations], [accuracy for _, accuracy in evaluations]
    mean_x, mean_y, slope, squares = _line(x, y)
    if slope <= 0:
        return math.inf
    residuals = [b - mean_y - slope * (a - mean_x) for a, b in zip(x, y, strict=True)]
    variance = sum(residual**2 for residual in residuals) / (len(x) - 2)
    return math.sqrt(variance / squares) / slope


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float, float]:
    """Least squares: the means of x and y, the slope, and the squares of x around its mean."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    squares = sum((a - mean_x) ** 2 for a in x)
    products = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return mean_x, mean_y, products / squares, squares
