"""How long N ranks wait for the slowest of them, where each takes a random time."""

from __future__ import annotations

import functools
import math
from statistics import NormalDist

_STEP, _BEYOND = 1e-3, 10.0  # of the integral; beyond 10 the normal distribution has nothing left


@functools.cache
def expected_maximum(count: int) -> float:
    """The expected largest of `count` independent normal values, in standard deviations.

    The mean of any value is the integral of 1 - F over x > 0, less that of F over x < 0, and the
    largest of n independent values has F = Phi^n. With Phi(-x) = 1 - Phi(x) that is the integral of
    1 - Phi(x)^n - Phi(-x)^n over x > 0 (H. A. David and H. N. Nagaraja, Order Statistics, 2003,
    chapter 3). By the trapezoidal rule; for 2 values it is 1 / sqrt(pi).
    """
    if count == 1:
        return 0.0
    normal = NormalDist()

    def left(x: float) -> float:
        above = normal.cdf(-x)
        return 1.0 - math.exp(count * math.log1p(-above)) - above**count

    steps = round(_BEYOND / _STEP)
    inner = math.fsum(left(index * _STEP) for index in range(1, steps))
    return _STEP * (inner + (left(0.0) + left(_BEYOND)) / 2.0)
