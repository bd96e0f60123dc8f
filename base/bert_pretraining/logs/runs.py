"""Logs -> runs: what was trained, how fast, and how well, whoever wrote the log.

A run is a file (an MLPerf log, a PerfLog, or the terminal's output with both) or a folder with
`mllog.txt` and `perflog.txt`, as a run leaves it. The MLPerf log counts where both say the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from bert_pretraining.errors import UserError
from bert_pretraining.logs.reader import Event, LogFile, read_log

TARGET_MLM_ACCURACY = 0.72  # MLPerf's, where a log does not say another
Value = TypeVar("Value")
RUN_FILES = ("mllog.txt", "perflog.txt")
SUCCESS, ABORTED, UNFINISHED = "success", "aborted", "unfinished"
# Hyperparameters that MLPerf's closed division names, in the order in which a reader wants them.
HYPERPARAMETERS = tuple(
    "global_batch_size gradient_accumulation_steps opt_base_learning_rate "
    "opt_learning_rate_training_steps opt_learning_rate_warmup_steps num_warmup_steps "
    "start_warmup_step opt_lamb_beta_1 opt_lamb_beta_2 opt_lamb_weight_decay_rate "
    "opt_lamb_epsilon opt_epsilon opt_lamb_learning_rate_decay_poly_power".split()
)


@dataclass(frozen=True)
class EvaluationPoint:
    """One evaluation, after `samples` trained sequences, `seconds` after the clock's start."""

    samples: int
    seconds: float | None
    accuracy: float
    loss: float | None


@dataclass(frozen=True)
class TrainingPoint:
    """What a log says of training at one moment; None for what it does not say."""

    samples: int
    seconds: float | None
    loss: float | None = None
    mlm_accuracy: float | None = None
    learning_rate: float | None = None
    sequences_per_second: float | None = None


@dataclass(frozen=True, eq=False)  # a run is itself, not its values
class Run:
    """One run. The clock starts at `run_start`, in a PerfLog alone at TRAIN_BEGIN.

    Attributes:
        source: "MLPerf log", "PerfLog" or "MLPerf log and PerfLog".
        status: "success" or "aborted" as the log says; "unfinished" where its end is missing.
        target: masked-token accuracy at which training was to stop.
        train_samples: sequences trained; eval_samples: sequences of an evaluation.
        run_seconds: from the clock's start to its end; init_seconds: before it.
        evaluations, training: in the order of samples.
        faults: what is wrong with the logs, with file and line.
    """

    name: str
    files: tuple[Path, ...]
    source: str
    status: str
    target: float
    seed: int | None
    global_batch_size: int | None
    train_samples: int | None
    eval_samples: int | None
    run_seconds: float | None
    init_seconds: float | None
    organization: str | None
    platform: str | None
    division: str | None
    hyperparameters: dict[str, object]
    evaluations: tuple[EvaluationPoint, ...]
    training: tuple[TrainingPoint, ...]
    faults: tuple[str, ...]

    @property
    def target_point(self) -> EvaluationPoint | None:
        """The first evaluation that met the target."""
        return next((point for point in self.evaluations if point.accuracy >= self.target), None)

    @property
    def sequences_per_second(self) -> float | None:
        """Sequences trained a second of the clock, evaluations included."""
        if not self.train_samples or not self.run_seconds:
            return None
        return self.train_samples / self.run_seconds


def load_runs(paths: Sequence[str | Path]) -> list[Run]:
    """One run for each file or run's folder; other folders stand for the runs in them.

    Raises:
        UserError: a path is missing, is no log of BERT, or holds several runs.
    """
    found: dict[Path, list[Path]] = {}
    for path in paths:
        for place, files in _logs_of(Path(path)):
            found.setdefault(place, files)
    names = _distinct_names(list(found))
    return [
        _load_run(place, name, files)
        for name, (place, files) in zip(names, found.items(), strict=True)
    ]


