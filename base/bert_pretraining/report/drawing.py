"""The elements of panels, drawn on matplotlib axes: curves, targets, references."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bert_pretraining.logs.reading.runs import Run
from bert_pretraining.report import curves
from bert_pretraining.report.compare import Reference, Series
from bert_pretraining.report.curves import SAMPLES, Curve
from bert_pretraining.report.style import LINE_STYLES, MARKERS, Theme
from bert_pretraining.report.view import View, band, shortened

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

MAX_NAMED_MISSES = 3
CORNER_CHARACTERS = 44
MAX_MARKED_POINTS = 80
MAX_RUNS_WITH_TRAINING = 2  # with more runs, the curves of batches would hide the evaluations


@dataclass(frozen=True)
class SeriesStyle:
    """How one series is drawn."""

    series: Series
    theme: Theme
    number: int

    @property
    def label(self) -> str:
        # matplotlib leaves labels that begin with an underscore out of legends.
        text = shortened(self.series.label)
        return f" {text}" if text.startswith("_") else text

    @property
    def color(self) -> str:
        return self.theme.series[self.number % len(self.theme.series)]

    @property
    def look(self) -> dict[str, object]:
        dashes = LINE_STYLES[self.number // len(self.theme.series) % len(LINE_STYLES)]
        return {"color": self.color, "linestyle": dashes}

    def line(self, axes: Axes, x: np.ndarray, y: np.ndarray) -> None:
        """Draw one run's curve with its points; thin if a median is drawn over it."""
        mark = MARKERS[self.number % len(MARKERS)] if len(x) <= MAX_MARKED_POINTS else ""
        if self.series.has_median:
            look = {"linewidth": 1.1, "alpha": 0.5, "markersize": 2.2}
        else:
            look = {"linewidth": 2.0, "markersize": 4.5, "label": self.label}
        axes.plot(x, y, **self.look, marker=mark, **look)


def styles(view: View, theme: Theme) -> Iterator[SeriesStyle]:
    return (SeriesStyle(series, theme, number) for number, series in enumerate(view.series))


def evaluations(figure: str, across: str) -> Callable[[Run], Curve]:
    """One figure of a run's evaluations."""
    return lambda run: curves.curve(run.evaluations, across, figure)


def batches(figure: str, across: str) -> Callable[[Run], Curve]:
    """One figure of a run's training batches."""
    return lambda run: curves.curve(run.training, across, figure)


def draw_curves(
    axes: Axes,
    view: View,
    theme: Theme,
    across: str,
    curve_of: Callable[[Run], Curve],
    finished_count: bool = True,
) -> None:
    """Draw a curve for every run, and the medians of series over them; see `curves.median`."""
    divisor = view.scale(across).divisor
    for style in styles(view, theme):
        drawn = [curve_of(run) for run in style.series.runs]
        for curve in drawn:
            if len(curve):
                style.line(axes, curve.x / divisor, curve.y)
        if style.series.has_median:
            middle = curves.median(drawn, finished_count)
            label = f"{style.label}: {len(drawn)} runs (thin), median (wide)"
            wide = {"linewidth": 3.0, "zorder": 3.5}
            axes.plot(middle.x / divisor, middle.y, **style.look, **wide, label=label)


def shows_batches(view: View) -> bool:
    """Whether training batches are drawn too, which is done only for few runs."""
    return len(view.runs) <= MAX_RUNS_WITH_TRAINING


def draw_batches(axes: Axes, view: View, theme: Theme, across: str, figure: str) -> None:
    """Draw training batches behind the evaluations, if there are few runs."""
    if not shows_batches(view):
        return
    for style in styles(view, theme):
        for run in style.series.runs:
            curve = batches(figure, across)(run)
            if len(curve):
                axes.plot(
                    curve.x / view.scale(across).divisor, curve.y, color=style.color,
                    linewidth=1.1, alpha=0.6, zorder=1.5,
                    label=f"{style.label}: single training batches",
                )  # fmt: skip


