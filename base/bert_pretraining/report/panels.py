"""What each panel shows, on matplotlib axes that it is given."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bert_pretraining.logs.runs import Run
from bert_pretraining.report import curves
from bert_pretraining.report.compare import Reference, Series
from bert_pretraining.report.curves import SAMPLES, SECONDS, Curve, Scale
from bert_pretraining.report.style import LINE_STYLES, MARKERS, Theme

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

NEAR_TARGET = 0.15  # share of the way from start to target that the close-up shows
MAX_NAMED_ROWS = 30
MAX_NAMED_MISSES = 3
CORNER_CHARACTERS = 44
MAX_MARKED_POINTS = 80
ACCURACY = "MLM accuracy"
MIN_ROWS = 5  # a single run's bar is no wall
MAX_RUNS_WITH_TRAINING = 2  # with more, single batches' figures would hide the evaluations


@dataclass(frozen=True)
class View:
    """Everything that panels draw."""

    series: tuple[Series, ...]
    references: tuple[Reference, ...]

    @property
    def runs(self) -> list[Run]:
        return [run for series in self.series for run in series.runs]

    @property
    def targets(self) -> list[float]:
        return sorted({run.target for run in self.runs})

    def scale(self, across: str) -> Scale:
        """The unit of an axis that holds every point, and the reference where that is drawn."""
        points = [point for run in self.runs for point in (*run.evaluations, *run.training)]
        values = [getattr(point, across) for point in points]
        largest = max((value for value in values if value is not None), default=0)
        if across == SECONDS:
            return curves.time_scale(largest)
        ends = [_band(reference)[1] for reference in self.drawn_references]
        return curves.sample_scale(max([largest, *ends]))

    @property
    def drawn_references(self) -> list[Reference]:
        return [reference for reference in self.references if reference.point is not None]


def accuracy(axes: Axes, view: View, theme: Theme, across: str) -> None:
    """Masked-token accuracy; against samples with the reference convergence points."""
    _curves(axes, view, theme, across, _evaluations("accuracy", across))
    _batches(axes, view, theme, across, "mlm_accuracy")
    _targets(axes, view, theme)
    _target_points(axes, view, theme, across)
    axes.set_title("MLM accuracy by " + ("sequences" if across == SAMPLES else "time"))
    axes.set_ylabel(ACCURACY)
    if across == SAMPLES:
        _references(axes, view, theme)
        _why_no_reference(axes, view, theme)
    _from_zero(axes, view, across)


def loss(axes: Axes, view: View, theme: Theme, across: str) -> None:
    """Loss (MLM + NSP, nats) of evaluations, behind it that of training batches."""
    _curves(axes, view, theme, across, _evaluations("loss", across))
    _batches(axes, view, theme, across, "loss")
    axes.set_title("Loss by " + ("sequences" if across == SAMPLES else "time"))
    axes.set_ylabel("Loss, MLM + NSP (nats)")
    _from_zero(axes, view, across)


def learning_rate(axes: Axes, view: View, theme: Theme) -> None:
    """Learning rate against samples; a small one in units of a power of ten."""
    rates = [point.learning_rate or 0.0 for run in view.runs for point in run.training]
    exponent = math.floor(math.log10(max([*rates, 1e-30])))
    unit, label = (10.0**exponent, f" (1e{exponent})") if not -3 < exponent < 3 else (1.0, "")

    def rate(run: Run) -> Curve:
        found = curves.curve(run.training, SAMPLES, "learning_rate")
        return Curve(found.x, found.y / unit)

    _curves(axes, view, theme, SAMPLES, rate, finished_count=False)
    axes.set_title("Learning rate")
    axes.set_ylabel(f"Learning rate{label}")
    axes.set_ylim(bottom=0)
    _from_zero(axes, view, SAMPLES)


def throughput(axes: Axes, view: View, theme: Theme, across: str) -> None:
    """Sequences a second; from zero, so that heights can be compared."""
    _curves(axes, view, theme, across, lambda run: curves.throughput(run, across)[0], False)
    logged = any(curves.throughput(run, across)[1] for run in view.runs)
    axes.set_title("Throughput" + ("" if logged else ", evaluations included"))
    axes.set_ylabel("Sequences per second")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_ylim(bottom=0)
    _from_zero(axes, view, across)


def near_target(axes: Axes, view: View, theme: Theme) -> None:
    """The last part of the way to the target, enlarged."""
    low = close_up_from(view)
    _curves(axes, view, theme, SAMPLES, _evaluations("accuracy", SAMPLES))
    _targets(axes, view, theme)
    _target_points(axes, view, theme, SAMPLES)
    _references(axes, view, theme)
    axes.set_title("Close to the target")
    axes.set_ylabel(ACCURACY)
    points = [point for run in view.runs for point in run.evaluations]
    highest = max(*view.targets, *(point.accuracy for point in points))
    axes.set_ylim(low, highest + 0.08 * (highest - low))
    divisor = view.scale(SAMPLES).divisor
    near = [
        point.samples / divisor
        for point in points
        if point.samples is not None and point.accuracy >= low
    ]
    ends = [edge / divisor for each in view.drawn_references for edge in _band(each)]
    left, right = min([*near, *ends]), max([*near, *ends])
    margin = 0.06 * (right - left) or 0.06 * right
    axes.set_xlim(max(0, left - margin), right + margin)
    axes.set_xlabel(view.scale(SAMPLES).label)


def close_up_from(view: View) -> float | None:
    """The accuracy from which `near_target` shows; None where no run came so far."""
    points = [point for run in view.runs for point in run.evaluations]
    placed = [point.accuracy for point in points if point.samples is not None]
    if not placed:
        return None
    target = min(view.targets)
    low = target - NEAR_TARGET * max(target - min(point.accuracy for point in points), 0.02)
    return low if max(placed) >= low else None


def rows(axes: Axes, view: View, theme: Theme) -> None:
    """A bar a run: sequences to the target, or, hatched, those without reaching it.

    Over each bar lies the reference of its batch size and, from 3 runs, their mean.
    """
    scale = view.scale(SAMPLES)
    longest = max((run.train_samples or 0 for run in view.runs), default=0)
    ends = [_band(reference)[1] for reference in view.drawn_references]
    limit = 1.04 * max([longest, *ends, 1])
    named = len(view.runs) <= MAX_NAMED_ROWS
    place = {run: row for row, run in enumerate(view.runs)}
    for style in _styles(view, theme):
        for run in style.series.runs:
            _bar(axes, run, place[run], style, scale, limit if named else 0.0)
        mean = style.series.mean_samples
        if style.series.has_median and mean is not None:
            whose = f"{style.series.label}: " if len(view.series) > 1 else ""
            label = f"{whose}mean of {style.series.mean_of}: {mean:,.0f}"
            span = [place[run] for run in style.series.runs]
            axes.vlines(
                mean / scale.divisor, min(span) - 0.5, max(span) + 0.5, color=theme.text,
                linewidth=1.8, linestyle=(0, (4, 2)), label=label,
            )  # fmt: skip
    for reference, color in _reference_colors(view, theme):
        low, high = _band(reference)
        for run in reference.runs:
            axes.barh(place[run], (high - low) / scale.divisor, 1.0, low / scale.divisor,
                      color=color, alpha=0.25, linewidth=0, zorder=0.5)  # fmt: skip
        starts = [place[run] - 0.5 for run in reference.runs]
        middle = reference.point.mean_samples / scale.divisor
        axes.vlines([middle] * len(starts), starts, [start + 1 for start in starts],
                    color=theme.reference, linewidth=2.0, zorder=3)  # fmt: skip
    names = [run.name for run in view.runs]
    axes.set_yticks(range(len(names)) if named else [], names if named else [])
    spare = max(0, MIN_ROWS - len(names)) / 2
    axes.set_ylim(len(names) - 0.4 + spare, -0.6 - spare)
    axes.tick_params(axis="y", length=0, labelcolor=theme.text)
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, limit / scale.divisor)
    axes.set_xlabel(scale.label)
    axes.set_title("Sequences to the target")


def _bar(axes: Axes, run: Run, row: int, style: _Style, scale: Scale, limit: float) -> None:
    """One run's bar; limit: the axis' end in samples, 0 for no words on the bar."""
    theme, point = style.theme, run.target_point
    samples = (point.samples if point else run.train_samples) or 0
    look = {"color": style.color} if point else {"facecolor": "none", "hatch": "////"}
    width = samples / scale.divisor
    axes.barh(row, width, 0.66, edgecolor=style.color, linewidth=1.2, **look)
    if not limit:
        return
    text = f"{samples:,}"
    if point and point.seconds is not None:
        text += f" in {duration(point.seconds)}"
    elif not point:
        best = max((each.accuracy for each in run.evaluations), default=None)
        text += ", not reached" + (f" (best {best:.4f})" if best is not None else "")
    inside = point is not None and samples > 0.45 * limit
    place = limit * 0.012 / scale.divisor + (0 if inside or samples > 0.45 * limit else width)
    box = None if inside else {"facecolor": theme.background, "edgecolor": "none", "pad": 1.5}
    color = theme.background if inside else theme.text
    size = 9.5 if len(style.series.runs) < 16 else 7.5
    axes.text(place, row, text, color=color, fontsize=size, va="center", bbox=box, zorder=5)


def duration(seconds: float) -> str:
    """A time in words that are as short as its size allows."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 7200:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


