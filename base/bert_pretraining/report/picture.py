"""A picture of a page, before it is drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bert_pretraining.report.style import FIGURE_INCHES, Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The second argument is what is drawn: in reports a `View`.
Panel = Callable[["Axes", Any, Theme], None]


@dataclass(frozen=True)
class Picture:
    """A picture that is not drawn yet: file name, heading and caption on the page, panels."""

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]
    inches: tuple[float, float] = FIGURE_INCHES