def _logs_of(path: Path) -> list[tuple[Path, list[Path]]]:
    """Each run at `path`: its place and its files."""
    if not path.is_dir():
        return [(path, [path])]
    files = [path / name for name in RUN_FILES if (path / name).is_file()]
    if files:
        return [(path, files)]
    try:
        entries = sorted(path.iterdir(), key=_natural)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); pass a log") from error
    runs = [
        run for entry in entries if entry.is_dir() and _is_run(entry) for run in _logs_of(entry)
    ]
    runs += [(entry, [entry]) for entry in entries if re.fullmatch(r"result_\d+\.txt", entry.name)]
    if not runs:
        raise UserError(
            f"{path}: holds neither {' nor '.join(RUN_FILES)}, nor folders with them, nor "
            "result_*.txt; pass log files or a run's folder"
        )
    return runs


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in RUN_FILES)


def _natural(path: Path) -> list[object]:
    """A key that puts result_2 before result_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _distinct_names(places: list[Path]) -> list[str]:
    """Each place by as many of its last parts as make all names differ."""
    parts = [(*place.resolve().parent.parts, place.resolve().stem) for place in places]
    for count in range(1, max(map(len, parts), default=1)):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [str(place) for place in places]


def _load_run(place: Path, name: str, files: list[Path]) -> Run:
    logs = [read_log(path) for path in files]
    mllog = [event for log in logs for event in log.mllog]
    perflog = _one_rank([event for log in logs for event in log.perflog])
    if not mllog and not perflog:
        raise UserError(f"{place}: no :::MLLOG and no [PerfLog] line; pass a run's log")
    _require_one_run(place, mllog, "run_start", "run_stop")
    _require_one_run(place, perflog, "TRAIN_BEGIN", "TRAIN_END")
    faults = [f"{log.path}:{fault.line}: {fault.what}" for log in logs for fault in log.faults]
    return _reduce(place, name, logs, mllog, perflog, faults)


def _one_rank(events: list[Event]) -> list[Event]:
    """The events of the lowest rank: others repeat it."""
    ranks = [event.metadata.get("rank") or 0 for event in events]
    return [event for event, rank in zip(events, ranks, strict=True) if rank == min(ranks)]


def _require_one_run(place: Path, events: list[Event], start: str, stop: str) -> None:
    stopped = None
    for event in events:
        if event.key == start and stopped is not None:
            raise UserError(
                f"{place}: holds several runs ({start} in line {event.line} after {stop} in line "
                f"{stopped}); give each run a file of its own"
            )
        if event.key == stop:
            stopped = event.line


@dataclass
class _Facts:
    """The values of one kind of log, by key: the last of each, the first of intervals' starts."""

    place: Path
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
        self.faults.append(f"{self.place}:{event.line}: {what}")


def _reduce(
    place: Path,
    name: str,
    logs: list[LogFile],
    mllog: list[Event],
    perflog: list[Event],
    faults: list[str],
) -> Run:
    mlperf, perf = _Facts(place, faults, mllog), _Facts(place, faults, perflog)
    benchmark = mlperf.value("submission_benchmark")
    if benchmark not in (None, "bert"):
        raise UserError(f"{place}: a log of {benchmark!r}, not of BERT; leave it out")
    settings = _settings(perf)
    finished = perf.value("FINISHED")
    finished = finished if isinstance(finished, dict) else {}
    started = _first(mlperf.first_ms("run_start"), perf.first_ms("TRAIN_BEGIN"))
    evaluations = _evaluations(mlperf, perf, finished, started)
    training = _training(mlperf, perf, started)
    last = max((point.samples for point in (*training, *evaluations)), default=None)
    return Run(
        name=name,
        files=tuple(log.path for log in logs),
        source=" and ".join(
            kind for kind, events in (("MLPerf log", mllog), ("PerfLog", perflog)) if events
        ),
        status=_status(mlperf, finished),
        target=_first(_number(settings.get("target_mlm_accuracy")), TARGET_MLM_ACCURACY),
        seed=_first(_whole(mlperf.value("seed")), _whole(settings.get("seed"))),
        global_batch_size=_first(_whole(mlperf.value("global_batch_size")), _batch_size(perf)),
        train_samples=_first(_whole(mlperf.value("train_samples")), last),
        eval_samples=_whole(mlperf.value("eval_samples")),
        run_seconds=_first(
            _between(mlperf, "run_start", "run_stop"),
            _number(finished.get("raw_train_time")),
            _between(perf, "TRAIN_BEGIN", "TRAIN_END"),
        ),
        init_seconds=_first(
            _between(mlperf, "init_start", "init_stop"),
            _number(finished.get("init_time")),
            _between(perf, "INIT_START", "INIT_END"),
        ),
        organization=_text(mlperf.value("submission_org")),
        platform=_text(mlperf.value("submission_platform")),
        division=_text(mlperf.value("submission_division")),
        hyperparameters={
            key: mlperf.value(key) for key in HYPERPARAMETERS if mlperf.value(key) is not None
        },
        evaluations=evaluations,
        training=training,
        faults=tuple(faults),
    )


