"""The report's pictures: which ones the runs give, and a picture as PNG bytes."""

from __future__ import annotations

import functools
import io
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bert_pretraining.errors import UserError
from bert_pretraining.report import curves, panels
from bert_pretraining.report.curves import SAMPLES, SECONDS
from bert_pretraining.report.panels import MAX_NAMED_ROWS
from bert_pretraining.report.style import DOTS_PER_INCH, FIGURE_INCHES, Theme, settings
from bert_pretraining.report.view import View, close_up_from

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROW_INCHES = 0.26  # height of the bar of a run with a name
LEGEND_CHARACTERS = 136  # a line of the legend
LEGEND_GAP_CHARACTERS = 8  # line and space beside each entry
LEGEND_LINE_INCHES = 0.23

Panel = Callable[["Axes", View, Theme], None]


@dataclass(frozen=True)
class Picture:
    """A picture that is not drawn yet: file name, heading and caption on the page, panels."""

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]
    inches: tuple[float, float] = FIGURE_INCHES


def require_matplotlib() -> None:
    """Raise UserError if matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UserError(
            "the report's pictures need matplotlib",
            f"install it: {sys.executable} -m pip install matplotlib",
        ) from error


def pictures(view: View) -> list[Picture]:
    """The pictures for which these runs have data."""
    made = []
    axes = [
        name
        for name in (SAMPLES, SECONDS)
        if any(getattr(point, name) is not None for point in _points(view))
    ]

    def both(panel: Callable, figure: str) -> tuple[Panel, ...]:
        has = any(getattr(point, figure, None) is not None for point in _points(view))
        return tuple(functools.partial(panel, across=name) for name in axes) if has else ()

    accuracy = both(panels.accuracy, "accuracy")
    if accuracy:
        caption = "MLM accuracy on the evaluation set. A ring marks where a run met its target."
        made.append(Picture("accuracy", "Accuracy", caption, accuracy))
        made += _to_target(view)
    loss = both(panels.loss, "loss")
    if loss:
        caption = "Loss of masked words and next sentences together."
        made.append(Picture("loss", "Loss", caption, loss))
    training: list[Panel] = []
    if any(point.learning_rate is not None for run in view.runs for point in run.training):
        training.append(panels.learning_rate)
    clock = SECONDS if SECONDS in axes else SAMPLES
    if any(len(curves.throughput(run, clock)[0]) for run in view.runs):
        training.append(functools.partial(panels.throughput, across=clock))
    if training:
        caption = "What the optimizer was given, and how fast sequences went through."
        made.append(Picture("training", "Learning rate and throughput", caption, tuple(training)))
    return made


def _to_target(view: View) -> list[Picture]:
    """No picture for a single run without a reference, which has nothing to compare with."""
    if len(view.runs) == 1 and not view.drawn_references:
        return []
    close = [panels.near_target] if close_up_from(view) is not None else []
    height = max(FIGURE_INCHES[1], 1.7 + ROW_INCHES * min(len(view.runs), MAX_NAMED_ROWS))
    caption = "The end of the way, and how many sequences each run took."
    if view.drawn_references:
        caption += " Band and line: the reference's mean, one standard deviation either way."
    size = (FIGURE_INCHES[0], height)
    return [Picture("target", "To the target", caption, (*close, panels.rows), size)]


def png(picture: Picture, view: View, theme: Theme) -> bytes:
    """Draw a picture."""
    from matplotlib import rc_context
    from PIL import Image

    drawn, small = io.BytesIO(), io.BytesIO()
    with rc_context(settings(theme)):
        figure(picture, view, theme).savefig(drawn, format="png")
    # 256 colours are enough for lines, and need a third of the bytes.
    image = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    image.save(small, "PNG", optimize=True)
    return small.getvalue()


def figure(picture: Picture, view: View, theme: Theme) -> Figure:
    """A picture as matplotlib's figure, with the current settings."""
    from matplotlib.figure import Figure

    made = Figure(picture.inches, dpi=DOTS_PER_INCH, layout="constrained")
    made.get_layout_engine().set(w_pad=0.14, h_pad=0.1, wspace=0.05)
    places = made.subplots(1, len(picture.panels), squeeze=False)[0]
    for panel, axes in zip(picture.panels, places, strict=True):
        panel(axes, view, theme)
    _legend(made)
    return made


def _points(view: View) -> list:
    return [point for run in view.runs for point in (*run.evaluations, *run.training)]


def _legend(figure: Figure) -> None:
    """Draw one legend below all panels, where it covers no curve; the figure gets higher.

    Line and band of one label are one entry, as are all lines of one label.
    """
    entries: dict[str, dict[type, object]] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, {}).setdefault(type(handle), handle)
    if not entries:
        return
    columns, lines = _columns([len(label) for label in entries])
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + LEGEND_LINE_INCHES * (lines + 1))
    figure.legend(
        [tuple(kinds.values()) for kinds in entries.values()], list(entries),
        loc="outside lower center",
        ncols=columns, handlelength=2.4, columnspacing=2.2,
    )  # fmt: skip


def _columns(lengths: list[int]) -> tuple[int, int]:
    """As many columns as a line of the legend holds, and the lines: entries run downwards."""
    for columns in range(len(lengths), 1, -1):
        lines = math.ceil(len(lengths) / columns)
        widest = [max(lengths[start : start + lines]) for start in range(0, len(lengths), lines)]
        if sum(widest) + LEGEND_GAP_CHARACTERS * len(widest) <= LEGEND_CHARACTERS:
            return len(widest), lines
    return 1, len(lengths)
