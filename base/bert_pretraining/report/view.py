"""The data that all panels of a report draw."""

from __future__ import annotations

from dataclasses import dataclass

from bert_pretraining.logs.reading.runs import EvaluationPoint, Run, TrainingPoint
from bert_pretraining.report import curves
from bert_pretraining.report.compare import Reference, Series
from bert_pretraining.report.curves import SAMPLES, SECONDS, Scale

LONGEST_NAME = 46
NEAR_TARGET = 0.15  # share of the way from start to target that the close-up shows


@dataclass(frozen=True)
class View:
    """The series and references of a report."""

    series: tuple[Series, ...]
    references: tuple[Reference, ...]

    @property
    def runs(self) -> list[Run]:
        return [run for series in self.series for run in series.runs]

    @property
    def points(self) -> list[EvaluationPoint | TrainingPoint]:
        return [point for run in self.runs for point in (*run.evaluations, *run.training)]

    def knows(self, across: str) -> bool:
        """Whether any log says samples, or seconds."""
        return any(getattr(point, across) is not None for point in self.points)

    @property
    def clock(self) -> str:
        """The axis of what is drawn against time alone: seconds, else samples."""
        return SECONDS if self.knows(SECONDS) else SAMPLES

    @property
    def targets(self) -> list[float]:
        return sorted({run.target for run in self.runs})

    @property
    def baselines(self) -> list[float]:
        """The accuracies of always guessing the commonest token; of several runs the same once."""
        shares = {run.commonest_share for run in self.runs if run.commonest_share is not None}
        return sorted({round(share, 3) for share in shares})

    def scale(self, across: str) -> Scale:
        """The unit of an axis that holds every point, and the reference where that is drawn."""
        values = [getattr(point, across) for point in self.points]
        largest = max((value for value in values if value is not None), default=0)
        if across == SECONDS:
            return curves.time_scale(largest)
        ends = [band(reference)[1] for reference in self.drawn_references]
        return curves.sample_scale(max([largest, *ends]))

    @property
    def drawn_references(self) -> list[Reference]:
        return [reference for reference in self.references if reference.point is not None]


def close_up_from(view: View) -> float | None:
    """The accuracy at which the panel `near_target` begins; None if no run reached it."""
    points = [point for run in view.runs for point in run.evaluations]
    placed = [point.accuracy for point in points if point.samples is not None]
    if not placed:
        return None
    target = min(view.targets)
    low = target - NEAR_TARGET * max(target - min(point.accuracy for point in points), 0.02)
    return low if max(placed) >= low else None


def band(reference: Reference) -> tuple[float, float]:
    """One standard deviation to either side of the reference's mean, in samples."""
    point = reference.point
    return (
        point.mean_samples - point.standard_deviation,
        point.mean_samples + point.standard_deviation,
    )


def duration(seconds: float) -> str:
    """A time as short text, in the unit that fits it."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 7200:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def shortened(text: str) -> str:
    """A name short enough for a picture: both ends of a long one."""
    return text if len(text) <= LONGEST_NAME else f"{text[:24]}...{text[-19:]}"
