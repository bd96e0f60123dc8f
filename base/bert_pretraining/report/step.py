"""Pictures of what a step took: its seconds by part, the ranks' seconds, the loss scale.

A single run is drawn over its time; of several runs each has a bar.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from bert_pretraining.logs.reading.runs import Run
from bert_pretraining.logs.sinks import PARTS, Speed
from bert_pretraining.report import curves, drawing, panels, speeds
from bert_pretraining.report.curves import SAMPLES, Curve
from bert_pretraining.report.panels import MAX_NAMED_ROWS
from bert_pretraining.report.picture import Panel, Picture
from bert_pretraining.report.style import Theme
from bert_pretraining.report.view import View

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PART_NAMES = {
    "data": "waiting for data",
    "forward_backward": "forward and backward",
    "reduction": "waiting for other ranks' gradients",
    "optimizer": "optimizer",
    "other": "other",
}
RANK_COLOR = len(PARTS)  # of the theme's colours, the first that no part has
# A first step that takes longer than the others by this is not drawn in full height.
FIRST_STEP = 1.5
# The lowest line at a loss scale that differs by less would be the axis itself.
LEAST_FACTOR = 4


def pictures(view: View) -> list[Picture]:
    """The pictures for which these runs have data."""
    made = []
    timed = [run for run in view.runs if speeds.part_seconds(run)]
    ranked = [run for run in view.runs if speeds.has_ranks(run)]
    found: list[Panel] = []
    if timed:
        bars = functools.partial(_part_bars, runs=timed)
        found.append(_parts if _over_time(view, _has_parts) else bars)
    if ranked:
        bars = functools.partial(_rank_bars, runs=ranked)
        found.append(_ranks if _over_time(view, _has_ranks) else bars)
    if found:
        caption = "The seconds of a step by what they were spent on, as the mean over the ranks."
        if ranked:
            caption += (
                " A rank's own work is waiting for data, forward and backward, and the optimizer; "
                "all ranks wait for the slowest."
            )
        size = panels.inches_of_rows(len(view.runs))
        made.append(Picture("step", "Where a step's time goes", caption, tuple(found), size))
    if any(_is_scaled(run) for run in view.runs):
        caption = (
            "What losses are multiplied by; a dynamic scale halves where a gradient overflows."
        )
        made.append(Picture("loss_scale", "Loss scale", caption, (loss_scale,)))
    return made


def _is_scaled(run: Run) -> bool:
    """Whether losses were multiplied by anything but 1."""
    return bool({point.loss_scale for point in run.training} - {None, 1.0})


def loss_scale(axes: Axes, view: View, theme: Theme) -> None:
    """The loss scale against samples, by powers of 2."""

    def scale(run: Run) -> Curve:
        return curves.curve(run.training, SAMPLES, "loss_scale")

    drawing.draw_curves(axes, view, theme, SAMPLES, scale, finished_count=False)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}" if value < 1 else f"{value:,.0f}")
    axes.set_title("Loss scale")
    axes.set_ylabel("Loss scale")
    low, high = axes.get_ylim()
    if low > 0 and high < LEAST_FACTOR * low:
        axes.set_ylim(low / 2, high * 2)
    drawing.from_zero(axes, view, SAMPLES)


def _has_parts(speed: Speed) -> bool:
    return speed.seconds is not None


def _has_ranks(speed: Speed) -> bool:
    return None not in (speed.slowest, speed.fastest)


def _over_time(view: View, has: Callable[[Speed], bool]) -> list[tuple[float, Speed]]:
    """Of a single run: the points that have a figure, with their places on the axis of time.

    A point is of the steps since the one before, so the first one is there twice: as its own
    beginning, too. Of several runs, or without such points: [].
    """
    if len(view.runs) > 1:
        return []
    points = [(getattr(point, view.clock), point.speed) for point in view.runs[0].training]
    divisor = view.scale(view.clock).divisor
    known = [(x / divisor, speed) for x, speed in points if x is not None and speed is not None]
    known = [(x, speed) for x, speed in known if has(speed)]
    return [(0.0, known[0][1]), *known] if known else []


def _usual(values: Sequence[float]) -> tuple[float, str]:
    """The highest value that is drawn in full, and what the title says where that is not all."""
    first, rest = values[0], max(values[2:], default=values[0])
    if first <= FIRST_STEP * rest:
        return max(values), ""
    unit, name = unit_of(first)
    return rest, f" (the first, {first * unit:.3g} {name}, is cut off)"


def _parts(axes: Axes, view: View, theme: Theme) -> None:
    """One run's seconds of a step by part, stacked, over its time."""
    points = _over_time(view, _has_parts)
    highest, cut = _usual([sum(speed.seconds.values()) for _, speed in points])
    unit, name = unit_of(highest)
    axes.stackplot(
        [x for x, _ in points],
        [[speed.seconds[part] * unit for _, speed in points] for part in PARTS],
        labels=[PART_NAMES[part] for part in PARTS],
        colors=theme.series[: len(PARTS)],
        linewidth=0,
        step="pre",
    )
    axes.set_title(f"A step by part{cut}")
    axes.set_ylabel(f"Time of a step ({name})")
    axes.set_ylim(0, 1.08 * unit * highest or 1)
    drawing.from_zero(axes, view, view.clock)


