"""Compare runs with each other and with MLPerf's reference convergence points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bert_pretraining.errors import UserError
from bert_pretraining.logs.reading.runs import SUCCESS, TARGET_MLM_ACCURACY, UNFINISHED, Run
from bert_pretraining.logs.watch_start import MLPERF_START
from bert_pretraining.runtime.words import counted
from bert_pretraining.submission.rcp import ConvergencePoint, convergence_point
from bert_pretraining.submission.rulesets import DROPPED_RUNS, RUNS, require_ruleset

MAX_SINGLE_RUNS = 6  # with more runs, one colour for each platform and batch size
MIN_MEDIAN_RUNS = 3


@dataclass(frozen=True)
class Series:
    """Runs drawn in one colour: a single run, or all of one platform and batch size."""

    label: str
    runs: tuple[Run, ...]

    @property
    def has_median(self) -> bool:
        return len(self.runs) >= MIN_MEDIAN_RUNS

    @property
    def reached(self) -> list[Run]:
        """The runs that reached their target."""
        return [run for run in self.runs if run.target_point is not None]

    @property
    def mean_samples(self) -> float | None:
        """Mean samples to the target; see `mean_of`. None where too few runs reached it, or where
        a log does not say after how many.

        Of ten runs and more MLPerf drops the fastest and the slowest, and a run that did not
        reach the target is the slowest.
        """
        if any(run.target_point.samples is None for run in self.reached):
            return None
        samples = sorted(run.target_point.samples for run in self.reached)
        missed = len(self.runs) - len(samples)
        if len(self.runs) >= RUNS and missed <= 1:
            samples = samples[1 : len(self.runs) - 1]
        elif missed or not samples:
            return None
        return sum(samples) / len(samples)

    @property
    def mean_of(self) -> str:
        """Which runs `mean_samples` is the mean of, as text."""
        if len(self.runs) >= RUNS:
            return f"{len(self.runs) - DROPPED_RUNS} runs without fastest and slowest"
        return counted(len(self.runs), "run")


@dataclass(frozen=True)
class Reference:
    """The reference convergence point for some runs, or why there is none.

    point: None where `reason` says why; else `reason` is "".
    """

    point: ConvergencePoint | None
    reason: str
    runs: tuple[Run, ...]


def series_of(runs: Sequence[Run]) -> list[Series]:
    """One series for each run; with more than 6 runs one for each platform and batch size."""
    if len(runs) <= MAX_SINGLE_RUNS:
        return [Series(run.name, (run,)) for run in runs]
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault((run.platform, run.global_batch_size), []).append(run)
    return [_group(platform, size, members) for (platform, size), members in groups.items()]


def _group(platform: str | None, batch_size: int | None, runs: list[Run]) -> Series:
    if len(runs) == 1:
        return Series(runs[0].name, tuple(runs))
    size = f"batch {batch_size:,}" if batch_size else "batch size unknown"
    return Series(f"{platform or 'platform unknown'}, {size}", tuple(runs))


def references(runs: Sequence[Run], ruleset: str) -> list[Reference]:
    """One for each batch size of runs that can be compared, one for each reason of the others.

    Raises:
        UserError: a ruleset without BERT.
    """
    require_ruleset(ruleset)
    groups: dict[int | str, list[Run]] = {}
    for run in runs:
        groups.setdefault(why_not_comparable(run) or run.global_batch_size, []).append(run)
    found = []
    for key, members in groups.items():
        if isinstance(key, str):
            found.append(Reference(None, key, tuple(members)))
            continue
        try:
            point = convergence_point(key, ruleset)
            reason = "" if point.mean_samples else f"batch size {key:,}: {point.describe()}"
        except UserError as error:  # no mlperf-logging: draw the runs without references
            point, reason = None, str(error)
        found.append(Reference(None if reason else point, reason, tuple(members)))
    return found


def why_not_comparable(run: Run) -> str | None:
    """Why the reference (BERT-large, MLPerf's data set) does not apply to a run; None if it may.

    A log does not say which data set it is of. What it says can only rule the reference out.
    """
    if run.eval_samples not in (None, MLPERF_START.sequences):
        return (
            f"evaluated on {counted(run.eval_samples, 'sequence')}, where MLPerf's data set has "
            f"{MLPERF_START.sequences:,}"
        )
    if run.target != TARGET_MLM_ACCURACY:
        return f"the target was {run.target:g}, the reference's is {TARGET_MLM_ACCURACY:g}"
    start = next((point.accuracy for point in run.evaluations if point.samples == 0), None)
    if start is not None and not MLPERF_START.lowest <= start <= MLPERF_START.highest:
        return f"the start weights score {start:.3f}, those of the reference 0.34"
    if not run.global_batch_size:
        return "the log does not say the global batch size"
    return None


def outcome(run: Run) -> str:
    """How a run ended, as text, which also says when status and accuracies contradict."""
    reached = run.target_point is not None
    if run.status == SUCCESS:
        return "target reached" if reached else "'success', but below the target"
    if run.status == UNFINISHED:
        return "no end in the log" + (", target reached" if reached else "")
    return f"'{run.status}', but target reached" if reached else "target not reached"


def require_points(runs: Sequence[Run]) -> None:
    """Raise UserError if the logs hold nothing to draw."""
    if not any(run.evaluations or run.training for run in runs):
        names = ", ".join(str(run.files[0]) for run in runs[:3])
        raise UserError(
            f"{names}: no evaluation and no training step", "let the run go on for longer"
        )
