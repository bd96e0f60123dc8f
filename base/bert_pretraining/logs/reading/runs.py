"""A run as its logs tell it: what was trained, how fast, and how well."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

TARGET_MLM_ACCURACY = 0.72  # MLPerf's, where a log does not say another
SUCCESS, ABORTED, UNFINISHED = "success", "aborted", "unfinished"


@dataclass(frozen=True)
class EvaluationPoint:
    """One evaluation, after `samples` trained sequences, `seconds` after the clock's start."""

    samples: int | None
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
        resumed_samples: those of train_samples that a run before this one had trained.
        run_seconds: from the clock's start to its end; init_seconds: before it.
        evaluations, training: in the order of samples, or of time where those are unknown.
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

    @property
    def target_point(self) -> EvaluationPoint | None:
        """The first evaluation that met the target."""
        return next((point for point in self.evaluations if point.accuracy >= self.target), None)

    @property
    def sequences_per_second(self) -> float | None:
        """Sequences trained a second of the clock, evaluations included."""
        if not self.train_samples or not self.run_seconds:
            return None
        return (self.train_samples - self.resumed_samples) / self.run_seconds
