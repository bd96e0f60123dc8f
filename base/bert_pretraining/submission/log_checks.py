"""Checks of one run's log that MLPerf's compliance checker does not make."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

from bert_pretraining.logs.reading.events import MLLOG_TOKEN, Event
from bert_pretraining.progress import evaluation_interval
from bert_pretraining.submission.findings import Finding, warning
from bert_pretraining.submission.rulesets import TARGET_MLM_ACCURACY
from bert_pretraining.submission.tree import BENCHMARK, ResultLog, number

EVAL_SAMPLES = 10_000
STATUSES = ("success", "aborted")
# rcp_checker.py reads a line for these when the word stands anywhere in it.
RCP_WORDS = ("global_batch_size", "submission_benchmark", "eval_accuracy", "eval_error")
TOKEN_WITHOUT_SPACE = re.compile(rf"{MLLOG_TOKEN.strip()}(?! )")
ONCE = ("init_stop", "run_start", "run_stop")
GREATEST_INIT_TO_RUN_MS = 60_000


def check_log(log: ResultLog, ruleset: str) -> list[Finding]:
    """All findings about one log, by line."""
    if not log.events and not log.faults:
        return [Finding(log.path, None, "holds no :::MLLOG line: not a run's log")]
    checks: list[Callable[[ResultLog], Iterator[Finding]]] = [
        _lines, _mistaken, _one_run, _resumed, _benchmark, _cache_clear, _times, _accuracies,
        _status, _seeds,
    ]  # fmt: skip
    if log.division == "closed":
        checks += [_target, _evaluation_schedule, _samples]
    found = [finding for check in checks for finding in check(log)]
    found += _init_time(log, ruleset)
    return sorted(found, key=lambda finding: finding.line or 0)


def _at(log: ResultLog, event: Event, what: str) -> Finding:
    return Finding(log.path, event.line, what)


def _lines(log: ResultLog) -> Iterator[Finding]:
    for fault in log.faults:
        yield Finding(log.path, fault.line, fault.what)


def _mistaken(log: ResultLog) -> Iterator[Finding]:
    """Lines that MLPerf's tools skip or misread."""
    text = log.path.read_text(encoding="utf-8", errors="replace")
    for line, content in enumerate(text.split("\n"), 1):
        if TOKEN_WITHOUT_SPACE.search(content):
            yield Finding(
                log.path, line, "':::MLLOG' without a space after it: the line is skipped"
            )
    for event in log.events:
        record = json.dumps([event.key, event.value, event.metadata])
        for word in RCP_WORDS:
            if word in record and event.key != word:
                yield _at(
                    log, event,
                    f"'{event.key}' contains '{word}': the RCP checker takes the line for that",
                )  # fmt: skip


def _one_run(log: ResultLog) -> Iterator[Finding]:
    for key in ONCE:
        for event in log.all(key)[1:]:
            yield _at(
                log, event,
                f"{key} again (first in line {log.first(key).line}): two runs in one file, or "
                "several ranks logging; one fresh file a run, rank 0 only",
            )  # fmt: skip
    if log.status is None:
        yield Finding(log.path, None, "no run_stop: the run was ended from outside, or crashed")


def _resumed(log: ResultLog) -> Iterator[Finding]:
    for event in log.all("resumed_from"):
        yield _at(
            log, event,
            f"resumed after {event.value!r} samples of an earlier run, whose time is not in this "
            "log: MLPerf wants the whole run by one clock",
        )  # fmt: skip


def _benchmark(log: ResultLog) -> Iterator[Finding]:
    event = log.first("submission_benchmark")
    if event and event.value != BENCHMARK:
        yield _at(log, event, f"submission_benchmark is {event.value!r}, not '{BENCHMARK}'")


def _cache_clear(log: ResultLog) -> Iterator[Finding]:
    for event in log.all("cache_clear"):
        if event.value is not True:
            yield _at(
                log, event,
                f"cache_clear is {event.value!r}: the rules require dropped caches, or the machine "
                "restarted, before each run",
            )  # fmt: skip


def _times(log: ResultLog) -> Iterator[Finding]:
    init_stop, start, stop = (log.first(key) for key in ONCE)
    if start is None or start.time_ms is None:
        return
    if stop and stop.time_ms is not None and stop.time_ms <= start.time_ms:
        yield _at(log, stop, f"run_stop is not after run_start (line {start.line})")
        return
    if init_stop and init_stop.time_ms is not None:
        gap = start.time_ms - init_stop.time_ms
        if gap < 0:
            yield _at(log, start, f"run_start is before init_stop (line {init_stop.line})")
        elif gap > GREATEST_INIT_TO_RUN_MS:
            yield warning(
                log.path, start.line,
                f"run_start comes {gap / 1000:.0f} s after init_stop (line {init_stop.line}): "
                "work that no clock times",
            )  # fmt: skip
    for event in log.all("eval_accuracy"):
        late = stop and stop.time_ms is not None and (event.time_ms or 0) > stop.time_ms
        if event.time_ms is not None and (event.time_ms < start.time_ms or late):
            yield _at(log, event, "eval_accuracy outside run_start to run_stop: not timed")


def _accuracies(log: ResultLog) -> Iterator[Finding]:
    previous = -1.0
    for event in log.all("eval_accuracy"):
        accuracy, samples = number(event.value), number(event.metadata.get("epoch_num"))
        if accuracy is None or not 0.0 <= accuracy < 1.0:
            yield _at(log, event, f"eval_accuracy is {event.value!r}: no number from 0 to 1")
        if samples is None:
            shown = event.metadata.get("epoch_num")
            yield _at(
                log, event,
                f"eval_accuracy has epoch_num {shown!r}: the RCP checker reads the samples "
                "trained so far there",
            )  # fmt: skip
        elif samples <= previous:
            yield _at(log, event, f"epoch_num {samples:,.0f} does not go on from {previous:,.0f}")
        previous = previous if samples is None else samples