def _ranks(axes: Axes, view: View, theme: Theme) -> None:
    """One run's fastest, median and slowest rank over its time."""
    points = _over_time(view, _has_ranks)
    highest, cut = _usual([speed.slowest.seconds for _, speed in points])
    unit, name = unit_of(highest)
    x = [place for place, _ in points]
    low = [speed.fastest.seconds * unit for _, speed in points]
    high = [speed.slowest.seconds * unit for _, speed in points]
    middle = [(speed.median_seconds or math.nan) * unit for _, speed in points]
    color = theme.series[RANK_COLOR]
    axes.fill_between(x, low, high, color=color, alpha=0.25, linewidth=0, step="pre")
    rank = speeds.slowest_rank([speed for _, speed in points[1:]])
    for values, look, label in (
        (high, "-", f"slowest rank (most often rank {rank})"),
        (middle, (0, (6, 2)), "median rank"),
        (low, (0, (1, 1.2)), "fastest rank"),
    ):
        axes.plot(x, values, color=color, linestyle=look, linewidth=1.6, label=label,
                  drawstyle="steps-pre")  # fmt: skip
    axes.set_ylim(0, 1.08 * unit * highest or 1)
    axes.set_title(f"Own work of the ranks{cut}")
    axes.set_ylabel(f"Time of a step ({name})")
    drawing.from_zero(axes, view, view.clock)


def _part_bars(axes: Axes, view: View, theme: Theme, runs: Sequence[Run]) -> None:
    """A bar for each run: the seconds of a step by part."""
    found = [speeds.part_seconds(run) for run in runs]
    totals = [sum(each.values()) for each in found]
    unit, name = unit_of(max(totals))
    left = [0.0] * len(runs)
    for part, color in zip(PARTS, theme.series, strict=False):
        widths = [each[part] * unit for each in found]
        axes.barh(range(len(runs)), widths, 0.66, left, color=color, label=PART_NAMES[part])
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, total in enumerate(totals):
        if len(runs) <= MAX_NAMED_ROWS:
            axes.text(1.015, row, f"{total * unit:.3g} {name}", va="center", fontsize=9.5,
                      transform=axes.get_yaxis_transform())  # fmt: skip
    axes.set_xlim(0, 1.04 * max(left) or 1)
    axes.set_title("A step by part")
    axes.set_xlabel(f"Time of a step ({name})")
    panels.name_rows(axes, runs, theme)


def _rank_bars(axes: Axes, view: View, theme: Theme, runs: Sequence[Run]) -> None:
    """For each run a bar from its fastest to its slowest rank, and a mark at the median."""
    ends = [
        (
            speeds.typical(run, lambda speed: speed.fastest and speed.fastest.seconds),
            speeds.typical(run, lambda speed: speed.median_seconds),
            speeds.typical(run, lambda speed: speed.slowest and speed.slowest.seconds),
        )
        for run in runs
    ]
    unit, name = unit_of(max(high for _, _, high in ends))
    for row, (run, (low, middle, high)) in enumerate(zip(runs, ends, strict=True)):
        axes.barh(row, (high - low) * unit, 0.4, low * unit, color=theme.series[RANK_COLOR],
                  label="fastest to slowest rank")  # fmt: skip
        if middle is not None:
            look = {"color": theme.background, "markeredgecolor": theme.text, "linestyle": "none"}
            axes.plot(middle * unit, row, "o", markersize=5, label="median rank", **look)
        if len(runs) <= MAX_NAMED_ROWS:
            text = f"slowest: {speeds.slowest_rank(speeds.speeds(run))}"
            axes.text(1.015, row, text, va="center", fontsize=9.5,
                      transform=axes.get_yaxis_transform())  # fmt: skip
    axes.set_xlim(0, 1.06 * unit * max(high for _, _, high in ends))
    axes.set_title("Own work of the ranks")
    axes.set_xlabel(f"Time of a step ({name})")
    panels.name_rows(axes, runs, theme)


def unit_of(seconds: float) -> tuple[float, str]:
    """What seconds are multiplied by, and the unit."""
    return (1000.0, "ms") if seconds < 1 else (1.0, "s")
