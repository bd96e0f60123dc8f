"""Making a run of its events. Where both logs say something, the MLPerf log counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from bert_pretraining.errors import UserError
from bert_pretraining.logs.reading.events import Event, LogFile
from bert_pretraining.logs.reading.runs import (
    ABORTED,
    SUCCESS,
    TARGET_MLM_ACCURACY,
    UNFINISHED,
    EvaluationPoint,
    Run,
    TrainingPoint,
)
from bert_pretraining.logs.reading.speeds import matrix_rate_of, speed_of, throughputs_of
from bert_pretraining.logs.reading.values import entry, number, text, whole

Value = TypeVar("Value")
# The hyperparameters that MLPerf's closed division names, in the order of the report.
HYPERPARAMETERS = tuple(
    "global_batch_size gradient_accumulation_steps opt_base_learning_rate "
    "opt_learning_rate_training_steps opt_learning_rate_warmup_steps num_warmup_steps "
    "start_warmup_step opt_lamb_beta_1 opt_lamb_beta_2 opt_lamb_weight_decay_rate "
    "opt_lamb_epsilon opt_epsilon opt_lamb_learning_rate_decay_poly_power".split()
)


@dataclass
class _Facts:
    """The events of one kind of log by key. Of several values with one key the last counts."""

    path: Path
    faults: list[str]
    events: list[Event]
    by_key: dict[str, list[Event]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for event in self.events:
            self.by_key.setdefault(event.key, []).append(event)

    def all(self, key: str) -> list[Event]:
        return self.by_key.get(key, [])

    def value(self, key: str) -> object:
        return self.all(key)[-1].value if self.all(key) else None

    def first_ms(self, *keys: str) -> int | None:
        times = [event.time_ms for key in keys for event in self.all(key)]
        return next((time for time in times if time is not None), None)

    def fault(self, event: Event, what: str) -> None:
        self.faults.append(f"{self.path}:{event.line}: {what}")


def reduce_run(
    path: Path, name: str, logs: Sequence[LogFile], mllog: list[Event], perflog: list[Event]
) -> Run:
    """Make one run of all its events.

    Args:
        path: the file or folder of the run, for error messages.
        logs: the files with the events, and their faults.
        mllog, perflog: the events of one run, and those of one rank of it.

    Raises:
        UserError: another benchmark's log.
    """
    faults = [f"{log.path}:{fault.line}: {fault.what}" for log in logs for fault in log.faults]
    mlperf = _Facts(next((log.path for log in logs if log.mllog), path), faults, mllog)
    perf = _Facts(next((log.path for log in logs if log.perflog), path), faults, perflog)
    benchmark = mlperf.value("submission_benchmark")
    if benchmark not in (None, "bert"):
        raise UserError(f"{path}: a log of {benchmark!r}, not of BERT", "leave it out")
    settings = _settings(perf)
    finished = perf.value("FINISHED")
    finished = finished if isinstance(finished, dict) else {}
    started = _first(mlperf.first_ms("run_start"), perf.first_ms("TRAIN_BEGIN"))
    evaluations = _evaluations(mlperf, perf, finished, started)
    training = _training(mlperf, perf, started)
    known = [point.samples for point in (*training, *evaluations) if point.samples is not None]
    return Run(
        name=name,
        files=tuple(log.path for log in logs),
        source=" and ".join(
            kind for kind, events in (("MLPerf log", mllog), ("PerfLog", perflog)) if events
        ),
        status=_status(mlperf, finished),
        target=_first(number(settings.get("target_mlm_accuracy")), TARGET_MLM_ACCURACY),
        seed=_first(whole(mlperf.value("seed")), whole(settings.get("seed"))),
        global_batch_size=_first(whole(mlperf.value("global_batch_size")), _batch_size(perf)),
        train_samples=_first(_train_samples(mlperf), max(known, default=None)),
        eval_samples=whole(mlperf.value("eval_samples")),
        resumed_samples=_first(whole(mlperf.value("resumed_from")), _resumed_samples(perf), 0),
        run_seconds=_first(
            _between(mlperf, "run_start", "run_stop"),
            number(finished.get("raw_train_time")),
            _between(perf, "TRAIN_BEGIN", "TRAIN_END"),
        ),
        init_seconds=_first(
            _between(mlperf, "init_start", "init_stop"),
            number(finished.get("init_time")),
            _between(perf, "INIT_START", "INIT_END"),
        ),
        organization=text(mlperf.value("submission_org")),
        platform=text(mlperf.value("submission_platform")),
        division=text(mlperf.value("submission_division")),
        hyperparameters={
            key: mlperf.value(key) for key in HYPERPARAMETERS if mlperf.value(key) is not None
        },
        evaluations=evaluations,
        training=training,
        faults=tuple(faults),
        commonest_share=number(entry(perf.value("EVALUATION_SET"), "commonest_share")),
        notices=tuple(
            line for event in perf.all("NOTICE") if (line := text(entry(event.value, "text")))
        ),
        speed=speed_of(finished, number(finished.get("training_sequences_per_second"))),
        throughputs=throughputs_of(finished),
        matrix_rate=matrix_rate_of(perf.value("RUN_OUTLINE")),
    )


def _first(*values: Value | None) -> Value | None:
    """The first value that is not None."""
    return next((value for value in values if value is not None), None)


def _settings(perf: _Facts) -> dict:
    submitted = perf.value("SUBMITTED_INFO")
    settings = submitted.get("config") if isinstance(submitted, dict) else None
    return settings if isinstance(settings, dict) else {}


def _status(mlperf: _Facts, finished: dict) -> str:
    if mlperf.all("run_stop"):
        return str(mlperf.all("run_stop")[-1].metadata.get("status") or UNFINISHED)
    if mlperf.all("run_start") or "converged" not in finished:
        return UNFINISHED
    return SUCCESS if finished["converged"] else ABORTED


def _train_samples(mlperf: _Facts) -> int | None:
    """Sequences that were trained. Some logs have the planned number before run_start instead."""
    starts, trained = mlperf.all("run_start"), mlperf.all("train_samples")
    if not trained or (starts and trained[-1].line < starts[0].line):
        return None
    return whole(trained[-1].value)


def _evaluations(
    mlperf: _Facts, perf: _Facts, finished: dict, started: int | None
) -> tuple[EvaluationPoint, ...]:
    """The evaluations of the MLPerf log, else of the PerfLog. Only the PerfLog has losses."""
    from_perf = _perflog_evaluations(perf, finished, started)
    losses = {point.samples: point.loss for point in from_perf}
    points: dict[tuple, EvaluationPoint] = {}
    for event in mlperf.all("eval_accuracy"):
        accuracy = number(event.value)
        samples = whole(event.metadata.get("epoch_num", event.metadata.get("samples_count")))
        if accuracy is None or samples is None:
            mlperf.fault(event, "eval_accuracy without a number or without samples in epoch_num")
            continue
        seconds = _since(started, event.time_ms)
        point = EvaluationPoint(samples, seconds, accuracy, losses.get(samples))
        points.setdefault((samples, accuracy), point)  # some logs have a line for each rank
    found = list(points.values())
    if _counts_epochs(found, whole(mlperf.value("global_batch_size"))):
        event = mlperf.all("eval_accuracy")[-1]
        many = "epoch_num of eval_accuracy counts epochs, not sequences: those are not known"
        mlperf.fault(event, many)
        return _without_samples(found, _train_samples(mlperf))
    return tuple(sorted(found or from_perf, key=lambda point: point.samples))


def _counts_epochs(points: list[EvaluationPoint], batch_size: int | None) -> bool:
    """Whether `samples` cannot count sequences: several are equal, or below one batch."""
    numbers = {point.samples for point in points}
    partial = any(0 < number < (batch_size or 1) for number in numbers)
    return partial or len(numbers) < len(points)


def _without_samples(
    points: list[EvaluationPoint], train_samples: int | None
) -> tuple[EvaluationPoint, ...]:
    """The points with unknown samples, except the last, which comes after all training."""
    unknown = [dataclasses.replace(point, samples=None) for point in points]
    return (*unknown[:-1], dataclasses.replace(points[-1], samples=train_samples))


def _perflog_evaluations(
    perf: _Facts, finished: dict, started: int | None
) -> list[EvaluationPoint]:
    points = []
    batch_size, samples, steps = _batch_size(perf), 0, None

    def add(event: Event, samples: int, accuracy: object, loss: object) -> None:
        share = number(accuracy)
        if share is not None:
            seconds = _since(started, event.time_ms)
            points.append(EvaluationPoint(samples, seconds, share, number(loss)))

    for event in perf.events:
        value = event.value if isinstance(event.value, dict) else {}
        if event.key == "STEP_END":
            samples = whole(value.get("num_trained_samples")) or samples
            steps = whole(value.get("global_steps"))
        elif event.key in ("INIT_EVALUATION", "EVALUATION"):
            at = whole(value.get("global_steps"))
            if event.key == "EVALUATION" and at is not None and at != steps and batch_size:
                samples = at * batch_size
            add(event, samples, value.get("eval_mlm_accuracy"), value.get("eval_loss"))
        elif event.key == "FINISHED" and samples not in [point.samples for point in points]:
            add(event, samples, finished.get("final_mlm_accuracy"), finished.get("final_loss"))
    return points


def _training(mlperf: _Facts, perf: _Facts, started: int | None) -> tuple[TrainingPoint, ...]:
    points = []
    for event in perf.all("STEP_END"):
        value = event.value if isinstance(event.value, dict) else {}
        samples = whole(value.get("num_trained_samples"))
        if samples is None:
            perf.fault(event, "STEP_END without num_trained_samples")
            continue
        names = ("loss", "mlm_acc", "learning_rate", "seq/s", "loss_scale")
        figures = [number(value.get(name)) for name in names]
        speed = speed_of(value, number(value.get("seq/s")))
        points.append(TrainingPoint(samples, _since(started, event.time_ms), *figures, speed))
    if not points:
        points = _tracked_stats(mlperf, started)
    return tuple(sorted(points, key=lambda point: point.samples))


def _tracked_stats(mlperf: _Facts, started: int | None) -> list[TrainingPoint]:
    """NVIDIA's throughput since the last evaluation, in sequences per second."""
    points = []
    for event in mlperf.all("tracked_stats"):
        samples = whole(event.metadata.get("epoch_num"))
        speed = event.value.get("throughput") if isinstance(event.value, dict) else None
        if samples is not None and number(speed) is not None:
            seconds = _since(started, event.time_ms)
            points.append(TrainingPoint(samples, seconds, sequences_per_second=number(speed)))
    return points


def _resumed_samples(perf: _Facts) -> int | None:
    resumed = perf.value("RESUMED")
    return whole(resumed.get("num_trained_samples")) if isinstance(resumed, dict) else None


def _batch_size(perf: _Facts) -> int | None:
    """Sequences of an update, by the counters of two steps, else of one."""
    values = [event.value for event in perf.all("STEP_END") if isinstance(event.value, dict)]
    counters = [
        (whole(value.get("num_trained_samples")), whole(value.get("global_steps")))
        for value in values
    ]
    known = sorted({pair for pair in counters if None not in pair and pair[1] > 0})
    if not known:
        return None
    (samples, steps), (last_samples, last_steps) = (known[0], known[-1])
    if last_steps > steps:
        samples, steps = last_samples - samples, last_steps - steps
    return samples // steps if samples % steps == 0 else None


def _between(facts: _Facts, start: str, stop: str) -> float | None:
    return _since(facts.first_ms(start), facts.first_ms(stop))


def _since(started: int | None, time_ms: int | None) -> float | None:
    """Seconds since the start of the clock; 0 for an event before it."""
    return None if started is None or time_ms is None else max(0, time_ms - started) / 1000
