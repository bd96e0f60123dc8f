"""The panels: each function draws one on the given matplotlib axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from bert_pretraining.logs.reading.runs import Run
from bert_pretraining.report import curves, drawing
from bert_pretraining.report.curves import SAMPLES, Curve, Scale
from bert_pretraining.report.drawing import SeriesStyle
from bert_pretraining.report.style import FIGURE_INCHES, Theme
from bert_pretraining.report.view import View, band, close_up_from, duration, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_NAMED_ROWS = 30
ROW_INCHES = 0.26  # height of the bar of a run with a name
MIN_ROWS = 5  # so that the bar of a single run is not too thick
LINEAR_RATIO = 20
ACCURACY = "MLM accuracy"


def accuracy(axes: Axes, view: View, theme: Theme, across: str) -> None:
    """Masked-token accuracy; against samples with the reference convergence points."""
    drawing.draw_curves(axes, view, theme, across, drawing.evaluations("accuracy", across))
    drawing.draw_batches(axes, view, theme, across, "mlm_accuracy")
    drawing.draw_targets(axes, view, theme)
    drawing.draw_baselines(axes, view, theme)
    drawing.draw_target_points(axes, view, theme, across)
    axes.set_title("MLM accuracy by " + ("sequences" if across == SAMPLES else "time"))
    axes.set_ylabel(ACCURACY)
    axes.set_ylim(_accuracy_limits(view))  # the same in both panels, so that they can be compared
    if across == SAMPLES:
        drawing.draw_references(axes, view, theme)
        drawing.say_why_no_reference(axes, view, theme)
    drawing.from_zero(axes, view, across)


def _accuracy_limits(view: View) -> tuple[float, float]:
    values = [point.accuracy for run in view.runs for point in run.evaluations]
    values += view.targets + view.baselines
    if drawing.shows_batches(view):
        values += [
            point.mlm_accuracy
            for run in view.runs
            for point in run.training
            if point.mlm_accuracy is not None
        ]
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.05
    return low - margin, high + margin


def loss(axes: Axes, view: View, theme: Theme, across: str) -> None:
    """Loss (MLM + NSP, nats) of evaluations, and behind it of training batches.

    Where no log has an evaluation's loss, that of training batches is all there is.
    """
    evaluated = any(point.loss is not None for run in view.runs for point in run.evaluations)
    if evaluated:
        drawing.draw_curves(axes, view, theme, across, drawing.evaluations("loss", across))
        drawing.draw_batches(axes, view, theme, across, "loss")
    else:
        drawing.draw_curves(axes, view, theme, across, drawing.batches("loss", across))
    what = "Loss" if evaluated else "Loss of training batches"
    axes.set_title(f"{what} by " + ("sequences" if across == SAMPLES else "time"))
    axes.set_ylabel("Loss, MLM + NSP (nats)")
    drawing.from_zero(axes, view, across)


def learning_rate(axes: Axes, view: View, theme: Theme) -> None:
    """Learning rate against samples; a small one in units of a power of ten."""
    rates = [point.learning_rate or 0.0 for run in view.runs for point in run.training]
    exponent = math.floor(math.log10(max([*rates, 1e-30])))
    unit, label = (10.0**exponent, f" (1e{exponent})") if not -3 < exponent < 3 else (1.0, "")

    def rate(run: Run) -> Curve:
        found = curves.curve(run.training, SAMPLES, "learning_rate")
        return Curve(found.x, found.y / unit)

    drawing.draw_curves(axes, view, theme, SAMPLES, rate, finished_count=False)
    axes.set_title("Learning rate")
    axes.set_ylabel(f"Learning rate{label}")
    axes.set_ylim(0, 1.04 * axes.get_ylim()[1])
    drawing.from_zero(axes, view, SAMPLES)


def throughput(axes: Axes, view: View, theme: Theme, across: str) -> None:
    """Sequences a second, from zero, so that heights can be compared.

    Logarithmic where runs differ so much that the slow ones would lie on the axis.
    """
    found = {run: curves.throughput(run, across) for run in view.runs}
    drawing.draw_curves(axes, view, theme, across, lambda run: found[run][0], finished_count=False)
    typical = [float(np.median(curve.y)) for curve, _ in found.values() if len(curve)]
    scale = ""
    if max(typical) > LINEAR_RATIO * min(typical) > 0:
        scale = ", logarithmic"
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.04 * axes.get_ylim()[1])
    logged = any(in_log for _, in_log in found.values())
    axes.set_title("Throughput" + ("" if logged else ", evaluations included") + scale)
    axes.set_ylabel("Sequences per second")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    drawing.from_zero(axes, view, across)


def near_target(axes: Axes, view: View, theme: Theme) -> None:
    """The last part of the curves before the target, enlarged."""
    low = close_up_from(view)
    drawing.draw_curves(axes, view, theme, SAMPLES, drawing.evaluations("accuracy", SAMPLES))
    drawing.draw_targets(axes, view, theme)
    drawing.draw_target_points(axes, view, theme, SAMPLES)
    drawing.draw_references(axes, view, theme)
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
    ends = [edge / divisor for each in view.drawn_references for edge in band(each)]
    left, right = min([*near, *ends]), max([*near, *ends])
    margin = 0.06 * (right - left) or 0.06 * right
    axes.set_xlim(max(0, left - margin), right + margin)
    axes.set_xlabel(view.scale(SAMPLES).label)


def rows(axes: Axes, view: View, theme: Theme) -> None:
    """One bar for each run: its sequences to the target; hatched if it did not reach it.

    Over each bar lies the reference of its batch size and, from 3 runs, their mean.
    """
    scale = view.scale(SAMPLES)
    longest = max((run.train_samples or 0 for run in view.runs), default=0)
    ends = [band(reference)[1] for reference in view.drawn_references]
    limit = 1.04 * max([longest, *ends, 1])
    named = len(view.runs) <= MAX_NAMED_ROWS
    place = {run: row for row, run in enumerate(view.runs)}
    for style in drawing.styles(view, theme):
        for run in style.series.runs:
            _bar(axes, run, place[run], style, scale, named)
        mean = style.series.mean_samples
        if style.series.has_median and mean is not None:
            whose = f"{style.label}: " if len(view.series) > 1 else ""
            label = f"{whose}mean of {style.series.mean_of}: {mean:,.0f}"
            span = [place[run] for run in style.series.runs]
            axes.vlines(
                mean / scale.divisor, min(span) - 0.5, max(span) + 0.5, color=theme.text,
                linewidth=1.8, linestyle=(0, (4, 2)), label=label,
            )  # fmt: skip
    for reference, color in drawing.reference_colors(view, theme):
        low, high = band(reference)
        for run in reference.runs:
            axes.barh(place[run], (high - low) / scale.divisor, 1.0, low / scale.divisor,
                      color=color, alpha=0.25, linewidth=0, zorder=0.5)  # fmt: skip
        starts = [place[run] - 0.5 for run in reference.runs]
        middle = reference.point.mean_samples / scale.divisor
        axes.vlines([middle] * len(starts), starts, [start + 1 for start in starts],
                    color=theme.reference, linewidth=2.0, zorder=3)  # fmt: skip
    name_rows(axes, view.runs, theme)
    axes.set_xlim(0, limit / scale.divisor)
    axes.set_xlabel(scale.label)
    axes.set_title("Sequences to the target")


def inches_of_rows(count: int) -> tuple[float, float]:
    """Size of a picture with a row for each of so many runs."""
    width, height = FIGURE_INCHES
    return width, max(height, 1.7 + ROW_INCHES * min(count, MAX_NAMED_ROWS))


def name_rows(axes: Axes, runs: Sequence[Run], theme: Theme) -> None:
    """The runs' names on the vertical axis, from above; none where there are too many."""
    names = [shortened(run.name) for run in runs] if len(runs) <= MAX_NAMED_ROWS else []
    axes.set_yticks(range(len(names)), names)
    spare = max(0, MIN_ROWS - len(runs)) / 2
    axes.set_ylim(len(runs) - 0.4 + spare, -0.6 - spare)
    axes.tick_params(axis="y", length=0, labelcolor=theme.text)
    axes.grid(visible=False, axis="y")


def _bar(axes: Axes, run: Run, row: int, style: SeriesStyle, scale: Scale, named: bool) -> None:
    """One run's bar, and beside the axes its figures."""
    point = run.target_point
    samples = point.samples if point else run.train_samples
    look = {"color": style.color} if point else {"facecolor": "none", "hatch": "////"}
    width = (samples or 0) / scale.divisor
    axes.barh(row, width, 0.66, edgecolor=style.color, linewidth=1.2, **look)
    if not named:
        return
    text = "-" if samples is None else f"{samples:,}"
    if point is None:
        best = max((each.accuracy for each in run.evaluations), default=None)
        text += ", not reached" if best is None else f", best {best:.4f}"
    elif point.seconds is not None:
        text += f" in {duration(point.seconds)}"
    place = axes.get_yaxis_transform()
    axes.text(1.015, row, text, transform=place, va="center", fontsize=9.5)
