"""The scored time of a series: fastest and slowest dropped, mean of the rest, scaled."""

from __future__ import annotations

from dataclasses import dataclass

from bert_pretraining.submission.rcp import ConvergencePoint, convergence_point
from bert_pretraining.submission.rulesets import DROPPED_RUNS
from bert_pretraining.submission.tree import ResultLog, number


@dataclass(frozen=True)
class RunFigures:
    """One run. Minutes by its own clock; None for what its log does not say."""

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
    """What a series of one system is worth.

    minutes: the score; None where too few runs converged.
    mean_minutes: before scaling. scale_factor: 1 in the open division.
    mean_samples: of the runs that count in the RCP test.
    fault: why there is no score, None if there is one.
    """

    minutes: float | None
    mean_minutes: float | None
    scale_factor: float
    mean_samples: float | None
    point: ConvergencePoint | None
    fault: str | None


def run_figures(log: ResultLog) -> RunFigures:
    """The figures of one log."""
    seed = number(log.value("seed"))
    evaluations = log.evaluations
    return RunFigures(
        log=log.name,
        seed=None if seed is None else int(seed),
        status=log.status or "no run_stop",
        minutes=_minutes(log, "run_start", "run_stop"),
        init_minutes=_minutes(log, "init_start", "init_stop"),
        samples=int(evaluations[-1][1]) if evaluations else None,
        accuracy=evaluations[-1][2] if evaluations else None,
        evaluations=len(evaluations),
    )


def mean_samples(logs: list[ResultLog]) -> float | None:
    """Mean of the samples to the target, fewest and most left out.

    As MLPerf's rcp_checker counts: a run that did not converge took infinitely many, so
    one such run is left out as the slowest. None for more of them, or fewer than 3 runs.
    """
    samples = sorted(
        log.evaluations[-1][1] for log in logs if log.status == "success" and log.evaluations
    )
    return _olympic_mean(samples, len(logs))


def score(logs: list[ResultLog], ruleset: str) -> Score:
    """The score of one system's logs under a ruleset."""
    converged = [log for log in logs if log.status == "success"]
    times = [_minutes(log, "run_start", "run_stop") for log in converged]
    minutes = _olympic_mean(sorted(time for time in times if time is not None), len(logs))
    samples, point, factor = mean_samples(logs), None, 1.0
    sizes = {log.global_batch_size for log in logs}
    if {log.value("submission_division") for log in logs} == {"closed"} and len(sizes) == 1:
        size = sizes.pop()
        point = None if size is None else convergence_point(size, ruleset)
    if point is not None and samples is not None and point.passes(samples):
        factor = point.scale_factor(samples)
    fault = None
    if minutes is None:
        fault = (
            f"{len(converged)} of {len(logs)} runs converged; a score needs 3 runs at least, "
            "and all but one must converge"
        )
    return Score(minutes and minutes * factor, minutes, factor, samples, point, fault)


def _olympic_mean(values: list[float], runs: int) -> float | None:
    """Mean of sorted `values` of converged runs without the first and the last of all `runs`."""
    lost = runs - len(values)
    counted = values[1 : len(values) - (0 if lost else 1)]
    if lost > 1 or runs <= DROPPED_RUNS or not counted:
        return None
    return sum(counted) / len(counted)


def _minutes(log: ResultLog, start: str, stop: str) -> float | None:
    begin, end = log.first(start), log.first(stop)
    if not (begin and end) or None in (begin.time_ms, end.time_ms):
        return None
    return (end.time_ms - begin.time_ms) / 60_000
