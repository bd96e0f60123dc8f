"""The scored time of a series: fastest and slowest dropped, mean of the rest, scaled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bert_pretraining.submission.rcp import ConvergencePoint, convergence_point
from bert_pretraining.submission.rulesets import DROPPED_RUNS
from bert_pretraining.submission.tree import ResultLog, number


@dataclass(frozen=True)
class RunFigures:
    """The figures of one run. Minutes by its own clock; None if the log does not say."""

    log: str
    seed: int | None
    status: str  # of run_stop; "no run_stop" without one
    minutes: float | None  # run_start to run_stop
    init_minutes: float | None  # first init_start to init_stop
    samples: int | None
    accuracy: float | None  # the last
    evaluations: int


@dataclass(frozen=True)
class Score:
    """The score of the runs of one system.

    minutes: the score; None where too few runs converged, and `fault` says so.
    mean_minutes: before scaling. scale_factor: 1 outside the closed division, and where the
        RCP test fails.
    mean_samples: of the runs that count in the RCP test.
    counted: the logs whose times the mean is of.
    """

    minutes: float | None
    mean_minutes: float | None
    scale_factor: float
    mean_samples: float | None
    point: ConvergencePoint | None
    counted: tuple[str, ...]
    fault: str | None


def run_figures(log: ResultLog) -> RunFigures:
    """The figures of one log."""
    seed = number(log.value("seed"))
    evaluations = log.evaluations
    return RunFigures(
        log=log.label,
        seed=None if seed is None else int(seed),
        status=log.status or "no run_stop",
        minutes=_minutes(log, "run_start", "run_stop"),
        init_minutes=_minutes(log, "init_start", "init_stop"),
        samples=int(evaluations[-1][1]) if evaluations else None,
        accuracy=evaluations[-1][2] if evaluations else None,
        evaluations=len(evaluations),
    )


def mean_samples(logs: Sequence[ResultLog]) -> float | None:
    """Mean of the samples to the target, without the fewest and the most.

    As MLPerf's rcp_checker counts: a run that did not converge took infinitely many, so
    one such run is left out as the slowest. None for more of them, or fewer than 3 runs.
    """
    samples = [
        (log.evaluations[-1][1], log.label)
        for log in logs
        if log.status == "success" and log.evaluations
    ]
    return _mean(_counted(samples, len(logs)))


def score(logs: Sequence[ResultLog], ruleset: str) -> Score:
    """The score of one system's logs under a ruleset."""
    times = [
        (minutes, log.label)
        for log in logs
        if log.status == "success"
        and (minutes := _minutes(log, "run_start", "run_stop")) is not None
    ]
    counted = _counted(times, len(logs))
    minutes, samples, point = _mean(counted), mean_samples(logs), None
    sizes = {log.global_batch_size for log in logs}
    if {log.division for log in logs} == {"closed"} and len(sizes) == 1:
        size = sizes.pop()
        point = None if size is None else convergence_point(size, ruleset)
    passes = point is not None and samples is not None and point.passes(samples, len(logs))
    factor = point.scale_factor(samples) if passes else 1.0
    fault = None
    if minutes is None:
        fault = (
            f"{len(times)} of {len(logs)} runs converged; a score needs at least 3 runs, and "
            "all but one must converge"
        )
    return Score(
        minutes=None if minutes is None else minutes * factor,
        mean_minutes=minutes,
        scale_factor=factor,
        mean_samples=samples,
        point=point,
        counted=tuple(label for _, label in counted),
        fault=fault,
    )


def _counted(values: list[tuple[float, str]], runs: int) -> list[tuple[float, str]]:
    """The values that count of `runs` runs: all but the least and the greatest.

    values: of the converged runs; one that is missing was the greatest.
    """
    lost = runs - len(values)
    if lost > 1 or runs <= DROPPED_RUNS:
        return []
    return sorted(values)[1 : runs - 1]


def _mean(values: list[tuple[float, str]]) -> float | None:
    return sum(value for value, _ in values) / len(values) if values else None


def _minutes(log: ResultLog, start: str, stop: str) -> float | None:
    begin, end = log.first(start), log.first(stop)
    if not (begin and end) or None in (begin.time_ms, end.time_ms):
        return None
    return (end.time_ms - begin.time_ms) / 60_000
