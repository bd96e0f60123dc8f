"""The report's pictures: which ones the runs give, and a picture as PNG bytes."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bert_pretraining.errors import UserError
from bert_pretraining.report import curves, panels, power, step
from bert_pretraining.report.curves import SAMPLES, SECONDS
from bert_pretraining.report.picture import Panel, Picture
from bert_pretraining.report.style import DOTS_PER_INCH, Theme, settings
from bert_pretraining.report.view import View, close_up_from
from bert_pretraining.runtime import packages

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEGEND_CHARACTERS = 136  # a line of the legend
LEGEND_GAP_CHARACTERS = 8  # line and space beside each entry
LEGEND_LINE_INCHES = 0.23


def require_matplotlib() -> None:
    """Raise UserError if matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UserError(
            "pictures need matplotlib",
            f"install it: {packages.how_to_install(['matplotlib'])}",
        ) from error


def pictures(view: View) -> list[Picture]:
    """The pictures for which these runs have data, in the order of the page.

    A new kind of picture is a function from the view to its pictures, with its place here.
    """
    makers = (_accuracy, _to_target, _loss, _training, step.pictures, power.pictures)
    return [picture for make in makers for picture in make(view)]


def _accuracy(view: View) -> list[Picture]:
    found = _by_both(view, panels.accuracy, "accuracy")
    caption = "MLM accuracy on the evaluation set. A ring marks where a run met its target."
    return [Picture("accuracy", "Accuracy", caption, found)] if found else []


def _loss(view: View) -> list[Picture]:
    found = _by_both(view, panels.loss, "loss")
    caption = "Loss of masked words and next sentences together."
    return [Picture("loss", "Loss", caption, found)] if found else []


def _training(view: View) -> list[Picture]:
    found: list[Panel] = []
    if any(point.learning_rate is not None for run in view.runs for point in run.training):
        found.append(panels.learning_rate)
    if any(len(curves.throughput(run, view.clock)[0]) for run in view.runs):
        found.append(functools.partial(panels.throughput, across=view.clock))
    caption = "What the optimizer was given, and how fast sequences went through."
    title = "Learning rate and throughput"
    return [Picture("training", title, caption, tuple(found))] if found else []


def _by_both(view: View, panel: Callable, figure: str) -> tuple[Panel, ...]:
    """The panel by sequences and by time, as far as these are known; () without that figure."""
    has = any(getattr(point, figure, None) is not None for point in view.points)
    axes = [name for name in (SAMPLES, SECONDS) if view.knows(name)]
    return tuple(functools.partial(panel, across=name) for name in axes) if has else ()


def _to_target(view: View) -> list[Picture]:
    """No picture for a single run without a reference, which has nothing to compare with."""
    if not any(run.evaluations for run in view.runs) or (
        len(view.runs) == 1 and not view.drawn_references
    ):
        return []
    close = [panels.near_target] if close_up_from(view) is not None else []
    caption = "The end of the way, and how many sequences each run took."
    if view.drawn_references:
        caption += " Band and line: the reference's mean, one standard deviation either way."
    size = panels.inches_of_rows(len(view.runs))
    return [Picture("target", "To the target", caption, (*close, panels.rows), size)]


def png(picture: Picture, view: Any, theme: Theme) -> bytes:
    """Draw a picture. view: what its panels draw."""
    from matplotlib import rc_context
    from PIL import Image

    drawn, small = io.BytesIO(), io.BytesIO()
    with rc_context(settings(theme)):
        figure(picture, view, theme).savefig(drawn, format="png")
    # 256 colours are enough for lines, and need a third of the bytes.
    image = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    image.save(small, "PNG", optimize=True)
    return small.getvalue()


def figure(picture: Picture, view: Any, theme: Theme) -> Figure:
    """A picture as matplotlib's figure, with the current settings."""
    from matplotlib.figure import Figure

    made = Figure(picture.inches, dpi=DOTS_PER_INCH, layout="constrained")
    made.get_layout_engine().set(w_pad=0.14, h_pad=0.1, wspace=0.05)
    places = made.subplots(1, len(picture.panels), squeeze=False)[0]
    for panel, axes in zip(picture.panels, places, strict=True):
        panel(axes, view, theme)
    _legend(made)
    return made


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
