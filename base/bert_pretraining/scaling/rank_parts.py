"""The parts of one rank: what it takes without any other rank; each number with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

UNKNOWN = "not known, counted as 0"


@dataclass(frozen=True)
class Sourced:
    """A number and where it comes from: a measurement, a publication, a flag or a default."""

    value: float
    source: str


@dataclass(frozen=True)
class RankParts:
    """What a rank takes in an update.

    fixed: seconds of forward and backward of a micro-batch that do not depend on its size, such as
    launches and small kernels. sequence: seconds of each of its sequences. optimizer: seconds of an
    update of all parameters. host: seconds in which the host queues one micro-batch; the device
    waits for it where that is longer. evaluation: seconds of evaluating one sequence on one rank.
    activation: bytes that the work on one sequence needs. has_fixed: whether `fixed` is known.
    includes_evaluation: whether the other seconds have the evaluations in them already.
    evaluation_has_fixed: whether `evaluation` has the fixed part of its passes in it.
    """

    fixed: Sourced
    sequence: Sourced
    optimizer: Sourced
    host: Sourced
    evaluation: Sourced
    activation: Sourced | None
    has_fixed: bool
    includes_evaluation: bool = False
    evaluation_has_fixed: bool = False

    def forward_backward(self, sequences: float) -> float:
        """Seconds of forward and backward of one micro-batch."""
        return self.fixed.value + self.sequence.value * sequences


@dataclass(frozen=True)
class Fit:
    """seconds = fixed + sequence x batch. has_fixed: whether there were two batch sizes or more.
    error: the largest share by which a point is off the line."""

    fixed: float
    sequence: float
    has_fixed: bool
    error: float


def fit(seconds: Mapping[int, float]) -> Fit:
    """The line through the seconds by batch size, by least squares of relative errors.

    Where the line would begin below zero, it begins at zero. seconds: one or more, above 0.
    """
    sizes = np.array(sorted(seconds), dtype=float)
    times = np.array([seconds[int(size)] for size in sizes])
    if len(sizes) > 1:
        design = np.stack([1.0 / times, sizes / times], axis=1)
        fixed, sequence = np.linalg.lstsq(design, np.ones_like(times), rcond=None)[0]
    if len(sizes) == 1 or fixed < 0.0 or sequence <= 0.0:
        # The least squares of one factor on relative errors.
        ratios = sizes / times
        fixed, sequence = 0.0, ratios.sum() / (ratios**2).sum()
    error = np.abs((fixed + sequence * sizes) / times - 1.0).max()
    return Fit(float(fixed), float(sequence), len(sizes) > 1, float(error))