def _first(*values: Value | None) -> Value | None:
    """The first that is known."""
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


def _evaluations(
    mlperf: _Facts, perf: _Facts, finished: dict, started: int | None
) -> tuple[EvaluationPoint, ...]:
    from_perf = _perflog_evaluations(perf, finished, started)
    losses = {point.samples: point.loss for point in from_perf}
    points: dict[int, EvaluationPoint] = {}
    for event in mlperf.all("eval_accuracy"):
        accuracy = _number(event.value)
        samples = _whole(event.metadata.get("epoch_num", event.metadata.get("samples_count")))
        if accuracy is None or samples is None:
            mlperf.fault(event, "eval_accuracy without a number or without samples in epoch_num")
            continue
        seconds = _since(started, event.time_ms)
        point = EvaluationPoint(samples, seconds, accuracy, losses.get(samples))
        points.setdefault(samples, point)  # some logs have a line a rank
    found = points.values() if points else from_perf
    return tuple(sorted(found, key=lambda point: point.samples))


def _perflog_evaluations(
    perf: _Facts, finished: dict, started: int | None
) -> list[EvaluationPoint]:
    points = []
    batch_size, samples, steps = _batch_size(perf), 0, None

    def add(event: Event, samples: int, accuracy: object, loss: object) -> None:
        number = _number(accuracy)
        if number is not None:
            seconds = _since(started, event.time_ms)
            points.append(EvaluationPoint(samples, seconds, number, _number(loss)))

    for event in perf.events:
        value = event.value if isinstance(event.value, dict) else {}
        if event.key == "STEP_END":
            samples = _whole(value.get("num_trained_samples")) or samples
            steps = _whole(value.get("global_steps"))
        elif event.key in ("INIT_EVALUATION", "EVALUATION"):
            at = _whole(value.get("global_steps"))
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
        samples = _whole(value.get("num_trained_samples"))
        if samples is None:
            perf.fault(event, "STEP_END without num_trained_samples")
            continue
        names = ("loss", "mlm_acc", "learning_rate", "seq/s")
        figures = [_number(value.get(name)) for name in names]
        points.append(TrainingPoint(samples, _since(started, event.time_ms), *figures))
    if not points:
        points = _tracked_stats(mlperf, started)
    return tuple(sorted(points, key=lambda point: point.samples))


def _tracked_stats(mlperf: _Facts, started: int | None) -> list[TrainingPoint]:
    """NVIDIA's throughput since the last evaluation, in sequences a second."""
    points = []
    for event in mlperf.all("tracked_stats"):
        samples = _whole(event.metadata.get("epoch_num"))
        speed = event.value.get("throughput") if isinstance(event.value, dict) else None
        if samples is not None and _number(speed) is not None:
            seconds = _since(started, event.time_ms)
            points.append(TrainingPoint(samples, seconds, sequences_per_second=_number(speed)))
    return points


def _batch_size(perf: _Facts) -> int | None:
    """Sequences an update, where the counters of two steps tell it; else those of one."""
    values = [event.value for event in perf.all("STEP_END") if isinstance(event.value, dict)]
    counters = [
        (_whole(value.get("num_trained_samples")), _whole(value.get("global_steps")))
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
    """Seconds; an evaluation before the clock's start counts as at it."""
    return None if started is None or time_ms is None else max(0, time_ms - started) / 1000


def _number(value: object) -> float | None:
    usable = (
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    )
    return float(value) if usable else None


def _whole(value: object) -> int | None:
    number = _number(value)
    return int(number) if number is not None and number == int(number) else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
