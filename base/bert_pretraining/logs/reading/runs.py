"""A run as its logs describe it: what was trained, how fast, and how well."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bert_pretraining.logs.sinks import MatrixRate, Speed, Throughputs

TARGET_MLM_ACCURACY = 0.72  # the target of MLPerf, for a log that names no other
SUCCESS, ABORTED, UNFINISHED = "success", "aborted", "unfinished"


@dataclass(frozen=True)
class EvaluationPoint:
    """One evaluation, after `samples` trained sequences and `seconds` of the clock."""

    samples: int | None
    seconds: float | None
    accuracy: float
    loss: float | None


@dataclass(frozen=True)
class TrainingPoint:
    """What a log says about training at one moment; None where it says nothing.

    speed: of the steps since the point before.
    """

    samples: int
    seconds: float | None
    loss: float | None = None
    mlm_accuracy: float | None = None
    learning_rate: float | None = None
    sequences_per_second: float | None = None
    loss_scale: float | None = None
    speed: Speed | None = None


@dataclass(frozen=True, eq=False)  # runs are compared by identity
class Run:
    """One run. The clock starts at `run_start`, or without an MLPerf log at TRAIN_BEGIN.

    Attributes:
        source: "MLPerf log", "PerfLog" or "MLPerf log and PerfLog".
        status: "success" or "aborted" as the log says; "unfinished" if the end is missing.
        target: the masked-token accuracy at which training stops.
        train_samples: sequences trained; eval_samples: sequences of an evaluation.
        resumed_samples: those of train_samples that an earlier run had trained.
        run_seconds: from the start to the end of the clock; init_seconds: before its start.
        evaluations, training: in the order of samples, or of time if samples are unknown.
        faults: what is wrong with the logs, with file and line.
        commonest_share: the accuracy of always guessing the commonest masked token.
        notices: what the run itself said was going wrong.
        speed: of all steps; throughputs: FlagPerf's three; matrix_rate: what the devices can do.
            None in the logs of other programs.
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
    resumed_samples: int
    run_seconds: float | None
    init_seconds: float | None
    organization: str | None
    platform: str | None
    division: str | None
    hyperparameters: dict[str, object]
    evaluations: tuple[EvaluationPoint, ...]
    training: tuple[TrainingPoint, ...]
    faults: tuple[str, ...]
    commonest_share: float | None = None
    notices: tuple[str, ...] = ()
    speed: Speed | None = None
    throughputs: Throughputs | None = None
    matrix_rate: MatrixRate | None = None

    @property
    def target_point(self) -> EvaluationPoint | None:
        """The first evaluation that met the target."""
        return next((point for point in self.evaluations if point.accuracy >= self.target), None)

    @property
    def sequences_per_second(self) -> float | None:
        """Sequences trained per second of the clock, evaluations included."""
        if not self.train_samples or not self.run_seconds:
            return None
        return (self.train_samples - self.resumed_samples) / self.run_seconds
