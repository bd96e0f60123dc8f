"""A whole run: sequences to the target by MLPerf's reference points, updates, evaluations, time."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from bert_pretraining.errors import UserError
from bert_pretraining.progress import evaluation_interval
from bert_pretraining.submission import rcp
from bert_pretraining.submission.rulesets import DEFAULT_RULESET


@dataclass(frozen=True)
class Targets:
    """How many sequences a run takes to the target, by the global batch size.

    sizes: at which MLPerf's reference was run, without those that its checker leaves out; empty
    where they are not known. missing: why, then.
    """

    ruleset: str
    sizes: tuple[int, ...]
    missing: str | None = None

    @property
    def largest(self) -> int | None:
        return self.sizes[-1] if self.sizes else None

    def samples(self, global_batch_size: int) -> float | None:
        """Sequences to the target: the reference's mean, interpolated between its batch sizes.

        Below all of them the smallest counts. None above all, and where none are known.
        """
        if not self.sizes:
            return None
        return _mean_samples(global_batch_size, self.ruleset)


@functools.cache
def _mean_samples(global_batch_size: int, ruleset: str) -> float | None:
    return rcp.convergence_point(global_batch_size, ruleset).mean_samples


def targets(ruleset: str = DEFAULT_RULESET) -> Targets:
    """The reference points of a ruleset. Where MLPerf's package is missing, `missing` says so.

    Raises UserError for a ruleset that has no BERT.
    """
    rcp.require_ruleset(ruleset)
    try:
        points = rcp.prune(rcp.reference_points(ruleset))
    except UserError as error:
        return Targets(ruleset, (), str(error))
    return Targets(ruleset, tuple(int(point.global_batch_size) for point in points))


@dataclass(frozen=True)
class TrainingRun:
    """A run to the target. seconds: of updates and evaluations, without start-up."""

    samples: float
    updates: int
    evaluations: int
    evaluation_seconds: float
    seconds: float


def run_of(
    samples: float, global_batch_size: int, step_seconds: float, evaluation_seconds: float
) -> TrainingRun:
    """The run that takes so many sequences. evaluation_seconds: of one evaluation."""
    updates = math.ceil(samples / global_batch_size)
    evaluations = max(1, int(samples // evaluation_interval(global_batch_size)))
    evaluating = evaluations * evaluation_seconds
    return TrainingRun(
        samples, updates, evaluations, evaluating, updates * step_seconds + evaluating
    )