def draw_target_points(axes: Axes, view: View, theme: Theme, across: str) -> None:
    """Draw a ring where a run reached its target; with many runs, name those that did not."""
    divisor = view.scale(across).divisor
    missed = [run for run in view.runs if run.target_point is None and run.evaluations]
    names_fit = len(view.series) == 1 and len(missed) <= MAX_NAMED_MISSES
    for style in styles(view, theme):
        for run in style.series.runs:
            point = run.target_point or (run.evaluations[-1] if run.evaluations else None)
            if point is None or getattr(point, across) is None:
                continue
            place = (getattr(point, across) / divisor, point.accuracy)
            if run.target_point is not None:
                size = 6 if style.series.has_median else 8
                ring = {"markerfacecolor": theme.background, "markeredgecolor": style.color}
                axes.plot(
                    *place,
                    "o",
                    markersize=size,
                    markeredgewidth=1.8,
                    zorder=4,
                    clip_on=False,
                    **ring,
                )
            elif style.series.has_median and names_fit:
                axes.annotate(
                    shortened(run.name), place, xytext=(0, -13), textcoords="offset points",
                    ha="right", fontsize=9, color=style.color,
                )  # fmt: skip


def draw_targets(axes: Axes, view: View, theme: Theme) -> None:
    for target in view.targets:
        axes.axhline(target, color=theme.target, linewidth=1.2, linestyle=(0, (5, 3)), zorder=2)
        axes.annotate(
            f"target {target:g}", (0.0, target), xycoords=("axes fraction", "data"),
            xytext=(6, 4), textcoords="offset points", fontsize=10.5, color=theme.target,
        )  # fmt: skip


def draw_baselines(axes: Axes, view: View, theme: Theme) -> None:
    """Draw what always guessing the commonest token would score."""
    for share in view.baselines:
        axes.axhline(share, color=theme.muted, linewidth=1.2, linestyle=(0, (1, 2)), zorder=2)
        axes.annotate(
            f"commonest token {share:g}", (0.0, share), xycoords=("axes fraction", "data"),
            xytext=(6, 4), textcoords="offset points", fontsize=10.5, color=theme.muted,
        )  # fmt: skip


def reference_colors(view: View, theme: Theme) -> list[tuple[Reference, str]]:
    """Grey for a single reference; with several, each has the colour of its runs."""
    drawn = view.drawn_references
    if len(drawn) == 1:
        return [(drawn[0], theme.reference)]
    color = {run: style.color for style in styles(view, theme) for run in style.series.runs}
    return [(reference, color[reference.runs[0]]) for reference in drawn]


def draw_references(axes: Axes, view: View, theme: Theme) -> None:
    divisor = view.scale(SAMPLES).divisor
    for reference, color in reference_colors(view, theme):
        point, (low, high) = reference.point, band(reference)
        label = (
            f"Reference (RCP {point.ruleset}), batch {point.global_batch_size:,}: "
            f"{point.mean_samples:,.0f} \u00b1 {point.standard_deviation:,.0f} (standard deviation)"
        )
        axes.axvspan(low / divisor, high / divisor, color=color, alpha=0.2, linewidth=0,
                     zorder=0.5, label=label)  # fmt: skip
        axes.axvline(point.mean_samples / divisor, color=color, linewidth=2.0, zorder=1,
                     label=label)  # fmt: skip


def say_why_no_reference(axes: Axes, view: View, theme: Theme) -> None:
    """Print the reason in the corner that learning curves leave free."""
    reasons = [reference.reason for reference in view.references if reference.point is None]
    if not reasons:
        return
    shown = reasons[0] if len(reasons) == 1 else f"{reasons[0]} (and {len(reasons) - 1} more)"
    text = f"No reference convergence point: {shown}"
    lines = math.ceil(len(text) / CORNER_CHARACTERS)
    text = textwrap.fill(text, math.ceil(len(text) / lines) + 6)  # no last line of one word
    bottom = 0.08 if view.baselines else 0.03
    axes.text(0.985, bottom, text, transform=axes.transAxes, ha="right", va="bottom",
              fontsize=9.5, color=theme.muted, linespacing=1.35)  # fmt: skip


def from_zero(axes: Axes, view: View, across: str) -> None:
    scale = view.scale(across)
    axes.set_xlim(left=0)
    axes.set_xlabel(scale.label)