@dataclass(frozen=True)
class _Style:
    """How one series is drawn."""

    series: Series
    theme: Theme
    number: int

    @property
    def color(self) -> str:
        return self.theme.series[self.number % len(self.theme.series)]

    @property
    def look(self) -> dict[str, object]:
        dashes = LINE_STYLES[self.number // len(self.theme.series) % len(LINE_STYLES)]
        return {"color": self.color, "linestyle": dashes}

    def line(self, axes: Axes, x: np.ndarray, y: np.ndarray) -> None:
        """One run's curve, points marked: thin where a median is drawn over it."""
        many = self.series.has_median
        label = f"{self.series.label}: each of {len(self.series.runs)} runs"
        mark = MARKERS[self.number % len(MARKERS)] if len(x) <= MAX_MARKED_POINTS else ""
        if many:
            look = {"linewidth": 1.1, "alpha": 0.5, "markersize": 2.2, "label": label}
        else:
            look = {"linewidth": 2.0, "markersize": 4.5, "label": self.series.label}
        axes.plot(x, y, **self.look, marker=mark, **look)


def _styles(view: View, theme: Theme) -> Iterator[_Style]:
    return (_Style(series, theme, number) for number, series in enumerate(view.series))


def _evaluations(figure: str, across: str) -> Callable[[Run], Curve]:
    return lambda run: curves.curve(run.evaluations, across, figure)


def _curves(
    axes: Axes,
    view: View,
    theme: Theme,
    across: str,
    curve_of: Callable[[Run], Curve],
    finished_count: bool = True,
) -> None:
    """A curve for every run, medians of series over them; see `curves.median`."""
    divisor = view.scale(across).divisor
    for style in _styles(view, theme):
        drawn = [curve_of(run) for run in style.series.runs]
        for curve in drawn:
            if len(curve):
                style.line(axes, curve.x / divisor, curve.y)
        if style.series.has_median:
            middle = curves.median(drawn, finished_count)
            label = f"{style.series.label}: median"
            wide = {"linewidth": 3.0, "zorder": 3.5}
            axes.plot(middle.x / divisor, middle.y, **style.look, **wide, label=label)


def _batches(axes: Axes, view: View, theme: Theme, across: str, figure: str) -> None:
    """Training batches behind the evaluations, where few runs are drawn."""
    if len(view.runs) > MAX_RUNS_WITH_TRAINING:
        return
    for style in _styles(view, theme):
        for run in style.series.runs:
            curve = curves.curve(run.training, across, figure)
            if len(curve):
                axes.plot(
                    curve.x / view.scale(across).divisor, curve.y, color=style.color,
                    linewidth=1.1, alpha=0.6, zorder=1.5,
                    label=f"{style.series.label}: single training batches",
                )  # fmt: skip


def _target_points(axes: Axes, view: View, theme: Theme, across: str) -> None:
    """A ring where a run met its target; of many runs, the names of those that did not."""
    divisor = view.scale(across).divisor
    missed = [run for run in view.runs if run.target_point is None and run.evaluations]
    for style in _styles(view, theme):
        for run in style.series.runs:
            point = run.target_point or (run.evaluations[-1] if run.evaluations else None)
            if point is None or getattr(point, across) is None:
                continue
            place = (getattr(point, across) / divisor, point.accuracy)
            if run.target_point is not None:
                size = 6 if style.series.has_median else 8
                ring = {"markerfacecolor": theme.background, "markeredgecolor": style.color}
                axes.plot(*place, "o", markersize=size, markeredgewidth=1.8, zorder=4, **ring)
            elif style.series.has_median and len(missed) <= MAX_NAMED_MISSES:
                axes.annotate(
                    run.name, place, xytext=(0, -13), textcoords="offset points", ha="right",
                    fontsize=9, color=style.color,
                )  # fmt: skip


def _targets(axes: Axes, view: View, theme: Theme) -> None:
    for target in view.targets:
        axes.axhline(target, color=theme.target, linewidth=1.2, linestyle=(0, (5, 3)), zorder=2)
        axes.annotate(
            f"target {target:g}", (0.0, target), xycoords=("axes fraction", "data"),
            xytext=(6, 4), textcoords="offset points", fontsize=10.5, color=theme.target,
        )  # fmt: skip


def _band(reference: Reference) -> tuple[float, float]:
    """One standard deviation to either side of the reference's mean, in samples."""
    point = reference.point
    return (
        point.mean_samples - point.standard_deviation,
        point.mean_samples + point.standard_deviation,
    )


def _reference_colors(view: View, theme: Theme) -> list[tuple[Reference, str]]:
    """Grey for a single reference; of several, each takes the colour of its runs."""
    drawn = view.drawn_references
    if len(drawn) == 1:
        return [(drawn[0], theme.reference)]
    color = {run: style.color for style in _styles(view, theme) for run in style.series.runs}
    return [(reference, color[reference.runs[0]]) for reference in drawn]


def _references(axes: Axes, view: View, theme: Theme) -> None:
    divisor = view.scale(SAMPLES).divisor
    for reference, color in _reference_colors(view, theme):
        point, (low, high) = reference.point, _band(reference)
        label = (
            f"Reference (RCP {point.ruleset}), batch {point.global_batch_size:,}: "
            f"{point.mean_samples:,.0f} \u00b1 {point.standard_deviation:,.0f} (standard deviation)"
        )
        axes.axvspan(low / divisor, high / divisor, color=color, alpha=0.2, linewidth=0,
                     zorder=0.5, label=label)  # fmt: skip
        axes.axvline(point.mean_samples / divisor, color=color, linewidth=2.0, zorder=1,
                     label=label)  # fmt: skip


def _why_no_reference(axes: Axes, view: View, theme: Theme) -> None:
    """In the corner that a learning curve leaves free."""
    reasons = [reference.reason for reference in view.references if reference.point is None]
    if not reasons:
        return
    shown = reasons[0] if len(reasons) == 1 else f"{reasons[0]} (and {len(reasons) - 1} more)"
    text = f"No reference convergence point: {shown}"
    lines = math.ceil(len(text) / CORNER_CHARACTERS)
    text = textwrap.fill(text, math.ceil(len(text) / lines) + 6)  # no last line of one word
    axes.text(0.985, 0.03, text, transform=axes.transAxes, ha="right", va="bottom",
              fontsize=9.5, color=theme.muted, linespacing=1.35)  # fmt: skip


def _from_zero(axes: Axes, view: View, across: str) -> None:
    scale = view.scale(across)
    axes.set_xlim(left=0)
    axes.set_xlabel(scale.label)
