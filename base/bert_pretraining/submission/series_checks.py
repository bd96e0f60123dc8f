"""Checks of the runs of one system together: copies, differences, number, convergence."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator

from bert_pretraining.runtime.words import counted
from bert_pretraining.submission.findings import Finding, warning
from bert_pretraining.submission.rcp import MISSING, convergence_point
from bert_pretraining.submission.rulesets import RUNS
from bert_pretraining.submission.score import mean_samples
from bert_pretraining.submission.tree import ResultLog, System, number, result_number

# Keys that must have the same value in all runs of a system.
SHARED_KEYS = (
    "submission_org submission_division submission_status submission_platform "
    "global_batch_size d_batch_size gradient_accumulation_steps max_predictions_per_seq "
    "opt_base_learning_rate opt_epsilon opt_lamb_epsilon opt_lamb_beta_1 opt_lamb_beta_2 "
    "opt_lamb_weight_decay_rate opt_lamb_learning_rate_decay_poly_power "
    "opt_learning_rate_training_steps opt_learning_rate_warmup_steps num_warmup_steps "
    "start_warmup_step"
).split()


def check_series(system: System, logs: list[ResultLog], ruleset: str) -> list[Finding]:
    """All findings about the runs of one system together."""
    found = [*_number(system, logs), *_unconverged(system, logs)]
    for check in (_shared_values, _seeds, _order):
        found += check(logs)
    if logs and logs[0].division == "closed":
        found += _convergence(system, logs, ruleset)
    return found


def check_copies(logs: list[ResultLog]) -> Iterator[Finding]:
    """A run submitted twice, in one system or in two, which MLPerf's tools do not check."""
    copies = set()
    for log, first in _repeats(logs, lambda log: hashlib.sha256(log.path.read_bytes()).digest()):
        copies.add(log.path)
        yield Finding(log.path, None, f"the same bytes as {_called(first, log)}")
    logs = [log for log in logs if log.path not in copies]
    for log, first in _repeats(logs, _clock):
        copies.add(log.path)
        yield Finding(
            log.path, log.first("run_start").line,
            f"run_start and run_stop are to the millisecond those of {_called(first, log)}: one "
            "run twice",
        )  # fmt: skip
    logs = [log for log in logs if log.path not in copies]
    for log, first in _repeats(logs, _curve):
        yield Finding(
            log.path, log.evaluations[0][0].line,
            f"all {len(log.evaluations)} accuracies are to the last digit those of "
            f"{_called(first, log)}: one run twice, under another time",
        )  # fmt: skip


def _called(log: ResultLog, beside: ResultLog) -> str:
    """A log's name, or its path where that is in another directory."""
    return log.name if log.path.parent == beside.path.parent else str(log.path)


def _number(system: System, logs: list[ResultLog]) -> Iterator[Finding]:
    if len(logs) != RUNS:
        yield Finding(system.folder, None, f"{counted(len(logs), 'log')} result_*.txt, not {RUNS}")
    numbers = [result_number(log.path) for log in logs]
    if len(logs) == RUNS and numbers != list(range(RUNS)):
        yield Finding(
            system.folder, None, f"logs are not numbered result_0.txt to result_{RUNS - 1}.txt"
        )


def _unconverged(system: System, logs: list[ResultLog]) -> Iterator[Finding]:
    failed = [log for log in logs if log.status != "success"]
    for log in failed:
        stop = log.last("run_stop")
        best = max((accuracy for _, _, accuracy in log.evaluations), default=0.0)
        what = f"this run did not reach the target (best eval_accuracy {best:.5f}): "
        line = stop.line if stop else None
        if len(failed) == 1:
            yield warning(
                log.path, line,
                what + "one is allowed, and counts as the slowest, which is dropped",
            )  # fmt: skip
        else:
            yield Finding(log.path, line, what + f"{len(failed)} did not, one is allowed")


def _repeats(
    logs: list[ResultLog], mark: Callable[[ResultLog], object]
) -> Iterator[tuple[ResultLog, ResultLog]]:
    """(log, the first log with the same mark); None marks nothing."""
    first: dict[object, ResultLog] = {}
    for log in logs:
        value = mark(log)
        if value is not None and first.setdefault(value, log) is not log:
            yield log, first[value]


def _clock(log: ResultLog) -> tuple[int, int] | None:
    start, stop = log.first("run_start"), log.last("run_stop")
    if not (start and stop) or None in (start.time_ms, stop.time_ms):
        return None
    return start.time_ms, stop.time_ms


def _curve(log: ResultLog) -> tuple[float, ...] | None:
    # The start checkpoint scores the same in every run.
    trained = [accuracy for _, samples, accuracy in log.evaluations if samples > 0]
    return tuple(trained) if len(trained) > 1 else None


def _shared_values(logs: list[ResultLog]) -> Iterator[Finding]:
    for key in SHARED_KEYS:
        events = [(log, log.first(key)) for log in logs if log.first(key)]
        shown = Counter(json.dumps(event.value) for _, event in events)
        if len(shown) < 2:
            continue
        common, count = shown.most_common(1)[0]
        for log, event in events:
            if (value := json.dumps(event.value)) != common:
                yield Finding(
                    log.path, event.line,
                    f"{key} is {value}, but {common} in {counted(count, 'other log')} of this "
                    "system",
                )  # fmt: skip


def _seeds(logs: list[ResultLog]) -> Iterator[Finding]:
    first: dict[object, ResultLog] = {}
    for log in logs:
        for value, event in {event.value: event for event in log.all("seed")
                             if number(event.value) is not None}.items():  # fmt: skip
            if first.setdefault(value, log) is not log:
                yield Finding(
                    log.path, event.line, f"seed {value} is also that of {first[value].name}"
                )


def _order(logs: list[ResultLog]) -> Iterator[Finding]:
    """Runs must not overlap, and result_0 must be the first that was launched."""
    timed = [(log, _clock(log)) for log in logs if _clock(log)]
    for (before, clock), (log, next_clock) in itertools.pairwise(timed):
        line = log.first("run_start").line
        if next_clock[0] < clock[0]:
            yield warning(
                log.path, line, f"started before {before.name}: not numbered in launch order"
            )
        elif clock[0] < next_clock[0] < clock[1]:
            yield warning(
                log.path, line,
                f"started before {before.name} ended: runs of one system follow each other",
            )  # fmt: skip


def _convergence(system: System, logs: list[ResultLog], ruleset: str) -> Iterator[Finding]:
    """The RCP check; `submission rcp` makes it before a run."""
    sizes = {log.global_batch_size for log in logs}
    mean = mean_samples(logs)
    if len(sizes) != 1 or None in sizes or mean is None:
        return
    point = convergence_point(sizes.pop(), ruleset)
    least = point.least_mean()
    if point.basis == MISSING:
        yield Finding(
            system.folder, None, f"global batch size {point.global_batch_size:,}: "
            f"{point.describe()}",
        )  # fmt: skip
    elif mean < least:
        yield Finding(
            system.folder, None,
            f"converges too fast: {mean:,.0f} samples in the mean, {least:,.0f} at least "
            f"({point.describe()}, RCP mean {point.mean_samples:,.0f})",
        )  # fmt: skip