def _status(log: ResultLog) -> Iterator[Finding]:
    stop = log.last("run_stop")
    if stop and log.status not in STATUSES:
        yield _at(
            log, stop,
            f"run_stop has the status {log.status!r}, not one of {', '.join(STATUSES)}",
        )  # fmt: skip


def _target(log: ResultLog) -> Iterator[Finding]:
    """Compare the status with the accuracies, which MLPerf's checkers only check separately."""
    stop = log.last("run_stop")
    if stop is None or not log.evaluations:
        return
    last, _, accuracy = log.evaluations[-1]
    if log.status == "success" and accuracy < TARGET_MLM_ACCURACY:
        yield _at(
            log, stop,
            f"status 'success', but the last eval_accuracy (line {last.line}) is {accuracy:.5f}, "
            f"below {TARGET_MLM_ACCURACY}",
        )  # fmt: skip
    for index, (event, _, value) in enumerate(log.evaluations):
        if value < TARGET_MLM_ACCURACY:
            continue
        if log.status != "success":
            yield _at(
                log, stop,
                f"status {log.status!r}, but line {event.line} reached {value:.5f}: MLPerf's "
                "tools would score this run",
            )  # fmt: skip
        elif index < len(log.evaluations) - 1:
            yield warning(
                log.path, event.line,
                f"the target was reached here ({value:.5f}), and the run went on",
            )  # fmt: skip
        return


def _evaluation_schedule(log: ResultLog) -> Iterator[Finding]:
    """Evaluations must be at every multiple of the interval, and nowhere else.

    The rules evaluate at step ceil(k * interval / samples a step). Samples are those
    really trained, which may differ from steps * global batch size by some per mille.
    """
    size = log.global_batch_size
    if size is None:
        return
    interval, due = evaluation_interval(size), 1
    evaluations = [entry for entry in log.evaluations if entry[1] > 0]
    given_up = evaluations[-1][0] if evaluations and log.status != "success" else None
    off: list[tuple[Event, float]] = []
    missed: list[tuple[Event, int, int]] = []  # before which, the first, how many
    for event, samples, _ in evaluations:
        tolerance = min(2 * size + 0.002 * samples, 0.45 * interval)
        nearest = max(1, round(samples / interval))
        if abs(samples - nearest * interval) <= tolerance and nearest >= due:
            if nearest > due:
                missed.append((event, due * interval, nearest - due))
            due = nearest + 1
        elif event is not given_up:
            off.append((event, samples))
    for event, samples in off[:1]:
        yield _at(
            log, event,
            f"evaluated after {samples:,.0f} samples, off the schedule: every {interval:,} "
            f"samples at global batch size {size:,}{_more(len(off))}",
        )  # fmt: skip
    for event, samples, _ in missed[:1]:
        count = sum(count for *_, count in missed)
        yield _at(log, event, f"no evaluation near {samples:,} samples before this{_more(count)}")


def _more(count: int) -> str:
    """The end of a finding that shows only the first of `count` such places."""
    return "" if count == 1 else f" (and {count - 1} more such)"


def _samples(log: ResultLog) -> Iterator[Finding]:
    trained, evaluated = log.last("train_samples"), log.last("eval_samples")
    if evaluated and number(evaluated.value) != EVAL_SAMPLES:
        yield _at(
            log, evaluated,
            f"eval_samples is {evaluated.value!r}: the closed division evaluates {EVAL_SAMPLES:,}",
        )  # fmt: skip
    if trained is None or log.status != "success" or not log.evaluations:
        return
    event, samples, _ = log.evaluations[-1]
    if number(trained.value) != samples:
        yield _at(
            log, trained,
            f"train_samples is {trained.value!r}, but the RCP checker reads {samples:,.0f} "
            f"(epoch_num of the last eval_accuracy, line {event.line})",
        )  # fmt: skip


def _seeds(log: ResultLog) -> Iterator[Finding]:
    events, seen = log.all("seed"), {}
    if not events and log.division == "closed":
        yield Finding(log.path, None, "no seed: the closed division logs it")
    for event in events:
        value = number(event.value)
        if value is None or value != int(value):
            yield _at(log, event, f"the seed {event.value!r} is no whole number")
        source = event.metadata.get("file"), event.metadata.get("lineno")
        place = json.dumps([*source, event.value])
        if None in source:
            yield _at(log, event, "the seed has no file and lineno in its metadata")
        elif place in seen:
            yield _at(log, event, f"seed {event.value} again, from the same place as in line "
                                  f"{seen[place]}; rank 0 only")  # fmt: skip
        seen.setdefault(place, event.line)


def _init_time(log: ResultLog, ruleset: str) -> Iterator[Finding]:
    start, stop = log.first("init_start"), log.first("init_stop")
    if not (start and stop) or None in (start.time_ms, stop.time_ms):
        return
    is_open = log.division == "open"
    allowed = 240 if is_open and ruleset not in ("1.0.0", "1.1.0") else 30
    minutes = (stop.time_ms - start.time_ms) / 60_000
    if minutes >= allowed:
        yield _at(
            log, stop,
            f"init_stop comes {minutes:.1f} minutes after init_start (line {start.line}); "
            f"{allowed} are allowed",
        )  # fmt: skip
